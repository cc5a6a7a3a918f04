// Stochastic depth and soft-thresholding in CUDA: one pass each way. The formulas stand in fastreg/noise.py.
//
// Bytes     drop_path: x where the branch is kept, the residual, the output, once each. soft_threshold: x and
//           the output once each; backward, x and the gradient once, x's gradient and a sum per run of
//           elements.
// Launches  1 each.
// Accesses  128 bits where the tensors lie alike modulo 16 bytes, but for the ends of a run.
// Numerics  fp32 (fp64 for fp64), one rounding; sums over a run in a fixed order.
#include "cuda/elements.h"
#include "cuda/launch.h"
#include "cuda/noise_launch.h"

namespace fastreg::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPart = 8192;  // elements of a row that a block takes

bool lie_alike(const void* a, const void* b, const void* c = nullptr) {
  const auto x = reinterpret_cast<uintptr_t>(a), y = reinterpret_cast<uintptr_t>(b),
             z = c ? reinterpret_cast<uintptr_t>(c) : y;
  return (x ^ y) % 16 == 0 && (y ^ z) % 16 == 0;
}

// body(i) for single elements and wide(i) for vectors of 16 bytes, over a lane's share of [begin, end).
template <class T, class Body, class Wide>
__device__ void share_out(const T* x, bool alike, int64_t begin, int64_t end, int lane, int lanes,
                          const Body& body, const Wide& wide) {
  if (!alike) {
    for (int64_t i = begin + lane; i < end; i += lanes) body(i);
    return;
  }
  const auto some = [&](int64_t i, int64_t pitch) {
#pragma unroll
    for (int v = 0; v < in_flight; ++v) wide(i + v * pitch);
  };
  deal(x, begin, end, lane, lanes, body, some, wide);
}

template <class T>
__device__ Vector<T> vector_at(const T* from) {
  return *reinterpret_cast<const Vector<T>*>(from);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    drop_path_kernel(const T* x, const T* mask, const T* residual, T* out, int64_t length, int64_t parts,
                     Arithmetic<T> kept, bool alike) {
  using A = Arithmetic<T>;
  const int64_t row = blockIdx.x / parts, begin = row * length + blockIdx.x % parts * kPart;
  const int64_t end = begin + kPart < (row + 1) * length ? begin + kPart : (row + 1) * length;
  const bool keeps = static_cast<float>(mask[row]) != 0;
  const auto value = [&](A v, A r) { return static_cast<T>((keeps ? v * kept : A(0)) + r); };
  share_out(
      x, alike, begin, end, threadIdx.x, kThreads,
      [&](int64_t i) {
        const T v = value(keeps ? static_cast<A>(x[i]) : A(0), residual ? static_cast<A>(residual[i]) : A(0));
        out[i] = v;
      },
      [&](int64_t i) {
        Vector<T> v{}, r{};
        if (keeps) v = vector_at(x + i);
        if (residual) r = vector_at(residual + i);
#pragma unroll
        for (int k = 0; k < Vector<T>::size; ++k)
          v.values[k] = value(static_cast<A>(v.values[k]), residual ? static_cast<A>(r.values[k]) : A(0));
        store(out + i, v);
      });
}

struct Runs {
  int64_t elements, run, channels, sample_step, channel_step;

  template <class A>
  __device__ A threshold(const A* tau, int64_t r) const {
    return tau[r / channels * sample_step + r % channels * channel_step];
  }
  int64_t count() const { return ceil_div(elements, run); }
};

// A run goes to LANES threads: of a warp, or all of the block.
template <class T, bool BACKWARD, int LANES>
__global__ void __launch_bounds__(kThreads, 2)
    shrink_kernel(const T* grad, const T* x, const Arithmetic<T>* tau, T* out, Arithmetic<T>* sums, Runs runs,
                  bool alike) {
  using A = Arithmetic<T>;
  __shared__ A warps[32];
  const int64_t r = int64_t(blockIdx.x) * (kThreads / LANES) + threadIdx.x / LANES;
  const int64_t begin = r * runs.run, past = begin + runs.run;
  const int64_t end = past < runs.elements ? past : runs.elements;
  const bool live = begin < runs.elements;
  const A given = live ? runs.threshold(tau, r) : A(0), t = given > 0 ? given : A(0);
  A sum = 0;
  const auto value = [&](A g, A v) {
    if constexpr (BACKWARD) {
      if (v > t) return sum -= g, static_cast<T>(g);
      if (-v > t) return sum += g, static_cast<T>(g);
      return static_cast<T>(A(0));
    } else {
      return static_cast<T>(v > t ? v - t : -v > t ? v + t : v * A(0));
    }
  };
  if (live)
    share_out(
        x, alike, begin, end, threadIdx.x % LANES, LANES,
        [&](int64_t i) {
          const T v = value(BACKWARD ? static_cast<A>(grad[i]) : A(0), static_cast<A>(x[i]));
          out[i] = v;
        },
        [&](int64_t i) {
          Vector<T> v = vector_at(x + i), g{};
          if constexpr (BACKWARD) g = vector_at(grad + i);
#pragma unroll
          for (int k = 0; k < Vector<T>::size; ++k)
            v.values[k] = value(static_cast<A>(g.values[k]), static_cast<A>(v.values[k]));
          store(out + i, v);
        });
  if constexpr (BACKWARD) {
    if constexpr (LANES > 32) {
      sum = sum_block(sum, warps);
    } else {
      for (int step = LANES / 2; step > 0; step /= 2) sum += __shfl_down_sync(everyone, sum, step, LANES);
    }
    if (live && threadIdx.x % LANES == 0) sums[r] = given < 0 ? A(0) : sum;
  }
}

template <bool BACKWARD>
cudaError_t shrink(int dtype, const void* grad, const void* x, const void* tau, void* out, void* sums,
                   const Runs& runs, cudaStream_t stream) {
  if (runs.elements == 0) return cudaSuccess;
  return with_type(dtype, [&]<class T>() {
    using A = Arithmetic<T>;
    const bool alike = lie_alike(x, out, grad), wide = runs.run > 2048;
    const int64_t blocks = wide ? runs.count() : ceil_div(runs.count(), kThreads / 32);
    if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
    auto* kernel = wide ? &shrink_kernel<T, BACKWARD, kThreads> : &shrink_kernel<T, BACKWARD, 32>;
    LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream,
           static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<const A*>(tau),
           static_cast<T*>(out), static_cast<A*>(sums), runs, alike);
    return cudaGetLastError();
  });
}
}  // namespace

cudaError_t drop_path(int dtype, const void* x, const void* mask, const void* residual, void* out,
                      int64_t elements, int64_t rows, double p, cudaStream_t stream) {
  if (elements == 0) return cudaSuccess;
  return with_type(dtype, [&]<class T>() {
    using A = Arithmetic<T>;
    const int64_t length = elements / rows, parts = ceil_div(length, kPart);
    if (rows * parts > 0x7fffffff) return cudaErrorInvalidValue;
    const A kept = static_cast<A>(1 / (1 - p > 0x1p-126 ? 1 - p : 0x1p-126));
    LAUNCH(drop_path_kernel<T>, dim3(static_cast<unsigned>(rows * parts)), dim3(kThreads), 0, stream,
           static_cast<const T*>(x), static_cast<const T*>(mask), static_cast<const T*>(residual),
           static_cast<T*>(out), length, parts, kept, lie_alike(x, out, residual));
    return cudaGetLastError();
  });
}

cudaError_t soft_threshold(int dtype, const void* x, const void* tau, void* out, int64_t elements,
                           int64_t run, int64_t channels, int64_t sample_step, int64_t channel_step,
                           cudaStream_t stream) {
  const Runs runs{elements, run, channels, sample_step, channel_step};
  return shrink<false>(dtype, nullptr, x, tau, out, nullptr, runs, stream);
}

cudaError_t soft_threshold_backward(int dtype, const void* grad, const void* x, const void* tau, void* grad_x,
                                    void* sums, int64_t elements, int64_t run, int64_t channels,
                                    int64_t sample_step, int64_t channel_step, cudaStream_t stream) {
  const Runs runs{elements, run, channels, sample_step, channel_step};
  return shrink<true>(dtype, grad, x, tau, grad_x, sums, runs, stream);
}
}  // namespace fastreg::cuda
