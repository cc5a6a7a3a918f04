// The launchers of max_norm.cu. They take raw pointers and a stream, and return what the launches returned.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastreg::cuda {
// `chunks` of a plan (see csrc/max_norm.h), of which the last `pieces` are pieces of rows; adds the number of
// rows that changed to *count. decay_tensor, if not null, stands for decay. mends: whether rounding may bring
// a row above its cap. workspace: four numbers per piece, here and below. vectors: into how many of 16 bytes
// per thread of a block the longest row is dealt that stays whole. shared_bytes: what a block may have.
cudaError_t max_norm_rows(const int64_t* table, const int64_t* chunks, int64_t chunk_count, int64_t pieces,
                          int64_t vectors, bool mends, const double* caps, double p, double tau, double decay,
                          const double* decay_tensor, int64_t kind, double* workspace, int64_t* count,
                          int shared_bytes, cudaStream_t stream);

// Into how many pieces the rows of a matrix are cut; 0 if they stay whole.
int64_t max_norm_pieces(int64_t rows, int64_t length);

// Matrices of rows that lie one after the other, of the dtype `code` (see elements.h), at least one element.
// Caps are `cap_step` apart, 0 or 1. norms: of rows that stayed -1.
cudaError_t max_norm_forward(int code, const void* input, void* output, const double* caps, int64_t cap_step,
                             double* norms, int64_t rows, int64_t length, double p, double tau,
                             double* workspace, int shared_bytes, cudaStream_t stream);
cudaError_t max_norm_backward(int code, const void* grad_output, const void* input, void* grad_input,
                              const double* caps, int64_t cap_step, const double* norms, double* slopes,
                              int64_t rows, int64_t length, double p, double tau, double* workspace,
                              int shared_bytes, cudaStream_t stream);
cudaError_t row_norms(int code, const void* input, double* norms, int64_t rows, int64_t length, double p,
                      double* workspace, int shared_bytes, cudaStream_t stream);
cudaError_t row_norms_backward(int code, const double* grad, const void* input, void* grad_input,
                               const double* norms, int64_t rows, int64_t length, double p, double* workspace,
                               int shared_bytes, cudaStream_t stream);
}  // namespace fastreg::cuda
