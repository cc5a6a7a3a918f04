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

// Vectors to fetch ahead where arrays of all classes come beside a row, or what is written passes by the
// caches: the processor does not follow the row then. None may be left out, or it waits for that one.
constexpr int64_t kAhead = 8 * kDepth;

// The most classes whose arrays stay in the first-level cache beside the rows: with no more of them the
// processor does follow, and fetching ahead only takes time.
constexpr int64_t kNear = 2048;

// Asks for x[0, 2 * lanes<A>), for the cache of that level.
template <int level, class A, class T>
FASTREG_INLINE void fetch_two(const T* x) {
  for (int64_t k = 0; k < 2 * lanes<A>; k += 64 / sizeof(T)) __builtin_prefetch(x + k, 0, 4 - level);
}

// Rounded to Out, if that is bf16 and `finite`: only then in a Quick, whose last digits mean nothing, so that
// what lies just between two numbers may go either way.
template <bool finite, class Out, class V>
FASTREG_INLINE V nearly(V v) {
  if constexpr (finite && std::is_same_v<Out, BFloat16>)
    return bits<V>((bits<Words>(v) + 0x8000) & 0xffff0000);
  return v;
}

// ---- where the z of a block come from
// From memory. two() may hand out the elements in another order, and put_two() takes them so.
template <class T, class A>
struct Direct {
  using Element = T;
  static constexpr bool two_arrays = false;
  const T* x;

  FASTREG_INLINE_MEMBER Vec<A> at(int64_t j) const { return load(x + j); }
  FASTREG_INLINE_MEMBER Vec<A> first(int64_t j, int64_t n, A fill) const {
    return load_first(x + j, n, fill);
  }
  FASTREG_INLINE_MEMBER Two<Vec<A>> two(int64_t j) const { return load_two(x + j); }
  template <int level = 2>
  FASTREG_INLINE_MEMBER void fetch(int64_t j) const {
    fetch_two<level, A>(x + j);
  }

  // `stream`: past the caches, if the elements fill whole vectors.
  template <bool finite, class Out>
  FASTREG_INLINE void put_two(Out* to, Two<Vec<A>> v, bool stream) {
    if constexpr (!std::is_same_v<T, Out>) {
      store<finite>(to, nearly<finite, Out>(v.first));
      store<finite>(to + lanes<A>, nearly<finite, Out>(v.second));
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      const auto rounded = [](Vec<A> v) __attribute__((always_inline)) {
        return finite ? bits<Words>(nearly<finite, Out>(v)) : rounded_to_bfloat16<false>(v);
      };
      const Words w = rounded(v.first) >> 16 | (rounded(v.second) & 0xffff0000);
      if (stream)
        store_past_caches(reinterpret_cast<A*>(to), bits<Vec<A>>(w));
      else
        __builtin_memcpy(to, &w, sizeof(w));
    } else if (stream && std::is_same_v<T, A>) {
      store_past_caches(reinterpret_cast<A*>(to), v.first);
      store_past_caches(reinterpret_cast<A*>(to) + lanes<A>, v.second);
    } else {
      store(to, v.first);
      store(to + lanes<A>, v.second);
    }
  }
};

// From memory, moved by an adjustment or scaled, and `taken` from that of the class y, if y is in the block.
template <class T, class A, bool moved>
struct Adjusted {
  using Element = T;
  static constexpr bool two_arrays = moved;
  const T* x;
  const A* adjustment;
  A scale;
  int64_t y;
  A taken;

  FASTREG_INLINE_MEMBER Vec<A> at(int64_t j) const {
    Vec<A> z = load(x + j);
    if constexpr (moved)
      z += load(adjustment + j);
    else
      z *= scale;
    return less_margin(z, j);
  }
  FASTREG_INLINE_MEMBER Vec<A> first(int64_t j, int64_t n, A fill) const {
    Vec<A> z = load_first(x + j, n, A(0));
    if constexpr (moved)
      z += load_first(adjustment + j, n, A(0));
    else
      z *= scale;
    return is_first<A>(n) ? less_margin(z, j) : splat(fill);
  }
  FASTREG_INLINE_MEMBER Two<Vec<A>> two(int64_t j) const {
    Two<Vec<A>> z = load_two(x + j);
    if constexpr (moved) {
      const auto by = load_two_as<T>(adjustment + j);
      z.first += by.first, z.second += by.second;
    } else {
      z.first *= scale, z.second *= scale;
    }
    const int64_t k = y - j;
    if (static_cast<uint64_t>(k) < 2 * lanes<A>) [[unlikely]] {
      const bool by_turns = std::is_same_v<T, BFloat16>;
      const bool second = by_turns ? k % 2 : k >= lanes<A>;
      (second ? z.second : z.first)[by_turns ? k / 2 : k % lanes<A>] -= taken;
    }
    return z;
  }
  template <int level = 2>
  FASTREG_INLINE_MEMBER void fetch(int64_t j) const {
    fetch_two<level, A>(x + j);
  }

  template <bool finite, class Out>
  FASTREG_INLINE void put_two(Out* to, Two<Vec<A>> v, bool stream) {
    Direct<T, A>::template put_two<finite>(to, v, stream);
  }

 private:
  FASTREG_INLINE_MEMBER Vec<A> less_margin(Vec<A> z, int64_t j) const {
    if (static_cast<uint64_t>(y - j) < lanes<A>) [[unlikely]]
      z[y - j] -= taken;
    return z;
  }
};

// ---- what multiplies the terms of a block
template <class A>
struct Ones {
  static constexpr bool odd = false, array = false;
  FASTREG_INLINE_MEMBER Vec<A> at(int64_t) const { return splat(A(1)); }
  FASTREG_INLINE_MEMBER Vec<A> first(int64_t, int64_t) const { return splat(A(1)); }
  template <class T>
  FASTREG_INLINE_MEMBER Two<Vec<A>> two(int64_t) const {
    return {splat(A(1)), splat(A(1))};
  }
  FASTREG_INLINE_MEMBER Vec<A> times(int64_t, Vec<A> term) const { return term; }
  FASTREG_INLINE_MEMBER Vec<A> times_first(int64_t, int64_t n, Vec<A> term) const {
    return is_first<A>(n) ? term : Vec<A>{};
  }
};

// `odd`: they may be infinite, or NaN, or 0, which means 0 also of an infinite term.
template <class A, bool may_be_odd>
struct FactorsOf {
  static constexpr bool odd = may_be_odd, array = true;
  const A* factors;
  FASTREG_INLINE_MEMBER Vec<A> at(int64_t j) const { return load(factors + j); }
  FASTREG_INLINE_MEMBER Vec<A> first(int64_t j, int64_t n) const { return load_first(factors + j, n, A(0)); }
  template <class T>
  FASTREG_INLINE_MEMBER Two<Vec<A>> two(int64_t j) const {
    return load_two_as<T>(factors + j);
  }
  FASTREG_INLINE_MEMBER Vec<A> times(int64_t j, Vec<A> term) const {
    return odd ? share(load(factors + j), term) : load(factors + j) * term;
  }
  FASTREG_INLINE_MEMBER Vec<A> times_first(int64_t j, int64_t n, Vec<A> term) const {
    return share(load_first(factors + j, n, A(0)), term);
  }
};

// ---- one pass over a block
// Chunk by chunk the largest z is taken first and the sum is made relative to it, so that the largest of all
// adds exactly 1: where it is all there is, the loss is 0 and not a rounding, which could be negative.
template <class A, class Z>
Partial<A> reduce(Z z, int64_t n) {
  // Of two arrays the z are kept, as many as there are registers for, and in order: bf16 by turns would want
  // the adjustment so.
  constexpr int64_t step = 2 * lanes<A>, depth = Z::two_arrays ? kDepth / 2 : kDepth;
  auto two = [&](int64_t j) __attribute__((always_inline)) {
    if constexpr (Z::two_arrays) return Two<Vec<A>>{z.at(j), z.at(j + lanes<A>)};
    return z.two(j);
  };
  A high = -INFINITY, base = 0;
  Vec<A> sum{}, other{};
  auto raise = [&](Vec<A> top) {
    if (!any_above(top, high)) return;
    const A before = high;
    high = base = horizontal_max(top);
    const A factor = exp_of<A>(splat(before - high))[0];
    sum *= factor, other *= factor;
  };
  int64_t j = 0;
  for (const int64_t whole = n / step * step; j < whole;) {
    const int64_t end = std::min(j + depth * lanes<A>, whole);
    if (Z::two_arrays && n > kNear)
      for (int64_t k = j; k < end; k += step) z.fetch(k + kAhead * lanes<A>);
    Two<Vec<A>> top = two(j), kept[depth / 2];
    kept[0] = top;
    for (int64_t k = j + step, i = 1; k < end; k += step, ++i) {
      const auto here = two(k);
      if constexpr (Z::two_arrays) kept[i] = here;
      top = {larger(here.first, top.first), larger(here.second, top.second)};
    }
    raise(larger(top.first, top.second));
    Vec<A> chunk{}, other_chunk{};
    for (int64_t i = 0; j < end; j += step, ++i) {
      const auto here = Z::two_arrays ? kept[i] : two(j);
      chunk = plus_exp(chunk, here.first - base);
      other_chunk = plus_exp(other_chunk, here.second - base);
    }
    sum += chunk;
    other += other_chunk;
  }
  for (; j < n; j += lanes<A>) {
    const Vec<A> here = j + lanes<A> <= n ? z.at(j) : z.first(j, n - j, A(-INFINITY));
    raise(here);
    sum = plus_exp(sum, here - base);
  }
  return {high, horizontal_sum(sum + other), 0};
}

// The vector [j, j + lanes) of a block of n, with -inf behind the last.
template <class A, class Z>
FASTREG_INLINE Vec<A> vector_of(Z z, int64_t j, int64_t n) {
  return j + lanes<A> <= n ? z.at(j) : z.first(j, n - j, A(-INFINITY));
}

template <class A, class Z>
FASTREG_INLINE A highest(Z z, int64_t n) {
  Vec<A> top = splat(A(-INFINITY)), other = top;
  int64_t j = 0;
  for (; j + 2 * lanes<A> <= n; j += 2 * lanes<A>) {
    const auto here = z.two(j);
    top = larger(here.first, top);
    other = larger(here.second, other);
  }
  for (; j < n; j += lanes<A>) top = larger(vector_of<A>(z, j, n), top);
  return horizontal_max(larger(top, other));
}

// What reduce() gives, and the sum of factor * (z - high), for which the largest of the block is taken first.
template <class A, class Z, class F>
Partial<A> reduce_linear(Z z, int64_t n, F factors) {
  constexpr int64_t step = 2 * lanes<A>;
  const int64_t pairs = n / step * step;
  const A high = highest<A>(z, n);
  const A base = high == -INFINITY ? A(0) : high;  // -inf - -inf would be NaN
  LongSum<A> sum, weighted;
  Vec<A> chunk{}, linear{};
  for (int64_t j = 0; j < pairs;) {
    Vec<A> other_chunk{}, other_linear{};
    for (const int64_t end = std::min(j + kDepth * lanes<A>, pairs); j < end; j += step) {
      z.template fetch<1>(j + n);  // the next block's maximum is taken without a pause for memory
      const Vec<A> first = z.at(j) - base, second = z.at(j + lanes<A>) - base;
      chunk = plus_exp(chunk, first);
      other_chunk = plus_exp(other_chunk, second);
      linear += factors.times(j, first);
      other_linear += factors.times(j + lanes<A>, second);
    }
    sum.add(chunk + other_chunk);
    weighted.add(linear + other_linear);
    chunk = linear = Vec<A>{};
  }
  for (int64_t j = pairs; j < n; j += lanes<A>) {
    const Vec<A> d = vector_of<A>(z, j, n) - base;
    chunk = plus_exp(chunk, d);
    linear += j + lanes<A> <= n ? factors.times(j, d) : factors.times_first(j, n - j, d);
  }
  sum.add(chunk);
  weighted.add(linear);
  return {high, horizontal_sum(sum.total), horizontal_sum(weighted.total)};
}

// The same for z in one block, with exp(z - high) of each class into `exps` in the order of two(). They may
// be where z are.
template <bool linear, class A, class Z, class F>
Partial<A> reduce_keeping(Z z, int64_t n, F factors, A* exps) {
  constexpr int64_t step = 2 * lanes<A>;
  const A high = highest<A>(z, n);
  const A base = high == -INFINITY ? A(0) : high;  // -inf - -inf would be NaN
  LongSum<A> weighted;
  Vec<A> sum{}, other{};
  int64_t j = 0;
  for (const int64_t pairs = n / step * step; j < pairs;) {
    Vec<A> chunk{}, other_chunk{}, slanted{}, other_slanted{};
    for (const int64_t end = std::min(j + kDepth * lanes<A>, pairs); j < end; j += step) {
      const auto here = z.two(j);
      const Vec<A> first = here.first - base, second = here.second - base;
      const Vec<A> exp = exp_of<A>(first), other_exp = exp_of<A>(second);
      if constexpr (linear) {
        const auto by = factors.template two<typename Z::Element>(j);
        slanted += F::odd ? share(by.first, first) : by.first * first;
        other_slanted += F::odd ? share(by.second, second) : by.second * second;
      }
      store(exps + j, exp);
      store(exps + j + lanes<A>, other_exp);
      chunk += exp;
      other_chunk += other_exp;
    }
    sum += chunk;
    other += other_chunk;
    if constexpr (linear) weighted.add(slanted + other_slanted);
  }
  for (; j < n; j += lanes<A>) {
    // Behind the last there is 0 and not exp(-inf): the processor takes its time for subnormal numbers.
    const auto inside = is_first<A>(n - j);
    const Vec<A> d = inside ? vector_of<A>(z, j, n) - base : Vec<A>{}, exp = exp_of<A>(d);
    if constexpr (linear)
      weighted.add(j + lanes<A> <= n ? factors.times(j, d) : factors.times_first(j, n - j, d));
    store(exps + j, exp);
    sum += inside ? exp : Vec<A>{};
  }
  return {high, horizontal_sum(sum + other), horizontal_sum(weighted.total)};
}

// Below e^-43 a class counts as that: it shows in no sum but that of d, and its square is a normal number.
template <class A, class Z>
Moments<A> reduce_moments(Z z, int64_t n) {
  constexpr int64_t step = 2 * lanes<A>;
  const int64_t pairs = n / step * step;
  const A high = highest<A>(z, n), base = high == -INFINITY ? A(0) : high;
  Vec<A> e{}, d{}, ed{}, ee{}, eed{};
  auto add = [&](Vec<A> at, Vec<A> low, Vec<A> exp) __attribute__((always_inline)) {
    const Vec<A> product = exp * low;
    d += at, e += exp, ed += product, ee += exp * exp, eed += exp * product;
  };
  auto lowest = [](Vec<A> at) __attribute__((always_inline)) { return larger(splat(A(-43)), at); };
  LongSum<A> sums[5];
  auto flush = [&] {
    sums[0].add(e), sums[1].add(d), sums[2].add(ed), sums[3].add(ee), sums[4].add(eed);
    e = d = ed = ee = eed = Vec<A>{};
  };
  for (int64_t j = 0; j < pairs; flush())
    for (const int64_t end = std::min(j + kDepth * lanes<A>, pairs); j < end; j += step) {
      z.template fetch<1>(j + n);  // as in reduce_linear
      const auto here = z.two(j);
      const Vec<A> first = here.first - base, second = here.second - base;
      add(first, lowest(first), plus_exp(Vec<A>{}, lowest(first)));
      add(second, lowest(second), plus_exp(Vec<A>{}, lowest(second)));
    }
  for (int64_t j = pairs; j < n; j += lanes<A>) {
    const auto inside = is_first<A>(n - j);
    const Vec<A> at = inside ? vector_of<A>(z, j, n) - base : Vec<A>{}, low = lowest(at);
    add(at, low, inside ? plus_exp(Vec<A>{}, low) : Vec<A>{});
  }
  flush();
  auto total = [&](int k) { return horizontal_sum(sums[k].total); };
  return {high, total(0), total(1), total(2), total(3), total(4)};
}

// f(what raises u to gamma - 1) for a call to which QuickFocal may serve.
template <class A, class F>
auto with_power(A gamma, const F& f) {
  return gamma == 2 ? f(Same{}) : f(Power<A>{gamma - 1});
}

// The sums of factor * focal term and of factor * its slope.
template <bool quick, class A, class Z, class F, class Raise>
TermSums sum_terms_by(Z z, int64_t n, const Softmax<A>& softmax, A gamma, F factors, const Raise& raise) {
  LongSum<A> losses, slopes, inners;
  auto log_p_of = [&](Vec<A> at)
                      __attribute__((always_inline)) { return (at - softmax.high) - softmax.log_sum; };
  const int64_t whole = n / lanes<A> * lanes<A>;
  for (int64_t j = 0; j < whole;) {
    Vec<A> loss{}, slope{}, inner{};
    for (const int64_t end = std::min(j + kDepth * lanes<A>, whole); j < end; j += lanes<A>) {
      const Vec<A> log_p = log_p_of(z.at(j));
      if constexpr (quick)
        if (QuickFocal::serves(log_p)) {
          const auto terms = quick_focal<A>(log_p, raise);
          const Vec<A> power = factors.at(j) * terms.power, more = power * terms.u;
          loss -= F::odd ? share(more, log_p) : more * log_p;
          slope += more;
          inner += power * terms.inner;
          continue;
        }
      const auto term = focal<VectorMath<A>>(log_p, gamma);
      loss += factors.times(j, term.term);
      slope += factors.times(j, term.slope);
    }
    losses.add(loss);
    slopes.add(slope);
    if constexpr (quick) inners.add(inner);
  }
  if (whole < n) {
    const auto term = focal<VectorMath<A>>(log_p_of(z.first(whole, n - whole, A(0))), gamma);
    losses.add(factors.times_first(whole, n - whole, term.term));
    slopes.add(factors.times_first(whole, n - whole, term.slope));
  }
  return {static_cast<double>(horizontal_sum(losses.total)),
          static_cast<double>(horizontal_sum(slopes.total)) +
              gamma * static_cast<double>(horizontal_sum(inners.total))};
}

template <class A, class Z, class F>
TermSums sum_terms(Z z, int64_t n, const Softmax<A>& softmax, A gamma, F factors) {
  if constexpr (std::is_same_v<A, float>)
    if (gamma >= 1)
      return with_power(
          gamma, [&](const auto& raise) { return sum_terms_by<true>(z, n, softmax, gamma, factors, raise); });
  return sum_terms_by<false>(z, n, softmax, gamma, factors, Same{});
}

// ---- slope * p
template <class A>
struct Careful {
  Softmax<A> softmax;
  A slope;

  FASTREG_INLINE_MEMBER Vec<A> operator()(Vec<A> z) const {
    return exp_of<A>((z - softmax.high) - softmax.log_sum) * slope;
  }
};

// In the digits of Digits, fp32 or less, for finite values. With x = log2(p) = (z - center) * log2(e) - tail
// it is 2^n * (slope * 2^(L - tail)) * 2^r for n + r = x + tail - L, where L = round(tail).
template <class Digits>
struct Quick {
  using K = ExpConstants<float>;
  static constexpr bool coarse = sizeof(Digits) == 2;
  static constexpr int lift = 64;  // 2^(n + lift) is a normal number, also for p that vanish
  static constexpr float log2_e = K::one_over_ln2;
  float center, lowest, magic;
  Exp2NearZero<exp_degree<Digits>> times_slope;

  // For 16 bits the center may be 0, where no z is so large that this would show.
  static bool serves(const Softmax<float>& softmax, float slope) {
    constexpr float limit = std::is_same_v<Digits, BFloat16> ? 512 : 64;
    const float high = fabs(softmax.high), size = fabs(slope);
    return (size == 0 || (size > 1e-16f && size < 1e11f)) && fabs(softmax.log_sum) < 100 &&
           high < (coarse ? limit : INFINITY);
  }

  static double tail(const Softmax<float>& softmax) {
    return 1.4426950408889634 * ((coarse ? static_cast<double>(softmax.high) : 0) + softmax.log_sum);
  }

  FASTREG_INLINE_MEMBER Quick(const Softmax<float>& softmax, float slope)
      : center(coarse ? 0 : softmax.high),
        lowest((coarse ? softmax.high : 0) + softmax.log_sum -
               130),  // p = 2^-187.5, with slope below 2^-150: nothing
        magic(K::magic + static_cast<float>(127 + lift - rint(tail(softmax)))),
        times_slope(static_cast<float>(slope * exp2(rint(tail(softmax)) - tail(softmax) - lift))) {}

  FASTREG_INLINE_MEMBER Vec<float> operator()(Vec<float> z) const {
    if constexpr (!coarse) z -= center;
    z = larger(splat(lowest), z);
    const Vec<float> shifted = z * log2_e + magic, r = z * log2_e - (shifted - magic);
    return times_slope(r) * bits<Vec<float>>(bits<Int<float>>(shifted) << K::mantissa);
  }
};

// grad = slope * p and, if it is to `spread`, less factors * share. `finite` says that no gradient can be
// NaN; `stream`, that it is to pass by the caches.
template <bool spread, bool finite, class A, class Z, class P, class F, class T>
FASTREG_INLINE void write_gradient(Z z, int64_t n, P p, F factors, A share, T* grad, bool stream) {
  int64_t j = 0;
  auto one_by_one = [&](int64_t end) __attribute__((always_inline)) {
    for (; j + lanes<A> <= end; j += lanes<A>) {
      Vec<A> g = p(z.at(j));
      if constexpr (spread) g -= factors.at(j) * share;
      store<finite>(grad + j, nearly<finite, T>(g));
    }
    if (j < end) {
      Vec<A> g = p(z.first(j, end - j, A(0)));
      if constexpr (spread) g -= factors.first(j, end - j) * share;
      store_first(grad + j, nearly<finite, T>(g), end - j);
      j = end;
    }
  };
  auto two_by_two = [&](bool stream) __attribute__((always_inline)) {
    for (; j + 2 * lanes<A> <= n; j += 2 * lanes<A>) {
      if (stream || ((Z::two_arrays || F::array) && n > kNear)) z.fetch(j + kAhead * lanes<A>);
      const auto here = z.two(j);
      Two<Vec<A>> g{p(here.first), p(here.second)};
      if constexpr (spread) {
        const auto by = factors.template two<typename Z::Element>(j);
        g.first -= by.first * share, g.second -= by.second * share;
      }
      Z::template put_two<finite>(grad + j, g, stream);
    }
  };
  one_by_one(stream ? std::min(before_vector(grad), n) : 0);
  if (stream)
    two_by_two(true);
  else
    two_by_two(false);
  one_by_one(n);
}

// The digits of p where a share of each class is taken from it, which may be nearly as large; all digits
// where it may be p itself, as a probability.
template <class T, class F>
using DigitsBesides = std::conditional_t<sizeof(T) == 2, std::conditional_t<F::odd, float, Half>, T>;

// The same with a focal term for each class: grad = p * sum - d, where d is the slope of a class's own term.
// Where p is near 1 that is p * (sum - d) - (1 - p) * d.
template <bool quick, class A, class Z, class F, class Raise, class T>
void write_focal_gradient_by(Z z, int64_t n, const Softmax<A>& softmax, A gamma, A sum, F factors, A share,
                             const Raise& raise, T* grad) {
  auto log_p_of = [&](Vec<A> at)
                      __attribute__((always_inline)) { return (at - softmax.high) - softmax.log_sum; };
  auto of = [&](const auto& term, Vec<A> d) __attribute__((always_inline)) {
    d *= share;
    return term.p * (sum - d) - term.u * d;
  };
  auto quick_of = [&](auto log_p, auto factor) __attribute__((always_inline)) {
    const auto terms = quick_focal<DigitsBesides<T, F>>(log_p, raise);
    return terms.p * sum - factor * share * (terms.power * (terms.u + gamma * terms.inner));
  };
  int64_t j = 0;
  for (; j + lanes<A> <= n; j += lanes<A>) {
    if constexpr (quick)
      for (; j + 2 * lanes<A> <= n; j += 2 * lanes<A>) {
        if ((Z::two_arrays || F::array) && n > kNear) z.fetch(j + kAhead * lanes<A>);
        const auto here = z.two(j), by = factors.template two<typename Z::Element>(j);
        const Vec<A> first = log_p_of(here.first), second = log_p_of(here.second);
        if (!QuickFocal::serves(first) || !QuickFocal::serves(second)) break;
        const Two<Vec<A>> g{quick_of(first, by.first), quick_of(second, by.second)};
        Z::template put_two<!F::odd>(grad + j, g, false);
      }
    if (j + lanes<A> > n) break;
    const auto term = focal<VectorMath<A>>(log_p_of(z.at(j)), gamma);
    store(grad + j, of(term, factors.times(j, term.slope)));
  }
  if (j < n) {
    const auto term = focal<VectorMath<A>>(log_p_of(z.first(j, n - j, A(0))), gamma);
    store_first(grad + j, of(term, factors.times_first(j, n - j, term.slope)), n - j);
  }
}

template <class A, class Z, class F, class T>
void write_focal_gradient(Z z, int64_t n, const Softmax<A>& softmax, A gamma, A sum, F factors, A share,
                          T* grad) {
  if constexpr (std::is_same_v<A, float>)
    if (gamma >= 1 && sum * 0 == 0 && share * 0 == 0)
      return with_power(gamma, [&](const auto& raise) {
        write_focal_gradient_by<true>(z, n, softmax, gamma, sum, factors, share, raise, grad);
      });
  write_focal_gradient_by<false>(z, n, softmax, gamma, sum, factors, share, Same{}, grad);
}

template <bool spread, class A, class Z, class F, class T>
void gradient(Z z, int64_t n, const Softmax<A>& softmax, A slope, F factors, A share, T* grad, bool stream) {
  if constexpr (std::is_same_v<A, float>) {
    using Digits = std::conditional_t<spread, DigitsBesides<T, F>, T>;
    if (Quick<Digits>::serves(softmax, slope) && share * 0 == 0)
      return write_gradient<spread, !F::odd>(z, n, Quick<Digits>(softmax, slope), factors, share, grad,
                                             stream);
  }
  write_gradient<spread, false>(z, n, Careful<A>{softmax, slope}, factors, share, grad, stream);
}

// grad = slope * exp and, if it is to `spread`, less factors * share, of exponentials in the order of Z.
// `finite` says that no gradient can be NaN.
template <bool spread, bool finite, class Z, class A, class F, class T>
FASTREG_INLINE void scale_finite_exps(const A* exps, int64_t n, A slope, F factors, A share, T* grad) {
  int64_t j = 0;
  for (; j + 2 * lanes<A> <= n; j += 2 * lanes<A>) {
    Two<Vec<A>> g{load(exps + j) * slope, load(exps + j + lanes<A>) * slope};
    if constexpr (spread) {
      const auto by = factors.template two<typename Z::Element>(j);
      g.first -= by.first * share, g.second -= by.second * share;
    }
    Z::template put_two<finite>(grad + j, g, false);
  }
  for (; j + lanes<A> <= n; j += lanes<A>) {
    Vec<A> g = load(exps + j) * slope;
    if constexpr (spread) g -= factors.at(j) * share;
    store<finite>(grad + j, g);
  }
  if (j < n) {
    Vec<A> g = load(exps + j) * slope;
    if constexpr (spread) g -= factors.first(j, n - j) * share;
    store_first(grad + j, g, n - j);
  }
}

template <bool spread, class Z, class A, class F, class T>
void scale_exps(const A* exps, int64_t n, A slope, F factors, A share, T* grad) {
  if (!F::odd && slope * 0 == 0 && share * 0 == 0)
    scale_finite_exps<spread, !F::odd, Z>(exps, n, slope, factors, share, grad);
  else
    scale_finite_exps<spread, false, Z>(exps, n, slope, factors, share, grad);
}

// ---- a row of the call, and room for what a block of it becomes
template <Factors are, class T, class A>
struct Row {
  CrossEntropy<A>& call;
  int64_t r = 0, o = 0, i = 0;
  RowTargets<A> targets{};
  const T* x = nullptr;
  int64_t gathered =
      -1;  // the first class of the block that z and factors are of, if they are of the row's own
  const A* factors = nullptr;  // of the block
  alignas(64) A z[kBlock], own_factors[kBlock];
  std::vector<Moments<A>> own_moments;
  Moments<A>* moments = nullptr;  // of each block of the row, where they serve

  explicit Row(CrossEntropy<A>& call) : call(call) {
    if (call.moments_serve() && call.moments.empty()) own_moments.resize(call.blocks());
  }

  // Whether the row counts.
  bool enter(int64_t row) {
    r = row, o = r / call.inner, i = r - o * call.inner, gathered = -1;
    moments = call.moments.empty() ? own_moments.data() : call.moments.data() + r * call.blocks();
    x = reinterpret_cast<const T*>(call.input) + o * call.input_outer + i * call.input_inner;
    targets = call.targets_of(o, i);
    return targets.kept;
  }

  int64_t size(int64_t block) const { return std::min(kBlock, call.classes - block * kBlock); }

  // f(z) with the z of the classes [begin, begin + n); their factors are then in `factors`.
  template <class F>
  auto with_block(int64_t begin, int64_t n, const F& f) {
    if constexpr (are == Factors::of_row) {
      if (gathered != begin) gather_own(begin, n);
    } else {
      factors = call.factors ? call.factors.data + begin : nullptr;
      if (!call.plain && !gathers(begin, n)) {
        const int64_t y = call.margin ? targets.y[0] - begin : -1;
        const A taken = call.margin ? call.margin.data[targets.y[0]] : A(0);
        if (call.adjustment)
          return f(Adjusted<T, A, true>{x + begin, call.adjustment.data + begin, 1, y, taken});
        return f(Adjusted<T, A, false>{x + begin, nullptr, call.scale, y, taken});
      }
      if (!call.plain || call.input_class != 1) gather(begin, n);
    }
    if (call.plain && call.input_class == 1) return f(Direct<T, A>{x + begin});
    return f(Direct<A, A>{z});
  }

  // Whether the z of a block are put together in memory before they are used.
  bool gathers(int64_t begin, int64_t n) const {
    auto inside = [&](int64_t y) { return y >= begin && y < begin + n; };
    const bool two_margins = targets.y[1] >= 0 && (inside(targets.y[0]) || inside(targets.y[1]));
    return call.input_class != 1 || (call.margin && two_margins) || (call.adjustment && call.scale != 1);
  }

  void gather(int64_t begin, int64_t n) {
    const T* from = x + begin * call.input_class;
    int64_t j = 0;
    if (call.input_class == 1) {
      for (; j + lanes<A> <= n; j += lanes<A>) {
        const Vec<A> scaled = load(from + j) * call.scale;
        store(z + j, call.adjustment ? scaled + load(call.adjustment.data + begin + j) : scaled);
      }
    }
    for (; j < n; ++j) z[j] = call.z(static_cast<A>(from[j * call.input_class]), begin + j);
    if (!call.margin) return;
    for (int k = 0; k < 2; ++k)
      if (targets.y[k] >= begin && targets.y[k] < begin + n)
        z[targets.y[k] - begin] -= targets.share[k] * call.margin.data[targets.y[k]];
  }

  void gather_own(int64_t begin, int64_t n) {
    gathered = begin;
    if (!call.plain || call.input_class != 1) gather(begin, n);
    factors = own_factors;
    const A every = call.smoothing / static_cast<A>(call.classes), rest = 1 - call.smoothing;
    const int64_t at = call.target.at(o, i) + begin * call.target_class;
    const bool bare = call.smoothing == 0 && call.alpha_scale == 1 && !call.factors.data;
    const bool there = std::is_same_v<A, float> ? call.target.dtype == ScalarType::Float
                                                : call.target.dtype == ScalarType::Double;
    if (bare && there && call.target_class == 1 && !call.margin) {
      factors = reinterpret_cast<const A*>(call.target.data) + at;
      return;
    }
    read_as(call.target, at, call.target_class, n, own_factors);
    if (call.margin)
      for (int64_t j = 0; j < n; ++j) z[j] -= own_factors[j] * call.margin.data[begin + j];
    if (bare) return;
    for (int64_t j = 0; j < n; ++j) own_factors[j] = (rest * own_factors[j] + every) * call.alpha_scale;
    if (call.factors.data)
      for (int64_t j = 0; j < n; ++j)
        own_factors[j] = own_factors[j] == 0 ? A(0) : own_factors[j] * call.factors.data[begin + j];
  }

  // f(what multiplies the terms of the block that with_block has come to)
  template <class F>
  auto with_factors(const F& f) const {
    if constexpr (are == Factors::none) return f(Ones<A>{});
    if constexpr (are == Factors::of_class) {
      if (factors == nullptr) return f(Ones<A>{});
      if (!call.odd_factors) return f(FactorsOf<A, false>{factors});
    }
    return f(FactorsOf<A, true>{factors});
  }

  Weighted<A> reduce_part(int64_t block) {
    const int64_t begin = block * kBlock, n = size(block);
    return with_block(begin, n, [&](const auto& z) -> Weighted<A> {
      if constexpr (are == Factors::of_class)
        if (call.moments_serve()) {
          const Moments<A> m = moments[block] = reduce_moments<A>(z, n);
          return {{m.high, m.e, 0}, 0};
        }
      if (are == Factors::none || call.gamma != 0) return {reduce<A>(z, n), 0};  // see sums_of
      if constexpr (are == Factors::of_class)
        return {with_factors([&](const auto& by) { return reduce_linear<A>(z, n, by); }),
                call.block_factors[block]};
      return {reduce_linear<A>(z, n, FactorsOf<A, true>{factors}),
              sum_over<A>(n, [&](int64_t j) { return load_at(factors, j, n); })};
    });
  }

  // The first class of the largest x, NaN left out, if a block has a larger one than those before it.
  void look_for_argmax(int64_t block, const Partial<A>& part, A& best, int64_t& argmax) const {
    const int64_t begin = block * kBlock, n = size(block);
    if (call.input_class == 1 && part.sum == part.sum) {
      A high = part.high;
      if (!call.plain) high = horizontal_max(largest<A>(x + begin, n, splat(A(-INFINITY))));
      if (high > best) best = high, argmax = begin + first_of(x + begin, n, high);
      return;
    }
    for (int64_t c = begin; c < begin + n; ++c) {
      const A at = static_cast<A>(x[c * call.input_class]);
      if (at > best) best = at, argmax = c;
    }
  }

  Found<A> read(bool want_argmax) {
    Weighted<A> whole{{-INFINITY, 0, 0}, 0};
    A best = -INFINITY;
    int64_t argmax = 0;
    for (int64_t b = 0; b < call.blocks(); ++b) {
      const Weighted<A> next = call.partials.empty() ? reduce_part(b) : call.partials[r * call.blocks() + b];
      whole.part = b == 0 ? next.part : merge(whole.part, whole.weight, next.part, next.weight);
      whole.weight += next.weight;
      if (want_argmax) look_for_argmax(b, next.part, best, argmax);
    }
    return {{whole.part.high, log_of_sum(whole.part.high, whole.part.sum)},
            whole.part.linear,
            whole.weight,
            argmax};
  }

  TermSums sums_of(const Softmax<A>& softmax) {
    TermSums total;
    for (int64_t b = 0; b < call.blocks(); ++b) {
      const TermSums next = !call.block_sums.empty() ? call.block_sums[r * call.blocks() + b]
                            : call.moments_serve()   ? moments[b].terms(size(b), softmax)
                                                     : sums_of_block(softmax, b);
      total.loss += next.loss, total.slope += next.slope;
    }
    return total;
  }

  TermSums sums_of_block(const Softmax<A>& softmax, int64_t block) {
    const int64_t n = size(block);
    return with_block(block * kBlock, n, [&](const auto& z) {
      return with_factors([&](const auto& by) { return sum_terms(z, n, softmax, call.gamma, by); });
    });
  }

  // Also sets found.slope.
  A loss(Found<A>& found) {
    if constexpr (are != Factors::of_row) {
      const A loss = index_loss(call, x, targets, found);
      if (!call.focal_spread()) return loss;
      const TermSums sums = sums_of(found.softmax);
      found.slope = call.spread() * static_cast<A>(sums.slope);
      for (int k = 0; k < 2 && targets.y[k] >= 0; ++k)
        found.slope +=
            target_slope(call.terms(targets, k).target, call.gamma, found.softmax, z_of(call, x, targets, k));
      return call.spread() == 0 ? loss : loss + call.spread() * static_cast<A>(sums.loss);
    }
    A terms;
    if (call.gamma == 0) {
      terms = found.weight * found.softmax.log_sum - found.linear, found.slope = found.weight;
    } else {
      const TermSums sums = sums_of(found.softmax);
      terms = static_cast<A>(sums.loss), found.slope = static_cast<A>(sums.slope);
    }
    return terms + z_loss_of(call.z_loss, found.softmax);
  }

  // The gradient of the classes [begin, end). `slope`: Found::slope.
  void differentiate(const Softmax<A>& softmax, A slope, T* grad, int64_t begin, int64_t end) {
    const A incoming = call.grad_of(o, i);
    if constexpr (are == Factors::of_row)
      return differentiate_own(softmax, slope, incoming * call.scale, grad, begin, end);
    const IndexGradient<A> row = index_gradient(call, x, r, targets, softmax, slope, incoming);
    constexpr bool spread = are == Factors::of_class;
    for (int64_t c = begin; c < end;) {
      const bool whole =
          call.grad_class == 1 && (call.plain ? call.input_class == 1 : !gathers(begin, end - begin));
      const int64_t n = whole ? end - begin : std::min(kBlock, end - c);
      with_block(c, n, [&](const auto& z) {
        write(grad, c, n, [&](T* out) {
          with_factors([&](const auto& by) {
            if constexpr (spread)
              if (call.gamma != 0)
                return write_focal_gradient(z, n, softmax, call.gamma, row.slope, by, row.spread, out);
            gradient<spread>(z, n, softmax, row.slope, by, row.spread, out, stream());
          });
        });
      });
      c += n;
    }
    put_targets(row, grad, begin, end);
  }

  // Whether loss_and_gradient serves.
  bool keeps_exps() const {
    return are != Factors::of_row && call.blocks() == 1 && !call.focal_spread() && !call.stream;
  }

  // What read, loss and differentiate do, for a row in one block whose exponentials are kept for its
  // gradient.
  A loss_and_gradient(Found<A>& found, bool want_argmax, T* grad) {
    constexpr bool spread = are == Factors::of_class;
    const int64_t n = call.classes;
    A loss = 0;
    IndexGradient<A> row{};
    with_block(0, n, [&](const auto& from) {
      with_factors([&](const auto& by) {
        const Partial<A> part = reduce_keeping<spread>(from, n, by, z);
        found = {{part.high, log_of_sum(part.high, part.sum)}, part.linear, call.total_factors, 0};
        if (want_argmax) {
          A best = -INFINITY;
          look_for_argmax(0, part, best, found.argmax);
        }
        loss = this->loss(found);
        row = index_gradient(call, x, r, targets, found.softmax, A(0), call.grad_of(o, i));
        using Z = std::remove_cvref_t<decltype(from)>;
        write(grad, 0, n,
              [&](T* out) { scale_exps<spread, Z>(z, n, row.slope / part.sum, by, row.spread, out); });
      });
    });
    put_targets(row, grad, 0, n);
    return loss;
  }

  void put_targets(const IndexGradient<A>& row, T* grad, int64_t begin, int64_t end) const {
    for (int k = 0; k < 2; ++k)
      if (targets.y[k] >= begin && targets.y[k] < end)
        grad[targets.y[k] * call.grad_class] = static_cast<T>(row.at[k]);
  }

  void differentiate_own(const Softmax<A>& softmax, A sum, A incoming, T* grad, int64_t first, int64_t last) {
    if (call.z_loss != 0) sum += 2 * call.z_loss * (softmax.high + softmax.log_sum);
    for (int64_t begin = first; begin < last; begin += kBlock) {
      const int64_t n = std::min(kBlock, last - begin);
      with_block(begin, n, [&](const auto& z) {
        write(grad, begin, n, [&](T* out) {
          with_factors([&](const auto& by) {
            if (call.gamma == 0)
              gradient<true>(z, n, softmax, sum * incoming, by, incoming, out, stream());
            else
              write_focal_gradient(z, n, softmax, call.gamma, sum * incoming, by, incoming, out);
          });
        });
      });
    }
  }

  bool stream() const { return call.stream && call.grad_class == 1; }

  // Has the gradient of the classes [begin, begin + n) written where it belongs.
  template <class F>
  void write(T* grad, int64_t begin, int64_t n, const F& to) {
    if (call.grad_class == 1) return to(grad + begin);
    alignas(64) T out[kBlock];
    to(out);
    for (int64_t j = 0; j < n; ++j) grad[(begin + j) * call.grad_class] = out[j];
  }
};

template <Factors are, class T, class A>
void forward_rows(CrossEntropy<A>& call, int64_t task_begin, int64_t task_end) {
  Row<are, T, A> row(call);
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
      Found<A> found;
      A loss;
      if (differentiate && row.keeps_exps()) {
        loss = row.loss_and_gradient(found, call.argmax != nullptr, gradient_of<T>(call, row.o, row.i));
      } else {
        found = row.read(call.argmax != nullptr);
        loss = row.loss(found);
        if (differentiate)
          row.differentiate(found.softmax, found.slope, gradient_of<T>(call, row.o, row.i), 0, call.classes);
      }
      finish_row(call, row.o, row.i, row.targets, found, loss, sums);
    }
    call.sums[2 * task] = sums[0];
    call.sums[2 * task + 1] = sums[1];
  }
  if (call.stream) finish_writing();
}

template <Factors are, class T, class A>
void reduce_blocks_of(CrossEntropy<A>& call, int64_t begin, int64_t end) {
  Row<are, T, A> row(call);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t r = at / call.blocks();
    if (row.enter(r)) call.partials[at] = row.reduce_part(at - r * call.blocks());
  }
}

template <Factors are, class T, class A>
void sum_blocks_of(CrossEntropy<A>& call, int64_t begin, int64_t end) {
  if constexpr (are != Factors::none) {
    Row<are, T, A> row(call);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t r = at / call.blocks();
      if (!row.enter(r)) continue;
      call.block_sums[at] = row.sums_of_block(row.read(false).softmax, at - r * call.blocks());
    }
  }
}

template <Factors are, class T, class A>
void read_targets_of(CrossEntropy<A>& call, int64_t begin, int64_t end) {
  Row<are, T, A> row(call);
  call.target_z.resize(2 * end);
  for (int64_t r = begin; r < end; ++r)
    for (int k = 0; row.enter(r) && k < 2; ++k)
      if (row.targets.y[k] >= 0) call.target_z[2 * r + k] = z_of(call, row.x, row.targets, k);
}

template <Factors are, class T, class A>
void backward_rows(CrossEntropy<A>& call, int64_t task_begin, int64_t task_end) {
  Row<are, T, A> row(call);
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
        row.differentiate({call.high[at], call.log_sum[at]}, call.slopes ? call.slopes[at] : A(0), grad,
                          begin, end);
      else
        fill_zero(call, grad, begin, end);
    }
  }
  if (call.stream) finish_writing();
}

}  // namespace fastreg::FASTREG_ISA
