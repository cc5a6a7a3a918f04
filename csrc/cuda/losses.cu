// Softmax cross-entropy and its family in CUDA. The formula stands in fastreg/losses.py, a row's maths in
// csrc/losses.h.
//
// Bytes: forward, the logits once; backward, the logits once and the gradient written once. Rows in which
// every class has a share of its own (probabilities, smoothing with gamma) are walked twice, and the gradient
// in the forward walks a row once more. Rows wait for that in shared memory, if half of a block's holds them
// (on sm_90 some 110 KB: 57,000 contiguous classes of bf16, or 1,600 strided ones); the logits of others, and
// all probabilities, are read again by the same threads at once, so from L1 or L2, unless the row is split.
// Beside them only vectors with one element per row or per class. Ignored rows are not read.
//
// Launches: forward, one if one block can do everything, else the rows and then the sum of the blocks'
// losses. Rows split over blocks add a merge, and where every class has a share two launches more for those;
// smoothing with class weights adds one for their sum, the gradient of a mean in the forward one for what
// it divides by. Backward, one, or three for rows that no block holds and in which every class has a share.
//
// Rows of contiguous classes are walked by 1 to 32 lanes, or by a block if they are long; few and long rows
// by several blocks each. Rows of strided classes, such as (N, C, H*W), lie along a warp: one thread each,
// and eight warps that deal out the classes. One pass with a running (maximum, sum) per thread, merged at the
// end.
//
// Accesses: 128 bits, four in flight per thread (two where every class has a share), between the first and
// the last multiple of 16 bytes of a row.
//
// Numerics: fp32 (fp64 for fp64). Running maxima start from the lowest finite number, so -inf - (-inf) never
// arises. No atomics: blocks leave their sums behind, and the last stage adds them in order.
//
// Launchers take raw pointers and a stream, so this file compiles without torch, for a GPU or for the host.
#include <cassert>
#include <cstdint>
#include <limits>

#include "cuda/elements.h"
#include "cuda/launch.h"
#include "cuda/losses_launch.h"
#include "losses.h"

#ifdef CUDAHOST
#define DEVICE_ASSERT(condition) \
  if (!(condition)) __trap()
#else
#define DEVICE_ASSERT(condition) assert(condition)
#endif

namespace fastreg::cuda {
namespace {

constexpr int strided_in_flight = 8;
constexpr int dense_in_flight = 2;
constexpr int class_lanes = 8;  // warps that share the classes of 32 rows, where classes are strided
constexpr int blocks_per_processor = 16;
constexpr int count_blocks = 32;
constexpr int slot = 24;  // bytes that hold what threads merge: a Partial, Best or Sums of any type

// What a kernel is compiled for. plain: z is x, one target, no smoothing, and the loss is all that is asked
// for. dense: every class has a share of its own.
enum Mode { plain, general, dense };

// Tensors as (N, C, D). Row r is position (r / D, r % D).
template <class T>
struct Logits {
  T* data;
  int64_t stride_n, stride_c, stride_d;
};

template <class A>
struct Problem {
  int64_t rows, d, classes;
  const void* target;
  int target_bytes;  // of a class index; 0 for probabilities
  bool wide;         // the probabilities are of type A, not of the logits'
  int64_t target_stride_n, target_stride_c, target_stride_d, ignore_index;
  const void* other;  // the second target, or null
  int other_bytes;
  int64_t other_stride_n, other_stride_d;
  const A* share;  // of the first
  int64_t share_stride_n, share_stride_d;
  const A *weight, *alpha, *adjustment, *margin;  // one element per class, or null
  const A *factors, *total;  // weight·alpha and its sum, where all classes' are asked for
  const A* target_logits;    // z of both targets, where x may be written meanwhile
  A smoothing, spread, gamma, alpha_scale, scale, z_loss;
  int reduction;
  bool zero_if_empty;

  __device__ int64_t at(int64_t r, int64_t stride_n, int64_t stride_d) const {
    return d == 1 ? r * stride_n : r / d * stride_n + r % d * stride_d;
  }
  template <class T>
  __device__ T* row(const Logits<T>& x, int64_t r) const {
    return x.data + at(r, x.stride_n, x.stride_d);
  }
};

__device__ int64_t read_index(const void* indices, int bytes, int64_t at) {
  return bytes == 8   ? static_cast<const int64_t*>(indices)[at]
         : bytes == 4 ? static_cast<const int32_t*>(indices)[at]
                      : static_cast<const uint8_t*>(indices)[at];
}

// factor * term, where a factor of 0 gives 0 even if the term is infinite.
template <class A>
__device__ A product(A factor, A term) {
  return factor == 0 ? A(0) : factor * term;
}

// ---- one row --------------------------------------------------------------------------------------------

// What a thread knows of its row before it walks it.
template <class T, Mode MODE, class A = Arithmetic<T>>
struct Row {
  int64_t y = -1, other = -1;  // target classes; -1 where there is none
  bool kept = false;
  A share = 1;  // of y
  A margin = 0, other_margin = 0, z_y = 0, z_other = 0;
  A pivot = 0;  // sums of z are taken from here, near z, so that large logits keep their digits
  int64_t probabilities = 0;

  __device__ Row(const Problem<A>& p, const Logits<const T>& x, int64_t r) {
    if (r >= p.rows) return;
    const int64_t at = p.at(r, p.target_stride_n, p.target_stride_d);
    if (MODE == dense && p.target_bytes == 0) {
      kept = true;
      probabilities = at;
      return;
    }
    const int64_t first = read_index(p.target, p.target_bytes, at);
    if (first == p.ignore_index) return;
    bool exists = first >= 0 && first < p.classes;
    if (MODE != plain && p.other) {
      other = read_index(p.other, p.other_bytes, p.at(r, p.other_stride_n, p.other_stride_d));
      if (other == p.ignore_index) return;
      exists = exists && other >= 0 && other < p.classes;
    }
    kept = true;
    DEVICE_ASSERT(exists && "cross_entropy: target out of range");
    if (!exists) {  // where assertions are compiled out: NaN, and nothing is read
      y = 0, other = -1;
      z_y = share = std::numeric_limits<A>::quiet_NaN();
      return;
    }
    y = first;
    if (MODE != plain && p.other) {
      if (other == y)
        other = -1;
      else
        share = p.share[p.at(r, p.share_stride_n, p.share_stride_d)];
    }
    if (MODE != plain && p.margin) {
      margin = share * p.margin[y];
      if (other >= 0) other_margin = (1 - share) * p.margin[other];
    }
    if (MODE == dense) return;
    if (MODE != plain && p.target_logits) {
      z_y = p.target_logits[r];
      z_other = p.target_logits[p.rows + r];
    } else {
      const T* from = p.row(x, r);
      z_y = logit(p, static_cast<A>(from[y * x.stride_c]), y);
      if (MODE != plain && other >= 0) z_other = logit(p, static_cast<A>(from[other * x.stride_c]), other);
    }
    if (z_y - z_y == 0) pivot = z_y;
  }

  __device__ A probability(const Problem<A>& p, int64_t c) const {
    const int64_t at = probabilities + c * p.target_stride_c;
    return p.wide ? static_cast<const A*>(p.target)[at] : static_cast<A>(static_cast<const T*>(p.target)[at]);
  }

  __device__ A logit(const Problem<A>& p, A x, int64_t c) const {
    if constexpr (MODE == plain) return x;
    if (p.adjustment) x += p.adjustment[c];
    if (MODE == dense && p.margin && p.target_bytes == 0) x -= p.margin[c] * probability(p, c);
    if (c == y) x -= margin;
    if (c == other) x -= other_margin;
    return p.scale * x;
  }

  // As if `c`, with this share of the row, were the only target.
  __device__ RowTerms<A> terms(const Problem<A>& p, int64_t c, A part) const {
    A factor = p.alpha_scale;
    if (p.weight) factor *= p.weight[c];
    if (p.alpha) factor *= p.alpha[c];
    const A total = MODE == plain ? A(0) : p.factors ? *p.total : p.alpha_scale * A(p.classes);
    return {(1 - p.smoothing) * product(part, factor), p.spread, total, p.gamma, p.z_loss, p.scale};
  }

  // What the row counts in a mean.
  __device__ A count(const Problem<A>& p) const {
    if (!kept) return 0;
    if (!p.weight || y < 0) return 1;
    return product(share, p.weight[y]) + (other < 0 ? A(0) : product(1 - share, p.weight[other]));
  }
};

template <class A>
__device__ A class_factor(const Problem<A>& p, int64_t c) {
  return p.factors ? p.factors[c] : p.alpha_scale;
}

template <class A>
__device__ Partial<A> nothing() {
  return {std::numeric_limits<A>::lowest(), 0, 0};
}

// The largest x of a row, and the lowest class that has it; NaN is no candidate.
template <class A>
struct Best {
  A x = -std::numeric_limits<A>::infinity();
  int64_t c = std::numeric_limits<int64_t>::max();

  __device__ void take(A other, int64_t at) {
    if (other > x || (other == x && at < c)) x = other, c = at;
  }
};

// Takes COUNT vectors of SIZE neighbouring classes, `pitch` apart, into a partial: one maximum for all of
// them.
template <int COUNT, int SIZE, class T, Mode MODE, class A>
__device__ void take(Partial<A>& part, Best<A>& best, bool want_best, const T (&x)[COUNT][SIZE], int64_t c,
                     int64_t pitch, const Problem<A>& p, const Row<T, MODE>& row) {
  A z[COUNT][SIZE], high = part.high;
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
#pragma unroll
    for (int k = 0; k < SIZE; ++k) {
      const A value = static_cast<A>(x[i][k]);
      if (MODE != plain && want_best) best.take(value, c + i * pitch + k);
      z[i][k] = row.logit(p, value, c + i * pitch + k);
      high = z[i][k] > high ? z[i][k] : high;
    }
  A sum = part.sum * fast_exp(part.high - high);
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
#pragma unroll
    for (int k = 0; k < SIZE; ++k) {
      sum += fast_exp(z[i][k] - high);
      if constexpr (MODE == general)
        if (p.smoothing != 0) part.linear += product(class_factor(p, c + i * pitch + k), z[i][k] - row.pivot);
    }
  part.high = high;
  part.sum = sum;
}

// Where a walk finds a row of contiguous classes: in global memory; there, and each lane leaves what it has
// read in shared memory; or in shared memory, where each lane takes what it has left.
enum class From { memory, memory_to_hold, held };

// A row in global memory and, if it is held, its place in shared memory, as far past a multiple of 16 bytes.
template <class T, From FROM>
struct Source {
  const T* x;
  T* held;

  template <int COUNT>
  __device__ void read(T (&out)[COUNT][Vector<T>::size], int64_t c, int64_t pitch) const {
    if constexpr (FROM == From::held) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i)
        *reinterpret_cast<Vector<T>*>(out[i]) = *reinterpret_cast<const Vector<T>*>(held + c + i * pitch);
    } else {
      load<COUNT>(out, x + c, pitch);
    }
    if constexpr (FROM == From::memory_to_hold)
#pragma unroll
      for (int i = 0; i < COUNT; ++i)
        *reinterpret_cast<Vector<T>*>(held + c + i * pitch) = *reinterpret_cast<const Vector<T>*>(out[i]);
  }

  __device__ T read(int64_t c) const {
    const T value = FROM == From::held ? held[c] : x[c];
    if constexpr (FROM == From::memory_to_hold) held[c] = value;
    return value;
  }
};

template <class T>
__host__ __device__ int64_t held_bytes(int64_t classes) {
  return (classes * int64_t(sizeof(T)) + 15) / 16 * 16 + 16;
}

template <class T>
__device__ T* place_of(unsigned char* memory, const T* x, int group, int64_t classes) {
  return reinterpret_cast<T*>(memory + group * held_bytes<T>(classes) + reinterpret_cast<uintptr_t>(x) % 16);
}

// Before a group's next row takes the place of one that other lanes may have read.
__device__ inline void wait_for_group(int lanes) {
  if (lanes > 32)
    __syncthreads();
  else
    __syncwarp();
}

// A lane's share of the classes [begin, end) of a row of contiguous classes.
template <class T, Mode MODE, From FROM, class A = Arithmetic<T>>
__device__ Partial<A> walk(const Problem<A>& p, const Row<T, MODE>& row, Best<A>& best, bool want_best,
                           const Source<T, FROM>& x, int64_t begin, int64_t end, int lane, int lanes) {
  Partial<A> part = nothing<A>();
  deal(
      x.x, begin, end, lane, lanes,
      [&](int64_t c) {
        const T one[1][1] = {{x.read(c)}};
        take(part, best, want_best, one, c, 0, p, row);
      },
      [&](int64_t c, int64_t pitch) {
        alignas(16) T some[in_flight][Vector<T>::size];
        x.read(some, c, pitch);
        take(part, best, want_best, some, c, pitch, p, row);
      },
      [&](int64_t c) {
        alignas(16) T some[1][Vector<T>::size];
        x.read(some, c, 0);
        take(part, best, want_best, some, c, 0, p, row);
      });
  return part;
}

// A row of classes that are `stride` apart; in shared memory it lies beside the others of its warp.
template <class T, From FROM>
struct StridedSource {
  const T* x;
  int64_t stride;
  T* held;

  __device__ T read(int64_t c) const {
    const T value = FROM == From::held ? held[c * 32] : x[c * stride];
    if constexpr (FROM == From::memory_to_hold) held[c * 32] = value;
    return value;
  }
};

// The same of such a row.
template <class T, Mode MODE, From FROM, class A = Arithmetic<T>>
__device__ Partial<A> walk_strided(const Problem<A>& p, const Row<T, MODE>& row, Best<A>& best,
                                   bool want_best, const StridedSource<T, FROM>& x, int64_t begin,
                                   int64_t end, int lane, int lanes) {
  Partial<A> part = nothing<A>();
  int64_t c = begin + lane;
  for (; c + (strided_in_flight - 1) * lanes < end; c += strided_in_flight * lanes) {
    T some[strided_in_flight][1];
#pragma unroll
    for (int i = 0; i < strided_in_flight; ++i) some[i][0] = x.read(c + i * lanes);
    take(part, best, want_best, some, c, lanes, p, row);
  }
  for (; c < end; c += lanes) {
    const T one[1][1] = {{x.read(c)}};
    take(part, best, want_best, one, c, 0, p, row);
  }
  return part;
}

// ---- rows in which every class has a share --------------------------------------------------------------

// The sums over a row's classes of q·v·(1 - p)^gamma·(-log p), and of q·v times the focal slope.
template <class A>
struct Sums {
  A loss = 0, slope = 0;
};

// COUNT elements of a row of probabilities; 0 where the targets are indices.
template <int COUNT, class T, class A>
__device__ void load_probabilities(A (&q)[COUNT], const Problem<A>& p, const Row<T, dense>& row, int64_t c) {
  const bool given = p.target_bytes == 0;
  if (given && !p.wide && COUNT > 1) {
    const T* from = static_cast<const T*>(p.target) + row.probabilities + c * p.target_stride_c;
    if (p.target_stride_c == 1 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
      alignas(16) T some[1][Vector<T>::size];
      load<1>(some, from, 0);
#pragma unroll
      for (int k = 0; k < COUNT; ++k) q[k] = static_cast<A>(some[0][k]);
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < COUNT; ++k) q[k] = given ? row.probability(p, c + k) : A(0);
}

// q_c·v_c
template <class T, class A>
__device__ A share_of(const Problem<A>& p, const Row<T, dense>& row, int64_t c, A q) {
  if (c == row.y) q = row.share;
  if (c == row.other) q = 1 - row.share;
  return product((1 - p.smoothing) * q + p.spread, class_factor(p, c));
}

template <class T, class A>
__device__ void add_class(Sums<A>& sums, const Problem<A>& p, const Row<T, dense>& row,
                          const Softmax<A>& softmax, A x, int64_t c, A q) {
  const A share = share_of(p, row, c, q), log_p = softmax.log_p(row.logit(p, x, c));
  sums.loss += product(share, focal_term(log_p, p.gamma));
  sums.slope += product(share, focal_slope(log_p, p.gamma));
}

template <class T, From FROM, class A = Arithmetic<T>>
__device__ Sums<A> sum_classes(const Problem<A>& p, const Row<T, dense>& row, const Softmax<A>& softmax,
                               const Source<T, FROM>& x, int64_t begin, int64_t end, int lane, int lanes) {
  constexpr int size = Vector<T>::size;
  Sums<A> sums;
  auto some = [&]<int COUNT>(std::integral_constant<int, COUNT>, int64_t c, int64_t pitch) {
    alignas(16) T values[COUNT][size];
    A q[COUNT][size];
    x.read(values, c, pitch);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) load_probabilities(q[i], p, row, c + i * pitch);
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
#pragma unroll
      for (int k = 0; k < size; ++k)
        add_class(sums, p, row, softmax, static_cast<A>(values[i][k]), c + i * pitch + k, q[i][k]);
  };
  deal<dense_in_flight>(
      x.x, begin, end, lane, lanes,
      [&](int64_t c) {
        A q[1];
        load_probabilities(q, p, row, c);
        add_class(sums, p, row, softmax, static_cast<A>(x.read(c)), c, q[0]);
      },
      [&](int64_t c, int64_t pitch) { some(std::integral_constant<int, dense_in_flight>(), c, pitch); },
      [&](int64_t c) { some(std::integral_constant<int, 1>(), c, 0); });
  return sums;
}

template <class T, From FROM, class A = Arithmetic<T>>
__device__ Sums<A> sum_classes_strided(const Problem<A>& p, const Row<T, dense>& row,
                                       const Softmax<A>& softmax, const StridedSource<T, FROM>& x,
                                       int64_t begin, int64_t end, int lane, int lanes) {
  Sums<A> sums;
#pragma unroll 2
  for (int64_t c = begin + lane; c < end; c += lanes) {
    A q[1];
    load_probabilities(q, p, row, c);
    add_class(sums, p, row, softmax, static_cast<A>(x.read(c)), c, q[0]);
  }
  return sums;
}

// ---- merging, always in the same order ------------------------------------------------------------------

template <class A>
__device__ Partial<A> merge(const Partial<A>& a, const Partial<A>& b) {
  return fastreg::merge(a, A(0), b, A(0));  // `linear` is taken from the row's pivot, not from the maxima
}

template <class A>
__device__ Best<A> merge(Best<A> a, const Best<A>& b) {
  a.take(b.x, b.c);
  return a;
}

template <class A>
__device__ Sums<A> merge(const Sums<A>& a, const Sums<A>& b) {
  return {a.loss + b.loss, a.slope + b.slope};
}

template <class A>
__device__ Partial<A> from_lane(const Partial<A>& part, int step) {
  return {__shfl_xor_sync(everyone, part.high, step), __shfl_xor_sync(everyone, part.sum, step),
          __shfl_xor_sync(everyone, part.linear, step)};
}

template <class A>
__device__ Best<A> from_lane(const Best<A>& best, int step) {
  return {__shfl_xor_sync(everyone, best.x, step), __shfl_xor_sync(everyone, best.c, step)};
}

template <class A>
__device__ Sums<A> from_lane(const Sums<A>& sums, int step) {
  return {__shfl_xor_sync(everyone, sums.loss, step), __shfl_xor_sync(everyone, sums.slope, step)};
}

// Over `lanes` neighbouring lanes of a warp, or over the block; every thread gets the result. `shared` has
// room for a value per warp.
template <class Value>
__device__ Value merge_lanes(Value value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) value = merge(value, from_lane(value, step));
  return value;
}

template <class Value>
__device__ Value merge_group(Value value, int lanes, unsigned char* shared) {
  if (lanes <= 32) return merge_lanes(value, lanes);
  Value* warps = reinterpret_cast<Value*>(shared);
  value = merge_lanes(value, 32);
  __syncthreads();  // what was here before has been read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = warps[0];
  for (int w = 1; w < int(blockDim.x) / 32; ++w) value = merge(value, warps[w]);
  return value;
}

// Over threadIdx.y, for each threadIdx.x; every thread gets the result.
template <class Value>
__device__ Value merge_columns(Value value, unsigned char* shared) {
  Value(*parts)[32] = reinterpret_cast<Value(*)[32]>(shared);
  __syncthreads();
  parts[threadIdx.y][threadIdx.x] = value;
  __syncthreads();
  value = parts[0][threadIdx.x];
  for (int w = 1; w < class_lanes; ++w) value = merge(value, parts[w][threadIdx.x]);
  return value;
}

// ---- the gradient ---------------------------------------------------------------------------------------

template <class A>
struct Incoming {
  const void* grad_loss;  // null: 1
  bool wide;
  int64_t stride_n, stride_d;  // 0, 0 for a reduced loss
  const A *lse, *denominator;
  const A* slopes;  // per row the sum over its classes, where no block can have it of its own
};

// The gradient of one element of a row.
template <class T, Mode MODE, class A = Arithmetic<T>>
struct Slope {
  Softmax<A> softmax = {0, 0};
  RowGradient<A> gradient = {0, 0, 0};
  A at_other = 0, slope = 0;  // of the row's classes together, z_loss included

  // `incoming`: the gradient of the row's loss.
  __device__ Slope(const Problem<A>& p, const Row<T, MODE>& row, const Softmax<A>& row_softmax, A slopes,
                   A incoming) {
    if (!row.kept) return;
    softmax = row_softmax;
    if constexpr (MODE == dense) {
      gradient.slope = p.scale * incoming;
      slope = slopes + 2 * p.z_loss * (p.z_loss == 0 ? A(0) : softmax.high + softmax.log_sum);
      return;
    }
    const RowTerms<A> terms = row.terms(p, row.y, row.share);
    auto weight = [&](int64_t c) { return MODE == plain || p.smoothing == 0 ? A(0) : class_factor(p, c); };
    A others = 0;
    if (MODE != plain && row.other >= 0) {
      const RowTerms<A> other = row.terms(p, row.other, 1 - row.share);
      others = target_slope(other.target, p.gamma, softmax, row.z_other);
      at_other = row_gradient(other, softmax, row.z_other, weight(row.other), incoming,
                              target_slope(terms.target, p.gamma, softmax, row.z_y))
                     .at_target;
    }
    gradient = row_gradient(terms, softmax, row.z_y, weight(row.y), incoming, others);
  }

  __device__ A operator()(const Problem<A>& p, const Row<T, MODE>& row, A x, int64_t c, A q) const {
    if constexpr (MODE == dense) {
      const A log_p = softmax.log_p(row.logit(p, x, c));
      const A share = product(share_of(p, row, c, q), focal_slope(log_p, p.gamma));
      return gradient.slope * ((slope - share) * fast_exp(log_p) + share * expm1(log_p));
    } else {
      if (c == row.y) return gradient.at_target;
      if (MODE != plain && c == row.other) return at_other;
      A value = gradient.slope * fast_exp((row.logit(p, x, c) - softmax.high) - softmax.log_sum);
      if constexpr (MODE != plain)
        if (p.smoothing != 0) value -= gradient.spread * class_factor(p, c);
      return value;
    }
  }
};

// A lane's share of the gradient of the classes [begin, end) of a row.
template <class T, Mode MODE, From FROM, class A = Arithmetic<T>>
__device__ void write_gradient(const Problem<A>& p, const Row<T, MODE>& row, const Slope<T, MODE>& slope,
                               const Source<T, FROM>& from, T* to, int64_t begin, int64_t end, int lane,
                               int lanes) {
  constexpr int size = Vector<T>::size, most = MODE == dense ? dense_in_flight : in_flight;
  auto scalar = [&](int64_t c) {
    A q[1] = {};
    if constexpr (MODE == dense)
      if (row.kept) load_probabilities(q, p, row, c);
    to[c] = static_cast<T>(row.kept ? slope(p, row, static_cast<A>(from.read(c)), c, q[0]) : A(0));
  };
  if ((reinterpret_cast<uintptr_t>(from.x) - reinterpret_cast<uintptr_t>(to)) % 16 !=
      0) {  // never both aligned
    for (int64_t c = begin + lane; c < end; c += lanes) scalar(c);
    return;
  }
  auto some = [&]<int COUNT>(std::integral_constant<int, COUNT>, int64_t c, int64_t pitch) {
    alignas(16) T values[COUNT][size] = {};
    if (row.kept) from.read(values, c, pitch);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      A q[size] = {};
      if constexpr (MODE == dense)
        if (row.kept) load_probabilities(q, p, row, c + i * pitch);
      Vector<T> out;
#pragma unroll
      for (int k = 0; k < size; ++k)
        out.values[k] = static_cast<T>(
            row.kept ? slope(p, row, static_cast<A>(values[i][k]), c + i * pitch + k, q[k]) : A(0));
      store(to + c + i * pitch, out);
    }
  };
  deal<most>(
      from.x, begin, end, lane, lanes, scalar,
      [&](int64_t c, int64_t pitch) { some(std::integral_constant<int, most>(), c, pitch); },
      [&](int64_t c) { some(std::integral_constant<int, 1>(), c, 0); });
}

template <class T, Mode MODE, From FROM, class A = Arithmetic<T>>
__device__ void write_gradient_strided(const Problem<A>& p, const Row<T, MODE>& row,
                                       const Slope<T, MODE>& slope, const StridedSource<T, FROM>& from, T* to,
                                       int64_t to_stride, int64_t begin, int64_t end, int lane, int lanes) {
  constexpr int most = MODE == dense ? dense_in_flight : strided_in_flight;
  for (int64_t c = begin + lane; c < end; c += most * lanes) {
    T values[most];
#pragma unroll
    for (int i = 0; i < most; ++i)
      values[i] = row.kept && c + i * lanes < end ? from.read(c + i * lanes) : T(0.f);
#pragma unroll
    for (int i = 0; i < most; ++i) {
      const int64_t at = c + i * lanes;
      if (at >= end) continue;
      A q[1] = {};
      if constexpr (MODE == dense)
        if (row.kept) load_probabilities(q, p, row, at);
      to[at * to_stride] =
          static_cast<T>(row.kept ? slope(p, row, static_cast<A>(values[i]), at, q[0]) : A(0));
    }
  }
}

// ---- forward --------------------------------------------------------------------------------------------

// What a launch makes of its rows: all of it; the partials of their splits; or, of rows whose log-sum-exp is
// known, the sums of their splits.
enum class Stage { whole, parts, sums };

template <class A>
struct Results {
  void* loss;
  bool wide;  // the loss is of type A, not T
  A *lse, *denominator;
  A* losses;        // per row, or null
  int64_t* argmax;  // per row, or null
  A* block_sums;    // (losses, weights) per block
  const A* counts;  // of count_blocks blocks: what the gradient of a mean in the forward is divided by
  A* parts;         // (high, sum, linear) per split and row
  A* best_x;        // per split and row
  int64_t* best_c;
  A* sums;           // (loss, slope) per split and row
  A* slopes;         // per row, or null
  A* target_logits;  // (z_y, z_other) per row, or null
  Stage stage;
};

template <class A>
__device__ A divisor_of(const Problem<A>& p, A weights) {
  const A divisor = p.reduction == reduction_mean ? weights : A(1);
  return p.zero_if_empty && divisor == 0 ? A(1) : divisor;
}

template <class T, class A>
__device__ void write_loss(const Problem<A>& p, const Results<A>& out, A losses, A weights) {
  const A divisor = divisor_of(p, weights);
  *out.denominator = divisor;
  store<T>(out.loss, out.wide, 0, losses / divisor);
}

// The sums of a block's rows: to the loss itself if there is one block, else to the next stage.
template <class T, class A>
__device__ void leave_sums(const Problem<A>& p, const Results<A>& out, A losses, A weights) {
  __shared__ A shared_losses[32], shared_weights[32];
  if (p.reduction == reduction_none) {
    if (blockIdx.x == 0 && threadIdx.x == 0 && threadIdx.y == 0) *out.denominator = 1;
    return;
  }
  losses = sum_block(losses, shared_losses);
  weights = sum_block(weights, shared_weights);
  if (threadIdx.x != 0 || threadIdx.y != 0) return;
  if (gridDim.x == 1) return write_loss<T>(p, out, losses, weights);
  out.block_sums[blockIdx.x] = losses;
  out.block_sums[gridDim.x + blockIdx.x] = weights;
}

// One thread finishes a row: its loss is stored, or added to the thread's sums.
template <class T, Mode MODE, class A>
__device__ void finish_row(const Problem<A>& p, const Row<T, MODE>& row, const Results<A>& out, int64_t r,
                           const Softmax<A>& softmax, A linear, const Sums<A>& sums, A& losses, A& weights) {
  A loss = 0;
  if (row.kept) {
    if constexpr (MODE == dense) {
      loss = sums.loss + z_loss_of(p.z_loss, softmax);
    } else {
      const RowTerms<A> terms = row.terms(p, row.y, row.share);
      loss = row_loss(terms, softmax, row.z_y, linear + terms.total * (row.pivot - softmax.high));
      if (MODE != plain && row.other >= 0)
        loss += target_loss(row.terms(p, row.other, 1 - row.share).target, p.gamma, softmax, row.z_other);
    }
    weights += row.count(p);
    losses += loss;
  }
  if (MODE != plain && out.losses) out.losses[r] = loss;
  if (p.reduction == reduction_none) store<T>(out.loss, out.wide, r, loss);
}

template <class T, Mode MODE, class A>
__device__ void leave_softmax(const Problem<A>& p, const Row<T, MODE>& row, const Results<A>& out, int64_t r,
                              const Softmax<A>& softmax, const Best<A>& best) {
  out.lse[r] = row.kept ? softmax.high : A(0);
  out.lse[p.rows + r] = row.kept ? softmax.log_sum : A(0);
  if (MODE != plain && out.argmax) out.argmax[r] = best.c < p.classes ? best.c : p.classes - 1;
}

template <class A>
__device__ void leave_part(const Problem<A>& p, const Results<A>& out, int64_t r, const Partial<A>& part,
                           const Best<A>& best) {
  const int64_t at = int64_t(blockIdx.y) * p.rows + r;
  out.parts[3 * at] = part.high, out.parts[3 * at + 1] = part.sum, out.parts[3 * at + 2] = part.linear;
  if (out.argmax) out.best_x[at] = best.x, out.best_c[at] = best.c;
}

template <class A>
__device__ void leave_row_sums(const Problem<A>& p, const Results<A>& out, int64_t r, const Sums<A>& sums) {
  A* at = out.sums + (int64_t(blockIdx.y) * p.rows + r) * 2;
  at[0] = sums.loss, at[1] = sums.slope;
}

// The gradient of each row's loss, where it is made in the forward.
template <class A>
__device__ A incoming_gradient(const Problem<A>& p, const Results<A>& out) {
  A weights = p.target_bytes == 0 ? A(p.rows) : A(0);
  if (p.reduction == reduction_mean && p.target_bytes != 0)
    for (int b = 0; b < count_blocks; ++b) weights += out.counts[b];
  return 1 / divisor_of(p, weights);
}

// HOLD: rows, none of them split, wait in dynamic shared memory to be walked again.
template <class T, Mode MODE, bool HOLD, class A = Arithmetic<T>>
__global__ void __launch_bounds__(256, sizeof(T) == 8 || MODE == dense ? 1 : 2)
    forward_rows(Problem<A> p, Logits<const T> x, Logits<T> grad, Results<A> out, int lanes, int64_t split) {
  alignas(16) __shared__ unsigned char shared[32 * slot];
  DYN_SMEM(unsigned char, memory);
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = blockDim.x / lanes;
  const int64_t begin = blockIdx.y * split, end = begin + split < p.classes ? begin + split : p.classes;
  const bool want_argmax = MODE != plain && out.argmax && out.stage != Stage::sums;
  A losses = 0, weights = 0, incoming = 0;
  if (MODE != plain && grad.data) incoming = incoming_gradient(p, out);
  for (int64_t first = int64_t(blockIdx.x) * groups; first < p.rows; first += int64_t(gridDim.x) * groups) {
    const int64_t r = first + group;
    const bool mine = lane == 0 && r < p.rows;
    const Row<T, MODE> row(p, x, r);
    const T* from = p.row(x, r);
    T* held = HOLD ? place_of(memory, from, group, p.classes) : nullptr;
    if (HOLD) wait_for_group(lanes);
    const Source<T, HOLD ? From::memory_to_hold : From::memory> once = {from, held};
    const Source<T, HOLD ? From::held : From::memory> again = {from, held};
    Softmax<A> softmax = {0, 0};
    Partial<A> part = nothing<A>();
    Best<A> best;
    if (MODE != dense || out.stage != Stage::sums) {
      if (row.kept) part = walk(p, row, best, want_argmax, once, begin, end, lane, lanes);
      part = merge_group(part, lanes, shared);
      if (want_argmax) best = merge_group(best, lanes, shared);
      if (out.stage == Stage::parts) {
        if (mine) leave_part(p, out, r, part, best);
        continue;
      }
      softmax = {part.high, log(part.sum)};
      if (mine) leave_softmax(p, row, out, r, softmax, best);
    } else if (r < p.rows) {
      softmax = {out.lse[r], out.lse[p.rows + r]};
    }
    Sums<A> sums;
    if constexpr (MODE == dense) {
      if (row.kept) sums = sum_classes(p, row, softmax, again, begin, end, lane, lanes);
      sums = merge_group(sums, lanes, shared);
      if (out.stage == Stage::sums) {
        if (mine) leave_row_sums(p, out, r, sums);
        continue;
      }
    }
    if (mine) finish_row(p, row, out, r, softmax, part.linear, sums, losses, weights);
    if constexpr (MODE != plain)
      if (grad.data) {
        __syncwarp();  // x may be written now: every lane has read its target's logit
        if (r >= p.rows) continue;
        const Slope<T, MODE> slope(p, row, softmax, sums.slope, incoming);
        write_gradient(p, row, slope, again, p.row(grad, r), begin, end, lane, lanes);
      }
  }
  if (out.stage == Stage::whole) leave_sums<T>(p, out, losses, weights);
}

// Rows of strided classes: 32 neighbouring rows per block, their classes dealt out to its warps.
template <class T, Mode MODE, bool HOLD, class A = Arithmetic<T>>
__global__ void __launch_bounds__(32 * class_lanes, sizeof(T) == 8 || MODE == dense ? 1 : 2)
    forward_strided(Problem<A> p, Logits<const T> x, Logits<T> grad, Results<A> out, int64_t split) {
  alignas(16) __shared__ unsigned char shared[class_lanes * 32 * slot];
  DYN_SMEM(unsigned char, memory);
  const int64_t begin = blockIdx.y * split, end = begin + split < p.classes ? begin + split : p.classes;
  const int lane = threadIdx.y;
  const bool want_argmax = MODE != plain && out.argmax && out.stage != Stage::sums;
  A losses = 0, weights = 0, incoming = 0;
  if (MODE != plain && grad.data) incoming = incoming_gradient(p, out);
  for (int64_t first = int64_t(blockIdx.x) * 32; first < p.rows; first += int64_t(gridDim.x) * 32) {
    const int64_t r = first + threadIdx.x;
    const bool mine = lane == 0 && r < p.rows;
    const Row<T, MODE> row(p, x, r);
    T* held = HOLD ? reinterpret_cast<T*>(memory) + threadIdx.x : nullptr;
    const StridedSource<T, HOLD ? From::memory_to_hold : From::memory> once = {p.row(x, r), x.stride_c, held};
    const StridedSource<T, HOLD ? From::held : From::memory> again = {once.x, once.stride, held};
    Softmax<A> softmax = {0, 0};
    Partial<A> part = nothing<A>();
    Best<A> best;
    if (MODE != dense || out.stage != Stage::sums) {
      if (row.kept) part = walk_strided(p, row, best, want_argmax, once, begin, end, lane, class_lanes);
      part = merge_columns(part, shared);
      if (want_argmax) best = merge_columns(best, shared);
      if (out.stage == Stage::parts) {
        if (mine) leave_part(p, out, r, part, best);
        continue;
      }
      softmax = {part.high, log(part.sum)};
      if (mine) leave_softmax(p, row, out, r, softmax, best);
    } else if (r < p.rows) {
      softmax = {out.lse[r], out.lse[p.rows + r]};
    }
    Sums<A> sums;
    if constexpr (MODE == dense) {
      if (row.kept) sums = sum_classes_strided(p, row, softmax, again, begin, end, lane, class_lanes);
      sums = merge_columns(sums, shared);
      if (out.stage == Stage::sums) {
        if (mine) leave_row_sums(p, out, r, sums);
        continue;
      }
    }
    if (mine) finish_row(p, row, out, r, softmax, part.linear, sums, losses, weights);
    if constexpr (MODE != plain)
      if (grad.data && r < p.rows) {
        const Slope<T, MODE> slope(p, row, softmax, sums.slope, incoming);
        write_gradient_strided(p, row, slope, again, p.row(grad, r), grad.stride_c, begin, end, lane,
                               class_lanes);
      }
  }
  if (out.stage == Stage::whole) leave_sums<T>(p, out, losses, weights);
}

// Merges rows that several blocks walked, a warp per row: their partials, or their sums.
template <class T, Mode MODE, class A = Arithmetic<T>>
__global__ void __launch_bounds__(128)
    merge_splits(Problem<A> p, Logits<const T> x, Results<A> out, int splits) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const bool of_sums = MODE == dense && out.stage == Stage::sums;
  A losses = 0, weights = 0;
  for (int64_t first = int64_t(blockIdx.x) * warps; first < p.rows; first += int64_t(gridDim.x) * warps) {
    const int64_t r = first + threadIdx.x / 32;
    const Row<T, MODE> row(p, x, r);
    Partial<A> part = nothing<A>();
    Best<A> best;
    Sums<A> sums;
    if (r < p.rows)
      for (int64_t at = lane * p.rows + r; at < splits * p.rows; at += 32 * p.rows) {
        if (of_sums) {
          sums = merge(sums, Sums<A>{out.sums[2 * at], out.sums[2 * at + 1]});
        } else {
          part = merge(part, Partial<A>{out.parts[3 * at], out.parts[3 * at + 1], out.parts[3 * at + 2]});
          if (MODE != plain && out.argmax) best.take(out.best_x[at], out.best_c[at]);
        }
      }
    Softmax<A> softmax = {0, 0};
    if (of_sums) {
      sums = merge_lanes(sums, 32);
      if (r < p.rows) softmax = {out.lse[r], out.lse[p.rows + r]};
    } else {
      part = merge_lanes(part, 32);
      if (MODE != plain && out.argmax) best = merge_lanes(best, 32);
      softmax = {part.high, log(part.sum)};
    }
    if (lane != 0 || r >= p.rows) continue;
    if (!of_sums) leave_softmax(p, row, out, r, softmax, best);
    if (of_sums && out.slopes) out.slopes[r] = sums.slope;
    if (out.target_logits) out.target_logits[r] = row.z_y, out.target_logits[p.rows + r] = row.z_other;
    if (out.loss && (MODE != dense || of_sums))
      finish_row(p, row, out, r, softmax, part.linear, sums, losses, weights);
  }
  if (out.loss && (MODE != dense || of_sums)) leave_sums<T>(p, out, losses, weights);
}

template <class T, class A = Arithmetic<T>>
__global__ void __launch_bounds__(1024) sum_blocks(Problem<A> p, Results<A> out, int64_t blocks) {
  __shared__ A shared_losses[32], shared_weights[32];
  A losses = 0, weights = 0;
  for (int64_t b = threadIdx.x; b < blocks; b += blockDim.x)
    losses += out.block_sums[b], weights += out.block_sums[blocks + b];
  losses = sum_block(losses, shared_losses);
  weights = sum_block(weights, shared_weights);
  if (threadIdx.x == 0) write_loss<T>(p, out, losses, weights);
}

// What the rows count in a mean, per block.
template <class T, class A = Arithmetic<T>>
__global__ void __launch_bounds__(256) count_rows(Problem<A> p, Logits<const T> x, A* counts) {
  __shared__ A shared[32];
  A weights = 0;
  p.margin = nullptr;
  for (int64_t r = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; r < p.rows;
       r += int64_t(gridDim.x) * blockDim.x)
    weights += Row<T, dense>(p, x, r).count(p);
  weights = sum_block(weights, shared);
  if (threadIdx.x == 0) counts[blockIdx.x] = weights;
}

// weight·alpha of every class, and the sum.
template <class A>
__global__ void __launch_bounds__(1024) combine_factors(Problem<A> p, A* factors, A* total) {
  __shared__ A shared[32];
  A sum = 0;
  for (int64_t c = threadIdx.x; c < p.classes; c += blockDim.x) {
    A factor = p.alpha_scale;
    if (p.weight) factor *= p.weight[c];
    if (p.alpha) factor *= p.alpha[c];
    factors[c] = factor;
    sum += factor;
  }
  sum = sum_block(sum, shared);
  if (threadIdx.x == 0) *total = sum;
}

// ---- backward -------------------------------------------------------------------------------------------

template <class T, class A>
__device__ A incoming_gradient(const Problem<A>& p, const Incoming<A>& in, int64_t r) {
  if (!in.grad_loss) return 1 / *in.denominator;
  const int64_t at = p.at(r, in.stride_n, in.stride_d);
  return (in.wide ? static_cast<const A*>(in.grad_loss)[at]
                  : static_cast<A>(static_cast<const T*>(in.grad_loss)[at])) /
         *in.denominator;
}

// Rows of contiguous classes: `lanes` threads per row, or `chunks` blocks per row. HOLD: as in the forward;
// then a row has one block.
template <class T, Mode MODE, bool HOLD, class A = Arithmetic<T>>
__global__ void __launch_bounds__(256, sizeof(T) == 8 || MODE == dense ? 1 : 2)
    backward_rows(Problem<A> p, Logits<const T> x, Logits<T> grad, Incoming<A> in, int lanes, int64_t chunk,
                  int64_t chunks) {
  alignas(16) __shared__ unsigned char shared[32 * slot];
  DYN_SMEM(unsigned char, memory);
  const int lane = threadIdx.x % lanes;
  const int64_t r =
      lanes > 32 ? blockIdx.x / chunks : (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / lanes;
  if (MODE != dense && r >= p.rows) return;
  const int64_t begin = lanes > 32 ? blockIdx.x % chunks * chunk : 0;
  const int64_t end = begin + chunk < p.classes ? begin + chunk : p.classes;
  const Row<T, MODE> row(p, x, r);
  const T* from = p.row(x, r);
  T* held = HOLD ? place_of(memory, from, threadIdx.x / lanes, p.classes) : nullptr;
  Softmax<A> softmax = {0, 0};
  if (r < p.rows) softmax = {in.lse[r], in.lse[p.rows + r]};
  Sums<A> sums;
  if constexpr (MODE == dense) {
    if (HOLD) {
      const Source<T, From::memory_to_hold> once = {from, held};
      if (row.kept) sums = sum_classes(p, row, softmax, once, begin, end, lane, lanes);
      sums = merge_group(sums, lanes, shared);
      __syncwarp();
    } else if (r < p.rows) {
      sums.slope = in.slopes[r];
    }
    if (r >= p.rows) return;
  }
  const Slope<T, MODE> slope(p, row, softmax, sums.slope, incoming_gradient<T>(p, in, r));
  const Source<T, HOLD ? From::held : From::memory> again = {from, held};
  write_gradient(p, row, slope, again, p.row(grad, r), begin, end, lane, lanes);
}

// Rows of strided classes: 32 rows per block; blockIdx.y is the chunk of the classes.
template <class T, Mode MODE, bool HOLD, class A = Arithmetic<T>>
__global__ void __launch_bounds__(32 * class_lanes, sizeof(T) == 8 || MODE == dense ? 1 : 2)
    backward_strided(Problem<A> p, Logits<const T> x, Logits<T> grad, Incoming<A> in, int64_t chunk) {
  alignas(16) __shared__ unsigned char shared[HOLD ? class_lanes * 32 * slot : 16];
  DYN_SMEM(unsigned char, memory);
  const int64_t r = int64_t(blockIdx.x) * 32 + threadIdx.x;
  if (!HOLD && r >= p.rows) return;
  const Row<T, MODE> row(p, x, r);
  const int64_t begin = blockIdx.y * chunk, end = begin + chunk < p.classes ? begin + chunk : p.classes;
  Softmax<A> softmax = {0, 0};
  if (r < p.rows) softmax = {in.lse[r], in.lse[p.rows + r]};
  T* held = HOLD ? reinterpret_cast<T*>(memory) + threadIdx.x : nullptr;
  const StridedSource<T, HOLD ? From::held : From::memory> again = {p.row(x, r), x.stride_c, held};
  Sums<A> sums;
  if constexpr (HOLD) {
    const StridedSource<T, From::memory_to_hold> once = {again.x, again.stride, held};
    if (row.kept) sums = sum_classes_strided(p, row, softmax, once, begin, end, threadIdx.y, class_lanes);
    sums = merge_columns(sums, shared);
    if (r >= p.rows) return;
  } else if constexpr (MODE == dense) {
    sums.slope = in.slopes[r];
  }
  const Slope<T, MODE> slope(p, row, softmax, sums.slope, incoming_gradient<T>(p, in, r));
  write_gradient_strided(p, row, slope, again, p.row(grad, r), grad.stride_c, begin, end, threadIdx.y,
                         class_lanes);
}

template <class T, class A = Arithmetic<T>>
__global__ void __launch_bounds__(256) scale_elements(T* data, const A* factor, int64_t n) {
  const A by = *factor;
  if (by == 1) return;
  auto scaled = [&](T value) { return static_cast<T>(static_cast<A>(value) * by); };
  auto some = [&]<int COUNT>(std::integral_constant<int, COUNT>, int64_t i, int64_t pitch) {
    constexpr int size = Vector<T>::size;
    alignas(16) T values[COUNT][size];
    load<COUNT>(values, data + i, pitch);
#pragma unroll
    for (int v = 0; v < COUNT; ++v) {
      Vector<T> out;
#pragma unroll
      for (int k = 0; k < size; ++k) out.values[k] = scaled(values[v][k]);
      store(data + i + v * pitch, out);
    }
  };
  const int64_t chunk = int64_t(blockDim.x) * in_flight * Vector<T>::size;
  for (int64_t begin = blockIdx.x * chunk; begin < n; begin += gridDim.x * chunk)
    deal(
        data, begin, begin + chunk < n ? begin + chunk : n, threadIdx.x, blockDim.x,
        [&](int64_t i) { data[i] = scaled(data[i]); },
        [&](int64_t i, int64_t pitch) { some(std::integral_constant<int, in_flight>(), i, pitch); },
        [&](int64_t i) { some(std::integral_constant<int, 1>(), i, 0); });
}

// ---- launching ------------------------------------------------------------------------------------------

// Launch shapes from arithmetic; nothing here has been tuned on a GPU yet.
struct Plan {
  bool contiguous;  // the classes
  int lanes, threads;
  int64_t blocks, split, splits;
};

// A lane gets four vectors, what it has in flight at once, or more; a row too long for 32 such lanes gets a
// block, and splits where rows are too few for two blocks on every multiprocessor.
Plan plan(int64_t rows, int64_t classes, int64_t stride_c, int itemsize, int multiprocessors) {
  Plan plan = {stride_c == 1 || classes == 1, 1, 128, 0, classes, 1};
  const int64_t per_lane = in_flight * 16 / itemsize;
  if (plan.contiguous) {
    while (plan.lanes < 32 && plan.lanes * per_lane < classes) plan.lanes *= 2;
    if (classes > 4 * 32 * per_lane) plan.lanes = plan.threads = 256;
    plan.blocks = ceil_div(rows, plan.threads / plan.lanes);
  } else {
    plan.threads = 32 * class_lanes;
    plan.blocks = ceil_div(rows, 32);
  }
  const int64_t piece = plan.contiguous ? plan.threads * (16 / itemsize) : class_lanes * strided_in_flight;
  const int64_t pieces = ceil_div(classes, piece),
                wanted = 2 * multiprocessors / (plan.blocks > 0 ? plan.blocks : 1);
  if ((!plan.contiguous || plan.lanes > 32) && wanted > 1 && pieces > 1) {
    plan.split = ceil_div(pieces, wanted < pieces ? wanted : pieces) * piece;
    plan.splits = ceil_div(classes, plan.split);
  }
  const int64_t most = int64_t(multiprocessors) * blocks_per_processor;
  if (plan.blocks > most) plan.blocks = most;
  if (plan.blocks < 1) plan.blocks = 1;
  return plan;
}

// The device memory that the stages hand over, cut from one piece. Without a piece it only measures.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(base ? reinterpret_cast<uintptr_t>(base) : 16) {}  // no null to take

  template <class Value>
  Value* take(bool wanted, int64_t count) {
    if (!wanted) return nullptr;
    const uintptr_t at = base_ + uintptr_t(used);
    used += ceil_div(count * int64_t(sizeof(Value)), 16) * 16;
    return reinterpret_cast<Value*>(at);
  }

  int64_t used = 0;

 private:
  uintptr_t base_;
};

// A call as the kernels take it.
template <class T, class A = Arithmetic<T>>
struct Prepared {
  Plan shape;
  Mode mode;
  Problem<A> p;
  Logits<const T> x;
  Logits<T> grad;
  Results<A> out;
  Incoming<A> in;
  A *factors, *total, *counts;
  int64_t used, shared_bytes;

  explicit Prepared(const CrossEntropyCall& call) {
    const int64_t rows = call.n * call.d;
    const bool forward = call.loss != nullptr, probabilities = call.target_bytes == 0;
    const bool smooth = call.smoothing != 0, vectors = call.weight || call.alpha;
    const bool every_class = probabilities || (smooth && call.gamma != 0);
    const bool bare = !call.adjustment && !call.margin && call.scale == 1 && !smooth && !call.other;
    const bool alone = !call.losses && !call.argmax && !(forward && call.grad_input);
    mode = every_class ? dense : bare && alone ? plain : general;
    shape = plan(rows, call.classes, call.stride_c, sizeof(T), int(call.multiprocessors));
    shared_bytes = call.shared_bytes;
    Workspace space(call.workspace);
    factors = space.take<A>((smooth || every_class) && vectors, call.classes);
    total = space.take<A>(factors, 1);
    counts = space.take<A>(forward && call.grad_input && !probabilities && call.reduction == reduction_mean,
                           count_blocks);
    const bool split = shape.splits > 1, later = mode == dense && (split || call.grad_input);
    const int64_t parts = shape.splits * rows;
    p = {rows,
         call.d,
         call.classes,
         call.target,
         int(call.target_bytes),
         call.wide_target != 0,
         call.target_stride_n,
         call.target_stride_c,
         call.target_stride_d,
         call.ignore_index,
         call.other,
         int(call.other_bytes),
         call.other_stride_n,
         call.other_stride_d,
         static_cast<const A*>(call.share),
         call.share_stride_n,
         call.share_stride_d,
         static_cast<const A*>(call.weight),
         static_cast<const A*>(call.alpha),
         static_cast<const A*>(call.adjustment),
         static_cast<const A*>(call.margin),
         factors,
         total,
         nullptr,
         A(call.smoothing),
         A(call.smoothing / double(call.classes)),
         A(call.gamma),
         A(call.alpha_scale),
         A(call.scale),
         A(call.z_loss),
         int(call.reduction),
         call.zero_if_empty != 0};
    x = {static_cast<const T*>(call.input), call.stride_n, call.stride_c, call.stride_d};
    grad = {static_cast<T*>(call.grad_input), call.grad_stride_n, call.grad_stride_c, call.grad_stride_d};
    out = {call.loss,
           call.wide != 0,
           static_cast<A*>(call.lse),
           static_cast<A*>(call.denominator),
           static_cast<A*>(call.losses),
           static_cast<int64_t*>(call.argmax),
           space.take<A>(forward, 2 * shape.blocks),
           counts,
           space.take<A>(forward && split, 3 * parts),
           space.take<A>(forward && split && call.argmax, parts),
           space.take<int64_t>(forward && split && call.argmax, parts),
           space.take<A>(later, 2 * parts),
           space.take<A>(later, rows),
           space.take<A>(forward && split && call.grad_input, 2 * rows),
           split ? Stage::parts : Stage::whole};
    in = {call.grad_loss,  call.wide != 0, call.grad_loss_stride_n, call.grad_loss_stride_d, out.lse,
          out.denominator, nullptr};
    used = space.used;
  }

  // Whether rows of the gradient are walked like those of the logits.
  bool alike() const { return (grad.stride_c == 1 || p.classes == 1) == shape.contiguous; }

  // The shared memory that a block's rows can wait in, with room for a second block; else 0.
  int64_t room() const {
    const int64_t bytes = shape.contiguous ? shape.threads / shape.lanes * held_bytes<T>(p.classes)
                                           : 32 * p.classes * int64_t(sizeof(T));
    const int64_t beside = shape.contiguous ? 2048 : 8192;  // at most, of other shared memory
    return shape.splits == 1 && bytes <= shared_bytes / 2 - beside ? bytes : 0;
  }
};

template <class T, class A>
void prepare_factors(const Prepared<T, A>& c, cudaStream_t stream) {
  if (c.factors) LAUNCH(combine_factors<A>, dim3(1), dim3(1024), 0, stream, c.p, c.factors, c.total);
}

// One launch over all rows, whatever their layout.
template <class T, Mode MODE, class A>
void launch_rows(const Prepared<T, A>& c, const Results<A>& out, const Logits<T>& grad, cudaStream_t stream) {
  auto* rows = forward_rows<T, MODE, false>;
  auto* strided = forward_strided<T, MODE, false>;
  const dim3 grid(unsigned(c.shape.blocks), unsigned(c.shape.splits));
  const bool again = out.stage == Stage::whole && (MODE == dense || grad.data);
  const int64_t room = MODE != plain && again ? c.room() : 0;
  if constexpr (MODE != plain)
    if (room) {
      rows = forward_rows<T, MODE, true>;
      strided = forward_strided<T, MODE, true>;
      if ((c.shape.contiguous ? allow(rows, room) : allow(strided, room)) != cudaSuccess) return;
    }
  const auto bytes = size_t(room);
  if (c.shape.contiguous)
    LAUNCH(rows, grid, dim3(c.shape.threads), bytes, stream, c.p, c.x, grad, out, c.shape.lanes,
           c.shape.split);
  else
    LAUNCH(strided, grid, dim3(32, class_lanes), bytes, stream, c.p, c.x, grad, out, c.shape.split);
}

template <class T, Mode MODE, class A>
int64_t launch_merge(const Prepared<T, A>& c, const Results<A>& out, cudaStream_t stream) {
  auto* merge = merge_splits<T, MODE>;
  const int64_t blocks = ceil_div(c.p.rows, 4) < c.shape.blocks ? ceil_div(c.p.rows, 4) : c.shape.blocks;
  LAUNCH(merge, dim3(unsigned(blocks)), dim3(128), 0, stream, c.p, c.x, out, int(c.shape.splits));
  return blocks;
}

template <class T, Mode MODE, class A>
void launch_gradient(const Prepared<T, A>& c, Incoming<A> in, cudaStream_t stream) {
  auto* rows = backward_rows<T, MODE, false>;
  auto* strided = backward_strided<T, MODE, false>;
  if constexpr (MODE == dense)
    if (!in.slopes) {
      const int64_t room = c.room(), group = c.shape.contiguous ? c.shape.threads / c.shape.lanes : 32;
      const dim3 grid(unsigned(ceil_div(c.p.rows, group)));
      rows = backward_rows<T, MODE, true>;
      strided = backward_strided<T, MODE, true>;
      if ((c.shape.contiguous ? allow(rows, room) : allow(strided, room)) != cudaSuccess) return;
      if (c.shape.contiguous)
        LAUNCH(rows, grid, dim3(c.shape.threads), size_t(room), stream, c.p, c.x, c.grad, in, c.shape.lanes,
               c.p.classes, int64_t{1});
      else
        LAUNCH(strided, grid, dim3(32, class_lanes), size_t(room), stream, c.p, c.x, c.grad, in, c.p.classes);
      return;
    }
  if (c.shape.contiguous && c.alike()) {
    const int64_t vectors = c.shape.splits > 1 ? 1 : in_flight;  // few rows, if they are split
    const int64_t chunk =
        c.shape.lanes > 32 ? int64_t(c.shape.threads) * vectors * Vector<T>::size : c.p.classes;
    const int64_t chunks = ceil_div(c.p.classes, chunk);
    const int64_t blocks =
        c.shape.lanes > 32 ? c.p.rows * chunks : ceil_div(c.p.rows, c.shape.threads / c.shape.lanes);
    LAUNCH(rows, dim3(unsigned(blocks)), dim3(c.shape.threads), 0, stream, c.p, c.x, c.grad, in,
           c.shape.lanes, chunk, chunks);
  } else {
    constexpr int64_t step = strided_in_flight * class_lanes;
    const int64_t chunk = ceil_div(ceil_div(c.p.classes, step), 65535) * step;
    LAUNCH(strided, dim3(unsigned(ceil_div(c.p.rows, 32)), unsigned(ceil_div(c.p.classes, chunk))),
           dim3(32, class_lanes), 0, stream, c.p, c.x, c.grad, in, chunk);
  }
}

template <class T, Mode MODE, class A>
cudaError_t backward(Prepared<T, A>& c, cudaStream_t stream) {
  if constexpr (MODE == dense)
    if (!c.in.slopes && (!c.alike() || !c.room())) {
      Results<A> out = c.out;
      out.stage = Stage::sums;
      out.loss = nullptr;
      launch_rows<T, MODE>(c, out, {}, stream);
      launch_merge<T, MODE>(c, out, stream);
      c.in.slopes = out.slopes;
    }
  launch_gradient<T, MODE>(c, c.in, stream);
  return cudaGetLastError();
}

template <class T, Mode MODE, class A>
cudaError_t forward(Prepared<T, A>& c, cudaStream_t stream) {
  const bool split = c.shape.splits > 1, wanted = c.grad.data && c.p.rows > 0;
  const bool in_rows = wanted && !split && c.alike();
  if (c.counts) LAUNCH(count_rows<T>, dim3(count_blocks), dim3(256), 0, stream, c.p, c.x, c.counts);
  Logits<T> grad = c.grad;
  if (!in_rows) grad.data = nullptr;
  launch_rows<T, MODE>(c, c.out, grad, stream);
  int64_t blocks = c.shape.blocks;
  Results<A> out = c.out;
  if (split) {
    blocks = launch_merge<T, MODE>(c, out, stream);
    if constexpr (MODE == dense) {
      out.stage = Stage::sums;
      launch_rows<T, MODE>(c, out, grad, stream);
      launch_merge<T, MODE>(c, out, stream);
    }
  }
  if (c.p.reduction != reduction_none && blocks > 1)
    LAUNCH(sum_blocks<T>, dim3(1), dim3(1024), 0, stream, c.p, out, blocks);
  if (wanted && !in_rows) {
    if (split) c.in.slopes = out.slopes;  // which the merge has left there
    c.p.target_logits = out.target_logits;
    return backward<T, MODE>(c, stream);
  }
  return cudaGetLastError();
}

template <class Run>
cudaError_t with_mode(Mode mode, Run run) {
  return mode == plain     ? run.template operator()<plain>()
         : mode == general ? run.template operator()<general>()
                           : run.template operator()<dense>();
}

}  // namespace

cudaError_t cross_entropy_workspace(const CrossEntropyCall* call, int64_t* bytes) {
  return with_type(int(call->dtype), [&]<class T>() {
    *bytes = Prepared<T>(*call).used;
    return cudaSuccess;
  });
}

cudaError_t cross_entropy_forward(const CrossEntropyCall* call, cudaStream_t stream) {
  return with_type(int(call->dtype), [&]<class T>() {
    Prepared<T> c(*call);
    prepare_factors(c, stream);
    return with_mode(c.mode, [&]<Mode MODE>() { return forward<T, MODE>(c, stream); });
  });
}

cudaError_t cross_entropy_backward(const CrossEntropyCall* call, cudaStream_t stream) {
  return with_type(int(call->dtype), [&]<class T>() {
    Prepared<T> c(*call);
    if (c.p.rows == 0 || c.p.classes == 0) return cudaSuccess;
    prepare_factors(c, stream);
    return with_mode(c.mode, [&]<Mode MODE>() { return backward<T, MODE>(c, stream); });
  });
}

cudaError_t scale_gradient(int dtype, void* grad, const void* factor, int64_t n, int multiprocessors,
                           cudaStream_t stream) {
  return with_type(dtype, [&]<class T>() {
    if (n == 0) return cudaSuccess;
    const int64_t wanted = ceil_div(n, 256 * in_flight * Vector<T>::size);
    const int64_t most = int64_t(multiprocessors) * blocks_per_processor;
    LAUNCH(scale_elements<T>, dim3(unsigned(wanted < most ? wanted : most)), dim3(256), 0, stream,
           static_cast<T*>(grad), static_cast<const Arithmetic<T>*>(factor), n);
    return cudaGetLastError();
  });
}

}  // namespace fastreg::cuda
