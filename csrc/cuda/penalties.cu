// Lp penalties and FGM in CUDA: one pass over the tensors of a plan. The formulas and the tables' layout
// stand in penalties.h.
//
// Bytes     norms: each weight once. Gradient: the weight once, the gradient written once, and read where
//           added to. Attack: each gradient once; weight and backup only in the blocks of 64 where the
//           gradient is not zero.
// Launches  norms: 3, whatever the number of tensors: a sum per chunk, a norm per tensor, the penalty. An
//           attack: the first two of these, for the gradients, and 1. The others: 1, a block per chunk.
// Accesses  128 bits where all addresses of a tensor are multiples of 16 bytes; other tensors go by elements.
// Numerics  sums in fp64, in an order that the plan fixes. Where powers could overflow or vanish they are of
//           values relative to the largest so far.
#include "cuda/elements.h"
#include "cuda/launch.h"
#include "cuda/penalties_launch.h"
#include "penalties.h"

namespace fastreg::cuda {
namespace {
namespace pn = fastreg::penalties;
using max_norm::Order;

constexpr int kThreads = 256;

struct Chunk {
  const int64_t* row;
  int64_t tensor, first, length;

  template <class T>
  __device__ T* at(int64_t address) const {
    return reinterpret_cast<T*>(address) + first;
  }
};

__device__ Chunk chunk_of(const int64_t* table, const int64_t* chunks, int64_t chunk, int columns) {
  const int64_t tensor = chunks[2 * int64_t(blockIdx.x)], first = chunks[2 * int64_t(blockIdx.x) + 1];
  const int64_t* row = table + tensor * columns;
  const int64_t left = row[pn::kElements] - first;
  return {row, tensor, first, left < chunk ? left : chunk};
}

// run.operator()<T>() for the chunk's dtype.
template <class Run>
__device__ void by_type(const Chunk& c, const Run& run) {
  switch (c.row[pn::kCode]) {
    case max_norm::kFloat:
      return run.template operator()<float>();
    case max_norm::kHalf:
      return run.template operator()<__half>();
    case max_norm::kBFloat16:
      return run.template operator()<__nv_bfloat16>();
    case max_norm::kDouble:
      return run.template operator()<double>();
  }
}

__device__ bool is_aligned(int64_t a, int64_t b = 0, int64_t c = 0) { return ((a | b | c) & 15) == 0; }

// ---- norms -----------------------------------------------------------------------------------------------
template <Order ORDER>
__device__ double power(double x, double p) {
  return ORDER == Order::two ? x * x : ORDER == Order::one ? x : x == 0 ? 0 : pow(x, p);
}

// A sum of |x|^p as scale^p * total. Unless SCALED, scale is 1.
template <Order ORDER, bool SCALED>
struct Sum {
  double scale = 1, total = 0;

  template <class T>
  __device__ void add(const T* x, int count, double p) {
    if constexpr (SCALED) {
      double top = 0;
      for (int k = 0; k < count; ++k) {
        const double size = fabs(widen(x[k]));
        top = size > top && size < HUGE_VAL ? size : top;
      }
      if (top > 0 && ORDER != Order::any) top = max_norm::power_of_two(top);
      if (top > 0 && (total == 0 || top > scale)) {
        total *= power<ORDER>(scale / top, p);
        scale = top;
      }
    }
    for (int k = 0; k < count; ++k) {
      const double size = fabs(widen(x[k]));
      total += power<ORDER>(SCALED ? size / scale : size, p);
    }
  }
  __device__ void merge(double other_scale, double other_total, double p) {
    if constexpr (SCALED) {
      const double larger = total == 0 || other_scale > scale ? other_scale : scale;
      const bool other = other_total != 0;
      if (!other) return;
      total = (total == 0 ? 0 : total * power<ORDER>(scale / larger, p)) +
              other_total * power<ORDER>(other_scale / larger, p);
      scale = larger;
    } else {
      total += other_total;
    }
  }
  // Over the block; the result is thread 0's.
  __device__ void merge_block(double p, double (&scales)[32], double (&totals)[32]) {
#pragma unroll 1
    for (int step = 16; step > 0; step /= 2)
      merge(SCALED ? __shfl_down_sync(everyone, scale, step) : 1, __shfl_down_sync(everyone, total, step), p);
    if (threadIdx.x % 32 == 0) scales[threadIdx.x / 32] = scale, totals[threadIdx.x / 32] = total;
    __syncthreads();
    if (threadIdx.x == 0)
#pragma unroll 1
      for (int w = 1; w < int(blockDim.x) / 32; ++w) merge(scales[w], totals[w], p);
  }
};

template <class T, class S>
__device__ void sum_run(S& sum, const T* x, int64_t n, bool aligned, double p) {
  constexpr int size = Vector<T>::size;
  const int64_t vectors = aligned ? n / size : 0;
  int64_t i = threadIdx.x;
  for (; i + (in_flight - 1) * kThreads < vectors; i += in_flight * kThreads) {
    alignas(16) T values[in_flight][size];
    load<in_flight>(values, x + i * size, int64_t(kThreads) * size);
#pragma unroll
    for (int v = 0; v < in_flight; ++v) sum.add(values[v], size, p);
  }
  for (; i < vectors; i += kThreads) {
    const Vector<T> v = *reinterpret_cast<const Vector<T>*>(x + i * size);
    sum.add(v.values, size, p);
  }
  for (i = vectors * size + threadIdx.x; i < n; i += kThreads) {
    const T value = x[i];
    sum.add(&value, 1, p);
  }
}

template <Order ORDER>
__global__ void __launch_bounds__(kThreads, 2)
    norm_chunks(const int64_t* table, int columns, int column, const int64_t* chunks, int64_t chunk, double p,
                double* parts) {
  __shared__ double scales[32], totals[32];
  const Chunk c = chunk_of(table, chunks, chunk, columns);
  const int64_t address = c.row[column];
  by_type(c, [&]<class T>() {
    Sum<ORDER, ORDER == Order::any || sizeof(T) == 8> sum;
    sum_run<T>(sum, c.at<const T>(address), c.length, is_aligned(address), p);
    sum.merge_block(p, scales, totals);
    if (threadIdx.x == 0) {
      parts[2 * int64_t(blockIdx.x)] = sum.scale;
      parts[2 * int64_t(blockIdx.x) + 1] = sum.total;
    }
  });
}

// A warp per tensor: from the sums of its chunks, in their order, its norm and, unless `terms` is null, its
// share in the penalty.
template <Order ORDER>
__global__ void __launch_bounds__(32)
    norm_tensors(const int64_t* table, int columns, const double* parts, int64_t chunk, double p,
                 bool squared, double* norms, double* terms) {
  const int64_t t = blockIdx.x;
  long long begin = 0;
  for (int64_t i = threadIdx.x; i < t; i += 32)
    begin += (table[i * columns + pn::kElements] + chunk - 1) / chunk;
  for (int step = 16; step > 0; step /= 2) begin += __shfl_xor_sync(everyone, begin, step);
  const int64_t count = (table[t * columns + pn::kElements] + chunk - 1) / chunk;
  Sum<ORDER, true> sum;
  for (int64_t i = threadIdx.x; i < count; i += 32)
    sum.merge(parts[2 * (begin + i)], parts[2 * (begin + i) + 1], p);
#pragma unroll 1
  for (int step = 16; step > 0; step /= 2)
    sum.merge(__shfl_down_sync(everyone, sum.scale, step), __shfl_down_sync(everyone, sum.total, step), p);
  if (threadIdx.x != 0) return;
  const double s = max_norm::root(sum.total, p);
  norms[2 * t] = sum.scale;
  norms[2 * t + 1] = s;
  if (terms) terms[t] = pn::term(sum.scale, s, p, squared);
}

__global__ void __launch_bounds__(kThreads)
    add_terms(const double* terms, int64_t tensors, float* penalty, double* wide_penalty) {
  __shared__ double warps[32];
  double sum = 0;
  for (int64_t t = threadIdx.x; t < tensors; t += kThreads) sum += terms[t];
  sum = sum_block(sum, warps);
  if (threadIdx.x != 0) return;
  if (penalty)
    *penalty = static_cast<float>(sum);
  else
    *wide_penalty = sum;
}

// ---- the gradient ----------------------------------------------------------------------------------------
template <Order ORDER>
__device__ double slope_at(double w, const pn::Slope& slope, double p) {
  if constexpr (ORDER == Order::two) return w * slope.inverse * slope.factor;
  const double sign = w > 0 ? slope.factor : w < 0 ? -slope.factor : w * 0;
  if (ORDER == Order::one || w == 0) return sign;
  return sign * pow(fabs(w) * slope.inverse, p - 1);
}

template <Order ORDER>
__global__ void __launch_bounds__(kThreads, 2)
    gradients(const int64_t* table, const int64_t* chunks, int64_t chunk, const int64_t* outs,
              const double* norms, const double* grad, double p, bool squared, bool add) {
  const Chunk c = chunk_of(table, chunks, chunk, pn::kPenaltyColumns);
  const int64_t to = outs[c.tensor];
  if (to == 0) return;
  const pn::Slope slope = pn::slope_of(norms[2 * c.tensor], norms[2 * c.tensor + 1], *grad, p, squared);
  by_type(c, [&]<class T>() {
    constexpr int size = Vector<T>::size;
    const T* weight = c.at<const T>(c.row[pn::kWeight]);
    T* out = c.at<T>(to);
    const int64_t vectors = is_aligned(c.row[pn::kWeight], to) ? c.length / size : 0;
#pragma unroll 2
    for (int64_t i = threadIdx.x; i < vectors; i += kThreads) {
      const Vector<T> w = *reinterpret_cast<const Vector<T>*>(weight + i * size);
      Vector<T> g;
      if (add) g = *reinterpret_cast<const Vector<T>*>(out + i * size);
#pragma unroll
      for (int k = 0; k < size; ++k)
        g.values[k] =
            nearest<T>((add ? widen(g.values[k]) : 0) + slope_at<ORDER>(widen(w.values[k]), slope, p));
      store(out + i * size, g);
    }
    for (int64_t i = vectors * size + threadIdx.x; i < c.length; i += kThreads) {
      const double old = add ? widen(out[i]) : 0;
      const Vector<T> g{nearest<T>(old + slope_at<ORDER>(widen(weight[i]), slope, p))};
      out[i] = g.values[0];
    }
  });
}

// ---- FGM -------------------------------------------------------------------------------------------------
// A lane's 16 bytes of a block of kBlock elements, of which `count` exist; zeros stand for the others.
template <class T>
__device__ Vector<T> read(const T* from, int count, bool aligned) {
  if (aligned && count == Vector<T>::size) return *reinterpret_cast<const Vector<T>*>(from);
  Vector<T> v;
#pragma unroll
  for (int k = 0; k < Vector<T>::size; ++k) v.values[k] = k < count ? from[k] : nearest<T>(0);
  return v;
}
template <class T>
__device__ void write(T* to, const Vector<T>& v, int count, bool aligned) {
  if (aligned && count == Vector<T>::size) return store(to, v);
#pragma unroll
  for (int k = 0; k < Vector<T>::size; ++k)
    if (k < count) to[k] = v.values[k];
}

// body(block, first element, elements, the lanes that share the block) for each lane's share of each block of
// kBlock elements; the lanes of a warp go together, those past the end with no elements.
template <class T, class Body>
__device__ void each_block(int64_t length, const Body& body) {
  constexpr int size = Vector<T>::size, lanes = int(pn::kBlock) / size, abreast = kThreads / lanes;
  const int lane = threadIdx.x % lanes, in_warp = threadIdx.x % 32 / lanes * lanes;
  const unsigned sharers = lanes == 32 ? everyone : ((1u << (lanes % 32)) - 1) << in_warp;
  const int64_t blocks = (length + pn::kBlock - 1) / pn::kBlock;
  for (int64_t first = 0; first < blocks; first += abreast) {
    const int64_t block = first + threadIdx.x / lanes, at = block * pn::kBlock + lane * size,
                  left = length - at;
    body(block, at, left <= 0 ? 0 : left < size ? static_cast<int>(left) : size, sharers);
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    attacks(const int64_t* table, const int64_t* chunks, int64_t chunk, const double* norms, double epsilon) {
  const Chunk c = chunk_of(table, chunks, chunk, pn::kFgmColumns);
  const double scale = norms[2 * c.tensor], s = norms[2 * c.tensor + 1];
  if (!(s > 0 && s < HUGE_VAL)) return;
  const double inverse = 1 / scale, step = epsilon / s;
  uint8_t* marks = reinterpret_cast<uint8_t*>(c.row[pn::kMarks]) + c.first / pn::kBlock;
  by_type(c, [&]<class T>() {
    const T* grad = c.at<const T>(c.row[pn::kGrad]);
    T *weight = c.at<T>(c.row[pn::kWeight]), *backup = c.at<T>(c.row[pn::kBackup]);
    const bool aligned = is_aligned(c.row[pn::kWeight], c.row[pn::kGrad], c.row[pn::kBackup]);
    each_block<T>(c.length, [&](int64_t block, int64_t at, int count, unsigned sharers) {
      const Vector<T> g = read(grad + at, count, aligned);
      bool any = false;
#pragma unroll
      for (int k = 0; k < Vector<T>::size; ++k) any |= widen(g.values[k]) != 0;
      const bool wanted = __ballot_sync(everyone, any) & sharers;
      const bool marked = wanted && marks[block];
      __syncwarp();
      if (!wanted || count == 0) return;
      Vector<T> w = read(weight + at, count, aligned);
      if (!marked) {
        write(backup + at, w, count, aligned);
        if (at % pn::kBlock == 0) marks[block] = 1;
      }
#pragma unroll
      for (int k = 0; k < Vector<T>::size; ++k) {
        const double d = widen(g.values[k]);  // adding a zero would turn -0 into 0
        if (d != 0) w.values[k] = nearest<T>(widen(w.values[k]) + d * inverse * step);
      }
      write(weight + at, w, count, aligned);
    });
  });
}

__global__ void __launch_bounds__(kThreads)
    restores(const int64_t* table, const int64_t* chunks, int64_t chunk) {
  const Chunk c = chunk_of(table, chunks, chunk, pn::kFgmColumns);
  uint8_t* marks = reinterpret_cast<uint8_t*>(c.row[pn::kMarks]) + c.first / pn::kBlock;
  by_type(c, [&]<class T>() {
    T *weight = c.at<T>(c.row[pn::kWeight]), *backup = c.at<T>(c.row[pn::kBackup]);
    const bool aligned = is_aligned(c.row[pn::kWeight], c.row[pn::kBackup]);
    each_block<T>(c.length, [&](int64_t block, int64_t at, int count, unsigned) {
      const bool marked = count && marks[block];
      __syncwarp();
      if (!marked) return;
      write(weight + at, read(backup + at, count, aligned), count, aligned);
      if (at % pn::kBlock == 0) marks[block] = 0;
    });
  });
}

// launch.operator()<ORDER>() for p; there is no kernel for p = inf.
template <class Launch>
cudaError_t by_order(double p, const Launch& launch) {
  switch (max_norm::order_of(p)) {
    case Order::one:
      launch.template operator()<Order::one>();
      break;
    case Order::two:
      launch.template operator()<Order::two>();
      break;
    case Order::any:
      launch.template operator()<Order::any>();
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

bool too_many(int64_t blocks) { return blocks > 0x7fffffff; }
dim3 grid_of(int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); }

template <Order ORDER>
void launch_norms(const int64_t* table, int columns, int column, const int64_t* chunks, int64_t chunk_count,
                  int64_t chunk, int64_t tensors, double p, bool squared, double* parts, double* norms,
                  double* terms, cudaStream_t stream) {
  if (chunk_count)
    LAUNCH(norm_chunks<ORDER>, grid_of(chunk_count), dim3(kThreads), 0, stream, table, columns, column,
           chunks, chunk, p, parts);
  if (tensors)
    LAUNCH(norm_tensors<ORDER>, grid_of(tensors), dim3(32), 0, stream, table, columns, parts, chunk, p,
           squared, norms, terms);
}
}  // namespace

cudaError_t lp_norms(const int64_t* table, const int64_t* chunks, int64_t chunk_count, int64_t chunk,
                     int64_t tensors, double p, bool squared, double* parts, double* terms, double* norms,
                     float* penalty, double* wide_penalty, cudaStream_t stream) {
  if (too_many(chunk_count) || too_many(tensors)) return cudaErrorInvalidValue;
  return by_order(p, [&]<Order ORDER>() {
    launch_norms<ORDER>(table, pn::kPenaltyColumns, pn::kWeight, chunks, chunk_count, chunk, tensors, p,
                        squared, parts, norms, terms, stream);
    LAUNCH(add_terms, dim3(1), dim3(kThreads), 0, stream, terms, tensors, penalty, wide_penalty);
  });
}

cudaError_t lp_penalty_backward(const int64_t* table, const int64_t* chunks, int64_t chunk_count,
                                int64_t chunk, const int64_t* outs, const double* norms, const double* grad,
                                double p, bool squared, bool add, cudaStream_t stream) {
  if (too_many(chunk_count)) return cudaErrorInvalidValue;
  if (chunk_count == 0) return cudaSuccess;
  return by_order(p, [&]<Order ORDER>() {
    LAUNCH(gradients<ORDER>, grid_of(chunk_count), dim3(kThreads), 0, stream, table, chunks, chunk, outs,
           norms, grad, p, squared, add);
  });
}

cudaError_t fgm_attack(const int64_t* table, const int64_t* chunks, int64_t chunk_count, int64_t chunk,
                       int64_t tensors, double epsilon, double* parts, double* norms, cudaStream_t stream) {
  if (too_many(chunk_count) || too_many(tensors)) return cudaErrorInvalidValue;
  if (chunk_count == 0) return cudaSuccess;
  launch_norms<Order::two>(table, pn::kFgmColumns, pn::kGrad, chunks, chunk_count, chunk, tensors, 2, false,
                           parts, norms, nullptr, stream);
  LAUNCH(attacks, grid_of(chunk_count), dim3(kThreads), 0, stream, table, chunks, chunk, norms, epsilon);
  return cudaGetLastError();
}

cudaError_t fgm_restore(const int64_t* table, const int64_t* chunks, int64_t chunk_count, int64_t chunk,
                        cudaStream_t stream) {
  if (too_many(chunk_count)) return cudaErrorInvalidValue;
  if (chunk_count == 0) return cudaSuccess;
  LAUNCH(restores, grid_of(chunk_count), dim3(kThreads), 0, stream, table, chunks, chunk);
  return cudaGetLastError();
}
}  // namespace fastreg::cuda
