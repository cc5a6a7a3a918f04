// The CUDA operators of stochastic depth and soft-thresholding: tensors in, launchers of noise.cu called.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cuda/noise_launch.h"
#include "cuda/tensors.h"

namespace fastreg {
namespace {
using cuda::check;
using cuda::code_of;
using cuda::OnDevice;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor drop_path(const Tensor& x, const Tensor& mask, double p, std::optional<Tensor> residual) {
  const OnDevice on(x);
  Tensor out = torch::stable::empty_like(x);
  check(cuda::drop_path(code_of(x), x.const_data_ptr(), mask.const_data_ptr(),
                        residual ? residual->const_data_ptr() : nullptr, out.mutable_data_ptr(), x.numel(),
                        mask.numel(), p, on.stream));
  return out;
}

Tensor soft_threshold(const Tensor& x, const Tensor& tau, int64_t run, int64_t channels, int64_t sample_step,
                      int64_t channel_step) {
  const OnDevice on(x);
  Tensor out = torch::stable::empty_like(x);
  check(cuda::soft_threshold(code_of(x), x.const_data_ptr(), tau.const_data_ptr(), out.mutable_data_ptr(),
                             x.numel(), run, channels, sample_step, channel_step, on.stream));
  return out;
}

std::tuple<Tensor, Tensor> soft_threshold_backward(const Tensor& grad, const Tensor& x, const Tensor& tau,
                                                   int64_t run, int64_t channels, int64_t sample_step,
                                                   int64_t channel_step) {
  const OnDevice on(x);
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor sums = on.empty({(x.numel() + run - 1) / run}, tau.scalar_type());
  check(cuda::soft_threshold_backward(
      code_of(x), grad.const_data_ptr(), x.const_data_ptr(), tau.const_data_ptr(), grad_x.mutable_data_ptr(),
      sums.mutable_data_ptr(), x.numel(), run, channels, sample_step, channel_step, on.stream));
  return {grad_x, sums};
}
}  // namespace
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg, CUDA, m) {
  m.impl("drop_path.cuda", TORCH_BOX(&fastreg::drop_path));
  m.impl("soft_threshold.cuda", TORCH_BOX(&fastreg::soft_threshold));
  m.impl("soft_threshold_backward.cuda", TORCH_BOX(&fastreg::soft_threshold_backward));
}
