// The CUDA operators of weight averaging: tensors in, launchers of averaging.cu called.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "cuda/averaging_launch.h"
#include "cuda/tensors.h"

namespace fastreg {
namespace {
using cuda::check;
using cuda::OnDevice;
using torch::stable::Tensor;

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
const T* data_of(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

void average_update(const Tensor& table, const Tensor& chunks, int64_t chunk, int64_t /*kinds*/,
                    const Tensor& rules, const Tensor& n_averaged, const Tensor& calls, const Tensor& ticket,
                    std::optional<Tensor> found_inf, int64_t update_every, int64_t start_step,
                    std::optional<int64_t> seed) {
  const OnDevice on(n_averaged);
  check(cuda::average_update(data_of<int64_t>(table), data_of<int64_t>(chunks), chunks.size(0), chunk,
                             static_cast<int>(rules.size(0)), data_of<double>(rules),
                             data_of<int64_t>(n_averaged), data_of<int64_t>(calls), data_of<int32_t>(ticket),
                             data_of<float>(found_inf), update_every, start_step, seed.has_value(),
                             seed.value_or(0), on.stream));
}

void average_lerp(const Tensor& table, const Tensor& chunks, int64_t chunk, int64_t /*kinds*/, double weight,
                  std::optional<Tensor> weight_tensor) {
  const OnDevice on(table);
  check(cuda::average_lerp(data_of<int64_t>(table), data_of<int64_t>(chunks), chunks.size(0), chunk, weight,
                           data_of<double>(weight_tensor), on.stream));
}

void average_swap(const Tensor& table, const Tensor& chunks, int64_t chunk) {
  const OnDevice on(table);
  check(cuda::average_swap(data_of<int64_t>(table), data_of<int64_t>(chunks), chunks.size(0), chunk,
                           on.stream));
}
}  // namespace
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg, CUDA, m) {
  m.impl("average_update.cuda", TORCH_BOX(&fastreg::average_update));
  m.impl("average_lerp.cuda", TORCH_BOX(&fastreg::average_lerp));
  m.impl("average_swap.cuda", TORCH_BOX(&fastreg::average_swap));
}
