// The launchers of losses.cu. They take raw pointers and a stream, and return what the launches returned.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastreg::cuda {

// One call of cross-entropy, forward or backward. Every member has 8 bytes, so that other languages can fill
// it in; what does not apply is 0. dtype: 0 fp32, 1 fp16, 2 bf16, 3 fp64. Logits are (n, classes, d). What is
// called the arithmetic's type is fp32, for fp64 input fp64.
struct CrossEntropyCall {
  int64_t dtype;
  const void* input;
  int64_t n, classes, d, stride_n, stride_c, stride_d;
  const void* target;
  int64_t target_bytes;  // of a class index; 0 for probabilities
  int64_t wide_target;   // probabilities of the arithmetic's type, else of the input's
  int64_t target_stride_n, target_stride_c, target_stride_d;
  const void* other;  // the second target, and the share of the first, of the arithmetic's type
  int64_t other_bytes, other_stride_n, other_stride_d;
  const void* share;
  int64_t share_stride_n, share_stride_d;
  const void *weight, *alpha, *adjustment, *margin;  // contiguous, of the arithmetic's type
  void* loss;                                        // null in the backward
  int64_t wide;  // the loss or its gradient is of the arithmetic's type, else of the input's
  void* lse;     // two numbers per row, three where every class has a share
  void *denominator, *losses, *argmax;
  const void* grad_loss;  // null: 1
  int64_t grad_loss_stride_n, grad_loss_stride_d;
  void* grad_input;
  int64_t grad_stride_n, grad_stride_c, grad_stride_d;
  int64_t ignore_index, reduction, zero_if_empty;
  double smoothing, gamma, alpha_scale, scale, z_loss;
  void* workspace;
  int64_t multiprocessors;
  int64_t shared_bytes;  // that a block can have
  int64_t capability;    // of the GPU, 90 for sm_90
};

// `bytes`: of device memory that `workspace` must have for this call. All else must be filled in, and
// pointers that are to be set must not be null.
cudaError_t cross_entropy_workspace(const CrossEntropyCall* call, int64_t* bytes);
cudaError_t cross_entropy_forward(const CrossEntropyCall* call, cudaStream_t stream);
cudaError_t cross_entropy_backward(const CrossEntropyCall* call, cudaStream_t stream);

// grad *= *factor, which is of the arithmetic's type; where it is 1 the gradient is not touched.
cudaError_t scale_gradient(int dtype, void* grad, const void* factor, int64_t n, int multiprocessors,
                           cudaStream_t stream);

// Rows of the input and of a dense target are contiguous and have strides; all else is contiguous. weight and
// normalizer are of the arithmetic's type, or null. target_bytes: of an index; or of a dense target's
// element, which is of the input's type or the arithmetic's, or, of one byte, 0 or 1. The result is scaled by
// `factor`, and a reduced one divided by the normalizer.
cudaError_t sigmoid_focal_workspace(int dtype, int64_t n, int multiprocessors, int64_t* bytes);

cudaError_t sigmoid_focal(int dtype, bool backward, const void* grad_loss, const void* input, int64_t stride,
                          const void* target, int64_t target_stride, bool dense, int target_bytes,
                          const void* weight, const void* normalizer, void* out, bool wide, void* workspace,
                          int64_t rows, int64_t classes, double alpha, double gamma, bool reduce,
                          double factor, int multiprocessors, cudaStream_t stream);

}  // namespace fastreg::cuda
