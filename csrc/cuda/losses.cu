// Softmax cross-entropy and its family in CUDA. The formula stands in fastreg/losses.py, a row's maths in
// csrc/losses.h.
//
// Bytes: forward, the logits once; backward, the logits once and the gradient written once. Beside them only
// vectors with one element per row or per class. Ignored rows are not read.
//
// Launches: forward, one if one block can do everything, else the rows and then the sum of the blocks'
// losses. Rows split over blocks add a merge; smoothing with class weights adds one for their sum. Backward,
// one.
//
// Rows of contiguous classes are walked by 1 to 32 lanes, or by a block if they are long; few and long rows
// by several blocks each. Rows of strided classes, such as (N, C, H*W), lie along a warp: one thread each,
// and eight warps that deal out the classes. One pass with a running (maximum, sum) per thread, merged at the
// end.
//
// Accesses: 128 bits, four in flight per thread, between the first and the last multiple of 16 bytes of a
// row.
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
constexpr int class_lanes = 8;  // warps that share the classes of 32 rows, where classes are strided
constexpr int blocks_per_processor = 16;

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
  int target_bytes;
  int64_t target_stride_n, target_stride_d, ignore_index;
  const A *weight, *alpha, *adjustment, *margin;  // one element per class, or null
  const A *factors, *total;                       // weight·alpha and its sum, where smoothing asks for them
  A smoothing, gamma, alpha_scale, scale, z_loss;
  int reduction;
  bool zero_if_empty;

  template <class T>
  __device__ T* row(const Logits<T>& x, int64_t r) const {
    return d == 1 ? x.data + r * x.stride_n : x.data + r / d * x.stride_n + r % d * x.stride_d;
  }
};

// ---- one row --------------------------------------------------------------------------------------------

// What a thread knows of its row before it walks it. PLAIN: z is x, and no smoothing.
template <class A, bool PLAIN>
struct Row {
  int64_t y = 0;
  bool kept = false;
  A margin = 0, z_y = 0;
  A pivot = 0;  // sums of z are taken from here, near z, so that large logits keep their digits

  template <class T>
  __device__ Row(const Problem<A>& p, const Logits<T>& x, int64_t r) {
    if (r >= p.rows) return;
    const int64_t at =
        p.d == 1 ? r * p.target_stride_n : r / p.d * p.target_stride_n + r % p.d * p.target_stride_d;
    y = p.target_bytes == 8   ? static_cast<const int64_t*>(p.target)[at]
        : p.target_bytes == 4 ? static_cast<const int32_t*>(p.target)[at]
                              : static_cast<const uint8_t*>(p.target)[at];
    if (y == p.ignore_index) return;
    kept = true;
    const bool exists = y >= 0 && y < p.classes;
    DEVICE_ASSERT(exists && "cross_entropy: target out of range");
    if (!exists) {  // where assertions are compiled out: NaN, and nothing is read
      y = 0;
      z_y = std::numeric_limits<A>::quiet_NaN();
      return;
    }
    if (!PLAIN && p.margin) margin = p.margin[y];
    z_y = logit(p, static_cast<A>(p.row(x, r)[y * x.stride_c]), y);
    if (z_y - z_y == 0) pivot = z_y;
  }

  __device__ A logit(const Problem<A>& p, A x, int64_t c) const {
    if constexpr (PLAIN) return x;
    if (p.adjustment) x += p.adjustment[c];
    if (c == y) x -= margin;
    return p.scale * x;
  }

  __device__ RowTerms<A> terms(const Problem<A>& p) const {
    A factor = p.alpha_scale;
    if (p.weight) factor *= p.weight[y];
    if (p.alpha) factor *= p.alpha[y];
    const A total = PLAIN ? A(0) : p.factors ? *p.total : p.alpha_scale * A(p.classes);
    return {(1 - p.smoothing) * factor, p.smoothing / A(p.classes), total, p.gamma, p.z_loss, p.scale};
  }
};

template <class A>
__device__ A class_factor(const Problem<A>& p, int64_t c) {
  return p.factors ? p.factors[c] : p.alpha_scale;
}

// factor * term, where a factor of 0 gives 0 even if the term is infinite.
template <class A>
__device__ A share(A factor, A term) {
  return factor == 0 ? A(0) : factor * term;
}

template <class A>
__device__ Partial<A> nothing() {
  return {std::numeric_limits<A>::lowest(), 0, 0};
}

// Takes COUNT vectors of SIZE neighbouring classes, `pitch` apart, into a partial: one maximum for all of
// them.
template <int COUNT, int SIZE, bool PLAIN, class T, class A>
__device__ void take(Partial<A>& part, const T (&x)[COUNT][SIZE], int64_t c, int64_t pitch,
                     const Problem<A>& p, const Row<A, PLAIN>& row) {
  A z[COUNT][SIZE], high = part.high;
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
#pragma unroll
    for (int k = 0; k < SIZE; ++k) {
      z[i][k] = row.logit(p, static_cast<A>(x[i][k]), c + i * pitch + k);
      high = z[i][k] > high ? z[i][k] : high;
    }
  A sum = part.sum * fast_exp(part.high - high);
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
#pragma unroll
    for (int k = 0; k < SIZE; ++k) {
      sum += fast_exp(z[i][k] - high);
      if constexpr (!PLAIN)
        if (p.smoothing != 0) part.linear += share(class_factor(p, c + i * pitch + k), z[i][k] - row.pivot);
    }
  part.high = high;
  part.sum = sum;
}

// A lane's share of the classes [begin, end) of a row of contiguous classes.
template <class T, class A, bool PLAIN>
__device__ Partial<A> walk(const Problem<A>& p, const Row<A, PLAIN>& row, const T* x, int64_t begin,
                           int64_t end, int lane, int lanes) {
  Partial<A> part = nothing<A>();
  deal(
      x, begin, end, lane, lanes,
      [&](int64_t c) {
        const T one[1][1] = {{x[c]}};
        take(part, one, c, 0, p, row);
      },
      [&](int64_t c, int64_t pitch) {
        alignas(16) T some[in_flight][Vector<T>::size];
        load<in_flight>(some, x + c, pitch);
        take(part, some, c, pitch, p, row);
      },
      [&](int64_t c) {
        alignas(16) T some[1][Vector<T>::size];
        load<1>(some, x + c, 0);
        take(part, some, c, 0, p, row);
      });
  return part;
}

// The same where the classes are `stride` apart.
template <class T, class A, bool PLAIN>
__device__ Partial<A> walk_strided(const Problem<A>& p, const Row<A, PLAIN>& row, const T* x, int64_t stride,
                                   int64_t begin, int64_t end, int lane, int lanes) {
  Partial<A> part = nothing<A>();
  int64_t c = begin + lane;
  for (; c + (strided_in_flight - 1) * lanes < end; c += strided_in_flight * lanes) {
    T some[strided_in_flight][1];
#pragma unroll
    for (int i = 0; i < strided_in_flight; ++i) some[i][0] = x[(c + i * lanes) * stride];
    take(part, some, c, lanes, p, row);
  }
  for (; c < end; c += lanes) {
    const T one[1][1] = {{x[c * stride]}};
    take(part, one, c, 0, p, row);
  }
  return part;
}

// ---- merging, always in the same order ------------------------------------------------------------------

template <class A>
__device__ Partial<A> merge(const Partial<A>& a, const Partial<A>& b) {
  return fastreg::merge(a, A(0), b, A(0));  // `linear` is taken from the row's pivot, not from the maxima
}

// Over `lanes` neighbouring lanes of a warp.
template <class A>
__device__ Partial<A> merge_lanes(Partial<A> part, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    const Partial<A> other = {__shfl_xor_sync(everyone, part.high, step),
                              __shfl_xor_sync(everyone, part.sum, step),
                              __shfl_xor_sync(everyone, part.linear, step)};
    part = merge(part, other);
  }
  return part;
}

// Over the block; the result is thread 0's.
template <class A>
__device__ Partial<A> merge_block(Partial<A> part) {
  __shared__ Partial<A> warps[32];
  part = merge_lanes(part, 32);
  __syncthreads();  // the row before this one has been read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = part;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < int(blockDim.x) / 32; ++w) part = merge(part, warps[w]);
  return part;
}

// ---- forward --------------------------------------------------------------------------------------------

template <class A>
struct Results {
  void* loss;
  bool wide;  // the loss is of type A, not T
  A *lse, *denominator;
  A* sums;   // (losses, weights) per block
  A* parts;  // (high, sum, linear) per split and row, or null
};

template <class T, class A>
__device__ void write_loss(const Problem<A>& p, const Results<A>& out, A losses, A weights) {
  A divisor = p.reduction == reduction_mean ? weights : A(1);
  if (p.zero_if_empty && divisor == 0) divisor = 1;
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
  out.sums[blockIdx.x] = losses;
  out.sums[gridDim.x + blockIdx.x] = weights;
}

// One thread finishes a row: its loss is stored, or added to the thread's sums.
template <class T, class A, bool PLAIN>
__device__ void finish_row(const Problem<A>& p, const Row<A, PLAIN>& row, const Results<A>& out, int64_t r,
                           const Partial<A>& part, A& losses, A& weights) {
  const Softmax<A> softmax = {part.high, log(part.sum)};
  A loss = 0;
  if (row.kept) {
    const RowTerms<A> terms = row.terms(p);
    loss = row_loss(terms, softmax, row.z_y, part.linear + terms.total * (row.pivot - part.high));
    weights += p.weight ? p.weight[row.y] : A(1);
    losses += loss;
  }
  out.lse[r] = row.kept ? softmax.high : A(0);
  out.lse[p.rows + r] = row.kept ? softmax.log_sum : A(0);
  if (p.reduction == reduction_none) store<T>(out.loss, out.wide, r, loss);
}

template <class A>
__device__ void leave_part(const Problem<A>& p, const Results<A>& out, int64_t r, const Partial<A>& part) {
  A* at = out.parts + (int64_t(blockIdx.y) * p.rows + r) * 3;
  at[0] = part.high, at[1] = part.sum, at[2] = part.linear;
}

// Rows of contiguous classes, `lanes` threads each: up to 32, or the whole block. blockIdx.y: the split of
// the row.
template <class T, bool PLAIN, class A = Arithmetic<T>>
__global__ void __launch_bounds__(256, sizeof(T) == 8 ? 1 : 2)
    forward_rows(Problem<A> p, Logits<const T> x, Results<A> out, int lanes, int64_t split) {
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = blockDim.x / lanes;
  const int64_t begin = blockIdx.y * split, end = begin + split < p.classes ? begin + split : p.classes;
  A losses = 0, weights = 0;
  for (int64_t first = int64_t(blockIdx.x) * groups; first < p.rows; first += int64_t(gridDim.x) * groups) {
    const int64_t r = first + group;
    const Row<A, PLAIN> row(p, x, r);
    Partial<A> part = nothing<A>();
    if (row.kept) part = walk(p, row, p.row(x, r), begin, end, lane, lanes);
    part = lanes > 32 ? merge_block(part) : merge_lanes(part, lanes);
    if (lane != 0 || r >= p.rows) continue;
    if (out.parts)
      leave_part(p, out, r, part);
    else
      finish_row<T>(p, row, out, r, part, losses, weights);
  }
  if (!out.parts) leave_sums<T>(p, out, losses, weights);
}

// Rows of strided classes: 32 neighbouring rows per block, their classes dealt out to its warps.
template <class T, bool PLAIN, class A = Arithmetic<T>>
__global__ void __launch_bounds__(32 * class_lanes, sizeof(T) == 8 ? 1 : 2)
    forward_strided(Problem<A> p, Logits<const T> x, Results<A> out, int64_t split) {
  __shared__ Partial<A> parts[class_lanes][32];
  const int64_t begin = blockIdx.y * split, end = begin + split < p.classes ? begin + split : p.classes;
  A losses = 0, weights = 0;
  for (int64_t first = int64_t(blockIdx.x) * 32; first < p.rows; first += int64_t(gridDim.x) * 32) {
    const int64_t r = first + threadIdx.x;
    const Row<A, PLAIN> row(p, x, r);
    Partial<A> part = nothing<A>();
    if (row.kept) part = walk_strided(p, row, p.row(x, r), x.stride_c, begin, end, threadIdx.y, class_lanes);
    __syncthreads();  // the rows before these have been read
    parts[threadIdx.y][threadIdx.x] = part;
    __syncthreads();
    if (threadIdx.y != 0 || r >= p.rows) continue;
    for (int w = 1; w < class_lanes; ++w) part = merge(part, parts[w][threadIdx.x]);
    if (out.parts)
      leave_part(p, out, r, part);
    else
      finish_row<T>(p, row, out, r, part, losses, weights);
  }
  if (!out.parts) leave_sums<T>(p, out, losses, weights);
}

// Merges rows that several blocks walked: a warp per row.
template <class T, bool PLAIN, class A = Arithmetic<T>>
__global__ void __launch_bounds__(128)
    merge_splits(Problem<A> p, Logits<const T> x, Results<A> out, int splits) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  A losses = 0, weights = 0;
  for (int64_t first = int64_t(blockIdx.x) * warps; first < p.rows; first += int64_t(gridDim.x) * warps) {
    const int64_t r = first + threadIdx.x / 32;
    const Row<A, PLAIN> row(p, x, r);
    Partial<A> part = nothing<A>();
    if (r < p.rows)
      for (int s = lane; s < splits; s += 32) {
        const A* from = out.parts + (int64_t(s) * p.rows + r) * 3;
        part = merge(part, Partial<A>{from[0], from[1], from[2]});
      }
    part = merge_lanes(part, 32);
    if (lane == 0 && r < p.rows) finish_row<T>(p, row, out, r, part, losses, weights);
  }
  leave_sums<T>(p, out, losses, weights);
}

template <class T, class A = Arithmetic<T>>
__global__ void __launch_bounds__(1024) sum_blocks(Problem<A> p, Results<A> out, int64_t blocks) {
  __shared__ A shared_losses[32], shared_weights[32];
  A losses = 0, weights = 0;
  for (int64_t b = threadIdx.x; b < blocks; b += blockDim.x)
    losses += out.sums[b], weights += out.sums[blocks + b];
  losses = sum_block(losses, shared_losses);
  weights = sum_block(weights, shared_weights);
  if (threadIdx.x == 0) write_loss<T>(p, out, losses, weights);
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

template <class A>
struct Incoming {
  const void* grad_loss;
  bool wide;
  int64_t stride_n, stride_d;  // 0, 0 for a reduced loss
  const A *lse, *denominator;
};

// The gradient of one element of a row.
template <class A, bool PLAIN>
struct Slope {
  Softmax<A> softmax = {0, 0};
  RowGradient<A> gradient = {0, 0, 0};

  template <class T>
  __device__ Slope(const Problem<A>& p, const Row<A, PLAIN>& row, const Incoming<A>& in, int64_t r,
                   const T*) {
    if (!row.kept) return;
    softmax = {in.lse[r], in.lse[p.rows + r]};
    const int64_t at = p.d == 1 ? r * in.stride_n : r / p.d * in.stride_n + r % p.d * in.stride_d;
    const A grad = in.wide ? static_cast<const A*>(in.grad_loss)[at]
                           : static_cast<A>(static_cast<const T*>(in.grad_loss)[at]);
    const A factor = PLAIN || p.smoothing == 0 ? A(0) : class_factor(p, row.y);
    gradient = row_gradient(row.terms(p), softmax, row.z_y, factor, grad / *in.denominator);
  }

  __device__ A operator()(const Problem<A>& p, const Row<A, PLAIN>& row, A x, int64_t c) const {
    if (c == row.y) return gradient.at_target;
    A slope = gradient.slope * fast_exp((row.logit(p, x, c) - softmax.high) - softmax.log_sum);
    if constexpr (!PLAIN)
      if (p.smoothing != 0) slope -= gradient.spread * class_factor(p, c);
    return slope;
  }
};

// Rows of contiguous classes: `lanes` threads per row, or `chunks` blocks per row.
template <class T, bool PLAIN, class A = Arithmetic<T>>
__global__ void __launch_bounds__(256, sizeof(T) == 8 ? 1 : 2)
    backward_rows(Problem<A> p, Logits<const T> x, Logits<T> grad, Incoming<A> in, int lanes, int64_t chunk,
                  int64_t chunks) {
  constexpr int size = Vector<T>::size;
  const int lane = threadIdx.x % lanes;
  const int64_t r =
      lanes > 32 ? blockIdx.x / chunks : (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / lanes;
  if (r >= p.rows) return;
  const int64_t begin = lanes > 32 ? blockIdx.x % chunks * chunk : 0;
  const int64_t end = begin + chunk < p.classes ? begin + chunk : p.classes;
  const Row<A, PLAIN> row(p, x, r);
  const Slope<A, PLAIN> slope(p, row, in, r, x.data);
  const T* from = p.row(x, r);
  T* to = p.row(grad, r);
  auto scalar = [&](int64_t c) {
    to[c] = static_cast<T>(row.kept ? slope(p, row, static_cast<A>(from[c]), c) : A(0));
  };
  if ((reinterpret_cast<uintptr_t>(from) - reinterpret_cast<uintptr_t>(to)) % 16 !=
      0) {  // never both aligned
    for (int64_t c = begin + lane; c < end; c += lanes) scalar(c);
    return;
  }
  auto some = [&]<int COUNT>(std::integral_constant<int, COUNT>, int64_t c, int64_t pitch) {
    alignas(16) T values[COUNT][size] = {};
    if (row.kept) load<COUNT>(values, from + c, pitch);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      Vector<T> out;
#pragma unroll
      for (int k = 0; k < size; ++k)
        out.values[k] =
            static_cast<T>(row.kept ? slope(p, row, static_cast<A>(values[i][k]), c + i * pitch + k) : A(0));
      store(to + c + i * pitch, out);
    }
  };
  deal(
      from, begin, end, lane, lanes, scalar,
      [&](int64_t c, int64_t pitch) { some(std::integral_constant<int, in_flight>(), c, pitch); },
      [&](int64_t c) { some(std::integral_constant<int, 1>(), c, 0); });
}

// Rows of strided classes: 32 rows per block; blockIdx.y is the chunk of the classes.
template <class T, bool PLAIN, class A = Arithmetic<T>>
__global__ void __launch_bounds__(32 * class_lanes, sizeof(T) == 8 ? 1 : 2)
    backward_strided(Problem<A> p, Logits<const T> x, Logits<T> grad, Incoming<A> in, int64_t chunk) {
  const int64_t r = int64_t(blockIdx.x) * 32 + threadIdx.x;
  if (r >= p.rows) return;
  const Row<A, PLAIN> row(p, x, r);
  const Slope<A, PLAIN> slope(p, row, in, r, x.data);
  const T* from = p.row(x, r);
  T* to = p.row(grad, r);
  const int64_t begin = blockIdx.y * chunk, end = begin + chunk < p.classes ? begin + chunk : p.classes;
  for (int64_t c = begin + threadIdx.y; c < end; c += strided_in_flight * class_lanes) {
    T values[strided_in_flight];
#pragma unroll
    for (int i = 0; i < strided_in_flight; ++i)
      values[i] = row.kept && c + i * class_lanes < end ? from[(c + i * class_lanes) * x.stride_c] : T(0.f);
#pragma unroll
    for (int i = 0; i < strided_in_flight; ++i) {
      const int64_t at = c + i * class_lanes;
      if (at < end)
        to[at * grad.stride_c] =
            static_cast<T>(row.kept ? slope(p, row, static_cast<A>(values[i]), at) : A(0));
    }
  }
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
  const int64_t piece = plan.contiguous ? plan.threads * per_lane : class_lanes * strided_in_flight;
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

template <class A>
cudaError_t prepare_factors(Problem<A>& p, A* workspace, cudaStream_t stream) {
  if (p.smoothing == 0 || (!p.weight && !p.alpha)) return cudaSuccess;
  p.factors = workspace + 1;
  p.total = workspace;
  LAUNCH(combine_factors<A>, dim3(1), dim3(1024), 0, stream, p, workspace + 1, workspace);
  return cudaGetLastError();
}

template <class T, bool PLAIN, class A = Arithmetic<T>>
cudaError_t forward(const Plan& plan, const Problem<A>& p, const Logits<const T>& x, Results<A> out,
                    cudaStream_t stream) {
  auto* rows = forward_rows<T, PLAIN>;
  auto* strided = forward_strided<T, PLAIN>;
  auto* merge = merge_splits<T, PLAIN>;
  const dim3 grid(unsigned(plan.blocks), unsigned(plan.splits));
  if (plan.contiguous)
    LAUNCH(rows, grid, dim3(plan.threads), 0, stream, p, x, out, plan.lanes, plan.split);
  else
    LAUNCH(strided, grid, dim3(32, class_lanes), 0, stream, p, x, out, plan.split);
  int64_t blocks = plan.blocks;
  if (plan.splits > 1) {
    blocks = ceil_div(p.rows, 4) < plan.blocks ? ceil_div(p.rows, 4) : plan.blocks;
    LAUNCH(merge, dim3(unsigned(blocks)), dim3(128), 0, stream, p, x, out, int(plan.splits));
  }
  if (p.reduction != reduction_none && blocks > 1)
    LAUNCH(sum_blocks<T>, dim3(1), dim3(1024), 0, stream, p, out, blocks);
  return cudaGetLastError();
}

template <class T, bool PLAIN, class A = Arithmetic<T>>
cudaError_t backward(const Plan& plan, const Problem<A>& p, const Logits<const T>& x, const Logits<T>& grad,
                     const Incoming<A>& in, cudaStream_t stream) {
  auto* rows = backward_rows<T, PLAIN>;
  auto* strided = backward_strided<T, PLAIN>;
  if (plan.contiguous && grad.stride_c == 1) {
    const int64_t chunk = plan.lanes > 32 ? int64_t(plan.threads) * in_flight * Vector<T>::size : p.classes;
    const int64_t chunks = ceil_div(p.classes, chunk);
    const int64_t blocks = plan.lanes > 32 ? p.rows * chunks : ceil_div(p.rows, plan.threads / plan.lanes);
    LAUNCH(rows, dim3(unsigned(blocks)), dim3(plan.threads), 0, stream, p, x, grad, in, plan.lanes, chunk,
           chunks);
  } else {
    constexpr int64_t step = strided_in_flight * class_lanes;
    const int64_t chunk = ceil_div(ceil_div(p.classes, step), 65535) * step;
    LAUNCH(strided, dim3(unsigned(ceil_div(p.rows, 32)), unsigned(ceil_div(p.classes, chunk))),
           dim3(32, class_lanes), 0, stream, p, x, grad, in, chunk);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t cross_entropy_workspace(int dtype, int64_t rows, int64_t classes, int64_t stride_c,
                                    int multiprocessors, int64_t* bytes) {
  const int itemsize = dtype == 3 ? 8 : dtype == 0 ? 4 : 2;
  const Plan shape = plan(rows, classes, stride_c, itemsize, multiprocessors);
  const int64_t parts = shape.splits > 1 ? 3 * shape.splits * rows : 0;
  *bytes = (1 + classes + 2 * shape.blocks + parts) * (dtype == 3 ? 8 : 4);
  return cudaSuccess;
}

cudaError_t cross_entropy_forward(int dtype, const void* input, int64_t n, int64_t classes, int64_t d,
                                  int64_t stride_n, int64_t stride_c, int64_t stride_d, const void* target,
                                  int target_bytes, int64_t target_stride_n, int64_t target_stride_d,
                                  const void* weight, const void* alpha, const void* adjustment,
                                  const void* margin, void* loss, bool wide, void* lse, void* denominator,
                                  void* workspace, int64_t ignore_index, int reduction, double smoothing,
                                  double gamma, double alpha_scale, double scale, double z_loss,
                                  bool zero_if_empty, int multiprocessors, cudaStream_t stream) {
  return with_type(dtype, [&]<class T>() {
    using A = Arithmetic<T>;
    Problem<A> p = {n * d,
                    d,
                    classes,
                    target,
                    target_bytes,
                    target_stride_n,
                    target_stride_d,
                    ignore_index,
                    static_cast<const A*>(weight),
                    static_cast<const A*>(alpha),
                    static_cast<const A*>(adjustment),
                    static_cast<const A*>(margin),
                    nullptr,
                    nullptr,
                    A(smoothing),
                    A(gamma),
                    A(alpha_scale),
                    A(scale),
                    A(z_loss),
                    reduction,
                    zero_if_empty};
    const Logits<const T> x = {static_cast<const T*>(input), stride_n, stride_c, stride_d};
    const Plan shape = plan(p.rows, classes, stride_c, sizeof(T), multiprocessors);
    A* space = static_cast<A*>(workspace);
    A* sums = space + 1 + classes;
    const Results<A> out = {loss,
                            wide,
                            static_cast<A*>(lse),
                            static_cast<A*>(denominator),
                            sums,
                            shape.splits > 1 ? sums + 2 * shape.blocks : nullptr};
    if (const cudaError_t error = prepare_factors(p, space, stream)) return error;
    const bool plain = !adjustment && !margin && scale == 1 && smoothing == 0;
    return plain ? forward<T, true>(shape, p, x, out, stream) : forward<T, false>(shape, p, x, out, stream);
  });
}

cudaError_t cross_entropy_backward(int dtype, const void* grad_loss, bool wide, int64_t grad_loss_stride_n,
                                   int64_t grad_loss_stride_d, const void* input, int64_t n, int64_t classes,
                                   int64_t d, int64_t stride_n, int64_t stride_c, int64_t stride_d,
                                   const void* target, int target_bytes, int64_t target_stride_n,
                                   int64_t target_stride_d, const void* weight, const void* alpha,
                                   const void* adjustment, const void* margin, const void* lse,
                                   const void* denominator, void* grad_input, int64_t grad_stride_n,
                                   int64_t grad_stride_c, int64_t grad_stride_d, void* workspace,
                                   int64_t ignore_index, double smoothing, double gamma, double alpha_scale,
                                   double scale, double z_loss, int multiprocessors, cudaStream_t stream) {
  return with_type(dtype, [&]<class T>() {
    using A = Arithmetic<T>;
    Problem<A> p = {n * d,
                    d,
                    classes,
                    target,
                    target_bytes,
                    target_stride_n,
                    target_stride_d,
                    ignore_index,
                    static_cast<const A*>(weight),
                    static_cast<const A*>(alpha),
                    static_cast<const A*>(adjustment),
                    static_cast<const A*>(margin),
                    nullptr,
                    nullptr,
                    A(smoothing),
                    A(gamma),
                    A(alpha_scale),
                    A(scale),
                    A(z_loss),
                    0,
                    false};
    if (p.rows == 0 || classes == 0) return cudaSuccess;
    const Logits<const T> x = {static_cast<const T*>(input), stride_n, stride_c, stride_d};
    const Logits<T> grad = {static_cast<T*>(grad_input), grad_stride_n, grad_stride_c, grad_stride_d};
    const Incoming<A> in = {grad_loss,
                            wide,
                            grad_loss_stride_n,
                            grad_loss_stride_d,
                            static_cast<const A*>(lse),
                            static_cast<const A*>(denominator)};
    const Plan shape = plan(p.rows, classes, stride_c, sizeof(T), multiprocessors);
    if (const cudaError_t error = prepare_factors(p, static_cast<A*>(workspace), stream)) return error;
    const bool plain = !adjustment && !margin && scale == 1 && smoothing == 0;
    return plain ? backward<T, true>(shape, p, x, grad, in, stream)
                 : backward<T, false>(shape, p, x, grad, in, stream);
  });
}

}  // namespace fastreg::cuda
