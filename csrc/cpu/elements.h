// Element access by dtype, and the division of work among threads.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

namespace fastreg {
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kParallel = 32768;  // elements worth a second thread

// A tensor read or written element by element: one value per row, or per class. Strides are in elements.
struct Elements {
  char* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t outer = 0, inner = 0;

  int64_t at(int64_t o, int64_t i) const { return o * outer + i * inner; }

  template <class A>
  A get(int64_t index) const {
    switch (dtype) {
      case ScalarType::Half:
        return static_cast<A>(reinterpret_cast<const Half*>(data)[index]);
      case ScalarType::BFloat16:
        return static_cast<A>(reinterpret_cast<const BFloat16*>(data)[index]);
      case ScalarType::Double:
        return static_cast<A>(reinterpret_cast<const double*>(data)[index]);
      case ScalarType::Float:
        return static_cast<A>(reinterpret_cast<const float*>(data)[index]);
      case ScalarType::Int:
        return static_cast<A>(reinterpret_cast<const int32_t*>(data)[index]);
      case ScalarType::Byte:
        return static_cast<A>(reinterpret_cast<const uint8_t*>(data)[index]);
      default:
        return static_cast<A>(reinterpret_cast<const int64_t*>(data)[index]);
    }
  }

  template <class A>
  void put(int64_t index, A value) const {
    switch (dtype) {
      case ScalarType::Half:
        reinterpret_cast<Half*>(data)[index] = static_cast<float>(value);
        break;
      case ScalarType::BFloat16:
        reinterpret_cast<BFloat16*>(data)[index] = static_cast<float>(value);
        break;
      case ScalarType::Double:
        reinterpret_cast<double*>(data)[index] = value;
        break;
      default:
        reinterpret_cast<float*>(data)[index] = static_cast<float>(value);
    }
  }
};

inline Elements elements_of(const Tensor& tensor, int64_t outer, int64_t inner) {
  return {static_cast<char*>(tensor.data_ptr()), tensor.scalar_type(), outer, inner};
}

// Calls f(begin, end) over the tasks, on as many threads as the elements are worth.
template <class F>
void run(int64_t tasks, int64_t elements, const F& f) {
  const int64_t threads = std::min<int64_t>(elements / kParallel, tasks);
  if (threads <= 1)
    f(int64_t{0}, tasks);
  else
    torch::stable::parallel_for(0, tasks, (tasks + threads - 1) / threads, f);
}

}  // namespace fastreg
