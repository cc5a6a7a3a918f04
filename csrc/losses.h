// The maths of the softmax losses, for one row, on the CPU and on the GPU.
//
// A row's logits x become z = scale * (x + logit_adjustment), less scale * margin[y] at the target y. Its
// softmax is kept as Softmax{high, log_sum}: log p_c = (z_c - high) - log_sum. The two parts are not added
// up: their sum, rounded, has no digits left for p where the logits are large.
#pragma once
#include <math.h>

#include <cstdint>

#ifdef __CUDACC__
#define FASTREG_HD __host__ __device__ __forceinline__
#else
#define FASTREG_HD inline __attribute__((always_inline))
#endif

namespace fastreg {

enum Reduction : int64_t { reduction_none = 0, reduction_mean = 1, reduction_sum = 2 };

// A is the type of the arithmetic: float, and double for double.
template <class A>
struct Softmax {
  A high, log_sum;
  FASTREG_HD A log_p(A z) const { return (z - high) - log_sum; }
};

// What a part of a row adds to the whole: its largest z, the sum of exp(z - high), and, for label smoothing,
// the sum of w * (z - high) over its classes with their weights w. A part of which every z is -inf has high =
// -inf.
template <class A>
struct Partial {
  A high, sum, linear;
};

// exp(high - into) for a high that is not above `into`, 0 where both are -inf.
template <class A>
FASTREG_HD A rescale(A high, A into) {
  return high == into ? A(high != -INFINITY) : exp(high - into);
}

// `into` and `part` taken together. `into_weight` and `part_weight` are the sums of w over their classes.
template <class A>
FASTREG_HD Partial<A> merge(Partial<A> into, A into_weight, Partial<A> part, A part_weight) {
  const A high = part.high > into.high ? part.high : into.high;
  auto shifted = [high](A linear, A weight, A from) {
    return from == high || from == -INFINITY ? linear : linear + weight * (from - high);
  };
  return {high, into.sum * rescale(into.high, high) + part.sum * rescale(part.high, high),
          shifted(into.linear, into_weight, into.high) + shifted(part.linear, part_weight, part.high)};
}

template <class V>
struct Exps {
  V exp, expm1;
};

// The functions that the formulas below ask for. Math is this one for numbers; the CPU has one for vectors.
struct ScalarMath {
  template <class A>
  static FASTREG_HD A exp(A x) {
    return ::exp(x);
  }
  template <class A>
  static FASTREG_HD Exps<A> exps(A x) {
    return {::exp(x), ::expm1(x)};
  }
  template <class A>
  static FASTREG_HD A log1p(A x) {
    return ::log1p(x);
  }
  template <class A>
  static FASTREG_HD A quotient(A a, A b) {
    return a / b;
  }
  template <class A>
  static FASTREG_HD A pow(A base, A exponent) {
    return exponent == 1 ? base : exponent == 2 ? base * base : ::pow(base, exponent);
  }
};

#include "losses_terms.h"

// What the options make of a row. `target` is the share of the row's term of the class y: (1 - smoothing) *
// the weights of y; `spread` is smoothing / C, the share of each class's weights; `total` is the sum of all
// weights.
template <class A>
struct RowTerms {
  A target, spread, total, gamma, z_loss, scale;
};

// The term of a target class. A class without a share has none in the loss even where its log p is -inf.
template <class A>
FASTREG_HD A target_loss(A target, A gamma, const Softmax<A>& softmax, A z_y) {
  return target == 0 ? A(0) : target * focal_term(softmax.log_p(z_y), gamma);
}

// What of a row's loss is not about its target; NaN where the row has no softmax, which is to show even if
// none of its classes has a share.
template <class A>
FASTREG_HD A z_loss_of(A z_loss, const Softmax<A>& softmax) {
  const A lse = softmax.high + softmax.log_sum, none = softmax.log_sum - softmax.log_sum;
  return z_loss == 0 ? none : z_loss * lse * lse + none;
}

// The loss of a row with one target class y. Where there is another, its target_loss comes on top.
template <class A>
FASTREG_HD A row_loss(const RowTerms<A>& terms, const Softmax<A>& softmax, A z_y, A linear) {
  A loss = target_loss(terms.target, terms.gamma, softmax, z_y);
  if (terms.spread != 0) loss += terms.spread * (terms.total * softmax.log_sum - linear);
  return loss + z_loss_of(terms.z_loss, softmax);
}

// The gradient of a row's loss times `grad` by x_c is p_c * slope - w_c * spread, and `at_target` for c = y.
// The last has a formula of its own because p_y - 1 loses its digits where p_y is near 1.
template <class A>
struct RowGradient {
  A slope, spread, at_target;
};

// What a target class adds to the slope of a row whose gradient is asked of another one, as `others`.
template <class A>
FASTREG_HD A target_slope(A target, A gamma, const Softmax<A>& softmax, A z_y) {
  return target == 0 ? A(0) : target * focal_slope(softmax.log_p(z_y), gamma);
}

template <class A>
FASTREG_HD RowGradient<A> row_gradient(const RowTerms<A>& terms, const Softmax<A>& softmax, A z_y, A weight_y,
                                       A grad, A others = 0) {
  grad *= terms.scale;
  const A log_p = softmax.log_p(z_y), target = grad * terms.target * focal_slope(log_p, terms.gamma);
  const A spread = grad * terms.spread;
  A rest = grad * others;
  if (terms.spread != 0) rest += spread * terms.total;
  if (terms.z_loss != 0) rest += grad * 2 * terms.z_loss * (softmax.high + softmax.log_sum);
  A at_target = target * expm1(log_p);
  if (spread != 0 || rest != 0) at_target += rest * exp(log_p) - spread * weight_y;
  return {target + rest, spread, at_target};
}

}  // namespace fastreg
