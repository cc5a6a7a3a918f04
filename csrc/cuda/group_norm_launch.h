// The launchers of group_norm.cu. They take raw pointers and a stream, and return what the launches returned.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastreg::cuda {

// dtype: 0 fp32, 1 fp16, 2 bf16, 3 fp64, of a parameter its own. Tensors are rows of adjacent elements: the
// channels of (n, channels, positions), or with `last` its positions; a sample and a row begin `_n` and
// `_row` elements apart. weight, bias, residual, stats and gradients that are not wanted may be null. stats
// is (2, n, groups), of the arithmetic's type (fp32, for fp64 fp64). multiprocessors, shared_bytes (of a
// block, at most) and capability (90 for sm_90) are the GPU's. `bytes`: of device memory that the others need
// beside the tensors.
cudaError_t group_norm_workspace(int dtype, bool backward, bool last, int64_t n, int64_t channels,
                                 int64_t groups, int64_t positions, int multiprocessors, int shared_bytes,
                                 int capability, int64_t* bytes);

cudaError_t group_norm_forward(int dtype, bool last, int64_t n, int64_t channels, int64_t groups,
                               int64_t positions, const void* input, int64_t input_n, int64_t input_row,
                               const void* residual, int64_t residual_n, int64_t residual_row,
                               const void* weight, int weight_dtype, const void* bias, int bias_dtype,
                               void* output, int64_t output_n, int64_t output_row, void* stats,
                               void* workspace, double eps, int activation, int multiprocessors,
                               int shared_bytes, int capability, cudaStream_t stream);

cudaError_t group_norm_backward(int dtype, bool last, int64_t n, int64_t channels, int64_t groups,
                                int64_t positions, const void* grad_output, int64_t grad_output_n,
                                int64_t grad_output_row, const void* input, int64_t input_n,
                                int64_t input_row, const void* residual, int64_t residual_n,
                                int64_t residual_row, const void* weight, int weight_dtype, const void* bias,
                                int bias_dtype, const void* stats, void* grad_input, int64_t grad_input_n,
                                int64_t grad_input_row, void* grad_residual, int64_t grad_residual_n,
                                int64_t grad_residual_row, void* grad_weight, int grad_weight_dtype,
                                void* grad_bias, int grad_bias_dtype, void* workspace, int activation,
                                int multiprocessors, int shared_bytes, int capability, cudaStream_t stream);

}  // namespace fastreg::cuda
