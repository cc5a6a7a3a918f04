// What the kernels share: element types, accesses of 16 bytes, sums over a block.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace fastreg::cuda {
namespace {

constexpr unsigned everyone = 0xffffffffu;
constexpr int in_flight = 4;  // 16-byte loads that a thread has under way

template <class T>
using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
struct alignas(16) Vector {
  static constexpr int size = 16 / sizeof(T);
  T values[size];
};

template <class T>
__device__ double widen(T x) {
  if constexpr (sizeof(T) == 2)
    return static_cast<float>(x);
  else
    return x;
}

// To the nearest, through fp32 for the half types, as PyTorch does.
template <class T>
__device__ T nearest(double x) {
  if constexpr (sizeof(T) == 2)
    return static_cast<T>(static_cast<float>(x));
  else
    return static_cast<T>(x);
}

__device__ inline float fast_exp(float x) { return __expf(x); }
__device__ inline double fast_exp(double x) { return exp(x); }
// 0 for subnormal results, which would cost three instructions more: of what is added to greater numbers.
__device__ inline float flushed_exp(float x) {
#ifdef CUDAHOST
  return __expf(x);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.4426950408889634f));
  return result;
#endif
}
__device__ inline double flushed_exp(double x) { return exp(x); }
// For normal x, up to 2^126: one instruction.
__device__ inline float approximate_inverse(float x) {
#ifdef CUDAHOST
  return 1 / x;
#else
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}
// NaN only if both are.
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }
// Rounded before anything is added: where the compiler makes one instruction of a product and a sum, the sum
// is not one of the product that others have.
__device__ inline float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double rounded_product(double a, double b) { return __dmul_rn(a, b); }
// For b up to 2^126, subnormal ones included.
__device__ inline float fast_quotient(float a, float b) {
  const float up = b < 0x1p-64f ? 0x1p64f : 1.0f;
  return __fdividef(a * up, b * up);
}
__device__ inline double fast_quotient(double a, double b) { return a / b; }
__device__ inline float fast_pow(float x, float y) { return __powf(x, y); }
__device__ inline double fast_pow(double x, double y) { return pow(x, y); }

template <class T, class A>
__device__ void store(void* to, bool wide, int64_t at, A value) {
  if (wide)
    static_cast<A*>(to)[at] = value;
  else
    static_cast<T*>(to)[at] = static_cast<T>(value);
}

// Calls `scalar(c)`, `one(c)` and `some(c, pitch)` for a lane's share of the classes [begin, end) of a row at
// `x`: vectors of 16 aligned bytes, COUNT at a time where there are as many, single elements before and
// after.
template <int COUNT = in_flight, class T, class Scalar, class Some, class One>
__device__ void deal(const T* x, int64_t begin, int64_t end, int lane, int lanes, Scalar scalar, Some some,
                     One one) {
  constexpr int size = Vector<T>::size;
  const int64_t past = reinterpret_cast<uintptr_t>(x + begin) % 16 / sizeof(T);
  int64_t middle = begin + (past ? size - past : 0);
  if (middle > end) middle = end;
  const int64_t tail = middle + (end - middle) / size * size;
  for (int64_t c = begin + lane; c < middle; c += lanes) scalar(c);
  const int64_t pitch = int64_t(lanes) * size;
  int64_t c = middle + int64_t(lane) * size;
  for (; c + (COUNT - 1) * pitch < tail; c += COUNT * pitch) some(c, pitch);
  for (; c < tail; c += pitch) one(c);
  for (c = tail + lane; c < end; c += lanes) scalar(c);
}

// One access each, by name, here and in `store`: of a plain copy the compiler makes pieces.
template <int COUNT, class T>
__device__ void load(T (&out)[COUNT][Vector<T>::size], const T* x, int64_t pitch) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
#ifdef CUDAHOST
    *reinterpret_cast<Vector<T>*>(out[i]) = *reinterpret_cast<const Vector<T>*>(x + i * pitch);
#else
    *reinterpret_cast<uint4*>(out[i]) = __ldca(reinterpret_cast<const uint4*>(x + i * pitch));
#endif
  }
}

template <class T>
__device__ void store(T* to, const Vector<T>& vector) {
#ifdef CUDAHOST
  *reinterpret_cast<Vector<T>*>(to) = vector;
#else
  __stwb(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(vector.values));
#endif
}

// Sum over the block; the result is thread 0's. Call it once per kernel and array of shared memory.
template <class A>
__device__ A sum_block(A value, A (&warps)[32]) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, count = blockDim.x * blockDim.y / 32;
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(everyone, value, step);
  if (thread % 32 == 0) warps[thread / 32] = value;
  __syncthreads();
  if (thread == 0)
    for (int w = 1; w < count; ++w) value += warps[w];
  return value;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Shared memory above 48 KB, the kernel's static one included, has to be asked for. None of the kernels has
// more than 8 KB of that.
template <class Kernel>
cudaError_t allow(Kernel* kernel, int64_t bytes) {
  if (bytes <= 40 << 10) return cudaSuccess;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

// Calls run.operator()<T>() for a dtype code: 0 fp32, 1 fp16, 2 bf16, 3 fp64.
template <class Run>
cudaError_t with_type(int dtype, Run run) {
  switch (dtype) {
    case 0:
      return run.template operator()<float>();
    case 1:
      return run.template operator()<__half>();
    case 2:
      return run.template operator()<__nv_bfloat16>();
    case 3:
      return run.template operator()<double>();
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace fastreg::cuda
