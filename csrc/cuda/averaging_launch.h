// The launchers of averaging.cu. They take raw pointers and a stream, and return what the launches returned.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastreg::cuda {
constexpr int kMaxAverages = 64;

cudaError_t average_update(const int64_t* table, const int64_t* chunks, int64_t count, int64_t chunk,
                           int averages, const double* rules, int64_t* n_averaged, int64_t* calls,
                           int32_t* ticket, const float* found_inf, int64_t update_every, int64_t start_step,
                           bool stochastic, int64_t seed, cudaStream_t stream);
// The weight is that behind the pointer, unless it is null.
cudaError_t average_lerp(const int64_t* table, const int64_t* chunks, int64_t count, int64_t chunk,
                         double weight, const double* weight_tensor, cudaStream_t stream);
cudaError_t average_swap(const int64_t* table, const int64_t* chunks, int64_t count, int64_t chunk,
                         cudaStream_t stream);
}  // namespace fastreg::cuda
