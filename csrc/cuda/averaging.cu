// Weight averaging in CUDA: every tensor and every average of a model in one launch. The formulas and the
// table's layout stand in averaging.h.
//
// Bytes     each parameter read once, each average read and written once, whatever their number.
// Launches  one. A block takes one chunk, branches on the row's dtypes, and computes the weights from the
//           counter; the last block to finish advances the counter, so that no other can see it change.
// Accesses  128 bits where all addresses of a row are multiples of 16 bytes; other rows go by elements.
// Numerics  fp32 (fp64 where either side is), one rounding; the weights in fp64.
#include <cstdint>
#include <type_traits>

#include "averaging.h"
#include "cuda/averaging_launch.h"
#include "cuda/elements.h"
#include "cuda/launch.h"

namespace fastreg::cuda {
namespace {
namespace av = fastreg::averaging;
constexpr int kThreads = 256;  // of three blocks a multiprocessor: 80 registers are enough not to spill

struct Chunk {
  const int64_t* row;
  int64_t number, first, length;
};

// How an average is rounded in update n; not at all stochastically without a seed.
struct Rounding {
  bool stochastic;
  int64_t seed, n;
};

__device__ Chunk chunk_of(const int64_t* table, const int64_t* chunks, int64_t chunk, int columns) {
  const int64_t number = chunks[2 * int64_t(blockIdx.x)], first = chunks[2 * int64_t(blockIdx.x) + 1];
  const int64_t* row = table + number * columns;
  const int64_t left = row[av::kElements] - first;
  return {row, number, first, left < chunk ? left : chunk};
}

template <class T>
__device__ T* address(const int64_t* row, int column) {
  return reinterpret_cast<T*>(row[column]);
}

// G elements, moved in 16-byte accesses.
template <class T, int G>
struct alignas(16) Group {
  T values[G];

  __device__ void load(const T* from) {
    const uint4* vectors = reinterpret_cast<const uint4*>(from);
#pragma unroll
    for (int i = 0; i < int(G * sizeof(T) / 16); ++i) reinterpret_cast<uint4*>(values)[i] = vectors[i];
  }
  __device__ void store(T* to) const {
    uint4* vectors = reinterpret_cast<uint4*>(to);
#pragma unroll
    for (int i = 0; i < int(G * sizeof(T) / 16); ++i) vectors[i] = reinterpret_cast<const uint4*>(values)[i];
  }
};

// One element of one average.
template <class P, class S, class A>
__device__ S averaged(S average, P param, double weight, A w, bool stochastic, uint32_t key, int64_t index) {
  const A s = static_cast<A>(widen(average)), p = static_cast<A>(widen(param)), difference = p - s;
  const A x = w < A(0.5) ? s + difference * w : p + difference * (w - A(1));
  if (weight == 1) {
    if constexpr (std::is_same_v<P, S>) return param;
    return nearest<S>(p);
  }
  if constexpr (sizeof(S) == 2) {
    if (stochastic) {
      const uint32_t random = av::random_bits(key, static_cast<uint32_t>(index));
      const float f = static_cast<float>(x);
      return nearest<S>(std::is_same_v<S, __half> ? av::stochastic_half(f, random)
                                                  : av::stochastic_bfloat16(f, random));
    }
  }
  return nearest<S>(x);
}

template <class P, class S>
__device__ void run(const Chunk& c, const double* weights, int averages, const Rounding& rounding) {
  using A = std::conditional_t<std::is_same_v<P, double> || std::is_same_v<S, double>, double, float>;
  constexpr int G = 16 / (sizeof(P) < sizeof(S) ? sizeof(P) : sizeof(S));
  const int64_t codes = c.row[av::kCodes];
  const bool copied = codes & av::kCopied;
  const P* param = address<P>(c.row, av::kParam) + c.first;
  const int64_t groups = codes & av::kAligned ? c.length / G : 0;
  for (int64_t g = threadIdx.x; g < groups; g += kThreads) {
    Group<P, G> p;
    p.load(param + g * G);
    for (int j = 0; j < averages; ++j) {
      const double weight = copied ? 1 : weights[j];
      if (weight == 0) continue;
      S* place = address<S>(c.row, av::kAverages + j) + c.first + g * G;
      const uint32_t key =
          rounding.stochastic ? av::rounding_key(rounding.seed, rounding.n, j, c.number, c.first >> 32) : 0;
      Group<S, G> s;
      s.load(place);
#pragma unroll
      for (int i = 0; i < G; ++i)
        s.values[i] = averaged(s.values[i], p.values[i], weight, static_cast<A>(weight), rounding.stochastic,
                               key, c.first + g * G + i);
      s.store(place);
    }
  }
  for (int64_t i = groups * G + threadIdx.x; i < c.length; i += kThreads) {
    const P p = param[i];
    for (int j = 0; j < averages; ++j) {
      const double weight = copied ? 1 : weights[j];
      if (weight == 0) continue;
      S* place = address<S>(c.row, av::kAverages + j) + c.first + i;
      const uint32_t key =
          rounding.stochastic ? av::rounding_key(rounding.seed, rounding.n, j, c.number, c.first >> 32) : 0;
      *place = averaged(*place, p, weight, static_cast<A>(weight), rounding.stochastic, key, c.first + i);
    }
  }
}

template <class P>
__device__ void run_param(const Chunk& c, const double* weights, int averages, const Rounding& rounding) {
  switch (av::average_code(c.row[av::kCodes])) {
    case av::kFloat:
      return run<P, float>(c, weights, averages, rounding);
    case av::kHalf:
      return run<P, __half>(c, weights, averages, rounding);
    case av::kBFloat16:
      return run<P, __nv_bfloat16>(c, weights, averages, rounding);
    case av::kDouble:
      return run<P, double>(c, weights, averages, rounding);
  }
}

// body(one, other, T): for each 16-byte vector of two runs of bytes where they are aligned, else for each
// byte.
template <class Body>
__device__ void each_of_bytes(const Chunk& c, const Body& body) {
  const int64_t vectors = c.row[av::kCodes] & av::kAligned ? c.length / 16 : 0;
  for (int64_t i = threadIdx.x; i < vectors; i += kThreads) body(uint4{}, c.first / 16 + i);
  for (int64_t i = vectors * 16 + threadIdx.x; i < c.length; i += kThreads) body(uint8_t{}, c.first + i);
}

__device__ void run_chunk(const Chunk& c, const double* weights, int averages, const Rounding& rounding) {
  switch (av::param_code(c.row[av::kCodes])) {
    case av::kFloat:
      return run_param<float>(c, weights, averages, rounding);
    case av::kHalf:
      return run_param<__half>(c, weights, averages, rounding);
    case av::kBFloat16:
      return run_param<__nv_bfloat16>(c, weights, averages, rounding);
    case av::kDouble:
      return run_param<double>(c, weights, averages, rounding);
  }
  each_of_bytes(c, [&](auto unit, int64_t i) {  // raw: always copied
    using T = decltype(unit);
    const T value = address<T>(c.row, av::kParam)[i];
    for (int j = 0; j < averages; ++j) address<T>(c.row, av::kAverages + j)[i] = value;
  });
}

__global__ void __launch_bounds__(kThreads, 3)
    update_kernel(const int64_t* table, const int64_t* chunks, int64_t count, int64_t chunk, int averages,
                  const double* rules, int64_t* n_averaged, int64_t* calls, int32_t* ticket,
                  const float* found_inf, int64_t update_every, int64_t start_step, bool stochastic,
                  int64_t seed) {
  __shared__ double weights[kMaxAverages];
  const int64_t n = *n_averaged, call = *calls;
  const bool counted = found_inf == nullptr || *found_inf == 0;
  const bool due = counted && av::is_due(call, update_every, start_step);
  if (due && static_cast<int>(threadIdx.x) < averages)
    weights[threadIdx.x] = av::weight_of(rules + threadIdx.x * av::kRuleSize, n);
  __syncthreads();
  if (due && blockIdx.x < count)
    run_chunk(chunk_of(table, chunks, chunk, av::kAverages + averages), weights, averages,
              {stochastic, seed, n});
  // Here every thread of this block has read the counters; the block that is last to say so writes them.
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    if (atomicAdd(ticket, 1) == static_cast<int32_t>(gridDim.x) - 1) {
      *ticket = 0;
      if (counted) *calls = call + 1;
      if (due) *n_averaged = n + 1;
    }
  }
}

__global__ void __launch_bounds__(kThreads, 3)
    lerp_kernel(const int64_t* table, const int64_t* chunks, int64_t chunk, double given,
                const double* weight_tensor) {
  const double weight = weight_tensor ? *weight_tensor : given;
  if (weight != 0) run_chunk(chunk_of(table, chunks, chunk, av::kAverages + 1), &weight, 1, {});
}

__global__ void __launch_bounds__(kThreads, 3)
    swap_kernel(const int64_t* table, const int64_t* chunks, int64_t chunk) {
  const Chunk c = chunk_of(table, chunks, chunk, av::kAverages + 1);
  each_of_bytes(c, [&](auto unit, int64_t i) {
    using T = decltype(unit);
    T &one = address<T>(c.row, av::kParam)[i], &other = address<T>(c.row, av::kAverages)[i];
    const T kept = one;
    one = other;
    other = kept;
  });
}

bool too_many(int64_t blocks) { return blocks > 0x7fffffff; }
}  // namespace

cudaError_t average_update(const int64_t* table, const int64_t* chunks, int64_t count, int64_t chunk,
                           int averages, const double* rules, int64_t* n_averaged, int64_t* calls,
                           int32_t* ticket, const float* found_inf, int64_t update_every, int64_t start_step,
                           bool stochastic, int64_t seed, cudaStream_t stream) {
  if (averages > kMaxAverages || too_many(count)) return cudaErrorInvalidValue;
  const unsigned blocks = count > 0 ? static_cast<unsigned>(count) : 1;  // no tensors: the call still counts
  LAUNCH(update_kernel, dim3(blocks), dim3(kThreads), 0, stream, table, chunks, count, chunk, averages, rules,
         n_averaged, calls, ticket, found_inf, update_every, start_step, stochastic, seed);
  return cudaGetLastError();
}

cudaError_t average_lerp(const int64_t* table, const int64_t* chunks, int64_t count, int64_t chunk,
                         double weight, const double* weight_tensor, cudaStream_t stream) {
  if (too_many(count)) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  LAUNCH(lerp_kernel, dim3(static_cast<unsigned>(count)), dim3(kThreads), 0, stream, table, chunks, chunk,
         weight, weight_tensor);
  return cudaGetLastError();
}

cudaError_t average_swap(const int64_t* table, const int64_t* chunks, int64_t count, int64_t chunk,
                         cudaStream_t stream) {
  if (too_many(count)) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  LAUNCH(swap_kernel, dim3(static_cast<unsigned>(count)), dim3(kThreads), 0, stream, table, chunks, chunk);
  return cudaGetLastError();
}
}  // namespace fastreg::cuda
