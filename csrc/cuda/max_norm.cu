// Max-norm and its kin in CUDA: all rows of all tensors of a plan in one launch, or of a matrix out of place,
// with the gradient. What is decided per row, and the table's layout, stand in max_norm.h.
//
// Bytes     each element read once; rows that change are written once (out of place, every row). A block
//           holds a row in half of the shared memory that it may have, but at least 64 KB (on sm_80 81 KB, on
//           sm_90 and sm_100 113): longer ones that are written are read again, from L2 where it holds them.
//           Backward: x and the gradient once, of rows of half that size.
// Launches  one. A block takes one chunk: rows of one tensor, each dealt to 1, 2, 4 ... 32 lanes of a warp or
//           to the block by its length. Rows of more than kSplit elements are cut into pieces, a block each,
//           of which a few rows too fill the GPU: two launches more, norms of pieces and then what becomes of
//           them, and in dtypes narrower than fp64 a third, which mends rows that rounding has brought above
//           their caps. (The l1 ball cuts none.)
// Accesses  128 bits, whatever a row's length and offset: elements are counted from the 16-byte boundary at
//           or before the row's first, and only the first and the last vector go by elements.
// Numerics  norms in fp64, of values scaled where sums could overflow or vanish; sums in a fixed order.
#ifndef CUDAHOST
#include <cuda_pipeline.h>
#endif

#include <algorithm>
#include <cstring>

#include "cuda/elements.h"
#include "cuda/launch.h"
#include "cuda/max_norm_launch.h"
#include "max_norm.h"

namespace fastreg::cuda {
namespace {
namespace mn = fastreg::max_norm;
using mn::Kind;
using mn::Order;

constexpr int kThreads = 128;
constexpr int kVectors = 16;         // of 16 bytes, that a thread holds of a row in pieces
constexpr int64_t kPerBlock = 8192;  // elements of the rows of a matrix that a block takes, if more than one
// Rows of more elements than kSplit are cut into pieces of at least kPiece elements, at most kPieces of them.
constexpr int64_t kSplit = 32768, kPiece = 8192, kPieces = 1024;

// Rows of one tensor: a row of a plan's table, or a matrix.
struct Rows {
  int64_t data, code, rows, stride, length;
  const int64_t* box;  // null if a row is a run of elements
  int64_t per_chunk, cap, cap_step;
};

enum class Stage { norm, change, mend };

struct Job {
  const int64_t *table = nullptr, *chunks = nullptr;  // of a plan; else
  Rows matrix = {};
  const double* caps = nullptr;
  double p = 2, tau = 1, decay = 0;
  const double* decay_tensor = nullptr;  // if not null, instead of decay
  Kind kind = Kind::cap;
  unsigned long long* count = nullptr;  // of the rows that changed, or null
  int vectors = kVectors;               // that a thread holds
  int64_t out = 0;                      // the matrix to write, instead of the one that is read
  double* norms = nullptr;              // of the rows of a matrix; -1 of rows that stay
  // Of rows in pieces: the plan's first chunk that is one, what is done now, and per piece (scale, sum of
  // |x / scale|^p), first as it was and then, if it changed, of what was written / bound.
  int64_t first_piece = 0;
  Stage stage = Stage::norm;
  double *parts = nullptr, *again = nullptr;
};

template <class T>
__device__ T toward_zero(double exact) {
  using Bits =
      std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  T near = nearest<T>(exact);
  if (!(fabs(widen(near)) > fabs(exact))) return near;
  Bits bits;
  memcpy(&bits, &near, sizeof(T));
  --bits;
  memcpy(&near, &bits, sizeof(T));
  return near;
}

__device__ double magnitude_or_inf(double x) { return fabs(x) < HUGE_VAL ? fabs(x) : HUGE_VAL; }

template <Order ORDER>
__device__ double power(double x, double p) {
  if constexpr (ORDER == Order::two)
    return x * x;
  else if constexpr (ORDER == Order::any)
    return x == 0 ? 0 : pow(fabs(x), p);
  else
    return fabs(x);
}

template <Order ORDER>
__device__ double root(double sum, double p) {
  if constexpr (ORDER == Order::two)
    return sqrt(sum);
  else if constexpr (ORDER == Order::any)
    return mn::root(sum, p);
  else
    return sum;
}

// The 2^log threads that share a row, of a warp or the whole block. Those of a warp, or of the block, walk
// through the same reductions together.
struct Team {
  static constexpr int kBlock = 7;
  static_assert(1 << kBlock == kThreads);
  int log;
  double* warps;  // shared, one per warp

  // Two vectors per thread in a warp, if that is enough of them, up to eight; in a block any number.
  static __host__ __device__ int log_for(int64_t vectors) {
    if (vectors > 32 * 8) return kBlock;
    int log = 0;
    while (log < 5 && 2 << log < vectors) ++log;
    return log;
  }

  __device__ int lane() const { return threadIdx.x & ((1 << log) - 1); }
  __device__ int member() const { return threadIdx.x >> log; }  // which of the teams of the block
  __device__ int teams() const { return kThreads >> log; }

  template <class Combine>
  __device__ double reduce(double value, const Combine& combine) const {
#pragma unroll 1
    for (int step = log < 5 ? (1 << log) / 2 : 16; step > 0; step /= 2)
      value = combine(value, __shfl_xor_sync(everyone, value, step));
    if (log == kBlock) {
      __syncthreads();  // what was there is read
      if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
      __syncthreads();
      value = warps[0];
#pragma unroll
      for (int w = 1; w < kThreads / 32; ++w) value = combine(value, warps[w]);
    }
    return value;
  }
  __device__ double sum(double value) const {
    return reduce(value, [](double a, double b) { return a + b; });
  }
  __device__ double largest(double value) const {
    return reduce(value, [](double a, double b) { return a > b ? a : b; });
  }
  // Whether it is so for any of those who walk together; one answer per row of a block already is.
  __device__ bool any(bool here) const { return log == kBlock ? here : __any_sync(everyone, here); }
};

// A thread's vectors of a row, one in 2^log, counted from the 16-byte boundary at or before the row's first
// element; of another tensor in step with it, `beside` gives the same elements. Zeros stand before and after
// the row: they are neutral to all that is collected.
template <class T>
struct Run {
  static constexpr int size = Vector<T>::size, kLogSize = size == 8 ? 3 : size == 4 ? 2 : 1;
  T* data;             // of element `begin`, if the elements lie side by side, else of element 0
  const int64_t* box;  // null if the elements lie side by side
  int64_t start, length, count, begin;
  int log;
  bool aligned;  // whether the vectors lie on 16-byte boundaries

  // `length` elements of the row at `row`, from element `begin` on.
  __device__ Run(T* row, const int64_t* box, int64_t length, const Team& team, int64_t begin = 0)
      : data(box ? row : row + begin),
        box(box),
        length(length),
        begin(begin),
        log(team.log + kLogSize),
        aligned(box == nullptr) {
    start = (box ? 0 : -past(data)) + int64_t(team.lane()) * size;
    count = start < length ? (length - start + (int64_t(1) << log) - 1) >> log : 0;
  }
  __device__ Run beside(T* row) const {
    Run run = *this;
    run.data = box ? row : row + begin;
    run.aligned = aligned && past(run.data) == past(data);
    return run;
  }
  static __host__ __device__ int64_t past(const T* data) {
    return reinterpret_cast<uintptr_t>(data) % 16 / sizeof(T);
  }
  // Vectors that a row may span, however it lies.
  static __host__ __device__ int64_t vectors(int64_t length) { return (length + 2 * size - 2) >> kLogSize; }

  __device__ int64_t at(int64_t i) const { return start + (i << log); }
  __device__ bool whole(int64_t i) const { return aligned && at(i) >= 0 && at(i) + size <= length; }
  __device__ int64_t place(int64_t j) const {
    if (!box) return j;
    // Such rows have fewer than 2^32 elements: a division of 64 bits would be a call, which spills.
    int64_t offset = 0;
    uint32_t left = static_cast<uint32_t>(j + begin);
#pragma unroll 1
    for (int d = 0; d < mn::kInner; ++d) {
      const uint32_t extent = static_cast<uint32_t>(box[2 * d]), next = left / extent;
      offset += int64_t(left - next * extent) * box[2 * d + 1];
      left = next;
    }
    return offset;
  }
  __device__ Vector<T> read(int64_t i) const {
    if (whole(i)) return *reinterpret_cast<const Vector<T>*>(data + at(i));
    Vector<T> v;
#pragma unroll
    for (int k = 0; k < size; ++k) v.values[k] = nearest<T>(0);
#pragma unroll 1
    for (int k = 0; k < size; ++k) {
      const int64_t j = at(i) + k;
      if (j < 0 || j >= length) continue;
      const T x = data[place(j)];
#pragma unroll
      for (int other = 0; other < size; ++other)  // a register has no index
        if (other == k) v.values[other] = x;
    }
    return v;
  }
  __device__ void write(int64_t i, const Vector<T>& v) const {
    if (whole(i)) return store(data + at(i), v);
#pragma unroll 1
    for (int k = 0; k < size; ++k) {
      const int64_t j = at(i) + k;
      if (j < 0 || j >= length) continue;
      T x = v.values[0];
#pragma unroll
      for (int other = 1; other < size; ++other)
        if (other == k) x = v.values[other];
      data[place(j)] = x;
    }
  }
  // To shared memory, kThreads apart: vectors [first, first + most), as far as there are so many. All loads
  // are under way before `wait_for_copies` waits for them.
  __device__ void stage(Vector<T>* held, int64_t first, int64_t most) const {
    const int64_t past_last = first + most < count ? first + most : count;
#pragma unroll 1
    for (int64_t i = first; i < past_last; ++i, held += kThreads) {
      if (whole(i))
        copy_async(held, data + at(i));
      else
        *held = read(i);
    }
  }
  static __device__ void copy_async(Vector<T>* to, const T* from) {
#ifdef CUDAHOST
    *to = *reinterpret_cast<const Vector<T>*>(from);
#else
    __pipeline_memcpy_async(to, from, 16);
#endif
  }
  static __device__ void wait_for_copies() {
#ifndef CUDAHOST
    __pipeline_commit();
    __pipeline_wait_prior(0);
#endif
  }
};

// What becomes of an element: x * a * b, or for the l1 ball sign(x) * max(|x| - a - b, 0), rounded, and
// clamped to the limit.
template <class T, Order ORDER>
struct Change {
  double a, b, limit;
  bool soft, down;

  __device__ T operator()(T x) const {
    const double v = widen(x), left = (fabs(v) - a) - b;
    const double exact = ORDER == Order::one && soft ? copysign(left > 0 ? left : 0, v) : v * a * b;
    const T out = down ? toward_zero<T>(exact) : nearest<T>(exact);
    if (ORDER == Order::largest && fabs(widen(out)) > limit) return nearest<T>(copysign(limit, v));
    return out;
  }
};

// A thread's share of a row. It stays in shared memory if the row fits there, and reaches memory by `settle`;
// else it passes through shared memory in parts, and is changed where it is written.
template <class T>
class Share {
  static constexpr int size = Vector<T>::size;

 public:
  // `held` has room for `most` vectors.
  __device__ Share(const Run<T>& from, const Run<T>& to, int most, bool fits, double keep, bool decays,
                   Vector<T>* held)
      : from_(from), to_(to), held_(held), keep_(keep), most_(most), fits_(fits), decays_(decays) {
    if (fits) {
      from_.stage(held_, 0, most_);
      Run<T>::wait_for_copies();
    }
  }

  // The sum of |x * inverse|^p, or the largest.
  template <Order ORDER>
  __device__ double collect(const Team& team, double p, double inverse) {
    double all = 0;
    each([&](T x) {
      const double v = widen(x) * inverse;
      if constexpr (ORDER == Order::largest) {
        const double m = magnitude_or_inf(v);
        all = m > all ? m : all;
      } else {
        all += power<ORDER>(v, p);
      }
    });
    return ORDER == Order::largest ? team.largest(all) : team.sum(all);
  }

  // How many |x| - top are above theta, and their sum.
  __device__ double gaps(const Team& team, double top, double theta, double* count) {
    double total = 0, kept = 0;
    each([&](T x) {
      const double gap = fabs(widen(x)) - top;
      if (gap > theta) total += gap, kept += 1;
    });
    *count = team.sum(kept);
    return team.sum(total);
  }

  // x <- to(x) where `which`; returns the sum of |x * inverse|^p of the new ones.
  template <Order ORDER>
  __device__ double change(const Team& team, bool which, double p, double inverse,
                           const Change<T, ORDER>& to) {
    double all = 0;
    if (which) {
      each_vector([&](int64_t i, Vector<T>& v, Vector<T>& held) {
#pragma unroll
        for (int k = 0; k < size; ++k) {
          v.values[k] = to(v.values[k]);
          if constexpr (ORDER != Order::largest) all += power<ORDER>(widen(v.values[k]) * inverse, p);
        }
        if (fits_)
          held = v;
        else
          to_.write(i, v);
      });
      decays_ = false;  // it is done
      if (!fits_) from_ = to_, written_ = true;
    }
    return team.sum(all);
  }

  // Brings to memory what is not there yet.
  __device__ void settle(bool changed) {
    const bool away = to_.data != from_.data;
    if (written_ || !(decays_ || away || changed)) return;
    each_vector([&](int64_t i, Vector<T>& v, Vector<T>&) { to_.write(i, v); });
  }

 private:
  // body(number, the vector, where it is held) for each.
  template <class Body>
  __device__ void each_vector(const Body& body) {
#pragma unroll 1
    for (int64_t first = 0; first < from_.count; first += most_) {
      // What this thread has just written may be on its way still, for loads that go past its registers.
      if (!fits_ && !written_) {
        from_.stage(held_, first, most_);
        Run<T>::wait_for_copies();
      }
#pragma unroll 1
      for (int i = 0; i < most_ && first + i < from_.count; ++i) {
        Vector<T> v = written_ ? from_.read(first + i) : held_[i * kThreads];
        if (decays_) {
#pragma unroll
          for (int k = 0; k < size; ++k) {
            if constexpr (sizeof(T) == 8)
              v.values[k] = v.values[k] * keep_;
            else
              v.values[k] = nearest<T>(static_cast<float>(v.values[k]) * static_cast<float>(keep_));
          }
        }
        body(first + i, v, held_[i * kThreads]);
      }
    }
  }
  template <class Each>
  __device__ void each(const Each& body) {
    each_vector([&](int64_t, const Vector<T>& v, const Vector<T>&) {
#pragma unroll
      for (int k = 0; k < size; ++k) body(v.values[k]);
    });
  }

  Run<T> from_, to_;
  Vector<T>* held_;
  double keep_;
  int most_;
  bool fits_, decays_, written_ = false;
};

// Theta of the soft threshold that brings the l1 norm to `radius`, relative to the largest value: Michelot's
// iteration, in which the kept set only shrinks.
template <class S>
__device__ double theta_of(S& share, const Team& team, bool which, double top, double radius) {
  double theta = -(radius < top ? radius : top), kept = -1;
  bool moving = which;
  while (team.any(moving)) {
    double count;
    const double total = share.gaps(team, top, theta, &count);
    moving = moving && count != kept && count > 0;
    if (moving) theta = (total - radius) / count;
    kept = count;
  }
  return theta;
}

// The sum of |x / scale|^p of a row, or the largest |x|. `plain` is that of |x|, of which NaN and inf tell.
struct Found {
  double scale, sum, plain;
  bool finite;

  template <Order ORDER>
  __device__ mn::Norm norm(double p) const {
    return {scale, root<ORDER>(sum, p)};
  }
};

template <class T, Order ORDER>
__device__ Found measure(Share<T>& share, const Team& team, double p, bool live) {
  Found found{1, 0, 0, true};
  bool scaled = true;
  // Once as the values are, and where that overflows or vanishes once more of values scaled.
#pragma unroll 1
  for (int attempt = 0; attempt < 2; ++attempt) {
    const double sum = share.template collect<ORDER>(team, p, 1 / found.scale);
    if (scaled) found.sum = sum;
    if (attempt == 1) break;
    found.plain = sum;
    const bool safe = !live || mn::is_safe(sum, ORDER);
    if (!team.any(!safe)) break;
    const double top = ORDER == Order::largest ? sum : share.template collect<Order::largest>(team, p, 1);
    found.finite = safe || top < HUGE_VAL;
    scaled = !safe && top > 0 && top < HUGE_VAL && ORDER != Order::largest;
    if (!safe) found.sum = top;
    if (scaled) found.scale = ORDER == Order::any ? top : mn::power_of_two(top);
    if (!team.any(scaled)) break;
  }
  if (ORDER == Order::largest && team.any(!found.finite)) {  // NaN or inf: a sum tells
    const double sum = share.template collect<Order::one>(team, p, 1);
    if (!found.finite) found.plain = sum;
  }
  return found;
}

// What is to become of a row: whether it changes, and how. For the l1 ball how.b is what it aims for.
template <class T, Order ORDER>
struct Verdict {
  bool over, bounded;
  double bound;
  Change<T, ORDER> how;
};

template <class T, Order ORDER>
__device__ Verdict<T, ORDER> judge(const Job& job, mn::Norm norm, int64_t length, double cap) {
  constexpr int64_t code = sizeof(T) == 8              ? mn::kDouble
                           : sizeof(T) == 4            ? mn::kFloat
                           : std::is_same_v<T, __half> ? mn::kHalf
                                                       : mn::kBFloat16;
  const mn::Margins m = mn::margins(length, job.p);
  const double target = cap * (1 - m.aim - mn::rounding_margin(length, code));
  const bool soft = ORDER == Order::one && job.kind == Kind::l1_ball;
  Verdict<T, ORDER> v{true, job.kind != Kind::normalize && job.tau == 1, cap * (1 - m.below), {}};
  if (soft || job.kind == Kind::linf_ball) {
    v.over = mn::is_over(norm, cap, m);
    v.how = {1 / norm.scale, soft ? target : 1, HUGE_VAL, soft, false};
  } else {
    const double factor = mn::factor_of(norm, cap, target, m, job.tau, job.kind);
    v.over = factor >= 0;
    v.how = {1 / norm.scale, factor, HUGE_VAL, false, false};
  }
  // For p = inf no element may be rounded past the cap, which is all that the l-infinity ball asks for.
  if (ORDER == Order::largest && v.bounded) v.how.limit = widen(toward_zero<T>(v.bound));
  return v;
}

// Does to one row what the job says. Returns whether it has changed, and its norm.
template <class T, Order ORDER>
__device__ bool treat(Share<T>& share, const Team& team, const Job& job, int64_t length, double cap,
                      bool live, double* found_norm) {
  const double p = job.p;
  const Found found = measure<T, ORDER>(share, team, p, live);
  const mn::Norm norm = found.norm<ORDER>(p);
  *found_norm = found.finite ? norm.scale * norm.s : found.plain;
  if (job.kind == Kind::norm) return false;
  const Verdict<T, ORDER> verdict = judge<T, ORDER>(job, norm, length, cap);
  const bool over = live && found.finite && verdict.over;
  if (team.any(over)) {
    Change<T, ORDER> how = verdict.how;
    if constexpr (ORDER == Order::one) {
      if (how.soft) {
        how.a = share.template collect<Order::largest>(team, p, 1);
        how.b = theta_of(share, team, over, how.a, how.b);
      }
    }
    bool now = over;
#pragma unroll 1
    for (int attempt = 0; attempt < 3; ++attempt) {
      const double sum = share.template change<ORDER>(team, now, p, 1 / verdict.bound, how);
      if (sizeof(T) == 8 || ORDER == Order::largest || !verdict.bounded) break;
      // Above the bound after rounding: what was rounded is scaled once more, at last towards zero.
      const double ratio = root<ORDER>(sum, p);
      now = now && ratio > 1;
      if (!team.any(now)) break;
      how = {1, attempt == 0 ? 1 / (2 * ratio - 1) : (1 - 8 * 0x1p-53) / ratio, HUGE_VAL, false,
             attempt == 1};
    }
  }
  return over;
}

// ---- rows in pieces

// Of a row, from those of its pieces, in the same order whoever asks.
template <Order ORDER>
__device__ Found merged(const double* parts, int64_t count, const Team& team, double p) {
  double top = 0, sum = 0, odd = 0;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    const double scale = parts[2 * i], part = parts[2 * i + 1];
    if (part > 0 && part < HUGE_VAL && scale > top) top = scale;
  }
  top = team.largest(top);
  if (top == 0) top = 1;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    const double part = parts[2 * i + 1];
    if (!(part < HUGE_VAL))
      odd += part;
    else if (ORDER == Order::largest)
      sum = part > sum ? part : sum;
    else
      sum += part * power<ORDER>(parts[2 * i] / top, p);
  }
  sum = ORDER == Order::largest ? team.largest(sum) : team.sum(sum);
  odd = team.sum(odd);
  return {top, sum, sum + odd, odd == 0};
}

// Which elements of which row a piece is, and which of its row's `count` pieces.
struct Piece {
  int64_t row, which, count, begin, length;

  __device__ Piece(int64_t number, int64_t row_length, int64_t most) {
    count = (row_length + most - 1) / most;
    row = number / count;
    which = number - row * count;
    begin = which * most;
    length = row_length - begin < most ? row_length - begin : most;
  }
};

template <class T, Order ORDER>
__device__ void treat_piece(const Job& job, const Rows& rows, int64_t number, double* warps, void* held) {
  const Team team{Team::kBlock, warps};
  const Piece piece(number, rows.length, rows.per_chunk);
  const int64_t i = blockIdx.x, first = i - piece.which;
  const double keep = 1 - (job.decay_tensor ? *job.decay_tensor : job.decay), p = job.p;
  const bool decays = (job.decay_tensor || job.decay != 0) && job.stage != Stage::mend;
  T* data = reinterpret_cast<T*>(rows.data) + piece.row * rows.stride;
  T* written = job.out ? reinterpret_cast<T*>(job.out) + piece.row * rows.stride : data;
  const Run<T> from(data, rows.box, piece.length, team, piece.begin), to = from.beside(written);
  Share<T> share(job.stage == Stage::mend ? to : from, to, kVectors, false, keep, decays,
                 static_cast<Vector<T>*>(held) + threadIdx.x);
  if (job.stage == Stage::norm) {
    const Found found = measure<T, ORDER>(share, team, p, true);
    if (threadIdx.x == 0) {
      job.parts[2 * i] = found.scale;
      job.parts[2 * i + 1] = found.finite ? found.sum : found.plain;
    }
    return;
  }
  Change<T, ORDER> how{};
  bool over;
  double bound = 1;
  if (job.stage == Stage::mend) {
    const double ratio = root<ORDER>(merged<ORDER>(job.again + 2 * first, piece.count, team, p).plain, p);
    over = ratio > 1;
    how = {1, (1 - 8 * 0x1p-53) / ratio, HUGE_VAL, false, true};
  } else {
    const Found found = merged<ORDER>(job.parts + 2 * first, piece.count, team, p);
    const mn::Norm norm = found.norm<ORDER>(p);
    const bool first_of_row = piece.which == 0 && threadIdx.x == 0;
    if (job.kind == Kind::norm) {
      if (first_of_row) job.norms[piece.row] = found.finite ? norm.scale * norm.s : found.plain;
      return;
    }
    const double cap = mn::usable_cap(job.caps[rows.cap + piece.row * rows.cap_step]);
    const Verdict<T, ORDER> verdict = judge<T, ORDER>(job, norm, rows.length, cap);
    over = verdict.over && found.finite;
    how = verdict.how;
    bound = verdict.bound;
    if (first_of_row && job.norms) job.norms[piece.row] = over ? norm.scale * norm.s : -1;
    if (first_of_row && job.count && over) atomicAdd(job.count, 1ull);
  }
  const double sum = share.template change<ORDER>(team, over, p, 1 / bound, how);
  if (job.stage == Stage::mend) return;
  if (threadIdx.x == 0) job.again[2 * i] = 1, job.again[2 * i + 1] = over ? sum : 0;
  share.settle(over);
}

// ---- rows whole

template <class T, Order ORDER>
__device__ int run_chunk(const Job& job, const Rows& rows, int64_t first, double* warps, void* held) {
  const int64_t end = first + rows.per_chunk, last = end < rows.rows ? end : rows.rows;
  const Team team{Team::log_for(Run<T>::vectors(rows.length)), warps};
  const double keep = 1 - (job.decay_tensor ? *job.decay_tensor : job.decay);
  const bool decays = job.decay_tensor || job.decay != 0;
  int changed = 0;
  for (int64_t base = first; base < last; base += team.teams()) {
    const int64_t r = base + team.member();
    const bool live = r < last;
    T* data = reinterpret_cast<T*>(rows.data) + (live ? r * rows.stride : 0);
    const double cap =
        live && job.kind != Kind::norm ? mn::usable_cap(job.caps[rows.cap + r * rows.cap_step]) : 0;
    const Run<T> from(data, rows.box, live ? rows.length : 0, team);
    const Run<T> to = from.beside(
        job.out ? reinterpret_cast<T*>(job.out) + (data - reinterpret_cast<T*>(rows.data)) : data);
    Share<T> share(from, to, job.vectors, from.count <= job.vectors, keep, decays,
                   static_cast<Vector<T>*>(held) + threadIdx.x);
    double norm;
    const bool over = treat<T, ORDER>(share, team, job, rows.length, cap, live, &norm);
    if (job.kind != Kind::norm) share.settle(over);
    if (live && team.lane() == 0) {
      changed += over;
      if (job.norms) job.norms[r] = over || job.kind == Kind::norm ? norm : -1;
    }
  }
  return changed;
}

__device__ Rows rows_of(const int64_t* row) {
  const int64_t* box = row + mn::kBox;
  const bool apart = row[mn::kLength] > 1 && (box[0] != row[mn::kLength] || box[1] != 1);
  return {row[mn::kAddress],     row[mn::kCode],     row[mn::kRows], row[mn::kRowStride], row[mn::kLength],
          apart ? box : nullptr, row[mn::kPerChunk], row[mn::kCap],  row[mn::kCapStep]};
}

template <Order ORDER>
__global__ void __launch_bounds__(kThreads, ORDER == Order::any ? 3 : 4) rows_kernel(Job job) {
  DYN_SMEM(unsigned char, held);
  __shared__ double warps[kThreads / 32];
  Rows rows = job.matrix;
  int64_t first = int64_t(blockIdx.x) * rows.per_chunk;
  if (job.table) {
    rows = rows_of(job.table + job.chunks[2 * int64_t(blockIdx.x)] * mn::kColumns);
    first = job.chunks[2 * int64_t(blockIdx.x) + 1];
  }
  int changed = 0;
  switch (rows.code) {
    case mn::kFloat:
      changed = run_chunk<float, ORDER>(job, rows, first, warps, held);
      break;
    case mn::kHalf:
      changed = run_chunk<__half, ORDER>(job, rows, first, warps, held);
      break;
    case mn::kBFloat16:
      changed = run_chunk<__nv_bfloat16, ORDER>(job, rows, first, warps, held);
      break;
    case mn::kDouble:
      changed = run_chunk<double, ORDER>(job, rows, first, warps, held);
      break;
  }
  changed = __reduce_add_sync(everyone, changed);
  if (job.count && threadIdx.x % 32 == 0 && changed)
    atomicAdd(job.count, static_cast<unsigned long long>(changed));
}

template <Order ORDER>
__global__ void __launch_bounds__(kThreads, ORDER == Order::any ? 3 : 4) pieces_kernel(Job job) {
  DYN_SMEM(unsigned char, held);
  __shared__ double warps[kThreads / 32];
  Rows rows = job.matrix;
  int64_t number = blockIdx.x;
  if (job.table) {
    const int64_t* chunk = job.chunks + 2 * (job.first_piece + blockIdx.x);
    rows = rows_of(job.table + chunk[0] * mn::kColumns);
    number = chunk[1];
  }
  switch (rows.code) {
    case mn::kFloat:
      return treat_piece<float, ORDER>(job, rows, number, warps, held);
    case mn::kHalf:
      return treat_piece<__half, ORDER>(job, rows, number, warps, held);
    case mn::kBFloat16:
      return treat_piece<__nv_bfloat16, ORDER>(job, rows, number, warps, held);
    case mn::kDouble:
      return treat_piece<double, ORDER>(job, rows, number, warps, held);
  }
}

constexpr int64_t kHeld = int64_t(kThreads) * 16;  // bytes of one vector per thread

template <Order ORDER>
cudaError_t launch(const Job& job, int64_t blocks, bool pieces, cudaStream_t stream) {
  auto* kernel = pieces ? &pieces_kernel<ORDER> : &rows_kernel<ORDER>;
  if (cudaError_t error = allow(kernel, job.vectors * kHeld)) return error;
  LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), job.vectors * kHeld, stream, job);
  return cudaGetLastError();
}

cudaError_t launch(const Job& job, int64_t blocks, bool pieces, cudaStream_t stream) {
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  switch (mn::order_of(job.p)) {
    case Order::one:
      return launch<Order::one>(job, blocks, pieces, stream);
    case Order::two:
      return launch<Order::two>(job, blocks, pieces, stream);
    case Order::largest:
      return launch<Order::largest>(job, blocks, pieces, stream);
    default:
      return launch<Order::any>(job, blocks, pieces, stream);
  }
}

// Vectors that a thread may hold: two blocks at a time fit on a multiprocessor, unless that left no room for
// rows of 64 KB, which take a vector more where they lie off the 16-byte boundaries.
int most_vectors(int shared_bytes) {
  return static_cast<int>(std::max<int64_t>(shared_bytes / 2, (64 << 10) + kHeld) / kHeld);
}

// The stages of `pieces` pieces. `mends`: whether rounding may bring a row above its cap. Workspace: 4
// numbers per piece.
cudaError_t launch_pieces(Job job, int64_t pieces, bool mends, double* workspace, cudaStream_t stream) {
  job.vectors = kVectors;
  job.parts = workspace;
  job.again = workspace + 2 * pieces;
  for (Stage stage : {Stage::norm, Stage::change, Stage::mend}) {
    if (stage == Stage::mend && !mends) break;
    job.stage = stage;
    if (cudaError_t error = launch(job, pieces, true, stream)) return error;
  }
  return cudaSuccess;
}

// Vectors that a thread holds of a row of a matrix, at most `most`: shared memory that is not asked for
// leaves room for other blocks.
int held_vectors(int code, int64_t length, int64_t most) {
  const int64_t size = code == mn::kDouble ? 2 : code == mn::kFloat ? 4 : 8;
  const int64_t vectors = (length + 2 * size - 2) / size, lanes = int64_t(1) << Team::log_for(vectors);
  return static_cast<int>(std::min(most, ceil_div(vectors, lanes)));
}

// Elements of the pieces of a row, or 0 if it stays whole.
int64_t piece_of(int64_t length) {
  int64_t piece = kPiece;
  while (piece * kPieces < length) piece *= 2;
  return length > kSplit ? piece : 0;
}

Rows matrix_of(int code, const void* input, int64_t rows, int64_t length, int64_t cap_step) {
  const int64_t piece = piece_of(length);
  return {reinterpret_cast<int64_t>(input),
          code,
          rows,
          length,
          length,
          nullptr,
          piece ? piece : std::max<int64_t>(1, kPerBlock / length),
          0,
          cap_step};
}

cudaError_t launch_matrix(Job job, bool mends, double* workspace, int shared_bytes, cudaStream_t stream) {
  const Rows& rows = job.matrix;
  const int code = static_cast<int>(rows.code);
  if (const int64_t pieces = max_norm_pieces(rows.rows, rows.length))
    return launch_pieces(job, pieces, mends && code != mn::kDouble, workspace, stream);
  job.vectors = held_vectors(code, rows.length, most_vectors(shared_bytes));
  return launch(job, ceil_div(rows.rows, rows.per_chunk), false, stream);
}

// ---- gradients -------------------------------------------------------------------------------------------

// dx = a * g + b * slope(x) row by row; without caps dx = grads[r] * slope(x). For p = inf the largest
// elements share what there is.
struct Gradient {
  Rows x;
  int64_t g, out;
  const double *caps, *norms, *grads;
  double* slopes;
  double p, tau;
  double*
      parts;  // per piece of a row, if there are any: sum of g * x / norm, and how many elements are largest
  bool sums = false;           // whether those are to be found now
  int vectors = kVectors / 2;  // of x and of g that a thread holds
};

__device__ double slope_of(double x, double p, double norm, double inverse, Order order) {
  if (order == Order::two) return x * inverse;
  if (order == Order::one) return x > 0 ? 1 : x < 0 ? -1 : x * 0;
  if (order == Order::largest) return fabs(x) == norm ? copysign(1.0, x) : 0;
  return x == 0 ? 0 : copysign(pow(fabs(x) * inverse, p - 1), x);
}

template <class T>
__device__ void differentiate(const Gradient& job, bool cut, double* warps, void* memory) {
  const Rows& rows = job.x;
  int64_t first = int64_t(blockIdx.x) * rows.per_chunk, last = first + rows.per_chunk;
  Piece piece(blockIdx.x, rows.length, cut ? rows.per_chunk : rows.length);
  if (cut) first = piece.row, last = first + 1;
  if (last > rows.rows) last = rows.rows;
  const Team team{cut ? Team::kBlock : Team::log_for(Run<T>::vectors(piece.length)), warps};
  const bool with_g = job.g != 0;
  Vector<T>*held_x = static_cast<Vector<T>*>(memory) + threadIdx.x, *held_g = held_x + job.vectors * kThreads;
  for (int64_t base = first; base < last; base += team.teams()) {
    const int64_t r = base + team.member(), offset = r < last ? r * rows.length : 0;
    const bool live = r < last;
    const Run<T> x(reinterpret_cast<T*>(rows.data) + offset, nullptr, live ? piece.length : 0, team,
                   piece.begin);
    const Run<T> g = x.beside(reinterpret_cast<T*>(with_g ? job.g : rows.data) + offset);
    const Run<T> out = x.beside(reinterpret_cast<T*>(job.out) + offset);
    const double norm = live ? job.norms[r] : -1;
    const bool fits = x.count <= job.vectors;
    const bool moves = live && (!with_g || norm >= 0);  // else the gradient passes, and x is not read
    const double inverse = norm == 0 && !with_g ? 1 : 1 / norm;
    Order order = mn::order_of(job.p);
    const bool counts = order == Order::largest;
    double a = 0, b = 0;

    // body(number, vector of x, vector of g), read anew where they do not fit.
    const auto each = [&](bool stage, bool with_x, const auto& body) {
#pragma unroll 1
      for (int64_t start = 0; start < x.count; start += job.vectors) {
        if (stage || !fits) {
          if (with_x) x.stage(held_x, start, job.vectors);
          if (with_g) g.stage(held_g, start, job.vectors);
          Run<T>::wait_for_copies();
        }
#pragma unroll 1
        for (int i = 0; i < job.vectors && start + i < x.count; ++i)
          body(start + i, held_x[i * kThreads], held_g[i * kThreads]);
      }
    };
    double along = 0, largest = 0;
    if (cut && !job.sums) {
#pragma unroll 1
      for (int64_t i = threadIdx.x; i < piece.count; i += kThreads) {
        const double* part = job.parts + 2 * (blockIdx.x - piece.which + i);
        along += part[0], largest += part[1];
      }
    } else if (moves && (with_g || counts)) {
      each(true, true, [&](int64_t i, const Vector<T>& vx, const Vector<T>& vg) {
#pragma unroll
        for (int k = 0; k < Run<T>::size; ++k) {
          const double v = widen(vx.values[k]);
          if (with_g) along += widen(vg.values[k]) * (v * inverse);
          const int64_t j = x.at(i) + k;  // zeros before and after the row are none of its elements
          if (counts && j >= 0 && j < x.length) largest += fabs(v) == norm;
        }
      });
    }
    if (with_g) along = team.sum(along);
    if (counts) largest = team.sum(largest);
    if (cut && job.sums) {
      if (threadIdx.x == 0)
        job.parts[2 * int64_t(blockIdx.x)] = along, job.parts[2 * int64_t(blockIdx.x) + 1] = largest;
      return;
    }
    if (with_g) {
      if (moves) {
        a = mn::usable_cap(job.caps[rows.cap_step * r]) * mn::power_below(norm, job.tau) * inverse;
        b = -a * job.tau * along;
      }
      if (live && piece.which == 0 && team.lane() == 0)
        job.slopes[r] = moves ? along * mn::power_below(norm, job.tau) : 0;
    } else if (live) {
      b = norm == 0 ? 0 : job.grads[r];
      if (norm == 0) order = Order::one;
    }
    if (counts) b /= norm == 0 ? 1 : largest;
    const bool held = fits && moves && (with_g || counts);
    each(!held || cut, moves, [&](int64_t i, const Vector<T>& vx, const Vector<T>& vg) {
      Vector<T> v = vg;
      if (moves) {
#pragma unroll
        for (int k = 0; k < Run<T>::size; ++k) {
          const double slope = slope_of(widen(vx.values[k]), job.p, norm, inverse, order) * b;
          v.values[k] = nearest<T>(with_g ? widen(vg.values[k]) * a + slope : slope);
        }
      }
      out.write(i, v);
    });
  }
}

__global__ void __launch_bounds__(kThreads, 4) gradient_kernel(Gradient job, bool cut) {
  DYN_SMEM(unsigned char, held);
  __shared__ double warps[kThreads / 32];
  switch (job.x.code) {
    case mn::kFloat:
      return differentiate<float>(job, cut, warps, held);
    case mn::kHalf:
      return differentiate<__half>(job, cut, warps, held);
    case mn::kBFloat16:
      return differentiate<__nv_bfloat16>(job, cut, warps, held);
    case mn::kDouble:
      return differentiate<double>(job, cut, warps, held);
  }
}

cudaError_t launch(Gradient job, int shared_bytes, cudaStream_t stream) {
  const Rows& rows = job.x;
  const int64_t pieces = max_norm_pieces(rows.rows, rows.length);
  const int64_t blocks = pieces ? pieces : ceil_div(rows.rows, rows.per_chunk);
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  if (!pieces)
    job.vectors = held_vectors(static_cast<int>(rows.code), rows.length, most_vectors(shared_bytes) / 2);
  const int64_t held = 2 * job.vectors * kHeld;
  if (cudaError_t error = allow(gradient_kernel, held)) return error;
  const dim3 grid(static_cast<unsigned>(blocks));
  if (pieces && (job.g || mn::order_of(job.p) == Order::largest)) {
    job.sums = true;
    LAUNCH(gradient_kernel, grid, dim3(kThreads), held, stream, job, true);
    job.sums = false;
  }
  LAUNCH(gradient_kernel, grid, dim3(kThreads), held, stream, job, pieces > 0);
  return cudaGetLastError();
}
}  // namespace

int64_t max_norm_pieces(int64_t rows, int64_t length) {
  const int64_t piece = piece_of(length);
  return piece ? rows * ceil_div(length, piece) : 0;
}

cudaError_t max_norm_rows(const int64_t* table, const int64_t* chunks, int64_t chunk_count, int64_t pieces,
                          int64_t vectors, bool mends, const double* caps, double p, double tau, double decay,
                          const double* decay_tensor, int64_t kind, double* workspace, int64_t* count,
                          int shared_bytes, cudaStream_t stream) {
  Job job{.table = table,
          .chunks = chunks,
          .caps = caps,
          .p = p,
          .tau = tau,
          .decay = decay,
          .decay_tensor = decay_tensor,
          .kind = static_cast<Kind>(kind),
          .count = reinterpret_cast<unsigned long long*>(count),
          .vectors = std::clamp<int>(vectors, kVectors, most_vectors(shared_bytes))};
  job.first_piece = chunk_count - pieces;
  cudaError_t error = launch(job, job.first_piece, false, stream);
  if (error == cudaSuccess && pieces) error = launch_pieces(job, pieces, mends, workspace, stream);
  return error;
}

cudaError_t max_norm_forward(int code, const void* input, void* output, const double* caps, int64_t cap_step,
                             double* norms, int64_t rows, int64_t length, double p, double tau,
                             double* workspace, int shared_bytes, cudaStream_t stream) {
  const Job job{.matrix = matrix_of(code, input, rows, length, cap_step),
                .caps = caps,
                .p = p,
                .tau = tau,
                .kind = Kind::cap,
                .out = reinterpret_cast<int64_t>(output),
                .norms = norms};
  return launch_matrix(job, tau == 1, workspace, shared_bytes, stream);
}

cudaError_t row_norms(int code, const void* input, double* norms, int64_t rows, int64_t length, double p,
                      double* workspace, int shared_bytes, cudaStream_t stream) {
  const Job job{.matrix = matrix_of(code, input, rows, length, 0),
                .p = p,
                .tau = 1,
                .kind = Kind::norm,
                .norms = norms};
  return launch_matrix(job, false, workspace, shared_bytes, stream);
}

cudaError_t max_norm_backward(int code, const void* grad_output, const void* input, void* grad_input,
                              const double* caps, int64_t cap_step, const double* norms, double* slopes,
                              int64_t rows, int64_t length, double p, double tau, double* workspace,
                              int shared_bytes, cudaStream_t stream) {
  return launch(
      Gradient{matrix_of(code, input, rows, length, cap_step), reinterpret_cast<int64_t>(grad_output),
               reinterpret_cast<int64_t>(grad_input), caps, norms, nullptr, slopes, p, tau, workspace},
      shared_bytes, stream);
}

cudaError_t row_norms_backward(int code, const double* grad, const void* input, void* grad_input,
                               const double* norms, int64_t rows, int64_t length, double p, double* workspace,
                               int shared_bytes, cudaStream_t stream) {
  return launch(Gradient{matrix_of(code, input, rows, length, 0), 0, reinterpret_cast<int64_t>(grad_input),
                         nullptr, norms, grad, nullptr, p, 1, workspace},
                shared_bytes, stream);
}
}  // namespace fastreg::cuda
