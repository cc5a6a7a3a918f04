// The loss without options and its gradient in one go, for rows of at most kBlock classes: the exponentials
// of a row are kept for its gradient. A vector holds classes of one row or, of rows of at most kShort
// classes, one class of several rows.
//
// Included by losses.cpp for each instruction set, hence no include guard.
namespace fastreg::FASTREG_ISA {

template <class T, class A>
struct SmallRow {
  alignas(64) A exps[kBlock + 2 * lanes<A>];

  // Fills exps with exp(x - base), in the order of load_two, and returns their sum.
  FASTREG_INLINE_MEMBER A sum(const T* x, int64_t n, A base) {
    const int64_t pairs = n / (2 * lanes<A>)*(2 * lanes<A>);
    Vec<A> sum{}, other{};
    int64_t j = 0;
    while (j < pairs) {
      Vec<A> chunk{}, other_chunk{};
      for (const int64_t end = std::min(j + kDepth * lanes<A>, pairs); j < end; j += 2 * lanes<A>) {
        const auto z = load_two(x + j);
        const Vec<A> first = exp_of<A>(z.first - base), second = exp_of<A>(z.second - base);
        store(exps + j, first);
        store(exps + j + lanes<A>, second);
        chunk += first;
        other_chunk += second;
      }
      sum += chunk;
      other += other_chunk;
    }
    for (; j < n; j += lanes<A>) {
      const Vec<A> z = n - j >= lanes<A> ? load(x + j) : load_first(x + j, n - j, A(-INFINITY));
      const Vec<A> e = exp_of<A>(z - base);
      store(exps + j, e);
      sum += e;
    }
    return horizontal_sum(sum + other);
  }

  // `finite` says that no gradient can be NaN.
  template <bool finite>
  FASTREG_INLINE_MEMBER void scale(T* grad, int64_t n, A by) {
    int64_t j = 0;
    for (; j + 2 * lanes<A> <= n; j += 2 * lanes<A>)
      store_two<finite>(grad + j, Two<Vec<A>>{load(exps + j) * by, load(exps + j + lanes<A>) * by});
    for (; j + lanes<A> <= n; j += lanes<A>) store<finite>(grad + j, load(exps + j) * by);
    if (j < n) store_first(grad + j, load(exps + j) * by, n - j);
  }
};

constexpr int64_t kShort = 32;

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
  SmallRow<T, A> row;
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
      const A high = horizontal_max(largest<A>(x, n, splat(A(-INFINITY))));
      const A sum = row.sum(x, n, high == -INFINITY ? A(0) : high);  // -inf - -inf would be NaN
      const A log_p = Softmax<A>{high, log(sum)}.log_p(static_cast<A>(x[y])), by = call.grad_scale / sum;
      losses -= log_p;
      if (by * 0 == 0)
        row.template scale<true>(grad, n, by);
      else
        row.template scale<false>(grad, n, by);
      grad[y] = static_cast<T>(call.grad_scale * expm1(log_p));
    }
    call.sums[task] = losses;
  }
}

}  // namespace fastreg::FASTREG_ISA
