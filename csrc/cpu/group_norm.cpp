// GroupNorm on the CPU. The formulas are in group_norm.h.
//
// A sample is read as rows: its C channels of S positions (contiguous), or its S positions of C channels
// (channels_last). A unit is what is normalised alone: a group where rows are channels; where they are
// positions some groups, as many as fit in a core's cache and, if they do, whole cache lines of each row.
// Units are cut into parts of a fixed size, each part's statistics or sums go to a slot of its own, and the
// slots are merged in order, in double: no result depends on the number of threads. With at least as many
// units as threads, a thread takes a unit through all steps while it is in its cache; with fewer, the threads
// share the parts.
//
// Small groups are another matter: what is done once for each of them must not cost more than their elements.
// A task takes some groups of some samples, and what ends a group's step is computed for all of them at once.
// A group is read as columns of vectors that have the same parameters lane by lane: one of a channel, or of
// the same channels at each position. Tables hold the parameters of each column, and the sums for their
// gradients.
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
#include <numeric>
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

constexpr int64_t kPart = 32768;       // elements of a part, where a unit has as many
constexpr int64_t kCache = 768 << 10;  // bytes that a core's own cache holds of a unit
// Channels of which a unit's rows have a multiple: whole vectors, and whole cache lines.
constexpr int64_t kLine = 32;
// Bytes of a tensor that the last cache may hold, from which narrow parts of rows come as fast as whole rows.
constexpr int64_t kNear = 12 << 20;
// Bytes of a slab's row below which it costs more than a second way through whole rows, if those are long.
constexpr int64_t kNarrow = 256;
// The same where a second way would write dz to memory too, and rows of which it is so: two to a page.
constexpr int64_t kNarrowKept = 128, kRowKept = 2048;
constexpr int64_t kAhead = 2048;      // bytes that a run is asked for before it is read
constexpr int64_t kScratch = 393216;  // elements of a unit whose dz is kept in a scratch, in the caches
constexpr int64_t kStream = int64_t{4} << 20;  // bytes of a result that bypasses the caches
// Elements of small units that a thread takes through a step before the next step: what a unit's step ends
// with, a chain of sums, divisions and a root, is then computed beside the other units'.
constexpr int64_t kBatch = 4096;
// Elements of the largest small group, and of a task's groups; of a table; and samples of a task.
constexpr int64_t kSmall = 2048, kTable = 1024, kSamples = 32;
// Elements of the shortest run of adjacent ones for which small groups are worth it where rows are positions.
constexpr int64_t kShortest = 16;
constexpr int64_t kGrain = 16384;  // elements for which another thread is woken up

// Elements of a row of the scratch: whole vectors.
inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

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

  // Groups of a unit and, in channels_last, how many units that makes of a sample.
  int64_t together = 1, slabs = 1;
  bool cached;  // whether a core's cache holds a unit
  bool keeps;   // whether a unit's dz goes to a scratch
  // Whether dz is made a second time of what has come from memory again: sooner than it is written there.
  bool repeats;
  // The cut into parts. Rows are channels: `rows_per_part` of them, or one of `pieces` of a channel.
  int64_t rows_per_part, pieces, row_parts;
  // Statistics: per group and part, or per sample, part and channel. Sums: per sample, channel and piece, or
  // per sample, part and channel; twice, for dz and dz·x̂.
  std::unique_ptr<double[]> slots;
  std::unique_ptr<double[]> sums;  // the same merged, [2, samples (small groups: blocks), channels]
  std::unique_ptr<A[]> terms;      // m1 and m2 times rstd, [2, samples, groups]
  // Whether what is written is too large to stay in the caches until someone reads it: then it bypasses them.
  bool stream = false;
  Rows dz;  // the gradient before the activation: written with the sums where there is one, read for dx
  int64_t small = 0;                                     // groups of a task if groups are small, else 0
  bool by_channel = false;                               // whether a column is a channel
  int64_t columns = 0, depth = 0, slots_of_channel = 0;  // of a group; vectors of a column; table's entries

  // `size`: bytes of an element of the tensors; `read`: of all that belongs to an element of a unit and is
  // read again; `keep`: whether dz may go to a scratch; `repeat`: whether it may be made twice.
  GroupNorm(int64_t samples, int64_t channels, int64_t groups, int64_t positions, bool last, int64_t size,
            int64_t read, bool keep, bool repeat)
      : samples(samples), channels(channels), groups(groups), positions(positions), last(last) {
    const bool far = samples * channels * positions * size > kNear;
    if (last) {
      const int64_t line = kLine / std::gcd(kLine, std::max<int64_t>(per_group(), 1));
      const int64_t group_bytes = std::max<int64_t>(per_group() * positions * read, 1);
      together = std::max(kCache / group_bytes / line, int64_t{1}) * line;
      const bool kept = keep && !(repeat && far) && unit_size() <= kScratch && channels * size <= kRowKept;
      if (together > groups || line * group_bytes > 2 * kCache || (!kept && far) ||
          (width() * size < (kept ? kNarrowKept : kNarrow) && channels * size >= 4 * kNarrow))
        together = groups;
      slabs = (groups + together - 1) / together;
      rows_per_part = std::max<int64_t>(256, kPart / std::max<int64_t>(width(), 1));
      pieces = 1;
      row_parts = (positions + rows_per_part - 1) / rows_per_part;
    } else {
      pieces = std::max<int64_t>(1, (positions + kPart - 1) / kPart);
      rows_per_part = pieces > 1 ? 1 : std::max<int64_t>(1, kPart / std::max<int64_t>(positions, 1));
      row_parts = (per_group() + rows_per_part - 1) / rows_per_part;
    }
    cached = together * per_group() * positions * read <= kCache;
    repeats = repeat && last && far && !cached;
    keeps = keep && !repeats && unit_size() <= kScratch;
  }

  int64_t per_group() const { return channels / groups; }
  int64_t width() const { return last ? together * per_group() : 1; }  // channels of a unit's row, at most
  // Units taken through a step together.
  int64_t batch() const { return std::max<int64_t>(1, kBatch / std::max<int64_t>(unit_size(), 1)); }
  int64_t units() const { return last ? samples * slabs : samples * groups; }
  int64_t parts() const { return row_parts * pieces; }  // of a unit
  int64_t scratch_row() const { return padded(last ? width() : positions); }
  int64_t unit_size() const { return scratch_row() * (last ? positions : per_group()); }  // in the scratch
  double group_size() const { return static_cast<double>(per_group()) * static_cast<double>(positions); }

  double* moments_slot(int64_t unit, int64_t part) const {
    return slots.get() + (unit * parts() + part) * 2 * width();
  }
  double* sums_slot(int64_t unit, int64_t part) const {  // for channels_last: 2 rows of width()
    return moments_slot(unit, part);
  }
  double* sums_slot(int64_t n, int64_t c, int64_t piece) const {  // for contiguous: 2 numbers
    return slots.get() + ((n * channels + c) * pieces + piece) * 2;
  }
  // What weights the deviation from the mean.
  A scale(int64_t group, int64_t c) const { return static_cast<A>(double(rstd[group]) * weight[c]); }
  int64_t sum_rows() const { return small ? blocks() : samples; }
  double* sum_dz(int64_t n) const { return sums.get() + n * channels; }
  double* sum_dz_x(int64_t n) const { return sums.get() + (sum_rows() + n) * channels; }

  // A small group is this many runs of as many adjacent elements.
  int64_t runs() const { return last ? positions : 1; }
  int64_t run() const { return last ? per_group() : per_group() * positions; }
  int64_t blocks() const { return (samples + kSamples - 1) / kSamples; }
  int64_t chunks() const { return (groups + small - 1) / small; }
  // `lanes`: of a vector.
  void find_small(int64_t lanes, std::initializer_list<Rows> used) {
    if (stream || residual.data || runs() * run() > kSmall) return;
    if (runs() > 1 && run() < kShortest) return;
    for (const Rows& rows : used)
      if (rows.data && !last && rows.row != positions && channels > 1) return;
    const auto vectors = [&](int64_t n) { return (n + lanes - 1) / lanes; };
    by_channel = !last && positions >= lanes && vectors(positions) * lanes * 3 <= positions * 4;
    columns = by_channel ? per_group() : vectors(run());
    depth = by_channel ? vectors(positions) : runs();
    slots_of_channel = last ? 1 : by_channel ? lanes : positions;
    small = std::min(kTable / (columns * lanes), kSmall / (runs() * run()));
    small = std::clamp<int64_t>(small, 1, groups);
  }

  void allocate_moments() {
    slots = std::make_unique_for_overwrite<double[]>(units() * parts() * 2 * width());
  }
  void allocate_sums() {
    sums = std::make_unique_for_overwrite<double[]>(2 * sum_rows() * channels);
    if (small) return;
    slots = std::make_unique_for_overwrite<double[]>(
        2 * (last ? units() * parts() * width() : samples * channels * pieces));
    terms = std::make_unique_for_overwrite<A[]>(2 * samples * groups);
  }
};

// The groups and channels of a unit, where rows are positions.
struct Slab {
  int64_t n, group, groups, channel, width;
};

template <class A>
Slab slab_of(const GroupNorm<A>& call, int64_t unit) {
  const int64_t group = unit % call.slabs * call.together;
  const int64_t groups = std::min(call.together, call.groups - group);
  return {unit / call.slabs, group, groups, group * call.per_group(), groups * call.per_group()};
}

// The part of a unit that a task works on, where rows are channels.
struct Piece {
  int64_t n, g, first, rows, piece, begin, end;  // rows [first, first + rows), positions [begin, end) of each
};

template <class A>
Piece piece_of(const GroupNorm<A>& call, int64_t unit, int64_t part) {
  const int64_t n = unit / call.groups, g = unit % call.groups;
  const bool whole = call.pieces == 1;  // divisions are slow
  const int64_t row = (whole ? part : part / call.pieces) * call.rows_per_part;
  const int64_t piece = whole ? 0 : part % call.pieces;
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
template <class A, class F>
void over_small(const GroupNorm<A>& call, F f) {
  const int64_t size = call.runs() * call.run() * call.small * std::min(call.samples, kSamples);
  torch::stable::parallel_for(0, call.blocks() * call.chunks(), std::max<int64_t>(1, kGrain / size),
                              [&](int64_t begin, int64_t end) { f(call, begin, end); });
}

template <class A>
void run_forward(GroupNorm<A>& call) {
  if (call.small) return over_small(call, FASTREG_PICK(small_forward<A>));
  call.allocate_moments();
  const auto moments = FASTREG_PICK(moments<A>);
  const auto finish = FASTREG_PICK(finish_moments<A>);
  const auto apply = FASTREG_PICK(apply<A>);
  const auto finish_writing = FASTREG_PICK(finish_writing);
  const int64_t units = call.units(), parts = call.parts(), batch = call.batch();
  if (units >= torch::stable::get_num_threads()) {
    torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += batch) {
        const int64_t last = std::min(first + batch, end);
        for (int64_t unit = first; unit < last; ++unit) moments(call, unit, 0, parts);
        for (int64_t unit = first; unit < last; ++unit) finish(call, unit);
        for (int64_t unit = first; unit < last; ++unit)
          apply(call, unit, 0, parts, call.cached && unit + batch < end ? unit + batch : -1);
      }
      finish_writing();
    });
    return;
  }
  for (int64_t unit = 0; unit < units; ++unit) {
    torch::stable::parallel_for(0, parts, 1, [&](int64_t b, int64_t e) { moments(call, unit, b, e); });
    finish(call, unit);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t b, int64_t e) {
      apply(call, unit, b, e, -1);
      finish_writing();
    });
  }
}

template <class A>
void run_backward(GroupNorm<A>& call) {
  call.allocate_sums();
  if (call.small) return over_small(call, FASTREG_PICK(small_backward<A>));
  const auto sums = FASTREG_PICK(sums<A>);
  const auto finish = FASTREG_PICK(finish_sums<A>);
  const auto apply = FASTREG_PICK(apply_backward<A>);
  const auto finish_writing = FASTREG_PICK(finish_writing);
  const int64_t units = call.units(), parts = call.parts(), batch = call.batch();
  const int64_t kept = call.keeps ? call.unit_size() : 0;  // of a unit, in the scratch
  const auto new_scratch = [&](int64_t units) {
    return kept ? std::make_unique_for_overwrite<A[]>(units * kept) : nullptr;
  };
  if (units >= torch::stable::get_num_threads()) {
    torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
      const auto scratch = new_scratch(batch);
      for (int64_t first = begin; first < end; first += batch) {
        const int64_t last = std::min(first + batch, end);
        const auto own = [&](int64_t unit) { return scratch.get() + (unit - first) * kept; };
        for (int64_t unit = first; unit < last; ++unit) sums(call, unit, 0, parts, own(unit));
        for (int64_t unit = first; unit < last; ++unit) finish(call, unit);
        for (int64_t unit = first; call.grad_input.data && unit < last; ++unit)
          apply(call, unit, 0, parts, own(unit));
      }
      finish_writing();
    });
    return;
  }
  const auto scratch = new_scratch(1);
  for (int64_t unit = 0; unit < units; ++unit) {
    torch::stable::parallel_for(0, parts, 1,
                                [&](int64_t b, int64_t e) { sums(call, unit, b, e, scratch.get()); });
    finish(call, unit);
    if (call.grad_input.data)
      torch::stable::parallel_for(0, parts, 1, [&](int64_t b, int64_t e) {
        apply(call, unit, b, e, scratch.get());
        finish_writing();
      });
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
  const void* const data = tensor->const_data_ptr();
  const ScalarType dtype = tensor->scalar_type();  // each of these is a call
  if (stride == 1 && dtype == own) return static_cast<const A*>(data);
  copy.resize(channels);
  for (int64_t c = 0; c < channels; ++c) copy[c] = value_at<A>(data, dtype, c * stride);
  return copy.data();
}

Tensor parameter_gradient(const Tensor& like, const double* sums, int64_t samples, int64_t channels) {
  std::vector<double> total(channels, 0.0);
  for (int64_t n = 0; n < samples; ++n)
    for (int64_t c = 0; c < channels; ++c) total[c] += sums[n * channels + c];
  const ScalarType dtype = like.scalar_type();
  Tensor out = new_tensor({channels}, dtype);
  void* data = out.data_ptr();
  for (int64_t c = 0; c < channels; ++c) switch (dtype) {
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
  const int64_t size = input.element_size();
  GroupNorm<A> call(samples, channels, groups, positions, last, size, size, false, false);
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
  call.find_small(FASTREG_PICK(lanes<A>), {call.input, call.output});
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
  const int64_t size = input.element_size();
  const bool keep = activation && wanted & 1 && !(wanted & 8);
  // A gelu takes longer than the memory.
  const bool repeat = keep && !residual && size == sizeof(float) && activation != baseline::kGelu;
  GroupNorm<A> call(samples, channels, groups, positions, last, size, 2 * size + (activation ? sizeof(A) : 0),
                    keep, repeat);
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
  call.dz = activation == 0 ? call.grad_output
            : wanted & 8    ? call.grad_residual
            : call.repeats  ? Rows{}
                            : call.grad_input;
  if (input.numel()) {
    if (!(wanted & 8))
      call.find_small(FASTREG_PICK(lanes<A>), {call.input, call.grad_output, call.grad_input});
    run_backward(call);
  } else {
    call.allocate_sums();
    std::fill(call.sums.get(), call.sums.get() + 2 * samples * channels, 0.0);
  }
  return {grad_input,
          wanted & 2 ? parameter_gradient(*weight, call.sum_dz_x(0), call.sum_rows(), channels) : nothing(),
          wanted & 4 ? parameter_gradient(*bias, call.sum_dz(0), call.sum_rows(), channels) : nothing(),
          grad_residual};
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

#define FASTREG_LAMBDA __attribute__((always_inline))

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// 2^r for r in [0, 1] and in [-1/2, 1/2]: near-minimax, of relative error 3.5e-6 (brief);
// else 6e-8 above and 2.5e-9 around 0.
template <bool brief>
struct Exp2;
template <>
struct Exp2<true> {
  static constexpr int degree = 4, degree_above = 4;
  static constexpr float above[] = {1.000003493f, 0.6929729222f, 0.2416043573f, 0.05174499776f,
                                    0.01367030945f},
                         around[] = {1.0f, 0.6931210452f, 0.2402234904f, 0.05592197584f, 0.009666368515f};
};
template <>
struct Exp2<false> {
  static constexpr int degree = 6, degree_above = 5;
  static constexpr float above[] = {0.9999999387f,  0.6931537337f,   0.2401485877f,
                                    0.05583896667f, 0.008975590689f, 0.001883060416f},
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
      return exp_of<double>(x > 600.0 ? splat(600.0) : x);  // 2^970 is the last power that exp_of reaches
    } else {
      constexpr float log2e = 0x1.715476p0f;
      using P = Exp2<brief>;
      V p;
#if FASTREG_VECTOR_BYTES == 64
      const V t = x * log2e;
      const V r = bits<V>(_mm512_reduce_ps(bits<__m512>(t), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
      p = splat(P::above[P::degree_above]);
#pragma GCC unroll 8
      for (int i = P::degree_above - 1; i >= 0; --i) p = p * r + P::above[i];
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

  // A divider works beside the multipliers: faster here than an approximation and a step of Newton's. For 16
  // bits the approximation alone, of relative error 6e-5, is right.
  FASTREG_INLINE V quotient(V a, V b) {
#if FASTREG_VECTOR_BYTES == 64
    if constexpr (brief) return a * bits<V>(_mm512_maskz_rcp14_ps(0xffff, bits<__m512>(b)));
#endif
    return a / b;
  }
};

template <class T, class A>
FASTREG_INLINE Vec<A> load_part(const T* from, int64_t valid, A fill) {
  return valid == lanes<A> ? load(from) : load_first(from, valid, fill);
}

constexpr int64_t kRun = 8;  // rows added up in registers before they join the sums of a part

// ---- rows, two vectors at a time -------------------------------------------------------------------------
// pair(i) for the elements [i, i + 2·lanes), then single(i, slot) for [i, i + lanes), where the last reaches
// back into what came before, and only a row shorter than a vector has but the `valid` elements of
// one_of_row. What belongs to elements of a row lies in slots: those of a pair in the order of load_two,
// those of a vector that reaches back in slots of their own.
template <class A, class P, class S>
FASTREG_INLINE void over_row(int64_t n, P pair, S single) {
  constexpr int64_t L = lanes<A>;
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) pair(i);
  for (; i < n; i += L) single(i + L <= n ? i : std::max<int64_t>(n - L, 0), i);
}

template <class A>
FASTREG_INLINE int64_t slots_for(int64_t n) {
  return (n + lanes<A> - 1) / lanes<A> * lanes<A>;
}

// f(i, slot) for each element of a row.
template <class T, class A, class F>
FASTREG_INLINE void each_slot(int64_t n, F f) {
  constexpr int64_t L = lanes<A>;
  over_row<A>(
      n,
      [&](int64_t i) {
        for (int64_t k = 0; k < 2 * L; ++k)
          f(i + k, i + (std::is_same_v<T, BFloat16> ? k % 2 * L + k / 2 : k));
      },
      [&](int64_t i, int64_t slot) {
        for (int64_t k = 0; k < std::min(L, n); ++k) f(i + k, slot + k);
      });
}

// ---- statistics of a run of adjacent elements
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
  for (; i + 2 * L <= lead; i += 2 * L) {
    const auto v = load_two(x + i);
    total[0] += v.first, total[1] += v.second;
  }
  for (; i < lead; i += L) total[0] += load_part<T, A>(x + i, std::min(L, lead - i), A(0));
  const A pivot = horizontal_sum(total[0] + total[1]) / static_cast<A>(lead);
  Vec<A> sum[4] = {}, square[4] = {};
  const auto add = [&](int k, Vec<A> v) {
    const Vec<A> d = v - pivot;
    sum[k] += d;
    square[k] += d * d;
  };
  for (i = 0; i + 4 * L <= n; i += 4 * L) {
    for (int k = 0; k < 4; k += 2) {
      const auto v = load_two(x + i + k * L);
      add(k, v.first), add(k + 1, v.second);
    }
  }
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
    all = i == 0 ? block : merge(all, block);
  }
  return all;
}

// ---- statistics per channel of rows that are positions ---------------------------------------------------
// Asks for elements that are read later. To the second cache: of rows that are a multiple of a large power of
// two apart, which share a few places of the first, the first would hold too few.
template <class T>
FASTREG_INLINE void ask_for(const T* at, int64_t elements) {
  for (int64_t b = 0; b < elements * static_cast<int64_t>(sizeof(T)); b += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(at) + b, 0, 2);
}

// How many rows ahead, of `width` elements: hardware does not see where parts of rows go on.
template <class T>
FASTREG_INLINE int64_t rows_ahead(int64_t width) {
  return std::max(kRun, 4 * kAhead / std::max<int64_t>(width * static_cast<int64_t>(sizeof(T)), 1));
}

// As moments_of_block, for each channel.
template <class T, class A>
void moments_of_columns(const T* x, int64_t stride, int64_t rows, int64_t channels, A* work, double* mean,
                        double* m2) {
  constexpr int64_t L = lanes<A>;
  const int64_t slots = slots_for<A>(channels), lead = (rows + 7) / 8, valid = std::min(L, channels);
  A *pivot = work, *sum = pivot + slots, *square = sum + slots;
  std::fill(work, work + 3 * slots, A(0));
  const T* ahead = x + rows_ahead<T>(channels) * stride;
  for (int64_t first = 0; first < lead; first += kRun) {
    const int64_t run = std::min(kRun, lead - first);
    const T* from = x + first * stride;
    over_row<A>(
        channels,
        [&](int64_t c) {
          Vec<A> a = load(pivot + c), b = load(pivot + c + L);
          for (int64_t r = 0; r < run; ++r) {
            ask_for(ahead + (first + r) * stride + c, 2 * L);
            const auto v = load_two(from + r * stride + c);
            a += v.first, b += v.second;
          }
          store(pivot + c, a), store(pivot + c + L, b);
        },
        [&](int64_t c, int64_t slot) {
          Vec<A> a = load(pivot + slot);
          for (int64_t r = 0; r < run; ++r) a += load_part<T, A>(from + r * stride + c, valid, A(0));
          store(pivot + slot, a);
        });
  }
  for (int64_t slot = 0; slot < slots; ++slot) pivot[slot] /= static_cast<A>(lead);
  for (int64_t first = 0; first < rows; first += kRun) {
    const int64_t run = std::min(kRun, rows - first);
    const T* from = x + first * stride;
    const auto join = [&](int64_t slot, Vec<A> s, Vec<A> q) {
      store(sum + slot, load(sum + slot) + s);
      store(square + slot, load(square + slot) + q);
    };
    over_row<A>(
        channels,
        [&](int64_t c) {
          const Vec<A> at = load(pivot + c), at_b = load(pivot + c + L);
          Vec<A> s{}, q{}, s_b{}, q_b{};
          for (int64_t r = 0; r < run; ++r) {
            ask_for(ahead + (first + r) * stride + c, 2 * L);
            const auto v = load_two(from + r * stride + c);
            const Vec<A> d = v.first - at, d_b = v.second - at_b;
            s += d, s_b += d_b;
            q += d * d, q_b += d_b * d_b;
          }
          join(c, s, q), join(c + L, s_b, q_b);
        },
        [&](int64_t c, int64_t slot) {
          const Vec<A> at = load(pivot + slot);
          Vec<A> s{}, q{};
          for (int64_t r = 0; r < run; ++r) {
            const Vec<A> d = load_part<T, A>(from + r * stride + c, valid, A(0)) - at;
            s += d;
            q += d * d;
          }
          join(slot, s, q);
        });
  }
  const double count = static_cast<double>(rows), share = 1 / count;
  each_slot<T, A>(channels, [&](int64_t c, int64_t slot) {
    const double s = sum[slot], q = square[slot];
    mean[c] = pivot[slot] + s * share;
    m2[c] = std::max(q - s * s * share, 0.0);
    if (q <= std::numeric_limits<A>::max()) return;
    double total = 0, deviations = 0;  // squares overflowed
    for (int64_t r = 0; r < rows; ++r) total += static_cast<double>(x[r * stride + c]);
    for (int64_t r = 0; r < rows; ++r) {
      const double d = static_cast<double>(x[r * stride + c]) - total * share;
      deviations += d * d;
    }
    mean[c] = total * share;
    m2[c] = deviations;
  });
}

template <class T, class A>
void moments_typed(const GroupNorm<A>& call, int64_t unit, int64_t begin, int64_t end) {
  std::vector<A> work(call.last ? 3 * slots_for<A>(call.width()) : 0);
  for (int64_t part = begin; part < end; ++part) {
    double* slot = call.moments_slot(unit, part);
    if (call.last) {
      const Slab slab = slab_of(call, unit);
      const int64_t first = part * call.rows_per_part,
                    rows = std::min(call.rows_per_part, call.positions - first);
      moments_of_columns<T, A>(call.input.template at<T>(slab.n, first) + slab.channel, call.input.row, rows,
                               slab.width, work.data(), slot, slot + call.width());
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
      const Moments<double> own{static_cast<double>(p.rows * (p.end - p.begin)), slot[0], slot[1]};
      all = part == 0 ? own : merge(all, own);
    }
    store_statistics(call, unit, all);
    return;
  }
  const Slab slab = slab_of(call, unit);
  for (int64_t g = 0; g < slab.groups; ++g) {
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
        m2 += slot[call.width() + c] + count * d * d;
      }
      all = merge(all, {count * static_cast<double>(n), mean, m2});
    }
    store_statistics(call, slab.n * call.groups + slab.group + g, all);
  }
}

// ---- y ---------------------------------------------------------------------------------------------------
template <class T, class V>
FASTREG_INLINE void store_part(T* to, V v, int64_t valid) {
  if (valid == static_cast<int64_t>(sizeof(v) / sizeof(v[0])))
    store(to, v);
  else
    store_first(to, v, valid);
}

// Past the caches, where that is asked for and the address allows it. Not for rows that end in a vector that
// reaches back: it would wait for a line that is on its way to memory.
template <class T, class V>
FASTREG_INLINE void write_two(T* to, Two<V> v, bool stream) {
#if FASTREG_VECTOR_BYTES >= 32
  constexpr bool whole = sizeof(T) == sizeof(v.first[0]);
  if constexpr (whole || std::is_same_v<T, BFloat16>) {
    if (stream && reinterpret_cast<uintptr_t>(to) % FASTREG_VECTOR_BYTES == 0) {
      using A = std::decay_t<decltype(v.first[0])>;
      V parts[2] = {v.first, v.second};
      if constexpr (!whole) store_two<false>(reinterpret_cast<T*>(parts), v);
      for (int k = 0; k < (whole ? 2 : 1); ++k)
        store_past_caches(reinterpret_cast<A*>(to) + k * lanes<A>, parts[k]);
      return;
    }
  }
#endif
  store_two<false>(to, v);
}

// Rows of a tensor from one of its elements on.
template <class T>
struct Run {
  T* data;
  int64_t row;

  __attribute__((always_inline)) T* at(int64_t k, int64_t i) const { return data + k * row + i; }
};

template <class T>
Run<T> run_at(const Rows& rows, int64_t n, int64_t r, int64_t offset) {
  return {rows.data ? rows.at<T>(n, r) + offset : nullptr, rows.row};
}

// The rows of a unit from its r-th on, where they are channels from their element `offset` on; nothing if
// `unit` is negative.
template <class T, class A>
Run<const T> run_of(const GroupNorm<A>& call, const Rows& rows, int64_t unit, int64_t r, int64_t offset) {
  if (unit < 0) return {};
  if (!call.last)
    return run_at<const T>(rows, unit / call.groups, unit % call.groups * call.per_group() + r, offset);
  const Slab slab = slab_of(call, unit);
  return run_at<const T>(rows, slab.n, r, slab.channel);
}

// Columns of per-channel values of a unit, in slots.
template <class T, class A, int n>
struct Tables {
  int64_t slots;
  std::vector<A> values;

  // f(channel, its n values)
  template <class F>
  Tables(int64_t width, F f) : slots(slots_for<A>(width)), values(n * slots) {
    each_slot<T, A>(width, [&](int64_t c, int64_t slot) {
      A of[n];
      f(c, of);
      for (int i = 0; i < n; ++i) values[i * slots + slot] = of[i];
    });
  }
  __attribute__((always_inline)) Vec<A> get(int i, int64_t slot) const {
    return load(values.data() + i * slots + slot);
  }
};

// The first n lanes of a, the others of b.
template <class A>
FASTREG_INLINE Vec<A> joined(Vec<A> a, Vec<A> b, int64_t n) {
  Int<A> lane;
  for (int64_t i = 0; i < lanes<A>; ++i) lane[i] = i;
  return lane < static_cast<std::decay_t<decltype(lane[0])> >(n) ? a : b;
}

template <class A>
struct Affine {
  Vec<A> mean, scale, bias;
  __attribute__((always_inline)) Vec<A> operator()(Vec<A> x) const { return (x - mean) * scale + bias; }
  __attribute__((always_inline)) Affine until(int64_t n, const Affine& next) const {
    return {mean, joined<A>(scale, next.scale, n), joined<A>(bias, next.bias, n)};
  }
};

// Whether a group of channels that are no whole number of vectors lies end to end in `read` and in what is
// written from `to` on, and makes whole vectors itself: then vectors that belong to two channels let it
// bypass the caches.
template <class T, class A>
bool end_to_end(const GroupNorm<A>& call, bool stream, std::initializer_list<Rows> read, const Rows& written,
                const T* to) {
  constexpr int64_t L = lanes<A>;
  const int64_t n = call.positions;
  if (FASTREG_VECTOR_BYTES < 32 || sizeof(T) != sizeof(A) || !stream || call.pieces > 1) return false;
  if (n < L || n % L == 0 || call.per_group() * n % L || written.row != n) return false;
  for (const Rows& rows : read)
    if (rows.data && rows.row != n) return false;
  return reinterpret_cast<uintptr_t>(to) % FASTREG_VECTOR_BYTES == 0;
}

// f(i, terms) for the vectors that begin in the k-th of a group's channels, which lie end to end. terms(k)
// are a channel's; the last vector may reach into the next channel.
template <class A, class Terms, class F>
FASTREG_INLINE void vectors_of_channel(int64_t k, int64_t n, Terms terms, F f) {
  constexpr int64_t L = lanes<A>;
  const int64_t end = (k + 1) * n;
  const auto own = terms(k);
  int64_t i = slots_for<A>(k * n);
  for (; i + L <= end; i += L) f(i, own);
  if (i < end) f(i, own.until(end - i, terms(k + 1)));
}

// `rows` rows of n elements; at(slot) gives the Affine. With an activation there is too much to do for the
// hardware to look far ahead: the rows `ahead` are asked for, unless they are nothing.
template <int act, class T, class A, class At>
FASTREG_INLINE void apply_rows(Run<const T> x, Run<const T> residual, Run<T> y, int64_t rows, int64_t n,
                               bool stream, Run<const T> ahead, At at) {
  constexpr int64_t L = lanes<A>;
  using M = Math<T>;
  stream = stream && n % L == 0;
  over_row<A>(
      n,
      [&](int64_t i) {
        const auto &first = at(i), &second = at(i + L);
        for (int64_t k = 0; k < rows; ++k) {
          if (act != kNone && ahead.data) ask_for(ahead.at(k, i), 2 * L);
          auto v = load_two(x.at(k, i));
          v = {first(v.first), second(v.second)};
          if (residual.data) {
            const auto r = load_two(residual.at(k, i));
            v = {v.first + r.first, v.second + r.second};
          }
          write_two(y.at(k, i), Two<Vec<A> >{activate<act, M>(v.first), activate<act, M>(v.second)}, stream);
        }
      },
      [&](int64_t i, int64_t slot) {
        const auto& of = at(slot);
        const int64_t valid = std::min(L, n);
        for (int64_t k = 0; k < rows; ++k) {
          Vec<A> z = of(load_part<T, A>(x.at(k, i), valid, A(0)));
          if (residual.data) z += load_part<T, A>(residual.at(k, i), valid, A(0));
          store_part(y.at(k, i), activate<act, M>(z), valid);
        }
      });
}

// `next`: the unit that this thread takes up next, to ask for it while this one is finished; -1 for none.
template <int act, class T, class A>
void apply_typed(const GroupNorm<A>& call, int64_t unit, int64_t begin, int64_t end, int64_t next) {
  if (call.last) {
    const Slab slab = slab_of(call, unit);
    const Tables<T, A, 3> table(slab.width, [&](int64_t i, A(&of)[3]) {
      const int64_t c = slab.channel + i, group = slab.n * call.groups + c / call.per_group();
      of[0] = call.mean[group], of[1] = call.scale(group, c), of[2] = call.bias[c];
    });
    const int64_t skip = call.cached ? 0 : rows_ahead<T>(slab.width);
    for (int64_t part = end; part-- > begin;) {  // what was read last is still in the cache
      const int64_t first = part * call.rows_per_part;
      const int64_t rows = std::min(call.rows_per_part, call.positions - first);
      for (int64_t r = first; r < first + rows; r += kRun)
        apply_rows<act, T, A>(run_at<const T>(call.input, slab.n, r, slab.channel),
                              run_at<const T>(call.residual, slab.n, r, slab.channel),
                              run_at<T>(call.output, slab.n, r, slab.channel),
                              std::min(kRun, first + rows - r), slab.width, call.stream,
                              run_of<T>(call, call.input, call.cached ? next : unit, r + skip, 0),
                              [&](int64_t slot) {
                                return Affine<A>{table.get(0, slot), table.get(1, slot), table.get(2, slot)};
                              });
    }
    return;
  }
  const auto terms = [&](int64_t c) {
    return Affine<A>{splat(call.mean[unit]), splat(call.scale(unit, c)), splat(call.bias[c])};
  };
  if constexpr (std::is_same_v<T, A>) {
    const int64_t n = unit / call.groups, first = unit % call.groups * call.per_group();
    T* const to = run_at<T>(call.output, n, first, 0).data;
    if (end_to_end<T>(call, call.stream, {call.input, call.residual}, call.output, to)) {
      const T* const x = run_at<T>(call.input, n, first, 0).data;
      const T* const residual = run_at<T>(call.residual, n, first, 0).data;
      const T* const ahead = act == kNone ? nullptr : run_of<T>(call, call.input, next, 0, 0).data;
      for (int64_t part = end; part-- > begin;) {
        const Piece p = piece_of(call, unit, part);
        for (int64_t k = p.first - first; k < p.first - first + p.rows; ++k)
          vectors_of_channel<A>(
              k, call.positions, [&](int64_t k) { return terms(first + k); },
              [&](int64_t i, const Affine<A>& of) {
                if (ahead) ask_for(ahead + i, lanes<A>);
                Vec<A> z = of(load(x + i));
                if (residual) z += load(residual + i);
                store_past_caches(to + i, activate<act, Math<T> >(z));
              });
      }
      return;
    }
  }
  for (int64_t part = end; part-- > begin;) {
    const Piece p = piece_of(call, unit, part);
    for (int64_t c = p.first; c < p.first + p.rows; ++c) {
      const Affine<A> of = terms(c);
      apply_rows<act, T, A>(run_at<const T>(call.input, p.n, c, p.begin),
                            run_at<const T>(call.residual, p.n, c, p.begin),
                            run_at<T>(call.output, p.n, c, p.begin), 1, p.end - p.begin, call.stream,
                            run_of<T>(call, call.input, next, c - p.g * call.per_group(), p.begin),
                            [&](int64_t) -> const Affine<A>& { return of; });
    }
  }
}

// ---- dz, Σ dz and Σ dz·(x − mean) per channel ----------------------------------------------------------
// x − mean and dz of some elements.
template <class A>
struct Derived {
  Vec<A> centred, dz;
};

template <class A>
struct Sums {
  Vec<A> dz{}, dz_x{};
  __attribute__((always_inline)) void add(const Derived<A>& of) { dz += of.dz, dz_x += of.dz * of.centred; }
  __attribute__((always_inline)) void operator+=(const Sums& other) { dz += other.dz, dz_x += other.dz_x; }
};

template <class A>
struct Channel {
  Vec<A> mean, scale, bias;

  template <int act, class T>
  __attribute__((always_inline)) Derived<A> derive(Vec<A> x, Vec<A> dy, Vec<A> residual) const {
    const Vec<A> centred = x - mean;
    if constexpr (act != kNone)
      dy = activation_gradient<act, Math<T> >(dy, centred * scale + bias + residual);
    return {centred, dy};
  }
};

// Where dz goes: to the scratch, in slots, or to a tensor as it lies there, or nowhere.
template <class D, bool kept>
struct Target {
  Run<D> to;

  template <class V>
  __attribute__((always_inline)) void put(int64_t k, int64_t i, Two<V> v) const {
    if constexpr (kept)
      store(to.at(k, i), v.first), store(to.at(k, i) + sizeof(V) / sizeof(D), v.second);
    else if (to.data)
      store_two<false>(to.at(k, i), v);
  }
  template <class V>
  __attribute__((always_inline)) void put(int64_t k, int64_t i, int64_t slot, V v, int64_t valid) const {
    if constexpr (kept)
      store(to.at(k, slot), v);
    else if (to.data)
      store_part(to.at(k, i), v, valid);
  }
};

// The rows that sums are taken of.
template <class T, class A, class To>
struct Sources {
  Run<const T> x, dy, residual;
  To to;

  template <int act>
  __attribute__((always_inline)) void add_two(int64_t k, int64_t i, const Channel<A>& a, const Channel<A>& b,
                                              Sums<A>& sums_a, Sums<A>& sums_b) const {
    const auto v = load_two(x.at(k, i)), g = load_two(dy.at(k, i));
    Two<Vec<A> > r{};
    if (act != kNone && residual.data) {
      const auto loaded = load_two(residual.at(k, i));
      r = {loaded.first, loaded.second};
    }
    const auto first = a.template derive<act, T>(v.first, g.first, r.first);
    const auto second = b.template derive<act, T>(v.second, g.second, r.second);
    if constexpr (act != kNone) to.put(k, i, Two<Vec<A> >{first.dz, second.dz});
    sums_a.add(first), sums_b.add(second);
  }
  // Of `valid` elements, where dy, and so dz, is 0 beyond them.
  template <int act>
  __attribute__((always_inline)) Derived<A> derive_one(int64_t k, int64_t i, int64_t slot, int64_t valid,
                                                       const Channel<A>& of) const {
    Vec<A> r{};
    if (act != kNone && residual.data) r = load_part<T, A>(residual.at(k, i), valid, A(0));
    const auto derived = of.template derive<act, T>(load_part<T, A>(x.at(k, i), valid, A(0)),
                                                    load_part<T, A>(dy.at(k, i), valid, A(0)), r);
    if constexpr (act != kNone) to.put(k, i, slot, derived.dz, valid);
    return derived;
  }
};

template <int act, class T, class A, class To>
void sums_of_run(Sources<T, A, To> from, int64_t n, Channel<A> channel, double* out) {
  constexpr int64_t L = lanes<A>;
  out[0] = out[1] = 0;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t end = std::min(first + kBlock, n);
    Sums<A> sums[2];
    int64_t i = first;
    for (; i + 2 * L <= end; i += 2 * L) {
      // With an activation there is too much to do for the hardware to look far ahead.
      for (int64_t b = 0; act != kNone && b < 2 * L * int64_t{sizeof(T)}; b += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(from.x.at(0, i)) + b + kAhead);
        __builtin_prefetch(reinterpret_cast<const char*>(from.dy.at(0, i)) + b + kAhead);
      }
      from.template add_two<act>(0, i, channel, channel, sums[0], sums[1]);
    }
    for (; i < end; i += L) {
      const int64_t start = i + L <= n ? i : std::max<int64_t>(n - L, 0);
      auto derived = from.template derive_one<act>(0, start, i, std::min(L, n), channel);
      if (start < i) derived.dz = is_first<A>(i - start) ? Vec<A>{} : derived.dz;  // these are summed already
      sums[1].add(derived);
    }
    sums[0] += sums[1];
    out[0] += horizontal_sum(sums[0].dz);
    out[1] += horizontal_sum(sums[0].dz_x);
  }
}

// `rows` rows; at(slot) gives the Channel. Sums join `sum` and `sum_x`, in slots.
template <int act, class T, class A, class To, class At>
FASTREG_INLINE void sums_of_rows(const Sources<T, A, To>& from, int64_t rows, int64_t width, At at, A* sum,
                                 A* sum_x) {
  constexpr int64_t L = lanes<A>;
  const int64_t skip = rows_ahead<T>(2 * width);
  const auto join = [&](int64_t slot, const Sums<A>& sums) {
    store(sum + slot, load(sum + slot) + sums.dz);
    store(sum_x + slot, load(sum_x + slot) + sums.dz_x);
  };
  over_row<A>(
      width,
      [&](int64_t c) {
        const auto &a = at(c), &b = at(c + L);
        Sums<A> sums_a, sums_b;
        for (int64_t k = 0; k < rows; ++k) {
          ask_for(from.x.at(k + skip, c), 2 * L);
          ask_for(from.dy.at(k + skip, c), 2 * L);
          from.template add_two<act>(k, c, a, b, sums_a, sums_b);
        }
        join(c, sums_a), join(c + L, sums_b);
      },
      [&](int64_t c, int64_t slot) {
        const auto& of = at(slot);
        Sums<A> sums;
        for (int64_t k = 0; k < rows; ++k) {
          ask_for(from.x.at(k + skip, c), 1);
          ask_for(from.dy.at(k + skip, c), 1);
          sums.add(from.template derive_one<act>(k, c, slot, std::min(L, width), of));
        }
        join(slot, sums);
      });
}

template <int act, class T, class A, bool kept>
void sums_typed(const GroupNorm<A>& call, int64_t unit, int64_t begin, int64_t end, A* scratch) {
  using D = std::conditional_t<kept, A, T>;
  using From = Sources<T, A, Target<D, kept> >;
  const int64_t scratch_row = call.scratch_row();
  const auto target = [&](int64_t n, int64_t r, int64_t offset, int64_t scratch_at) -> Target<D, kept> {
    if constexpr (kept)
      return {{scratch + scratch_at, scratch_row}};
    else
      return {run_at<T>(call.dz, n, r, offset)};
  };
  if (call.last) {
    const Slab slab = slab_of(call, unit);
    const Tables<T, A, 3> table(slab.width, [&](int64_t i, A(&of)[3]) {
      const int64_t c = slab.channel + i, group = slab.n * call.groups + c / call.per_group();
      of[0] = call.mean[group], of[1] = call.scale(group, c), of[2] = call.bias[c];
    });
    std::vector<A> work(2 * table.slots);
    A *sum = work.data(), *sum_x = sum + table.slots;
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * call.rows_per_part,
                    rows = std::min(call.rows_per_part, call.positions - first);
      std::fill(work.begin(), work.end(), A(0));
      for (int64_t r = first; r < first + rows; r += kRun)
        sums_of_rows<act>(
            From{run_at<const T>(call.input, slab.n, r, slab.channel),
                 run_at<const T>(call.grad_output, slab.n, r, slab.channel),
                 run_at<const T>(call.residual, slab.n, r, slab.channel),
                 target(slab.n, r, slab.channel, r * scratch_row)},
            std::min(kRun, first + rows - r), slab.width,
            [&](int64_t slot) {
              return Channel<A>{table.get(0, slot), table.get(1, slot), table.get(2, slot)};
            },
            sum, sum_x);
      double *out = call.sums_slot(unit, part), *out_x = out + call.width();
      each_slot<T, A>(slab.width,
                      [&](int64_t c, int64_t slot) { out[c] = sum[slot], out_x[c] = sum_x[slot]; });
    }
    return;
  }
  for (int64_t part = begin; part < end; ++part) {
    const Piece p = piece_of(call, unit, part);
    const int64_t first = p.g * call.per_group();
    for (int64_t c = p.first; c < p.first + p.rows; ++c)
      sums_of_run<act>(From{run_at<const T>(call.input, p.n, c, p.begin),
                            run_at<const T>(call.grad_output, p.n, c, p.begin),
                            run_at<const T>(call.residual, p.n, c, p.begin),
                            target(p.n, c, p.begin, (c - first) * scratch_row + p.begin)},
                       p.end - p.begin,
                       Channel<A>{splat(call.mean[unit]), splat(call.scale(unit, c)), splat(call.bias[c])},
                       call.sums_slot(p.n, c, p.piece));
  }
}

template <class A>
void finish_group(const GroupNorm<A>& call, int64_t n, int64_t g) {
  double m1 = 0, m2 = 0;
  const int64_t group = n * call.groups + g;
  for (int64_t c = g * call.per_group(); c < (g + 1) * call.per_group(); ++c) {
    call.sum_dz_x(n)[c] *= call.rstd[group];  // of x − mean until here
    m1 += call.weight[c] * call.sum_dz(n)[c];
    m2 += call.weight[c] * call.sum_dz_x(n)[c];
  }
  const double scale = call.group_size() == 1 ? 0 : call.rstd[group] / call.group_size();
  call.terms[group] = static_cast<A>(scale * m1);
  call.terms[call.samples * call.groups + group] = static_cast<A>(scale * m2);
}

template <class A>
void finish_sums(const GroupNorm<A>& call, int64_t unit) {
  if (call.last) {
    const Slab slab = slab_of(call, unit);
    double *dz = call.sum_dz(slab.n) + slab.channel, *dz_x = call.sum_dz_x(slab.n) + slab.channel;
    std::fill(dz, dz + slab.width, 0.0);
    std::fill(dz_x, dz_x + slab.width, 0.0);
    for (int64_t part = 0; part < call.parts(); ++part) {
      const double *slot = call.sums_slot(unit, part), *slot_x = slot + call.width();
      for (int64_t c = 0; c < slab.width; ++c) dz[c] += slot[c], dz_x[c] += slot_x[c];
    }
    for (int64_t g = slab.group; g < slab.group + slab.groups; ++g) finish_group(call, slab.n, g);
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

// ---- dx --------------------------------------------------------------------------------------------------
// With an activation dz is made of dy, its argument, again.
template <class A, int act = kNone>
struct BackTerms {
  Vec<A> mean, rstd, scale, m1, m2, bias{};
  __attribute__((always_inline)) Vec<A> operator()(Vec<A> x, Vec<A> dz) const {
    if constexpr (act != kNone)
      dz = Channel<A>{mean, scale, bias}.template derive<act, A>(x, dz, Vec<A>{}).dz;
    return (dz * scale - m1) - (x - mean) * rstd * m2;
  }
  __attribute__((always_inline)) BackTerms until(int64_t n, const BackTerms& next) const {
    return {mean, rstd, joined<A>(scale, next.scale, n), m1, m2};
  }
};

// `rows` rows of n elements; at(slot) gives the BackTerms. Asks for what lies `skip` rows further on, unless
// that is 0. dz may be dx itself: the vector that reaches back is computed before the one it reaches into is
// written.
template <class T, bool kept, class A, class D, class At>
FASTREG_INLINE void gradient_rows(Run<const T> x, Run<D> dz, Run<T> dx, int64_t rows, int64_t n, bool stream,
                                  int64_t skip, At at) {
  constexpr int64_t L = lanes<A>;
  stream = stream && n % L == 0;
  const int64_t whole = n - n % L, tail = std::max<int64_t>(n - L, 0), valid = std::min(L, n);
  const auto dz_of = [&](int64_t k, int64_t i, int64_t slot, int64_t valid) {
    if constexpr (kept)
      return load(dz.at(k, slot));
    else
      return load_part<T, A>(dz.at(k, i), valid, A(0));
  };
  Vec<A> last[kRun];
  if (whole < n) {
    const auto& of = at(whole);
    for (int64_t k = 0; k < rows; ++k)
      last[k] = of(load_part<T, A>(x.at(k, tail), valid, A(0)), dz_of(k, tail, whole, valid));
  }
  over_row<A>(
      whole,
      [&](int64_t i) {
        const auto &first = at(i), &second = at(i + L);
        for (int64_t k = 0; k < rows; ++k) {
          if (skip) ask_for(x.at(k + skip, i), 2 * L), ask_for(dz.at(k + skip, i), 2 * L);
          const auto v = load_two(x.at(k, i)), g = load_two(dz.at(k, i));
          write_two(dx.at(k, i), Two<Vec<A> >{first(v.first, g.first), second(v.second, g.second)}, stream);
        }
      },
      [&](int64_t i, int64_t slot) {
        const auto& of = at(slot);
        for (int64_t k = 0; k < rows; ++k) store(dx.at(k, i), of(load(x.at(k, i)), dz_of(k, i, slot, L)));
      });
  if (whole < n)
    for (int64_t k = 0; k < rows; ++k) store_part(dx.at(k, tail), last[k], valid);
}

template <int act, class T, class A, bool kept>
void apply_backward_typed(const GroupNorm<A>& call, int64_t unit, int64_t begin, int64_t end,
                          const A* scratch) {
  using D = std::conditional_t<kept, const A, const T>;
  // What lies in dx as dz is in the caches already.
  const bool stream = call.stream && (kept || call.dz.data != call.grad_input.data);
  const A *m1 = call.terms.get(), *m2 = m1 + call.samples * call.groups;
  // With one element in a group x̂ is 0, and dx too, exactly.
  const auto rstd_of = [&](int64_t group) { return call.group_size() == 1 ? A(0) : call.rstd[group]; };
  const int64_t scratch_row = call.scratch_row();
  const auto source = [&](int64_t n, int64_t r, int64_t offset, int64_t scratch_at) -> Run<D> {
    if constexpr (kept)
      return {scratch + scratch_at, scratch_row};
    else
      return run_at<D>(act == kNone ? call.dz : call.grad_output, n, r, offset);
  };
  if (act != kNone || call.last) {
    const Slab slab = slab_of(call, unit);
    const Tables<T, A, 6> table(slab.width, [&](int64_t i, A(&of)[6]) {
      const int64_t c = slab.channel + i, group = slab.n * call.groups + c / call.per_group();
      of[0] = call.mean[group], of[1] = rstd_of(group), of[2] = rstd_of(group) * call.weight[c];
      of[3] = m1[group], of[4] = m2[group], of[5] = call.bias[c];
    });
    const int64_t skip = call.cached ? 0 : rows_ahead<T>(2 * slab.width);
    for (int64_t part = end; part-- > begin;) {
      const int64_t first = part * call.rows_per_part;
      const int64_t rows = std::min(call.rows_per_part, call.positions - first);
      for (int64_t r = first; r < first + rows; r += kRun)
        gradient_rows<T, kept, A>(
            run_at<const T>(call.input, slab.n, r, slab.channel),
            source(slab.n, r, slab.channel, r * scratch_row),
            run_at<T>(call.grad_input, slab.n, r, slab.channel), std::min(kRun, first + rows - r), slab.width,
            stream, skip, [&](int64_t slot) {
              return BackTerms<A, act>{table.get(0, slot), table.get(1, slot), table.get(2, slot),
                                       table.get(3, slot), table.get(4, slot), table.get(5, slot)};
            });
    }
    return;
  }
  const auto terms_of = [&](int64_t c) {
    return BackTerms<A>{splat(call.mean[unit]), splat(rstd_of(unit)), splat(rstd_of(unit) * call.weight[c]),
                        splat(m1[unit]), splat(m2[unit])};
  };
  if constexpr (std::is_same_v<T, A> && !kept) {
    const int64_t n = unit / call.groups, first = unit % call.groups * call.per_group();
    T* const to = run_at<T>(call.grad_input, n, first, 0).data;
    if (end_to_end<T>(call, stream, {call.input, call.dz}, call.grad_input, to)) {
      const T *const x = run_at<T>(call.input, n, first, 0).data, *const dz =
                                                                      run_at<T>(call.dz, n, first, 0).data;
      for (int64_t part = end; part-- > begin;) {
        const Piece p = piece_of(call, unit, part);
        for (int64_t k = p.first - first; k < p.first - first + p.rows; ++k)
          vectors_of_channel<A>(
              k, call.positions, [&](int64_t k) { return terms_of(first + k); },
              [&](int64_t i, const BackTerms<A>& of) {
                store_past_caches(to + i, of(load(x + i), load(dz + i)));
              });
      }
      return;
    }
  }
  for (int64_t part = end; part-- > begin;) {
    const Piece p = piece_of(call, unit, part);
    for (int64_t c = p.first; c < p.first + p.rows; ++c) {
      const BackTerms<A> terms = terms_of(c);
      gradient_rows<T, kept, A>(run_at<const T>(call.input, p.n, c, p.begin),
                                source(p.n, c, p.begin, (c - p.g * call.per_group()) * scratch_row + p.begin),
                                run_at<T>(call.grad_input, p.n, c, p.begin), 1, p.end - p.begin, stream, 0,
                                [&](int64_t) -> const BackTerms<A>& { return terms; });
    }
  }
}

// ---- small groups
// A task's groups: `count` from the `first` on, in samples [begin, end).
struct Task {
  int64_t first, count, block, begin, end;
};

template <class A>
Task task_of(const GroupNorm<A>& call, int64_t task) {
  const int64_t block = task / call.chunks(), first = task % call.chunks() * call.small;
  return {first, std::min(call.small, call.groups - first), block, block * kSamples,
          std::min((block + 1) * kSamples, call.samples)};
}

// f(k, r, i, valid) for the vectors of a group, `valid` elements at the i-th of its r-th run; k is 0 or 1.
template <class A, class F>
FASTREG_INLINE void over_group(int64_t runs, int64_t run, F f) {
  constexpr int64_t L = lanes<A>;
  for (int64_t r = 0; r < runs; ++r) {
    int64_t i = 0;
    for (; i + 2 * L <= run; i += 2 * L) f(0, r, i, L), f(1, r, i + L, L);
    if (i + L <= run) f(0, r, i, L), i += L;
    if (i < run) f(1, r, i, run - i);
  }
}

// The same for those of a column.
template <class A, class F>
FASTREG_INLINE void over_column(const GroupNorm<A>& call, int64_t column, F f) {
  constexpr int64_t L = lanes<A>;
  if (call.by_channel) {
    const int64_t end = (column + 1) * call.positions;
    int64_t i = column * call.positions;
    for (; i + 2 * L <= end; i += 2 * L) f(0, 0, i, L), f(1, 0, i + L, L);
    if (i + L <= end) f(0, 0, i, L), i += L;
    if (i < end) f(1, 0, i, end - i);
    return;
  }
  const int64_t i = column * L, valid = std::min(L, call.run() - i);
  if (valid == L)
    for (int64_t r = 0; r < call.depth; ++r) f(0, r, i, L);
  else
    for (int64_t r = 0; r < call.depth; ++r) f(0, r, i, valid);
}

// Values per channel as a table, padded with zeros.
template <class A>
void expand(const GroupNorm<A>& call, const Task& task, const A* of_channel, A* table) {
  const int64_t row = call.columns * lanes<A>, repeat = call.slots_of_channel, n = call.per_group();
  for (int64_t g = 0; g < task.count; ++g) {
    A* to = table + g * row;
    const A* from = of_channel + (task.first + g) * n;
    if (repeat == 1)
      std::copy(from, from + n, to);
    else
      for (int64_t c = 0; c < n; ++c) std::fill(to + c * repeat, to + (c + 1) * repeat, from[c]);
    std::fill(to + n * repeat, to + row, A(0));
  }
}

// A number from which deviations are taken, as in moments_of_block.
template <class T, class A>
FASTREG_INLINE A pivot_of(const T* x, int64_t runs, int64_t run, int64_t step) {
  const int64_t n = runs > 1 ? run : (run + 7) / 8, rows = (runs + 7) / 8;
  if (n == 1) return static_cast<A>(x[0]);
  Vec<A> sum[2] = {};
  over_group<A>(rows, n, [&](int k, int64_t r, int64_t i, int64_t valid) FASTREG_LAMBDA {
    sum[k] += load_part<T, A>(x + r * step + i, valid, A(0));
  });
  return horizontal_sum(sum[0] + sum[1]) / static_cast<A>(rows * n);
}

template <int act, class T, class A>
void small_forward_typed(const GroupNorm<A>& call, int64_t begin, int64_t end) {
  constexpr int64_t L = lanes<A>;
  const int64_t runs = call.runs(), run = call.run(), row = call.columns * L, step = call.input.row;
  const double share = 1 / call.group_size();
  std::vector<A> memory(call.small * (2 * row + 3));
  A *weight = memory.data(), *bias = weight + call.small * row, *pivot = bias + call.small * row;
  A *sum = pivot + call.small, *square = sum + call.small;
  for (int64_t t = begin; t < end; ++t) {
    const Task task = task_of(call, t);
    expand(call, task, call.weight, weight);
    expand(call, task, call.bias, bias);
    for (int64_t n = task.begin; n < task.end; ++n) {
      const T* const x = call.input.template at<T>(n, 0) + task.first * run;
      T* const y = call.output.template at<T>(n, 0) + task.first * run;
      A *mean = call.mean + n * call.groups + task.first, *rstd = call.rstd + n * call.groups + task.first;
      for (int64_t g = 0; g < task.count; ++g) {
        const T* const from = x + g * run;
        const A at = pivot_of<T, A>(from, runs, run, step);
        Vec<A> s[2] = {}, q[2] = {};
        over_group<A>(runs, run, [&](int k, int64_t r, int64_t i, int64_t valid) FASTREG_LAMBDA {
          const Vec<A> d = load_part<T, A>(from + r * step + i, valid, at) - at;
          s[k] += d;
          q[k] += d * d;
        });
        pivot[g] = at, sum[g] = horizontal_sum(s[0] + s[1]), square[g] = horizontal_sum(q[0] + q[1]);
      }
      for (int64_t g = 0; g < task.count; ++g) {
        const double off = sum[g] * share, variance = square[g] * share - off * off;
        mean[g] = static_cast<A>(pivot[g] + off);
        rstd[g] = static_cast<A>(1 / std::sqrt((variance < 0 ? 0 : variance) + call.eps));
      }
      for (int64_t g = 0; g < task.count; ++g) {
        if (square[g] <= std::numeric_limits<A>::max()) continue;
        Moments<double> all{0, 0, 0};  // squares overflowed
        for (int64_t r = 0; r < runs; ++r) all = merge(all, moments_in_double(x + g * run + r * step, run));
        store_statistics(call, n * call.groups + task.first + g, all);
      }
      const int64_t ahead = n + 1 < task.end ? call.input.sample : 0;  // to what is read next
      for (int64_t g = 0; g < task.count; ++g) {
        const T* const from = x + g * run;
        T* const to = y + g * run;
        const A m = mean[g], inverse = rstd[g];
        for (int64_t column = 0; column < call.columns; ++column) {
          const int64_t slot = g * row + column * L;
          const Vec<A> scale = load(weight + slot) * inverse, shift = load(bias + slot);
          over_column(call, column, [&](int, int64_t r, int64_t i, int64_t valid) FASTREG_LAMBDA {
            ask_for(from + r * step + i + ahead, 1);
            const Vec<A> z = (load_part<T, A>(from + r * step + i, valid, A(0)) - m) * scale + shift;
            store_part(to + r * call.output.row + i, activate<act, Math<T> >(z), valid);
          });
        }
      }
    }
  }
}

template <int act, class T, class A>
void small_backward_typed(const GroupNorm<A>& call, int64_t begin, int64_t end) {
  constexpr int64_t L = lanes<A>;
  const int64_t run = call.run(), row = call.columns * L, table = call.small * row;
  const int64_t step = call.input.row, step_dy = call.grad_output.row, step_dx = call.grad_input.row;
  const double share = call.group_size() == 1 ? 0 : 1 / call.group_size();
  std::vector<A> memory(4 * table + 2 * call.small + (act == kNone ? 0 : table * call.depth));
  A *weight = memory.data(), *bias = weight + table, *total = bias + table, *total_x = total + table;
  A *m1 = total_x + table, *m2 = m1 + call.small, *kept = m2 + call.small;  // kept: dz
  for (int64_t t = begin; t < end; ++t) {
    const Task task = task_of(call, t);
    expand(call, task, call.weight, weight);
    if (act != kNone) expand(call, task, call.bias, bias);
    std::fill(total, total + 2 * table, A(0));
    for (int64_t n = task.begin; n < task.end; ++n) {
      const T* const x = call.input.template at<T>(n, 0) + task.first * run;
      const T* const dy = call.grad_output.template at<T>(n, 0) + task.first * run;
      const A* const mean = call.mean + n * call.groups + task.first;
      const A* const rstd = call.rstd + n * call.groups + task.first;
      A* dz = kept;
      for (int64_t g = 0; g < task.count; ++g) {
        const T *const from = x + g * run, *const from_dy = dy + g * run;
        const A m = mean[g], inverse = rstd[g];
        Sums<A> of_group;
        for (int64_t column = 0; column < call.columns; ++column) {
          const int64_t slot = g * row + column * L;
          const Vec<A> w = load(weight + slot), scale = w * inverse;
          Sums<A> sums[2];
          over_column(call, column, [&](int k, int64_t r, int64_t i, int64_t valid) FASTREG_LAMBDA {
            Derived<A> of{load_part<T, A>(from + r * step + i, valid, A(0)) - m,
                          load_part<T, A>(from_dy + r * step_dy + i, valid, A(0))};
            if constexpr (act != kNone) {
              of.dz = activation_gradient<act, Math<T> >(of.dz, of.centred * scale + load(bias + slot));
              store(dz, of.dz), dz += L;
            }
            sums[k].add(of);
          });
          sums[0] += sums[1];
          store(total + slot, load(total + slot) + sums[0].dz);
          store(total_x + slot, load(total_x + slot) + sums[0].dz_x * inverse);
          of_group += {w * sums[0].dz, w * sums[0].dz_x};
        }
        m1[g] = horizontal_sum(of_group.dz), m2[g] = horizontal_sum(of_group.dz_x);
      }
      if (!call.grad_input.data) continue;
      for (int64_t g = 0; g < task.count; ++g) {
        const double scale = share * rstd[g];
        m1[g] = static_cast<A>(scale * m1[g]);
        m2[g] = static_cast<A>(scale * (m2[g] * static_cast<double>(rstd[g])));
      }
      T* const dx = call.grad_input.template at<T>(n, 0) + task.first * run;
      const bool more = n + 1 < task.end;
      const int64_t ahead = more ? call.input.sample : 0, ahead_dy = more ? call.grad_output.sample : 0;
      dz = kept;
      for (int64_t g = 0; g < task.count; ++g) {
        const T *const from = x + g * run, *const from_dy = dy + g * run;
        T* const to = dx + g * run;
        // With one element in a group x̂ is 0, and dx too, exactly.
        const A inverse = share == 0 ? A(0) : rstd[g];
        for (int64_t column = 0; column < call.columns; ++column) {
          const BackTerms<A> terms{splat(mean[g]), splat(inverse),
                                   load(weight + g * row + column * L) * inverse, splat(m1[g]), splat(m2[g])};
          over_column(call, column, [&](int, int64_t r, int64_t i, int64_t valid) FASTREG_LAMBDA {
            ask_for(from + r * step + i + ahead, 1);
            ask_for(from_dy + r * step_dy + i + ahead_dy, 1);
            Vec<A> v;
            if constexpr (act != kNone)
              v = load(dz), dz += L;
            else
              v = load_part<T, A>(from_dy + r * step_dy + i, valid, A(0));
            store_part(to + r * step_dx + i, terms(load_part<T, A>(from + r * step + i, valid, A(0)), v),
                       valid);
          });
        }
      }
    }
    const int64_t per_group = call.per_group(), each = call.slots_of_channel;
    for (int64_t g = 0; g < task.count; ++g)
      for (int64_t c = 0; c < per_group; ++c) {
        const int64_t channel = (task.first + g) * per_group + c, at = g * row + c * each;
        double sum = 0, sum_x = 0;
        for (int64_t k = at; k < at + each; ++k) sum += total[k], sum_x += total_x[k];
        call.sum_dz(task.block)[channel] = sum, call.sum_dz_x(task.block)[channel] = sum_x;
      }
  }
}

// ---- by dtype and activation
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
void apply(const GroupNorm<A>& call, int64_t unit, int64_t begin, int64_t end, int64_t next) {
  by_dtype(call, [&](auto t) {
    by_activation(call, [&]<int act>() { apply_typed<act, decltype(t), A>(call, unit, begin, end, next); });
  });
}

template <class A>
void small_forward(const GroupNorm<A>& call, int64_t begin, int64_t end) {
  by_dtype(call, [&](auto t) {
    by_activation(call, [&]<int act>() { small_forward_typed<act, decltype(t), A>(call, begin, end); });
  });
}

template <class A>
void small_backward(const GroupNorm<A>& call, int64_t begin, int64_t end) {
  by_dtype(call, [&](auto t) {
    by_activation(call, [&]<int act>() { small_backward_typed<act, decltype(t), A>(call, begin, end); });
  });
}

// dz goes to `scratch`, a unit's, unless that is null.
template <class A>
void sums(const GroupNorm<A>& call, int64_t unit, int64_t begin, int64_t end, A* scratch) {
  by_dtype(call, [&](auto t) {
    by_activation(call, [&]<int act>() {
      if (act != kNone && scratch)
        sums_typed<act, decltype(t), A, true>(call, unit, begin, end, scratch);
      else
        sums_typed<act, decltype(t), A, false>(call, unit, begin, end, scratch);
    });
  });
}

template <class A>
void apply_backward(const GroupNorm<A>& call, int64_t unit, int64_t begin, int64_t end, const A* scratch) {
  by_dtype(call, [&](auto t) {
    using T = decltype(t);
    if (scratch) return apply_backward_typed<kNone, T, A, true>(call, unit, begin, end, scratch);
    if constexpr (std::is_same_v<T, float>)
      if (call.repeats)
        return by_activation(call, [&]<int act>() {
          apply_backward_typed<act, T, A, false>(call, unit, begin, end, scratch);
        });
    apply_backward_typed<kNone, T, A, false>(call, unit, begin, end, scratch);
  });
}

}  // namespace fastreg::FASTREG_ISA
#endif
