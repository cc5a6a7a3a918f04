// Lp penalties and FGM on the CPU and on CUDA: the layout of their plans, and the formulas in double. See
// fastreg/penalties.py.
#pragma once
#include "max_norm.h"

namespace fastreg::penalties {
// A row of the plan: elements, dtype code, address of the weight; for FGM also of its gradient, its backup
// and the marks of the blocks that are backed up, a byte each.
constexpr int kElements = 0, kCode = 1, kWeight = 2, kGrad = 3, kBackup = 4, kMarks = 5;
constexpr int kPenaltyColumns = 3, kFgmColumns = 6;
constexpr int64_t kBlock = 64;  // elements

// norms holds (scale, s) per tensor: the norm is scale * s. The tensor's share in the penalty.
FASTREG_HD double term(double scale, double s, double p, bool squared) {
  if (!squared) return scale * s;
  return p == 1 ? scale * s : p == 2 ? (scale * s) * (scale * s) : pow(scale, p) * pow(s, p);
}

// The derivative in an element w is factor * w where `linear`, else factor * sign(w) * (|w| * inverse)^(p -
// 1).
struct Slope {
  double factor, inverse;
};
FASTREG_HD Slope slope_of(double scale, double s, double grad, double p, bool squared) {
  if (s == 0) return {0, 1};
  if (squared) return {p * grad, 1};
  if (p == 1) return {grad, 1};
  return {grad, 1 / scale / s};
}
}  // namespace fastreg::penalties
