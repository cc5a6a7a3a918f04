// Python's side of cudahost: opens a library of kernels and makes its launchers callable with numpy arrays.
#include <dlfcn.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cudahost_launchers.h"
#include "cudahost_meter.h"

namespace py = pybind11;
using cudahost::Buffer, cudahost::Launcher, cudahost::Meter, cudahost::Metered, cudahost::Parameter,
    cudahost::Value;

namespace {

const void* pointer_to(const py::handle& given, const Parameter& parameter, const std::string& what) {
  if (given.is_none()) return nullptr;
  if (!py::isinstance<py::array>(given)) throw py::type_error(what + " is a pointer: pass an array or None");
  auto array = py::reinterpret_borrow<py::array>(given);
  if (parameter.element_size && size_t(array.itemsize()) != parameter.element_size)
    throw py::type_error(what + " points to " + std::to_string(parameter.element_size) +
                         "-byte elements, the array's have " + std::to_string(array.itemsize()));
  if (parameter.kind == Parameter::output_pointer && !array.writeable())
    throw py::value_error(what + " is written through, and the array is not writeable");
  return array.data();
}

template <class T>
py::array copied(const std::vector<T>& values) {
  return py::array_t<T>(py::ssize_t(values.size()), values.data());
}

// What the meter counted: per launch (the kernel's offset in its library, loaded, stored, atomic, load
// widths, store widths,
// [(address, bytes per element, loads, stores) per array]).
py::list metered(const Meter& meter) {
  std::vector<Buffer> buffers;
  std::vector<Metered> launches;
  meter.end(buffers, launches);
  py::list out;
  for (const Metered& launch : launches) {
    py::list counts;
    for (size_t i = 0; i < buffers.size(); ++i)
      counts.append(py::make_tuple(buffers[i].start, buffers[i].unit, copied(launch.loads[i]),
                                   copied(launch.stores[i])));
    Dl_info info{};
    dladdr(launch.kernel, &info);
    auto offset = static_cast<const char*>(launch.kernel) - static_cast<const char*>(info.dli_fbase);
    out.append(py::make_tuple(offset, launch.loaded, launch.stored, launch.atomic, launch.load_widths,
                              launch.store_widths, counts));
  }
  return out;
}

py::object call(const Launcher& launcher, const Meter* meter, const py::args& given) {
  size_t expected = 0;
  for (int i = 0; i < launcher.count; ++i) expected += launcher.parameters[i].kind != Parameter::stream;
  if (given.size() < expected)
    throw py::type_error(std::string(launcher.name) + " takes " + std::to_string(expected) +
                         " arguments, not " + std::to_string(given.size()));
  std::vector<Value> values(launcher.count);
  std::vector<Buffer> buffers;
  for (size_t i = 0; i < given.size(); ++i) {
    if (!py::isinstance<py::array>(given[i])) {
      if (i < expected) continue;
      throw py::type_error(std::string(launcher.name) + ": past its " + std::to_string(expected) +
                           " arguments only arrays may follow, which it reaches through addresses");
    }
    auto array = py::reinterpret_borrow<py::array>(given[i]);
    // From the lowest to the highest address that its elements have, whatever the strides.
    uintptr_t low = reinterpret_cast<uintptr_t>(array.data()), high = low + size_t(array.itemsize());
    for (int d = 0; d < array.ndim(); ++d) high += size_t(array.shape(d) - 1) * size_t(array.strides(d));
    if (array.size()) buffers.push_back({low, high - low, size_t(array.itemsize()), int(i)});
  }
  size_t next = 0;
  for (int i = 0; i < launcher.count; ++i) {
    const Parameter& parameter = launcher.parameters[i];
    if (parameter.kind == Parameter::stream) continue;
    std::string what = std::string(launcher.name) + ": argument " + std::to_string(next);
    py::handle value = given[next++];
    switch (parameter.kind) {
      case Parameter::integer:
        values[i].integer = value.cast<long long>();
        break;
      case Parameter::boolean:
        values[i].integer = value.cast<bool>();
        break;
      case Parameter::real:
        values[i].real = value.cast<double>();
        break;
      default:
        values[i].pointer = pointer_to(value, parameter, what);
    }
  }
  char message[1024] = "";
  if (meter) meter->begin(buffers.data(), int(buffers.size()));
  int code = launcher.call(launcher.launcher, values.data(), message, sizeof message);
  py::object counted = py::none();
  if (meter) counted = metered(*meter);
  if (*message) throw std::runtime_error(message);
  if (code)
    throw std::runtime_error(std::string(launcher.name) + " returned CUDA error " + std::to_string(code));
  return counted;
}

py::dict open(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(dlerror());
  auto* launchers = static_cast<const Launcher*>(dlsym(library, "cudahost_launchers"));
  if (!launchers) throw std::runtime_error(dlerror());
  auto* meter = static_cast<const Meter*>(dlsym(library, "cudahost_meter"));  // null unless it was built in
  py::dict found;
  for (; launchers->name; ++launchers)
    found[launchers->name] = py::cpp_function(
        [launchers, meter](const py::args& given) { return call(*launchers, meter, given); });
  return found;
}

}  // namespace

PYBIND11_MODULE(cudahost_bridge, module) { module.def("open", &open); }
