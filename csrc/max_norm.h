// Max-norm on the CPU and on CUDA: what is decided per row, in double. See fastreg/max_norm.py.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FASTREG_HD __host__ __device__ __forceinline__
#else
#define FASTREG_HD inline
#endif

namespace fastreg::max_norm {
// A row of the plan's table is a tensor: its address, dtype code, rows and their stride; elements per row,
// which are a box of up to kInner dimensions (size, stride), the innermost first; rows in a chunk; where its
// cap stands among the caps, and the step from one row's cap to the next. Strides in elements.
constexpr int kInner = 4;
constexpr int kAddress = 0, kCode = 1, kRows = 2, kRowStride = 3, kLength = 4, kBox = 5,
              kPerChunk = kBox + 2 * kInner, kCap = kPerChunk + 1, kCapStep = kCap + 1,
              kColumns = kCapStep + 1;
constexpr int64_t kFloat = 0, kHalf = 1, kBFloat16 = 2, kDouble = 3;  // codes of dtypes

// What happens to a row: capped by scaling, divided by norm^tau, projected onto the l1 or the l-infinity
// ball; or nothing, where its norm alone is wanted.
enum class Kind : int64_t { cap = 0, normalize = 1, l1_ball = 2, linf_ball = 3, norm = 4 };
// How a row's norm is summed.
enum class Order : int64_t { one = 0, two = 1, largest = 2, any = 3 };

FASTREG_HD Order order_of(double p) {
  return p == 1 ? Order::one : p == 2 ? Order::two : p == HUGE_VAL ? Order::largest : Order::any;
}

// From the sum of |x|^p to the norm.
FASTREG_HD double root(double sum, double p) {
  switch (order_of(p)) {
    case Order::two:
      return sqrt(sum);
    case Order::any: {
      // 1 / p is rounded, which costs the root |log sum| times as much: one step of Newton's mends it.
      const double first = pow(sum, 1 / p);
      const double step = first * ((pow(first, p) - sum) / (p * sum));
      return step == step && fabs(step) < first ? first - step : first;
    }
    default:
      return sum;
  }
}

// Whether a plain sum, of values not scaled, has lost nothing to overflow or underflow. NaN has.
FASTREG_HD bool is_safe(double sum, Order kind) {
  return kind == Order::largest ? sum < HUGE_VAL : sum > 0x1p-900 && sum < 0x1p900;
}

// Two sums of n terms taken in different orders differ by up to n / 2 units of 2^-53. A row is over its cap
// if its norm is above cap * (1 + slack), and is accepted after rounding if its norm is at most cap * (1 -
// below); what is rounded aims for a little less.
struct Margins {
  double slack, below, aim;
};
FASTREG_HD Margins margins(int64_t n, double p) {
  const double unit = fmax(1, 2 / p) * 0x1p-53;
  if (p == HUGE_VAL) return {0, 0, 8 * 0x1p-53};
  const double orders = static_cast<double>(n / 2) * unit;
  const bool exact = p == 1 || p == 2;  // powers are not
  const double below = !exact ? 2 * unit + orders : n >= 64 ? orders : 0;
  return {(exact ? 4 : 6) * unit + orders, below, 2 * below + 8 * unit};
}

// In a row of n elements of a narrow dtype, roundings of relative size u shift the norm by about u / sqrt(n).
// Aiming that much lower, a fraction of a rounding, makes the first attempt nearly always good.
constexpr int64_t kRounded = 256;
FASTREG_HD double rounding_margin(int64_t n, int64_t code) {
  if (code == kDouble || n < kRounded) return 0;
  const double unit = code == kFloat ? 0x1p-24 : code == kHalf ? 0x1p-11 : 0x1p-8;
  return 4 * unit / sqrt(static_cast<double>(n));
}

// The norm as scale * s, s neither overflowing nor vanishing.
struct Norm {
  double scale, s;
};

// A power of two near the largest value of a row, by which scaling is exact.
FASTREG_HD double power_of_two(double largest) {
  int exponent;
  frexp(largest, &exponent);
  return ldexp(1.0, exponent < -1021 ? -1021 : exponent > 1023 ? 1023 : exponent);
}

FASTREG_HD bool is_over(Norm norm, double cap, Margins m) {
  return norm.s > cap * (1 + m.slack) / norm.scale;
}

// The factor for x / scale, or a negative number for a row that stays. For tau = 1 this is the first factor
// to try.
FASTREG_HD double factor_of(Norm norm, double cap, double target, Margins m, double tau, Kind kind) {
  if (kind == Kind::normalize) {
    if (!(norm.s > 0)) return -1;
    return tau == 1 ? 1 / norm.s : exp2((1 - tau) * log2(norm.scale) - tau * log2(norm.s));
  }
  if (tau == 1) return is_over(norm, cap, m) ? target / norm.s : -1;
  const double log_norm = log2(norm.scale) + log2(norm.s), log_cap = log2(cap);
  const double slack = 2 * tau * m.slack + 16 * 0x1p-53 * (1 + fmin(fabs(log_cap), 1100.0));
  if (!(tau * log_norm > log_cap + slack)) return -1;
  return exp2(log_cap - tau * log_norm + log2(norm.scale));
}

// norm^(1 - tau).
FASTREG_HD double power_below(double norm, double tau) { return tau == 1 ? 1 : exp2((1 - tau) * log2(norm)); }

// A cap that cannot be one never binds.
FASTREG_HD double usable_cap(double cap) { return cap >= 0 ? cap : HUGE_VAL; }
}  // namespace fastreg::max_norm
