// The sigmoid focal loss on the CPU. The maths of one term is in losses.h.
//
// Nothing of the input's size is made besides the result. Rows that lie one after another are one long row.
#ifndef FASTREG_ISA
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "losses.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/capability.h"
#include "cpu/elements.h"
#include "cpu/tensors.h"

namespace fastreg {
constexpr int64_t kSigmoidBlock = 2048;  // terms gathered or summed at a time

// What the tasks of one call share.
struct SigmoidFocalCall {
  int64_t rows, classes;
  Elements input, target, grad_loss;  // strides: of rows, of classes
  bool dense;                         // the target has a value for each term
  double alpha, gamma;
  Elements weight;        // of each class, or none
  double grad_scale = 1;  // what each term's derivative is multiplied by, beside grad_loss where there is one
  Elements loss, grad;    // of each term, where they are wanted
  int64_t rows_per_task, parts, tasks;
  std::vector<double> sums;  // of each task

  int64_t part_size() const { return parts == 1 ? classes : 8 * kSigmoidBlock; }
};
}  // namespace fastreg

#define FASTREG_FILE "cpu/losses_sigmoid.cpp"
#include "cpu/foreach_isa.h"

namespace fastreg {
namespace {

void prepare(SigmoidFocalCall& call, const Tensor& input, const Tensor& target,
             const std::optional<Tensor>& weight, double alpha, double gamma) {
  call.rows = input.size(0), call.classes = input.size(1);
  call.input = elements_of(input, input.stride(0), input.stride(1));
  call.dense = target.dim() == 2;
  call.target = elements_of(target, target.stride(0), call.dense ? target.stride(1) : 0);
  call.alpha = alpha, call.gamma = gamma;
  if (weight) call.weight = elements_of(*weight, 0, weight->stride(0));
}

// Also of what is not there.
bool one_row(const SigmoidFocalCall& call, const Elements& elements) {
  return elements.data == nullptr ||
         (elements.inner == 1 && (elements.outer == call.classes || call.rows == 1));
}

void divide(SigmoidFocalCall& call) {
  if (call.dense && call.weight.data == nullptr && one_row(call, call.input) && one_row(call, call.target) &&
      one_row(call, call.loss) && one_row(call, call.grad) && one_row(call, call.grad_loss)) {
    call.classes *= call.rows;
    call.rows = call.classes > 0;
  }
  const int64_t size = 8 * kSigmoidBlock;
  call.parts = std::max<int64_t>(1, (call.classes + size - 1) / size);
  call.rows_per_task = call.parts > 1 ? 1 : size / std::max<int64_t>(1, call.classes);
  call.tasks = call.classes == 0 ? 0 : (call.rows + call.rows_per_task - 1) / call.rows_per_task * call.parts;
}

// scale / normalizer, where a normalizer of 0 counts as 1.
double factor(double scale, const std::optional<Tensor>& normalizer) {
  const double by = normalizer ? elements_of(*normalizer, 0, 0).get<double>(0) : 1;
  return by == 0 ? scale : scale / by;
}

std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& target,
                                   const std::optional<Tensor>& weight,
                                   const std::optional<Tensor>& normalizer, double alpha, double gamma,
                                   bool reduce, double scale, bool fp32_loss, bool with_gradient) {
  SigmoidFocalCall call;
  prepare(call, input, target, weight, alpha, gamma);
  const ScalarType dtype = !fp32_loss                               ? call.input.dtype
                           : call.input.dtype == ScalarType::Double ? ScalarType::Double
                                                                    : ScalarType::Float;
  Tensor loss = reduce ? new_tensor({}, dtype) : new_tensor({call.rows, call.classes}, dtype);
  Tensor grad = with_gradient ? new_like(input) : loss;
  const double by = reduce ? factor(scale, normalizer) : 1;
  if (!reduce) call.loss = elements_of(loss, call.classes, 1);
  if (with_gradient) call.grad = elements_of(grad, grad.stride(0), grad.stride(1));
  call.grad_scale = by;
  divide(call);
  call.sums.resize(call.tasks);
  run(call.tasks, call.rows * call.classes * 4,
      [&](int64_t begin, int64_t end) { FASTREG_PICK(sigmoid_forward)(call, begin, end); });
  if (reduce) {
    const double sum = std::accumulate(call.sums.begin(), call.sums.end(), 0.0);
    elements_of(loss, 0, 0).put(0, sum * by);
  }
  return {loss, grad};
}

Tensor sigmoid_focal_forward(const Tensor& input, const Tensor& target, std::optional<Tensor> weight,
                             std::optional<Tensor> normalizer, double alpha, double gamma, bool reduce,
                             double scale, bool fp32_loss) {
  return std::get<0>(
      forward(input, target, weight, normalizer, alpha, gamma, reduce, scale, fp32_loss, false));
}

std::tuple<Tensor, Tensor> sigmoid_focal_small(const Tensor& input, const Tensor& target,
                                               std::optional<Tensor> weight, std::optional<Tensor> normalizer,
                                               double alpha, double gamma, bool reduce, double scale,
                                               bool fp32_loss) {
  return forward(input, target, weight, normalizer, alpha, gamma, reduce, scale, fp32_loss, true);
}

Tensor sigmoid_focal_backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                              std::optional<Tensor> weight, std::optional<Tensor> normalizer, double alpha,
                              double gamma, bool reduce, double scale) {
  SigmoidFocalCall call;
  prepare(call, input, target, weight, alpha, gamma);
  if (reduce)
    call.grad_scale = elements_of(grad_loss, 0, 0).get<double>(0) * factor(scale, normalizer);
  else
    call.grad_loss = elements_of(grad_loss, grad_loss.stride(0), grad_loss.stride(1));
  Tensor grad = new_like(input);
  call.grad = elements_of(grad, grad.stride(0), grad.stride(1));
  divide(call);
  run(call.tasks, call.rows * call.classes * 4,
      [&](int64_t begin, int64_t end) { FASTREG_PICK(sigmoid_backward)(call, begin, end); });
  return grad;
}

}  // namespace
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg, CPU, m) {
  m.impl("sigmoid_focal_forward.cpu", TORCH_BOX(&fastreg::sigmoid_focal_forward));
  m.impl("sigmoid_focal_small.cpu", TORCH_BOX(&fastreg::sigmoid_focal_small));
  m.impl("sigmoid_focal_backward.cpu", TORCH_BOX(&fastreg::sigmoid_focal_backward));
}

#else
#include "cpu/simd.h"

namespace fastreg::FASTREG_ISA {
#include "losses_terms.h"

// A part of the terms: n classes of each row from (row, column) on, all of them if there are several rows.
struct Part {
  int64_t row, rows, column, n;

  // Whether it is one run of elements of this tensor, but for `inner`.
  bool is_row(const Elements& tensor) const { return rows == 1 || (tensor.inner == 1 && tensor.outer == n); }
};

// The elements as A: in place where they lie so, else in the buffer, of which a vector more may be written.
template <class T, class A>
const A* gathered(const Elements& from, const Part& part, A* buffer) {
  const bool is_row = part.is_row(from);
  const int64_t row = part.row, column = part.column;
  const int64_t rows = is_row ? 1 : part.rows, n = is_row ? part.rows * part.n : part.n;
  const auto dtype = from.inner == 1 ? from.dtype : ScalarType::Undefined;
  auto of_type = [&]<class U>(U) {
    for (int64_t r = 0; r < rows; ++r) {
      const U* x = reinterpret_cast<const U*>(from.data) + from.at(row + r, column);
      A* out = buffer + r * n;
      int64_t j = 0;
      for (; j + lanes<A> <= n; j += lanes<A>) store(out + j, load(x + j));
      if (j < n) store(out + j, load_first(x + j, n - j, A(0)));
    }
    return buffer;
  };
  if (dtype == torch::headeronly::CppTypeToScalarType<A>::value)
    return rows == 1 ? reinterpret_cast<const A*>(from.data) + from.at(row, column) : of_type(A());
  if (dtype == torch::headeronly::CppTypeToScalarType<T>::value) return of_type(T());
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = from.at(row + r, column);
    if (dtype == ScalarType::Byte) {
      const uint8_t* x = reinterpret_cast<const uint8_t*>(from.data) + at;
      for (int64_t j = 0; j < n; ++j) buffer[r * n + j] = static_cast<A>(x[j]);
    } else {
      for (int64_t j = 0; j < n; ++j) buffer[r * n + j] = from.get<A>(at + j * from.inner);
    }
  }
  return buffer;
}

// Targets of several rows that have a class each.
template <class A>
const A* one_hot(const Elements& classes, const Part& part, A* buffer) {
  std::fill_n(buffer, part.rows * part.n, A(0));
  for (int64_t r = 0; r < part.rows; ++r) {
    const int64_t y = classes.get<int64_t>(classes.at(part.row + r, 0));
    if (y >= 0 && y < part.n) buffer[r * part.n + y] = 1;
  }
  return buffer;
}

// Where results go: to their place where they lie so there, else to the buffer, which `put_back` takes there.
template <class T, class A>
A* room_for(const Elements& to, const Part& part, A* buffer) {
  const bool there = std::is_same_v<T, A> && part.is_row(to) && to.inner == 1 &&
                     to.dtype == torch::headeronly::CppTypeToScalarType<A>::value;
  return there ? reinterpret_cast<A*>(to.data) + to.at(part.row, part.column) : buffer;
}

template <class T, class A>
void put_back(const Elements& to, const Part& part, const A* from) {
  const bool is_row = part.is_row(to);
  const int64_t rows = is_row ? 1 : part.rows, n = is_row ? part.rows * part.n : part.n;
  for (int64_t r = 0; r < rows; ++r, from += n) {
    const int64_t at = to.at(part.row + r, part.column);
    if (to.inner == 1 && to.dtype == torch::headeronly::CppTypeToScalarType<T>::value) {
      T* out = reinterpret_cast<T*>(to.data) + at;
      if (reinterpret_cast<const char*>(out) == reinterpret_cast<const char*>(from)) return;
      int64_t j = 0;
      for (; j + lanes<A> <= n; j += lanes<A>) store(out + j, load(from + j));
      if (j < n) store_first(out + j, load(from + j), n - j);
    } else {
      for (int64_t j = 0; j < n; ++j) to.put(at + j * to.inner, from[j]);
    }
  }
}

// Whether all that a block reads and writes, of each class, lies in memory in turn and as T.
template <class T>
bool lies_as(const SigmoidFocalCall& call) {
  auto does = [](const Elements& e) {
    return e.data == nullptr || (e.inner == 1 && e.dtype == torch::headeronly::CppTypeToScalarType<T>::value);
  };
  return does(call.input) && (!call.dense || does(call.target)) && does(call.grad_loss) && does(call.loss) &&
         does(call.grad);
}

// Rows of so few classes that each would end in a vector which is mostly empty are taken together.
template <class A>
int64_t rows_together(const SigmoidFocalCall& call) {
  return call.rows > 1 && call.classes < 4 * lanes<A> ? kSigmoidBlock / call.classes : 1;
}

// The terms of a part of up to kSigmoidBlock, and their sum. `there`: the part is of one row, and all
// lies_as<T> and is taken so; else as A, as which it is gathered.
template <class T, class A, bool there, bool forward, bool differentiate>
double sigmoid_block(const SigmoidFocalCall& call, const Part& part) {
  using X = std::conditional_t<there, T, A>;
  constexpr int64_t room = there ? 1 : kSigmoidBlock + lanes<A>;
  const int64_t n = there ? part.n : part.rows * part.n;
  alignas(64) A x_buffer[room], t_buffer[room], g_buffer[room], w_buffer[kSigmoidBlock + lanes<A>],
      loss_buffer[room], grad_buffer[room];
  auto read = [&](const Elements& from, A* buffer) {
    if constexpr (there)
      return reinterpret_cast<const X*>(from.data) + from.at(part.row, part.column);
    else
      return gathered<T, A>(from, part, buffer);
  };
  auto written = [&](const Elements& to, A* buffer) {
    if constexpr (there)
      return reinterpret_cast<X*>(to.data) + to.at(part.row, part.column);
    else
      return room_for<T, A>(to, part, buffer);
  };
  const X* x = read(call.input, x_buffer);
  const X* t = call.dense ? read(call.target, t_buffer) : nullptr;
  if constexpr (!there)
    if (!call.dense && part.rows > 1) t = one_hot(call.target, part, t_buffer);
  const A* w = call.weight.data ? gathered<A, A>(call.weight, part, w_buffer) : nullptr;
  const X* g = differentiate && call.grad_loss.data ? read(call.grad_loss, g_buffer) : nullptr;
  X* losses = forward && call.loss.data ? written(call.loss, loss_buffer) : nullptr;
  X* grads = differentiate ? written(call.grad, grad_buffer) : nullptr;
  const int64_t y = t ? -1 : call.target.get<int64_t>(call.target.at(part.row, 0)) - part.column;
  const A alpha = static_cast<A>(call.alpha), gamma = static_cast<A>(call.gamma);
  const Vec<A> zero{}, one = splat(A(1)), scale = splat(static_cast<A>(call.grad_scale));
  const Vec<A> of_one = splat(alpha < 0 ? A(1) : alpha), of_zero = splat(alpha < 0 ? A(1) : A(1) - alpha);
  double total = 0;
  Vec<A> sum{};  // of eight vectors, so that a long sum keeps its digits
  for (int64_t j = 0; j < n; j += lanes<A>) {
    const int64_t count = std::min(lanes<A>, n - j);
    const bool whole = count == lanes<A>;
    auto of = [&](const auto* from) __attribute__((always_inline)) {
      return whole ? load(from + j) : load_first(from + j, count, A(0));
    };
    Vec<A> target = zero;
    if (t != nullptr)
      target = of(t);
    else if (y >= j && y < j + count)
      target = is_first<A>(y - j + 1) & ~is_first<A>(y - j) ? one : zero;
    const Vec<A> at = of(x);
    const auto term = hard_sigmoid_focal<VectorMath<A> >(target != zero ? -at : at, gamma);
    const Vec<A> balance = target != zero ? of_one : of_zero;
    Vec<A> loss = weighed(balance, term.loss), grad = term.derivative * (target != zero ? -balance : balance);
    if (t != nullptr && any_different(target, target != zero ? one : zero)) {
      const auto soft = sigmoid_focal<VectorMath<A> >(at, target, alpha, gamma);
      const auto hard = (target == zero) | (target == one);  // which lanes are must not show in the others
      loss = hard ? loss : soft.loss, grad = hard ? grad : soft.derivative;
    }
    if (w != nullptr) loss = weighed(of(w), loss), grad *= of(w);
    if constexpr (differentiate) {
      grad *= g == nullptr ? scale : of(g);
      whole ? store(grads + j, grad) : store_first(grads + j, grad, count);
    }
    if constexpr (forward) {
      if (losses != nullptr) {
        whole ? store(losses + j, loss) : store_first(losses + j, loss, count);
      } else {
        sum += whole ? loss : (is_first<A>(count) ? loss : zero);
        if (!whole || (j / lanes<A> + 1) % 8 == 0) {
          total += static_cast<double>(horizontal_sum(sum));
          sum = zero;
        }
      }
    }
  }
  if constexpr (!there) {
    if (losses != nullptr) put_back<T>(call.loss, part, losses);
    if (grads != nullptr) put_back<T>(call.grad, part, grads);
  }
  return total + static_cast<double>(horizontal_sum(sum));
}

template <class T, class A, bool there, bool forward, bool differentiate>
void sigmoid_tasks(SigmoidFocalCall& call, int64_t task_begin, int64_t task_end) {
  const int64_t rows = there ? 1 : rows_together<A>(call);
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t first = task / call.parts * call.rows_per_task;
    const int64_t last = std::min(first + call.rows_per_task, call.rows);
    const int64_t begin = task % call.parts * call.part_size();
    const int64_t end = std::min(begin + call.part_size(), call.classes);
    double sum = 0;
    for (int64_t r = first; r < last; r += rows)
      for (int64_t c = begin; c < end; c += kSigmoidBlock)
        sum += sigmoid_block<T, A, there, forward, differentiate>(
            call, {r, std::min(rows, last - r), c, std::min(kSigmoidBlock, end - c)});
    if (forward) call.sums[task] = sum;
  }
}

template <bool forward, bool differentiate>
void sigmoid_by_dtype(SigmoidFocalCall& call, int64_t begin, int64_t end) {
  auto as = [&]<class T, class A>(T, A) {
    lies_as<T>(call) && rows_together<A>(call) == 1
        ? sigmoid_tasks<T, A, true, forward, differentiate>(call, begin, end)
        : sigmoid_tasks<T, A, false, forward, differentiate>(call, begin, end);
  };
  switch (call.input.dtype) {
    case ScalarType::Double:
      return as(double(), double());
    case ScalarType::Float:
      return as(float(), float());
    case ScalarType::BFloat16:
      return as(BFloat16(), float());
    default:
      return as(Half(), float());
  }
}

void sigmoid_forward(SigmoidFocalCall& call, int64_t begin, int64_t end) {
  call.grad.data ? sigmoid_by_dtype<true, true>(call, begin, end)
                 : sigmoid_by_dtype<true, false>(call, begin, end);
}

void sigmoid_backward(SigmoidFocalCall& call, int64_t begin, int64_t end) {
  sigmoid_by_dtype<false, true>(call, begin, end);
}

}  // namespace fastreg::FASTREG_ISA
#endif
