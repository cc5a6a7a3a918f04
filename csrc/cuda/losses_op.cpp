// The losses' CUDA operators: tensors in, launchers of losses.cu called, tensors out.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>

#include "cuda/losses_launch.h"
#include "cuda/tensors.h"
#include "losses.h"

namespace fastreg {
namespace {

using cuda::check;
using cuda::code_of;
using cuda::OnDevice;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

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

bool is_index(ScalarType dtype) {
  return dtype == ScalarType::Long || dtype == ScalarType::Int || dtype == ScalarType::Byte;
}

// Strides of (N, D) or (N), and of (N, C, D) or (N, C).
void set_strides(const Tensor& tensor, int64_t& n, int64_t& d) {
  n = tensor.stride(0);
  if (tensor.dim() == 2) d = tensor.stride(1);
}

void set_strides(const Tensor& tensor, int64_t& n, int64_t& c, int64_t& d) {
  n = tensor.stride(0), c = tensor.stride(1);
  if (tensor.dim() == 3) d = tensor.stride(2);
}

// A call of the launchers, and the tensors that were made for it.
struct Call {
  Call(const OnDevice& on, const Tensor& input, const Tensor& target, const MaybeTensor& weight,
       const MaybeTensor& alpha, const MaybeTensor& logit_adjustment, const MaybeTensor& margin,
       const MaybeTensor& other_target, const MaybeTensor& share, int64_t ignore_index, int64_t reduction,
       double smoothing, double gamma, double alpha_scale, double scale, double z_loss)
      : arithmetic(input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
        vectors(arithmetic) {
    to.dtype = code_of(input);
    to.input = input.const_data_ptr();
    to.n = input.size(0), to.classes = input.size(1), to.d = input.dim() == 3 ? input.size(2) : 1;
    set_strides(input, to.stride_n, to.stride_c, to.stride_d);
    if (is_index(target.scalar_type())) {
      to.target = target.const_data_ptr();
      to.target_bytes = target.element_size();
      set_strides(target, to.target_stride_n, to.target_stride_d);
    } else {
      const bool known = target.scalar_type() == input.scalar_type() || target.scalar_type() == arithmetic;
      probabilities = known ? target : torch::stable::to(target, arithmetic);
      to.target = probabilities->const_data_ptr();
      to.wide_target = probabilities->scalar_type() == arithmetic;
      set_strides(*probabilities, to.target_stride_n, to.target_stride_c, to.target_stride_d);
    }
    if (other_target) {
      to.other = other_target->const_data_ptr();
      to.other_bytes = other_target->element_size();
      set_strides(*other_target, to.other_stride_n, to.other_stride_d);
      to.share = share->const_data_ptr();
      set_strides(*share, to.share_stride_n, to.share_stride_d);
    }
    to.weight = vectors(weight), to.alpha = vectors(alpha);
    to.adjustment = vectors(logit_adjustment), to.margin = vectors(margin);
    to.ignore_index = ignore_index, to.reduction = reduction;
    to.smoothing = smoothing, to.gamma = gamma, to.alpha_scale = alpha_scale, to.scale = scale,
    to.z_loss = z_loss;
    to.multiprocessors = on.multiprocessors();
    to.shared_bytes = on.shared_bytes_of_block();
    to.capability = on.capability();
  }

  void set_gradient(const Tensor& grad) {
    to.grad_input = grad.mutable_data_ptr();
    set_strides(grad, to.grad_stride_n, to.grad_stride_c, to.grad_stride_d);
  }

  // To be run when all else is filled in.
  void make_workspace(const OnDevice& on) {
    int64_t bytes = 0;
    check(cuda::cross_entropy_workspace(&to, &bytes));
    workspace = on.empty({bytes}, ScalarType::Byte);
    to.workspace = workspace->mutable_data_ptr();
  }

  const ScalarType arithmetic;
  cuda::CrossEntropyCall to = {};

 private:
  Vectors vectors;
  MaybeTensor probabilities, workspace;
};

using Extra = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Extra cross_entropy_forward_extra(const Tensor& input, const Tensor& target, MaybeTensor weight,
                                  MaybeTensor alpha, MaybeTensor logit_adjustment, MaybeTensor margin,
                                  MaybeTensor other_target, MaybeTensor share, int64_t ignore_index,
                                  int64_t reduction, double smoothing, double gamma, double alpha_scale,
                                  double scale, double z_loss, bool zero_if_empty, bool fp32_loss,
                                  bool want_losses, bool want_argmax, MaybeTensor grad_input) {
  const OnDevice on(input);
  Call call(on, input, target, weight, alpha, logit_adjustment, margin, other_target, share, ignore_index,
            reduction, smoothing, gamma, alpha_scale, scale, z_loss);
  const ScalarType loss_dtype = fp32_loss ? call.arithmetic : input.scalar_type();
  auto per_row = [&](ScalarType dtype) {
    return input.dim() == 3 ? on.empty({call.to.n, call.to.d}, dtype) : on.empty({call.to.n}, dtype);
  };
  Tensor loss = reduction == reduction_none ? per_row(loss_dtype) : on.empty({}, loss_dtype);
  const int64_t known = call.to.target_bytes == 0 || (smoothing != 0 && gamma != 0) ? 3 : 2;
  Tensor lse = input.dim() == 3 ? on.empty({known, call.to.n, call.to.d}, call.arithmetic)
                                : on.empty({known, call.to.n}, call.arithmetic);
  Tensor denominator = on.empty({}, call.arithmetic);
  Tensor losses = want_losses ? per_row(call.arithmetic) : on.empty({0}, call.arithmetic);
  Tensor argmax = want_argmax ? per_row(ScalarType::Long) : on.empty({0}, ScalarType::Long);
  call.to.loss = loss.mutable_data_ptr();
  call.to.wide = loss_dtype == call.arithmetic;
  call.to.lse = lse.mutable_data_ptr();
  call.to.denominator = denominator.mutable_data_ptr();
  if (want_losses) call.to.losses = losses.mutable_data_ptr();
  if (want_argmax) call.to.argmax = argmax.mutable_data_ptr();
  if (grad_input) call.set_gradient(*grad_input);
  call.to.zero_if_empty = zero_if_empty;
  call.make_workspace(on);
  check(cuda::cross_entropy_forward(&call.to, on.stream));
  return {loss, lse, denominator, losses, argmax};
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(
    const Tensor& input, const Tensor& target, MaybeTensor weight, MaybeTensor alpha,
    MaybeTensor logit_adjustment, MaybeTensor margin, MaybeTensor other_target, MaybeTensor share,
    int64_t ignore_index, int64_t reduction, double smoothing, double gamma, double alpha_scale, double scale,
    double z_loss, bool zero_if_empty, bool fp32_loss) {
  auto [loss, lse, denominator, losses, argmax] = cross_entropy_forward_extra(
      input, target, weight, alpha, logit_adjustment, margin, other_target, share, ignore_index, reduction,
      smoothing, gamma, alpha_scale, scale, z_loss, zero_if_empty, fp32_loss, false, false, std::nullopt);
  return {loss, lse, denominator};
}

Tensor cross_entropy_backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                              MaybeTensor weight, MaybeTensor alpha, MaybeTensor logit_adjustment,
                              MaybeTensor margin, MaybeTensor other_target, MaybeTensor share,
                              const Tensor& lse, const Tensor& denominator, int64_t ignore_index,
                              int64_t reduction, double smoothing, double gamma, double alpha_scale,
                              double scale, double z_loss) {
  const OnDevice on(input);
  Call call(on, input, target, weight, alpha, logit_adjustment, margin, other_target, share, ignore_index,
            reduction, smoothing, gamma, alpha_scale, scale, z_loss);
  Tensor grad = torch::stable::empty_like(input);
  call.to.grad_loss = grad_loss.const_data_ptr();
  call.to.wide = grad_loss.scalar_type() == call.arithmetic;
  if (reduction == reduction_none)
    set_strides(grad_loss, call.to.grad_loss_stride_n, call.to.grad_loss_stride_d);
  call.to.lse = const_cast<void*>(lse.const_data_ptr());
  call.to.denominator = const_cast<void*>(denominator.const_data_ptr());
  call.set_gradient(grad);
  call.make_workspace(on);
  check(cuda::cross_entropy_backward(&call.to, on.stream));
  return grad;
}

// Elements in one piece: an empty_like of any logits is.
bool is_dense(const Tensor& tensor) {
  std::array<std::pair<int64_t, int64_t>, 3> axes{};
  int64_t count = 0, step = 1;
  for (int64_t axis = 0; axis < tensor.dim() && count < 3; ++axis)
    axes[static_cast<size_t>(count++)] = {tensor.stride(axis), tensor.size(axis)};
  std::sort(axes.begin(), axes.begin() + count);
  for (int64_t axis = 0; axis < count; ++axis) {
    const auto [stride, size] = axes[static_cast<size_t>(axis)];
    if (size != 1 && stride != step) return false;
    step *= size;
  }
  return tensor.dim() <= 3;
}

void scale_gradient(Tensor grad, const Tensor& factor) {
  const OnDevice on(grad);
  const ScalarType arithmetic =
      grad.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor by = factor.scalar_type() == arithmetic ? factor : torch::stable::to(factor, arithmetic);
  Tensor piece = is_dense(grad) ? grad : torch::stable::contiguous(grad);
  check(cuda::scale_gradient(code_of(grad), piece.mutable_data_ptr(), by.const_data_ptr(), grad.numel(),
                             on.multiprocessors(), on.stream));
  if (piece.const_data_ptr() != grad.const_data_ptr()) torch::stable::copy_(grad, piece);
}

// Contiguous rows, or what has one dimension.
Tensor in_rows(const Tensor& tensor) {
  return tensor.dim() == 2 && tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// Both ways of the sigmoid focal loss; `grad_loss` is null in the forward.
void run_sigmoid_focal(const OnDevice& on, const Tensor* grad_loss, const Tensor& input, const Tensor& target,
                       const MaybeTensor& weight, const MaybeTensor& normalizer, Tensor& out, bool wide,
                       double alpha, double gamma, bool reduce, double factor) {
  const int dtype = code_of(input);
  const ScalarType arithmetic = dtype == 3 ? ScalarType::Double : ScalarType::Float;
  const bool dense = target.dim() == input.dim();
  const ScalarType given = target.scalar_type();
  const bool known =
      !dense || given == input.scalar_type() || given == arithmetic || given == ScalarType::Byte;
  const Tensor x = in_rows(input), t = in_rows(known ? target : torch::stable::to(target, arithmetic));
  int64_t bytes = 0;
  check(cuda::sigmoid_focal_workspace(dtype, input.numel(), on.multiprocessors(), &bytes));
  Tensor workspace = on.empty({bytes}, ScalarType::Byte);
  Vectors vectors(arithmetic);
  const void *weight_data = vectors(weight), *normalizer_data = vectors(normalizer);
  check(cuda::sigmoid_focal(dtype, grad_loss != nullptr, grad_loss ? grad_loss->const_data_ptr() : nullptr,
                            x.const_data_ptr(), x.stride(0), t.const_data_ptr(), t.stride(0), dense,
                            static_cast<int>(t.element_size()), weight_data, normalizer_data,
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
  m.impl("cross_entropy_forward_extra.cuda", TORCH_BOX(&fastreg::cross_entropy_forward_extra));
  m.impl("scale_gradient_.cuda", TORCH_BOX(&fastreg::scale_gradient));
  m.impl("cross_entropy_backward.cuda", TORCH_BOX(&fastreg::cross_entropy_backward));
  m.impl("sigmoid_focal_forward.cuda", TORCH_BOX(&fastreg::sigmoid_focal_forward));
  m.impl("sigmoid_focal_backward.cuda", TORCH_BOX(&fastreg::sigmoid_focal_backward));
}
