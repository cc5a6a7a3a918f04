// The softmax losses by columns: a vector holds rows side by side, whose classes are far apart.
//
// Included by losses.cpp for each instruction set, hence no include guard.
namespace fastreg::FASTREG_ISA {

template <class A>
using Lane = std::remove_cvref_t<decltype(Int<A>{}[0])>;

// The rows of a task: (o, first) to (o, first + n - 1), and what is known of each.
template <class T, class A>
struct Columns {
  CrossEntropy<A>& call;
  int64_t o = 0, first = 0, n = 0;
  const T* x = nullptr;
  RowTargets<A> targets[kColumns];
  alignas(64) Lane<A> y[2][kColumns];
  alignas(64) A shares[2][kColumns], margins[2][kColumns];
  alignas(64) A high[kColumns], log_sum[kColumns], slopes[kColumns], kept[kColumns];

  explicit Columns(CrossEntropy<A>& call) : call(call) {}

  void enter(int64_t task) {
    const int64_t tiles = (call.inner + call.rows_per_task - 1) / call.rows_per_task;
    o = task / tiles, first = (task - o * tiles) * call.rows_per_task;
    n = std::min(call.rows_per_task, call.inner - first);
    x = reinterpret_cast<const T*>(call.input) + o * call.input_outer + first;
    for (int64_t i = 0; i < rounded(); ++i) {
      targets[i] = i < n ? call.targets_of(o, first + i) : RowTargets<A>{false, {-1, -1}, {0, 0}};
      high[i] = log_sum[i] = slopes[i] = 0;
      kept[i] = targets[i].kept;
      for (int k = 0; k < 2; ++k) {
        const int64_t of = targets[i].kept ? targets[i].y[k] : -1;
        y[k][i] = static_cast<Lane<A>>(of);
        shares[k][i] = targets[i].share[k];
        margins[k][i] = call.margin && of >= 0 ? targets[i].share[k] * call.margin.data[of] : A(0);
      }
    }
  }

  int64_t rounded() const { return (n + lanes<A> - 1) / lanes<A> * lanes<A>; }

  // z and, with factors of the rows' own, the factor of the class c in the rows from v on, a lane each.
  template <Factors are>
  FASTREG_INLINE_MEMBER Two<Vec<A>> at(int64_t v, int64_t c) const {
    const T* from = x + c * call.input_class + v;
    Vec<A> z = n - v >= lanes<A> ? load(from) : load_first(from, n - v, A(0)), factor{};
    if (!call.plain) z = call.adjustment ? z * call.scale + call.adjustment.data[c] : z * call.scale;
    const Lane<A> lane = static_cast<Lane<A>>(c);
    const bool two = call.other_target.data != nullptr;
    if (are == Factors::of_row && call.probabilities) {
      alignas(64) A q[lanes<A>]{};
      read_as(call.target, call.target.at(o, first + v) + c * call.target_class, call.target.inner,
              std::min(lanes<A>, n - v), q);
      factor = load(q);
      if (call.margin) z -= factor * call.margin.data[c];
    } else if (call.margin || are == Factors::of_row) {
      for (int k = 0; k < 1 + two; ++k) {
        const auto here = load_raw<Int<A>>(y[k] + v) == lane;
        if (call.margin) z -= here ? load(margins[k] + v) : Vec<A>{};
        if (are == Factors::of_row) factor = here ? load(shares[k] + v) : factor;
      }
    }
    if constexpr (are == Factors::of_row) {
      const A every = call.smoothing / static_cast<A>(call.classes);
      factor = ((1 - call.smoothing) * factor + every) * call.alpha_scale;
      if (call.factors.data != nullptr) factor = share(factor, splat(call.factors.data[c]));
    }
    return {z, factor};
  }

  // The losses of the rows, into high and log_sum their softmax.
  template <Factors are>
  void read(double* sums) {
    constexpr bool linear = are != Factors::none;
    alignas(64) A sum[kColumns], weighted[kColumns], lost[kColumns];
    alignas(64) A weights[kColumns], weights_lost[kColumns];
    alignas(64) A best[kColumns];
    alignas(64) Lane<A> argmax[kColumns];
    for (int64_t i = 0; i < rounded(); ++i) {
      high[i] = best[i] = -INFINITY;
      sum[i] = weighted[i] = lost[i] = weights[i] = weights_lost[i] = 0;
      argmax[i] = 0;
    }
    for (int64_t begin = 0; begin < call.classes; begin += kDepth) {
      const int64_t end = std::min(begin + kDepth, call.classes);
      for (int64_t v = 0; v < n; v += lanes<A>) {
        const Vec<A> high_before = load(high + v);
        Vec<A> z[kDepth], factor[kDepth], top = high_before;
        for (int64_t c = begin; c < end; ++c) {
          const auto here = at<are>(v, c);
          z[c - begin] = here.first;
          factor[c - begin] = are == Factors::of_class ? splat(call.factors.at(c)) : here.second;
          top = larger(here.first, top);
        }
        const Vec<A> base = top == -INFINITY ? Vec<A>{} : top;
        Vec<A> total = load(sum + v) * exp_of<A>(high_before - base), chunk{}, slanted{}, weight{};
        if constexpr (linear) {
          const Vec<A> base_before = high_before == -INFINITY ? Vec<A>{} : high_before;
          slanted = load(weights + v) * (base_before - base);
        }
        for (int64_t c = begin; c < end; ++c) {
          const Vec<A> d = z[c - begin] - base;
          chunk = plus_exp(chunk, d);  // apart, because a long sum rounds each small term away
          if constexpr (linear) {
            slanted += share(factor[c - begin], d);
            weight += factor[c - begin];
          }
        }
        store(high + v, top);
        store(sum + v, total + chunk);
        if constexpr (linear) {
          LongSum<A> long_sum{load(weighted + v), load(lost + v)};
          long_sum.add(slanted);
          store(weighted + v, long_sum.total);
          store(lost + v, long_sum.lost);
          LongSum<A> all_weights{load(weights + v), load(weights_lost + v)};
          all_weights.add(weight);
          store(weights + v, all_weights.total);
          store(weights_lost + v, all_weights.lost);
        }
        if (call.argmax) look_for_argmax(v, begin, end, best + v, argmax + v);
      }
    }
    for (int64_t i = 0; i < n; ++i) log_sum[i] = log_of_sum(high[i], sum[i]);
    if constexpr (are == Factors::of_row) {
      if (call.gamma != 0)
        sums_of(weighted, slopes);
      else
        std::copy_n(weights, n, slopes);
    }
    for (int64_t i = 0; i < n; ++i) {
      if (!targets[i].kept) {
        leave_out_row(call, o, first + i);
        continue;
      }
      const Found<A> found{{high[i], log_sum[i]}, weighted[i], weights[i], argmax[i], slopes[i]};
      A loss;
      if constexpr (are == Factors::of_row)
        loss = (call.gamma == 0 ? weights[i] * log_sum[i] - weighted[i] : weighted[i]) +
               z_loss_of(call.z_loss, found.softmax);
      else
        loss = index_loss(call, x + i, targets[i], found);
      finish_row(call, o, first + i, targets[i], found, loss, sums);
    }
  }

  void look_for_argmax(int64_t v, int64_t begin, int64_t end, A* best, Lane<A>* argmax) const {
    Vec<A> highest = load(best);
    auto index = load_raw<Int<A>>(argmax);
    for (int64_t c = begin; c < end; ++c) {
      const T* from = x + c * call.input_class + v;
      const Vec<A> here = n - v >= lanes<A> ? load(from) : load_first(from, n - v, A(0));
      index = here > highest ? Int<A>{} + static_cast<Lane<A>>(c) : index;
      highest = here > highest ? here : highest;
    }
    store(best, highest);
    __builtin_memcpy(argmax, &index, sizeof(index));
  }

  // The sums of factor * focal term and of factor * its slope of each row.
  void sums_of(A* losses, A* slopes) const {
    for (int64_t v = 0; v < n; v += lanes<A>) {
      LongSum<A> all_losses, all_slopes;
      for (int64_t c = 0; c < call.classes;) {
        Vec<A> loss{}, slope{};
        for (const int64_t end = std::min(c + kDepth, call.classes); c < end; ++c) {
          const auto here = at<Factors::of_row>(v, c);
          const auto term = focal_of(v, here.first);
          loss += share(here.second, term.term);
          slope += share(here.second, term.slope);
        }
        all_losses.add(loss);
        all_slopes.add(slope);
      }
      store(losses + v, all_losses.total);
      store(slopes + v, all_slopes.total);
    }
  }

  FASTREG_INLINE_MEMBER auto focal_of(int64_t v, Vec<A> z) const {
    return focal<VectorMath<A>>((z - load(high + v)) - load(log_sum + v), call.gamma);
  }

  template <Factors are>
  void differentiate(T* grad) {
    alignas(64) A slope[kColumns]{}, spread[kColumns]{};
    A at_target[2][kColumns];
    for (int64_t i = 0; i < n; ++i) {
      if (!targets[i].kept) continue;
      const Softmax<A> softmax{high[i], log_sum[i]};
      const A incoming = call.grad_of(o, first + i);
      if constexpr (are == Factors::of_row) {
        spread[i] = incoming * call.scale;  // what all is multiplied by, see below
      } else {
        const IndexGradient<A> row = index_gradient(call, x + i, 0, targets[i], softmax, A(0), incoming);
        slope[i] = row.slope, spread[i] = row.spread;
        at_target[0][i] = row.at[0], at_target[1][i] = row.at[1];
      }
    }
    if constexpr (are == Factors::of_row)
      for (int64_t i = 0; i < n; ++i)
        slope[i] = slopes[i] + (call.z_loss == 0 ? A(0) : 2 * call.z_loss * (high[i] + log_sum[i]));
    for (int64_t c = 0; c < call.classes; ++c) {
      T* to = grad + c * call.grad_class;
      for (int64_t v = 0; v < n; v += lanes<A>) {
        const auto here = at<are>(v, c);
        Vec<A> g;
        if constexpr (are == Factors::of_row) {  // as Row::differentiate_own
          const auto term = focal_of(v, here.first);
          const Vec<A> d = share(here.second, term.slope);
          g = (call.gamma == 0 ? term.p * load(slope + v) - d : term.p * (load(slope + v) - d) - d * term.u) *
              load(spread + v);
        } else {
          g = exp_of<A>((here.first - load(high + v)) - load(log_sum + v)) * load(slope + v);
          if constexpr (are == Factors::of_class) g -= load(spread + v) * call.factors.at(c);
        }
        g = load(kept + v) != 0 ? g : Vec<A>{};
        if (n - v >= lanes<A>)
          store(to + v, g);
        else
          store_first(to + v, g, n - v);
      }
    }
    if constexpr (are != Factors::of_row)
      for (int64_t i = 0; i < n; ++i)
        for (int k = 0; k < 2; ++k)
          if (y[k][i] >= 0) grad[y[k][i] * call.grad_class + i] = static_cast<T>(at_target[k][i]);
  }
};

template <Factors are, class T, class A>
void forward_columns(CrossEntropy<A>& call, int64_t task_begin, int64_t task_end) {
  Columns<T, A> columns(call);
  for (int64_t task = task_begin; task < task_end; ++task) {
    double sums[2] = {0, 0};
    columns.enter(task);
    columns.template read<are>(sums);
    if (call.grad) columns.template differentiate<are>(gradient_of<T>(call, columns.o, columns.first));
    call.sums[2 * task] = sums[0];
    call.sums[2 * task + 1] = sums[1];
  }
}

template <Factors are, class T, class A>
void backward_columns(CrossEntropy<A>& call, int64_t task_begin, int64_t task_end) {
  Columns<T, A> columns(call);
  for (int64_t task = task_begin; task < task_end; ++task) {
    columns.enter(task);
    for (int64_t i = 0; i < columns.n; ++i) {
      if (!columns.targets[i].kept) continue;
      const int64_t r = call.row(columns.o, columns.first + i);
      columns.high[i] = call.high[r], columns.log_sum[i] = call.log_sum[r];
      if (call.slopes) columns.slopes[i] = call.slopes[r];
    }
    columns.template differentiate<are>(gradient_of<T>(call, columns.o, columns.first));
  }
}

}  // namespace fastreg::FASTREG_ISA
