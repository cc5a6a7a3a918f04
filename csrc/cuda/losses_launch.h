// The launchers of losses.cu. They take raw pointers and a stream, and return what the launches returned.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastreg::cuda {

// dtype: 0 fp32, 1 fp16, 2 bf16, 3 fp64. Logits are (n, classes, d); weight, alpha, adjustment and margin
// contiguous, of the arithmetic's type (fp32, for fp64 input fp64), or null. The loss is of that type where
// `wide`, else of the input's. `bytes`: of device memory that the others need beside the tensors.
cudaError_t cross_entropy_workspace(int dtype, int64_t rows, int64_t classes, int64_t stride_c,
                                    int multiprocessors, int64_t* bytes);

cudaError_t cross_entropy_forward(int dtype, const void* input, int64_t n, int64_t classes, int64_t d,
                                  int64_t stride_n, int64_t stride_c, int64_t stride_d, const void* target,
                                  int target_bytes, int64_t target_stride_n, int64_t target_stride_d,
                                  const void* weight, const void* alpha, const void* adjustment,
                                  const void* margin, void* loss, bool wide, void* lse, void* denominator,
                                  void* workspace, int64_t ignore_index, int reduction, double smoothing,
                                  double gamma, double alpha_scale, double scale, double z_loss,
                                  bool zero_if_empty, int multiprocessors, cudaStream_t stream);

cudaError_t cross_entropy_backward(int dtype, const void* grad_loss, bool wide, int64_t grad_loss_stride_n,
                                   int64_t grad_loss_stride_d, const void* input, int64_t n, int64_t classes,
                                   int64_t d, int64_t stride_n, int64_t stride_c, int64_t stride_d,
                                   const void* target, int target_bytes, int64_t target_stride_n,
                                   int64_t target_stride_d, const void* weight, const void* alpha,
                                   const void* adjustment, const void* margin, const void* lse,
                                   const void* denominator, void* grad_input, int64_t grad_stride_n,
                                   int64_t grad_stride_c, int64_t grad_stride_d, void* workspace,
                                   int64_t ignore_index, double smoothing, double gamma, double alpha_scale,
                                   double scale, double z_loss, int multiprocessors, cudaStream_t stream);

// Everything contiguous; weight and normalizer of the arithmetic's type, or null. index_bytes: 0 for a dense
// target of the input's type. The result is scaled by `factor`, and a reduced one divided by the normalizer.
cudaError_t sigmoid_focal_workspace(int dtype, int64_t n, int multiprocessors, int64_t* bytes);

cudaError_t sigmoid_focal(int dtype, bool backward, const void* grad_loss, const void* input,
                          const void* target, int index_bytes, const void* weight, const void* normalizer,
                          void* out, bool wide, void* workspace, int64_t rows, int64_t classes, double alpha,
                          double gamma, bool reduce, double factor, int multiprocessors, cudaStream_t stream);

}  // namespace fastreg::cuda
