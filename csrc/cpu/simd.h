// Vectors of FASTREG_VECTOR_BYTES, their conversions and functions, in the namespace of one instruction set.
//
// Included by a kernel file inside `#ifdef FASTREG_ISA`, hence no include guard. Written with the compiler's
// vector extensions; intrinsics only where one instruction replaces many. A lane's result depends on that
// lane alone, so partial vectors give the bits that full ones give.
#define FASTREG_INLINE_MEMBER inline __attribute__((always_inline))
#define FASTREG_INLINE static inline __attribute__((always_inline))

namespace fastreg::FASTREG_ISA {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Type __attribute__((vector_size(FASTREG_VECTOR_BYTES)));
  typedef int32_t Int __attribute__((vector_size(FASTREG_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double Type __attribute__((vector_size(FASTREG_VECTOR_BYTES)));
  typedef int64_t Int __attribute__((vector_size(FASTREG_VECTOR_BYTES)));
};
template <class A>
using Vec = typename VectorOf<A>::Type;
template <class A>
using Int = typename VectorOf<A>::Int;
template <class A>
constexpr int64_t lanes = FASTREG_VECTOR_BYTES / sizeof(A);

typedef uint32_t Words __attribute__((vector_size(FASTREG_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(FASTREG_VECTOR_BYTES / 2)));

template <class A>
FASTREG_INLINE Vec<A> splat(A value) {
  return Vec<A>{} + value;
}

template <class To, class From>
FASTREG_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V>
FASTREG_INLINE V load_raw(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

FASTREG_INLINE Words widen(Halves h) {
#if FASTREG_VECTOR_BYTES == 64
  return bits<Words>(_mm512_maskz_cvtepu16_epi32(0xffff, bits<__m256i>(h)));
#elif FASTREG_VECTOR_BYTES == 32
  return bits<Words>(_mm256_cvtepu16_epi32(bits<__m128i>(h)));
#else
  return __builtin_convertvector(h, Words);
#endif
}

FASTREG_INLINE Halves narrow(Words w) {
#if FASTREG_VECTOR_BYTES == 64
  return bits<Halves>(_mm512_maskz_cvtepi32_epi16(0xffff, bits<__m512i>(w)));
#elif FASTREG_VECTOR_BYTES == 32
  const __m256i v = bits<__m256i>(w);
  return bits<Halves>(_mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
#else
  return __builtin_convertvector(w, Halves);
#endif
}

// ---- load and store: fp16 and bf16 are float in a vector -------------------------------------------------
FASTREG_INLINE Vec<float> load(const float* from) { return load_raw<Vec<float>>(from); }
FASTREG_INLINE Vec<double> load(const double* from) { return load_raw<Vec<double>>(from); }

FASTREG_INLINE Vec<float> load(const BFloat16* from) {
  return bits<Vec<float>>(widen(load_raw<Halves>(from)) << 16);
}

FASTREG_INLINE Vec<float> load(const Half* from) {
  const Halves h = load_raw<Halves>(from);
#if FASTREG_VECTOR_BYTES == 64
  return bits<Vec<float>>(_mm512_maskz_cvtph_ps(0xffff, bits<__m256i>(h)));
#elif FASTREG_VECTOR_BYTES == 32
  return bits<Vec<float>>(_mm256_cvtph_ps(bits<__m128i>(h)));
#else
  const Words w = widen(h), magnitude = (w & 0x7fff) << 13;
  const Vec<float> value = bits<Vec<float>>(magnitude) * 0x1p112f;  // the exponents' biases differ by 112
  const Words special = (magnitude >= 0x0f800000) & 0x7f800000;
  return bits<Vec<float>>(bits<Words>(value) | special | (w & 0x8000) << 16);
#endif
}

FASTREG_INLINE void store(float* to, Vec<float> v) { __builtin_memcpy(to, &v, sizeof(v)); }
FASTREG_INLINE void store(double* to, Vec<double> v) { __builtin_memcpy(to, &v, sizeof(v)); }

// The upper halves of the words are v as bf16. NaN costs two instructions more where it is possible.
template <bool finite>
FASTREG_INLINE Words rounded_to_bfloat16(Vec<float> v) {
  const Words w = bits<Words>(v), rounded = w + 0x7fff + ((w >> 16) & 1);
  if constexpr (finite) return rounded;
  return v == v ? rounded : Words{} + 0x7fc00000;
}

template <bool finite>
FASTREG_INLINE Halves to_bfloat16(Vec<float> v) {
  return narrow(rounded_to_bfloat16<finite>(v) >> 16);
}

FASTREG_INLINE void store(BFloat16* to, Vec<float> v) {
  const Halves h = to_bfloat16<false>(v);
  __builtin_memcpy(to, &h, sizeof(h));
}

FASTREG_INLINE void store(Half* to, Vec<float> v) {
#if FASTREG_VECTOR_BYTES == 64
  const __m256i h =
      _mm512_maskz_cvtps_ph(0xffff, bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif FASTREG_VECTOR_BYTES == 32
  const __m128i h = _mm256_cvtps_ph(bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Words w = bits<Words>(v), sign = w & 0x80000000u, u = w ^ sign;
  // Normal halves round in integer arithmetic; adding 0.5 makes the hardware round the subnormal ones.
  const Words normal = (u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13;
  const Words subnormal = bits<Words>(bits<Vec<float>>(u) + 0.5f) - 0x3f000000;
  const Words special = u > 0x7f800000 ? Words{} + 0x7e00 : Words{} + 0x7c00;
  const Words finite = u < 0x38800000 ? subnormal : normal;
  const Halves h = narrow((u >= 0x47800000 ? special : finite) | sign >> 16);
#endif
  __builtin_memcpy(to, &h, sizeof(h));
}

// The same for values of which it is known whether all are finite.
template <bool finite, class T, class V>
FASTREG_INLINE void store(T* to, V v) {
  if constexpr (finite && std::is_same_v<T, BFloat16>) {
    const Halves h = to_bfloat16<true>(v);
    __builtin_memcpy(to, &h, sizeof(h));
  } else {
    store(to, v);
  }
}

// Two vectors at once, of 2 * lanes elements that follow one another. For bf16 the first vector has the even
// ones and the second the odd ones: then nothing has to move across lanes, neither here nor in store_two.
template <class V>
struct Two {
  V first, second;
};

template <class T>
FASTREG_INLINE auto load_two(const T* from) {
  const auto first = load(from);
  return Two<std::remove_cv_t<decltype(first)>>{first, load(from + sizeof(first) / sizeof(first[0]))};
}

FASTREG_INLINE Two<Vec<float>> load_two(const BFloat16* from) {
  const Words w = load_raw<Words>(from);
  return {bits<Vec<float>>(w << 16), bits<Vec<float>>(w & 0xffff0000)};
}

// fp32 in the order of load_two for T.
template <class T>
FASTREG_INLINE Two<Vec<float>> load_two_as(const float* from) {
  const auto v = load_two(from);
  if constexpr (!std::is_same_v<T, BFloat16>) return v;
#if FASTREG_VECTOR_BYTES == 64
  Words even;
  for (uint32_t i = 0; i < 16; ++i) even[i] = 2 * i;
  auto pick = [&](Words index) __attribute__((always_inline)) {
    return bits<Vec<float>>(_mm512_maskz_permutex2var_ps(0xffff, bits<__m512>(v.first), bits<__m512i>(index),
                                                         bits<__m512>(v.second)));
  };
  return {pick(even), pick(even + 1)};
#elif FASTREG_VECTOR_BYTES == 32
  auto in_order = [](__m256 halves) __attribute__((always_inline)) {
    return bits<Vec<float>>(_mm256_permute4x64_pd(_mm256_castps_pd(halves), 0xd8));
  };
  const __m256 a = bits<__m256>(v.first), b = bits<__m256>(v.second);
  return {in_order(_mm256_shuffle_ps(a, b, 0x88)), in_order(_mm256_shuffle_ps(a, b, 0xdd))};
#else
  const Vec<float> a = v.first, b = v.second;
  return {Vec<float>{a[0], a[2], b[0], b[2]}, Vec<float>{a[1], a[3], b[1], b[3]}};
#endif
}

template <class T>
FASTREG_INLINE Two<Vec<double>> load_two_as(const double* from) {
  return load_two(from);
}

#if FASTREG_VECTOR_BYTES == 64
static const bool has_bfloat16 = __builtin_cpu_supports("avx512bf16");

// By one instruction where the processor has it, NaN included; it takes subnormal numbers for zeros, so with
// those nothing is stored. Written out, as the level does not include its set.
FASTREG_INLINE bool store_by_instruction(BFloat16* to, Two<Vec<float>> v) {
  const __m512 even = bits<__m512>(v.first), odd = bits<__m512>(v.second);
  constexpr int subnormal = 0x20;
  if (!has_bfloat16 ||
      !_kortestz_mask16_u8(_mm512_fpclass_ps_mask(even, subnormal), _mm512_fpclass_ps_mask(odd, subnormal)))
    return false;
  typedef uint16_t Order __attribute__((vector_size(64)));
  Order order;
  for (uint16_t i = 0; i < 16; ++i) order[2 * i] = i, order[2 * i + 1] = 16 + i;
  __m512i rounded;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(rounded) : "v"(odd), "v"(even));
  rounded = _mm512_maskz_permutexvar_epi16(~0u, bits<__m512i>(order), rounded);
  __builtin_memcpy(to, &rounded, sizeof(rounded));
  return true;
}
#endif

template <bool finite, class T, class V>
FASTREG_INLINE void store_two(T* to, Two<V> v) {
  if constexpr (std::is_same_v<T, BFloat16>) {
#if FASTREG_VECTOR_BYTES == 64
    if (__builtin_expect(store_by_instruction(to, v), 1)) return;
#endif
    const Words w =
        rounded_to_bfloat16<finite>(v.first) >> 16 | (rounded_to_bfloat16<finite>(v.second) & 0xffff0000);
    __builtin_memcpy(to, &w, sizeof(w));
  } else {
    store(to, v.first);
    store(to + sizeof(v.first) / sizeof(v.first[0]), v.second);
  }
}

// The first n < lanes elements; the others are `fill`.
template <class T, class A>
FASTREG_INLINE Vec<A> load_first(const T* from, int64_t n, A fill) {
  T buffer[lanes<A>];
  store(buffer, splat(fill));
  for (int64_t i = 0; i < n; ++i) buffer[i] = from[i];
  return load(buffer);
}

template <class T, class V>
FASTREG_INLINE void store_first(T* to, V v, int64_t n) {
  T buffer[sizeof(v) / sizeof(v[0])];
  store(buffer, v);
  for (int64_t i = 0; i < n; ++i) to[i] = buffer[i];
}

#if FASTREG_VECTOR_BYTES == 64
FASTREG_INLINE Vec<float> load_first(const float* from, int64_t n, float fill) {
  return bits<Vec<float>>(_mm512_mask_loadu_ps(bits<__m512>(splat(fill)), (1u << n) - 1, from));
}
FASTREG_INLINE void store_first(float* to, Vec<float> v, int64_t n) {
  _mm512_mask_storeu_ps(to, (1u << n) - 1, bits<__m512>(v));
}

template <class T>
FASTREG_INLINE Vec<float> load_first_halves(const T* from, int64_t n, float fill) {
  T whole[16];
  store(whole, splat(fill));
  const __m256i h = _mm256_mask_loadu_epi16(bits<__m256i>(load_raw<Halves>(whole)), (1u << n) - 1, from);
  __builtin_memcpy(whole, &h, sizeof(h));
  return load(whole);
}
FASTREG_INLINE Vec<float> load_first(const BFloat16* from, int64_t n, float fill) {
  return load_first_halves(from, n, fill);
}
FASTREG_INLINE Vec<float> load_first(const Half* from, int64_t n, float fill) {
  return load_first_halves(from, n, fill);
}

template <class T>
FASTREG_INLINE void store_first_halves(T* to, Vec<float> v, int64_t n) {
  T whole[16];
  store(whole, v);
  _mm256_mask_storeu_epi16(to, (1u << n) - 1, bits<__m256i>(load_raw<Halves>(whole)));
}
FASTREG_INLINE void store_first(BFloat16* to, Vec<float> v, int64_t n) { store_first_halves(to, v, n); }
FASTREG_INLINE void store_first(Half* to, Vec<float> v, int64_t n) { store_first_halves(to, v, n); }
#endif

template <class A>
FASTREG_INLINE Int<A> is_first(int64_t n) {
  using Lane = std::remove_reference_t<decltype(Int<A>{}[0])>;
  Int<A> index;
  for (int64_t i = 0; i < lanes<A>; ++i) index[i] = static_cast<Lane>(i);
  return index < static_cast<Lane>(n);
}

// ---- across the lanes, in a fixed order ------------------------------------------------------------------
template <class V>
FASTREG_INLINE V larger(V a, V b) {  // b where either is NaN
#if FASTREG_VECTOR_BYTES == 64
  if constexpr (sizeof(a[0]) == 4)
    return bits<V>(_mm512_maskz_max_ps(0xffff, bits<__m512>(a), bits<__m512>(b)));
  else
    return bits<V>(_mm512_maskz_max_pd(0xff, bits<__m512d>(a), bits<__m512d>(b)));
#elif FASTREG_VECTOR_BYTES == 32
  if constexpr (sizeof(a[0]) == 4)
    return bits<V>(_mm256_max_ps(bits<__m256>(a), bits<__m256>(b)));
  else
    return bits<V>(_mm256_max_pd(bits<__m256d>(a), bits<__m256d>(b)));
#else
  return a > b ? a : b;
#endif
}

// Folds the upper half of the lanes onto the lower until one is left.
template <class F, class V>
FASTREG_INLINE auto fold(V v) {
  using A = std::remove_cvref_t<decltype(v[0])>;
  if constexpr (sizeof(V) > 16) {
    typedef A Part __attribute__((vector_size(sizeof(V) / 2)));
    Part parts[2];
    __builtin_memcpy(parts, &v, sizeof(v));
    return fold<F>(F::of(parts[0], parts[1]));
  } else if constexpr (sizeof(A) == 4) {
    return static_cast<A>(F::of(F::of(v[0], v[2]), F::of(v[1], v[3])));
  } else {
    return static_cast<A>(F::of(v[0], v[1]));
  }
}

struct Larger {
  template <class V>
  FASTREG_INLINE V of(V a, V b) {
    return a > b ? a : b;
  }
};
struct Added {
  template <class V>
  FASTREG_INLINE V of(V a, V b) {
    return a + b;
  }
};

template <class V>
FASTREG_INLINE auto horizontal_max(V v) {
  return fold<Larger>(v);
}
template <class V>
FASTREG_INLINE auto horizontal_sum(V v) {
  return fold<Added>(v);
}

// Whether a lane of a is not that of b, or NaN.
FASTREG_INLINE bool any_different(Vec<float> a, Vec<float> b) {
#if FASTREG_VECTOR_BYTES == 64
  return _mm512_cmp_ps_mask(bits<__m512>(a), bits<__m512>(b), _CMP_NEQ_UQ) != 0;
#elif FASTREG_VECTOR_BYTES == 32
  return _mm256_movemask_ps(_mm256_cmp_ps(bits<__m256>(a), bits<__m256>(b), _CMP_NEQ_UQ)) != 0;
#else
  return horizontal_sum(a != b) != 0;
#endif
}
FASTREG_INLINE bool any_different(Vec<double> a, Vec<double> b) { return horizontal_sum(a != b) != 0; }

// Whether a lane is above `value`.
template <class V, class A>
FASTREG_INLINE bool any_above(V v, A value) {
#if FASTREG_VECTOR_BYTES == 64
  if constexpr (sizeof(A) == 4)
    return _mm512_cmp_ps_mask(bits<__m512>(v), bits<__m512>(splat(value)), _CMP_GT_OQ) != 0;
  else
    return _mm512_cmp_pd_mask(bits<__m512d>(v), bits<__m512d>(splat(value)), _CMP_GT_OQ) != 0;
#elif FASTREG_VECTOR_BYTES == 32
  return _mm256_movemask_epi8(bits<__m256i>(v > value)) != 0;
#else
  return horizontal_max(v) > value;
#endif
}

// Whether all lanes are at most `value`, and none NaN.
FASTREG_INLINE bool all_at_most(Vec<float> v, float value) {
#if FASTREG_VECTOR_BYTES == 64
  return _mm512_cmp_ps_mask(bits<__m512>(v), bits<__m512>(splat(value)), _CMP_NLE_UQ) == 0;
#elif FASTREG_VECTOR_BYTES == 32
  return _mm256_movemask_epi8(bits<__m256i>(v <= value)) == -1;
#else
  return horizontal_sum(v <= value) == -lanes<float>;
#endif
}

// a / b for b of ordinary size, within two units in the last place. (A division takes 16 cycles or more.)
FASTREG_INLINE Vec<float> quotient_of(Vec<float> a, Vec<float> b) {
#if FASTREG_VECTOR_BYTES == 64
  const Vec<float> r = bits<Vec<float>>(_mm512_maskz_rcp14_ps(0xffff, bits<__m512>(b)));
  return a * (r * (2.0f - b * r));
#else
  return a / b;
#endif
}
FASTREG_INLINE Vec<double> quotient_of(Vec<double> a, Vec<double> b) { return a / b; }

template <class V>
FASTREG_INLINE V square_root_of(V v) {
#if FASTREG_VECTOR_BYTES == 64
  if constexpr (sizeof(v[0]) == 4)
    return bits<V>(_mm512_maskz_sqrt_ps(0xffff, bits<__m512>(v)));
  else
    return bits<V>(_mm512_maskz_sqrt_pd(0xff, bits<__m512d>(v)));
#else
  for (size_t i = 0; i < sizeof(v) / sizeof(v[0]); ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// ---- exp --------------------------------------------------------------------------------------------------
// exp(x) = 2^n * exp(r) with |r| <= log(2) / 2, exp(r) = 1 + r + r^2 * q(r) with a near-minimax q (relative
// error 3e-9 for float, 4e-18 for double). For x <= 0, NaN included; subnormal results and 0 for -inf are
// right. The sum with `magic` rounds to an integer, so nothing here may be reassociated.
template <class A>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float lowest = -104.0f, magic = 0x1.8p23f, one_over_ln2 = 0x1.715476p0f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float q[] = {0.499999934412f, 0.166665205696f, 0.041668389379f, 0.00836872265473f,
                                0.00138145340739f};
  // 2^(n + 24) for the n that occur, -150 and more, is a normal number.
  static constexpr int lifted_bias = 127 + 24, mantissa = 23;
  static constexpr float lowered = 0x1p-24f;
};
template <>
struct ExpConstants<double> {
  static constexpr double lowest = -745.2, magic = 0x1.8p52, one_over_ln2 = 0x1.71547652b82fep0;
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr double q[] = {0.50000000000000106294,     0.16666666666666413121,
                                 0.041666666666530138289,    0.0083333333334940483156,
                                 0.0013888888943634583914,   0.00019841269507515647742,
                                 0.000024801493095182800227, 2.75575855067884665e-6,
                                 2.7630249429196883386e-7,   2.5000344009127698029e-8};
  static constexpr int lifted_bias = 1023 + 54, mantissa = 52;
  static constexpr double lowered = 0x1p-54;
};

// mantissa * 2^n, where shifted = n + magic. In two steps, because 2^n itself may be subnormal.
template <class A>
FASTREG_INLINE Vec<A> times_power_of_two(Vec<A> mantissa, Vec<A> shifted) {
  using K = ExpConstants<A>;
  return mantissa * bits<Vec<A>>((bits<Int<A>>(shifted) + K::lifted_bias) << K::mantissa) * K::lowered;
}

template <class A>
struct Exp {
  Vec<A> shifted, r, q;

  FASTREG_INLINE_MEMBER explicit Exp(Vec<A> x) {
    using K = ExpConstants<A>;
    x = larger(splat(K::lowest), x);
    shifted = x * K::one_over_ln2 + K::magic;
    const Vec<A> n = shifted - K::magic;
    r = (x - n * K::ln2_high) - n * K::ln2_low;
    constexpr int degree = sizeof(K::q) / sizeof(A) - 1;
    q = splat(K::q[degree]);
    for (int i = degree - 1; i >= 0; --i) q = q * r + K::q[i];
  }

  FASTREG_INLINE_MEMBER Vec<A> scaled(Vec<A> mantissa) const {
    return times_power_of_two<A>(mantissa, shifted);
  }
};

template <class A>
FASTREG_INLINE Vec<A> exp_of(Vec<A> x) {
  const Exp<A> e(x);
  return e.scaled((e.q * e.r + A(1)) * e.r + A(1));
}

// factor * 2^r for |r| <= 1/2, by a near-minimax polynomial that is exact at 0. The relative error is 1e-4 at
// degree 3, 3e-6 at 4 and 7e-8 at 5: at most a twentieth of what rounding to bf16, fp16 or fp32 may take.
template <int degree>
struct Exp2NearZero {
  float c[degree + 1];

  FASTREG_INLINE_MEMBER explicit Exp2NearZero(float factor) {
    constexpr float coefficients[3][6] = {
        {1, 0.693282888f, 0.24221098f, 0.0550091019f},
        {1, 0.693124107f, 0.240241042f, 0.0559068767f, 0.0095827006f},
        {1, 0.693146596f, 0.24022166f, 0.055510478f, 0.00967495284f, 0.001320286f}};
    for (int k = 0; k <= degree; ++k) c[k] = factor * coefficients[degree - 3][k];
  }

  FASTREG_INLINE_MEMBER Vec<float> operator()(Vec<float> r) const {
    Vec<float> sum = splat(c[degree]);
    for (int k = degree - 1; k >= 0; --k) sum = sum * r + c[k];
    return sum;
  }
};

// sum + exp(x) for x <= 80, NaN included; below -86 it is exp(-86). The relative error is 7e-8 + 2e-8 * |x|.
FASTREG_INLINE Vec<float> plus_exp(Vec<float> sum, Vec<float> x) {
  constexpr float log2_e = ExpConstants<float>::one_over_ln2, magic = ExpConstants<float>::magic + 127;
  x = larger(splat(-86.0f), x);
  const Vec<float> shifted = x * log2_e + magic, r = x * log2_e - (shifted - magic);
  return Exp2NearZero<5>(1)(r) * bits<Vec<float>>(bits<Int<float>>(shifted) << 23) + sum;
}

FASTREG_INLINE Vec<double> plus_exp(Vec<double> sum, Vec<double> x) { return sum + exp_of<double>(x); }

// exp(x) for -104 <= x <= 0 and NaN, subnormal or not, in the digits of Digits, fp32 or less; relative to it
// the error is that of Exp2NearZero and 2e-8 * |x|.
template <class Digits>
constexpr int exp_degree = std::is_same_v<Digits, BFloat16> ? 3
                           : sizeof(Digits) == 2            ? 4
                                                            : 5;

template <class Digits>
FASTREG_INLINE Vec<float> quick_exp(Vec<float> x) {
  using K = ExpConstants<float>;
  constexpr float magic = K::magic + K::lifted_bias;
  const Vec<float> shifted = x * K::one_over_ln2 + magic, r = x * K::one_over_ln2 - (shifted - magic);
  return Exp2NearZero<exp_degree<Digits>>(K::lowered)(r) *
         bits<Vec<float>>(bits<Int<float>>(shifted) << K::mantissa);
}

template <class V>
struct Exps {
  V exp, expm1;
};

// exp(x), and exp(x) - 1, right where x is near 0: 2^n * exp(r) - 1 = (2^n - 1) + 2^n * (exp(r) - 1).
template <class A>
FASTREG_INLINE Exps<Vec<A>> exps_of(Vec<A> x) {
  const Exp<A> e(x);
  const Vec<A> power = e.scaled(splat(A(1))), rest = (e.q * e.r + A(1)) * e.r;
  return {e.scaled(rest + A(1)), (power - A(1)) + power * rest};
}

template <class A>
FASTREG_INLINE Vec<A> expm1_of(Vec<A> x) {
  return exps_of<A>(x).expm1;
}

// ---- log
// For x >= 0 and NaN. x = 2^e * (1 + f) with 1 + f between sqrt(1/2) and sqrt(2); log(1 + f) = f - f^2 / 2 +
// f^3 * q(f) with a near-minimax q (relative error 6e-9). 0 and subnormal numbers count as about 1e-38.
FASTREG_INLINE Vec<float> log_of(Vec<float> x) {
  constexpr float q[] = {0.333333317122f, -0.250008210791f, 0.200012263923f, -0.166233553856f,
                         0.142017683088f, -0.13160211939f,  0.127615153462f, -0.0763434036639f};
  const Words word = bits<Words>(x);  // unsigned: -0 would overflow
  const Int<float> exponent = bits<Int<float>>(word - 0x3f3504f3) >> 23;
  const Vec<float> e = __builtin_convertvector(exponent, Vec<float>);
  const Vec<float> f = bits<Vec<float>>(word - bits<Words>(exponent << 23)) - 1.0f;
  Vec<float> sum = splat(q[7]);
  for (int i = 6; i >= 0; --i) sum = sum * f + q[i];
  const Vec<float> tail = f * f * (f * sum - 0.5f) + e * -2.12194440e-4f;
  const Vec<float> log = (f + tail) + e * 0.693359375f;
  return x == x ? log : x;
}

FASTREG_INLINE Vec<double> log_of(Vec<double> x) {  // fp64 is rare: the standard library's, lane by lane
  for (int64_t i = 0; i < lanes<double>; ++i) x[i] = log(x[i]);
  return x;
}

// log(1 + x) for 0 <= x <= 1 and NaN, as 2 * atanh(x / (2 + x)) with a near-minimax polynomial (relative
// error 4e-9).
FASTREG_INLINE Vec<float> log1p_of(Vec<float> x) {
  const Vec<float> s = quotient_of(x, x + 2.0f), t = s * s;
  const Vec<float> tail =
      ((0.2817833508673f * t + 0.2796060274717f) * t + 0.4002491027954f) * t + 0.6666631468213f;
  return s * (tail * t + 2.0f);
}

FASTREG_INLINE Vec<double> log1p_of(Vec<double> x) {
  for (int64_t i = 0; i < lanes<double>; ++i) x[i] = log1p(x[i]);
  return x;
}

// The functions that the formulas of losses.h ask for, on vectors. pow is for 0 <= base <= 1.
template <class A>
struct VectorMath {
  using V = Vec<A>;
  FASTREG_INLINE V exp(V x) { return exp_of<A>(x); }
  FASTREG_INLINE Exps<V> exps(V x) { return exps_of<A>(x); }
  FASTREG_INLINE V log1p(V x) { return log1p_of(x); }
  FASTREG_INLINE V quotient(V a, V b) { return quotient_of(a, b); }
  FASTREG_INLINE V pow(V base, A exponent) {
    if (exponent == 1) return base;
    if (exponent == 2) return base * base;
    if (exponent <= 6 && 2 * exponent == static_cast<A>(static_cast<int>(2 * exponent))) {
      const int whole = static_cast<int>(exponent);
      V power = exponent == static_cast<A>(whole) ? splat(A(1)) : square_root_of(base);
      for (int k = 0; k < whole; ++k) power *= base;
      return power;
    }
    return base > 0 ? exp_of<A>(log_of(base) * exponent) : base;
  }
};

// Elements before the first that can be written past the caches, which takes a multiple of the vector's size.
template <class T>
FASTREG_INLINE int64_t before_vector(const T* to) {
  const int64_t past = reinterpret_cast<uintptr_t>(to) % FASTREG_VECTOR_BYTES;
  return past ? (FASTREG_VECTOR_BYTES - past) / sizeof(T) : 0;
}

// Past the caches, to a multiple of the vector's size. `finish_writing` when all is written.
template <class A>
FASTREG_INLINE void store_past_caches(A* to, Vec<A> v) {
#if FASTREG_VECTOR_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bits<__m512i>(v));
#elif FASTREG_VECTOR_BYTES == 32
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bits<__m256i>(v));
#else
  store(to, v);
#endif
}

// Orders what bypassed the caches before what other threads are told.
inline void finish_writing() {
#if FASTREG_VECTOR_BYTES >= 32
  _mm_sfence();
#endif
}

}  // namespace fastreg::FASTREG_ISA
