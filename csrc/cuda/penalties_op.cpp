// The CUDA operators of the penalties and FGM: tensors in, launchers of penalties.cu called.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/penalties_launch.h"
#include "cuda/tensors.h"

namespace fastreg {
namespace {
using cuda::check;
using cuda::OnDevice;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

std::tuple<Tensor, Tensor> lp_norms(const Tensor& table, const Tensor& chunks, int64_t chunk, double p,
                                    bool squared, bool wide) {
  const OnDevice on(table);
  const int64_t tensors = table.size(0);
  const Tensor parts = on.empty({chunks.size(0), 2}, ScalarType::Double);
  const Tensor terms = on.empty({tensors}, ScalarType::Double);
  Tensor norms = on.empty({tensors, 2}, ScalarType::Double);
  Tensor penalty = on.empty({}, wide ? ScalarType::Double : ScalarType::Float);
  check(cuda::lp_norms(data_of<int64_t>(table), data_of<int64_t>(chunks), chunks.size(0), chunk, tensors, p,
                       squared, data_of<double>(parts), data_of<double>(terms), data_of<double>(norms),
                       wide ? nullptr : data_of<float>(penalty), wide ? data_of<double>(penalty) : nullptr,
                       on.stream));
  return {penalty, norms};
}

void lp_penalty_backward(const Tensor& table, const Tensor& chunks, int64_t chunk, const Tensor& outs,
                         const Tensor& norms, const Tensor& grad, double p, bool squared, bool add) {
  const OnDevice on(table);
  check(cuda::lp_penalty_backward(data_of<int64_t>(table), data_of<int64_t>(chunks), chunks.size(0), chunk,
                                  data_of<int64_t>(outs), data_of<double>(norms), data_of<double>(grad), p,
                                  squared, add, on.stream));
}

void fgm_attack(const Tensor& table, const Tensor& chunks, int64_t chunk, double epsilon, bool) {
  const OnDevice on(table);
  const int64_t tensors = table.size(0);
  const Tensor parts = on.empty({chunks.size(0), 2}, ScalarType::Double);
  const Tensor norms = on.empty({tensors, 2}, ScalarType::Double);
  check(cuda::fgm_attack(data_of<int64_t>(table), data_of<int64_t>(chunks), chunks.size(0), chunk, tensors,
                         epsilon, data_of<double>(parts), data_of<double>(norms), on.stream));
}

void fgm_restore(const Tensor& table, const Tensor& chunks, int64_t chunk) {
  const OnDevice on(table);
  check(
      cuda::fgm_restore(data_of<int64_t>(table), data_of<int64_t>(chunks), chunks.size(0), chunk, on.stream));
}
}  // namespace
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg, CUDA, m) {
  m.impl("lp_norms.cuda", TORCH_BOX(&fastreg::lp_norms));
  m.impl("lp_penalty_backward.cuda", TORCH_BOX(&fastreg::lp_penalty_backward));
  m.impl("fgm_attack.cuda", TORCH_BOX(&fastreg::fgm_attack));
  m.impl("fgm_restore.cuda", TORCH_BOX(&fastreg::fgm_restore));
}
