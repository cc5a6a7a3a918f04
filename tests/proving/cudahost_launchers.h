// Describes launchers so that cudahost_bridge.cpp can call them from Python. Free of pybind11, which takes
// longer to compile than the kernels: the bridge is built once, the kernels whenever they change.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdio>
#include <exception>
#include <type_traits>
#include <utility>

namespace cudahost {

union Value {
  const void* pointer;
  long long integer;
  double real;
};

struct Parameter {
  enum Kind { pointer, output_pointer, integer, boolean, real, stream } kind;
  size_t element_size;  // of what a pointer points to; 0 for void
};

struct Launcher {
  const char* name;
  const Parameter* parameters;
  int count;
  // Returns a cudaError_t (0 if the launcher returns nothing). An exception's text goes to `message`.
  int (*call)(const void* launcher, const Value* values, char* message, size_t capacity);
  const void* launcher;
};

template <class P>
constexpr Parameter describe() {
  if constexpr (std::is_same_v<P, cudaStream_t>) {
    return {Parameter::stream, 0};
  } else if constexpr (std::is_pointer_v<P>) {
    using Pointee = std::remove_pointer_t<P>;
    size_t size = 0;
    if constexpr (!std::is_void_v<std::remove_cv_t<Pointee>>) size = sizeof(Pointee);
    return {std::is_const_v<Pointee> ? Parameter::pointer : Parameter::output_pointer, size};
  } else if constexpr (std::is_same_v<P, bool>) {
    return {Parameter::boolean, 0};
  } else {
    static_assert(std::is_arithmetic_v<P> || std::is_enum_v<P>,
                  "a launcher takes pointers, numbers and a stream");
    return {std::is_floating_point_v<P> ? Parameter::real : Parameter::integer, 0};
  }
}

template <class P>
P extract(const Value& value) {
  if constexpr (std::is_same_v<P, cudaStream_t>)
    return nullptr;
  else if constexpr (std::is_pointer_v<P>)
    return static_cast<P>(const_cast<void*>(value.pointer));
  else if constexpr (std::is_floating_point_v<P>)
    return static_cast<P>(value.real);
  else
    return static_cast<P>(value.integer);
}

template <class R, class... P>
Launcher describe(const char* name, R (*launcher)(P...)) {
  static_assert(std::is_void_v<R> || std::is_same_v<R, cudaError_t>,
                "a launcher returns cudaError_t or nothing");
  static constexpr Parameter parameters[] = {describe<P>()..., {}};
  auto call = [](const void* function, const Value* values, char* message, size_t capacity) -> int {
    auto run = [&]<size_t... I>(std::index_sequence<I...>) {
      return reinterpret_cast<R (*)(P...)>(const_cast<void*>(function))(extract<P>(values[I])...);
    };
    try {
      if constexpr (std::is_void_v<R>)
        return run(std::index_sequence_for<P...>{}), 0;
      else
        return static_cast<int>(run(std::index_sequence_for<P...>{}));
    } catch (const std::exception& exception) {
      std::snprintf(message, capacity, "%s", exception.what());
      return -1;
    }
  };
  return {name, parameters, static_cast<int>(sizeof...(P)), call, reinterpret_cast<const void*>(launcher)};
}

}  // namespace cudahost
