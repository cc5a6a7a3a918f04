// The CUDA operators of max-norm: tensors in, launchers of max_norm.cu called.
#include <torch/csrc/stable/library.h>

#include "cuda/max_norm_launch.h"
#include "cuda/tensors.h"

namespace fastreg {
namespace {
using cuda::check;
using cuda::OnDevice;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor max_norm_rows(const Tensor& table, const Tensor& chunks, int64_t /*chunk*/, const Tensor& caps,
                     double p, double tau, double decay, int64_t kind) {
  const OnDevice on(table);
  Tensor count = on.empty({}, ScalarType::Long);
  check(cudaMemsetAsync(count.mutable_data_ptr(), 0, sizeof(int64_t), on.stream));
  check(cuda::max_norm_rows(static_cast<const int64_t*>(table.const_data_ptr()),
                            static_cast<const int64_t*>(chunks.const_data_ptr()), chunks.size(0),
                            static_cast<const double*>(caps.const_data_ptr()), p, tau, decay, kind,
                            static_cast<int64_t*>(count.mutable_data_ptr()), on.stream));
  return count;
}
}  // namespace
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg, CUDA, m) {
  m.impl("max_norm_rows.cuda", TORCH_BOX(&fastreg::max_norm_rows));
}
