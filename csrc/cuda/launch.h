// How kernels are launched and dynamic shared memory is declared: one source for nvcc and, without a GPU, for
// a plain C++ compiler with tests/proving/cudahost.h.
#pragma once
#ifdef CUDAHOST
// cudahost.h, included ahead of everything, defines both.
#else
#include <cuda_runtime.h>

// The kernel's template arguments hold no bare comma: name the instance first (auto* kernel = my_kernel<T,
// 4>).
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)

// T* name, to the block's dynamic shared memory, 16-byte aligned.
#define DYN_SMEM(T, name)                                                        \
  extern __shared__ __align__(16) unsigned char fastreg_dynamic_shared_memory[]; \
  T* name = reinterpret_cast<T*>(fastreg_dynamic_shared_memory)
#endif
