// The formulas of weight averaging, for the CPU and for CUDA. See fastreg/averaging.py.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTREG_HD __host__ __device__ __forceinline__
#else
#define FASTREG_HD inline
#endif

namespace fastreg::averaging {
// A row of the plan: elements, codes, address of the parameter, addresses of its averages.
constexpr int kElements = 0, kCodes = 1, kParam = 2, kAverages = 3;
// Codes: parameter's dtype | average's dtype << 4 | flags. Raw rows are copied, their elements are bytes.
constexpr int64_t kFloat = 0, kHalf = 1, kBFloat16 = 2, kDouble = 3, kRaw = 4;
constexpr int64_t kCopied = 1 << 8;   // weight 1 whatever the rules say
constexpr int64_t kAligned = 1 << 9;  // every address is a multiple of 16
FASTREG_HD int64_t param_code(int64_t codes) { return codes & 15; }
FASTREG_HD int64_t average_code(int64_t codes) { return codes >> 4 & 15; }

// A rule is four doubles: which, and its constants. The weight of the parameters in update n.
constexpr int kRuleSize = 4;
FASTREG_HD double weight_of(const double* rule, int64_t n) {
  if (n == 0) return 1;
  const double x = static_cast<double>(n), a = rule[1], b = rule[2], c = rule[3];
  switch (static_cast<int>(rule[0])) {
    case 0:
      return a;  // EMA: 1 - decay
    case 1:
      return fmax(a, 9 / (10 + x));  // linear warm-up
    case 2:
      return fmax(a, pow(1 + x / b, -c));  // power warm-up
    case 3:
      return 1 / (x + 1);  // SWA
    case 4:
      return a + 2 * b / (exp(2 * x) + 1);  // 1 - alpha tanh n; a = 1 - alpha, b = alpha
    case 5:
      return -expm1(-a * log1p(1 / x));  // power function; a = gamma + 1
  }
  return NAN;
}

// Whether call number `calls` is an update.
FASTREG_HD bool is_due(int64_t calls, int64_t update_every, int64_t start_step) {
  return calls >= start_step && (calls - start_step) % update_every == 0;
}

// The seed of what update n rounds stochastically in average j of row `row`, from element `high` * 2^32 on.
FASTREG_HD uint32_t rounding_key(int64_t seed, int64_t n, int64_t j, int64_t row, int64_t high) {
  uint64_t h = static_cast<uint64_t>(seed);
  const int64_t parts[] = {n, j, row, high};
  for (int64_t part : parts) {
    h = (h ^ static_cast<uint64_t>(part)) + 0x9e3779b97f4a7c15u;  // splitmix64
    h = (h ^ h >> 30) * 0xbf58476d1ce4e5b9u;
    h = (h ^ h >> 27) * 0x94d049bb133111ebu;
    h ^= h >> 31;
  }
  return static_cast<uint32_t>(h);
}

// 32 random bits for element `index` (its low 32 bits).
FASTREG_HD uint32_t random_bits(uint32_t key, uint32_t index) {
  uint32_t h = index * 0x9e3779b1u ^ key;
  h = (h ^ h >> 16) * 0x7feb352du;
  h = (h ^ h >> 15) * 0x846ca68bu;
  return h ^ h >> 16;
}

FASTREG_HD uint32_t float_bits(float x) {
  uint32_t u;
  static_assert(sizeof(u) == sizeof(x));
  memcpy(&u, &x, sizeof(u));
  return u;
}
FASTREG_HD float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof(x));
  return x;
}

// One of the two neighbours of x in bf16 or fp16, the nearer one more often: the mean over `random` is x.
// Infinities and NaN stay.
FASTREG_HD float stochastic_bfloat16(float x, uint32_t random) {
  const uint32_t u = float_bits(x);
  return (u & 0x7f800000) == 0x7f800000 ? x : float_of((u + (random & 0xffff)) & 0xffff0000u);
}
FASTREG_HD float stochastic_half(float x, uint32_t random) {
  const uint32_t u = float_bits(x), magnitude = u & 0x7fffffff;
  // Below 2^-14 halves are multiples of 2^-24.
  const float steps = floorf(float_of(magnitude) * 0x1p24f + static_cast<float>(random >> 8) * 0x1p-24f);
  const float small = float_of(float_bits(steps * 0x1p-24f) | (u & 0x80000000u));
  const float normal = float_of((u + (random & 0x1fff)) & 0xffffe000u);
  return magnitude >= 0x7f800000 ? x : magnitude < 0x38800000 ? small : normal;
}
}  // namespace fastreg::averaging
