// How kernels are launched and dynamic shared memory is declared: one source for nvcc and, without a GPU, for
// a plain C++ compiler with tests/proving/cudahost.h.
#pragma once
#ifdef CUDAHOST
// cudahost.h, included ahead of everything, defines all of them.
#else
#include <cuda_runtime.h>

// The kernel's template arguments hold no bare comma: name the instance first (auto* kernel = my_kernel<T,
// 4>).
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)

// The same for clusters of `blocks` neighbours along y, which run at the same time. sm_90 and later.
#define LAUNCH_CLUSTERS(kernel, blocks, grid, block, shared_bytes, stream, ...) \
  fastreg::cuda::launch_clusters(kernel, blocks, grid, block, shared_bytes, stream, __VA_ARGS__)

namespace fastreg::cuda {

template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), unsigned blocks, dim3 grid, dim3 block,
                            size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchAttribute shape = {};
  shape.id = cudaLaunchAttributeClusterDimension;
  shape.val.clusterDim = {1, blocks, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  config.attrs = &shape, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace fastreg::cuda

// Until all threads of the cluster are here; what they have written to memory before, all see from here on.
__device__ __forceinline__ void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// T* name, to the block's dynamic shared memory, 16-byte aligned.
#define DYN_SMEM(T, name)                                                        \
  extern __shared__ __align__(16) unsigned char fastreg_dynamic_shared_memory[]; \
  T* name = reinterpret_cast<T*>(fastreg_dynamic_shared_memory)
#endif

namespace fastreg::cuda {

constexpr int most_blocks_of_cluster = 8;  // that every GPU with clusters runs

// Whether a GPU of this compute capability, 90 for sm_90, runs clusters. Code for a lesser one, which a build
// without its own may bring along, has no barrier for them.
inline bool has_clusters(int capability) {
#ifdef __CUDA_ARCH_LIST__
  for (const int built_for : {__CUDA_ARCH_LIST__})
    if (built_for >= 900 && built_for <= 10 * capability) return true;
  return false;
#else
  return capability >= 90;
#endif
}

}  // namespace fastreg::cuda
