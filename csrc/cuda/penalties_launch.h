// The launchers of penalties.cu, on the plans of csrc/penalties.h. They take raw pointers and a stream, and
// return what the launches returned.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastreg::cuda {
// parts (chunks, 2), terms (tensors) and an attack's norms (tensors, 2) are working memory; of the two
// penalties one is null.
cudaError_t lp_norms(const int64_t* table, const int64_t* chunks, int64_t chunk_count, int64_t chunk,
                     int64_t tensors, double p, bool squared, double* parts, double* terms, double* norms,
                     float* penalty, double* wide_penalty, cudaStream_t stream);
cudaError_t lp_penalty_backward(const int64_t* table, const int64_t* chunks, int64_t chunk_count,
                                int64_t chunk, const int64_t* outs, const double* norms, const double* grad,
                                double p, bool squared, bool add, cudaStream_t stream);
cudaError_t fgm_attack(const int64_t* table, const int64_t* chunks, int64_t chunk_count, int64_t chunk,
                       int64_t tensors, double epsilon, double* parts, double* norms, cudaStream_t stream);
cudaError_t fgm_restore(const int64_t* table, const int64_t* chunks, int64_t chunk_count, int64_t chunk,
                        cudaStream_t stream);
}  // namespace fastreg::cuda
