// The launchers of noise.cu: raw pointers and a stream in, what the launches returned out. dtype: 0 fp32, 1
// fp16, 2 bf16, 3 fp64.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastreg::cuda {
// residual may be null. Element i is in row i / (elements / rows) of the mask.
cudaError_t drop_path(int dtype, const void* x, const void* mask, const void* residual, void* out,
                      int64_t elements, int64_t rows, double p, cudaStream_t stream);
// tau, one of a table of samples and channels per run of `run` elements, and sums are fp32, or fp64 for fp64.
cudaError_t soft_threshold(int dtype, const void* x, const void* tau, void* out, int64_t elements,
                           int64_t run, int64_t channels, int64_t sample_step, int64_t channel_step,
                           cudaStream_t stream);
cudaError_t soft_threshold_backward(int dtype, const void* grad, const void* x, const void* tau, void* grad_x,
                                    void* sums, int64_t elements, int64_t run, int64_t channels,
                                    int64_t sample_step, int64_t channel_step, cudaStream_t stream);
}  // namespace fastreg::cuda
