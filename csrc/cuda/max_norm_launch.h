// The launchers of max_norm.cu. They take raw pointers and a stream, and return what the launches returned.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastreg::cuda {
// `chunks` of a plan (see csrc/max_norm.h); adds the number of rows that changed to *count.
cudaError_t max_norm_rows(const int64_t* table, const int64_t* chunks, int64_t chunk_count,
                          const double* caps, double p, double tau, double decay, int64_t kind,
                          int64_t* count, cudaStream_t stream);
}  // namespace fastreg::cuda
