// Softmax cross-entropy and its family in CUDA. The formula stands in fastreg/losses.py, a row's maths in
// csrc/losses.h.
//
// Bytes: forward, the logits once; backward, the logits once and the gradient written once. Rows in which
// every class has a share of its own (probabilities, smoothing with gamma) are walked twice in the forward,
// and the gradient in the forward walks a row once more. Rows wait for that in shared memory: in half of a
// multiprocessor's, so that another block has the other half (on sm_90 some 110 KB: 57,000 contiguous classes
// of bf16, or 1,600 strided ones). Longer rows, and rows too few for the GPU, are shared by a cluster of two
// to eight blocks, which tell each other their parts through L2: 460,000 classes of bf16, or 13,000 strided
// ones; and 920,000 if their gradient is made at once, by eight blocks that have all of a multiprocessor
// each. On GPUs without clusters such a row is walked by one block with all of that memory, and few and long
// rows are split over blocks and read again as a whole, as are probabilities everywhere where the gradient is
// made at once. What of a row finds no room in shared memory is read again by the same threads at once, so
// from L2, which has to hold it for all multiprocessors. Few rows that are too long for a cluster are split
// too. Beside the logits only vectors with one element per row or per class. Ignored rows are not read.
//
// Launches: forward, one if one block can do everything, else the rows and then the sum of the blocks'
// losses. Rows split over blocks add a merge, and where every class has a share two launches more for those.
// Smoothing with class weights adds one for their sum, the gradient of a mean in the forward one for what it
// divides by; each of these one more where there are more than 4,096 classes, or 8,192 rows. Backward, one.
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
constexpr int class_lanes = 8;     // warps that share the classes of 32 rows, where classes are strided
constexpr int most_threads = 512;  // of a block whose row takes all of a multiprocessor's shared memory
constexpr int blocks_per_processor = 16;
constexpr int most_counts = 32;  // that a thread adds up by itself
constexpr int slot = 24;         // bytes that hold what threads merge: a Partial, Best or Sums of any type

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

// ---- neighbouring classes -------------------------------------------------------------------------------
// Options are asked about once for a vector of classes, not for each: the issue of instructions, some twelve
// per element of bf16 in a forward, ends before the memory's bandwidth does.

// Reads a vector that has an element per class.
template <int SIZE, class A>
__device__ void load_classes(A (&out)[SIZE], const A* from) {
  constexpr int size = Vector<A>::size;
  if constexpr (SIZE % size == 0) {
    if (reinterpret_cast<uintptr_t>(from) % 16 == 0) {
      alignas(16) A vectors[SIZE / size][size];
      load<SIZE / size>(vectors, from, size);
#pragma unroll
      for (int k = 0; k < SIZE; ++k) out[k] = vectors[k / size][k % size];
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < SIZE; ++k) out[k] = from[k];
}

// weight·alpha
template <int SIZE, class A>
__device__ void load_factors(A (&out)[SIZE], const Problem<A>& p, int64_t c) {
  if (p.factors) return load_classes(out, p.factors + c);
#pragma unroll
  for (int k = 0; k < SIZE; ++k) out[k] = p.alpha_scale;
}

// values[at] = to(values[at]), if there is one, without an index that would keep them out of registers.
template <int SIZE, class A, class To>
__device__ void change(A (&values)[SIZE], int64_t at, To to) {
  if (at < 0 || at >= SIZE) return;
  const int here = static_cast<int>(at);
#pragma unroll
  for (int k = 0; k < SIZE; ++k)
    if (k == here) values[k] = to(values[k]);
}

// What losses_terms.h asks for where each class has a term. A power's error is gamma·|log u|·2^-24, less than
// that of a 1 - p which was rounded.
struct DeviceMath : ScalarMath {
  template <class A>
  static __device__ Exps<A> exps(A x) {
    return {fast_exp(x), ::expm1(x)};
  }
  template <class A>
  static __device__ A pow(A base, A exponent) {
    return exponent == 0   ? A(1)
           : exponent == 1 ? base
           : exponent == 2 ? base * base
                           : ::exp2(exponent * ::log2(base));
  }
};

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
      margin = rounded_product(share, p.margin[y]);
      if (other >= 0) other_margin = rounded_product(1 - share, p.margin[other]);
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

  // Makes z of the logits of SIZE neighbouring classes.
  template <int SIZE>
  __device__ void scale(const Problem<A>& p, A (&x)[SIZE], int64_t c) const {
    if constexpr (MODE == plain) return;
    if (p.adjustment) {
      A adjustment[SIZE];
      load_classes(adjustment, p.adjustment + c);
#pragma unroll
      for (int k = 0; k < SIZE; ++k) x[k] += adjustment[k];
    }
    if (p.margin) {
      if (MODE == dense && p.target_bytes == 0) {
#pragma unroll
        for (int k = 0; k < SIZE; ++k) x[k] -= rounded_product(p.margin[c + k], probability(p, c + k));
      }
      change(x, y - c, [this](A value) { return value - margin; });
      change(x, other - c, [this](A value) { return value - other_margin; });
    }
#pragma unroll
    for (int k = 0; k < SIZE; ++k) x[k] = rounded_product(p.scale, x[k]);
  }

  __device__ A logit(const Problem<A>& p, A x, int64_t c) const {
    A z[1] = {x};
    scale(p, z, c);
    return z[0];
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

  // Of neighbouring classes: the largest, and only if it is one to take, where it stands.
  template <int SIZE>
  __device__ void take(const A (&some)[SIZE], int64_t at) {
    A high = -std::numeric_limits<A>::infinity();
#pragma unroll
    for (int k = 0; k < SIZE; ++k) high = larger(some[k], high);
    if (high < x || (high == x && at > c)) return;
#pragma unroll
    for (int k = SIZE - 1; k >= 0; --k)
      if (some[k] == high) take(high, at + k);
  }
};

// Takes COUNT vectors of SIZE neighbouring classes, `pitch` apart, into a partial: one maximum for all of
// them.
template <int COUNT, int SIZE, class T, Mode MODE, class A>
__device__ void take(Partial<A>& part, Best<A>& best, bool want_best, const T (&x)[COUNT][SIZE], int64_t c,
                     int64_t pitch, const Problem<A>& p, const Row<T, MODE>& row) {
  A z[COUNT][SIZE], high = part.high;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
#pragma unroll
    for (int k = 0; k < SIZE; ++k) z[i][k] = static_cast<A>(x[i][k]);
    if (MODE != plain && want_best) best.take(z[i], c + i * pitch);
    row.scale(p, z[i], c + i * pitch);
#pragma unroll
    for (int k = 0; k < SIZE; ++k) high = larger(z[i][k], high);
  }
  if constexpr (MODE == general)
    if (p.smoothing != 0) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        A factors[SIZE];
        load_factors(factors, p, c + i * pitch);
#pragma unroll
        for (int k = 0; k < SIZE; ++k) part.linear += product(factors[k], z[i][k] - row.pivot);
      }
    }
  part.sum *= fast_exp(part.high - high);
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    A sum = 0;
#pragma unroll
    for (int k = 0; k < SIZE; ++k) sum += flushed_exp(z[i][k] - high);
    part.sum += sum;
  }
  part.high = high;
}

// Where a walk finds a row: in global memory; there, and each lane leaves what it has read in shared memory;
// or in shared memory, where each lane takes what it has left.
enum class From { memory, memory_to_hold, held };

// A row in global memory, and its place in shared memory if it is held. Contiguous classes: as far past a
// multiple of 16 bytes as in global memory. Classes that are `stride` apart: beside the other rows of the
// warp.
template <class T, bool STRIDED, From FROM>
struct Source {
  const T* x;
  int64_t stride;
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
    T* const place = held + (STRIDED ? c * 32 : c);
    const T value = FROM == From::held ? *place : x[STRIDED ? c * stride : c];
    if constexpr (FROM == From::memory_to_hold) *place = value;
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

// Elements that x lies past a multiple of 16 bytes.
template <class T>
__device__ int64_t past_vector(const T* x) {
  return reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T);
}

// Before a group's next row takes the place of one that other lanes may have read.
__device__ inline void wait_for_group(int lanes) {
  if (lanes > 32)
    __syncthreads();
  else
    __syncwarp();
}

// Takes a lane's share of the classes [begin, end) of a row into `part`.
template <class T, Mode MODE, bool STRIDED, From FROM, class A = Arithmetic<T>>
__device__ void walk(Partial<A>& part, Best<A>& best, bool want_best, const Problem<A>& p,
                     const Row<T, MODE>& row, const Source<T, STRIDED, FROM>& x, int64_t begin, int64_t end,
                     int lane, int lanes) {
  auto one = [&](int64_t c) {
    const T one[1][1] = {{x.read(c)}};
    take(part, best, want_best, one, c, 0, p, row);
  };
  if constexpr (STRIDED) {
    int64_t c = begin + lane;
    for (; c + (strided_in_flight - 1) * lanes < end; c += strided_in_flight * lanes) {
      T some[strided_in_flight][1];
#pragma unroll
      for (int i = 0; i < strided_in_flight; ++i) some[i][0] = x.read(c + i * lanes);
      take(part, best, want_best, some, c, lanes, p, row);
    }
    for (; c < end; c += lanes) one(c);
  } else {
    auto some = [&]<int COUNT>(std::integral_constant<int, COUNT>, int64_t c, int64_t pitch) {
      alignas(16) T some[COUNT][Vector<T>::size];
      x.read(some, c, pitch);
      take(part, best, want_best, some, c, pitch, p, row);
    };
    deal(
        x.x, begin, end, lane, lanes, one,
        [&](int64_t c, int64_t pitch) { some(std::integral_constant<int, in_flight>(), c, pitch); },
        [&](int64_t c) { some(std::integral_constant<int, 1>(), c, 0); });
  }
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
  for (int k = 0; k < COUNT; ++k) q[k] = 0;
  if (given) {
#pragma unroll
    for (int k = 0; k < COUNT; ++k) q[k] = row.probability(p, c + k);
  }
}

// Makes q_c·v_c, smoothed, of the probabilities of neighbouring classes.
template <int SIZE, class T, class A>
__device__ void make_shares(A (&q)[SIZE], const Problem<A>& p, const Row<T, dense>& row, int64_t c) {
  change(q, row.y - c, [&row](A) { return row.share; });
  change(q, row.other - c, [&row](A) { return 1 - row.share; });
  A factors[SIZE];
  load_factors(factors, p, c);
#pragma unroll
  for (int k = 0; k < SIZE; ++k) q[k] = product((1 - p.smoothing) * q[k] + p.spread, factors[k]);
}

// Neighbouring classes of logits x and probabilities q.
template <int SIZE, class T, class A>
__device__ void add_classes(Sums<A>& sums, const Problem<A>& p, const Row<T, dense>& row,
                            const Softmax<A>& softmax, A (&x)[SIZE], int64_t c, A (&q)[SIZE]) {
  make_shares(q, p, row, c);
  row.scale(p, x, c);
  auto add = [&](A gamma) {
#pragma unroll
    for (int k = 0; k < SIZE; ++k) {
      const Focal<A> term = focal<DeviceMath>(softmax.log_p(x[k]), gamma);
      sums.loss += product(q[k], term.term);
      sums.slope += product(q[k], term.slope);
    }
  };
  if (p.gamma == 0)
    add(0);  // compiled apart: nothing but log p is needed
  else
    add(p.gamma);
}

template <class T, bool STRIDED, From FROM, class A = Arithmetic<T>>
__device__ void sum_classes(Sums<A>& sums, const Problem<A>& p, const Row<T, dense>& row,
                            const Softmax<A>& softmax, const Source<T, STRIDED, FROM>& x, int64_t begin,
                            int64_t end, int lane, int lanes) {
  constexpr int size = Vector<T>::size;
  auto one = [&](int64_t c) {
    A q[1], z[1] = {static_cast<A>(x.read(c))};
    load_probabilities(q, p, row, c);
    add_classes(sums, p, row, softmax, z, c, q);
  };
  if constexpr (STRIDED) {
#pragma unroll 2
    for (int64_t c = begin + lane; c < end; c += lanes) one(c);
  } else {
    auto some = [&]<int COUNT>(std::integral_constant<int, COUNT>, int64_t c, int64_t pitch) {
      alignas(16) T values[COUNT][size];
      A q[COUNT][size];
      x.read(values, c, pitch);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) load_probabilities(q[i], p, row, c + i * pitch);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        A z[size];
#pragma unroll
        for (int k = 0; k < size; ++k) z[k] = static_cast<A>(values[i][k]);
        add_classes(sums, p, row, softmax, z, c + i * pitch, q[i]);
      }
    };
    deal<dense_in_flight>(
        x.x, begin, end, lane, lanes, one,
        [&](int64_t c, int64_t pitch) { some(std::integral_constant<int, dense_in_flight>(), c, pitch); },
        [&](int64_t c) { some(std::integral_constant<int, 1>(), c, 0); });
  }
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
};

// What the forward has left of a row: its softmax and, where every class has a share, the sum of their
// slopes.
template <Mode MODE, class A>
__device__ A read_row(const Problem<A>& p, const A* lse, int64_t r, Softmax<A>& softmax) {
  softmax = {lse[r], lse[p.rows + r]};
  return MODE == dense ? lse[2 * p.rows + r] : A(0);
}

// The gradient of neighbouring elements of a row.
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
    auto weight = [&](int64_t c) {
      A factor[1] = {0};
      if (MODE != plain && p.smoothing != 0) load_factors(factor, p, c);
      return factor[0];
    };
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

  // Of logits x and, in dense rows, probabilities q, in the place of the logits.
  template <int SIZE>
  __device__ void operator()(const Problem<A>& p, const Row<T, MODE>& row, A (&x)[SIZE], int64_t c,
                             A (&q)[SIZE]) const {
    row.scale(p, x, c);
    if constexpr (MODE == dense) {
      make_shares(q, p, row, c);
      auto make = [&](A gamma) {
#pragma unroll
        for (int k = 0; k < SIZE; ++k) {
          const Focal<A> term = focal<DeviceMath>(softmax.log_p(x[k]), gamma);
          const A share = product(q[k], term.slope);
          x[k] = gradient.slope * ((slope - share) * term.p - share * term.u);
        }
      };
      if (p.gamma == 0)
        make(0);
      else
        make(p.gamma);
    } else {
#pragma unroll
      for (int k = 0; k < SIZE; ++k) x[k] = gradient.slope * fast_exp(softmax.log_p(x[k]));
      if (MODE != plain && p.smoothing != 0) {
        A factors[SIZE];
        load_factors(factors, p, c);
#pragma unroll
        for (int k = 0; k < SIZE; ++k) x[k] -= gradient.spread * factors[k];
      }
      change(x, row.y - c, [this](A) { return gradient.at_target; });
      if (MODE != plain) change(x, row.other - c, [this](A) { return at_other; });
    }
  }
};

// A lane's share of the gradient of the classes [begin, end) of a row, which go `to_stride` apart if strided.
template <class T, Mode MODE, bool STRIDED, From FROM, class A = Arithmetic<T>>
__device__ void write_gradient(const Problem<A>& p, const Row<T, MODE>& row, const Slope<T, MODE>& slope,
                               const Source<T, STRIDED, FROM>& from, T* to, int64_t to_stride, int64_t begin,
                               int64_t end, int lane, int lanes) {
  constexpr int size = Vector<T>::size, most = MODE == dense ? dense_in_flight
                                               : STRIDED     ? strided_in_flight
                                                             : in_flight;
  auto one = [&](T x, int64_t c) {
    if (!row.kept) return T(0.f);
    A value[1] = {static_cast<A>(x)}, q[1] = {};
    if constexpr (MODE == dense) load_probabilities(q, p, row, c);
    slope(p, row, value, c, q);
    return static_cast<T>(value[0]);
  };
  if constexpr (STRIDED) {
    for (int64_t c = begin + lane; c < end; c += most * lanes) {
      T values[most];
#pragma unroll
      for (int i = 0; i < most; ++i)
        values[i] = row.kept && c + i * lanes < end ? from.read(c + i * lanes) : T(0.f);
#pragma unroll
      for (int i = 0; i < most; ++i)
        if (const int64_t at = c + i * lanes; at < end) to[at * to_stride] = one(values[i], at);
    }
  } else {
    auto alone = [&](int64_t c) { to[c] = one(row.kept ? from.read(c) : T(0.f), c); };
    if ((reinterpret_cast<uintptr_t>(from.x) - reinterpret_cast<uintptr_t>(to)) % 16 != 0) {
      for (int64_t c = begin + lane; c < end; c += lanes) alone(c);  // never both aligned
      return;
    }
    auto some = [&]<int COUNT>(std::integral_constant<int, COUNT>, int64_t c, int64_t pitch) {
      alignas(16) T values[COUNT][size] = {};
      if (row.kept) {
        from.read(values, c, pitch);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
          A z[size], q[size] = {};
          if constexpr (MODE == dense) load_probabilities(q, p, row, c + i * pitch);
#pragma unroll
          for (int k = 0; k < size; ++k) z[k] = static_cast<A>(values[i][k]);
          slope(p, row, z, c + i * pitch, q);
#pragma unroll
          for (int k = 0; k < size; ++k) values[i][k] = static_cast<T>(z[k]);
        }
      }
#pragma unroll
      for (int i = 0; i < COUNT; ++i)
        store(to + c + i * pitch, *reinterpret_cast<const Vector<T>*>(values[i]));
    };
    deal<most>(
        from.x, begin, end, lane, lanes, alone,
        [&](int64_t c, int64_t pitch) { some(std::integral_constant<int, most>(), c, pitch); },
        [&](int64_t c) { some(std::integral_constant<int, 1>(), c, 0); });
  }
}

// ---- forward --------------------------------------------------------------------------------------------

// What a launch makes of its rows: all of it, a block or the blocks of a cluster; the partials of their
// splits; or, of rows whose log-sum-exp is known, the sums of their splits.
enum class Stage { whole, cluster, parts, sums };

template <class A>
struct Results {
  void* loss;
  bool wide;  // the loss is of type A, not T
  A *lse, *denominator;
  A* losses;        // per row, or null
  int64_t* argmax;  // per row, or null
  A* block_sums;    // (losses, weights) per block
  const A* counts;  // their sum is what the gradient of a mean in the forward is divided by
  int64_t count_parts;
  A* parts;   // (high, sum, linear) per split and row
  A* best_x;  // per split and row
  int64_t* best_c;
  A* sums;           // (loss, slope) per split and row
  A* target_logits;  // (z_y, z_other) per row, or null
  Stage stage;
};

// See mean_denominator in fastreg/losses.py.
template <class A>
__device__ A divisor_of(const Problem<A>& p, A weights) {
  if (p.reduction != reduction_mean) return 1;
  return weights != 0 ? weights : A(p.zero_if_empty ? INFINITY : NAN);
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
  if (MODE == dense) out.lse[2 * p.rows + r] = row.kept ? sums.slope : A(0);
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

// What the blocks of a cluster have left, through L2.
template <class A>
__device__ void merge_parts(const Problem<A>& p, const Results<A>& out, int64_t r, Partial<A>& part,
                            Best<A>& best) {
  wait_for_cluster();
  part = nothing<A>();
  for (int64_t at = r; r < p.rows && at < gridDim.y * p.rows; at += p.rows) {
    part = merge(part, Partial<A>{out.parts[3 * at], out.parts[3 * at + 1], out.parts[3 * at + 2]});
    if (out.argmax) best.take(out.best_x[at], out.best_c[at]);
  }
}

template <class A>
__device__ Sums<A> merge_row_sums(const Problem<A>& p, const Results<A>& out, int64_t r) {
  wait_for_cluster();
  Sums<A> sums;
  for (int64_t at = r; r < p.rows && at < gridDim.y * p.rows; at += p.rows)
    sums = merge(sums, Sums<A>{out.sums[2 * at], out.sums[2 * at + 1]});
  return sums;
}

// The gradient of each row's loss, where it is made in the forward.
template <class A>
__device__ A incoming_gradient(const Problem<A>& p, const Results<A>& out) {
  A weights = p.target_bytes == 0 ? A(p.rows) : A(0);
  if (p.reduction == reduction_mean && p.target_bytes != 0)
    for (int64_t b = 0; b < out.count_parts; ++b) weights += out.counts[b];
  return 1 / divisor_of(p, weights);
}

// Rows of contiguous classes: `lanes` threads each. STRIDED: 32 neighbouring rows per block, their classes
// dealt out to its `lanes` warps. HOLD: rows are walked again; the first `hold` classes of a block wait for
// that in dynamic shared memory, the others are in L2. blockIdx.y: which of the splits, or of a cluster.
template <class T, Mode MODE, bool STRIDED, bool HOLD, class A = Arithmetic<T>>
__global__ void __launch_bounds__(sizeof(T) == 8 || MODE == dense ? 256 : most_threads, 1)
    forward_rows(Problem<A> p, Logits<const T> x, Logits<T> grad, Results<A> out, int lanes, int64_t split,
                 int64_t hold) {
  alignas(16) __shared__ unsigned char shared[(STRIDED ? class_lanes * 32 : 32) * slot];
  DYN_SMEM(unsigned char, memory);
  const int lane = STRIDED ? threadIdx.y : threadIdx.x % lanes;
  const int group = STRIDED ? threadIdx.x : threadIdx.x / lanes, groups = STRIDED ? 32 : blockDim.x / lanes;
  auto merged = [&](auto value) {
    if constexpr (STRIDED)
      return merge_columns(value, shared);
    else
      return merge_group(value, lanes, shared);
  };
  const int64_t begin = blockIdx.y * split, end = begin + split < p.classes ? begin + split : p.classes;
  const bool want_argmax = MODE != plain && out.argmax && out.stage != Stage::sums;
  const bool cluster = HOLD && out.stage == Stage::cluster;
  A losses = 0, weights = 0, incoming = 0;
  if (MODE != plain && grad.data) incoming = incoming_gradient(p, out);
  for (int64_t first = int64_t(blockIdx.x) * groups; first < p.rows; first += int64_t(gridDim.x) * groups) {
    const int64_t r = first + group;
    const bool mine = lane == 0 && r < p.rows;
    const Row<T, MODE> row(p, x, r);
    const T* from = p.row(x, r);
    T* held = nullptr;
    int64_t seam = end;
    if constexpr (HOLD) {
      if (hold < end - begin) seam = begin + (STRIDED ? hold : hold - past_vector(from + begin + hold));
      if constexpr (STRIDED) {
        held = reinterpret_cast<T*>(memory) + threadIdx.x - begin * 32;
      } else {
        held = place_of(memory, from + begin, group, hold) - begin;
        wait_for_group(lanes);
      }
    }
    const Source<T, STRIDED, HOLD ? From::memory_to_hold : From::memory> once = {from, x.stride_c, held};
    const Source<T, STRIDED, HOLD ? From::held : From::memory> again = {from, x.stride_c, held};
    const Source<T, STRIDED, From::memory> behind = {from, x.stride_c, nullptr};
    Softmax<A> softmax = {0, 0};
    Partial<A> part = nothing<A>();
    Best<A> best;
    if (MODE != dense || out.stage != Stage::sums) {
      if (row.kept) {
        walk(part, best, want_argmax, p, row, once, begin, seam, lane, lanes);
        if (HOLD && seam < end) walk(part, best, want_argmax, p, row, behind, seam, end, lane, lanes);
      }
      part = merged(part);
      if (want_argmax) best = merged(best);
      if (mine && (cluster || out.stage == Stage::parts)) leave_part(p, out, r, part, best);
      if (out.stage == Stage::parts) continue;
      if (cluster) merge_parts(p, out, r, part, best);
      softmax = {part.high, log(part.sum)};
      if (mine && blockIdx.y == 0) leave_softmax(p, row, out, r, softmax, best);
    } else if (r < p.rows) {
      softmax = {out.lse[r], out.lse[p.rows + r]};
    }
    Sums<A> sums;
    if constexpr (MODE == dense) {
      if (row.kept) {
        if (HOLD && seam < end) sum_classes(sums, p, row, softmax, behind, seam, end, lane, lanes);
        sum_classes(sums, p, row, softmax, again, begin, seam, lane, lanes);
      }
      sums = merged(sums);
      if (mine && (cluster || out.stage == Stage::sums)) leave_row_sums(p, out, r, sums);
      if (out.stage == Stage::sums) continue;
      if (cluster) sums = merge_row_sums(p, out, r);
    }
    if (mine && blockIdx.y == 0) finish_row(p, row, out, r, softmax, part.linear, sums, losses, weights);
    if constexpr (MODE != plain)
      if (grad.data) {
        __syncwarp();  // x may be written now: every lane has read its target's logit
        if (r >= p.rows) continue;
        const Slope<T, MODE> slope(p, row, softmax, sums.slope, incoming);
        T* to = p.row(grad, r);
        if (HOLD && seam < end)
          write_gradient(p, row, slope, behind, to, grad.stride_c, seam, end, lane, lanes);
        write_gradient(p, row, slope, again, to, grad.stride_c, begin, seam, lane, lanes);
      }
  }
  if (out.stage <= Stage::cluster && blockIdx.y == 0) leave_sums<T>(p, out, losses, weights);
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
    if (MODE != dense && out.target_logits)
      out.target_logits[r] = row.z_y, out.target_logits[p.rows + r] = row.z_other;
    if (MODE != dense || of_sums) finish_row(p, row, out, r, softmax, part.linear, sums, losses, weights);
  }
  if (MODE != dense || of_sums) leave_sums<T>(p, out, losses, weights);
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

// weight·alpha of every class, and each block's sum.
template <class A>
__global__ void __launch_bounds__(1024) combine_factors(Problem<A> p, A* factors, A* sums) {
  __shared__ A shared[32];
  A sum = 0;
  for (int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; c < p.classes;
       c += int64_t(gridDim.x) * blockDim.x) {
    A factor = p.alpha_scale;
    if (p.weight) factor *= p.weight[c];
    if (p.alpha) factor *= p.alpha[c];
    factors[c] = factor;
    sum += factor;
  }
  sum = sum_block(sum, shared);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <class A>
__global__ void __launch_bounds__(1024) add_up(const A* parts, int64_t count, A* sum) {
  __shared__ A shared[32];
  A own = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) own += parts[i];
  own = sum_block(own, shared);
  if (threadIdx.x == 0) *sum = own;
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

// Rows of contiguous classes: `lanes` threads per row, or `chunks` blocks per row.
template <class T, Mode MODE, class A = Arithmetic<T>>
__global__ void __launch_bounds__(256, sizeof(T) == 8 || MODE == dense ? 1 : 2)
    backward_rows(Problem<A> p, Logits<const T> x, Logits<T> grad, Incoming<A> in, int lanes, int64_t chunk,
                  int64_t chunks) {
  const int lane = threadIdx.x % lanes;
  const int64_t r =
      lanes > 32 ? blockIdx.x / chunks : (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / lanes;
  if (r >= p.rows) return;
  const int64_t begin = lanes > 32 ? blockIdx.x % chunks * chunk : 0;
  const int64_t end = begin + chunk < p.classes ? begin + chunk : p.classes;
  const Row<T, MODE> row(p, x, r);
  Softmax<A> softmax;
  const A slopes = read_row<MODE>(p, in.lse, r, softmax);
  const Slope<T, MODE> slope(p, row, softmax, slopes, incoming_gradient<T>(p, in, r));
  const Source<T, false, From::memory> from = {p.row(x, r), 1, nullptr};
  write_gradient(p, row, slope, from, p.row(grad, r), 1, begin, end, lane, lanes);
}

// Rows of strided classes: 32 rows per block; blockIdx.y is the chunk of the classes.
template <class T, Mode MODE, class A = Arithmetic<T>>
__global__ void __launch_bounds__(32 * class_lanes, sizeof(T) == 8 || MODE == dense ? 1 : 2)
    backward_strided(Problem<A> p, Logits<const T> x, Logits<T> grad, Incoming<A> in, int64_t chunk) {
  const int64_t r = int64_t(blockIdx.x) * 32 + threadIdx.x;
  if (r >= p.rows) return;
  const int64_t begin = blockIdx.y * chunk, end = begin + chunk < p.classes ? begin + chunk : p.classes;
  const Row<T, MODE> row(p, x, r);
  Softmax<A> softmax;
  const A slopes = read_row<MODE>(p, in.lse, r, softmax);
  const Slope<T, MODE> slope(p, row, softmax, slopes, incoming_gradient<T>(p, in, r));
  const Source<T, true, From::memory> from = {p.row(x, r), x.stride_c, nullptr};
  write_gradient(p, row, slope, from, p.row(grad, r), grad.stride_c, begin, end, threadIdx.y, class_lanes);
}

template <class T, class A = Arithmetic<T>>
__global__ void __launch_bounds__(256) scale_elements(T* data, const A* factor, int64_t n) {
  const A by = *factor;
  if (by == 1) return;
  // A 0, that of an ignored row, stays 0, were the factor infinite.
  auto scaled = [&](T value) {
    const A wide = static_cast<A>(value);
    return wide == 0 ? value : static_cast<T>(wide * by);
  };
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
  int64_t blocks, split, splits;  // `splits` blocks have `split` classes of a row each; they are a cluster,
  bool cluster;                   // or leave their parts to the next launch
};

int64_t at_most(int64_t count, int64_t most) { return count < most ? count : most; }

// A lane gets four vectors, what it has in flight at once, or more; a row too long for 32 such lanes gets a
// block, and splits where rows are too few for two blocks on every multiprocessor.
Plan plan(int64_t rows, int64_t classes, int64_t stride_c, int itemsize, int multiprocessors) {
  Plan plan = {stride_c == 1 || classes == 1, 1, 128, 0, classes, 1, false};
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
  if (rows > 0 && (!plan.contiguous || plan.lanes > 32) && wanted > 1 && pieces > 1) {
    plan.split = ceil_div(pieces, at_most(wanted, pieces)) * piece;
    plan.splits = ceil_div(classes, plan.split);
  }
  plan.blocks = at_most(plan.blocks, int64_t(multiprocessors) * blocks_per_processor);
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
  A *factors, *factor_sums, *counts;
  int64_t factor_blocks, count_blocks;
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
    grad = {static_cast<T*>(call.grad_input), call.grad_stride_n, call.grad_stride_c, call.grad_stride_d};
    p.classes = call.classes;
    if (forward && (mode == dense || (call.grad_input && alike())))
      make_room(rows, call.multiprocessors, int(call.capability));
    Workspace space(call.workspace);
    factors = space.take<A>((smooth || every_class) && vectors, call.classes);
    factor_blocks = call.classes <= 4096 ? 1 : at_most(ceil_div(call.classes, 1024), call.multiprocessors);
    factor_sums = space.take<A>(factors, factor_blocks + 1);
    count_blocks = at_most(ceil_div(rows, 256), 8 * call.multiprocessors);
    counts = space.take<A>(forward && call.grad_input && !probabilities && call.reduction == reduction_mean,
                           count_blocks + 1);
    const bool shared = shape.splits > 1, split = shared && !shape.cluster;
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
         sum_of(factor_sums, factor_blocks, 1),
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
    out = {call.loss,
           call.wide != 0,
           static_cast<A*>(call.lse),
           static_cast<A*>(call.denominator),
           static_cast<A*>(call.losses),
           static_cast<int64_t*>(call.argmax),
           space.take<A>(forward, 2 * shape.blocks),
           sum_of(counts, count_blocks, most_counts),
           count_blocks > most_counts ? 1 : count_blocks,
           space.take<A>(forward && shared, 3 * parts),
           space.take<A>(forward && shared && call.argmax, parts),
           space.take<int64_t>(forward && shared && call.argmax, parts),
           space.take<A>(forward && shared && mode == dense, 2 * parts),
           space.take<A>(forward && split && call.grad_input && mode != dense, 2 * rows),
           split    ? Stage::parts
           : shared ? Stage::cluster
                    : Stage::whole};
    in = {call.grad_loss,          call.wide != 0, call.grad_loss_stride_n,
          call.grad_loss_stride_d, out.lse,        out.denominator};
    used = space.used;
  }

  // Where add_up leaves the sum of so many parts, if they are too many to be added up by those who read them.
  static A* sum_of(A* parts, int64_t count, int64_t most) {
    return parts && count > most ? parts + count : parts;
  }

  // Whether rows of the gradient are walked like those of the logits.
  bool alike() const { return (grad.stride_c == 1 || p.classes == 1) == shape.contiguous; }

  // How many classes of a row, or of a block's share of it, can wait in shared memory to be walked again. Two
  // blocks share that of a multiprocessor, unless they are large.
  int64_t hold() const {
    if (shape.splits > 1 && !shape.cluster) return 0;
    const int64_t most =
        shape.threads > 256 ? shared_bytes - 2048 : shared_bytes / 2 - (shape.contiguous ? 2048 : 8192);
    if (most <= 0) return 0;
    if (!shape.contiguous) {
      const int64_t step = strided_in_flight * class_lanes, fit = most / (32 * int64_t(sizeof(T)));
      return fit >= shape.split ? shape.split : fit / step * step;
    }
    if (shape.threads / shape.lanes * held_bytes<T>(shape.split) <= most) return shape.split;
    return shape.threads == shape.lanes ? most / int64_t(sizeof(T)) - 2 * Vector<T>::size : 0;
  }

  // Long rows that are walked again, of which a block cannot hold one, or which are too few for the GPU:
  // clusters of as few blocks as hold a row, and as give every multiprocessor one. What the largest cluster
  // cannot hold of a row is read again; but few rows of that kind are rather split over the whole GPU.
  void make_room(int64_t rows, int64_t multiprocessors, int capability) {
    auto fits = [&] { return hold() == shape.split; };
    const bool is_long =
        shape.contiguous ? shape.lanes > 32 : p.classes > strided_in_flight * int64_t(class_lanes);
    if (!is_long || fits()) return;
    const Plan before = shape;
    if (has_clusters(capability)) {
      const int64_t unit = shape.contiguous ? Vector<T>::size : 1;
      const int64_t blocks = shape.contiguous ? rows : ceil_div(rows, 32);
      shape.cluster = true;
      for (shape.splits = 2;; shape.splits *= 2) {
        shape.split = ceil_div(ceil_div(p.classes, shape.splits), unit) * unit;
        if (shape.splits == most_blocks_of_cluster) break;
        if (fits() && blocks * shape.splits > multiprocessors) break;
      }
    }
    if (!fits() && mode == general && shape.contiguous && sizeof(T) < 8)
      shape.lanes = shape.threads = most_threads;
    if (!fits() && (before.splits > 1 || hold() == 0)) shape = before;
  }

  // The shared memory for that.
  int64_t held() const {
    return shape.contiguous ? shape.threads / shape.lanes * held_bytes<T>(hold())
                            : 32 * hold() * int64_t(sizeof(T));
  }
};

template <class T, class A>
void prepare_factors(const Prepared<T, A>& c, cudaStream_t stream) {
  if (!c.factors) return;
  LAUNCH(combine_factors<A>, dim3(unsigned(c.factor_blocks)), dim3(1024), 0, stream, c.p, c.factors,
         c.factor_sums);
  if (c.factor_blocks > 1 && c.mode != dense)
    LAUNCH(add_up<A>, dim3(1), dim3(1024), 0, stream, c.factor_sums, c.factor_blocks,
           c.factor_sums + c.factor_blocks);
}

// What the rows count in a mean, if the gradient is to be divided by it.
template <class T, class A>
void prepare_counts(const Prepared<T, A>& c, cudaStream_t stream) {
  if (!c.counts || c.p.rows == 0) return;
  auto* count = count_rows<T>;
  LAUNCH(count, dim3(unsigned(c.count_blocks)), dim3(256), 0, stream, c.p, c.x, c.counts);
  if (c.count_blocks > most_counts)
    LAUNCH(add_up<A>, dim3(1), dim3(1024), 0, stream, c.counts, c.count_blocks, c.counts + c.count_blocks);
}

// One launch over all rows.
template <class T, Mode MODE, bool STRIDED, class A>
void launch_rows(const Prepared<T, A>& c, const Results<A>& out, const Logits<T>& grad, cudaStream_t stream) {
  auto* rows = forward_rows<T, MODE, STRIDED, false>;
  const bool again = out.stage <= Stage::cluster && (MODE == dense || grad.data);
  const int64_t hold = MODE != plain && again ? c.hold() : 0, bytes = hold ? c.held() : 0;
  if constexpr (MODE != plain)
    if (hold) {
      rows = forward_rows<T, MODE, STRIDED, true>;
      if (allow(rows, bytes) != cudaSuccess) return;
    }
  const dim3 grid(unsigned(c.shape.blocks), unsigned(c.shape.splits));
  const dim3 block = STRIDED ? dim3(32, class_lanes) : dim3(c.shape.threads);
  const int lanes = STRIDED ? class_lanes : c.shape.lanes;
  if (out.stage == Stage::cluster)
    LAUNCH_CLUSTERS(rows, grid.y, grid, block, size_t(bytes), stream, c.p, c.x, grad, out, lanes,
                    c.shape.split, hold);
  else
    LAUNCH(rows, grid, block, size_t(bytes), stream, c.p, c.x, grad, out, lanes, c.shape.split, hold);
}

template <class T, Mode MODE, class A>
void launch_rows(const Prepared<T, A>& c, const Results<A>& out, const Logits<T>& grad, cudaStream_t stream) {
  c.shape.contiguous ? launch_rows<T, MODE, false>(c, out, grad, stream)
                     : launch_rows<T, MODE, true>(c, out, grad, stream);
}

template <class T, Mode MODE, class A>
int64_t launch_merge(const Prepared<T, A>& c, const Results<A>& out, cudaStream_t stream) {
  auto* merge = merge_splits<T, MODE>;
  const int64_t blocks = at_most(ceil_div(c.p.rows, 4), c.shape.blocks);
  LAUNCH(merge, dim3(unsigned(blocks)), dim3(128), 0, stream, c.p, c.x, out, int(c.shape.splits));
  return blocks;
}

template <class T, Mode MODE, class A>
cudaError_t backward(const Prepared<T, A>& c, cudaStream_t stream) {
  if (c.shape.contiguous && c.alike()) {
    const int64_t vectors = c.shape.splits > 1 ? 1 : in_flight;  // few rows, if they are split
    const int64_t chunk =
        c.shape.lanes > 32 ? int64_t(c.shape.threads) * vectors * Vector<T>::size : c.p.classes;
    const int64_t chunks = ceil_div(c.p.classes, chunk);
    const int64_t blocks =
        c.shape.lanes > 32 ? c.p.rows * chunks : ceil_div(c.p.rows, c.shape.threads / c.shape.lanes);
    auto* rows = backward_rows<T, MODE>;
    LAUNCH(rows, dim3(unsigned(blocks)), dim3(c.shape.threads), 0, stream, c.p, c.x, c.grad, c.in,
           c.shape.lanes, chunk, chunks);
  } else {
    constexpr int64_t step = strided_in_flight * class_lanes;
    const int64_t chunk = ceil_div(ceil_div(c.p.classes, step), 65535) * step;
    auto* strided = backward_strided<T, MODE>;
    LAUNCH(strided, dim3(unsigned(ceil_div(c.p.rows, 32)), unsigned(ceil_div(c.p.classes, chunk))),
           dim3(32, class_lanes), 0, stream, c.p, c.x, c.grad, c.in, chunk);
  }
  return cudaGetLastError();
}

template <class T, Mode MODE, class A>
cudaError_t forward(Prepared<T, A>& c, cudaStream_t stream) {
  const bool split = c.out.stage == Stage::parts, wanted = c.grad.data && c.p.rows > 0;
  const bool in_rows = wanted && !split && c.alike();
  prepare_counts(c, stream);
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
    const int64_t blocks = at_most(wanted, int64_t(multiprocessors) * blocks_per_processor);
    LAUNCH(scale_elements<T>, dim3(unsigned(blocks)), dim3(256), 0, stream, static_cast<T*>(grad),
           static_cast<const Arithmetic<T>*>(factor), n);
    return cudaGetLastError();
  });
}

}  // namespace fastreg::cuda
