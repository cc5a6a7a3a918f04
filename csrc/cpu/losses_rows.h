// The softmax losses by rows: a vector holds classes of one row.
//
// Included by losses.cpp for each instruction set, hence no include guard.
namespace fastreg::FASTREG_ISA {

// The largest of x[0, n).
template <class A, class T>
FASTREG_INLINE Vec<A> largest(const T* x, int64_t n, Vec<A> high) {
  Vec<A> other = high;
  int64_t j = 0;
  for (; j + 2 * lanes<A> <= n; j += 2 * lanes<A>) {
    const auto z = load_two(x + j);
    high = larger(z.first, high);
    other = larger(z.second, other);
  }
  if (j + lanes<A> <= n) {
    high = larger(load(x + j), high);
    j += lanes<A>;
  }
  if (j < n) other = larger(load_first(x + j, n - j, A(-INFINITY)), other);
  return larger(high, other);
}

// The first of x[0, n) that is `value`, which is among them.
template <class T, class A>
int64_t first_of(const T* x, int64_t n, A value) {
  constexpr int64_t step = 4 * lanes<A>;
  int64_t j = 0;
  for (; j + step <= n; j += step) {
    auto here = load(x + j) == value;
    for (int64_t v = 1; v < 4; ++v) here |= load(x + j + v * lanes<A>) == value;
    if (horizontal_sum(here) != 0) break;
  }
  while (j < n - 1 && static_cast<A>(x[j]) != value) ++j;
  return j;
}

// The sum of exp(x - base), and of factors * (x - base); on the way the largest x.
template <bool linear, class T, class A>
FASTREG_INLINE Partial<A> sum_block(const T* x, int64_t n, const A* factors, A base) {
  Vec<A> high = splat(A(-INFINITY)), sum{};
  LongSum<A> weighted;
  int64_t j = 0;
  if constexpr (!linear) {
    Vec<A> other = high, other_sum{};
    for (const int64_t whole = n / (2 * lanes<A>)*(2 * lanes<A>); j < whole;) {
      Vec<A> chunk{}, other_chunk{};
      for (const int64_t end = std::min(j + kDepth * lanes<A>, whole); j < end; j += 2 * lanes<A>) {
        const auto z = load_two(x + j);
        high = larger(z.first, high);
        other = larger(z.second, other);
        chunk += exp_of<A>(z.first - base);
        other_chunk += exp_of<A>(z.second - base);
      }
      sum += chunk;
      other_sum += other_chunk;
    }
    high = larger(high, other);
    sum += other_sum;
  }
  for (const int64_t whole = n / lanes<A> * lanes<A>; j < whole;) {
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
  if (const int64_t rest = n - j) {
    const Vec<A> z = load_first(x + j, rest, A(-INFINITY)), d = z - base;
    high = larger(z, high);
    sum += exp_of<A>(d);
    if constexpr (linear) {
      const Vec<A> term = factors ? share(load_first(factors + j, rest, A(0)), d) : d;
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

// A row of the call, and room for what a block of it becomes.
template <class T, class A>
struct Row {
  CrossEntropy<A>& call;
  int64_t o = 0, i = 0;
  RowTargets<A> targets{};
  const T* x = nullptr;
  int64_t gathered = -1;  // the first class of the block that is in z and factors
  alignas(64) A z[kBlock], factors[kBlock];

  explicit Row(CrossEntropy<A>& call) : call(call) {}

  // Whether the row counts.
  bool enter(int64_t r) {
    o = r / call.inner, i = r - o * call.inner, gathered = -1;
    x = reinterpret_cast<const T*>(call.input) + o * call.input_outer + i * call.input_inner;
    targets = call.targets_of(o, i);
    return targets.kept;
  }

  // Into z the z of the classes [begin, begin + n), and with factors of its own into factors these. Returns
  // the sum of the factors.
  template <Factors are>
  A gather(int64_t begin, int64_t n) {
    if (are == Factors::of_row && gathered == begin) return 0;
    gathered = begin;
    const T* from = x + begin * call.input_class;
    const A* adjustment = call.adjustment ? call.adjustment.data + begin : nullptr;
    int64_t j = 0;
    if (call.input_class == 1) {
      for (; j + lanes<A> <= n; j += lanes<A>) {
        const Vec<A> scaled = load(from + j) * call.scale;
        store(z + j, adjustment ? scaled + load(adjustment + j) : scaled);
      }
    }
    for (; j < n; ++j) z[j] = call.z(static_cast<A>(from[j * call.input_class]), begin + j);
    for (int k = 0; k < 2; ++k) {
      const int64_t at = targets.y[k] - begin;
      if (call.margin && targets.y[k] >= 0 && at >= 0 && at < n)
        z[at] -= targets.share[k] * call.margin.data[targets.y[k]];
    }
    if constexpr (are != Factors::of_row) return 0;
    return gather_factors(begin, n);
  }

  A gather_factors(int64_t begin, int64_t n) {
    if (call.probabilities) {
      read_as(call.target, call.target.at(o, i) + begin * call.target_class, call.target_class, n, factors);
      if (call.margin)
        for (int64_t j = 0; j < n; ++j) z[j] -= factors[j] * call.margin.data[begin + j];
      if (call.smoothing != 0 || call.alpha_scale != 1 || call.factors.data != nullptr)
        for (int64_t j = 0; j < n; ++j) factors[j] = call.factor(factors[j], begin + j);
    } else {
      for (int64_t j = 0; j < n; ++j) factors[j] = call.factor(A(0), begin + j);
      for (int k = 0; k < 2; ++k) {
        const int64_t at = targets.y[k] - begin;
        if (targets.y[k] >= 0 && at >= 0 && at < n) factors[at] = call.factor(targets.share[k], targets.y[k]);
      }
    }
    LongSum<A> total;
    int64_t j = 0;
    for (; j + lanes<A> <= n; j += lanes<A>) total.add(load(factors + j));
    if (j < n) total.add(load_first(factors + j, n - j, A(0)));
    return horizontal_sum(total.total);
  }

  int64_t size(int64_t block) const { return std::min(kBlock, call.classes - block * kBlock); }

  template <Factors are>
  Weighted<A> reduce(int64_t block) {
    const int64_t begin = block * kBlock, n = size(block);
    constexpr bool linear = are != Factors::none;
    if constexpr (are != Factors::of_row) {
      const A* of_class = call.factors ? call.factors.data + begin : nullptr;
      const A weight = linear ? call.block_factors[block] : A(0);
      if (call.plain && call.input_class == 1) return {reduce_block<linear>(x + begin, n, of_class), weight};
      gather<are>(begin, n);
      return {reduce_block<linear>(z, n, of_class), weight};
    } else {
      const A weight = gather<are>(begin, n);
      return {reduce_block<linear>(z, n, factors), weight};
    }
  }

  // The first class of the largest x, if a block has a larger one than those before it. `high` is the block's
  // largest z.
  void look_for_argmax(int64_t block, A high, A& best, int64_t& argmax) const {
    const int64_t begin = block * kBlock, n = size(block);
    if (call.input_class == 1) {
      if (!call.plain) high = horizontal_max(largest<A>(x + begin, n, splat(A(-INFINITY))));
      if (high > best) best = high, argmax = begin + first_of(x + begin, n, high);
      return;
    }
    for (int64_t c = begin; c < begin + n; ++c) {
      const A at = static_cast<A>(x[c * call.input_class]);
      if (at > best) best = at, argmax = c;
    }
  }

  template <Factors are>
  Found<A> read(int64_t r) {
    Weighted<A> whole{{-INFINITY, 0, 0}, 0};
    A best = -INFINITY;
    int64_t argmax = 0;
    for (int64_t b = 0; b < call.blocks(); ++b) {
      const Weighted<A> next = call.partials.empty() ? reduce<are>(b) : call.partials[r * call.blocks() + b];
      whole.part = b == 0 ? next.part : merge(whole.part, whole.weight, next.part, next.weight);
      whole.weight += next.weight;
      if (call.argmax) look_for_argmax(b, next.part.high, best, argmax);
    }
    return {{whole.part.high, log(whole.part.sum)}, whole.part.linear, whole.weight, argmax};
  }

  // The sum over the row of factor * f(log p, factor), block by block.
  template <class F>
  A sum_of(const Softmax<A>& softmax, const F& f) {
    double total = 0;
    for (int64_t b = 0; b < call.blocks(); ++b) {
      const int64_t n = size(b);
      gather<Factors::of_row>(b * kBlock, n);
      LongSum<A> sum;
      for (int64_t j = 0; j < n; j += lanes<A>) {
        const bool whole = j + lanes<A> <= n;
        const Vec<A> at = whole ? load(z + j) : load_first(z + j, n - j, A(0));
        const Vec<A> factor = whole ? load(factors + j) : load_first(factors + j, n - j, A(0));
        sum.add(share(factor, f((at - softmax.high) - softmax.log_sum)));
      }
      total += static_cast<double>(horizontal_sum(sum.total));
    }
    return static_cast<A>(total);
  }

  template <Factors are>
  A loss(const Found<A>& found) {
    if constexpr (are != Factors::of_row) return index_loss(call, x, targets, found);
    const A terms = call.gamma == 0 ? found.weight * found.softmax.log_sum - found.linear
                                    : sum_of(found.softmax, [&](Vec<A> log_p) {
                                        return focal_term<VectorMath<A>>(log_p, call.gamma);
                                      });
    return terms + z_loss_of(call.z_loss, found.softmax);
  }

  // The gradient of the classes [begin, end).
  template <Factors are>
  void differentiate(const Softmax<A>& softmax, T* grad, int64_t begin, int64_t end) {
    const A incoming = call.grad_of(o, i);
    if constexpr (are == Factors::of_row) {
      differentiate_factors(softmax, incoming * call.scale, grad);
    } else {
      const IndexGradient<A> row = index_gradient(call, x, targets, softmax, incoming);
      if (call.plain && call.input_class == 1 && call.grad_class == 1) {
        write_gradient<are>(x + begin, begin, end - begin, softmax, row, grad + begin);
      } else {
        for (int64_t c = begin; c < end; c += kBlock) {
          const int64_t n = std::min(kBlock, end - c);
          gather<are>(c, n);
          write(grad, c, n, [&](T* out) { write_gradient<are>(z, c, n, softmax, row, out); });
        }
      }
      for (int k = 0; k < 2; ++k) {
        const int64_t y = targets.y[k];
        if (y >= begin && y < end) grad[y * call.grad_class] = static_cast<T>(row.at[k]);
      }
    }
  }

  // With d the derivative of a class's own term by its log p, and D the sum of these, it is p * (D - d) - (1
  // - p) * d.
  void differentiate_factors(const Softmax<A>& softmax, A incoming, T* grad) {
    A rest = call.z_loss == 0 ? A(0) : 2 * call.z_loss * (softmax.high + softmax.log_sum);
    auto slope = [&](Vec<A> log_p) { return focal_slope<VectorMath<A>>(log_p, call.gamma); };
    if (call.gamma == 0)
      for (int64_t b = 0; b < call.blocks(); ++b)
        gathered = -1, rest += gather<Factors::of_row>(b * kBlock, size(b));
    else
      rest += sum_of(softmax, slope);
    for (int64_t b = 0; b < call.blocks(); ++b) {
      const int64_t begin = b * kBlock, n = size(b);
      gather<Factors::of_row>(begin, n);
      write(grad, begin, n, [&](T* out) {
        if (call.gamma == 0)
          return gradient<true, false>(z, n, factors, softmax, rest * incoming, incoming, out);
        for (int64_t j = 0; j < n; j += lanes<A>) {
          const bool whole = j + lanes<A> <= n;
          const Vec<A> at = whole ? load(z + j) : load_first(z + j, n - j, A(0));
          const Vec<A> factor = whole ? load(factors + j) : load_first(factors + j, n - j, A(0));
          const Vec<A> log_p = (at - softmax.high) - softmax.log_sum, d = share(factor, slope(log_p));
          const Vec<A> g = incoming * (exp_of<A>(log_p) * (rest - d) + d * expm1_of<A>(log_p));
          whole ? store(out + j, g) : store_first(out + j, g, n - j);
        }
      });
    }
  }

  // Has the gradient of the classes [begin, begin + n) written where it belongs.
  template <class F>
  void write(T* grad, int64_t begin, int64_t n, const F& to) {
    if (call.grad_class == 1) return to(grad + begin);
    alignas(64) T out[kBlock];
    to(out);
    for (int64_t j = 0; j < n; ++j) grad[(begin + j) * call.grad_class] = out[j];
  }

  template <Factors are, class In>
  void write_gradient(const In* from, int64_t begin, int64_t n, const Softmax<A>& softmax,
                      const IndexGradient<A>& row, T* grad) const {
    const A* of_class = call.factors ? call.factors.data + begin : nullptr;
    if constexpr (are == Factors::of_class) {
      gradient<true, false>(from, n, of_class, softmax, row.slope, row.spread, grad);
    } else if ((softmax.high + softmax.log_sum + row.slope) * 0 == 0) {
      if (sizeof(T) == 2 && fabs(softmax.high) < (std::is_same_v<T, Half> ? 64 : 512))
        coarse_gradient(from, n, softmax, row.slope, grad);
      else
        gradient<false, true>(from, n, of_class, softmax, row.slope, A(0), grad);
    } else {
      gradient<false, false>(from, n, of_class, softmax, row.slope, A(0), grad);
    }
  }

  // `finite` says that no gradient can be NaN.
  template <bool spread, bool finite, class In>
  static void gradient(const In* from, int64_t n, const A* of_class, const Softmax<A>& softmax, A slope,
                       A share, T* grad) {
    auto of = [&](Vec<A> at) { return exp_of<A>((at - softmax.high) - softmax.log_sum) * slope; };
    int64_t j = 0;
    if constexpr (!spread && std::is_same_v<In, T>) {
      for (; j + 2 * lanes<A> <= n; j += 2 * lanes<A>) {
        const auto at = load_two(from + j);
        store_two<finite>(grad + j, Two<Vec<A>>{of(at.first), of(at.second)});
      }
    }
    for (; j + lanes<A> <= n; j += lanes<A>) {
      Vec<A> g = of(load(from + j));
      if constexpr (spread) g -= of_class ? load(of_class + j) * share : splat(share);
      store<finite>(grad + j, g);
    }
    if (j < n) {
      Vec<A> g = of(load_first(from + j, n - j, A(0)));
      if constexpr (spread) g -= of_class ? load_first(of_class + j, n - j, A(0)) * share : splat(share);
      store_first(grad + j, g, n - j);
    }
  }

  // The same in fewer digits, for gradients that are rounded to 16 bits: with the log-sum-exp as one number,
  // where it is not so large that this would show.
  template <class In>
  static void coarse_gradient(const In* from, int64_t n, const Softmax<A>& softmax, A slope, T* grad) {
    if constexpr (sizeof(T) == 2) {
      constexpr double log2_e = 1.4426950408889634;
      const float base = static_cast<float>(-log2_e * (static_cast<double>(softmax.high) + softmax.log_sum));
      auto of = [&](Vec<float> at) { return coarse_exp2<T>(at * static_cast<float>(log2_e) + base) * slope; };
      int64_t j = 0;
      for (; std::is_same_v<In, T> && j + 2 * lanes<A> <= n; j += 2 * lanes<A>) {
        const auto at = load_two(from + j);
        store_two<true>(grad + j, Two<Vec<A>>{of(at.first), of(at.second)});
      }
      for (; j < n; j += lanes<A>) {
        if (j + lanes<A> <= n)
          store<true>(grad + j, of(load(from + j)));
        else
          store_first(grad + j, of(load_first(from + j, n - j, A(0))), n - j);
      }
    }
  }
};

template <Factors are, class T, class A>
void forward_rows(CrossEntropy<A>& call, int64_t task_begin, int64_t task_end) {
  Row<T, A> row(call);
  const bool differentiate = call.grad != nullptr && call.partials.empty();
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t begin = task * call.rows_per_task, end = std::min(begin + call.rows_per_task, call.rows());
    double sums[2] = {0, 0};
    for (int64_t r = begin; r < end; ++r) {
      if (!row.enter(r)) {
        leave_out_row(call, row.o, row.i);
        if (differentiate) fill_zero(call, gradient_of<T>(call, row.o, row.i), 0, call.classes);
        continue;
      }
      const Found<A> found = row.template read<are>(r);
      finish_row(call, row.o, row.i, row.targets, found, row.template loss<are>(found), sums);
      if (differentiate)
        row.template differentiate<are>(found.softmax, gradient_of<T>(call, row.o, row.i), 0, call.classes);
    }
    call.sums[2 * task] = sums[0];
    call.sums[2 * task + 1] = sums[1];
  }
}

template <Factors are, class T, class A>
void reduce_blocks_of(CrossEntropy<A>& call, int64_t begin, int64_t end) {
  Row<T, A> row(call);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t r = at / call.blocks();
    if (row.enter(r)) call.partials[at] = row.template reduce<are>(at - r * call.blocks());
  }
}

template <Factors are, class T, class A>
void backward_rows(CrossEntropy<A>& call, int64_t task_begin, int64_t task_end) {
  Row<T, A> row(call);
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t part = task % call.parts, begin = part * kTask;
    const int64_t end = call.parts == 1 ? call.classes : std::min(begin + kTask, call.classes);
    const int64_t first = task / call.parts * call.rows_per_task;
    const int64_t last = std::min(first + call.rows_per_task, call.rows());
    for (int64_t r = first; r < last; ++r) {
      const bool kept = row.enter(r);
      T* grad = gradient_of<T>(call, row.o, row.i);
      const int64_t at = call.row(row.o, row.i);
      if (kept)
        row.template differentiate<are>({call.high[at], call.log_sum[at]}, grad, begin, end);
      else
        fill_zero(call, grad, begin, end);
    }
  }
}

}  // namespace fastreg::FASTREG_ISA
