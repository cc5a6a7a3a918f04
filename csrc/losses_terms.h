// One term of each loss and its derivative, for a number (V = A) or a vector of numbers.
//
// Included inside a namespace and without a guard: losses.h does so for numbers, and the CPU kernels once
// more for each instruction set, because what runs on vectors must be compiled for that set. Math has exp,
// exps (exp and expm1), log1p (of 0 to 1), pow and quotient.

// One class's focal term (1 - p)^gamma * -log p and its slope: s such that the derivative of the term of
// class y by z_c is s * (p_c - [c = y]). With u = 1 - p that is u^gamma - gamma * p * u^(gamma - 1) * log p.
// For a gamma below 1 it is written with -log p / u, which tends to 1 where u vanishes: finite for every
// gamma >= 0.
template <class V>
struct Focal {
  V p, u, term, slope;
};

// V is A or a vector of it.
template <class Math = ScalarMath, class V, class A>
FASTREG_HD Focal<V> focal(V log_p, A gamma) {
  const V zero{}, one = zero + A(1);
  const auto exps = Math::exps(log_p);
  const V p = exps.exp, u = -exps.expm1;
  if (gamma == 0) return {p, u, -log_p, one};
  const V inner = p > zero ? p * -log_p : zero;
  if (gamma >= 1) {
    const V power = Math::pow(u, gamma - 1);
    return {p, u, power * u * -log_p, power * (u + gamma * inner)};
  }
  const V power = Math::pow(u, gamma), limit = log_p == log_p ? one : log_p;
  const V ratio = u > zero ? Math::quotient(inner, u) : limit;
  return {p, u, power * -log_p, power * (one + gamma * ratio)};
}

template <class Math = ScalarMath, class V, class A>
FASTREG_HD V focal_term(V log_p, A gamma) {
  return gamma == 0 ? -log_p : focal<Math>(log_p, gamma).term;
}

template <class Math = ScalarMath, class V, class A>
FASTREG_HD V focal_slope(V log_p, A gamma) {
  return gamma == 0 ? V{} + A(1) : focal<Math>(log_p, gamma).slope;
}

// sigmoid(|x|), sigmoid(-|x|) and log(1 + exp(-|x|)).
template <class V>
struct Logistic {
  V near_one, near_zero, log1p;
};

template <class Math, class A, class V>
FASTREG_HD Logistic<V> logistic(V x) {
  const V zero{}, one = zero + A(1), e = Math::exp(x > zero ? -x : x);
  const V near_one = Math::quotient(one, one + e);
  return {near_one, e * near_one, Math::log1p(e)};
}

// factor * term. A factor of 0 gives 0 even if the term, of an infinite logit, is infinite: so it does for
// every finite one, however large. NaN stays.
template <class V>
FASTREG_HD V weighed(V factor, V term) {
  const V zero{};
  return factor * ((factor == zero) & (term == INFINITY) ? zero : term);
}

template <class V>
struct SigmoidFocal {
  V loss, derivative;
};

// One term of the sigmoid focal loss, alpha_t * (1 - p_t)^gamma * (-t * log p - (1 - t) * log(1 - p)) with
// p = sigmoid(x), and its derivative by x. A negative alpha means alpha_t = 1. 1 - p_t = p * (1 - t) + (1 -
// p) * t.
template <class Math = ScalarMath, class V, class A>
FASTREG_HD SigmoidFocal<V> sigmoid_focal(V x, V t, A alpha, A gamma) {
  const V zero{}, one = zero + A(1);
  const Logistic<V> sides = logistic<Math, A>(x);
  const V p = x > zero ? sides.near_one : sides.near_zero,
          not_p = x > zero ? sides.near_zero : sides.near_one;
  // Where the target has no share of a side, or the derivative is 0, an infinite x must not make it NaN.
  const V side = x > zero ? one - t : t, distance = x > zero ? x : -x;
  const V entropy = (side == zero ? zero : distance * side) + sides.log1p;
  const V u = p * (one - t) + not_p * t;
  const V power = gamma == 0 ? one : Math::pow(u, gamma);
  const V balance = alpha < 0 ? one : t * alpha + (one - t) * (A(1) - alpha);
  // gamma * u^(gamma - 1) * p * (1 - p) with the quotient p * (1 - p) / u, which is at most 1
  const V ratio = u > zero ? Math::quotient(p * not_p, u) : zero;
  // p - t, with the digits that it would lose where t is 1 and p nearly so
  const V slope = p * (one - t) - not_p * t;
  const V inner = ratio == zero ? zero : gamma * (t + t - one) * ratio * entropy;
  const V derivative = slope - inner;
  return {weighed(balance, power * entropy), balance * power * derivative};
}

// The same for a target of 0 or 1, without alpha_t and by the logit of being wrong: x for 0, -x for 1. With
// u = sigmoid(wrong) it is u^gamma * log(1 + exp(wrong)).
template <class Math = ScalarMath, class V, class A>
FASTREG_HD SigmoidFocal<V> hard_sigmoid_focal(V wrong, A gamma) {
  const V zero{}, one = zero + A(1);
  const Logistic<V> sides = logistic<Math, A>(wrong);
  const V u = wrong > zero ? sides.near_one : sides.near_zero;
  const V rest = wrong > zero ? sides.near_zero : sides.near_one;
  const V entropy = (wrong > zero ? wrong : zero) + sides.log1p;
  const V power = gamma == 0 ? one : Math::pow(u, gamma);
  const V inner = rest == zero ? zero : gamma * rest * entropy;  // where entropy may be infinite
  return {power * entropy, power * (u + inner)};
}
