#ifndef FASTREG_ISA
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "cpu/capability.h"
#define FASTREG_FILE "cpu/losses.cpp"
#include "cpu/foreach_isa.h"

namespace fastreg {
using torch::stable::Tensor;
using torch::headeronly::ScalarType;
std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(const Tensor& input, const Tensor& target, std::optional<Tensor> weight,
   int64_t ignore_index, int64_t reduction, double label_smoothing, bool fp32_loss) {
  auto loss = torch::stable::new_empty(input, {}, ScalarType::Float);
  auto lse = torch::stable::new_empty(input, {input.size(0)}, ScalarType::Float);
  auto den = torch::stable::new_empty(input, {}, ScalarType::Float);
  FASTREG_PICK(probe)(static_cast<const float*>(input.const_data_ptr()), static_cast<float*>(lse.mutable_data_ptr()), input.numel());
  return {loss, lse, den};
}
}  // namespace fastreg
STABLE_TORCH_LIBRARY_IMPL(fastreg, CPU, m) { m.impl("cross_entropy_forward.cpu", TORCH_BOX(&fastreg::cross_entropy_forward)); }
#else
namespace fastreg::FASTREG_ISA {
void probe(const float* x, float* y, int64_t n) {
  float s = 0;
#pragma omp simd reduction(+ : s)
  for (int64_t i = 0; i < n; ++i) s += x[i];
  y[0] = s;
}
}
#endif
