// The instructions of PTX that Triton's compiler emits, for kernels that ptx.py has turned into C++: one
// function each, on registers of plain bits. Threads, barriers and warp operations are cudahost.h's.
//
// Vector accesses must be aligned, and accesses of shared memory lie inside what the launch asked for:
// otherwise an error, as on the GPU. Instructions that PTX lets the hardware approximate are off by as much
// as it allows (PTX ISA, "Floating Point Instructions"), up or down by a bit of their result.
#pragma once
#include <cfenv>
#include <cmath>
#include <limits>
#include <utility>

#include "cudahost.h"

namespace ptx {

using cudahost::Error, cudahost::from_bits, cudahost::to_bits;

// ---- types: from a register's bits and back
template <class V>
struct Plain {
  static constexpr size_t bits = 8 * sizeof(V);
  static V get(uint64_t r) { return from_bits<V>(r); }
  static uint64_t put(V v) { return to_bits(v); }
};
using s8 = Plain<int8_t>;
using s16 = Plain<int16_t>;
using s32 = Plain<int32_t>;
using s64 = Plain<int64_t>;
using u8 = Plain<uint8_t>;
using u16 = Plain<uint16_t>;
using u32 = Plain<uint32_t>;
using u64 = Plain<uint64_t>;
using b8 = u8;
using b16 = u16;
using b32 = u32;
using b64 = u64;
using f32 = Plain<float>;
using f64 = Plain<double>;
struct pred {
  static constexpr size_t bits = 1;
  static bool get(bool r) { return r; }
  static bool put(bool v) { return v; }
};
struct bf16 {  // computed with in fp32 or, fused, fp64, and rounded once
  static constexpr size_t bits = 16;
  static float get(uint64_t r) { return from_bits<float>(uint64_t(uint16_t(r)) << 16); }
  static uint64_t put(double v) {
    if (std::isnan(v)) return 0x7fff;
    float f = float(v);  // to odd, so that rounding again does no harm
    uint32_t b = uint32_t(to_bits(f));
    if (double(f) != v && std::isfinite(f)) b = std::fabs(double(f)) > std::fabs(v) ? (b - 1) | 1 : b | 1;
    return (b + 0x7fff + (b >> 16 & 1)) >> 16;
  }
};
struct f16 {
  static constexpr size_t bits = 16;
  static float get(uint64_t r) {
    __half_raw raw;
    raw.x = static_cast<unsigned short>(r);
    return __half2float(__half(raw));
  }
  static uint64_t put(double v) {
    __half_raw raw = __double2half(v);
    return raw.x;
  }
};
template <class T>
constexpr bool is_float =
    std::is_same_v<T, f32> || std::is_same_v<T, f64> || std::is_same_v<T, bf16> || std::is_same_v<T, f16>;
template <class T>
using Value = decltype(T::get(0));

// What keeps the compiler from fusing a product with a sum where PTX forbids it, by a rounding that is
// written out.
template <class V>
V alone(V v) {
  if constexpr (std::is_floating_point_v<V>) asm volatile("" : "+x"(v));
  return v;
}
inline float flushed(float v) { return std::fabs(v) < 0x1p-126f ? std::copysign(0.0f, v) : v; }

// ---- arithmetic
template <class T>
uint64_t fma(uint64_t a, uint64_t b, uint64_t c) {
  if constexpr (std::is_same_v<T, f32>)
    return T::put(std::fma(T::get(a), T::get(b), T::get(c)));
  else
    return T::put(std::fma(double(T::get(a)), double(T::get(b)), double(T::get(c))));
}
inline uint64_t fma_ftz(uint64_t a, uint64_t b, uint64_t c) {
  return f32::put(flushed(std::fma(flushed(f32::get(a)), flushed(f32::get(b)), flushed(f32::get(c)))));
}

// The larger of two, or the smaller: the number, if one operand is NaN; -0 is below +0.
template <bool larger, class V>
V extreme(V a, V b, bool nan) {
  if constexpr (std::is_floating_point_v<V>) {
    if (nan && (std::isnan(a) || std::isnan(b))) return std::numeric_limits<V>::quiet_NaN();
    if (std::isnan(a)) return b;
    if (std::isnan(b)) return a;
    if (a == b) return std::signbit(a) == larger ? b : a;
  }
  return (larger ? a > b : a < b) ? a : b;
}

// A quotient by zero is whatever the hardware makes of it: here all ones, and no trap.
template <class V>
V divided(V a, V b) {
  if constexpr (std::is_integral_v<V>) {
    if (b == 0) return V(-1);
    if constexpr (std::is_signed_v<V>)
      if (b == -1) return V(0 - std::make_unsigned_t<V>(a));
  }
  return a / b;
}
template <class V>
V remainder(V a, V b) {
  return b == 0 ? a : std::is_signed_v<V> && b == V(-1) ? V(0) : V(a % b);
}

// Shifts by the width and more give what shifting one by one would.
template <class T>
uint64_t shl(uint64_t a, uint64_t by) {
  return uint32_t(by) >= T::bits ? 0 : T::put(Value<T>(T::get(a) << uint32_t(by)));
}
template <class T>
uint64_t shr(uint64_t a, uint64_t by) {
  return T::put(
      Value<T>(T::get(a) >> std::min<uint32_t>(uint32_t(by), T::bits - 1) >> (uint32_t(by) >= T::bits)));
}
template <class T>
uint64_t mul_hi(uint64_t a, uint64_t b) {
  using Wide = std::conditional_t<std::is_signed_v<Value<T>>, __int128, unsigned __int128>;
  return T::put(Value<T>(Wide(T::get(a)) * Wide(T::get(b)) >> T::bits));
}
template <class T>
uint64_t bfe(uint64_t a, uint64_t from, uint64_t count) {
  const auto v = T::get(a);
  const unsigned first = unsigned(from) & 255, n = unsigned(count) & 255;
  if (n == 0) return 0;
  const unsigned top =
      std::min<unsigned>(first + n, T::bits) - 1;  // the highest bit of the field that there is
  uint64_t field = first >= T::bits ? 0 : uint64_t(std::make_unsigned_t<Value<T>>(v)) >> first;
  if (n < 64) field &= (uint64_t(1) << n) - 1;
  if (std::is_signed_v<Value<T>> && first + n > 0 && n < T::bits && (uint64_t(v) >> top & 1))
    field |= ~uint64_t(0) << n;
  return T::put(Value<T>(field));
}

// Four of eight bytes, by four bits each, of which the upper asks for copies of the byte's sign.
inline uint64_t prmt(uint64_t a, uint64_t b, uint64_t which) {
  const uint64_t bytes = (a & 0xffffffff) | b << 32;
  uint64_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned code = which >> 4 * i & 15;
    uint64_t byte = bytes >> 8 * (code & 7) & 255;
    if (code & 8) byte = byte & 128 ? 255 : 0;
    out |= byte << 8 * i;
  }
  return out;
}

// ---- approximations
// `v`, off by the relative error `most`, up or down.
template <class V>
V off(V v, double most) {
  if (!std::isfinite(v) || v == 0) return v;
  const double sign = to_bits(v) * 0x9E3779B97F4A7C15ull >> 63 ? 1 : -1;
  return V(double(v) * (1 + sign * most));
}
constexpr double ulp = 0x1p-23;
// NVIDIA's own double-precision functions count on exact powers for whole numbers.
inline float ex2_approx(float a) {
  const float exact = float(std::exp2(double(a)));
  return a == std::trunc(a) ? exact : off(exact, 0x1p-22);
}
inline float ex2_approx_ftz(float a) { return flushed(ex2_approx(flushed(a))); }
inline float lg2_approx(float a) {
  const double exact = std::log2(double(a));
  return std::isfinite(exact) && a > 0.5f && a < 2 ? float(exact + (to_bits(a) & 1 ? 1 : -1) * 0x1p-22)
                                                   : off(float(exact), 0x1p-22);
}
inline float lg2_approx_ftz(float a) { return lg2_approx(flushed(a)); }
inline float rcp_approx(float a) { return off(float(1 / double(a)), ulp); }
inline float rcp_approx_ftz(float a) { return flushed(rcp_approx(flushed(a))); }
// The upper half of the result alone is there.
inline double rcp_approx_ftz_f64(double a) {
  return from_bits<double>(to_bits(1 / a) & 0xffffffff00000000ull);
}
inline float sqrt_approx(float a) { return off(float(std::sqrt(double(a))), ulp); }
inline float sqrt_approx_ftz(float a) { return flushed(sqrt_approx(flushed(a))); }
inline float rsqrt_approx(float a) { return off(float(1 / std::sqrt(double(a))), 0x1p-22); }
inline float rsqrt_approx_ftz(float a) { return flushed(rsqrt_approx(flushed(a))); }
inline float div_full(float a, float b) { return off(float(double(a) / double(b)), 2 * ulp); }
inline float div_full_ftz(float a, float b) { return flushed(div_full(flushed(a), flushed(b))); }
inline float div_approx(float a, float b) {
  if (std::fabs(b) > 0x1p126f && std::fabs(b) < HUGE_VALF)
    return std::isinf(a) ? NAN : std::copysign(0.0f, a);
  return div_full(a, b);
}
inline float div_approx_ftz(float a, float b) { return flushed(div_approx(flushed(a), flushed(b))); }
inline float tanh_approx(float a) { return off(float(std::tanh(double(a))), 0x1p-11); }

// ---- conversions
enum class Round { nearest, zero, down, up };
inline double rounded(double v, Round how) {
  return how == Round::zero   ? std::trunc(v)
         : how == Round::down ? std::floor(v)
         : how == Round::up   ? std::ceil(v)
                              : std::nearbyint(v);
}
// To a whole number, from a floating-point one: what does not fit becomes the nearest that does, NaN zero.
template <class V>
V whole(double v, Round how) {
  if (std::isnan(v)) return 0;
  v = rounded(v, how);
  if (v <= double(std::numeric_limits<V>::min())) return std::numeric_limits<V>::min();
  if (v >= double(std::numeric_limits<V>::max())) return std::numeric_limits<V>::max();
  return V(v);
}
template <class D, class S, Round how, bool to_whole>
uint64_t cvt(uint64_t a) {
  const auto v = S::get(a);
  if constexpr (is_float<D> && is_float<S>) {
    if constexpr (to_whole) return D::put(rounded(v, how));
    static_assert(how == Round::nearest || D::bits >= S::bits);
    return D::put(v);
  } else if constexpr (is_float<D>) {
    static_assert(how == Round::nearest);
    if constexpr (D::bits == 16)
      return D::put(double(v));  // the values that kernels convert have less than 53 bits
    else
      return D::put(static_cast<Value<D>>(v));
  } else if constexpr (is_float<S>) {
    return D::put(whole<Value<D>>(v, how));
  } else {
    return D::put(static_cast<Value<D>>(v));
  }
}
// The first operand goes to the upper half.
template <class T>
uint64_t cvt_pair(uint64_t high, uint64_t low) {
  return T::put(f32::get(high)) << 16 | T::put(f32::get(low));
}

// ---- comparisons
enum class Compare { eq, ne, lt, le, gt, ge, equ, neu, ltu, leu, gtu, geu, num, nan };
template <class V>
bool setp(Compare how, V a, V b) {
  const bool nan = std::is_floating_point_v<V> && (a != a || b != b);
  switch (how) {
    case Compare::num:
      return !nan;
    case Compare::nan:
      return nan;
    case Compare::eq:
      return a == b;
    case Compare::ne:
      return !nan && a != b;
    case Compare::lt:
      return a < b;
    case Compare::le:
      return a <= b;
    case Compare::gt:
      return a > b;
    case Compare::ge:
      return a >= b;
    case Compare::equ:
      return nan || a == b;
    case Compare::neu:
      return nan || a != b;
    case Compare::ltu:
      return nan || a < b;
    case Compare::leu:
      return nan || a <= b;
    case Compare::gtu:
      return nan || a > b;
    case Compare::geu:
      return nan || a >= b;
  }
  return false;
}

// ---- memory
inline size_t shared_bytes;

template <class V, int count>
V* global(uint64_t address) {
  if (address % (sizeof(V) * count))
    throw Error("an access of " + std::to_string(sizeof(V) * count) + " bytes is misaligned" +
                cudahost::where());
  return reinterpret_cast<V*>(address);
}
template <class V, int count>
V* shared(uint64_t address) {
  address = uint32_t(address);
  if (address % (sizeof(V) * count))
    throw Error("an access of shared memory is misaligned" + cudahost::where());
  if (address + sizeof(V) * count > shared_bytes)
    throw Error("an access of shared memory is out of its bounds" + cudahost::where());
  return reinterpret_cast<V*>(cudahost::current_block->shared_memory.get() + address);
}
template <class T, class... R>
void load(const Value<T>* from, R&... to) {
  ((to = static_cast<R>(
        static_cast<std::conditional_t<std::is_signed_v<Value<T>>, int64_t, uint64_t>>(*from++))),
   ...);
}
// Threads may store one value to one place, as those of a group do after a reduction: to TSan only the first
// does.
template <class T, class... R>
void store(Value<T>* to, R... from) {
  auto one = [&](Value<T> value) {
    CUDAHOST_QUIET(Begin);
    [[maybe_unused]] const bool there = *to == value;
    CUDAHOST_QUIET(End);
    CUDAHOST_TSAN(if (there) return void(++to);)
    *to++ = value;
  };
  (one(static_cast<Value<T>>(from)), ...);
}

// Lane l has the elements 2 (l % 4) and the next of row l / 4, in the i-th register of the i-th matrix, whose
// rows' addresses lanes 8 i and up bring; transposed, of column l / 4.
template <bool transposed, class... R>
void ldmatrix(uint64_t address, R&... to) {
  uint64_t rows[32];
  std::memcpy(rows, cudahost::exchange(~0u, address), sizeof(rows));
  const int lane = cudahost::lane();
  int matrix = 0;
  auto one = [&](auto& r) {
    const uint64_t* row = rows + 8 * matrix++;
    if constexpr (transposed) {
      uint32_t both = 0;
      for (int k = 0; k < 2; ++k)
        both |= uint32_t(*shared<uint16_t, 1>(row[2 * (lane % 4) + k] + 2 * (lane / 4))) << 16 * k;
      r = both;
    } else {
      shared<uint32_t, 4>(row[lane / 4]);
      r = *shared<uint32_t, 1>(row[lane / 4] + 4 * (lane % 4));
    }
  };
  (one(to), ...);
}
template <bool transposed, class... R>
void stmatrix(uint64_t address, R... from) {
  uint64_t rows[32];
  std::memcpy(rows, cudahost::exchange(~0u, address), sizeof(rows));
  const int lane = cudahost::lane();
  int matrix = 0;
  auto one = [&](uint32_t r) {
    const uint64_t* row = rows + 8 * matrix++;
    if constexpr (transposed) {
      for (int k = 0; k < 2; ++k)
        store<u16>(shared<uint16_t, 1>(row[2 * (lane % 4) + k] + 2 * (lane / 4)), r >> 16 * k);
    } else {
      shared<uint32_t, 4>(row[lane / 4]);
      store<u32>(shared<uint32_t, 1>(row[lane / 4] + 4 * (lane % 4)), r);
    }
  };
  (one(from), ...);
}

// ---- warps
template <class F>
uint64_t redux(uint64_t mask, F&& join, uint64_t value) {
  const uint64_t* values = cudahost::exchange(unsigned(mask), value);
  bool any = false;
  uint64_t all = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) all = any ? join(all, values[lane]) : values[lane], any = true;
  return all;
}

}  // namespace ptx
