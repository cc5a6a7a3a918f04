// The CUDA operators of max-norm: tensors in, launchers of max_norm.cu called.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cuda/max_norm_launch.h"
#include "cuda/tensors.h"
#include "max_norm.h"

namespace fastreg {
namespace {
using cuda::check;
using cuda::code_of;
using cuda::OnDevice;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const double* doubles_of(const Tensor& tensor) { return static_cast<const double*>(tensor.const_data_ptr()); }
double* doubles_of(Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()); }

Tensor workspace(const OnDevice& on, int64_t pieces) { return on.empty({4 * pieces}, ScalarType::Double); }

Tensor max_norm_rows(const Tensor& table, const Tensor& chunks, int64_t traits, const Tensor& caps, double p,
                     double tau, double decay, std::optional<Tensor> decay_tensor, int64_t kind) {
  const OnDevice on(table);
  const int64_t pieces = traits >> 20, vectors = traits >> 12 & 0xFF;
  const bool mends =
      static_cast<max_norm::Kind>(kind) == max_norm::Kind::cap && tau == 1 && (traits & 7) != 0;
  Tensor work = workspace(on, pieces);
  Tensor count = on.empty({}, ScalarType::Long);
  check(cudaMemsetAsync(count.mutable_data_ptr(), 0, sizeof(int64_t), on.stream));
  check(cuda::max_norm_rows(static_cast<const int64_t*>(table.const_data_ptr()),
                            static_cast<const int64_t*>(chunks.const_data_ptr()), chunks.size(0), pieces,
                            vectors, mends, doubles_of(caps), p, tau, decay,
                            decay_tensor ? doubles_of(*decay_tensor) : nullptr, kind, doubles_of(work),
                            static_cast<int64_t*>(count.mutable_data_ptr()), on.shared_bytes_of_block(),
                            on.stream));
  return count;
}

std::tuple<Tensor, Tensor> max_norm_forward(const Tensor& input, const Tensor& caps, double p, double tau) {
  const OnDevice on(input);
  const int64_t rows = input.size(0), length = input.size(1);
  Tensor work = workspace(on, cuda::max_norm_pieces(rows, length));
  Tensor output = on.empty({rows, length}, input.scalar_type()), norms = on.empty({rows}, ScalarType::Double);
  check(cuda::max_norm_forward(code_of(input), input.const_data_ptr(), output.mutable_data_ptr(),
                               doubles_of(caps), caps.size(0) > 1, doubles_of(norms), rows, length, p, tau,
                               doubles_of(work), on.shared_bytes_of_block(), on.stream));
  return {output, norms};
}

std::tuple<Tensor, Tensor> max_norm_backward(const Tensor& grad_output, const Tensor& input,
                                             const Tensor& caps, const Tensor& norms, double p, double tau) {
  const OnDevice on(input);
  const int64_t rows = input.size(0), length = input.size(1);
  Tensor work = workspace(on, cuda::max_norm_pieces(rows, length));
  Tensor grad = on.empty({rows, length}, input.scalar_type()), slopes = on.empty({rows}, ScalarType::Double);
  check(cuda::max_norm_backward(code_of(input), grad_output.const_data_ptr(), input.const_data_ptr(),
                                grad.mutable_data_ptr(), doubles_of(caps), caps.size(0) > 1,
                                doubles_of(norms), doubles_of(slopes), rows, length, p, tau, doubles_of(work),
                                on.shared_bytes_of_block(), on.stream));
  return {grad, slopes};
}

Tensor row_norms(const Tensor& input, double p) {
  const OnDevice on(input);
  Tensor work = workspace(on, cuda::max_norm_pieces(input.size(0), input.size(1)));
  Tensor norms = on.empty({input.size(0)}, ScalarType::Double);
  check(cuda::row_norms(code_of(input), input.const_data_ptr(), doubles_of(norms), input.size(0),
                        input.size(1), p, doubles_of(work), on.shared_bytes_of_block(), on.stream));
  return norms;
}

Tensor row_norms_backward(const Tensor& grad, const Tensor& input, const Tensor& norms, double p) {
  const OnDevice on(input);
  Tensor work = workspace(on, cuda::max_norm_pieces(input.size(0), input.size(1)));
  Tensor grad_input = on.empty({input.size(0), input.size(1)}, input.scalar_type());
  check(cuda::row_norms_backward(code_of(input), doubles_of(grad), input.const_data_ptr(),
                                 grad_input.mutable_data_ptr(), doubles_of(norms), input.size(0),
                                 input.size(1), p, doubles_of(work), on.shared_bytes_of_block(), on.stream));
  return grad_input;
}
}  // namespace
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg, CUDA, m) {
  m.impl("max_norm_rows.cuda", TORCH_BOX(&fastreg::max_norm_rows));
  m.impl("max_norm_forward.cuda", TORCH_BOX(&fastreg::max_norm_forward));
  m.impl("max_norm_backward.cuda", TORCH_BOX(&fastreg::max_norm_backward));
  m.impl("row_norms.cuda", TORCH_BOX(&fastreg::row_norms));
  m.impl("row_norms_backward.cuda", TORCH_BOX(&fastreg::row_norms_backward));
}
