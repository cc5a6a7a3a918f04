// Max-norm and its kin in CUDA: all rows of all tensors of a plan in one launch. What is decided per row, and
// the table's layout, stand in max_norm.h.
//
// Bytes     each element read once; rows that change are written once. Rows of more than kThreads *
//           kVectors * 16 bytes do not fit on chip: those that change are read again, from L2 where it holds
//           them.
// Launches  one. A block takes one chunk: rows of one tensor, each dealt to a warp or to the block by its
//           length.
// Accesses  128 bits, whatever a row's length and offset: elements are counted from the 16-byte boundary at
// or
//           before the row's first, and only the first and the last vector go by elements.
// Numerics  norms in fp64, of values scaled where sums could overflow or vanish; sums in a fixed order.
#ifndef CUDAHOST
#include <cuda_pipeline.h>
#endif

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
constexpr int kVectors = 16;  // of 16 bytes, that a thread holds of a row

struct Job {
  const int64_t *table, *chunks;
  const double* caps;
  double p, tau, decay;
  Kind kind;
  unsigned long long* count;
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

// The threads that share a row. Those of a warp, or of the block, walk through the same reductions together.
template <int LANES>
struct Team {
  double* warps;  // shared, one per warp

  __device__ static int lane() { return threadIdx.x % LANES; }

  template <class Combine>
  __device__ double reduce(double value, const Combine& combine) const {
#pragma unroll
    for (int step = (LANES < 32 ? LANES : 32) / 2; step > 0; step /= 2)
      value = combine(value, __shfl_xor_sync(everyone, value, step));
    if constexpr (LANES > 32) {
      __syncthreads();  // what was there is read
      if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
      __syncthreads();
      value = warps[0];
#pragma unroll
      for (int w = 1; w < LANES / 32; ++w) value = combine(value, warps[w]);
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
  __device__ static bool any(bool here) {
    if constexpr (LANES > 32)
      return here;
    else
      return __any_sync(everyone, here);
  }
};

// A thread's share of a row: vectors of 16 bytes, one every LANES. They stay on chip if the row fits there,
// and reach memory by `settle`; else they are read from memory and changed there.
template <class T, int LANES>
class Share {
  static constexpr int size = Vector<T>::size, pitch = LANES * size;

 public:
  // What fits on chip, less the elements that may be missing before the first.
  static constexpr int64_t kFits = int64_t(kVectors) * pitch - size + 1;

  __device__ Share(T* data, const int64_t* tensor, bool live, double decay, Vector<T>* held)
      : data_(data),
        box_(tensor + mn::kBox),
        held_(held + threadIdx.x),
        keep_(1 - decay),
        decays_(decay != 0) {
    const int64_t length = tensor[mn::kLength];
    apart_ = length > 1 && (box_[0] != length || box_[1] != 1);
    length_ = live ? length : 0;
    const int64_t past = reinterpret_cast<uintptr_t>(data) % 16 / sizeof(T);
    start_ = (apart_ ? 0 : -past) + int64_t(Team<LANES>::lane()) * size;
    count_ = start_ < length_ ? (length_ - start_ + pitch - 1) / pitch : 0;
    held_here_ = length <= kFits;
    if (!held_here_) return;
#pragma unroll 1
    for (int64_t i = 0; i < count_; ++i) {
      if (whole(at(i)))
        copy_async(held_ + i * kThreads, data_ + at(i));
      else
        held_[i * kThreads] = read(at(i));
    }
    wait_for_copies();
  }

  // The sum of |x * inverse|^p, or the largest.
  template <Order ORDER>
  __device__ double collect(Team<LANES> team, double p, double inverse) const {
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
  __device__ double gaps(Team<LANES> team, double top, double theta, double* count) const {
    double total = 0, kept = 0;
    each([&](T x) {
      const double gap = fabs(widen(x)) - top;
      if (gap > theta) total += gap, kept += 1;
    });
    *count = team.sum(kept);
    return team.sum(total);
  }

  // x <- to(x) where `which`; returns the sum of |x * inverse|^p of the new ones.
  template <Order ORDER, class To>
  __device__ double change(Team<LANES> team, bool which, double p, double inverse, const To& to) {
    double all = 0;
    if (which) {
#pragma unroll 1
      for (int64_t i = 0; i < count_; ++i) {
        Vector<T> v = get(i);
#pragma unroll
        for (int k = 0; k < size; ++k) {
          v.values[k] = to(v.values[k]);
          if constexpr (ORDER != Order::largest) all += power<ORDER>(widen(v.values[k]) * inverse, p);
        }
        if (held_here_)
          held_[i * kThreads] = v;
        else
          write(at(i), v);
      }
      decays_ = false;  // it is done
    }
    return team.sum(all);
  }

  // Brings to memory what is not there yet.
  __device__ void settle(bool changed) {
    if (held_here_ ? changed || decays_ : decays_)
#pragma unroll 1
      for (int64_t i = 0; i < count_; ++i) write(at(i), get(i));
  }

 private:
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

  __device__ int64_t at(int64_t i) const { return start_ + i * pitch; }
  __device__ Vector<T> get(int64_t i) const {
    Vector<T> v = held_here_ ? held_[i * kThreads] : read(at(i));
    if (decays_) {
#pragma unroll
      for (int k = 0; k < size; ++k) {
        if constexpr (sizeof(T) == 8)
          v.values[k] = v.values[k] * keep_;
        else
          v.values[k] = nearest<T>(static_cast<float>(v.values[k]) * static_cast<float>(keep_));
      }
    }
    return v;
  }
  // Zeros stand before and after the row: they are neutral to all that is collected.
  template <class Each>
  __device__ void each(const Each& body) const {
#pragma unroll 1
    for (int64_t i = 0; i < count_; ++i) {
      const Vector<T> v = get(i);
#pragma unroll
      for (int k = 0; k < size; ++k) body(v.values[k]);
    }
  }
  __device__ bool whole(int64_t j) const { return !apart_ && j >= 0 && j + size <= length_; }
  __device__ int64_t place(int64_t j) const {
    if (!apart_) return j;
    // Such rows have fewer than 2^32 elements: a division of 64 bits would be a call, which spills.
    int64_t offset = 0;
    uint32_t left = static_cast<uint32_t>(j);
#pragma unroll 1
    for (int d = 0; d < mn::kInner; ++d) {
      const uint32_t extent = static_cast<uint32_t>(box_[2 * d]), next = left / extent;
      offset += int64_t(left - next * extent) * box_[2 * d + 1];
      left = next;
    }
    return offset;
  }
  __device__ Vector<T> read(int64_t j) const {
    if (whole(j)) return *reinterpret_cast<const Vector<T>*>(data_ + j);
    Vector<T> v;
#pragma unroll
    for (int k = 0; k < size; ++k) v.values[k] = nearest<T>(0);
#pragma unroll 1
    for (int k = 0; k < size; ++k) {
      if (j + k < 0 || j + k >= length_) continue;
      const T x = data_[place(j + k)];
#pragma unroll
      for (int other = 0; other < size; ++other)  // a register has no index
        if (other == k) v.values[other] = x;
    }
    return v;
  }
  __device__ void write(int64_t j, const Vector<T>& v) const {
    if (whole(j)) return store(data_ + j, v);
#pragma unroll 1
    for (int k = 0; k < size; ++k) {
      if (j + k < 0 || j + k >= length_) continue;
      T x = v.values[0];
#pragma unroll
      for (int other = 1; other < size; ++other)
        if (other == k) x = v.values[other];
      data_[place(j + k)] = x;
    }
  }

  T* data_;
  const int64_t* box_;
  Vector<T>* held_;
  double keep_;
  int64_t length_, start_, count_;
  bool apart_, decays_, held_here_;
};

// Theta of the soft threshold that brings the l1 norm to `radius`, relative to the largest value: Michelot's
// iteration, in which the kept set only shrinks.
template <class S, class G>
__device__ double theta_of(const S& share, G team, bool which, double top, double radius) {
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

// Does to one row what the job says. Returns whether it has changed.
template <class T, Order ORDER, int LANES>
__device__ bool treat(Share<T, LANES>& share, Team<LANES> team, const Job& job, int64_t length, double cap,
                      bool live) {
  constexpr int64_t code = sizeof(T) == 8              ? mn::kDouble
                           : sizeof(T) == 4            ? mn::kFloat
                           : std::is_same_v<T, __half> ? mn::kHalf
                                                       : mn::kBFloat16;
  const double p = job.p;
  const double plain = share.template collect<ORDER>(team, p, 1);
  const bool safe = mn::is_safe(plain, ORDER);
  mn::Norm norm{1, root<ORDER>(plain, p)};
  bool finite = true;
  if (team.any(!safe)) {
    const double top = share.template collect<Order::largest>(team, p, 1);
    const bool scaled = !safe && top > 0 && top < HUGE_VAL && ORDER != Order::largest;
    finite = top < HUGE_VAL;
    const double scale = !scaled ? 1 : ORDER == Order::any ? top : mn::power_of_two(top);
    if (!safe) norm = {1, top};
    if (team.any(scaled)) {
      const double sum = share.template collect<ORDER>(team, p, 1 / scale);
      if (scaled) norm = {scale, root<ORDER>(sum, p)};
    }
  }
  const mn::Margins m = mn::margins(length, p);
  const double bound = cap * (1 - m.below);
  const double target = cap * (1 - m.aim - mn::rounding_margin(length, code));
  // For x / scale; negative if the row stays.
  const double found = job.kind == Kind::l1_ball || job.kind == Kind::linf_ball
                           ? (mn::is_over(norm, cap, m) ? 1 : -1)
                           : mn::factor_of(norm, cap, target, m, job.tau, job.kind);
  const bool over = live && finite && found >= 0, bounded = job.kind != Kind::normalize && job.tau == 1;
  const double inverse = 1 / bound;
  if (team.any(over)) {
    double sum;
    if (ORDER == Order::one && job.kind == Kind::l1_ball) {
      const double top = share.template collect<Order::largest>(team, p, 1);
      const double theta = theta_of(share, team, over, top, target);
      sum = share.template change<ORDER>(team, over, p, inverse, [top, theta](T x) {
        const double left = (fabs(widen(x)) - top) - theta;
        return nearest<T>(copysign(left > 0 ? left : 0, widen(x)));
      });
    } else {
      const double scaling = 1 / norm.scale, factor = found;
      // For p = inf no element may be rounded past the cap, which is all that the l-infinity ball asks for.
      const double limit = bounded ? widen(toward_zero<T>(bound)) : HUGE_VAL;
      sum = share.template change<ORDER>(team, over, p, inverse, [scaling, factor, limit](T x) {
        const T scaled = nearest<T>(widen(x) * scaling * factor);
        if (ORDER == Order::largest && fabs(widen(scaled)) > limit)
          return nearest<T>(copysign(limit, widen(x)));
        return scaled;
      });
    }
    // Above the bound after rounding: what was rounded is scaled once more, at last towards zero.
    if (sizeof(T) < 8 && ORDER != Order::largest && bounded) {
      double ratio = root<ORDER>(sum, p);
      bool high = over && ratio > 1;
      if (team.any(high)) {
        const double lower = 1 / (2 * ratio - 1);
        sum = share.template change<ORDER>(team, high, p, inverse,
                                           [lower](T x) { return nearest<T>(widen(x) * lower); });
        ratio = root<ORDER>(sum, p);
        high = high && ratio > 1;
        if (team.any(high)) {
          const double lowest = (1 - 8 * 0x1p-53) / ratio;
          share.template change<ORDER>(team, high, p, inverse,
                                       [lowest](T x) { return toward_zero<T>(widen(x) * lowest); });
        }
      }
    }
  }
  share.settle(over);
  return over;
}

template <class T, Order ORDER, int LANES>
__device__ int run_rows(const Job& job, const int64_t* tensor, int64_t first, int64_t last, double* warps,
                        void* held) {
  const int64_t stride = tensor[mn::kRowStride], length = tensor[mn::kLength];
  const Team<LANES> team{warps};
  int changed = 0;
  for (int64_t r = first + threadIdx.x / LANES; r - threadIdx.x / LANES < last; r += kThreads / LANES) {
    const bool live = r < last;
    T* data = reinterpret_cast<T*>(tensor[mn::kAddress]) + (live ? r * stride : 0);
    const double cap = live ? mn::usable_cap(job.caps[tensor[mn::kCap] + r * tensor[mn::kCapStep]]) : 0;
    Share<T, LANES> share(data, tensor, live, job.decay, static_cast<Vector<T>*>(held));
    const bool over = treat<T, ORDER>(share, team, job, length, cap, live);
    if (over && Team<LANES>::lane() == 0) ++changed;
  }
  return changed;
}

template <class T, Order ORDER>
__device__ int run_chunk(const Job& job, const int64_t* tensor, int64_t first, double* warps, void* held) {
  const int64_t rows = tensor[mn::kRows], end = first + tensor[mn::kPerChunk], last = end < rows ? end : rows;
  if (tensor[mn::kLength] <= Share<T, 32>::kFits)
    return run_rows<T, ORDER, 32>(job, tensor, first, last, warps, held);
  return run_rows<T, ORDER, kThreads>(job, tensor, first, last, warps, held);
}

template <Order ORDER>
__global__ void __launch_bounds__(kThreads, 4) rows_kernel(Job job) {
  DYN_SMEM(unsigned char, held);
  __shared__ double warps[kThreads / 32];
  const int64_t* tensor = job.table + job.chunks[2 * int64_t(blockIdx.x)] * mn::kColumns;
  const int64_t first = job.chunks[2 * int64_t(blockIdx.x) + 1];
  int changed = 0;
  switch (tensor[mn::kCode]) {
    case mn::kFloat:
      changed = run_chunk<float, ORDER>(job, tensor, first, warps, held);
      break;
    case mn::kHalf:
      changed = run_chunk<__half, ORDER>(job, tensor, first, warps, held);
      break;
    case mn::kBFloat16:
      changed = run_chunk<__nv_bfloat16, ORDER>(job, tensor, first, warps, held);
      break;
    case mn::kDouble:
      changed = run_chunk<double, ORDER>(job, tensor, first, warps, held);
      break;
  }
  changed = __reduce_add_sync(everyone, changed);
  if (threadIdx.x % 32 == 0 && changed) atomicAdd(job.count, static_cast<unsigned long long>(changed));
}
}  // namespace

cudaError_t max_norm_rows(const int64_t* table, const int64_t* chunks, int64_t chunk_count,
                          const double* caps, double p, double tau, double decay, int64_t kind,
                          int64_t* count, cudaStream_t stream) {
  if (chunk_count > 0x7fffffff) return cudaErrorInvalidValue;
  if (chunk_count == 0) return cudaSuccess;
  const Job job{table,
                chunks,
                caps,
                p,
                tau,
                decay,
                static_cast<Kind>(kind),
                reinterpret_cast<unsigned long long*>(count)};
  const dim3 grid(static_cast<unsigned>(chunk_count)), block(kThreads);
  switch (mn::order_of(p)) {
    case Order::one:
      LAUNCH(rows_kernel<Order::one>, grid, block, kVectors * kThreads * 16, stream, job);
      break;
    case Order::two:
      LAUNCH(rows_kernel<Order::two>, grid, block, kVectors * kThreads * 16, stream, job);
      break;
    case Order::largest:
      LAUNCH(rows_kernel<Order::largest>, grid, block, kVectors * kThreads * 16, stream, job);
      break;
    default:
      LAUNCH(rows_kernel<Order::any>, grid, block, kVectors * kThreads * 16, stream, job);
  }
  return cudaGetLastError();
}
}  // namespace fastreg::cuda
