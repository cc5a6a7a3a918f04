// How GroupNorm reads a tensor: as rows of adjacent elements. A sample is its C channels of S positions
// (contiguous), or with `last` its S positions of C channels (channels_last).
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace fastreg {

// Strides are in elements.
struct Rows {
  char* data = nullptr;
  int64_t sample = 0, row = 0;

  template <class T>
  T* at(int64_t n, int64_t r) const {
    return reinterpret_cast<T*>(data) + n * sample + r * row;
  }
};

// How the dimensions after the second lie: as one of `positions` elements with stride `step`, or not so.
struct Layout {
  int64_t positions = 1, step = 1;
  bool regular = true;
};

inline Layout layout_of(const torch::stable::Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  Layout out;
  int64_t expected = 0;
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 2; --d) {
    if (sizes[d] != 1) {
      if (expected == 0)
        out.step = strides[d];
      else if (strides[d] != expected)
        out.regular = false;
      expected = strides[d] * sizes[d];
    }
    out.positions *= sizes[d];
  }
  return out;
}

// Whether rows of `tensor` are positions, where both readings are possible the one with the longer rows.
inline bool rows_are_positions(const torch::stable::Tensor& tensor, const Layout& layout) {
  const bool adjacent = tensor.size(1) == 1 || tensor.stride(1) == 1;
  if (layout.positions <= 1) return adjacent;
  return layout.step != 1 && adjacent;
}

// An empty tensor is, however it lies: no copy of it would lie otherwise.
inline bool readable(const torch::stable::Tensor& tensor, const Layout& layout) {
  return tensor.numel() == 0 || (layout.regular && (layout.positions <= 1 || layout.step == 1 ||
                                                    tensor.size(1) == 1 || tensor.stride(1) == 1));
}

// The values of a tensor that cannot be read as rows, in a new one that can; the strides of empty_like if
// possible.
inline torch::stable::Tensor readable_copy(const torch::stable::Tensor& tensor) {
  torch::stable::Tensor copy = torch::stable::empty_like(tensor);
  if (!readable(copy, layout_of(copy))) return torch::stable::contiguous(tensor);
  torch::stable::copy_(copy, tensor);
  return copy;
}

// The same values with the strides of empty_like(tensor), which the fake kernels promise.
inline torch::stable::Tensor with_layout_of(const torch::stable::Tensor& tensor,
                                            const torch::stable::Tensor& values) {
  torch::stable::Tensor out = torch::stable::empty_like(tensor);
  torch::stable::copy_(out, values);
  return out;
}

// The tensor as rows of the kind asked for; a copy (kept in `owner`) where it does not lie so.
// make(dim, sizes, strides, dtype) allocates.
template <class Make>
Rows rows_of(const torch::stable::Tensor& tensor, bool last, int64_t positions, torch::stable::Tensor& owner,
             Make make) {
  const Layout layout = layout_of(tensor);
  const int64_t channels = tensor.size(1);
  const bool fits = layout.regular &&
                    (last ? (channels == 1 || tensor.stride(1) == 1) : (positions <= 1 || layout.step == 1));
  if (fits) {
    owner = tensor;
    return {static_cast<char*>(tensor.data_ptr()), tensor.stride(0), last ? layout.step : tensor.stride(1)};
  }
  std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end()), strides(sizes.size());
  int64_t step = last ? channels : 1;
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 2; --d) strides[d] = step, step *= sizes[d];
  strides[1] = last ? 1 : positions;
  strides[0] = channels * positions;
  owner = make(tensor.dim(), sizes.data(), strides.data(), tensor.scalar_type());
  torch::stable::copy_(owner, tensor);
  return {static_cast<char*>(owner.data_ptr()), channels * positions, last ? channels : positions};
}

// A new tensor like torch.empty_like(tensor), and its rows. `tensor` is regular.
template <class Make>
torch::stable::Tensor empty_rows_like(const torch::stable::Tensor& tensor, bool last, int64_t positions,
                                      Rows& rows, Make make) {
  const int64_t channels = tensor.size(1), samples = tensor.size(0);
  const Layout layout = layout_of(tensor);
  const bool dense = (samples <= 1 || tensor.stride(0) == channels * positions) &&
                     (channels <= 1 || tensor.stride(1) == (last ? 1 : positions)) &&
                     (positions <= 1 || layout.step == (last ? channels : 1)) && tensor.numel() > 0;
  torch::stable::Tensor out =
      dense ? make(tensor.dim(), tensor.sizes().data(), tensor.strides().data(), tensor.scalar_type())
            : torch::stable::empty_like(tensor);
  rows = {static_cast<char*>(out.data_ptr()), out.stride(0), last ? layout_of(out).step : out.stride(1)};
  return out;
}

}  // namespace fastreg
