// GroupNorm on the CPU. The formulas are in group_norm.h.
//
// A sample is read as rows: its C channels of S positions (contiguous), or its S positions of C channels
// (channels_last). A unit is what can be normalised alone: a group where rows are channels, a sample where
// they are positions. Units are cut into parts of a fixed size, each part's statistics or sums go to a slot
// of its own, and the slots are merged in order, in double: no result depends on the number of threads. With
// at least as many units as threads, a thread takes a unit through all steps while it is in its cache; with
// fewer, the threads share the parts.
#ifndef FASTREG_ISA
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#if defined(__x86_64__)
#include <immintrin.h>
#if !defined(__clang__)
// GCC 12 takes the undefined source that its own unmasked AVX-512 intrinsics name for a variable (bug
// 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/capability.h"
#include "cpu/tensors.h"
#include "group_norm_layout.h"

namespace fastreg {
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPart = 32768;      // elements of a part, where a unit has as many
constexpr int64_t kScratch = 131072;  // elements of a unit whose dz a thread keeps to itself, in its cache
constexpr int64_t kStream = int64_t{4} << 20;  // bytes of a result that bypasses the caches

template <class A>
struct GroupNorm {
  int64_t samples, channels, groups, positions;
  bool last;  // rows are positions
  int activation;
  double eps;
  ScalarType dtype;
  Rows input, residual, output;                 // forward
  Rows grad_output, grad_input, grad_residual;  // backward
  const A *weight = nullptr, *bias = nullptr;   // [channels], filled with 1 and 0 where there are none
  A *mean, *rstd;                               // [samples, groups]

  // The cut into parts. Rows are channels: `rows_per_part` of them, or one of `pieces` of a channel.
  int64_t rows_per_part, pieces, row_parts;
  // Statistics: per group and part, or per sample, part and channel. Sums: per sample, channel and piece, or
  // per sample, part and channel; twice, for dz and dz·x̂.
  std::unique_ptr<double[]> slots;
  std::unique_ptr<double[]> sums;  // the same merged, [2, samples, channels]
  std::unique_ptr<A[]> terms;      // m1 and m2 times rstd, [2, samples, groups]
  // Whether what is written is too large to stay in the caches until someone reads it: then it bypasses them.
  bool stream = false;
  Rows dz;  // the gradient before the activation: written with the sums where there is one, read for dx

  GroupNorm(int64_t samples, int64_t channels, int64_t groups, int64_t positions, bool last)
      : samples(samples), channels(channels), groups(groups), positions(positions), last(last) {
    if (last) {
      rows_per_part = std::max<int64_t>(256, kPart / std::max<int64_t>(channels, 1));
      pieces = 1;
      row_parts = (positions + rows_per_part - 1) / rows_per_part;
    } else {
      pieces = std::max<int64_t>(1, (positions + kPart - 1) / kPart);
      rows_per_part = pieces > 1 ? 1 : std::max<int64_t>(1, kPart / std::max<int64_t>(positions, 1));
      row_parts = (per_group() + rows_per_part - 1) / rows_per_part;
    }
  }

  int64_t per_group() const { return channels / groups; }
  int64_t units() const { return last ? samples : samples * groups; }
  int64_t parts() const { return row_parts * pieces; }  // of a unit
  double group_size() const { return static_cast<double>(per_group()) * static_cast<double>(positions); }

  double* moments_slot(int64_t unit, int64_t part) const {
    return slots.get() + (unit * parts() + part) * 2 * (last ? channels : 1);
  }
  double* sums_slot(int64_t unit, int64_t part) const {  // for channels_last: 2 rows of `channels`
    return slots.get() + (unit * parts() + part) * 2 * channels;
  }
  double* sums_slot(int64_t n, int64_t c, int64_t piece) const {  // for contiguous: 2 numbers
    return slots.get() + ((n * channels + c) * pieces + piece) * 2;
  }
  double* sum_dz(int64_t n) const { return sums.get() + n * channels; }
  double* sum_dz_x(int64_t n) const { return sums.get() + (samples + n) * channels; }

  void allocate_moments() {
    slots = std::make_unique_for_overwrite<double[]>(units() * parts() * 2 * (last ? channels : 1));
  }
  void allocate_sums() {
    slots = std::make_unique_for_overwrite<double[]>(samples * channels * 2 * (last ? parts() : pieces));
    sums = std::make_unique_for_overwrite<double[]>(2 * samples * channels);
    terms = std::make_unique_for_overwrite<A[]>(2 * samples * groups);
  }
};

// The part of a unit that a task works on, where rows are channels.
struct Piece {
  int64_t n, g, first, rows, piece, begin, end;  // rows [first, first + rows), positions [begin, end) of each
};

template <class A>
Piece piece_of(const GroupNorm<A>& call, int64_t unit, int64_t part) {
  const int64_t n = unit / call.groups, g = unit % call.groups;
  const int64_t row = part / call.pieces * call.rows_per_part, piece = part % call.pieces;
  const int64_t begin = piece * kPart;
  return {n,
          g,
          g * call.per_group() + row,
          std::min(call.rows_per_part, call.per_group() - row),
          piece,
          begin,
          call.pieces > 1 ? std::min(begin + kPart, call.positions) : call.positions};
}
}  // namespace fastreg

#define FASTREG_FILE "cpu/group_norm.cpp"
#include "cpu/foreach_isa.h"

namespace fastreg {
namespace {
template <class A>
void run_forward(GroupNorm<A>& call) {
  call.allocate_moments();
  const auto moments = FASTREG_PICK(moments<A>);
  const auto finish = FASTREG_PICK(finish_moments<A>);
  const auto apply = FASTREG_PICK(apply<A>);
  const int64_t units = call.units(), parts = call.parts();
  if (units >= torch::stable::get_num_threads()) {
    torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        moments(call, unit, 0, parts);
        finish(call, unit);
        apply(call, unit, 0, parts);
      }
    });
    return;
  }
  for (int64_t unit = 0; unit < units; ++unit) {
    torch::stable::parallel_for(0, parts, 1, [&](int64_t b, int64_t e) { moments(call, unit, b, e); });
    finish(call, unit);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t b, int64_t e) { apply(call, unit, b, e); });
  }
}

template <class A>
void run_backward(GroupNorm<A>& call) {
  call.allocate_sums();
  const auto sums = FASTREG_PICK(sums<A>);
  const auto finish = FASTREG_PICK(finish_sums<A>);
  const auto apply = FASTREG_PICK(apply_backward<A>);
  const int64_t units = call.units(), parts = call.parts();
  if (units >= torch::stable::get_num_threads()) {
    const int64_t unit_size = call.per_group() * call.positions;
    const bool keep = !call.last && call.activation && call.grad_input.data && !call.grad_residual.data &&
                      unit_size <= kScratch;
    torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
      const auto scratch = keep ? std::make_unique_for_overwrite<A[]>(unit_size) : nullptr;
      for (int64_t unit = begin; unit < end; ++unit) {
        sums(call, unit, 0, parts, scratch.get());
        finish(call, unit);
        if (call.grad_input.data) apply(call, unit, 0, parts, scratch.get());
      }
    });
    return;
  }
  for (int64_t unit = 0; unit < units; ++unit) {
    torch::stable::parallel_for(0, parts, 1, [&](int64_t b, int64_t e) { sums(call, unit, b, e, nullptr); });
    finish(call, unit);
    if (call.grad_input.data)
      torch::stable::parallel_for(0, parts, 1,
                                  [&](int64_t b, int64_t e) { apply(call, unit, b, e, nullptr); });
  }
}

// ---- tensors ---------------------------------------------------------------------------------------------
template <class A>
A value_at(const void* data, ScalarType dtype, int64_t i) {
  switch (dtype) {
    case ScalarType::Half:
      return static_cast<A>(static_cast<float>(static_cast<const Half*>(data)[i]));
    case ScalarType::BFloat16:
      return static_cast<A>(static_cast<float>(static_cast<const BFloat16*>(data)[i]));
    case ScalarType::Double:
      return static_cast<A>(static_cast<const double*>(data)[i]);
    default:
      return static_cast<A>(static_cast<const float*>(data)[i]);
  }
}

// A parameter in the type of the arithmetic; `fill` where there is none.
template <class A>
const A* parameter(const std::optional<Tensor>& tensor, int64_t channels, A fill, std::vector<A>& copy) {
  const ScalarType own = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  if (!tensor) {
    copy.assign(channels, fill);
    return copy.data();
  }
  const int64_t stride = channels > 1 ? tensor->stride(0) : 1;
  if (stride == 1 && tensor->scalar_type() == own) return static_cast<const A*>(tensor->const_data_ptr());
  copy.resize(channels);
  for (int64_t c = 0; c < channels; ++c)
    copy[c] = value_at<A>(tensor->const_data_ptr(), tensor->scalar_type(), c * stride);
  return copy.data();
}

Tensor parameter_gradient(const Tensor& like, const double* sums, int64_t samples, int64_t channels) {
  std::vector<double> total(channels, 0.0);
  for (int64_t n = 0; n < samples; ++n)
    for (int64_t c = 0; c < channels; ++c) total[c] += sums[n * channels + c];
  Tensor out = new_tensor({channels}, like.scalar_type());
  void* data = out.data_ptr();
  for (int64_t c = 0; c < channels; ++c) switch (like.scalar_type()) {
      case ScalarType::Half:
        static_cast<Half*>(data)[c] = static_cast<float>(total[c]);
        break;
      case ScalarType::BFloat16:
        static_cast<BFloat16*>(data)[c] = static_cast<float>(total[c]);
        break;
      case ScalarType::Double:
        static_cast<double*>(data)[c] = total[c];
        break;
      default:
        static_cast<float*>(data)[c] = static_cast<float>(total[c]);
    }
  return out;
}

// ---- the operators
// -------------------------------------------------------------------------------------------
template <class A>
std::tuple<Tensor, Tensor> forward(const Tensor& input, int64_t groups, const std::optional<Tensor>& weight,
                                   const std::optional<Tensor>& bias, double eps, int64_t activation,
                                   const std::optional<Tensor>& residual, bool save) {
  const ScalarType own = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  const Layout layout = layout_of(input);
  if (!readable(input, layout)) {
    auto [output, stats] =
        forward<A>(readable_copy(input), groups, weight, bias, eps, activation, residual, save);
    return {with_layout_of(input, output), stats};
  }
  const int64_t samples = input.size(0), channels = input.size(1), positions = layout.positions;
  const bool last = rows_are_positions(input, layout);
  GroupNorm<A> call(samples, channels, groups, positions, last);
  Tensor kept_input, kept_residual;
  std::vector<A> weight_copy, bias_copy, own_stats;
  call.input = rows_of(input, last, positions, kept_input, new_strided);
  Tensor output = empty_rows_like(input, last, positions, call.output, new_strided);
  Tensor stats = save ? new_tensor({2, samples, groups}, own) : new_tensor({0}, own);
  if (save) {
    call.mean = static_cast<A*>(stats.data_ptr());
  } else {
    own_stats.resize(2 * samples * groups);
    call.mean = own_stats.data();
  }
  call.rstd = call.mean + samples * groups;
  if (input.numel() == 0) {
    std::fill(call.mean, call.mean + 2 * samples * groups, A(NAN));
    return {output, stats};
  }
  if (residual) call.residual = rows_of(*residual, last, positions, kept_residual, new_strided);
  call.weight = parameter<A>(weight, channels, 1, weight_copy);
  call.bias = parameter<A>(bias, channels, 0, bias_copy);
  call.activation = static_cast<int>(activation);
  call.eps = eps;
  call.dtype = input.scalar_type();
  call.stream = input.numel() * input.element_size() >= kStream;
  run_forward(call);
  return {output, stats};
}

std::tuple<Tensor, Tensor> group_norm_forward(const Tensor& input, int64_t groups,
                                              std::optional<Tensor> weight, std::optional<Tensor> bias,
                                              double eps, int64_t activation, std::optional<Tensor> residual,
                                              bool save) {
  const auto run = input.scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
  return run(input, groups, weight, bias, eps, activation, residual, save);
}

template <class A>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input,
                                                    int64_t groups, const std::optional<Tensor>& weight,
                                                    const std::optional<Tensor>& bias, int64_t activation,
                                                    const std::optional<Tensor>& residual,
                                                    const Tensor& stats, int64_t wanted) {
  const Layout layout = layout_of(input);
  if (!readable(input, layout)) {
    auto [dx, dw, db, dr] = backward<A>(grad_output, readable_copy(input), groups, weight, bias, activation,
                                        residual, stats, wanted);
    return {wanted & 1 ? with_layout_of(input, dx) : dx, dw, db, wanted & 8 ? with_layout_of(input, dr) : dr};
  }
  const int64_t samples = input.size(0), channels = input.size(1), positions = layout.positions;
  const bool last = rows_are_positions(input, layout);
  GroupNorm<A> call(samples, channels, groups, positions, last);
  Tensor kept_input, kept_residual, kept_grad;
  std::vector<A> weight_copy, bias_copy;
  call.input = rows_of(input, last, positions, kept_input, new_strided);
  call.grad_output = rows_of(grad_output, last, positions, kept_grad, new_strided);
  if (residual) call.residual = rows_of(*residual, last, positions, kept_residual, new_strided);
  const ScalarType dtype = input.scalar_type();
  const auto nothing = [&] { return new_tensor({0}, dtype); };  // outputs may not share one
  Tensor grad_input =
      wanted & 1 ? empty_rows_like(input, last, positions, call.grad_input, new_strided) : nothing();
  Tensor grad_residual =
      wanted & 8 ? empty_rows_like(input, last, positions, call.grad_residual, new_strided) : nothing();
  call.mean = static_cast<A*>(stats.data_ptr());
  call.rstd = call.mean + samples * groups;
  call.weight = parameter<A>(weight, channels, 1, weight_copy);
  call.bias = parameter<A>(bias, channels, 0, bias_copy);
  call.activation = static_cast<int>(activation);
  call.dtype = dtype;
  call.stream = input.numel() * input.element_size() >= kStream;
  // In 16 bits dz is rounded before dx is made of it, as it is where the activation is an operator of its
  // own.
  call.dz = activation == 0 ? call.grad_output : wanted & 8 ? call.grad_residual : call.grad_input;
  if (input.numel()) {
    run_backward(call);
  } else {
    call.allocate_sums();
    std::fill(call.sums.get(), call.sums.get() + 2 * samples * channels, 0.0);
  }
  return {
      grad_input, wanted & 2 ? parameter_gradient(*weight, call.sum_dz_x(0), samples, channels) : nothing(),
      wanted & 4 ? parameter_gradient(*bias, call.sum_dz(0), samples, channels) : nothing(), grad_residual};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_backward(const Tensor& grad_output, const Tensor& input,
                                                               int64_t groups, std::optional<Tensor> weight,
                                                               std::optional<Tensor> bias, int64_t activation,
                                                               std::optional<Tensor> residual,
                                                               const Tensor& stats, int64_t wanted) {
  const auto run = input.scalar_type() == ScalarType::Double ? backward<double> : backward<float>;
  return run(grad_output, input, groups, weight, bias, activation, residual, stats, wanted);
}
}  // namespace
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg, CPU, m) {
  m.impl("group_norm_forward.cpu", TORCH_BOX(&fastreg::group_norm_forward));
  m.impl("group_norm_backward.cpu", TORCH_BOX(&fastreg::group_norm_backward));
}
#else
#include "cpu/simd.h"
#include "group_norm.h"

namespace fastreg::FASTREG_ISA {

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// 2^r for r in [0, 1] and in [-1/2, 1/2]: near-minimax, of relative error 3.5e-6 (brief) and 2.5e-9.
template <bool brief>
struct Exp2;
template <>
struct Exp2<true> {
  static constexpr int degree = 4;
  static constexpr float above[] = {1.000003493f, 0.6929729222f, 0.2416043573f, 0.05174499776f,
                                    0.01367030945f},
                         around[] = {1.0f, 0.6931210452f, 0.2402234904f, 0.05592197584f, 0.009666368515f};
};
template <>
struct Exp2<false> {
  static constexpr int degree = 6;
  static constexpr float above[] = {1.000000003f,   0.6931469328f,   0.2402304544f,   0.0554806302f,
                                    0.00968418631f, 0.001239133183f, 0.0002186578479f},
                         around[] = {1.0f,           0.6931472067f,   0.2402265092f,
                                     0.05550327227f, 0.009618056679f, 0.001340042818f,
                                     0.000154614447f};
};

// What group_norm.h asks for, for results of type T.
template <class T>
struct Math {
  using Scalar = Wide<T>;
  using V = Vec<Scalar>;
  static constexpr bool brief = sizeof(T) == 2;

  FASTREG_INLINE V exp(V x) {
    if constexpr (std::is_same_v<T, double>) {
      return exp_of<double>(x > 700.0 ? splat(700.0) : x);
    } else {
      constexpr float log2e = 0x1.715476p0f;
      using P = Exp2<brief>;
      V p;
#if FASTREG_VECTOR_BYTES == 64
      V t = x * log2e;
      // Newton's step for the reciprocal of 1 + exp(x) needs a finite one; NaN stays.
      if constexpr (!brief) t = bits<V>(_mm512_min_ps(bits<__m512>(splat(125.0f)), bits<__m512>(t)));
      const V r = bits<V>(_mm512_reduce_ps(bits<__m512>(t), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
      p = splat(P::above[P::degree]);
#pragma GCC unroll 8
      for (int i = P::degree - 1; i >= 0; --i) p = p * r + P::above[i];
      return bits<V>(_mm512_scalef_ps(bits<__m512>(p), bits<__m512>(t)));
#else
      x = x > 87.0f ? splat(87.0f) : x;
      x = x < -87.0f ? splat(-87.0f) : x;
      const V shifted = x * log2e + 0x1.8p23f, n = shifted - 0x1.8p23f;
      const V r = x * log2e - n;
      p = splat(P::around[P::degree]);
#pragma GCC unroll 8
      for (int i = P::degree - 1; i >= 0; --i) p = p * r + P::around[i];
      const Int<float> power = bits<Int<float> >(shifted) - bits<Int<float> >(splat(0x1.8p23f));
      return p * bits<V>((power + 127) << 23);
#endif
    }
  }

  FASTREG_INLINE V reciprocal(V x) {
    if constexpr (std::is_same_v<T, double>) {
      return 1.0 / x;
    } else {
#if FASTREG_VECTOR_BYTES == 64
      const V guess = bits<V>(_mm512_rcp14_ps(bits<__m512>(x)));
      return brief ? guess : guess + guess * (1.0f - x * guess);
#elif FASTREG_VECTOR_BYTES == 32
      if constexpr (!brief) return 1.0f / x;
      const V guess = bits<V>(_mm256_rcp_ps(bits<__m256>(x)));
      return guess + guess * (1.0f - x * guess);
#else
      return 1.0f / x;
#endif
    }
  }
};

template <class T, class A>
FASTREG_INLINE Vec<A> load_part(const T* from, int64_t valid, A fill) {
  return valid == lanes<A> ? load(from) : load_first(from, valid, fill);
}

constexpr int64_t kRun = 8;  // rows added up in registers before they join the sums of a part

// ---- statistics of a run of adjacent elements
// -----------------------------------------------------------------
constexpr int64_t kBlock = 4096;  // elements added up at a time

// Deviations are taken from the mean of the first eighth: as these elements are among those that are summed,
// sum²/n is at most 8 times the sum of squared deviations from the mean, and so no more digits than that are
// lost.
template <class T, class A>
Moments<double> moments_of_block(const T* x, int64_t n) {
  constexpr int64_t L = lanes<A>;
  const int64_t lead = (n + 7) / 8;
  Vec<A> total[2] = {};
  int64_t i = 0;
  for (; i + 2 * L <= lead; i += 2 * L)
    for (int k = 0; k < 2; ++k) total[k] += load(x + i + k * L);
  for (; i < lead; i += L) total[0] += load_part<T, A>(x + i, std::min(L, lead - i), A(0));
  const A pivot = horizontal_sum(total[0] + total[1]) / static_cast<A>(lead);
  Vec<A> sum[4] = {}, square[4] = {};
  const auto add = [&](int k, Vec<A> v) {
    const Vec<A> d = v - pivot;
    sum[k] += d;
    square[k] += d * d;
  };
  for (i = 0; i + 4 * L <= n; i += 4 * L)
    for (int k = 0; k < 4; ++k) add(k, load(x + i + k * L));
  for (int k = 0; i < n; i += L, ++k) add(k, load_part<T, A>(x + i, std::min(L, n - i), pivot));
  const double s = horizontal_sum((sum[0] + sum[1]) + (sum[2] + sum[3])), count = static_cast<double>(n);
  const double q = horizontal_sum((square[0] + square[1]) + (square[2] + square[3]));
  return {count, pivot + s / count, q - s * s / count};
}

// Where squares overflow A.
template <class T>
Moments<double> moments_in_double(const T* x, int64_t n) {
  double sum = 0, off = 0, square = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]);
  const double count = static_cast<double>(n), mean = sum / count;
  for (int64_t i = 0; i < n; ++i) {
    const double d = static_cast<double>(x[i]) - mean;
    off += d;
    square += d * d;
  }
  return {count, mean + off / count, square - off * off / count};
}

template <class T, class A>
Moments<double> moments_of(const T* x, int64_t n) {
  Moments<double> all{0, 0, 0};
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = std::min(kBlock, n - i);
    auto block = moments_of_block<T, A>(x + i, m);
    if (!(block.m2 <= std::numeric_limits<double>::max())) block = moments_in_double(x + i, m);
    all = merge(all, block);
  }
  return all;
}

// ---- statistics per channel of rows that are positions
// -------------------------------------------------------- The channels [c, c + lanes) of a row: the last
// vector reaches back into the one before, and only a row shorter than a vector is read in part. Sums of such
// a vector have a place of their own at `slot`, not at c.
template <class A, class F>
FASTREG_INLINE void over_channels(int64_t channels, F f) {  // f(c, slot, valid)
  constexpr int64_t L = lanes<A>;
  int64_t c = 0;
  for (; c + L <= channels; c += L) f(c, c, L);
  if (c < channels) f(std::max<int64_t>(channels - L, 0), c, std::min(L, channels));
}

template <class A>
FASTREG_INLINE int64_t slots_for(int64_t channels) {
  return (channels + lanes<A> - 1) / lanes<A> * lanes<A>;
}

// As moments_of_block, for each channel.
template <class T, class A>
void moments_of_columns(const T* x, int64_t stride, int64_t rows, int64_t channels, A* work, double* mean,
                        double* m2) {
  const int64_t slots = slots_for<A>(channels), lead = (rows + 7) / 8;
  A *pivot = work, *sum = pivot + slots, *square = sum + slots;
  std::fill(work, work + 3 * slots, A(0));
  for (int64_t r = 0; r < lead; ++r)
    over_channels<A>(channels, [&](int64_t c, int64_t slot, int64_t valid) {
      store(pivot + slot, load(pivot + slot) + load_part<T, A>(x + r * stride + c, valid, A(0)));
    });
  for (int64_t slot = 0; slot < slots; ++slot) pivot[slot] /= static_cast<A>(lead);
  for (int64_t first = 0; first < rows; first += kRun) {
    const int64_t run = std::min(kRun, rows - first);
    const T* from = x + first * stride;
    over_channels<A>(channels, [&](int64_t c, int64_t slot, int64_t valid) {
      const Vec<A> from_pivot = load(pivot + slot);
      Vec<A> s{}, q{};
      const auto add = [&](int64_t r) {
        __builtin_prefetch(from + (r + kRun) * stride + c);
        const Vec<A> d = load_part<T, A>(from + r * stride + c, valid, A(0)) - from_pivot;
        s += d;
        q += d * d;
      };
      if (run == kRun) {
#pragma GCC unroll 8
        for (int64_t r = 0; r < kRun; ++r) add(r);
      } else {
        for (int64_t r = 0; r < run; ++r) add(r);
      }
      store(sum + slot, load(sum + slot) + s);
      store(square + slot, load(square + slot) + q);
    });
  }
  const double count = static_cast<double>(rows), share = 1 / count;
  bool finite = true;
  over_channels<A>(channels, [&](int64_t c, int64_t slot, int64_t valid) {
    for (int64_t i = 0; i < valid; ++i) {
      const double s = sum[slot + i], q = square[slot + i];
      mean[c + i] = pivot[slot + i] + s * share;
      m2[c + i] = std::max(q - s * s * share, 0.0);
      finite &= q <= std::numeric_limits<A>::max();
    }
  });
  if (finite) return;
  over_channels<A>(channels, [&](int64_t c, int64_t slot, int64_t valid) {
    for (int64_t i = 0; i < valid; ++i) {
      if (square[slot + i] <= std::numeric_limits<A>::max()) continue;
      double total = 0, deviations = 0;
      const T* column = x + c + i;
      for (int64_t r = 0; r < rows; ++r) total += static_cast<double>(column[r * stride]);
      for (int64_t r = 0; r < rows; ++r) {
        const double d = static_cast<double>(column[r * stride]) - total * share;
        deviations += d * d;
      }
      mean[c + i] = total * share;
      m2[c + i] = deviations;
    }
  });
}

template <class T, class A>
void moments_typed(const GroupNorm<A>& call, int64_t unit, int64_t begin, int64_t end) {
  std::vector<A> work(call.last ? 3 * slots_for<A>(call.channels) : 0);
  for (int64_t part = begin; part < end; ++part) {
    double* slot = call.moments_slot(unit, part);
    if (call.last) {
      const int64_t first = part * call.rows_per_part,
                    rows = std::min(call.rows_per_part, call.positions - first);
      moments_of_columns<T, A>(call.input.template at<T>(unit, first), call.input.row, rows, call.channels,
                               work.data(), slot, slot + call.channels);
      continue;
    }
    const Piece p = piece_of(call, unit, part);
    Moments<double> all{0, 0, 0};
    if (call.input.row == call.positions && call.pieces == 1) {
      all = moments_of<T, A>(call.input.template at<T>(p.n, p.first), p.rows * call.positions);
    } else {
      for (int64_t r = 0; r < p.rows; ++r)
        all = merge(all,
                    moments_of<T, A>(call.input.template at<T>(p.n, p.first + r) + p.begin, p.end - p.begin));
    }
    slot[0] = all.mean, slot[1] = all.m2;
  }
}

template <class A>
void store_statistics(const GroupNorm<A>& call, int64_t group, Moments<double> all) {
  const double variance = std::max(all.m2 / all.count, 0.0);
  call.mean[group] = static_cast<A>(all.mean);
  // NaN where anything was not finite, as the mean is.
  call.rstd[group] = static_cast<A>(1 / std::sqrt((all.m2 != all.m2 ? all.m2 : variance) + call.eps));
}

template <class A>
void finish_moments(const GroupNorm<A>& call, int64_t unit) {
  const int64_t parts = call.parts();
  if (!call.last) {
    Moments<double> all{0, 0, 0};
    for (int64_t part = 0; part < parts; ++part) {
      const Piece p = piece_of(call, unit, part);
      const double* slot = call.moments_slot(unit, part);
      all = merge(all, {static_cast<double>(p.rows * (p.end - p.begin)), slot[0], slot[1]});
    }
    store_statistics(call, unit, all);
    return;
  }
  for (int64_t g = 0; g < call.groups; ++g) {
    Moments<double> all{0, 0, 0};
    for (int64_t part = 0; part < parts; ++part) {
      const double* slot = call.moments_slot(unit, part);
      const double count =
          static_cast<double>(std::min(call.rows_per_part, call.positions - part * call.rows_per_part));
      // Equal counts: the mean of the channels' means, and their deviations from it.
      const int64_t first = g * call.per_group(), n = call.per_group();
      double sum = 0, m2 = 0;
      for (int64_t c = first; c < first + n; ++c) sum += slot[c];
      const double mean = sum / static_cast<double>(n);
      for (int64_t c = first; c < first + n; ++c) {
        const double d = slot[c] - mean;
        m2 += slot[call.channels + c] + count * d * d;
      }
      all = merge(all, {count * static_cast<double>(n), mean, m2});
    }
    store_statistics(call, unit * call.groups + g, all);
  }
}

// ---- y
// --------------------------------------------------------------------------------------------------------
// What a channel's elements are scaled by and the like: one value, or one per element of a row. Tables end in
// room for a whole vector.
template <class A>
struct One {
  Vec<A> value;
  __attribute__((always_inline)) Vec<A> at(int64_t) const { return value; }
};
// f(i, valid) for n adjacent elements, a vector at a time; the last vector reaches back into the one before.
template <class A, class F>
FASTREG_INLINE void over_run(int64_t n, F f) {
  constexpr int64_t L = lanes<A>;
  int64_t i = 0;
  for (; i + L <= n; i += L) f(i, L);
  if (i < n) f(std::max<int64_t>(n - L, 0), std::min(L, n));
}

template <class T, class V>
FASTREG_INLINE void store_part(T* to, V v, int64_t valid) {
  if (valid == static_cast<int64_t>(sizeof(v) / sizeof(v[0])))
    store(to, v);
  else
    store_first(to, v, valid);
}

// Past the caches, where that is asked for and the address allows it. Vectors of 16-bit elements are half as
// long, and half a cache line gains nothing.
template <class T, class V>
FASTREG_INLINE void write_part(T* to, V v, int64_t valid, bool stream) {
#if FASTREG_VECTOR_BYTES >= 32
  if constexpr (sizeof(T) == sizeof(v[0])) {
    if (stream && valid == sizeof(v) / sizeof(v[0]) && reinterpret_cast<uintptr_t>(to) % sizeof(v) == 0) {
#if FASTREG_VECTOR_BYTES == 64
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bits<__m512i>(v));
#else
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bits<__m256i>(v));
#endif
      return;
    }
  }
#endif
  store_part(to, v, valid);
}

// Orders what bypassed the caches before what other threads are told.
FASTREG_INLINE void finish_writing(bool stream) {
#if FASTREG_VECTOR_BYTES >= 32
  if (stream) _mm_sfence();
#endif
}

template <int act, class T, class A, class C>
FASTREG_INLINE void apply_vector(const T* x, const T* residual, T* y, int64_t i, int64_t valid, bool stream,
                                 C mean, C scale, C bias) {
  Vec<A> z = (load_part<T, A>(x + i, valid, A(0)) - mean.at(i)) * scale.at(i) + bias.at(i);
  if (residual) z += load_part<T, A>(residual + i, valid, A(0));
  write_part(y + i, activate<act, Math<T> >(z), valid, stream);
}

// Columns of per-channel values of a sample, each with room for a whole vector at the end.
template <class A, int n>
struct Tables {
  int64_t length;
  std::vector<A> values;
  explicit Tables(int64_t channels) : length(channels + lanes<A>), values(n * length) {}
  A* operator[](int i) { return values.data() + i * length; }
};

template <class T>
T* at_or_null(const Rows& rows, int64_t n, int64_t r, int64_t offset = 0) {
  return rows.data ? rows.at<T>(n, r) + offset : nullptr;
}

template <int act, class T, class A>
void apply_typed(const GroupNorm<A>& call, int64_t unit, int64_t begin, int64_t end) {
  const auto scale_of = [&](int64_t group, int64_t c) {
    return static_cast<A>(double(call.rstd[group]) * call.weight[c]);
  };
  if (call.last) {
    Tables<A, 3> table(call.channels);
    for (int64_t c = 0; c < call.channels; ++c) {
      const int64_t group = unit * call.groups + c / call.per_group();
      table[0][c] = call.mean[group], table[1][c] = scale_of(group, c), table[2][c] = call.bias[c];
    }
    for (int64_t part = end; part-- > begin;) {  // what was read last is still in the cache
      const int64_t first = part * call.rows_per_part;
      const int64_t rows = std::min(call.rows_per_part, call.positions - first);
      for (int64_t r = first; r < first + rows; r += kRun) {
        const T *x = call.input.template at<T>(unit, r), *residual = at_or_null<T>(call.residual, unit, r);
        T* y = call.output.template at<T>(unit, r);
        over_run<A>(call.channels, [&](int64_t c, int64_t valid) {
          const One<A> mean{load(table[0] + c)}, scale{load(table[1] + c)}, bias{load(table[2] + c)};
          for (int64_t k = 0; k < std::min(kRun, first + rows - r); ++k)
            apply_vector<act, T, A>(x + k * call.input.row,
                                    residual ? residual + k * call.residual.row : nullptr,
                                    y + k * call.output.row, c, valid, call.stream, mean, scale, bias);
        });
      }
    }
    return;
  }
  for (int64_t part = end; part-- > begin;) {
    const Piece p = piece_of(call, unit, part);
    for (int64_t c = p.first; c < p.first + p.rows; ++c) {
      const T* x = call.input.template at<T>(p.n, c) + p.begin;
      const T* residual = at_or_null<T>(call.residual, p.n, c, p.begin);
      T* y = call.output.template at<T>(p.n, c) + p.begin;
      const One<A> mean{splat(call.mean[unit])}, scale{splat(scale_of(unit, c))}, bias{splat(call.bias[c])};
      over_run<A>(p.end - p.begin, [&](int64_t i, int64_t valid) {
        apply_vector<act, T, A>(x, residual, y, i, valid, call.stream, mean, scale, bias);
      });
    }
  }
}

// ---- dz, Σ dz and Σ dz·x̂ per channel
// -------------------------------------------------------------------------
template <class A>
struct Sums {
  Vec<A> dz{}, dz_x{};
  __attribute__((always_inline)) void operator+=(const Sums& other) { dz += other.dz, dz_x += other.dz_x; }
};

// Adds the vector at i; a lane beyond `valid` has dy = 0 and adds nothing.
template <int act, class T, class A, class D, class C>
FASTREG_INLINE void add_vector(Sums<A>& sums, const T* x, const T* dy, const T* residual, D* dz, int64_t i,
                               int64_t valid, C mean, C rstd, C weight, C bias) {
  const Vec<A> normal = (load_part<T, A>(x + i, valid, A(0)) - mean.at(i)) * rstd.at(i);
  Vec<A> g = load_part<T, A>(dy + i, valid, A(0));
  if constexpr (act != kNone) {
    Vec<A> z = normal * weight.at(i) + bias.at(i);
    if (residual) z += load_part<T, A>(residual + i, valid, A(0));
    g = activation_gradient<act, Math<T> >(g, z);
    if (dz) store_part(dz + i, g, valid);
  }
  sums.dz += g;
  sums.dz_x += g * normal;
}

template <int act, class T, class A, class D>
void sums_of_run(const T* x, const T* dy, const T* residual, D* dz, int64_t n, One<A> mean, One<A> rstd,
                 One<A> weight, One<A> bias, double* out) {
  constexpr int64_t L = lanes<A>;
  out[0] = out[1] = 0;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t end = std::min(first + kBlock, n);
    Sums<A> sums[2];
    int64_t i = first;
    for (; i + 2 * L <= end; i += 2 * L)
      for (int k = 0; k < 2; ++k)
        add_vector<act, T, A>(sums[k], x, dy, residual, dz, i + k * L, L, mean, rstd, weight, bias);
    for (; i < end; i += L)
      add_vector<act, T, A>(sums[1], x, dy, residual, dz, i, std::min(L, end - i), mean, rstd, weight, bias);
    sums[0] += sums[1];
    out[0] += horizontal_sum(sums[0].dz);
    out[1] += horizontal_sum(sums[0].dz_x);
  }
}

template <int act, class T, class A>
void sums_of_columns(const GroupNorm<A>& call, int64_t n, int64_t first, int64_t rows, Tables<A, 4>& table,
                     A* work, double* out, double* out_x) {
  const int64_t slots = slots_for<A>(call.channels);
  A *sum = work, *sum_x = work + slots;
  std::fill(work, work + 2 * slots, A(0));
  for (int64_t r = first; r < first + rows; r += kRun) {
    const int64_t run = std::min(kRun, first + rows - r);
    const T *x = call.input.template at<T>(n, r), *dy = call.grad_output.template at<T>(n, r);
    const T* residual = at_or_null<T>(call.residual, n, r);
    T* dz = at_or_null<T>(call.dz, n, r);
    over_channels<A>(call.channels, [&](int64_t c, int64_t slot, int64_t valid) {
      const One<A> mean{load(table[0] + c)}, rstd{load(table[1] + c)}, weight{load(table[2] + c)},
          bias{load(table[3] + c)};
      Sums<A> sums;
      for (int64_t k = 0; k < run; ++k) {
        __builtin_prefetch(x + (k + kRun) * call.input.row + c);
        __builtin_prefetch(dy + (k + kRun) * call.grad_output.row + c);
        add_vector<act, T, A>(sums, x + k * call.input.row, dy + k * call.grad_output.row,
                              residual ? residual + k * call.residual.row : nullptr,
                              dz ? dz + k * call.dz.row : nullptr, c, valid, mean, rstd, weight, bias);
      }
      store(sum + slot, load(sum + slot) + sums.dz);
      store(sum_x + slot, load(sum_x + slot) + sums.dz_x);
    });
  }
  over_channels<A>(call.channels, [&](int64_t c, int64_t slot, int64_t valid) {
    for (int64_t i = 0; i < valid; ++i) out[c + i] = sum[slot + i], out_x[c + i] = sum_x[slot + i];
  });
}

template <int act, class T, class A>
void sums_typed(const GroupNorm<A>& call, int64_t unit, int64_t begin, int64_t end, A* scratch) {
  if (call.last) {
    Tables<A, 4> table(call.channels);
    std::vector<A> work(2 * slots_for<A>(call.channels));
    for (int64_t c = 0; c < call.channels; ++c) {
      const int64_t group = unit * call.groups + c / call.per_group();
      table[0][c] = call.mean[group], table[1][c] = call.rstd[group];
      table[2][c] = call.weight[c], table[3][c] = call.bias[c];
    }
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * call.rows_per_part,
                    rows = std::min(call.rows_per_part, call.positions - first);
      double* slot = call.sums_slot(unit, part);
      sums_of_columns<act, T, A>(call, unit, first, rows, table, work.data(), slot, slot + call.channels);
    }
    return;
  }
  for (int64_t part = begin; part < end; ++part) {
    const Piece p = piece_of(call, unit, part);
    const int64_t first = p.g * call.per_group();
    for (int64_t c = p.first; c < p.first + p.rows; ++c) {
      const auto run = [&](auto* dz) {
        sums_of_run<act, T, A>(
            call.input.template at<T>(p.n, c) + p.begin, call.grad_output.template at<T>(p.n, c) + p.begin,
            at_or_null<T>(call.residual, p.n, c, p.begin), dz, p.end - p.begin,
            One<A>{splat(call.mean[unit])}, One<A>{splat(call.rstd[unit])}, One<A>{splat(call.weight[c])},
            One<A>{splat(call.bias[c])}, call.sums_slot(p.n, c, p.piece));
      };
      if (act != kNone && scratch)
        run(scratch + (c - first) * call.positions + p.begin);
      else
        run(at_or_null<T>(call.dz, p.n, c, p.begin));
    }
  }
}

template <class A>
void finish_group(const GroupNorm<A>& call, int64_t n, int64_t g) {
  double m1 = 0, m2 = 0;
  for (int64_t c = g * call.per_group(); c < (g + 1) * call.per_group(); ++c) {
    m1 += call.weight[c] * call.sum_dz(n)[c];
    m2 += call.weight[c] * call.sum_dz_x(n)[c];
  }
  const int64_t group = n * call.groups + g;
  const double scale = call.group_size() == 1 ? 0 : call.rstd[group] / call.group_size();
  call.terms[group] = static_cast<A>(scale * m1);
  call.terms[call.samples * call.groups + group] = static_cast<A>(scale * m2);
}

template <class A>
void finish_sums(const GroupNorm<A>& call, int64_t unit) {
  if (call.last) {
    double *dz = call.sum_dz(unit), *dz_x = call.sum_dz_x(unit);
    std::fill(dz, dz + call.channels, 0.0);
    std::fill(dz_x, dz_x + call.channels, 0.0);
    for (int64_t part = 0; part < call.parts(); ++part) {
      const double* slot = call.sums_slot(unit, part);
      for (int64_t c = 0; c < call.channels; ++c) dz[c] += slot[c], dz_x[c] += slot[call.channels + c];
    }
    for (int64_t g = 0; g < call.groups; ++g) finish_group(call, unit, g);
    return;
  }
  const int64_t n = unit / call.groups, g = unit % call.groups;
  for (int64_t c = g * call.per_group(); c < (g + 1) * call.per_group(); ++c) {
    double dz = 0, dz_x = 0;
    for (int64_t piece = 0; piece < call.pieces; ++piece) {
      dz += call.sums_slot(n, c, piece)[0];
      dz_x += call.sums_slot(n, c, piece)[1];
    }
    call.sum_dz(n)[c] = dz, call.sum_dz_x(n)[c] = dz_x;
  }
  finish_group(call, n, g);
}

// ---- dx
// ---------------------------------------------------------------------------------------------------------
template <class A>
struct BackTerms {
  Vec<A> mean, rstd, scale, m1, m2;
  template <class T, class D>
  __attribute__((always_inline)) Vec<A> dx(const T* x, const D* dz, int64_t valid) const {
    const Vec<A> normal = (load_part<T, A>(x, valid, A(0)) - mean) * rstd;
    return (load_part<D, A>(dz, valid, A(0)) * scale - m1) - normal * m2;
  }
};

template <class T, class A>
void apply_backward_typed(const GroupNorm<A>& call, int64_t unit, int64_t begin, int64_t end,
                          const A* scratch) {
  constexpr int64_t L = lanes<A>;
  const int64_t channels = call.channels;
  // What lies in dx as dz is in the caches already.
  const bool stream = call.stream && (scratch || call.dz.data != call.grad_input.data);
  const A *m1 = call.terms.get(), *m2 = m1 + call.samples * call.groups;
  // With one element in a group x̂ is 0, and dx too, exactly.
  const auto rstd_of = [&](int64_t group) { return call.group_size() == 1 ? A(0) : call.rstd[group]; };
  if (call.last) {
    Tables<A, 5> table(call.channels);
    for (int64_t c = 0; c < call.channels; ++c) {
      const int64_t group = unit * call.groups + c / call.per_group();
      table[0][c] = call.mean[group], table[1][c] = rstd_of(group),
      table[2][c] = rstd_of(group) * call.weight[c];
      table[3][c] = m1[group], table[4][c] = m2[group];
    }
    for (int64_t part = end; part-- > begin;) {
      const int64_t first = part * call.rows_per_part;
      const int64_t rows = std::min(call.rows_per_part, call.positions - first);
      for (int64_t r = first; r < first + rows; r += kRun) {
        const int64_t run = std::min(kRun, first + rows - r);
        const T *x = call.input.template at<T>(unit, r), *dz = call.dz.template at<T>(unit, r);
        T* dx = call.grad_input.template at<T>(unit, r);
        Vec<A> last[kRun] = {};
        // dz may be dx itself: the vector that reaches back is computed before the one it reaches into is
        // written.
        for (int pass = channels % L && channels > L ? 0 : 1; pass < 2; ++pass) {
          const auto at = [&](int64_t c) {
            return BackTerms<A>{load(table[0] + c), load(table[1] + c), load(table[2] + c),
                                load(table[3] + c), load(table[4] + c)};
          };
          if (pass == 0) {
            const BackTerms<A> terms = at(channels - L);
            for (int64_t k = 0; k < run; ++k)
              last[k] =
                  terms.dx(x + k * call.input.row + channels - L, dz + k * call.dz.row + channels - L, L);
            continue;
          }
          for (int64_t c = 0; c + L <= channels; c += L) {
            const BackTerms<A> terms = at(c);
            for (int64_t k = 0; k < run; ++k)
              write_part(dx + k * call.grad_input.row + c,
                         terms.dx(x + k * call.input.row + c, dz + k * call.dz.row + c, L), L, stream);
          }
          if (channels < L) {
            const BackTerms<A> terms = at(0);
            for (int64_t k = 0; k < run; ++k)
              store_first(dx + k * call.grad_input.row,
                          terms.dx(x + k * call.input.row, dz + k * call.dz.row, channels), channels);
          } else if (channels % L) {
            for (int64_t k = 0; k < run; ++k) store(dx + k * call.grad_input.row + channels - L, last[k]);
          }
        }
      }
    }
    return;
  }
  for (int64_t part = end; part-- > begin;) {
    const Piece p = piece_of(call, unit, part);
    for (int64_t c = p.first; c < p.first + p.rows; ++c) {
      const T* x = call.input.template at<T>(p.n, c) + p.begin;
      T* dx = call.grad_input.template at<T>(p.n, c) + p.begin;
      const BackTerms<A> terms{splat(call.mean[unit]), splat(rstd_of(unit)),
                               splat(rstd_of(unit) * call.weight[c]), splat(m1[unit]), splat(m2[unit])};
      const int64_t n = p.end - p.begin;
      const auto run = [&](const auto* dz) {
        if (n < L) {
          store_first(dx, terms.dx(x, dz, n), n);
          return;
        }
        const Vec<A> last = terms.dx(x + n - L, dz + n - L, L);
        for (int64_t i = 0; i + L < n; i += L) write_part(dx + i, terms.dx(x + i, dz + i, L), L, stream);
        store(dx + n - L, last);
      };
      if (scratch)
        run(scratch + (c - p.g * call.per_group()) * call.positions + p.begin);
      else
        run(call.dz.template at<T>(p.n, c) + p.begin);
    }
  }
}

// ---- by dtype and activation
// ----------------------------------------------------------------------------------
template <class A, class F>
FASTREG_INLINE void by_dtype(const GroupNorm<A>& call, F f) {
  if constexpr (std::is_same_v<A, double>)
    f(double{});
  else if (call.dtype == ScalarType::BFloat16)
    f(BFloat16{});
  else if (call.dtype == ScalarType::Half)
    f(Half{});
  else
    f(float{});
}

template <class A, class F>
FASTREG_INLINE void by_activation(const GroupNorm<A>& call, F f) {
  switch (call.activation) {
    case kRelu:
      return f.template operator()<kRelu>();
    case kSilu:
      return f.template operator()<kSilu>();
    case kGelu:
      return f.template operator()<kGelu>();
    case kGeluTanh:
      return f.template operator()<kGeluTanh>();
    default:
      return f.template operator()<kNone>();
  }
}

template <class A>
void moments(const GroupNorm<A>& call, int64_t unit, int64_t begin, int64_t end) {
  by_dtype(call, [&](auto t) { moments_typed<decltype(t), A>(call, unit, begin, end); });
}

template <class A>
void apply(const GroupNorm<A>& call, int64_t unit, int64_t begin, int64_t end) {
  by_dtype(call, [&](auto t) {
    by_activation(call, [&]<int act>() { apply_typed<act, decltype(t), A>(call, unit, begin, end); });
  });
  finish_writing(call.stream);
}

// dz goes to `scratch`, a unit's, unless that is null.
template <class A>
void sums(const GroupNorm<A>& call, int64_t unit, int64_t begin, int64_t end, A* scratch) {
  by_dtype(call, [&](auto t) {
    by_activation(call, [&]<int act>() { sums_typed<act, decltype(t), A>(call, unit, begin, end, scratch); });
  });
}

template <class A>
void apply_backward(const GroupNorm<A>& call, int64_t unit, int64_t begin, int64_t end, const A* scratch) {
  by_dtype(call, [&](auto t) { apply_backward_typed<decltype(t), A>(call, unit, begin, end, scratch); });
  finish_writing(call.stream);
}

}  // namespace fastreg::FASTREG_ISA
#endif
