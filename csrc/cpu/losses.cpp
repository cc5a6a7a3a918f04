// The softmax losses on the CPU. The maths of one row is in losses.h.
//
// A row is cut into blocks of kBlock classes that stay in the first-level cache; the blocks are merged in
// order. Threads share the rows, or the blocks of a row where there are fewer rows than threads; neither
// changes a bit of the result. Where classes are not next to one another in memory but rows are, as in (N, C,
// D), vectors hold neighbouring rows ("columns"), and nothing is transposed. Layouts with neither are
// gathered block by block. The kernels are in losses_rows.h, losses_columns.h and losses_small.h.
#ifndef FASTREG_ISA
#include "losses.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/capability.h"
#include "cpu/elements.h"
#include "cpu/tensors.h"

namespace fastreg {
constexpr int64_t kBlock = 4096;       // classes reduced at a time
constexpr int64_t kShort = 32;         // the most classes of which a vector may hold one in several rows
constexpr int64_t kManyClasses = 256;  // from which on sums of all hide what cancels in one of them
constexpr int64_t kColumns = 256;      // the most rows side by side in a task of the column kernels
constexpr int64_t kTask = 16384;       // elements a task has at least, where there are as many
constexpr int64_t kStream = int64_t{4} << 20;  // bytes of a gradient that bypasses the caches
// Bytes of columns that are walked more than once, so that they stay in the cache.
constexpr int64_t kTileBytes = 262144;

// A vector of C values in the type of the arithmetic.
template <class A>
struct PerClass {
  const A* data = nullptr;
  std::vector<A> copy;

  explicit operator bool() const { return data != nullptr; }
  A at(int64_t c) const { return data ? data[c] : A(1); }
};

// What multiplies the term of each class in a row's loss: nothing but the target has a term; factors that all
// rows have in common (label smoothing), beside that of the target; or factors of each row's own
// (probabilities; in columns smoothing with gamma, too).
enum class Factors { none, of_class, of_row };

// The target classes of a row with their shares. -1 is no class; two that are alike are one.
template <class A>
struct RowTargets {
  bool kept;
  int64_t y[2];
  A share[2];
};

// A part of a row, and the sum of the factors of its classes.
template <class A>
struct Weighted {
  Partial<A> part;
  A weight;
};

// What is known of a row once it has been read.
template <class A>
struct Found {
  Softmax<A> softmax;
  A linear, weight;
  int64_t argmax;
  A slope = 0;  // of the loss by log p, summed over the classes, where each has factors of its own
};

// The sums over classes of factor * focal term and of factor * its slope.
struct TermSums {
  double loss = 0, slope = 0;
};

// What the focal terms of a block follow from for gamma = 2, where (1 - p)^2 is a sum: with d = z - high and
// e = exp(d) the sums of e, d, e * d, e^2 and e^2 * d.
template <class A>
struct Moments {
  A high, e, d, ed, ee, eed;

  // The sums of the focal terms of n classes and of their slopes. (1 - p)^2 loses digits where p is near 1:
  // for many classes, whose terms are most of the sum.
  TermSums terms(int64_t n, const Softmax<A>& softmax) const {
    const double count = static_cast<double>(n);
    if (high == -INFINITY && softmax.high != -INFINITY) return {INFINITY, count};
    const double log_p = (double(high) - softmax.high) - softmax.log_sum, p = exp(log_p);  // where d = 0
    const double once = p * (ed + log_p * e), twice = p * p * (eed + log_p * ee);  // the sums of p^k * log p
    return {2 * once - twice - (d + count * log_p), count - 2 * p * e + p * p * ee - 2 * once + 2 * twice};
  }
};

// factor * term, where a factor of 0 gives 0 even if the term is infinite.
template <class A>
A times(A factor, A term) {
  return factor == 0 ? A(0) : factor * term;
}

// What the tasks of one call share.
template <class A>
struct CrossEntropy {
  // input[o, c, i] has the row (o, i), which is the row_outer * o + row_inner * i -th.
  int64_t outer, classes, inner, row_outer, row_inner;
  const char* input;
  ScalarType dtype;
  int64_t input_outer, input_class, input_inner;

  Elements target;  // class indices or, with a stride of the classes, probabilities
  bool probabilities;
  int64_t target_class;
  Elements other_target, share;  // of pairs
  Factors factors_are;
  PerClass<A> weight, factors, adjustment, margin;  // factors: weight * alpha; the last two times scale
  std::vector<A> block_factors;                     // the sum of the factors in each block of classes
  int64_t ignore_index;
  A smoothing, gamma, alpha_scale, scale, z_loss, total_factors;
  bool plain;                // z is the input
  bool odd_factors = false;  // 0 or not finite, some of them
  bool columns;              // which kernel
  Elements loss, grad_loss;
  A *high, *log_sum;          // the softmax of each row
  A* slopes = nullptr;        // as Found::slope, of each row
  A* losses = nullptr;        // each row's loss, where wanted
  int64_t* argmax = nullptr;  // the class of each row's largest logit, where wanted
  std::atomic<int64_t> bad_row{INT64_MAX};

  int64_t rows_per_task, parts, tasks;  // a task is some rows, or one of the parts of a row
  std::vector<double> sums;             // of each task: the losses, and the weights of the targets
  std::vector<Weighted<A>> partials;    // of each block, where rows are cut
  std::vector<TermSums> block_sums;     // and of each block, where each class has factors of its own
  std::vector<Moments<A>> moments;      // or these instead, if they serve
  std::vector<A> target_z;  // of both targets of each row that is cut, where its logits may be overwritten

  A grad_scale;
  char* grad = nullptr;  // in the forward: make the gradient too
  int64_t grad_outer = 0, grad_class = 0, grad_inner = 0;
  bool stream = false;  // the gradient past the caches

  int64_t rows() const { return outer * inner; }
  int64_t row(int64_t o, int64_t i) const { return o * row_outer + i * row_inner; }
  int64_t blocks() const { return (classes + kBlock - 1) / kBlock; }

  A z(A x, int64_t c) const { return plain ? x : scale * x + (adjustment ? adjustment.data[c] : A(0)); }
  A z_target(A x, int64_t y, A share) const { return margin ? z(x, y) - share * margin.data[y] : z(x, y); }

  // The share of each class's weights, and whether those are the weights of focal terms.
  A spread() const { return smoothing == 0 ? A(0) : alpha_scale * smoothing / static_cast<A>(classes); }
  bool focal_spread() const { return smoothing != 0 && gamma != 0; }

  // Whether one pass over a row gives the focal terms of all classes too.
  bool moments_serve() const {
    return std::is_same_v<A, float> && factors_are == Factors::of_class && focal_spread() && gamma == 2 &&
           classes >= kManyClasses && !factors;
  }

  // The gradient that comes in for a row.
  A grad_of(int64_t o, int64_t i) const {
    return grad_loss.data ? grad_loss.get<A>(grad_loss.at(o, i)) * grad_scale : grad_scale;
  }

  // The terms of a row for its k-th target class, without the focal ones of the others.
  RowTerms<A> terms(const RowTargets<A>& targets, int k) const {
    const A target = (1 - smoothing) * alpha_scale * targets.share[k] * factors.at(targets.y[k]);
    return {target, gamma == 0 ? spread() : A(0), total_factors, gamma, z_loss, scale};
  }

  // Whether y is a class. Remembers the first row where it is neither that nor to be ignored.
  bool is_class(int64_t y, int64_t o, int64_t i) {
    if (y == ignore_index) return false;
    if (y >= 0 && y < classes) return true;
    const int64_t r = row(o, i);
    int64_t first = bad_row.load(std::memory_order_relaxed);
    while (r < first && !bad_row.compare_exchange_weak(first, r, std::memory_order_relaxed)) {
    }
    return false;
  }

  RowTargets<A> targets_of(int64_t o, int64_t i) {
    if (probabilities) return {true, {-1, -1}, {0, 0}};
    const int64_t y = target.get<int64_t>(target.at(o, i));
    bool kept = is_class(y, o, i);
    if (other_target.data == nullptr) return {kept, {y, -1}, {1, 0}};
    const int64_t other = other_target.get<int64_t>(other_target.at(o, i));
    kept &= is_class(other, o, i);
    if (y == other) return {kept, {y, -1}, {1, 0}};
    const A part = share.get<A>(share.at(o, i));
    return {kept, {y, other}, {part, 1 - part}};
  }

  // What a row counts in the mean.
  double count(const RowTargets<A>& targets) const {
    if (probabilities || !weight) return 1;
    const A first = times(targets.share[0], weight.data[targets.y[0]]);
    return targets.y[1] < 0 ? first : first + times(targets.share[1], weight.data[targets.y[1]]);
  }
};

// A call without options on rows of at most kBlock classes that lie next to one another.
template <class A>
struct SmallCrossEntropy {
  const char* input;
  char* grad;
  ScalarType dtype;
  const int64_t* target;
  int64_t rows, classes, input_row, grad_row, target_row, ignore_index, rows_per_task;
  A grad_scale;
  double* sums;  // of each task: the losses
};

}  // namespace fastreg

#define FASTREG_FILE "cpu/losses.cpp"
#include "cpu/foreach_isa.h"

namespace fastreg {
namespace {

using MaybeTensor = std::optional<Tensor>;

template <class A>
void read_classes(PerClass<A>& into, const MaybeTensor& tensor, int64_t classes, A scale = 1) {
  if (!tensor) return;
  const Elements from = elements_of(*tensor, 0, tensor->stride(0));
  if (from.dtype == torch::headeronly::CppTypeToScalarType<A>::value && from.inner == 1 && scale == 1) {
    into.data = reinterpret_cast<const A*>(from.data);
    return;
  }
  into.copy.resize(classes);
  for (int64_t c = 0; c < classes; ++c) into.copy[c] = scale * from.get<A>(c * from.inner);
  into.data = into.copy.data();
}

// The arguments that forward and backward have in common.
struct Options {
  const Tensor &input, &target;
  const MaybeTensor &weight, &alpha, &logit_adjustment, &margin, &other_target, &share;
  int64_t ignore_index, reduction;
  double smoothing, gamma, alpha_scale, scale, z_loss;
};

// What the forward makes besides.
struct Extra {
  bool losses = false, argmax = false;
  MaybeTensor grad;
};

bool is_floating(ScalarType dtype) {
  return dtype != ScalarType::Long && dtype != ScalarType::Int && dtype != ScalarType::Byte;
}

// A tensor with a value per row: (N) or (N, D).
Elements per_row(const Tensor& tensor) {
  return elements_of(tensor, tensor.stride(0), tensor.dim() == 2 ? tensor.stride(1) : 0);
}

// Whether the slope of a row's loss is a sum over its classes, which the backward has from the forward.
bool keeps_slopes(const Options& options) {
  return is_floating(options.target.scalar_type()) || (options.smoothing != 0 && options.gamma != 0);
}

template <class A>
void prepare(CrossEntropy<A>& call, const Options& options, const Tensor& lse) {
  const Tensor& input = options.input;
  const auto sizes = input.sizes(), strides = input.strides();
  const bool three = sizes.size() == 3;
  call.outer = sizes[0], call.classes = sizes[1], call.inner = three ? sizes[2] : 1;
  call.input = static_cast<const char*>(input.const_data_ptr());
  call.dtype = input.scalar_type();
  call.input_outer = strides[0], call.input_class = strides[1], call.input_inner = three ? strides[2] : 0;
  call.row_outer = call.inner, call.row_inner = 1;
  call.probabilities = is_floating(options.target.scalar_type());
  if (call.probabilities) {
    const auto target_strides = options.target.strides();
    call.target = elements_of(options.target, target_strides[0], three ? target_strides[2] : 0);
    call.target_class = target_strides[1];
  } else {
    call.target = per_row(options.target);
    if (options.other_target) {
      call.other_target = per_row(*options.other_target);
      call.share = per_row(*options.share);
    }
  }

  read_classes(call.weight, options.weight, call.classes);
  if (options.alpha) {
    read_classes(call.factors, options.alpha, call.classes);
    if (call.weight) {
      call.factors.copy.resize(call.classes);
      for (int64_t c = 0; c < call.classes; ++c)
        call.factors.copy[c] = call.factors.data[c] * call.weight.data[c];
      call.factors.data = call.factors.copy.data();
    }
  } else {
    call.factors.data = call.weight.data;
  }
  call.scale = static_cast<A>(options.scale);
  read_classes(call.adjustment, options.logit_adjustment, call.classes, call.scale);
  read_classes(call.margin, options.margin, call.classes, call.scale);
  call.plain = call.scale == 1 && !call.adjustment && !call.margin;

  call.ignore_index = options.ignore_index;
  call.smoothing = static_cast<A>(options.smoothing);
  call.gamma = static_cast<A>(options.gamma);
  call.alpha_scale = static_cast<A>(options.alpha_scale);
  call.z_loss = static_cast<A>(options.z_loss);
  call.factors_are = keeps_slopes(options) ? Factors::of_row
                     : call.smoothing != 0 ? Factors::of_class
                                           : Factors::none;
  call.high = static_cast<A*>(lse.data_ptr());
  call.log_sum = call.high + call.rows();
  if (keeps_slopes(options)) call.slopes = call.log_sum + call.rows();
}

template <class A>
void sum_factors(CrossEntropy<A>& call) {
  double total = 0;
  call.block_factors.resize(call.blocks());
  for (int64_t b = 0; b < call.blocks(); ++b) {
    double sum = 0;
    const int64_t begin = b * kBlock, end = std::min(begin + kBlock, call.classes);
    for (int64_t c = begin; c < end; ++c) {
      sum += call.factors.at(c);
      call.odd_factors |= call.factors.at(c) == 0 || call.factors.at(c) * 0 != 0;
    }
    call.block_factors[b] = static_cast<A>(sum);
    total += sum;
  }
  call.total_factors = static_cast<A>(total);
}

template <class A>
void write_gradient(CrossEntropy<A>& call, const Tensor& grad) {
  call.grad = static_cast<char*>(grad.data_ptr());
  call.grad_outer = grad.stride(0), call.grad_class = grad.stride(1);
  call.grad_inner = grad.dim() == 3 ? grad.stride(2) : 0;
  // What takes the place of the logits is in the caches, and wanted there next.
  call.stream = call.grad != call.input && grad.numel() * grad.element_size() >= kStream;
}

// Chooses the kernel and lets rows side by side in memory be the inner ones.
template <class A>
void choose_kernel(CrossEntropy<A>& call) {
  auto dense = [&](int64_t input, int64_t grad) { return input == 1 && (call.grad == nullptr || grad == 1); };
  const bool inner = call.inner > 1 && dense(call.input_inner, call.grad_inner);
  const bool outer = dense(call.input_outer, call.grad_outer);
  call.columns = call.input_class != 1 && call.classes > 1 && (inner || outer);
  if (call.columns && !inner) {
    std::swap(call.outer, call.inner);
    std::swap(call.input_outer, call.input_inner);
    std::swap(call.grad_outer, call.grad_inner);
    std::swap(call.row_outer, call.row_inner);
    for (Elements* each : {&call.target, &call.other_target, &call.share, &call.grad_loss})
      std::swap(each->outer, each->inner);
  }
  call.parts = 1;
  if (!call.columns && !call.probabilities && call.factors_are == Factors::of_row)
    call.factors_are = Factors::of_class;
  call.total_factors = 0;
  if (call.factors_are == Factors::of_class) sum_factors(call);
  if (!call.columns) {
    call.rows_per_task = std::max<int64_t>(1, kTask / std::max<int64_t>(1, call.classes));
    call.tasks = (call.rows() + call.rows_per_task - 1) / call.rows_per_task;
    return;
  }
  call.rows_per_task = kColumns;
  const int64_t bytes = call.classes * 4;
  if (call.grad != nullptr || call.factors_are == Factors::of_row)
    while (call.rows_per_task > 16 && call.rows_per_task * bytes > kTileBytes) call.rows_per_task /= 2;
  call.tasks = call.outer * ((call.inner + call.rows_per_task - 1) / call.rows_per_task);
}

[[noreturn]] void refuse_target(int64_t y, int64_t row, int64_t classes, int64_t ignore_index) {
  throw std::out_of_range("target must hold class indices in [0, " + std::to_string(classes) +
                          ") or ignore_index (" + std::to_string(ignore_index) + "), got " +
                          std::to_string(y) + " in row " + std::to_string(row));
}

template <class A>
void check_targets(CrossEntropy<A>& call) {
  const int64_t r = call.bad_row.load();
  if (r == INT64_MAX) return;
  const int64_t o = call.row_outer == 1 ? r % call.outer : r / call.inner;
  const int64_t i = call.row_outer == 1 ? r / call.outer : r % call.inner;
  int64_t bad = call.target.template get<int64_t>(call.target.at(o, i));
  if (bad == call.ignore_index || call.is_class(bad, o, i))
    bad = call.other_target.template get<int64_t>(call.other_target.at(o, i));
  refuse_target(bad, r, call.classes, call.ignore_index);
}

// What the sum of the losses is divided by: see mean_denominator in fastreg/losses.py.
double denominator_of(const Options& options, double counts, bool zero_if_empty) {
  if (options.reduction != reduction_mean) return 1;
  return counts != 0 ? counts : zero_if_empty ? INFINITY : NAN;
}

bool few(int64_t tasks) { return tasks < 2 * static_cast<int64_t>(torch::stable::get_num_threads()); }

// Long rows are cut for the gradient of each class to have a thread.
template <class A>
void run_backward(CrossEntropy<A>& call) {
  if (!call.columns && call.classes > kTask) {
    call.rows_per_task = 1;
    call.parts = (call.classes + kTask - 1) / kTask;
    call.tasks = call.rows() * call.parts;
    if (call.factors_are != Factors::of_row && call.grad == call.input) FASTREG_PICK(read_targets<A>)(call);
  }
  run(call.tasks, call.rows() * call.classes,
      [&](int64_t begin, int64_t end) { FASTREG_PICK(backward<A>)(call, begin, end); });
}

template <class A>
std::tuple<Tensor, Tensor, Tensor, MaybeTensor, MaybeTensor> forward(const Options& options,
                                                                     bool zero_if_empty, bool fp32_loss,
                                                                     const Extra& extra) {
  constexpr ScalarType arithmetic = torch::headeronly::CppTypeToScalarType<A>::value;
  const auto sizes = options.input.sizes();
  const bool three = sizes.size() == 3, each = options.reduction == reduction_none;
  const ScalarType loss_dtype = fp32_loss ? arithmetic : options.input.scalar_type();
  auto per_row = [&](ScalarType dtype) {
    return three ? new_tensor({sizes[0], sizes[2]}, dtype) : new_tensor({sizes[0]}, dtype);
  };
  const int64_t known = keeps_slopes(options) ? 3 : 2;
  Tensor lse =
      three ? new_tensor({known, sizes[0], sizes[2]}, arithmetic) : new_tensor({known, sizes[0]}, arithmetic);
  Tensor loss = each ? per_row(loss_dtype) : new_tensor({}, loss_dtype);
  Tensor denominator = new_tensor({}, arithmetic);
  MaybeTensor losses, argmax;

  CrossEntropy<A> call;
  prepare(call, options, lse);
  if (each) call.loss = elements_of(loss, 0, 0);
  if (extra.losses) {
    losses = per_row(arithmetic);
    call.losses = static_cast<A*>(losses->data_ptr());
  }
  if (extra.argmax) {
    argmax = per_row(ScalarType::Long);
    call.argmax = static_cast<int64_t*>(argmax->data_ptr());
  }
  if (extra.grad) {
    // Whatever can be wrong is found before anything is written: the gradient may replace the input.
    write_gradient(call, *extra.grad);
    double counts = 0;
    for (int64_t o = 0; o < call.outer; ++o)
      for (int64_t i = 0; i < call.inner; ++i)
        if (const auto targets = call.targets_of(o, i); targets.kept) counts += call.count(targets);
    check_targets(call);
    call.grad_scale = static_cast<A>(1 / denominator_of(options, counts, zero_if_empty));
  }
  choose_kernel(call);
  call.sums.resize(2 * call.tasks);
  const int64_t elements = call.rows() * call.classes, blocks = call.blocks();
  if (!call.columns && blocks > 1 && elements >= 2 * kParallel && few(call.tasks)) {
    call.partials.resize(call.rows() * blocks);
    if (call.moments_serve()) call.moments.resize(call.rows() * blocks);
    run(call.rows() * blocks, elements,
        [&](int64_t begin, int64_t end) { FASTREG_PICK(reduce_blocks<A>)(call, begin, end); });
    if (call.factors_are != Factors::none && call.gamma != 0 && call.moments.empty()) {
      call.block_sums.resize(call.rows() * blocks);
      run(call.rows() * blocks, elements,
          [&](int64_t begin, int64_t end) { FASTREG_PICK(sum_blocks<A>)(call, begin, end); });
    }
    FASTREG_PICK(forward<A>)(call, 0, call.tasks);
  } else {
    run(call.tasks, elements,
        [&](int64_t begin, int64_t end) { FASTREG_PICK(forward<A>)(call, begin, end); });
  }
  check_targets(call);
  const int64_t tasks = call.tasks;
  if (extra.grad && !call.partials.empty()) run_backward(call);

  double total = 0, counts = 0;
  for (int64_t t = 0; t < tasks; ++t) {
    total += call.sums[2 * t];
    counts += call.sums[2 * t + 1];
  }
  const double by = denominator_of(options, counts, zero_if_empty);
  *static_cast<A*>(denominator.data_ptr()) = static_cast<A>(by);
  if (!each) elements_of(loss, 0, 0).put(0, total / by);
  return {loss, lse, denominator, losses, argmax};
}

template <class A>
Tensor backward(const Tensor& grad_loss, const Options& options, const Tensor& lse,
                const Tensor& denominator) {
  Tensor grad = new_like(options.input);
  CrossEntropy<A> call;
  prepare(call, options, lse);
  write_gradient(call, grad);
  call.grad_loss = options.reduction == reduction_none ? per_row(grad_loss) : elements_of(grad_loss, 0, 0);
  call.grad_scale = 1 / *static_cast<const A*>(denominator.const_data_ptr());
  choose_kernel(call);
  run_backward(call);
  check_targets(call);
  return grad;
}

auto forward_of(const Options& options, bool zero_if_empty, bool fp32_loss, const Extra& extra) {
  return options.input.scalar_type() == ScalarType::Double
             ? forward<double>(options, zero_if_empty, fp32_loss, extra)
             : forward<float>(options, zero_if_empty, fp32_loss, extra);
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(
    const Tensor& input, const Tensor& target, MaybeTensor weight, MaybeTensor alpha,
    MaybeTensor logit_adjustment, MaybeTensor margin, MaybeTensor other_target, MaybeTensor share,
    int64_t ignore_index, int64_t reduction, double smoothing, double gamma, double alpha_scale, double scale,
    double z_loss, bool zero_if_empty, bool fp32_loss) {
  const Options options{input,     target,       weight,      alpha,        logit_adjustment,
                        margin,    other_target, share,       ignore_index, reduction,
                        smoothing, gamma,        alpha_scale, scale,        z_loss};
  auto [loss, lse, denominator, losses, argmax] = forward_of(options, zero_if_empty, fp32_loss, {});
  return {loss, lse, denominator};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cross_entropy_forward_extra(
    const Tensor& input, const Tensor& target, MaybeTensor weight, MaybeTensor alpha,
    MaybeTensor logit_adjustment, MaybeTensor margin, MaybeTensor other_target, MaybeTensor share,
    int64_t ignore_index, int64_t reduction, double smoothing, double gamma, double alpha_scale, double scale,
    double z_loss, bool zero_if_empty, bool fp32_loss, bool want_losses, bool want_argmax,
    MaybeTensor grad_input) {
  const Options options{input,     target,       weight,      alpha,        logit_adjustment,
                        margin,    other_target, share,       ignore_index, reduction,
                        smoothing, gamma,        alpha_scale, scale,        z_loss};
  auto [loss, lse, denominator, losses, argmax] =
      forward_of(options, zero_if_empty, fp32_loss, {want_losses, want_argmax, grad_input});
  return {loss, lse, denominator, losses ? *losses : new_tensor({0}, lse.scalar_type()),
          argmax ? *argmax : new_tensor({0}, ScalarType::Long)};
}

Tensor cross_entropy_backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                              MaybeTensor weight, MaybeTensor alpha, MaybeTensor logit_adjustment,
                              MaybeTensor margin, MaybeTensor other_target, MaybeTensor share,
                              const Tensor& lse, const Tensor& denominator, int64_t ignore_index,
                              int64_t reduction, double smoothing, double gamma, double alpha_scale,
                              double scale, double z_loss) {
  const Options options{input,     target,       weight,      alpha,        logit_adjustment,
                        margin,    other_target, share,       ignore_index, reduction,
                        smoothing, gamma,        alpha_scale, scale,        z_loss};
  return input.scalar_type() == ScalarType::Double ? backward<double>(grad_loss, options, lse, denominator)
                                                   : backward<float>(grad_loss, options, lse, denominator);
}

template <class A>
std::tuple<Tensor, Tensor> small(const Tensor& input, const Tensor& target, int64_t ignore_index,
                                 int64_t reduction, bool fp32_loss) {
  const ScalarType dtype = input.scalar_type();
  const Tensor grad = new_tensor({input.size(0), input.size(1)}, dtype);
  Tensor loss = new_tensor({}, fp32_loss ? torch::headeronly::CppTypeToScalarType<A>::value : dtype);
  SmallCrossEntropy<A> call{};
  call.input = static_cast<const char*>(input.const_data_ptr());
  call.grad = static_cast<char*>(grad.data_ptr());
  call.dtype = dtype;
  call.target = static_cast<const int64_t*>(target.const_data_ptr());
  call.rows = input.size(0), call.classes = input.size(1);
  call.input_row = input.stride(0), call.grad_row = grad.stride(0), call.target_row = target.stride(0);
  call.ignore_index = ignore_index;
  int64_t kept = 0;
  for (int64_t r = 0; r < call.rows; ++r) {
    const int64_t y = call.target[r * call.target_row];
    if (y == ignore_index) continue;
    if (y < 0 || y >= call.classes) refuse_target(y, r, call.classes, ignore_index);
    ++kept;
  }
  const double by = reduction == reduction_mean ? static_cast<double>(kept) : 1;
  call.grad_scale = static_cast<A>(1 / by);
  call.rows_per_task = std::max<int64_t>(1, kTask / call.classes);
  std::vector<double> sums((call.rows + call.rows_per_task - 1) / call.rows_per_task);
  call.sums = sums.data();
  run(static_cast<int64_t>(sums.size()), call.rows * call.classes,
      [&](int64_t begin, int64_t end) { FASTREG_PICK(small<A>)(call, begin, end); });
  double total = 0;
  for (const double sum : sums) total += sum;
  elements_of(loss, 0, 0).put(0, total / by);
  return {loss, grad};
}

std::tuple<Tensor, Tensor> cross_entropy_with_gradient(
    const Tensor& input, const Tensor& target, MaybeTensor weight, MaybeTensor alpha,
    MaybeTensor logit_adjustment, MaybeTensor margin, MaybeTensor other_target, MaybeTensor share,
    int64_t ignore_index, int64_t reduction, double smoothing, double gamma, double alpha_scale, double scale,
    double z_loss, bool zero_if_empty, bool fp32_loss) {
  const Options options{input,     target,       weight,      alpha,        logit_adjustment,
                        margin,    other_target, share,       ignore_index, reduction,
                        smoothing, gamma,        alpha_scale, scale,        z_loss};
  const Tensor grad = new_like(input);
  const auto made = forward_of(options, zero_if_empty, fp32_loss, {false, false, grad});
  return {std::get<0>(made), grad};
}

std::tuple<Tensor, Tensor> cross_entropy_small(const Tensor& input, const Tensor& target,
                                               int64_t ignore_index, int64_t reduction, bool fp32_loss) {
  STD_TORCH_CHECK(target.dim() == 1 && target.size(0) == input.size(0) && input.size(1) > 0,
                  "target must have one class index per row, of a class at least");
  if (input.stride(1) != 1 || input.size(1) > kBlock)
    return cross_entropy_with_gradient(input, target, {}, {}, {}, {}, {}, {}, ignore_index, reduction, 0, 0,
                                       1, 1, 0, false, fp32_loss);
  return input.scalar_type() == ScalarType::Double
             ? small<double>(input, target, ignore_index, reduction, fp32_loss)
             : small<float>(input, target, ignore_index, reduction, fp32_loss);
}

void scale_gradient(const Tensor& grad, const Tensor& factor) {
  const double by = elements_of(factor, 0, 0).get<double>(0);
  const int64_t numel = grad.numel(), dims = grad.dim();
  if (by == 1 || numel == 0) return;
  // One run of elements, if the memory has no holes; else one for each place in the dimensions before the
  // last.
  int64_t span = 1;
  for (int64_t d = 0; d < dims; ++d) span += (grad.size(d) - 1) * grad.stride(d);
  const bool whole = span == numel;
  const int64_t n = whole ? numel : grad.size(dims - 1), runs = numel / n;
  const Elements elements = elements_of(grad, 0, whole ? 1 : grad.stride(dims - 1));
  auto scale = [&](int64_t run, int64_t begin, int64_t end) {
    int64_t at = 0;
    for (int64_t d = dims - 2; !whole && d >= 0; run /= grad.size(d--))
      at += run % grad.size(d) * grad.stride(d);
    FASTREG_PICK(scale)(elements, at, begin, end, by);
  };
  const int64_t blocks = (n + kTask - 1) / kTask;
  run(runs * blocks, numel, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % blocks * kTask;
      scale(task / blocks, first, std::min(first + kTask, n));
    }
  });
}

}  // namespace
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg, CPU, m) {
  m.impl("cross_entropy_forward.cpu", TORCH_BOX(&fastreg::cross_entropy_forward));
  m.impl("cross_entropy_forward_extra.cpu", TORCH_BOX(&fastreg::cross_entropy_forward_extra));
  m.impl("cross_entropy_backward.cpu", TORCH_BOX(&fastreg::cross_entropy_backward));
  m.impl("cross_entropy_with_gradient.cpu", TORCH_BOX(&fastreg::cross_entropy_with_gradient));
  m.impl("cross_entropy_small.cpu", TORCH_BOX(&fastreg::cross_entropy_small));
  m.impl("scale_gradient_.cpu", TORCH_BOX(&fastreg::scale_gradient));
}

#else
#include "cpu/simd.h"

namespace fastreg::FASTREG_ISA {
#include "losses_terms.h"

// Vectors summed in one go. In the column kernels kDepth classes of a task's rows stay in the cache.
constexpr int64_t kDepth = 16;

// Keeps the digits of a long sum of terms of either sign (Kahan's compensation).
template <class A>
struct LongSum {
  Vec<A> total{}, lost{};
  FASTREG_INLINE_MEMBER void add(Vec<A> term) {
    const Vec<A> next = term - lost, sum = total + next;
    lost = (sum - total) - next;
    lost = lost == lost ? lost : Vec<A>{};  // a sum that is infinite has lost nothing
    total = sum;
  }
};

// The logarithm of a row's sum of exp(z - high), in which no term is quite 0: where every z is -inf it is
// -inf.
template <class A>
FASTREG_INLINE A log_of_sum(A high, A sum) {
  return high == -INFINITY ? high : log(sum);
}

// factor * term, where a factor of 0 gives 0 even if the term is infinite.
template <class V>
FASTREG_INLINE V share(V factor, V term) {
  return factor == 0 ? V{} : factor * term;
}

// u^(gamma - 1), of which most calls have u itself.
struct Same {
  template <class V>
  FASTREG_INLINE_MEMBER V operator()(V u) const {
    return u;
  }
};
template <class A>
struct Power {
  A exponent;
  FASTREG_INLINE_MEMBER Vec<A> operator()(Vec<A> u) const { return VectorMath<A>::pow(u, exponent); }
};

// p, u = 1 - p, u^(gamma - 1) and p * -log p in the digits of Digits, for gamma >= 1 where no class is nearly
// certain: there u has its digits without expm1.
struct QuickFocal {
  Vec<float> p, u, power, inner;

  static FASTREG_INLINE_MEMBER bool serves(Vec<float> log_p) { return all_at_most(log_p, -0.5f); }
};

template <class Digits, class Raise>
FASTREG_INLINE QuickFocal quick_focal(Vec<float> log_p, const Raise& raise) {
  log_p = larger(splat(ExpConstants<float>::lowest), log_p);  // 0 * -inf would be NaN
  const Vec<float> p = quick_exp<Digits>(log_p), u = 1.0f - p;
  return {p, u, raise(u), p * -log_p};
}

// The sum of term(j) over the vectors [j, j + lanes) of [0, n).
template <class A, class F>
FASTREG_INLINE A sum_over(int64_t n, const F& term) {
  LongSum<A> total;
  for (int64_t j = 0; j < n;) {
    Vec<A> chunk{};
    for (const int64_t end = std::min(j + kDepth * lanes<A>, n); j < end; j += lanes<A>) chunk += term(j);
    total.add(chunk);
  }
  return horizontal_sum(total.total);
}

// The vector [j, j + lanes) of n elements, with zeros behind the last.
template <class A>
FASTREG_INLINE Vec<A> load_at(const A* from, int64_t j, int64_t n) {
  return j + lanes<A> <= n ? load(from + j) : load_first(from + j, n - j, A(0));
}

template <class T, class A>
void read_elements(const T* from, int64_t stride, int64_t n, A* to) {
  int64_t j = 0;
  if constexpr (std::is_same_v<A, float> != std::is_same_v<T, double>)
    if (stride == 1)
      for (; j + lanes<A> <= n; j += lanes<A>) store(to + j, load(from + j));
  for (; j < n; ++j) to[j] = static_cast<A>(from[j * stride]);
}

// n floating elements from `at` on, `stride` apart.
template <class A>
void read_as(const Elements& from, int64_t at, int64_t stride, int64_t n, A* to) {
  switch (from.dtype) {
    case ScalarType::Double:
      return read_elements(reinterpret_cast<const double*>(from.data) + at, stride, n, to);
    case ScalarType::Float:
      return read_elements(reinterpret_cast<const float*>(from.data) + at, stride, n, to);
    case ScalarType::BFloat16:
      return read_elements(reinterpret_cast<const BFloat16*>(from.data) + at, stride, n, to);
    default:
      return read_elements(reinterpret_cast<const Half*>(from.data) + at, stride, n, to);
  }
}

// ---- a row with target classes; x is its first logit -----------------------------------------------------
template <class T, class A>
FASTREG_INLINE A z_of(const CrossEntropy<A>& call, const T* x, const RowTargets<A>& targets, int k) {
  const int64_t y = targets.y[k];
  return call.z_target(static_cast<A>(x[y * call.input_class]), y, targets.share[k]);
}

template <class T, class A>
FASTREG_INLINE A index_loss(const CrossEntropy<A>& call, const T* x, const RowTargets<A>& targets,
                            const Found<A>& found) {
  const A loss = row_loss(call.terms(targets, 0), found.softmax, z_of(call, x, targets, 0), found.linear);
  if (targets.y[1] < 0) return loss;
  return loss +
         target_loss(call.terms(targets, 1).target, call.gamma, found.softmax, z_of(call, x, targets, 1));
}

// As RowGradient, for two target classes.
template <class A>
struct IndexGradient {
  A slope, spread, at[2];
};

// `sum`: Found::slope.
template <class T, class A>
FASTREG_INLINE IndexGradient<A> index_gradient(const CrossEntropy<A>& call, const T* x, int64_t r,
                                               const RowTargets<A>& targets, const Softmax<A>& softmax, A sum,
                                               A grad) {
  const RowTerms<A> terms[2] = {call.terms(targets, 0), call.terms(targets, targets.y[1] < 0 ? 0 : 1)};
  auto z_of_target = [&](int k) {
    return call.target_z.empty() ? z_of(call, x, targets, k) : call.target_z[2 * r + k];
  };
  A z[2] = {z_of_target(0), targets.y[1] < 0 ? A(0) : z_of_target(1)}, others[2] = {0, 0};
  if (call.focal_spread()) {
    grad *= call.scale;
    if (call.z_loss != 0) sum += 2 * call.z_loss * (softmax.high + softmax.log_sum);
    auto of = [&](int k) {  // as Row::differentiate_own
      const auto term = focal(softmax.log_p(z[k]), call.gamma);
      const A d = (terms[k].target + call.spread() * call.factors.at(targets.y[k])) * term.slope;
      return grad * (term.p * (sum - d) - d * term.u);
    };
    return {grad * sum, grad * call.spread(), {of(0), targets.y[1] < 0 ? A(0) : of(1)}};
  }
  if (targets.y[1] >= 0)
    for (int k = 0; k < 2; ++k) others[k] = target_slope(terms[1 - k].target, call.gamma, softmax, z[1 - k]);
  auto of = [&](int k) {
    return row_gradient(terms[k], softmax, z[k], call.factors.at(targets.y[k]), grad, others[k]);
  };
  const RowGradient<A> first = of(0);
  return {first.slope, first.spread, {first.at_target, targets.y[1] < 0 ? A(0) : of(1).at_target}};
}

template <class A>
FASTREG_INLINE void finish_row(CrossEntropy<A>& call, int64_t o, int64_t i, const RowTargets<A>& targets,
                               const Found<A>& found, A loss, double* sums) {
  const int64_t r = call.row(o, i);
  call.high[r] = found.softmax.high;
  call.log_sum[r] = found.softmax.log_sum;
  if (call.slopes) call.slopes[r] = found.slope;
  if (call.loss.data) call.loss.put(r, loss);
  if (call.losses) call.losses[r] = loss;
  if (call.argmax) call.argmax[r] = found.argmax;
  sums[0] += loss;
  sums[1] += call.count(targets);
}

template <class A>
FASTREG_INLINE void leave_out_row(CrossEntropy<A>& call, int64_t o, int64_t i) {
  const int64_t r = call.row(o, i);
  call.high[r] = call.log_sum[r] = 0;
  if (call.slopes) call.slopes[r] = 0;
  if (call.loss.data) call.loss.put(r, A(0));
  if (call.losses) call.losses[r] = 0;
  if (call.argmax) call.argmax[r] = -1;
}

template <class T, class A>
FASTREG_INLINE T* gradient_of(const CrossEntropy<A>& call, int64_t o, int64_t i) {
  return reinterpret_cast<T*>(call.grad) + o * call.grad_outer + i * call.grad_inner;
}

template <class T, class A>
void fill_zero(const CrossEntropy<A>& call, T* grad, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) grad[c * call.grad_class] = static_cast<T>(A(0));
}

}  // namespace fastreg::FASTREG_ISA

#include "cpu/losses_columns.h"
#include "cpu/losses_rows.h"
#include "cpu/losses_small.h"

namespace fastreg::FASTREG_ISA {

// f<factors, T>(…) for the dtype and the factors of the call.
#define FASTREG_CALL(T, f)                              \
  switch (call.factors_are) {                           \
    case Factors::none:                                 \
      return f<Factors::none, T>(call, begin, end);     \
    case Factors::of_class:                             \
      return f<Factors::of_class, T>(call, begin, end); \
    case Factors::of_row:                               \
      return f<Factors::of_row, T>(call, begin, end);   \
  }
#define FASTREG_BY_DTYPE(f)                        \
  if constexpr (std::is_same_v<A, double>) {       \
    FASTREG_CALL(double, f)                        \
  } else if (call.dtype == ScalarType::Float) {    \
    FASTREG_CALL(float, f)                         \
  } else if (call.dtype == ScalarType::BFloat16) { \
    FASTREG_CALL(BFloat16, f)                      \
  } else {                                         \
    FASTREG_CALL(Half, f)                          \
  }

template <class A>
void forward(CrossEntropy<A>& call, int64_t begin, int64_t end) {
  if (call.columns) {
    FASTREG_BY_DTYPE(forward_columns)
  } else {
    FASTREG_BY_DTYPE(forward_rows)
  }
}

template <class A>
void reduce_blocks(CrossEntropy<A>& call, int64_t begin, int64_t end) {
  FASTREG_BY_DTYPE(reduce_blocks_of)
}

template <class A>
void sum_blocks(CrossEntropy<A>& call, int64_t begin, int64_t end) {
  FASTREG_BY_DTYPE(sum_blocks_of)
}

template <class A>
void read_targets(CrossEntropy<A>& call) {
  const int64_t begin = 0, end = call.rows();
  FASTREG_BY_DTYPE(read_targets_of)
}

template <class A>
void small(const SmallCrossEntropy<A>& call, int64_t begin, int64_t end) {
  if constexpr (std::is_same_v<A, double>)
    small_rows<double>(call, begin, end);
  else if (call.dtype == ScalarType::Float)
    small_rows<float>(call, begin, end);
  else if (call.dtype == ScalarType::BFloat16)
    small_rows<BFloat16>(call, begin, end);
  else
    small_rows<Half>(call, begin, end);
}

template <class A>
void backward(CrossEntropy<A>& call, int64_t begin, int64_t end) {
  if (call.columns) {
    FASTREG_BY_DTYPE(backward_columns)
  } else {
    FASTREG_BY_DTYPE(backward_rows)
  }
}
#undef FASTREG_BY_DTYPE
#undef FASTREG_CALL

// x[at + inner * [begin, end)] *= factor
template <class T, class A>
void scale_elements(T* x, int64_t stride, int64_t n, A factor) {
  int64_t j = 0;
  if (stride == 1)
    for (; j + lanes<A> <= n; j += lanes<A>) store(x + j, load(x + j) * factor);
  for (; j < n; ++j) x[j * stride] = static_cast<T>(static_cast<A>(x[j * stride]) * factor);
}

void scale(const Elements& x, int64_t at, int64_t begin, int64_t end, double factor) {
  at += begin * x.inner;
  const float f = static_cast<float>(factor);
  switch (x.dtype) {
    case ScalarType::Double:
      return scale_elements(reinterpret_cast<double*>(x.data) + at, x.inner, end - begin, factor);
    case ScalarType::Float:
      return scale_elements(reinterpret_cast<float*>(x.data) + at, x.inner, end - begin, f);
    case ScalarType::BFloat16:
      return scale_elements(reinterpret_cast<BFloat16*>(x.data) + at, x.inner, end - begin, f);
    default:
      return scale_elements(reinterpret_cast<Half*>(x.data) + at, x.inner, end - begin, f);
  }
}

}  // namespace fastreg::FASTREG_ISA
#endif
