// The loss without options and its gradient in one go, for rows of at most kBlock classes: the exponentials
// of a row are kept for its gradient.
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

template <class T, class A>
void small_rows(const SmallCrossEntropy<A>& call, int64_t task_begin, int64_t task_end) {
  SmallRow<T, A> row;
  const int64_t n = call.classes;
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t first = task * call.rows_per_task, last = std::min(first + call.rows_per_task, call.rows);
    double losses = 0;
    for (int64_t r = first; r < last; ++r) {
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
