// Python's side of cudahost: opens a library of kernels and makes its launchers callable with numpy arrays.
#include <dlfcn.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "cudahost_launchers.h"

namespace py = pybind11;
using cudahost::Launcher, cudahost::Parameter, cudahost::Value;

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

void call(const Launcher& launcher, const py::args& given) {
  size_t expected = 0;
  for (int i = 0; i < launcher.count; ++i) expected += launcher.parameters[i].kind != Parameter::stream;
  if (given.size() != expected)
    throw py::type_error(std::string(launcher.name) + " takes " + std::to_string(expected) +
                         " arguments, not " + std::to_string(given.size()));
  std::vector<Value> values(launcher.count);
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
  int code = launcher.call(launcher.launcher, values.data(), message, sizeof message);
  if (*message) throw std::runtime_error(message);
  if (code)
    throw std::runtime_error(std::string(launcher.name) + " returned CUDA error " + std::to_string(code));
}

py::dict open(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(dlerror());
  auto* launchers = static_cast<const Launcher*>(dlsym(library, "cudahost_launchers"));
  if (!launchers) throw std::runtime_error(dlerror());
  py::dict found;
  for (; launchers->name; ++launchers)
    found[launchers->name] =
        py::cpp_function([launchers](const py::args& given) { call(*launchers, given); });
  return found;
}

}  // namespace

PYBIND11_MODULE(cudahost_bridge, module) { module.def("open", &open); }
