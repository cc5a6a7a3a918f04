// What the torch-facing half of every CUDA operator needs: the device and stream of a call, new tensors
// there, and errors. Links against a torch built without CUDA, which lacks the stream's symbol: it is looked
// up at the first call.
#pragma once
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace fastreg::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws what a launcher returned, unless it succeeded.
inline void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("fastreg, CUDA: ") + cudaGetErrorString(error));
}

// How launchers name a floating dtype.
inline int code_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return 0;
    case ScalarType::Half:
      return 1;
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Double:
      return 3;
    default:
      throw std::runtime_error("fastreg, CUDA: the tensor must be floating point");
  }
}

// The device of a tensor is current while this lives. Launch on `stream`.
class __attribute__((visibility("hidden"))) OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor)
      : device(tensor.get_device_index()), guard_(device), stream(current_stream(device)) {}

  const int32_t device;

 private:
  torch::stable::accelerator::DeviceGuard guard_;

 public:
  const cudaStream_t stream;

  int multiprocessors() const { return attribute<cudaDevAttrMultiProcessorCount>(); }
  int shared_bytes_of_block() const { return attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(); }
  int capability() const {  // 90 for sm_90
    return 10 * attribute<cudaDevAttrComputeCapabilityMajor>() +
           attribute<cudaDevAttrComputeCapabilityMinor>();
  }

  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    int64_t strides[8], step = 1;
    for (size_t d = sizes.size(); d--; step *= std::max<int64_t>(sizes.begin()[d], 1)) strides[d] = step;
    return strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, dtype);
  }

  Tensor strided(int64_t dim, const int64_t* sizes, const int64_t* strides, ScalarType dtype) const {
    AtenTensorHandle handle;
    const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dim, sizes, strides, code, aoti_torch_device_type_cuda(), device, &handle));
    return Tensor(handle);
  }

 private:
  template <cudaDeviceAttr which>
  int attribute() const {
    static std::array<std::atomic<int>, 64> known{};
    std::atomic<int>& slot = known[static_cast<size_t>(device) % known.size()];
    int value = slot.load(std::memory_order_relaxed);
    if (value == 0) {
      check(cudaDeviceGetAttribute(&value, which, device));
      slot.store(value, std::memory_order_relaxed);
    }
    return value;
  }

  static cudaStream_t current_stream(int32_t device) {
    using Lookup = AOTITorchError (*)(int32_t, void**);
    static const auto lookup = [] {
      // Linkers that leave out what is not used leave out libtorch.so, through which it would be found by
      // default.
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return reinterpret_cast<Lookup>(
          dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
    }();
    if (!lookup) throw std::runtime_error("fastreg, CUDA: this torch is built without CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(lookup(device, &stream));
    return static_cast<cudaStream_t>(stream);
  }
};

}  // namespace fastreg::cuda
