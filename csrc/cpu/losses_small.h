// The loss without options and its gradient in one go, for rows of at most kBlock classes: the exponentials
// of a row are kept for its gradient. A vector holds classes of one row or, of rows of at most kShort
// classes, one class of several rows.
//
// Included by losses.cpp for each instruction set, hence no include guard.
namespace fastreg::FASTREG_ISA {

// The rows [first, last), at most `lanes` of them; returns the sum of their losses.
template <class T, class A>
FASTREG_INLINE double short_rows(const SmallCrossEntropy<A>& call, int64_t first, int64_t last) {
  const int64_t n = call.classes, rows = last - first;
  const T* x = reinterpret_cast<const T*>(call.input) + first * call.input_row;
  T* grad = reinterpret_cast<T*>(call.grad) + first * call.grad_row;
  const int64_t* target = call.target + first * call.target_row;
  alignas(64) A z[kShort * lanes<A>];
  int64_t classes[lanes<A>];  // the target, or -1 for a row that is left out
  Vec<A> at_target{};
  if (rows < lanes<A>) std::fill_n(z, n * lanes<A>, A(0));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < n; ++c) z[c * lanes<A> + r] = static_cast<A>(x[r * call.input_row + c]);
    const int64_t y = target[r * call.target_row];
    classes[r] = y == call.ignore_index ? -1 : y;
    if (classes[r] >= 0) at_target[r] = z[y * lanes<A> + r];
  }
  Vec<A> high = splat(A(-INFINITY)), sum{};
  for (int64_t c = 0; c < n; ++c) high = larger(load(z + c * lanes<A>), high);
  const Vec<A> base = high == -INFINITY ? Vec<A>{} : high;  // -inf - -inf would be NaN
  for (int64_t c = 0; c < n; ++c) {
    const Vec<A> e = exp_of<A>(load(z + c * lanes<A>) - base);
    store(z + c * lanes<A>, e);
    sum += e;
  }
  const Vec<A> log_p = (at_target - high) - log_of(sum), by = call.grad_scale / sum;
  const Vec<A> slope = expm1_of<A>(log_p) * call.grad_scale;
  for (int64_t c = 0; c < n; ++c) store(z + c * lanes<A>, load(z + c * lanes<A>) * by);
  double losses = 0;
  for (int64_t r = 0; r < rows; ++r, grad += call.grad_row) {
    if (classes[r] < 0) {
      std::fill_n(grad, n, static_cast<T>(A(0)));
      continue;
    }
    for (int64_t c = 0; c < n; ++c) grad[c] = static_cast<T>(z[c * lanes<A> + r]);
    grad[classes[r]] = static_cast<T>(slope[r]);
    losses -= log_p[r];
  }
  return losses;
}

template <class T, class A>
void small_rows(const SmallCrossEntropy<A>& call, int64_t task_begin, int64_t task_end) {
  alignas(64) A exps[kBlock];
  const int64_t n = call.classes;
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t first = task * call.rows_per_task, last = std::min(first + call.rows_per_task, call.rows);
    double losses = 0;
    if (n <= kShort)
      for (int64_t r = first; r < last; r += lanes<A>)
        losses += short_rows<T>(call, r, std::min(r + lanes<A>, last));
    for (int64_t r = first; n > kShort && r < last; ++r) {
      const T* x = reinterpret_cast<const T*>(call.input) + r * call.input_row;
      T* grad = reinterpret_cast<T*>(call.grad) + r * call.grad_row;
      const int64_t y = call.target[r * call.target_row];
      if (y == call.ignore_index) {
        std::fill_n(grad, n, static_cast<T>(A(0)));
        continue;
      }
      const Partial<A> part = reduce_keeping<false>(Direct<T, A>{x}, n, Ones<A>{}, exps);
      const A log_p = Softmax<A>{part.high, log(part.sum)}.log_p(static_cast<A>(x[y]));
      losses -= log_p;
      scale_exps<false, Direct<T, A>>(exps, n, call.grad_scale / part.sum, Ones<A>{}, A(0), grad);
      grad[y] = static_cast<T>(call.grad_scale * expm1(log_p));
    }
    call.sums[task] = losses;
  }
}

}  // namespace fastreg::FASTREG_ISA
