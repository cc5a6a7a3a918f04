// CUDA kernels with planted bugs, and without.
#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/launch.h"

namespace {

// Sums the rows of a matrix, one block per row. BUG 0 is right. 1: no barrier before shared memory is read.
// 2: three quarters of a warp skip a shuffle that names all lanes. 3: a shuffle with half a mask. 4: reads
// past the row.
template <int BUG, typename T>
__global__ void rowsum_kernel(const T* __restrict__ x, float* __restrict__ out, int64_t n) {
  __shared__ float partial[BUG == 5 ? 4 : 32];
  const T* row = x + int64_t(blockIdx.x) * n;
  float sum = 0;
  for (int64_t i = threadIdx.x; i < n + (BUG == 4); i += blockDim.x) sum += static_cast<float>(row[i]);
  for (int d = 16; d; d >>= 1) sum += __shfl_down_sync(BUG == 3 ? 0x0000ffffu : 0xffffffffu, sum, d);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) partial[warp] = sum;
  if (BUG != 1) __syncthreads();
  if (warp == 0 && (BUG != 2 || lane < 8)) {
    sum = lane < int(blockDim.x / 32) ? partial[lane] : 0.f;
    for (int d = 16; d; d >>= 1) sum += __shfl_down_sync(0xffffffffu, sum, d);
    if (lane == 0) out[blockIdx.x] = sum;
  }
}

template <int BUG>
void launch_rowsum(const void* x, float* out, int64_t rows, int64_t columns, bool bf16, int threads,
                   cudaStream_t stream) {
  dim3 grid{unsigned(rows)}, block{unsigned(threads)};
  auto* in_bf16 = rowsum_kernel<BUG, __nv_bfloat16>;
  auto* in_fp32 = rowsum_kernel<BUG, float>;
  if (bf16)
    LAUNCH(in_bf16, grid, block, 0, stream, static_cast<const __nv_bfloat16*>(x), out, columns);
  else
    LAUNCH(in_fp32, grid, block, 0, stream, static_cast<const float*>(x), out, columns);
}

// Sums 2·x over each warp through shared memory. Kind 0 is right; 1 reuses shared memory without a second
// barrier; 2 relies on the lanes of a warp being in lock step.
template <int KIND>
__global__ void warp_sums(const float* x, float* out) {
  DYN_SMEM(float, shared);
  int t = threadIdx.x;
  shared[t] = x[t];
  __syncthreads();
  float neighbour = shared[(t + 1) % blockDim.x];
  if (KIND != 1) __syncthreads();
  shared[t] = neighbour * 2;
  __syncthreads();
  for (int d = 16; d; d >>= 1) {
    float other = t % 32 < d ? shared[t + d] : 0.f;
    if (KIND != 2) __syncwarp();
    shared[t] += other;
    if (KIND != 2) __syncwarp();
  }
  if (t % 32 == 0) out[t / 32] = shared[t];
}

// Reads an element of dynamic shared memory that nothing wrote; one past its end if `past`.
__global__ void uninitialised(float* out, bool past) {
  DYN_SMEM(float, shared);
  out[threadIdx.x] = shared[threadIdx.x + past];
}

// Half of the block waits for the other half, which waits at its own barrier forever.
__global__ void diverging_warps(float* out) {
  if (threadIdx.x < 16) __syncwarp(0x0001ffffu);
  out[threadIdx.x] = 1;
  __syncthreads();
}

__global__ void neighbours_kernel(const float* x, float* y, int n) {  // reads every element twice
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i] + x[(i + 1) % n];
}

// Every lane of a warp reads the warp's first element, as often as asked: one load each time.
__global__ void broadcast_kernel(const float* x, float* y, int times) {
  volatile const float* shared_by_warp = x + threadIdx.x / 32 * 32;
  float sum = 0;
  for (int i = 0; i < times; ++i) sum += *shared_by_warp;
  y[threadIdx.x] = sum;
}

__global__ void count_kernel(float* total, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) atomicAdd(total, 1.0f);
}

// The block that arrives last adds the partial sums to what every block read; unless ORDERED, the last by
// number does, arrived or not.
template <bool ORDERED>
__global__ void sum_last_block_kernel(const float* rows, float* partial, int* ticket, float* total) {
  if (threadIdx.x != 0) return;
  const float before = *total;
  float sum = 0;
  for (int i = 0; i < 32; ++i) sum += rows[blockIdx.x * 32 + i];
  partial[blockIdx.x] = sum;
  __threadfence();
  int arrived = ORDERED ? atomicAdd(ticket, 1) : int(blockIdx.x);
  if (arrived != int(gridDim.x) - 1) return;
  __threadfence();
  sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += partial[i];
  *total = before + sum;
}

// Every block of a cluster writes its number, and adds up what all have written. BUG 1: nobody waits; 2: one
// thread does not; 3: half of the threads wait for their block instead.
template <int BUG>
__global__ void cluster_sum_kernel(int* numbers, int* sums) {
  int* const mine = numbers + blockIdx.x * gridDim.y;
  if (threadIdx.x == 0) mine[blockIdx.y] = int(blockIdx.y) + 1;
  const bool other = BUG == 2 ? threadIdx.x == 5 : BUG == 3 && threadIdx.x < 16;
  if (other && BUG == 3)
    __syncthreads();
  else if (BUG != 1 && !other)
    wait_for_cluster();
  if (BUG == 2) __syncthreads();
  int sum = 0;
  for (unsigned i = 0; i < gridDim.y; ++i) sum += mine[i];
  sums[(blockIdx.x * gridDim.y + blockIdx.y) * blockDim.x + threadIdx.x] = sum;
}

}  // namespace

namespace planted {

cudaError_t cluster_sum(int bug, int* numbers, int* sums, int clusters, int blocks, cudaStream_t stream) {
  const dim3 grid(clusters, blocks);
  switch (bug) {
    case 0:
      LAUNCH_CLUSTERS(cluster_sum_kernel<0>, blocks, grid, dim3(32), 0, stream, numbers, sums);
      break;
    case 1:
      LAUNCH_CLUSTERS(cluster_sum_kernel<1>, blocks, grid, dim3(32), 0, stream, numbers, sums);
      break;
    case 2:
      LAUNCH_CLUSTERS(cluster_sum_kernel<2>, blocks, grid, dim3(32), 0, stream, numbers, sums);
      break;
    default:
      LAUNCH_CLUSTERS(cluster_sum_kernel<3>, blocks, grid, dim3(32), 0, stream, numbers, sums);
  }
  return cudaGetLastError();
}

cudaError_t rowsum(int bug, const void* x, float* out, int64_t rows, int64_t columns, bool bf16, int threads,
                   cudaStream_t stream) {
  switch (bug) {
    case 0:
      launch_rowsum<0>(x, out, rows, columns, bf16, threads, stream);
      break;
    case 1:
      launch_rowsum<1>(x, out, rows, columns, bf16, threads, stream);
      break;
    case 2:
      launch_rowsum<2>(x, out, rows, columns, bf16, threads, stream);
      break;
    case 3:
      launch_rowsum<3>(x, out, rows, columns, bf16, threads, stream);
      break;
    case 4:
      launch_rowsum<4>(x, out, rows, columns, bf16, threads, stream);
      break;
    case 5:
      launch_rowsum<5>(x, out, rows, columns, bf16, threads, stream);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

void sum_warps(int kind, const float* x, float* out, int threads) {
  switch (kind) {
    case 0:
      LAUNCH(warp_sums<0>, dim3(1), dim3(threads), threads * 4, 0, x, out);
      break;
    case 1:
      LAUNCH(warp_sums<1>, dim3(1), dim3(threads), threads * 4, 0, x, out);
      break;
    case 2:
      LAUNCH(warp_sums<2>, dim3(1), dim3(threads), threads * 4, 0, x, out);
      break;
  }
}

void read_uninitialised(float* out, int threads, bool past) {
  LAUNCH(uninitialised, dim3(1), dim3(threads), threads * 4, 0, out, past);
}

void deadlock(float* out, int threads) { LAUNCH(diverging_warps, dim3(1), dim3(threads), 0, 0, out); }

void neighbours(const float* x, float* y, int n) {
  LAUNCH(neighbours_kernel, dim3((n + 127) / 128), dim3(128), 0, 0, x, y, n);
}

void broadcast(const float* x, float* y, int threads, int times) {
  LAUNCH(broadcast_kernel, dim3(1), dim3(threads), 0, 0, x, y, times);
}

void count(float* total, int n, int threads) {
  LAUNCH(count_kernel, dim3((n + threads - 1) / threads), dim3(threads), 0, 0, total, n);
}

void sum_last_block(const float* rows, float* partial, int* ticket, float* total, int blocks, bool ordered) {
  if (ordered)
    LAUNCH(sum_last_block_kernel<true>, dim3(blocks), dim3(32), 0, 0, rows, partial, ticket, total);
  else
    LAUNCH(sum_last_block_kernel<false>, dim3(blocks), dim3(32), 0, 0, rows, partial, ticket, total);
}

}  // namespace planted
