// Passes over a run of contiguous elements, in double, for one instruction set. Included by a kernel file
// inside
// `#ifdef FASTREG_ISA` after simd.h, hence no include guard.
namespace fastreg::FASTREG_ISA {
using max_norm::Order;

typedef float HalfFloats __attribute__((vector_size(FASTREG_VECTOR_BYTES / 2)));
using Doubles = Vec<double>;
constexpr int64_t kPair = 2 * lanes<double>;  // elements in two vectors of double

// One instruction each, which GCC does not find for __builtin_convertvector.
FASTREG_INLINE Doubles to_double(HalfFloats v) {
#if FASTREG_VECTOR_BYTES == 64
  return bits<Doubles>(_mm512_maskz_cvtps_pd(0xff, bits<__m256>(v)));
#elif FASTREG_VECTOR_BYTES == 32
  return bits<Doubles>(_mm256_cvtps_pd(bits<__m128>(v)));
#else
  return __builtin_convertvector(v, Doubles);
#endif
}
FASTREG_INLINE HalfFloats to_float(Doubles v) {
#if FASTREG_VECTOR_BYTES == 64
  return bits<HalfFloats>(_mm512_maskz_cvtpd_ps(0xff, bits<__m512d>(v)));
#elif FASTREG_VECTOR_BYTES == 32
  return bits<HalfFloats>(_mm256_cvtpd_ps(bits<__m256d>(v)));
#else
  return __builtin_convertvector(v, HalfFloats);
#endif
}

struct Pair {
  Doubles low, high;
};

template <class T>
FASTREG_INLINE Pair pair_of(const T* from) {
  if constexpr (std::is_same_v<T, double>) {
    return {load(from), load(from + lanes<double>)};
  } else if constexpr (std::is_same_v<T, float>) {
    return {to_double(load_raw<HalfFloats>(from)), to_double(load_raw<HalfFloats>(from + lanes<double>))};
  } else {
    float wide[kPair];
    store(wide, load(from));
    return pair_of(wide);
  }
}

// The first n < kPair elements, and zeros.
template <class T>
FASTREG_INLINE Pair first_of(const T* from, int64_t n) {
  T padded[kPair];
  __builtin_memset(padded, 0, sizeof(padded));
  for (int64_t i = 0; i < n; ++i) padded[i] = from[i];
  return pair_of(padded);
}

// Rounds to the nearest, through float for the half types, as PyTorch does. Returns what was written.
template <class T>
FASTREG_INLINE Pair put(T* to, Pair v) {
  if constexpr (std::is_same_v<T, double>) {
    store(to, v.low);
    store(to + lanes<double>, v.high);
    return v;
  } else {
    const HalfFloats low = to_float(v.low), high = to_float(v.high);
    if constexpr (std::is_same_v<T, float>) {
      __builtin_memcpy(to, &low, sizeof(low));
      __builtin_memcpy(to + lanes<double>, &high, sizeof(high));
      return {to_double(low), to_double(high)};
    } else {
      float wide[kPair];
      __builtin_memcpy(wide, &low, sizeof(low));
      __builtin_memcpy(wide + lanes<double>, &high, sizeof(high));
      store(to, load(wide));
      return pair_of(to);
    }
  }
}

FASTREG_INLINE Doubles magnitude(Doubles v) {
  return bits<Doubles>(bits<Int<double>>(v) & 0x7fffffffffffffff);
}
FASTREG_INLINE Doubles with_sign(Doubles size, Doubles sign) {
  return bits<Doubles>(bits<Int<double>>(size) | (bits<Int<double>>(sign) & INT64_MIN));
}

#if FASTREG_VECTOR_BYTES > 16  // there is a fused multiply-add
// A factor of float values as two floats, which lose nothing for factors from 2^-90 to 2^90: x * high + x *
// low is rounded once, but for the last bit of the small product.
struct Factor {
  Vec<float> high, low;

  explicit Factor(double factor) {
    // Rounded towards zero, so that both parts have one sign: zeros keep theirs.
    const float first = static_cast<float>(factor);
    const float larger = __builtin_fabs(static_cast<double>(first)) > __builtin_fabs(factor)
                             ? bits<float>(bits<int32_t>(first) - 1)
                             : first;
    high = splat(larger), low = splat(static_cast<float>(factor - larger));
  }
  static bool takes(double factor) {
    return __builtin_fabs(factor) > 0x1p-90 && __builtin_fabs(factor) < 0x1p90;
  }
  FASTREG_INLINE_MEMBER Vec<float> times(Vec<float> v) const {
    const Vec<float> rest = v * low;
#if FASTREG_VECTOR_BYTES == 64
    return bits<Vec<float>>(_mm512_fmadd_ps(bits<__m512>(v), bits<__m512>(high), bits<__m512>(rest)));
#else
    return bits<Vec<float>>(_mm256_fmadd_ps(bits<__m256>(v), bits<__m256>(high), bits<__m256>(rest)));
#endif
  }
};

#endif

// Collects |x|^p: sums, or for p = inf the largest, and then a NaN or inf that `largest` would drop shows in
// `zero`.
template <Order kind>
struct Collector {
  Doubles total[4] = {}, zero = {};
  double p;

  FASTREG_INLINE_MEMBER void add(Doubles v, int slot) {
    if constexpr (kind == Order::one) {
      total[slot] += magnitude(v);
    } else if constexpr (kind == Order::two) {
      total[slot] += v * v;
    } else if constexpr (kind == Order::largest) {
      const Doubles size = magnitude(v);
      total[slot] = size > total[slot] ? size : total[slot];
      zero += v * 0.0;
    } else {
      for (int64_t i = 0; i < lanes<double>; ++i)
        total[slot][i] += v[i] == 0 ? 0.0 : __builtin_pow(__builtin_fabs(v[i]), p);
    }
  }
  FASTREG_INLINE_MEMBER double result() const {
    if constexpr (kind == Order::largest) {
      const Doubles a = larger(total[0], total[1]), b = larger(total[2], total[3]);
      return horizontal_max(larger(a, b)) + horizontal_sum(zero);
    }
    return horizontal_sum((total[0] + total[1]) + (total[2] + total[3]));
  }
};

// each(pair, first slot) over all elements; the last pair is filled up with zeros.
template <class T, class Each>
FASTREG_INLINE void for_pairs(const T* x, int64_t n, const Each& each) {
  int64_t i = 0;
  for (; i + 2 * kPair <= n; i += 2 * kPair) {
    each(pair_of(x + i), 0, i, kPair);
    each(pair_of(x + i + kPair), 2, i + kPair, kPair);
  }
  for (; i < n; i += kPair) {
    const int64_t left = n - i < kPair ? n - i : kPair;
    each(left < kPair ? first_of(x + i, left) : pair_of(x + i), 0, i, left);
  }
}

// The sum of |x * inverse|^p, or the largest of them.
template <class T, Order kind, bool scaled>
double reduce_run(const T* x, int64_t n, double p, double inverse) {
  Collector<kind> all;
  all.p = p;
  for_pairs(x, n, [&](Pair v, int slot, int64_t, int64_t) __attribute__((always_inline)) {
    all.add(scaled ? v.low * inverse : v.low, slot);
    all.add(scaled ? v.high * inverse : v.high, slot + 1);
  });
  return all.result();
}

template <class T, Order kind>
double reduce_kind(const T* x, int64_t n, double p, double inverse) {
  return inverse == 1 ? reduce_run<T, kind, false>(x, n, p, 1) : reduce_run<T, kind, true>(x, n, p, inverse);
}

template <class T>
double reduce_typed(const T* x, int64_t n, double p, double inverse) {
  switch (max_norm::order_of(p)) {
    case Order::one:
      return reduce_kind<T, Order::one>(x, n, p, inverse);
    case Order::two:
      return reduce_kind<T, Order::two>(x, n, p, inverse);
    case Order::largest:
      return reduce_kind<T, Order::largest>(x, n, p, inverse);
    default:
      return reduce_kind<T, Order::any>(x, n, p, inverse);
  }
}

#define FASTREG_BY_CODE(code, call) \
  switch (code) {                   \
    case max_norm::kFloat: {        \
      using T = float;              \
      return call;                  \
    }                               \
    case max_norm::kHalf: {         \
      using T = Half;               \
      return call;                  \
    }                               \
    case max_norm::kBFloat16: {     \
      using T = BFloat16;           \
      return call;                  \
    }                               \
    default: {                      \
      using T = double;             \
      return call;                  \
    }                               \
  }

static double reduce(int64_t code, const void* x, int64_t n, double p, double inverse) {
  FASTREG_BY_CODE(code, reduce_typed(static_cast<const T*>(x), n, p, inverse))
}
}  // namespace fastreg::FASTREG_ISA
