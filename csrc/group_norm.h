// The formulas of GroupNorm, one definition for the CPU kernels and the CUDA kernels.
//
//   x̂ = (x − mean)·rstd,   z = x̂·weight + bias + residual,   y = act(z)
//   dz = dy·act'(z),  dresidual = dz,  dbias = Σ dz,  dweight = Σ dz·x̂
//   dx = rstd·(weight·dz − m1 − x̂·m2),  m1 = Σ weight·dz / n,  m2 = Σ weight·dz·x̂ / n  over the n of a group
//
// The CPU includes this once per instruction set, with scalars or with vectors for V (see cpu/simd.h); hence
// no include guard. M says how: M::Scalar is the type of a lane, M::exp(V) the exponential (it may stop
// growing at e⁸⁷ and falling at e⁻⁸⁷ in float), M::quotient(a, b) is a / b, and M::brief says that results of
// 16 bits are all that is asked for.
#if defined(__CUDACC__) || defined(CUDAHOST)
#define GN_INLINE __host__ __device__ __forceinline__
#else
#define GN_INLINE inline __attribute__((always_inline))
#endif
#ifdef FASTREG_ISA
namespace fastreg::FASTREG_ISA {
#else
namespace fastreg {
#endif

enum Activation : int { kNone, kRelu, kSilu, kGelu, kGeluTanh };  // the order of ACTIVATIONS in group_norm.py

// 1 / x, in device code without the call that a division of doubles is, around which registers are saved.
template <class A>
GN_INLINE A inverse(A x) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(A) == 8) return __drcp_rn(x);
#endif
  return 1 / x;
}

// Count, mean and sum of squared deviations of some numbers, and of two sets of numbers together.
template <class A>
struct Moments {
  A count, mean, m2;
};

template <class A>
GN_INLINE Moments<A> merge(Moments<A> a, Moments<A> b) {
  const A count = a.count + b.count;
  if (count == A(0)) return a;
  const A delta = b.mean - a.mean, share = b.count * inverse(count);
  return {count, a.mean + delta * share, a.m2 + (b.m2 + delta * delta * (a.count * share))};
}

// x·sigmoid(z)
template <class M, class V>
GN_INLINE V times_sigmoid(V x, V z) {
  return M::quotient(x, M::exp(-z) + typename M::Scalar(1));
}

// The tail of the normal distribution: 1 − Φ(a) = exp(−a²/2)·p(u) / (a + c), with u = (a − c) / (a + c) and p
// a near-minimax polynomial, of relative error 2.3e-5 (brief), 1.4e-8 (float) or 1.3e-17 (double).
template <class A, bool brief>
struct Tail;
template <>
struct Tail<float, true> {
  static constexpr float c = 3.0f;
  static constexpr int degree = 5;
  static GN_INLINE float p(int i) {
    constexpr float table[] = {0.7290894437f,   -0.5094458793f,   0.2298951316f,
                               -0.04623655159f, -0.009867710815f, 0.004819218615f};
    return table[i];
  }
};
template <>
struct Tail<float, false> {
  static constexpr float c = 4.0f;
  static constexpr int degree = 9;
  static GN_INLINE float p(int i) {
    constexpr float table[] = {0.7552851386f,    -0.6078965941f,   0.3871366831f,    -0.1865233068f,
                               0.06040618551f,   -0.007525402418f, -0.003520972824f, 0.001566881688f,
                               0.0001889965194f, -0.0001255583856f};
    return table[i];
  }
};
template <>
struct Tail<double, false> {
  static constexpr double c = 5.0;
  static constexpr int degree = 22;
  static GN_INLINE double p(int i) {
    constexpr double table[] = {
        0.769193049750062958,     -0.665382502890056697,     0.4953056159699765,
        -0.313533156671304873,    0.165020366170379901,      -0.069118638706301945,
        0.0207950667999870998,    -0.00299337677058588259,   -0.000797869399605031996,
        0.000544899064958787541,  -0.0000593757208667180978, -0.0000497628125533465958,
        0.0000166811867512161127, 3.98088725409478809e-6,    -2.76920543108998198e-6,
        -3.36564314925730009e-7,  4.33060541967000864e-7,    4.21831858241080973e-8,
        -6.58938884326316988e-8,  -9.22809621554320065e-9,   7.66468210209387496e-9,
        1.72051134271284833e-9,   -1.69894312331051039e-10};
    return table[i];
  }
};

// Φ(z) and its derivative.
template <class V>
struct Normal {
  V cdf, density;
};

template <class M, class V>
GN_INLINE Normal<V> normal(V z) {
  using A = typename M::Scalar;
  using T = Tail<A, M::brief>;
  V a = z < A(0) ? -z : z;
  a = a > A(40) ? V{} + A(40) : a;  // where the tail is 0 in double too
  const V e = M::exp(a * a * A(-0.5));
  const V inverse = M::quotient(V{} + A(1), a + T::c), u = (a - T::c) * inverse;
  V p = V{} + T::p(T::degree);
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 32
#endif
  for (int i = T::degree - 1; i >= 0; --i) p = p * u + T::p(i);
  const V tail = e * (p * inverse);
  return {z < A(0) ? tail : A(1) - tail, e * A(0.39894228040143267794)};
}

// gelu_tanh(z) = z/2·(1 + tanh(√(2/π)·(z + 0.044715 z³))) = z·sigmoid(z·(k + k3·z²))
template <class A>
struct GeluTanh {
  static constexpr A k = A(1.59576912160573071176), k3 = A(0.0713548162726002487763);
};

template <int act, class M, class V>
GN_INLINE V activate(V z) {
  using A = typename M::Scalar;
  if constexpr (act == kRelu) return z < A(0) ? V{} : z;
  if constexpr (act == kSilu) return times_sigmoid<M>(z, z);
  if constexpr (act == kGelu) return z * normal<M>(z).cdf;
  if constexpr (act == kGeluTanh) return times_sigmoid<M>(z, z * (z * z * GeluTanh<A>::k3 + GeluTanh<A>::k));
  return z;
}

// dy·act'(z)
template <int act, class M, class V>
GN_INLINE V activation_gradient(V dy, V z) {
  using A = typename M::Scalar;
  if constexpr (act == kRelu) return z > A(0) ? dy : V{};
  if constexpr (act == kSilu) {
    const V s = times_sigmoid<M>(V{} + A(1), z);
    return dy * (z * s * (A(1) - s) + s);
  }
  if constexpr (act == kGelu) {
    const Normal<V> of = normal<M>(z);
    return dy * (z * of.density + of.cdf);
  }
  if constexpr (act == kGeluTanh) {
    z = z > A(10) ? V{} + A(10) : z < A(-10) ? V{} + A(-10) : z;  // flat there; exp must not overflow
    const V square = z * z, e = M::exp(-z * (square * GeluTanh<A>::k3 + GeluTanh<A>::k));
    const V s = M::quotient(V{} + A(1), e + A(1));  // and 1 − s = e·s, without cancellation
    return dy * (s * (z * (e * s) * (square * (3 * GeluTanh<A>::k3) + GeluTanh<A>::k) + A(1)));
  }
  return dy;
}

}  // namespace fastreg
