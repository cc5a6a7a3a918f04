// The sigmoid focal loss in CUDA. One term's maths is in csrc/losses.h.
//
// Bytes: forward, the logits once and dense targets once; backward, one write more. Class indices are
// compared with each element's class: the one-hot target is never in memory. A reduced forward leaves one sum
// per block and adds them in order in a second launch, unless there is one block.
//
// Logits and dense targets have contiguous rows, which need not follow each other; all else is contiguous.
// Accesses are of 128 bits where the tensors lie alike modulo 16 bytes. Of rows with gaps between them those
// of the logits and the targets are, where every row begins and ends at a multiple of 16 bytes.
#include <cstdint>

#include "cuda/elements.h"
#include "cuda/launch.h"
#include "cuda/losses_launch.h"
#include "losses.h"

namespace fastreg::cuda {
namespace {

// What the formula asks for, of numbers up to 1. These may be the fast ones: their code stands 32 times in a
// thread's loop.
struct DeviceMath : ScalarMath {
  template <class A>
  static __device__ A exp(A x) {
    return fast_exp(x);
  }
  template <class A>
  static __device__ A log1p(A x) {
    const A sum = 1 + x;  // and what rounding has taken off it
    return ::log(sum) + (x - (sum - 1)) * quotient(A(1), sum);
  }
  template <class A>
  static __device__ A quotient(A a, A b) {
    return fast_quotient(a, b);
  }
  template <class A>
  static __device__ A pow(A base, A exponent) {
    return exponent == 2 ? base * base : fast_pow(base, exponent);
  }
};

template <class T, class A = Arithmetic<T>>
struct SigmoidCall {
  const T* x;
  const void* target;
  int index_bytes;   // of a class index; 0 where the target is dense
  bool wide_target;  // which is of type A then, not T
  const A *weight, *normalizer;
  const void* grad_loss;
  void* out;  // the terms, the loss or the gradient
  bool wide;  // loss and its gradient are of type A, not T
  A* sums;    // one per block
  int64_t n, classes;
  A alpha, gamma, factor;
  bool reduce;
  // Of kernels with ROWS.
  int64_t stride, target_stride;
  bool byte_target;  // of 0 and 1
  bool whole;        // rows of the logits and of dense targets begin and end at multiples of 16 bytes

  __device__ A divided(A value) const {
    if (!normalizer) return value;
    return value / (*normalizer == 0 ? A(1) : *normalizer);
  }

  template <bool ROWS>
  __device__ A dense_target(int64_t i) const {
    if (ROWS && byte_target) return static_cast<const uint8_t*>(target)[i];
    return wide_target ? static_cast<const A*>(target)[i] : static_cast<A>(static_cast<const T*>(target)[i]);
  }

  // COUNT vectors from the i-th element on, `pitch` apart.
  template <int COUNT>
  __device__ void dense_targets(A (&t)[COUNT][Vector<T>::size], int64_t i, int64_t pitch) const {
    constexpr int size = Vector<T>::size, pieces = sizeof(A) / sizeof(T);
    if (pieces > 1 && wide_target) {
#pragma unroll
      for (int v = 0; v < COUNT; ++v) {
        alignas(16) A wide[pieces][Vector<A>::size];
        load<pieces>(wide, static_cast<const A*>(target) + i + v * pitch, Vector<A>::size);
#pragma unroll
        for (int k = 0; k < size; ++k) t[v][k] = wide[k / Vector<A>::size][k % Vector<A>::size];
      }
    } else {
      alignas(16) T narrow[COUNT][size];
      load<COUNT>(narrow, static_cast<const T*>(target) + i, pitch);
#pragma unroll
      for (int v = 0; v < COUNT; ++v)
#pragma unroll
        for (int k = 0; k < size; ++k) t[v][k] = static_cast<A>(narrow[v][k]);
    }
  }

  __device__ int64_t index(int64_t row) const {
    return index_bytes == 8   ? static_cast<const int64_t*>(target)[row]
           : index_bytes == 4 ? static_cast<const int32_t*>(target)[row]
                              : static_cast<const uint8_t*>(target)[row];
  }
};

// Row and class of an element, and of those after it, with one division (of 32 bits, where that will do).
struct Position {
  int64_t row, c;

  __device__ Position(int64_t i, int64_t classes) {
    if (i <= 0xffffffff && classes <= 0xffffffff) {
      row = uint32_t(i) / uint32_t(classes);
      c = uint32_t(i) - uint32_t(row) * uint32_t(classes);
    } else {
      row = i / classes;
      c = i - row * classes;
    }
  }

  __device__ void step(int64_t classes) {
    if (++c == classes) c = 0, ++row;
  }

  __device__ int64_t in(int64_t stride) const { return row * stride + c; }
};

// ROWS: of the logits or dense targets, with gaps between them, or targets of bytes.
template <class T, bool BACKWARD, bool ROWS, class A = Arithmetic<T>>
__global__ void __launch_bounds__(256, 1) sigmoid_terms(SigmoidCall<T> call, bool alike) {
  __shared__ A shared[32];
  constexpr int size = Vector<T>::size;
  const bool dense = call.index_bytes == 0;
  const bool each = BACKWARD && !call.reduce, place = BACKWARD || !call.reduce;
  const bool by_class = ROWS || call.index_bytes || call.weight;
  A total = 0, factor = call.factor;
  if (BACKWARD && call.reduce)
    factor = call.divided(factor * (call.wide ? *static_cast<const A*>(call.grad_loss)
                                              : static_cast<A>(*static_cast<const T*>(call.grad_loss))));

  auto term = [&](A x, A t, const Position& at) {
    if (call.index_bytes) t = at.c == call.index(at.row) ? A(1) : A(0);
    const SigmoidFocal<A> focal = fastreg::sigmoid_focal<DeviceMath>(x, t, call.alpha, call.gamma);
    if (!call.weight) return BACKWARD ? focal.derivative : focal.loss;
    const A weight = call.weight[at.c];
    return BACKWARD ? weight * focal.derivative : weighed(weight, focal.loss);
  };
  auto scalar = [&](int64_t i) {
    auto in = [&](int64_t stride) { return ROWS ? Position(i, call.classes).in(stride) : i; };
    A value = term(static_cast<A>(call.x[in(call.stride)]),
                   dense ? call.template dense_target<ROWS>(in(call.target_stride)) : A(0),
                   Position(by_class ? i : 0, call.classes));
    if (each)
      value *= call.wide ? static_cast<const A*>(call.grad_loss)[i]
                         : static_cast<A>(static_cast<const T*>(call.grad_loss)[i]);
    if (place)
      store<T>(call.out, call.wide && !BACKWARD, i, value * factor);
    else
      total += value;
  };
  auto some = [&]<int COUNT>(std::integral_constant<int, COUNT>, int64_t i, int64_t pitch) {
    alignas(16) T x[COUNT][size], grad[COUNT][size];
    A t[COUNT][size] = {};
    if constexpr (ROWS) {
      Position at(i, call.classes);
      if (call.whole) {
        load<1>(x, call.x + at.in(call.stride), 0);
        if (dense) call.dense_targets(t, at.in(call.target_stride), 0);
      } else {
#pragma unroll
        for (int k = 0; k < size; ++k) {
          x[0][k] = call.x[at.in(call.stride)];
          if (dense) t[0][k] = call.template dense_target<true>(at.in(call.target_stride));
          at.step(call.classes);
        }
      }
    } else {
      load<COUNT>(x, call.x + i, pitch);
      if (dense) call.dense_targets(t, i, pitch);
    }
    if (each) load<COUNT>(grad, static_cast<const T*>(call.grad_loss) + i, pitch);
#pragma unroll
    for (int v = 0; v < COUNT; ++v) {
      Position at(by_class ? i + v * pitch : 0, call.classes);
      Vector<T> out;
#pragma unroll
      for (int k = 0; k < size; ++k) {
        A value = term(static_cast<A>(x[v][k]), t[v][k], at);
        if (each) value *= static_cast<A>(grad[v][k]);
        if (place)
          out.values[k] = static_cast<T>(value * factor);
        else
          total += value;
        if (by_class) at.step(call.classes);
      }
      if (place) store(static_cast<T*>(call.out) + i + v * pitch, out);
    }
  };

  const int64_t chunk = int64_t(blockDim.x) * in_flight * size;
  for (int64_t begin = blockIdx.x * chunk; begin < call.n; begin += gridDim.x * chunk) {
    const int64_t end = begin + chunk < call.n ? begin + chunk : call.n;
    if constexpr (ROWS) {
      const int64_t tail = alike ? begin + (end - begin) / size * size : begin;
      for (int64_t i = begin + threadIdx.x * size; i < tail; i += blockDim.x * size)
        some(std::integral_constant<int, 1>(), i, 0);
      for (int64_t i = tail + threadIdx.x; i < end; i += blockDim.x) scalar(i);
    } else if (!alike) {
      for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) scalar(i);
    } else {
      deal(
          call.x, begin, end, threadIdx.x, blockDim.x, scalar,
          [&](int64_t i, int64_t pitch) { some(std::integral_constant<int, in_flight>(), i, pitch); },
          [&](int64_t i) { some(std::integral_constant<int, 1>(), i, 0); });
    }
  }
  if (place) return;
  total = sum_block(total, shared);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1)
    store<T>(call.out, call.wide, 0, call.divided(total * factor));
  else
    call.sums[blockIdx.x] = total;
}

template <class T, class A = Arithmetic<T>>
__global__ void __launch_bounds__(1024) sigmoid_sum(SigmoidCall<T> call, int blocks) {
  __shared__ A shared[32];
  A total = 0;
  for (int b = threadIdx.x; b < blocks; b += blockDim.x) total += call.sums[b];
  total = sum_block(total, shared);
  if (threadIdx.x == 0) store<T>(call.out, call.wide, 0, call.divided(total * call.factor));
}

int sigmoid_blocks(int64_t n, int itemsize, int multiprocessors) {
  const int64_t blocks = ceil_div(n, 256 * in_flight * 16 / itemsize), most = int64_t(multiprocessors) * 16;
  return int(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

}  // namespace

cudaError_t sigmoid_focal_workspace(int dtype, int64_t n, int multiprocessors, int64_t* bytes) {
  *bytes = sigmoid_blocks(n, dtype == 3 ? 8 : dtype == 0 ? 4 : 2, multiprocessors) * (dtype == 3 ? 8 : 4);
  return cudaSuccess;
}

cudaError_t sigmoid_focal(int dtype, bool backward, const void* grad_loss, const void* input, int64_t stride,
                          const void* target, int64_t target_stride, bool dense, int target_bytes,
                          const void* weight, const void* normalizer, void* out, bool wide, void* workspace,
                          int64_t rows, int64_t classes, double alpha, double gamma, bool reduce,
                          double factor, int multiprocessors, cudaStream_t stream) {
  return with_type(dtype, [&]<class T>() {
    using A = Arithmetic<T>;
    constexpr int size = Vector<T>::size;
    SigmoidCall<T> call = {static_cast<const T*>(input),
                           target,
                           dense ? 0 : target_bytes,
                           dense && target_bytes == sizeof(A) && sizeof(T) != sizeof(A),
                           static_cast<const A*>(weight),
                           static_cast<const A*>(normalizer),
                           grad_loss,
                           out,
                           wide,
                           static_cast<A*>(workspace),
                           rows * classes,
                           classes > 0 ? classes : 1,
                           A(alpha),
                           A(gamma),
                           A(factor),
                           reduce,
                           rows > 1 ? stride : classes,
                           rows > 1 && dense ? target_stride : classes,
                           dense && target_bytes == 1};
    if (call.n == 0 && (backward || !reduce)) return cudaSuccess;
    const auto phase = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16; };
    const auto whole = [&](const void* p, int64_t stride) {
      return phase(p) == 0 && (stride == classes || (stride % size == 0 && classes % size == 0));
    };
    call.whole =
        whole(input, call.stride) && !call.byte_target && (!dense || whole(target, call.target_stride));
    const bool in_rows = call.stride != classes || call.target_stride != classes || call.byte_target;
    // The tensors whose vectors are taken together must be aligned together, and, but for targets, of one
    // type. Where there are rows they are the result and its gradient, which begin as the first row does.
    const uintptr_t width = call.wide_target ? sizeof(A) / sizeof(T) : 1, first = in_rows ? 0 : phase(input);
    bool alike = in_rows || !dense || phase(target) == first * width % 16;
    if (backward || !reduce || in_rows) alike = alike && phase(out) == first;
    if (backward && !reduce) alike = alike && phase(grad_loss) == first;
    if (!reduce && wide && sizeof(T) != sizeof(A)) alike = false;
    const int blocks = sigmoid_blocks(call.n, sizeof(T), multiprocessors);
    auto* terms = backward  ? in_rows ? sigmoid_terms<T, true, true> : sigmoid_terms<T, true, false>
                  : in_rows ? sigmoid_terms<T, false, true>
                            : sigmoid_terms<T, false, false>;
    LAUNCH(terms, dim3(unsigned(blocks)), dim3(256), 0, stream, call, alike);
    if (!backward && reduce && blocks > 1)
      LAUNCH(sigmoid_sum<T>, dim3(1), dim3(1024), 0, stream, call, blocks);
    return cudaGetLastError();
  });
}

}  // namespace fastreg::cuda
