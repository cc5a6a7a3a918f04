// Stochastic depth and soft-thresholding on the CPU: one pass over runs of elements. See fastreg/noise.py.
#ifndef FASTREG_ISA
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <type_traits>

#include "cpu/capability.h"
#include "cpu/elements.h"
#include "cpu/tensors.h"

namespace fastreg::noise {
// Over n elements of a dtype that lie side by side.
struct Passes {
  // out = x * scale + residual; without x (scale 0) it is the residual or 0.
  void (*scale)(ScalarType dtype, const void* x, const void* residual, void* out, int64_t n, double scale);
  void (*shrink)(ScalarType dtype, const void* x, void* out, int64_t n, double tau);
  // out = grad where |x| > tau, else 0; returns the sum of -sign(x) * out, in the dtype of computation.
  double (*shrink_backward)(ScalarType dtype, const void* grad, const void* x, void* out, int64_t n,
                            double tau);
};
}  // namespace fastreg::noise

#define FASTREG_FILE "cpu/noise.cpp"
#include "cpu/foreach_isa.h"

namespace fastreg {
namespace {
using noise::Passes;

constexpr int64_t kSegment = 16384;  // elements of a run that a task takes

// body(run, first element of all, elements) over runs of `run` elements; the last one may be shorter. A run
// is cut into segments where `cut`, else it goes to one thread.
template <class Body>
void each_run(int64_t elements, int64_t run, bool cut, const Body& body) {
  const int64_t segment = cut ? std::min(run, kSegment) : run;
  const int64_t runs = (elements + run - 1) / run, parts = (run + segment - 1) / segment;
  fastreg::run(runs * parts, elements, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / parts * run + i % parts * segment;
      const int64_t last = std::min({elements, i / parts * run + run, first + segment});
      if (first < last) body(i / parts, first, last - first);
    }
  });
}

// Where a tensor lies, asked once: each question to a tensor is a call.
struct Memory {
  char* data;
  int64_t size;
  explicit Memory(const Tensor& tensor)
      : data(static_cast<char*>(tensor.data_ptr())), size(tensor.element_size()) {}
  char* operator()(int64_t index) const { return data + index * size; }
};

// tau of a run: one of a table of samples and channels.
struct Thresholds {
  Elements tau;
  int64_t channels, sample_step, channel_step;
  double operator()(int64_t run) const {
    return tau.get<double>(run / channels * sample_step + run % channels * channel_step);
  }
};
}  // namespace

Tensor drop_path(const Tensor& x, const Tensor& mask, double p, std::optional<Tensor> residual) {
  const Passes passes = FASTREG_PICK(noise_passes)();
  const int64_t elements = x.numel(), rows = mask.numel();
  Tensor out = new_like(x);
  const Memory from(x), to(out), beside(residual ? *residual : x);
  const Elements keeps = elements_of(mask, 0, 1);
  const ScalarType dtype = x.scalar_type();
  const double kept = 1 / std::max(1 - p, 0x1p-126);
  each_run(elements, elements / rows, true, [&](int64_t row, int64_t first, int64_t n) {
    passes.scale(dtype, from(first), residual ? beside(first) : nullptr, to(first), n,
                 keeps.get<double>(row) != 0 ? kept : 0);
  });
  return out;
}

Tensor soft_threshold(const Tensor& x, const Tensor& tau, int64_t run, int64_t channels, int64_t sample_step,
                      int64_t channel_step) {
  const Passes passes = FASTREG_PICK(noise_passes)();
  const Thresholds taus{elements_of(tau, 0, 1), channels, sample_step, channel_step};
  Tensor out = new_like(x);
  const Memory from(x), to(out);
  const ScalarType dtype = x.scalar_type();
  each_run(x.numel(), run, true, [&](int64_t r, int64_t first, int64_t n) {
    passes.shrink(dtype, from(first), to(first), n, taus(r));
  });
  return out;
}

std::tuple<Tensor, Tensor> soft_threshold_backward(const Tensor& grad, const Tensor& x, const Tensor& tau,
                                                   int64_t run, int64_t channels, int64_t sample_step,
                                                   int64_t channel_step) {
  const Passes passes = FASTREG_PICK(noise_passes)();
  const Thresholds taus{elements_of(tau, 0, 1), channels, sample_step, channel_step};
  const int64_t runs = (x.numel() + run - 1) / run;
  Tensor grad_x = new_like(x), sums = new_tensor({runs}, tau.scalar_type());
  const Memory of_grad(grad), from(x), to(grad_x);
  const ScalarType dtype = x.scalar_type();
  const Elements out = elements_of(sums, 0, 1);
  each_run(x.numel(), run, false, [&](int64_t r, int64_t first, int64_t n) {
    const double t = taus(r);
    const double sum = passes.shrink_backward(dtype, of_grad(first), from(first), to(first), n, t);
    out.put(r, t < 0 ? 0 : sum);
  });
  return {grad_x, sums};
}
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg, CPU, m) {
  m.impl("drop_path.cpu", TORCH_BOX(&fastreg::drop_path));
  m.impl("soft_threshold.cpu", TORCH_BOX(&fastreg::soft_threshold));
  m.impl("soft_threshold_backward.cpu", TORCH_BOX(&fastreg::soft_threshold_backward));
}

#else
#include "cpu/simd.h"

namespace fastreg::FASTREG_ISA {
template <class T>
using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

// body(vectors of the inputs) gives a vector of `out`, for all n elements; the last vector is filled up with
// zeros.
template <class T, class Body, class... In>
FASTREG_INLINE void map(T* out, int64_t n, const Body& body, const In*... in) {
  constexpr int64_t width = lanes<Arithmetic<T> >;
  int64_t i = 0;
  for (; i + width <= n; i += width) store(out + i, body(load(in + i)...));
  if (i < n) store_first(out + i, body(load_first(in + i, n - i, Arithmetic<T>(0))...), n - i);
}

template <class T>
void scale_typed(const T* x, const T* residual, T* out, int64_t n, double factor) {
  using V = Vec<Arithmetic<T> >;
  const V by = splat(static_cast<Arithmetic<T> >(factor));
  if (factor == 0 && residual)
    __builtin_memcpy(out, residual, n * sizeof(T));
  else if (factor == 0)
    __builtin_memset(out, 0, n * sizeof(T));
  else if (residual)
    map(out, n, [by](V v, V r) __attribute__((always_inline)) { return v * by + r; }, x, residual);
  else
    map(out, n, [by](V v) __attribute__((always_inline)) { return v * by; }, x);
}

template <class V>
FASTREG_INLINE V larger_than(V x, V tau, V yes_up, V yes_down, V no) {
  return x > tau ? yes_up : -x > tau ? yes_down : no;
}

template <class T>
void shrink_typed(const T* x, T* out, int64_t n, double threshold) {
  using A = Arithmetic<T>;
  using V = Vec<A>;
  const V tau = splat(static_cast<A>(threshold < 0 ? 0 : threshold));
  map(
      out, n,
      [tau](V v)
          __attribute__((always_inline)) { return larger_than<V>(v, tau, v - tau, v + tau, v * A(0)); },
      x);
}

template <class T>
double shrink_backward_typed(const T* grad, const T* x, T* out, int64_t n, double threshold) {
  using A = Arithmetic<T>;
  using V = Vec<A>;
  const V tau = splat(static_cast<A>(threshold < 0 ? 0 : threshold)), zero = {};
  V sum = {};
  double total = 0;
  int64_t count = 0;
  const auto flush = [&] {  // few terms are summed in their own dtype
    total += static_cast<double>(horizontal_sum(sum));
    sum = zero;
  };
  map(
      out, n,
      [&](V g, V v) __attribute__((always_inline)) {
        sum += larger_than<V>(v, tau, -g, g, zero);
        if (++count % 64 == 0) flush();
        return larger_than<V>(v, tau, g, g, zero);
      },
      grad, x);
  flush();
  return total;
}

#define FASTREG_BY_DTYPE(dtype, call)               \
  switch (dtype) {                                  \
    case torch::headeronly::ScalarType::Half: {     \
      using T = Half;                               \
      return call;                                  \
    }                                               \
    case torch::headeronly::ScalarType::BFloat16: { \
      using T = BFloat16;                           \
      return call;                                  \
    }                                               \
    case torch::headeronly::ScalarType::Double: {   \
      using T = double;                             \
      return call;                                  \
    }                                               \
    default: {                                      \
      using T = float;                              \
      return call;                                  \
    }                                               \
  }

static void scale(ScalarType dtype, const void* x, const void* residual, void* out, int64_t n, double by) {
  FASTREG_BY_DTYPE(dtype, scale_typed(static_cast<const T*>(x), static_cast<const T*>(residual),
                                      static_cast<T*>(out), n, by))
}
static void shrink(ScalarType dtype, const void* x, void* out, int64_t n, double tau) {
  FASTREG_BY_DTYPE(dtype, shrink_typed(static_cast<const T*>(x), static_cast<T*>(out), n, tau))
}
static double shrink_backward(ScalarType dtype, const void* grad, const void* x, void* out, int64_t n,
                              double tau){
    FASTREG_BY_DTYPE(dtype, shrink_backward_typed(static_cast<const T*>(grad), static_cast<const T*>(x),
                                                  static_cast<T*>(out), n, tau))}
#undef FASTREG_BY_DTYPE

noise::Passes noise_passes() {
  return {scale, shrink, shrink_backward};
}
}  // namespace fastreg::FASTREG_ISA
#endif
