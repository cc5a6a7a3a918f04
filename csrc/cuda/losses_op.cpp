// The losses' CUDA operators: tensors in, launchers of losses.cu called, tensors out.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cuda/losses_launch.h"
#include "cuda/tensors.h"
#include "losses.h"

namespace fastreg {
namespace {

using cuda::check;
using cuda::OnDevice;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

int code_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return 0;
    case ScalarType::Half:
      return 1;
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Double:
      return 3;
    default:
      throw std::runtime_error("cross_entropy: the input must be floating point");
  }
}

// The stride along dimension 2 of (N, C, D), or along the last of (N, D), where there is one.
int64_t last_stride(const Tensor& tensor, int64_t dims) {
  return tensor.dim() == dims ? tensor.stride(dims - 1) : 0;
}

// Per-class vectors as the kernels take them; tensors converted here live as long as this.
class Vectors {
 public:
  explicit Vectors(ScalarType arithmetic) : arithmetic_(arithmetic) {}

  const void* operator()(const MaybeTensor& vector) {
    if (!vector) return nullptr;
    Tensor& kept = *(kept_[count_++] = *vector);
    if (kept.scalar_type() != arithmetic_) kept = torch::stable::to(kept, arithmetic_);
    if (!kept.is_contiguous()) kept = torch::stable::contiguous(kept);
    return kept.const_data_ptr();
  }

 private:
  ScalarType arithmetic_;
  std::array<MaybeTensor, 4> kept_;
  size_t count_ = 0;
};

void check_supported(const Tensor& target, const MaybeTensor& other_target, double smoothing, double gamma) {
  const bool indices = target.scalar_type() == ScalarType::Long || target.scalar_type() == ScalarType::Int ||
                       target.scalar_type() == ScalarType::Byte;
  if (!indices || other_target || (smoothing != 0 && gamma != 0))
    throw std::runtime_error(
        "cross_entropy: the CUDA kernels take one class index per row, smoothing or gamma");
}

int64_t rows_of(const Tensor& input) { return input.size(0) * (input.dim() == 3 ? input.size(2) : 1); }

Tensor workspace_for(const Tensor& input, const OnDevice& on, int dtype) {
  int64_t bytes = 0;
  check(cuda::cross_entropy_workspace(dtype, rows_of(input), input.size(1), input.stride(1),
                                      on.multiprocessors(), &bytes));
  return on.empty({bytes}, ScalarType::Byte);
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(
    const Tensor& input, const Tensor& target, MaybeTensor weight, MaybeTensor alpha,
    MaybeTensor logit_adjustment, MaybeTensor margin, MaybeTensor other_target, MaybeTensor share,
    int64_t ignore_index, int64_t reduction, double smoothing, double gamma, double alpha_scale, double scale,
    double z_loss, bool zero_if_empty, bool fp32_loss) {
  check_supported(target, other_target, smoothing, gamma);
  const OnDevice on(input);
  const int dtype = code_of(input.scalar_type());
  const ScalarType arithmetic = dtype == 3 ? ScalarType::Double : ScalarType::Float;
  const ScalarType loss_dtype = fp32_loss ? arithmetic : input.scalar_type();
  const int64_t n = input.size(0), d = input.dim() == 3 ? input.size(2) : 1;
  const bool three = input.dim() == 3;
  Tensor lse = three ? on.empty({2, n, d}, arithmetic) : on.empty({2, n}, arithmetic);
  Tensor loss = reduction != reduction_none ? on.empty({}, loss_dtype)
                : three                     ? on.empty({n, d}, loss_dtype)
                                            : on.empty({n}, loss_dtype);
  Tensor denominator = on.empty({}, arithmetic), workspace = workspace_for(input, on, dtype);
  Vectors vectors(arithmetic);
  const void *weight_data = vectors(weight), *alpha_data = vectors(alpha);
  const void *adjustment_data = vectors(logit_adjustment), *margin_data = vectors(margin);
  check(cuda::cross_entropy_forward(
      dtype, input.const_data_ptr(), n, input.size(1), d, input.stride(0), input.stride(1),
      last_stride(input, 3), target.const_data_ptr(), static_cast<int>(target.element_size()),
      target.stride(0), last_stride(target, 2), weight_data, alpha_data, adjustment_data, margin_data,
      loss.mutable_data_ptr(), loss_dtype == arithmetic, lse.mutable_data_ptr(),
      denominator.mutable_data_ptr(), workspace.mutable_data_ptr(), ignore_index, static_cast<int>(reduction),
      smoothing, gamma, alpha_scale, scale, z_loss, zero_if_empty, on.multiprocessors(), on.stream));
  return {loss, lse, denominator};
}

Tensor cross_entropy_backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                              MaybeTensor weight, MaybeTensor alpha, MaybeTensor logit_adjustment,
                              MaybeTensor margin, MaybeTensor other_target, MaybeTensor share,
                              const Tensor& lse, const Tensor& denominator, int64_t ignore_index,
                              int64_t reduction, double smoothing, double gamma, double alpha_scale,
                              double scale, double z_loss) {
  check_supported(target, other_target, smoothing, gamma);
  const OnDevice on(input);
  const int dtype = code_of(input.scalar_type());
  const bool each = reduction == reduction_none;
  Tensor grad = torch::stable::empty_like(input), workspace = workspace_for(input, on, dtype);
  Vectors vectors(lse.scalar_type());
  const void *weight_data = vectors(weight), *alpha_data = vectors(alpha);
  const void *adjustment_data = vectors(logit_adjustment), *margin_data = vectors(margin);
  check(cuda::cross_entropy_backward(
      dtype, grad_loss.const_data_ptr(), grad_loss.scalar_type() == lse.scalar_type(),
      each ? grad_loss.stride(0) : 0, each ? last_stride(grad_loss, 2) : 0, input.const_data_ptr(),
      input.size(0), input.size(1), input.dim() == 3 ? input.size(2) : 1, input.stride(0), input.stride(1),
      last_stride(input, 3), target.const_data_ptr(), static_cast<int>(target.element_size()),
      target.stride(0), last_stride(target, 2), weight_data, alpha_data, adjustment_data, margin_data,
      lse.const_data_ptr(), denominator.const_data_ptr(), grad.mutable_data_ptr(), grad.stride(0),
      grad.stride(1), last_stride(grad, 3), workspace.mutable_data_ptr(), ignore_index, smoothing, gamma,
      alpha_scale, scale, z_loss, on.multiprocessors(), on.stream));
  return grad;
}

// Both ways of the sigmoid focal loss; `grad_loss` is null in the forward.
void run_sigmoid_focal(const OnDevice& on, const Tensor* grad_loss, const Tensor& input, const Tensor& target,
                       const MaybeTensor& weight, const MaybeTensor& normalizer, Tensor& out, bool wide,
                       double alpha, double gamma, bool reduce, double factor) {
  const int dtype = code_of(input.scalar_type());
  const ScalarType arithmetic = dtype == 3 ? ScalarType::Double : ScalarType::Float;
  const Tensor x = torch::stable::contiguous(input), t = torch::stable::contiguous(target);
  const bool dense = target.dim() == input.dim();
  int64_t bytes = 0;
  check(cuda::sigmoid_focal_workspace(dtype, input.numel(), on.multiprocessors(), &bytes));
  Tensor workspace = on.empty({bytes}, ScalarType::Byte);
  Vectors vectors(arithmetic);
  const void *weight_data = vectors(weight), *normalizer_data = vectors(normalizer);
  check(cuda::sigmoid_focal(dtype, grad_loss != nullptr, grad_loss ? grad_loss->const_data_ptr() : nullptr,
                            x.const_data_ptr(), t.const_data_ptr(),
                            dense ? 0 : static_cast<int>(t.element_size()), weight_data, normalizer_data,
                            out.mutable_data_ptr(), wide, workspace.mutable_data_ptr(), input.size(0),
                            input.size(1), alpha, gamma, reduce, factor, on.multiprocessors(), on.stream));
}

Tensor sigmoid_focal_forward(const Tensor& input, const Tensor& target, MaybeTensor weight,
                             MaybeTensor normalizer, double alpha, double gamma, bool reduce, double scale,
                             bool fp32_loss) {
  const OnDevice on(input);
  const ScalarType arithmetic =
      input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const ScalarType dtype = fp32_loss ? arithmetic : input.scalar_type();
  Tensor loss = reduce ? on.empty({}, dtype) : on.empty({input.size(0), input.size(1)}, dtype);
  run_sigmoid_focal(on, nullptr, input, target, weight, normalizer, loss, dtype == arithmetic, alpha, gamma,
                    reduce, scale);
  return loss;
}

Tensor sigmoid_focal_backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                              MaybeTensor weight, MaybeTensor normalizer, double alpha, double gamma,
                              bool reduce, double scale) {
  const OnDevice on(input);
  const bool wide =
      grad_loss.scalar_type() == ScalarType::Double || grad_loss.scalar_type() == ScalarType::Float;
  const Tensor incoming = torch::stable::contiguous(grad_loss);
  Tensor grad = torch::stable::empty_like(input);
  Tensor out = grad.is_contiguous() ? grad : on.empty({input.size(0), input.size(1)}, input.scalar_type());
  run_sigmoid_focal(on, &incoming, input, target, weight, normalizer, out, wide, alpha, gamma, reduce, scale);
  if (!grad.is_contiguous()) torch::stable::copy_(grad, out);
  return grad;
}

}  // namespace
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg, CUDA, m) {
  m.impl("cross_entropy_forward.cuda", TORCH_BOX(&fastreg::cross_entropy_forward));
  m.impl("cross_entropy_backward.cuda", TORCH_BOX(&fastreg::cross_entropy_backward));
  m.impl("sigmoid_focal_forward.cuda", TORCH_BOX(&fastreg::sigmoid_focal_forward));
  m.impl("sigmoid_focal_backward.cuda", TORCH_BOX(&fastreg::sigmoid_focal_backward));
}
