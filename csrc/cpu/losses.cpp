// The softmax losses on the CPU. The maths of one row is in losses.h.
//
// A row is cut into blocks of kBlock classes that stay in the first-level cache: the block's maximum is taken
// first, then the sum of exponentials relative to it, and the blocks are merged in order. Threads share the
// rows, or the blocks of a row where there are fewer rows than threads; neither changes a bit of the result.
// Where classes are not next to one another in memory but rows are, as in (N, C, D), vectors hold
// neighbouring rows
// ("columns"), and nothing is transposed. Layouts with neither are gathered block by block.
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
constexpr int64_t kBlock = 4096;   // classes reduced at a time
constexpr int64_t kColumns = 256;  // rows side by side in a task of the column kernels
constexpr int64_t kTask = 16384;   // elements a task has at least, where there are as many

// A vector of C values in the type of the arithmetic.
template <class A>
struct PerClass {
  const A* data = nullptr;
  std::vector<A> copy;

  explicit operator bool() const { return data != nullptr; }
  A at(int64_t c) const { return data ? data[c] : A(1); }
};

// What the tasks of one call share.
template <class A>
struct CrossEntropy {
  // input[o, c, i] has the row (o, i), which is the row_outer * o + row_inner * i -th.
  int64_t outer, classes, inner, row_outer, row_inner;
  const char* input;
  ScalarType dtype;
  int64_t input_outer, input_class, input_inner;

  Elements target;
  PerClass<A> weight, factors, adjustment, margin;  // factors: weight * alpha; the last two times scale
  std::vector<A> block_factors;                     // the sum of the factors in each block of classes
  int64_t ignore_index;
  A smoothing, gamma, alpha_scale, scale, z_loss, total_factors;
  bool plain;    // z is the input
  bool columns;  // which kernel
  Elements loss, grad_loss;
  A *high, *log_sum;  // the softmax of each row
  std::atomic<int64_t> bad_row{INT64_MAX};

  int64_t rows_per_task, parts, tasks;  // a task is some rows, or one of the parts of a row
  std::vector<double> sums;             // of each task: the losses, and the weights of the targets
  std::vector<Partial<A>> partials;     // of each block, where rows are cut

  A grad_scale;
  char* grad;
  int64_t grad_outer, grad_class, grad_inner;

  int64_t rows() const { return outer * inner; }
  int64_t row(int64_t o, int64_t i) const { return o * row_outer + i * row_inner; }
  int64_t blocks() const { return (classes + kBlock - 1) / kBlock; }

  RowTerms<A> terms(int64_t y) const {
    const A spread = smoothing == 0 ? A(0) : alpha_scale * smoothing / static_cast<A>(classes);
    return {(1 - smoothing) * alpha_scale * factors.at(y), spread, total_factors, gamma, z_loss, scale};
  }

  A z(A x, int64_t c) const { return plain ? x : scale * x + (adjustment ? adjustment.data[c] : A(0)); }
  A z_target(A x, int64_t y) const { return margin ? z(x, y) - margin.data[y] : z(x, y); }

  // The class of a row, or -1 for a row to leave out. Remembers the first row whose target is not a class.
  int64_t target_of(int64_t o, int64_t i) {
    const int64_t y = target.get<int64_t>(target.at(o, i));
    if (y == ignore_index) return -1;
    if (y >= 0 && y < classes) return y;
    const int64_t r = row(o, i);
    int64_t first = bad_row.load(std::memory_order_relaxed);
    while (r < first && !bad_row.compare_exchange_weak(first, r, std::memory_order_relaxed)) {
    }
    return -1;
  }
};

}  // namespace fastreg

#define FASTREG_FILE "cpu/losses.cpp"
#include "cpu/foreach_isa.h"

namespace fastreg {
namespace {

template <class A>
void read_classes(PerClass<A>& into, const std::optional<Tensor>& tensor, int64_t classes, A scale = 1) {
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
  const std::optional<Tensor>&weight, &alpha, &logit_adjustment, &margin;
  int64_t ignore_index, reduction;
  double smoothing, gamma, alpha_scale, scale, z_loss;
};

template <class A>
void prepare(CrossEntropy<A>& call, const Options& options, const Tensor& lse) {
  const Tensor& input = options.input;
  const auto sizes = input.sizes(), strides = input.strides();
  const auto target_strides = options.target.strides();
  const bool three = sizes.size() == 3;
  call.outer = sizes[0], call.classes = sizes[1], call.inner = three ? sizes[2] : 1;
  call.input = static_cast<const char*>(input.const_data_ptr());
  call.dtype = input.scalar_type();
  call.input_outer = strides[0], call.input_class = strides[1], call.input_inner = three ? strides[2] : 0;
  call.row_outer = call.inner, call.row_inner = 1;
  call.target = elements_of(options.target, target_strides[0], three ? target_strides[1] : 0);

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
  call.total_factors = static_cast<A>(call.classes);
  if (call.smoothing != 0) {
    double total = 0;
    call.block_factors.resize(call.blocks());
    for (int64_t b = 0; b < call.blocks(); ++b) {
      double sum = 0;
      const int64_t begin = b * kBlock, end = std::min(begin + kBlock, call.classes);
      for (int64_t c = begin; c < end; ++c) sum += call.factors.at(c);
      call.block_factors[b] = static_cast<A>(sum);
      total += sum;
    }
    call.total_factors = static_cast<A>(total);
  }
  call.high = static_cast<A*>(lse.data_ptr());
  call.log_sum = call.high + call.rows();
}

// Chooses the kernel and lets rows side by side in memory be the inner ones.
template <class A>
void choose_kernel(CrossEntropy<A>& call, bool inner_is_dense, bool outer_is_dense) {
  call.columns = call.input_class != 1 && call.classes > 1 && (inner_is_dense || outer_is_dense);
  if (call.columns && !inner_is_dense) {
    std::swap(call.outer, call.inner);
    std::swap(call.input_outer, call.input_inner);
    std::swap(call.grad_outer, call.grad_inner);
    std::swap(call.row_outer, call.row_inner);
    std::swap(call.target.outer, call.target.inner);
    std::swap(call.grad_loss.outer, call.grad_loss.inner);
  }
  call.parts = 1;
  call.rows_per_task =
      call.columns ? kColumns : std::max<int64_t>(1, kTask / std::max<int64_t>(1, call.classes));
  call.tasks = call.columns ? call.outer * ((call.inner + kColumns - 1) / kColumns)
                            : (call.rows() + call.rows_per_task - 1) / call.rows_per_task;
}

template <class A>
void check_targets(const CrossEntropy<A>& call) {
  const int64_t r = call.bad_row.load();
  if (r == INT64_MAX) return;
  const int64_t o = call.row_outer == 1 ? r % call.outer : r / call.inner;
  const int64_t i = call.row_outer == 1 ? r / call.outer : r % call.inner;
  throw std::out_of_range("target must hold class indices in [0, " + std::to_string(call.classes) +
                          ") or ignore_index (" + std::to_string(call.ignore_index) + "), got " +
                          std::to_string(call.target.template get<int64_t>(call.target.at(o, i))) +
                          " in row " + std::to_string(r));
}

template <class A>
std::tuple<Tensor, Tensor, Tensor> forward(const Options& options, bool zero_if_empty, bool fp32_loss) {
  constexpr ScalarType arithmetic = torch::headeronly::CppTypeToScalarType<A>::value;
  const auto sizes = options.input.sizes();
  const bool three = sizes.size() == 3, each = options.reduction == reduction_none;
  const ScalarType loss_dtype = fp32_loss ? arithmetic : options.input.scalar_type();
  Tensor lse =
      three ? new_tensor({2, sizes[0], sizes[2]}, arithmetic) : new_tensor({2, sizes[0]}, arithmetic);
  Tensor loss = !each   ? new_tensor({}, loss_dtype)
                : three ? new_tensor({sizes[0], sizes[2]}, loss_dtype)
                        : new_tensor({sizes[0]}, loss_dtype);
  Tensor denominator = new_tensor({}, arithmetic);

  CrossEntropy<A> call;
  prepare(call, options, lse);
  if (each) call.loss = elements_of(loss, 0, 0);
  choose_kernel(call, three && call.input_inner == 1, call.input_outer == 1);
  call.sums.resize(2 * call.tasks);
  const int64_t elements = call.rows() * call.classes, blocks = call.blocks();
  if (!call.columns && blocks > 1 && elements >= 2 * kParallel &&
      call.tasks < 2 * static_cast<int64_t>(torch::stable::get_num_threads())) {
    call.partials.resize(call.rows() * blocks);
    run(call.rows() * blocks, elements,
        [&](int64_t begin, int64_t end) { FASTREG_PICK(reduce_blocks<A>)(call, begin, end); });
    FASTREG_PICK(forward<A>)(call, 0, call.tasks);
  } else {
    run(call.tasks, elements,
        [&](int64_t begin, int64_t end) { FASTREG_PICK(forward<A>)(call, begin, end); });
  }
  check_targets(call);

  double total = 0, weights = 0;
  for (int64_t t = 0; t < call.tasks; ++t) {
    total += call.sums[2 * t];
    weights += call.sums[2 * t + 1];
  }
  if (options.reduction != reduction_mean || (zero_if_empty && weights == 0)) weights = 1;
  *static_cast<A*>(denominator.data_ptr()) = static_cast<A>(weights);
  if (!each) elements_of(loss, 0, 0).put(0, total / weights);
  return {loss, lse, denominator};
}

template <class A>
Tensor backward(const Tensor& grad_loss, const Options& options, const Tensor& lse,
                const Tensor& denominator) {
  const Tensor& input = options.input;
  const auto sizes = input.sizes();
  const bool three = sizes.size() == 3;
  Tensor grad = new_like(input);
  CrossEntropy<A> call;
  prepare(call, options, lse);
  const auto grad_strides = grad.strides(), loss_strides = grad_loss.strides();
  call.grad = static_cast<char*>(grad.data_ptr());
  call.grad_outer = grad_strides[0], call.grad_class = grad_strides[1];
  call.grad_inner = three ? grad_strides[2] : 0;
  const bool each = options.reduction == reduction_none;
  call.grad_loss = elements_of(grad_loss, each ? loss_strides[0] : 0, each && three ? loss_strides[1] : 0);
  call.grad_scale = 1 / *static_cast<const A*>(denominator.const_data_ptr());
  choose_kernel(call, three && call.input_inner == 1 && call.grad_inner == 1,
                call.input_outer == 1 && call.grad_outer == 1);
  if (!call.columns && call.classes > kTask) {
    call.parts = (call.classes + kTask - 1) / kTask;
    call.tasks = call.rows() * call.parts;
  }
  run(call.tasks, call.rows() * call.classes,
      [&](int64_t begin, int64_t end) { FASTREG_PICK(backward<A>)(call, begin, end); });
  check_targets(call);
  return grad;
}

using MaybeTensor = std::optional<Tensor>;

void check_supported(const MaybeTensor& other_target, const MaybeTensor& share, double smoothing,
                     double gamma) {
  STD_TORCH_CHECK(!other_target && !share, "the CPU kernel takes no second target");
  STD_TORCH_CHECK(smoothing == 0 || gamma == 0,
                  "the CPU kernel takes no label_smoothing together with gamma");
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(
    const Tensor& input, const Tensor& target, MaybeTensor weight, MaybeTensor alpha,
    MaybeTensor logit_adjustment, MaybeTensor margin, MaybeTensor other_target, MaybeTensor share,
    int64_t ignore_index, int64_t reduction, double smoothing, double gamma, double alpha_scale, double scale,
    double z_loss, bool zero_if_empty, bool fp32_loss) {
  check_supported(other_target, share, smoothing, gamma);
  const Options options{input,       target,       weight,    alpha,     logit_adjustment,
                        margin,      ignore_index, reduction, smoothing, gamma,
                        alpha_scale, scale,        z_loss};
  return input.scalar_type() == ScalarType::Double ? forward<double>(options, zero_if_empty, fp32_loss)
                                                   : forward<float>(options, zero_if_empty, fp32_loss);
}

Tensor cross_entropy_backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                              MaybeTensor weight, MaybeTensor alpha, MaybeTensor logit_adjustment,
                              MaybeTensor margin, MaybeTensor other_target, MaybeTensor share,
                              const Tensor& lse, const Tensor& denominator, int64_t ignore_index,
                              int64_t reduction, double smoothing, double gamma, double alpha_scale,
                              double scale, double z_loss) {
  check_supported(other_target, share, smoothing, gamma);
  const Options options{input,       target,       weight,    alpha,     logit_adjustment,
                        margin,      ignore_index, reduction, smoothing, gamma,
                        alpha_scale, scale,        z_loss};
  return input.scalar_type() == ScalarType::Double ? backward<double>(grad_loss, options, lse, denominator)
                                                   : backward<float>(grad_loss, options, lse, denominator);
}

}  // namespace
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg, CPU, m) {
  m.impl("cross_entropy_forward.cpu", TORCH_BOX(&fastreg::cross_entropy_forward));
  m.impl("cross_entropy_backward.cpu", TORCH_BOX(&fastreg::cross_entropy_backward));
}

#else
#include "cpu/simd.h"

namespace fastreg::FASTREG_ISA {

// Vectors summed in one go. In the column kernels kDepth classes of kColumns rows stay in the cache.
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

// factor * term, where a factor of 0 gives 0 even if the term is infinite.
template <class V>
FASTREG_INLINE V share(V factor, V term) {
  return factor == 0 ? V{} : factor * term;
}

// ---- rows: a vector holds classes
// ---------------------------------------------------------------------------
// The largest of x[0, n).
template <class A, class T>
FASTREG_INLINE Vec<A> largest(const T* x, int64_t n, Vec<A> high) {
  Vec<A> other = high;
  int64_t j = 0;
  for (; j + 2 * lanes<A> <= n; j += 2 * lanes<A>) {
    high = larger(load(x + j), high);
    other = larger(load(x + j + lanes<A>), other);
  }
  if (j + lanes<A> <= n) {
    high = larger(load(x + j), high);
    j += lanes<A>;
  }
  if (j < n) other = larger(load_first(x + j, n - j, A(-INFINITY)), other);
  return larger(high, other);
}

// The sum of exp(x - base), and of factors * (x - base); on the way the largest x.
template <bool linear, class T, class A>
FASTREG_INLINE Partial<A> sum_block(const T* x, int64_t n, const A* factors, A base) {
  const int64_t whole = n / lanes<A> * lanes<A>, rest = n - whole;
  Vec<A> high = splat(A(-INFINITY)), sum{};
  LongSum<A> weighted;
  for (int64_t j = 0; j < whole;) {
    Vec<A> chunk_sum{}, chunk{};
    for (const int64_t end = std::min(j + kDepth * lanes<A>, whole); j < end; j += lanes<A>) {
      const Vec<A> z = load(x + j), d = z - base;
      high = larger(z, high);
      chunk_sum += exp_of<A>(d);
      if constexpr (linear) chunk += factors ? share(load(factors + j), d) : d;
    }
    sum += chunk_sum;
    if constexpr (linear) weighted.add(chunk);
  }
  if (rest) {
    const Vec<A> z = load_first(x + whole, rest, A(-INFINITY)), d = z - base;
    high = larger(z, high);
    sum += exp_of<A>(d);
    if constexpr (linear) {
      const Vec<A> term = factors ? share(load_first(factors + whole, rest, A(0)), d) : d;
      weighted.add(is_first<A>(rest) ? term : Vec<A>{});
    }
  }
  return {horizontal_max(high), horizontal_sum(sum), linear ? horizontal_sum(weighted.total) : A(0)};
}

// One pass over x, relative to the largest of its beginning: where the true maximum is not far above, exp
// does not overflow and no digit is lost. Where it is, or where the linear sum needs it, the maximum is taken
// first.
template <bool linear, class T, class A>
Partial<A> reduce_block(const T* x, int64_t n, const A* factors) {
  constexpr A far = 60;
  const A lowest = -INFINITY;
  const int64_t beginning = linear ? n : std::min(n, 4 * lanes<A>);
  A base = horizontal_max(largest<A>(x, beginning, splat(lowest)));
  Partial<A> part =
      sum_block<linear>(x, n, factors, base == lowest ? A(0) : base);  // -inf - -inf would be NaN
  if constexpr (!linear) {
    if (part.high == base) return part;
    if (part.high - base <= far)
      part.sum *= exp_of<A>(splat(base - part.high))[0];
    else
      part = sum_block<linear>(x, n, factors, part.high);
  }
  return part;
}

// z of the classes [begin, begin + n) of a row.
template <class T, class A>
void gather(const CrossEntropy<A>& call, const T* row, int64_t begin, int64_t n, int64_t y, A* z) {
  const T* x = row + begin * call.input_class;
  const A* adjustment = call.adjustment ? call.adjustment.data + begin : nullptr;
  constexpr int64_t step = lanes<A>;
  int64_t j = 0;
  if (call.input_class == 1) {
    for (; j + step <= n; j += step) {
      const Vec<A> scaled = load(x + j) * call.scale;
      store(z + j, adjustment ? scaled + load(adjustment + j) : scaled);
    }
  }
  for (; j < n; ++j) z[j] = call.z(static_cast<A>(x[j * call.input_class]), begin + j);
  if (call.margin && y >= begin && y < begin + n) z[y - begin] -= call.margin.data[y];
}

template <class T, class A>
Partial<A> reduce_part(const CrossEntropy<A>& call, const T* row, int64_t block, int64_t y) {
  const int64_t begin = block * kBlock, n = std::min(kBlock, call.classes - begin);
  const A* factors = call.factors ? call.factors.data + begin : nullptr;
  if (call.plain && call.input_class == 1)
    return call.smoothing != 0 ? reduce_block<true>(row + begin, n, factors)
                               : reduce_block<false>(row + begin, n, factors);
  alignas(64) A z[kBlock];
  gather(call, row, begin, n, y, z);
  return call.smoothing != 0 ? reduce_block<true>(z, n, factors) : reduce_block<false>(z, n, factors);
}

template <class A>
FASTREG_INLINE void finish_row(CrossEntropy<A>& call, int64_t o, int64_t i, int64_t y, A z_y,
                               const Softmax<A>& softmax, A linear, double* sums) {
  const A loss = row_loss(call.terms(y), softmax, z_y, linear);
  const int64_t r = call.row(o, i);
  call.high[r] = softmax.high;
  call.log_sum[r] = softmax.log_sum;
  if (call.loss.data) call.loss.put(r, loss);
  sums[0] += loss;
  sums[1] += call.weight.at(y);
}

template <class A>
FASTREG_INLINE void leave_out_row(CrossEntropy<A>& call, int64_t o, int64_t i) {
  const int64_t r = call.row(o, i);
  call.high[r] = call.log_sum[r] = 0;
  if (call.loss.data) call.loss.put(r, A(0));
}

template <class T, class A>
void forward_rows(CrossEntropy<A>& call, int64_t task_begin, int64_t task_end) {
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t begin = task * call.rows_per_task, end = std::min(begin + call.rows_per_task, call.rows());
    double sums[2] = {0, 0};
    for (int64_t r = begin; r < end; ++r) {
      const int64_t o = r / call.inner, i = r - o * call.inner, y = call.target_of(o, i);
      if (y < 0) {
        leave_out_row(call, o, i);
        continue;
      }
      const T* row = reinterpret_cast<const T*>(call.input) + o * call.input_outer + i * call.input_inner;
      Partial<A> whole{-INFINITY, 0, 0};
      A weight = 0;
      for (int64_t b = 0; b < call.blocks(); ++b) {
        const Partial<A> part =
            call.partials.empty() ? reduce_part(call, row, b, y) : call.partials[r * call.blocks() + b];
        const A part_weight = call.smoothing != 0 ? call.block_factors[b] : A(0);
        whole = b == 0 ? part : merge(whole, weight, part, part_weight);
        weight += part_weight;
      }
      const A z_y = call.z_target(static_cast<A>(row[y * call.input_class]), y);
      finish_row(call, o, i, y, z_y, {whole.high, log(whole.sum)}, whole.linear, sums);
    }
    call.sums[2 * task] = sums[0];
    call.sums[2 * task + 1] = sums[1];
  }
}

template <class T, class A>
void reduce_blocks_of(CrossEntropy<A>& call, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; ++at) {
    const int64_t r = at / call.blocks(), o = r / call.inner, i = r - o * call.inner,
                  y = call.target_of(o, i);
    const T* row = reinterpret_cast<const T*>(call.input) + o * call.input_outer + i * call.input_inner;
    if (y >= 0) call.partials[at] = reduce_part(call, row, at - r * call.blocks(), y);
  }
}

// `finite` says that no gradient can be NaN.
template <bool spread, bool finite, class T, class In, class A>
FASTREG_INLINE void gradient(const In* z, int64_t n, const A* factors, const Softmax<A>& softmax,
                             const RowGradient<A>& row, T* grad) {
  constexpr int64_t step = lanes<A>;
  int64_t j = 0;
  for (; j + step <= n; j += step) {
    Vec<A> g = exp_of<A>((load(z + j) - softmax.high) - softmax.log_sum) * row.slope;
    if constexpr (spread) g -= factors ? load(factors + j) * row.spread : splat(row.spread);
    store<finite>(grad + j, g);
  }
  if (j < n) {
    Vec<A> g = exp_of<A>((load_first(z + j, n - j, A(0)) - softmax.high) - softmax.log_sum) * row.slope;
    if constexpr (spread)
      g -= factors ? load_first(factors + j, n - j, A(0)) * row.spread : splat(row.spread);
    store_first(grad + j, g, n - j);
  }
}

template <class T, class In, class A>
void gradient_part(const CrossEntropy<A>& call, const In* z, int64_t begin, int64_t n,
                   const Softmax<A>& softmax, const RowGradient<A>& row, T* grad) {
  const A* factors = call.factors ? call.factors.data + begin : nullptr;
  if (call.smoothing != 0)
    gradient<true, false>(z, n, factors, softmax, row, grad);
  else if ((softmax.high + softmax.log_sum + row.slope) * 0 == 0)
    gradient<false, true>(z, n, factors, softmax, row, grad);
  else
    gradient<false, false>(z, n, factors, softmax, row, grad);
}

// The gradient of the classes [begin, end) of a row.
template <class T, class A>
void backward_row(const CrossEntropy<A>& call, const T* x, T* grad, int64_t begin, int64_t end, int64_t y,
                  const Softmax<A>& softmax, const RowGradient<A>& row) {
  if (call.plain && call.input_class == 1 && call.grad_class == 1) {
    gradient_part(call, x + begin, begin, end - begin, softmax, row, grad + begin);
  } else {
    alignas(64) A z[kBlock];
    alignas(64) T out[kBlock];
    for (int64_t c = begin; c < end; c += kBlock) {
      const int64_t n = std::min(kBlock, end - c);
      gather(call, x, c, n, y, z);
      gradient_part(call, z, c, n, softmax, row, call.grad_class == 1 ? grad + c : out);
      if (call.grad_class != 1)
        for (int64_t j = 0; j < n; ++j) grad[(c + j) * call.grad_class] = out[j];
    }
  }
  if (y >= begin && y < end) grad[y * call.grad_class] = static_cast<T>(row.at_target);
}

template <class A>
FASTREG_INLINE RowGradient<A> gradient_of(const CrossEntropy<A>& call, int64_t o, int64_t i, int64_t y,
                                          A x_y) {
  const int64_t r = call.row(o, i);
  const A grad = call.grad_loss.template get<A>(call.grad_loss.at(o, i)) * call.grad_scale;
  return row_gradient(call.terms(y), {call.high[r], call.log_sum[r]}, call.z_target(x_y, y),
                      call.factors.at(y), grad);
}

template <class T, class A>
void backward_rows(CrossEntropy<A>& call, int64_t task_begin, int64_t task_end) {
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t part = task % call.parts, begin = part * kTask;
    const int64_t end = call.parts == 1 ? call.classes : std::min(begin + kTask, call.classes);
    const int64_t first = task / call.parts * call.rows_per_task;
    const int64_t last = std::min(first + call.rows_per_task, call.rows());
    for (int64_t r = first; r < last; ++r) {
      const int64_t o = r / call.inner, i = r - o * call.inner, y = call.target_of(o, i);
      const T* x = reinterpret_cast<const T*>(call.input) + o * call.input_outer + i * call.input_inner;
      T* grad = reinterpret_cast<T*>(call.grad) + o * call.grad_outer + i * call.grad_inner;
      if (y < 0) {
        for (int64_t c = begin; c < end; ++c) grad[c * call.grad_class] = static_cast<T>(A(0));
        continue;
      }
      const auto row = gradient_of(call, o, i, y, static_cast<A>(x[y * call.input_class]));
      const int64_t at = call.row(o, i);
      backward_row(call, x, grad, begin, end, y, {call.high[at], call.log_sum[at]}, row);
    }
  }
}

// ---- columns: a vector holds rows
// ---------------------------------------------------------------------------
template <class A>
using Lane = std::remove_cvref_t<decltype(Int<A>{}[0])>;

// z of class c in the rows from x on, a lane each; only the first `count` rows are there.
template <class T, class A>
FASTREG_INLINE Vec<A> column_z(const CrossEntropy<A>& call, const T* x, int64_t count, int64_t c) {
  const Vec<A> v = count >= lanes<A> ? load(x) : load_first(x, count, A(0));
  if (call.plain) return v;
  const Vec<A> scaled = v * call.scale;
  return call.adjustment ? scaled + call.adjustment.data[c] : scaled;
}

template <bool linear, class T, class A>
void forward_tile(CrossEntropy<A>& call, int64_t o, int64_t first, int64_t n, double* sums) {
  alignas(64) A high[kColumns], sum[kColumns], weighted[kColumns], lost[kColumns], margin[kColumns];
  alignas(64) Lane<A> target[kColumns];
  const T* x = reinterpret_cast<const T*>(call.input) + o * call.input_outer + first;
  const int64_t rounded = (n + lanes<A> - 1) / lanes<A> * lanes<A>;
  for (int64_t i = 0; i < rounded; ++i) {
    const int64_t y = i < n ? call.target_of(o, first + i) : -1;
    high[i] = -INFINITY, sum[i] = weighted[i] = lost[i] = 0;
    target[i] = static_cast<Lane<A>>(y);
    margin[i] = call.margin && y >= 0 ? call.margin.data[y] : A(0);
  }
  A weight = 0;
  for (int64_t begin = 0; begin < call.classes; begin += kDepth) {
    const int64_t end = std::min(begin + kDepth, call.classes);
    for (int64_t v = 0; v < n; v += lanes<A>) {
      const auto y = load_raw<Int<A>>(target + v);
      const Vec<A> lower = load(margin + v), high_before = load(high + v);
      Vec<A> z[kDepth], top = high_before;
      for (int64_t c = begin; c < end; ++c) {
        Vec<A> at = column_z(call, x + c * call.input_class + v, n - v, c);
        if (call.margin) at -= y == static_cast<Lane<A>>(c) ? lower : Vec<A>{};
        top = larger(at, top);
        z[c - begin] = at;
      }
      const Vec<A> base = top == -INFINITY ? Vec<A>{} : top;
      Vec<A> total = load(sum + v) * exp_of<A>(high_before - base), slanted{};
      if constexpr (linear) {
        const Vec<A> base_before = high_before == -INFINITY ? Vec<A>{} : high_before;
        slanted = weight * (base_before - base);
      }
      for (int64_t c = begin; c < end; ++c) {
        const Vec<A> d = z[c - begin] - base;
        total += exp_of<A>(d);
        if constexpr (linear) slanted += share(splat(call.factors.at(c)), d);
      }
      store(high + v, top);
      store(sum + v, total);
      if constexpr (linear) {
        LongSum<A> long_sum{load(weighted + v), load(lost + v)};
        long_sum.add(slanted);
        store(weighted + v, long_sum.total);
        store(lost + v, long_sum.lost);
      }
    }
    if constexpr (linear)
      for (int64_t c = begin; c < end; ++c) weight += call.factors.at(c);
  }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t y = target[i];
    if (y < 0) {
      leave_out_row(call, o, first + i);
      continue;
    }
    const A z_y = call.z_target(static_cast<A>(x[y * call.input_class + i]), y);
    finish_row(call, o, first + i, y, z_y, {high[i], log(sum[i])}, weighted[i], sums);
  }
}

template <class T, class A>
void forward_columns(CrossEntropy<A>& call, int64_t task_begin, int64_t task_end) {
  const int64_t tiles = (call.inner + kColumns - 1) / kColumns;
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t o = task / tiles, first = (task - o * tiles) * kColumns;
    const int64_t n = std::min(kColumns, call.inner - first);
    double sums[2] = {0, 0};
    if (call.smoothing != 0)
      forward_tile<true, T>(call, o, first, n, sums);
    else
      forward_tile<false, T>(call, o, first, n, sums);
    call.sums[2 * task] = sums[0];
    call.sums[2 * task + 1] = sums[1];
  }
}

template <class T, class A>
void backward_columns(CrossEntropy<A>& call, int64_t task_begin, int64_t task_end) {
  const int64_t tiles = (call.inner + kColumns - 1) / kColumns;
  alignas(64) A high[kColumns]{}, log_sum[kColumns]{}, slope[kColumns]{}, spread[kColumns]{},
      at_target[kColumns];
  alignas(64) Lane<A> target[kColumns]{};
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t o = task / tiles, first = (task - o * tiles) * kColumns;
    const int64_t n = std::min(kColumns, call.inner - first);
    const T* x = reinterpret_cast<const T*>(call.input) + o * call.input_outer + first;
    T* grad = reinterpret_cast<T*>(call.grad) + o * call.grad_outer + first;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t y = call.target_of(o, first + i), at = call.row(o, first + i);
      target[i] = static_cast<Lane<A>>(y);
      if (y < 0) continue;
      const auto row = gradient_of(call, o, first + i, y, static_cast<A>(x[y * call.input_class + i]));
      high[i] = call.high[at], log_sum[i] = call.log_sum[at];
      slope[i] = row.slope, spread[i] = row.spread, at_target[i] = row.at_target;
    }
    for (int64_t c = 0; c < call.classes; ++c) {
      const T* from = x + c * call.input_class;
      T* to = grad + c * call.grad_class;
      const A factor = call.factors.at(c);
      for (int64_t v = 0; v < n; v += lanes<A>) {
        const Vec<A> log_p = (column_z(call, from + v, n - v, c) - load(high + v)) - load(log_sum + v);
        Vec<A> g = exp_of<A>(log_p) * load(slope + v);
        if (call.smoothing != 0) g -= load(spread + v) * factor;
        g = load_raw<Int<A>>(target + v) >= 0 ? g : Vec<A>{};
        if (n - v >= lanes<A>)
          store(to + v, g);
        else
          store_first(to + v, g, n - v);
      }
    }
    for (int64_t i = 0; i < n; ++i)
      if (target[i] >= 0) grad[target[i] * call.grad_class + i] = static_cast<T>(at_target[i]);
  }
}

// ---- by dtype
// -------------------------------------------------------------------------------------------------
#define FASTREG_BY_DTYPE(call, f)            \
  if constexpr (std::is_same_v<A, double>) { \
    f(double);                               \
  } else {                                   \
    switch (call.dtype) {                    \
      case ScalarType::Float:                \
        f(float);                            \
        break;                               \
      case ScalarType::BFloat16:             \
        f(BFloat16);                         \
        break;                               \
      default:                               \
        f(Half);                             \
    }                                        \
  }

template <class A>
void forward(CrossEntropy<A>& call, int64_t begin, int64_t end) {
#define FASTREG_CALL(T) \
  call.columns ? forward_columns<T>(call, begin, end) : forward_rows<T>(call, begin, end)
  FASTREG_BY_DTYPE(call, FASTREG_CALL)
#undef FASTREG_CALL
}

template <class A>
void reduce_blocks(CrossEntropy<A>& call, int64_t begin, int64_t end) {
#define FASTREG_CALL(T) reduce_blocks_of<T>(call, begin, end)
  FASTREG_BY_DTYPE(call, FASTREG_CALL)
#undef FASTREG_CALL
}

template <class A>
void backward(CrossEntropy<A>& call, int64_t begin, int64_t end) {
#define FASTREG_CALL(T) \
  call.columns ? backward_columns<T>(call, begin, end) : backward_rows<T>(call, begin, end)
  FASTREG_BY_DTYPE(call, FASTREG_CALL)
#undef FASTREG_CALL
}
#undef FASTREG_BY_DTYPE

}  // namespace fastreg::FASTREG_ISA
#endif
