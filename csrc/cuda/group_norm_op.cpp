// GroupNorm's CUDA operators: tensors in, launchers of group_norm.cu called, tensors out.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "cuda/group_norm_launch.h"
#include "cuda/tensors.h"
#include "group_norm_layout.h"

namespace fastreg {
namespace {

using cuda::check;
using cuda::code_of;
using cuda::OnDevice;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// What forward and backward share: the cut of the call, and tensors as rows.
struct Call {
  OnDevice on;
  int dtype;
  int64_t samples, channels, groups, positions;
  bool last;
  ScalarType arithmetic;
  std::vector<Tensor> kept;  // what was copied to be read as rows, or made contiguous

  Call(const Tensor& input, int64_t groups, const Layout& layout)
      : on(input),
        dtype(code_of(input)),
        samples(input.size(0)),
        channels(input.size(1)),
        groups(groups),
        positions(layout.positions),
        last(rows_are_positions(input, layout)),
        arithmetic(dtype == 3 ? ScalarType::Double : ScalarType::Float) {}

  auto make() const {
    return [this](int64_t dim, const int64_t* sizes, const int64_t* strides, ScalarType type) {
      return on.strided(dim, sizes, strides, type);
    };
  }
  Rows read(const Tensor& tensor) {
    kept.push_back(tensor);
    return rows_of(tensor, last, positions, kept.back(), make());
  }
  Rows read(const MaybeTensor& tensor) { return tensor ? read(*tensor) : Rows{}; }
  Tensor like(const Tensor& input, Rows& rows) const {
    return empty_rows_like(input, last, positions, rows, make());
  }
  const void* vector(const MaybeTensor& tensor) {
    if (!tensor) return nullptr;
    kept.push_back(tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor));
    return kept.back().const_data_ptr();
  }
  Tensor workspace(bool backward) const {
    int64_t bytes = 0;
    check(cuda::group_norm_workspace(dtype, backward, last, samples, channels, groups, positions,
                                     on.multiprocessors(), on.shared_bytes_of_block(), on.capability(),
                                     &bytes));
    return on.empty({bytes}, ScalarType::Byte);
  }
};

int code_or_none(const MaybeTensor& tensor) { return tensor ? code_of(*tensor) : 0; }

std::tuple<Tensor, Tensor> group_norm_forward(const Tensor& input, int64_t groups, MaybeTensor weight,
                                              MaybeTensor bias, double eps, int64_t activation,
                                              MaybeTensor residual, bool save) {
  const Layout layout = layout_of(input);
  if (!readable(input, layout)) {
    auto [output, stats] =
        group_norm_forward(readable_copy(input), groups, weight, bias, eps, activation, residual, save);
    return {with_layout_of(input, output), stats};
  }
  Call call(input, groups, layout);
  Rows y;
  Tensor output = call.like(input, y);
  Tensor stats =
      save ? call.on.empty({2, call.samples, groups}, call.arithmetic) : call.on.empty({0}, call.arithmetic);
  if (input.numel() == 0) {
    torch::stable::fill_(stats, NAN);
    return {output, stats};
  }
  const Rows x = call.read(input), r = call.read(residual);
  const void *weight_data = call.vector(weight), *bias_data = call.vector(bias);
  Tensor workspace = call.workspace(false);
  check(cuda::group_norm_forward(call.dtype, call.last, call.samples, call.channels, groups, call.positions,
                                 x.data, x.sample, x.row, r.data, r.sample, r.row, weight_data,
                                 code_or_none(weight), bias_data, code_or_none(bias), y.data, y.sample, y.row,
                                 save ? stats.mutable_data_ptr() : nullptr, workspace.mutable_data_ptr(), eps,
                                 static_cast<int>(activation), call.on.multiprocessors(),
                                 call.on.shared_bytes_of_block(), call.on.capability(), call.on.stream));
  return {output, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_backward(const Tensor& grad_output, const Tensor& input,
                                                               int64_t groups, MaybeTensor weight,
                                                               MaybeTensor bias, int64_t activation,
                                                               MaybeTensor residual, const Tensor& stats,
                                                               int64_t wanted) {
  const Layout layout = layout_of(input);
  if (!readable(input, layout)) {
    auto [dx, dw, db, dr] = group_norm_backward(grad_output, readable_copy(input), groups, weight, bias,
                                                activation, residual, stats, wanted);
    return {wanted & 1 ? with_layout_of(input, dx) : dx, dw, db, wanted & 8 ? with_layout_of(input, dr) : dr};
  }
  Call call(input, groups, layout);
  Rows dx, dr;
  const auto nothing = [&] { return call.on.empty({0}, input.scalar_type()); };  // outputs may not share one
  const auto vector_like = [&](bool asked, const MaybeTensor& like) {
    return asked ? call.on.empty({call.channels}, like->scalar_type()) : nothing();
  };
  Tensor grad_input = wanted & 1 ? call.like(input, dx) : nothing();
  Tensor grad_weight = vector_like(wanted & 2, weight), grad_bias = vector_like(wanted & 4, bias);
  Tensor grad_residual = wanted & 8 ? call.like(input, dr) : nothing();
  if (input.numel() == 0) {
    if (wanted & 2) torch::stable::zero_(grad_weight);
    if (wanted & 4) torch::stable::zero_(grad_bias);
    return {grad_input, grad_weight, grad_bias, grad_residual};
  }
  const Rows dy = call.read(grad_output), x = call.read(input), r = call.read(residual);
  const void *weight_data = call.vector(weight), *bias_data = call.vector(bias);
  Tensor workspace = call.workspace(true);
  check(cuda::group_norm_backward(
      call.dtype, call.last, call.samples, call.channels, groups, call.positions, dy.data, dy.sample, dy.row,
      x.data, x.sample, x.row, r.data, r.sample, r.row, weight_data, code_or_none(weight), bias_data,
      code_or_none(bias), stats.const_data_ptr(), dx.data, dx.sample, dx.row, dr.data, dr.sample, dr.row,
      wanted & 2 ? grad_weight.mutable_data_ptr() : nullptr, code_or_none(weight),
      wanted & 4 ? grad_bias.mutable_data_ptr() : nullptr, code_or_none(bias), workspace.mutable_data_ptr(),
      static_cast<int>(activation), call.on.multiprocessors(), call.on.shared_bytes_of_block(),
      call.on.capability(), call.on.stream));
  return {grad_input, grad_weight, grad_bias, grad_residual};
}

}  // namespace
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg, CUDA, m) {
  m.impl("group_norm_forward.cuda", TORCH_BOX(&fastreg::group_norm_forward));
  m.impl("group_norm_backward.cuda", TORCH_BOX(&fastreg::group_norm_backward));
}
