// New CPU tensors, straight from the allocator: through the dispatcher each costs a microsecond more.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <initializer_list>

namespace fastreg {

// Asks for huge pages for a tensor so large that its memory comes fresh from the system: entering it page by
// page takes longer than writing it.
inline void use_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096;
  if (bytes < (int64_t{4} << 20)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: it may be refused
#endif
}

inline torch::stable::Tensor new_strided(int64_t dim, const int64_t* sizes, const int64_t* strides,
                                         torch::headeronly::ScalarType dtype) {
  AtenTensorHandle handle;
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, code, aoti_torch_device_type_cpu(), 0, &handle));
  const torch::stable::Tensor tensor(handle);
  int64_t bytes = tensor.element_size();
  for (int64_t d = 0; d < dim; ++d) bytes *= sizes[d];
  use_huge_pages(tensor.data_ptr(), bytes);
  return tensor;
}

inline void contiguous_strides(int64_t dim, const int64_t* sizes, int64_t* strides) {
  for (int64_t d = dim, step = 1; d--; step *= std::max<int64_t>(sizes[d], 1)) strides[d] = step;
}

inline torch::stable::Tensor new_tensor(std::initializer_list<int64_t> sizes,
                                        torch::headeronly::ScalarType dtype) {
  int64_t strides[8];
  contiguous_strides(static_cast<int64_t>(sizes.size()), sizes.begin(), strides);
  return new_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, dtype);
}

// What torch.empty_like gives.
inline torch::stable::Tensor new_like(const torch::stable::Tensor& tensor) {
  int64_t strides[8];
  const int64_t dim = tensor.dim();
  if (dim > 8) return torch::stable::empty_like(tensor);
  contiguous_strides(dim, tensor.sizes().data(), strides);
  return std::equal(strides, strides + dim, tensor.strides().data())
             ? new_strided(dim, tensor.sizes().data(), strides, tensor.scalar_type())
             : torch::stable::empty_like(tensor);
}

}  // namespace fastreg
