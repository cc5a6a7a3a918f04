// Binds launchers to Python: `cudahost::bind(module, "name", &launcher)`.
//
// A pointer parameter takes a numpy array or None, a `cudaStream_t` parameter is left out of the Python call,
// anything else goes through pybind11. A cudaError_t that is not success becomes an exception, as do
// cudahost's own errors.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <utility>

namespace cudahost {

namespace py = pybind11;

template <class P>
P argument(const py::handle& value, const char* function, size_t position) {
  if constexpr (std::is_pointer_v<P>) {
    if (value.is_none()) return nullptr;
    if (!py::isinstance<py::array>(value))
      throw py::type_error(std::string(function) + ": argument " + std::to_string(position) +
                           " is a pointer: pass a numpy array or None");
    auto array = py::reinterpret_borrow<py::array>(value);
    using Pointee = std::remove_pointer_t<P>;
    if constexpr (!std::is_void_v<std::remove_cv_t<Pointee>>)
      if (size_t(array.itemsize()) != sizeof(Pointee))
        throw py::type_error(std::string(function) + ": argument " + std::to_string(position) +
                             " points to " + std::to_string(sizeof(Pointee)) +
                             "-byte elements, the array's have " + std::to_string(array.itemsize()));
    if constexpr (std::is_const_v<Pointee>)
      return static_cast<P>(array.data());
    else
      return static_cast<P>(array.mutable_data());  // raises if the array is read-only
  } else {
    return value.cast<P>();
  }
}

template <class R, class... P>
void bind(py::module_& module, const char* name, R (*launcher)(P...)) {
  module.def(name, [name, launcher](const py::args& given) -> py::object {
    constexpr size_t expected = (size_t(!std::is_same_v<P, cudaStream_t>) + ... + 0);
    if (given.size() != expected)
      throw py::type_error(std::string(name) + " takes " + std::to_string(expected) + " arguments, not " +
                           std::to_string(given.size()));
    size_t next = 0;
    auto take = [&]<class A>(std::type_identity<A>) -> A {
      if constexpr (std::is_same_v<A, cudaStream_t>) {
        return nullptr;
      } else {
        size_t position = next++;
        return argument<A>(given[position], name, position);
      }
    };
    std::tuple<P...> arguments{take(std::type_identity<P>{})...};  // braces: evaluated from left to right
    if constexpr (std::is_void_v<R>) {
      std::apply(launcher, arguments);
      return py::none();
    } else if constexpr (std::is_same_v<R, cudaError_t>) {
      cudaError_t code = std::apply(launcher, arguments);
      if (code != cudaSuccess)
        throw Error(std::string(name) + " returned CUDA error " + std::to_string(code));
      return py::none();
    } else {
      return py::cast(std::apply(launcher, arguments));
    }
  });
}

}  // namespace cudahost
