// Weight averaging on the CPU: one pass over the parameters for any number of averages. See
// fastreg/averaging.py.
#ifndef FASTREG_ISA
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "averaging.h"
#include "cpu/capability.h"

namespace fastreg::averaging {
using torch::headeronly::BFloat16;
// The interpolation of as many elements, from the first on, as it takes at a time; returns how many.
using LerpBFloat16 = int64_t(BFloat16* average, const BFloat16* param, int64_t n, float weight);

// What one launch does, for every chunk of it.
struct Launch {
  const int64_t* table;
  int64_t columns;
  const int64_t* chunks;
  int64_t chunk;
  const double* weights;  // one per average
  const int64_t* seed;    // of stochastic rounding; null rounds to nearest
  int64_t n;
  LerpBFloat16* lerp_bfloat16;  // null where the processor has no instruction for it
};
}  // namespace fastreg::averaging

#define FASTREG_FILE "cpu/averaging.cpp"
#include "cpu/foreach_isa.h"

// Memory sets the pace here, and vectors of 64 bytes were measured to be slower than those of 32 (Zen 4, by 5
// to 20 %), but for bf16, where one instruction rounds two of them: of the AVX-512 level that alone is used.
#if defined(__x86_64__)
#define AVERAGING_PICK(name) \
  (fastreg::capability() == fastreg::Capability::baseline ? baseline::name : avx2::name)
#else
#define AVERAGING_PICK(name) baseline::name
#endif

namespace fastreg {
using torch::stable::Tensor;

namespace {
template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// body(first, last) for all chunks, in parallel where there is enough to do.
template <class Body>
void for_chunks(const Tensor& table, const Tensor& chunks, const Body& body) {
  const int64_t count = chunks.size(0), columns = table.size(1);
  const int64_t* rows = data_of<int64_t>(table);
  int64_t total = 1;
  for (int64_t row = 0; row < table.size(0); ++row) total += rows[row * columns];
  const int64_t grain = std::max<int64_t>(1, count * 32768 / total);
  torch::stable::parallel_for(0, count, grain, body);
}

void average(const Tensor& table, const Tensor& chunks, int64_t chunk, const double* weights,
             const int64_t* seed, int64_t n) {
  averaging::LerpBFloat16* lerp_bfloat16 = nullptr;
#if defined(__x86_64__)
  static const bool rounds = __builtin_cpu_supports("avx512bf16");
  if (rounds && capability() == Capability::avx512) lerp_bfloat16 = avx512::lerp_bfloat16;
#endif
  const averaging::Launch launch{data_of<int64_t>(table),
                                 table.size(1),
                                 data_of<int64_t>(chunks),
                                 chunk,
                                 weights,
                                 seed,
                                 n,
                                 lerp_bfloat16};
  const auto run = AVERAGING_PICK(average_chunks);
  for_chunks(table, chunks, [&](int64_t first, int64_t last) { run(launch, first, last); });
}
}  // namespace

void average_update(const Tensor& table, const Tensor& chunks, int64_t chunk, int64_t /*kinds*/,
                    const Tensor& rules, const Tensor& n_averaged, const Tensor& calls,
                    const Tensor& /*ticket*/, std::optional<Tensor> found_inf, int64_t update_every,
                    int64_t start_step, std::optional<int64_t> seed) {
  if (found_inf.has_value() && *data_of<float>(*found_inf) != 0) return;
  int64_t &n = *data_of<int64_t>(n_averaged), &call = *data_of<int64_t>(calls);
  if (averaging::is_due(call, update_every, start_step)) {
    std::vector<double> weights(rules.size(0));
    for (size_t j = 0; j < weights.size(); ++j)
      weights[j] = averaging::weight_of(data_of<double>(rules) + j * averaging::kRuleSize, n);
    average(table, chunks, chunk, weights.data(), seed.has_value() ? &*seed : nullptr, n);
    ++n;
  }
  ++call;
}

void average_lerp(const Tensor& table, const Tensor& chunks, int64_t chunk, int64_t /*kinds*/, double weight,
                  std::optional<Tensor> weight_tensor) {
  if (weight_tensor.has_value()) weight = *data_of<double>(*weight_tensor);
  if (weight == 0) return;             // raw rows too stay as they are
  if (weight != weight) weight = NAN;  // with zeros below, for load_pair
  average(table, chunks, chunk, &weight, nullptr, 0);
}

void average_swap(const Tensor& table, const Tensor& chunks, int64_t chunk) {
  const int64_t *rows = data_of<int64_t>(table), *places = data_of<int64_t>(chunks), columns = table.size(1);
  for_chunks(table, chunks, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t* row = rows + places[2 * i] * columns;
      int64_t at = places[2 * i + 1];
      const int64_t end = std::min(row[averaging::kElements], at + chunk);
      char *one = reinterpret_cast<char*>(row[averaging::kParam]),
           *other = reinterpret_cast<char*>(row[averaging::kAverages]);
      while (at < end) {
        char aside[2048];
        const size_t bytes = std::min<int64_t>(sizeof(aside), end - at);
        std::memcpy(aside, one + at, bytes);
        std::memcpy(one + at, other + at, bytes);
        std::memcpy(other + at, aside, bytes);
        at += bytes;
      }
    }
  });
}
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg, CPU, m) {
  m.impl("average_update.cpu", TORCH_BOX(&fastreg::average_update));
  m.impl("average_lerp.cpu", TORCH_BOX(&fastreg::average_lerp));
  m.impl("average_swap.cpu", TORCH_BOX(&fastreg::average_swap));
}

#else
#include "cpu/simd.h"

namespace fastreg::FASTREG_ISA {
namespace av = fastreg::averaging;

// The weight's form of the interpolation: from the average below 1/2, from the parameter above.
template <bool from_param, class V, class A>
FASTREG_INLINE V lerp(V average, V param, A weight) {
  const V difference = param - average;
  return from_param ? param + difference * (weight - 1) : average + difference * weight;
}

#if FASTREG_VECTOR_BYTES == 64
template <bool from_param>
int64_t lerp_bfloat16_from(BFloat16* average, const BFloat16* param, int64_t n, float weight) {
  constexpr int64_t step = 2 * lanes<float>;
  int64_t i = 0;
#pragma GCC unroll 2
  for (; i + step <= n; i += step) {
    const auto s = load_two(average + i), p = load_two(param + i);
    store_two<true>(average + i, Two<Vec<float> >{lerp<from_param>(s.first, p.first, weight),
                                                  lerp<from_param>(s.second, p.second, weight)});
  }
  return i;
}

int64_t lerp_bfloat16(BFloat16* average, const BFloat16* param, int64_t n, float weight) {
  return weight < 0.5f ? lerp_bfloat16_from<false>(average, param, n, weight)
                       : lerp_bfloat16_from<true>(average, param, n, weight);
}
#else
// Elements of a block: its parameters stay in the first-level cache while every average passes by.
constexpr int64_t kBlock = 1024;

template <class A, class T>
FASTREG_INLINE A wide(T x) {
  if constexpr (sizeof(T) == 2)
    return static_cast<float>(x);
  else
    return x;
}

// Two vectors of T and of the T beside it, which is bf16 too if `bfloat16`: then the even and the odd
// elements. A NaN that comes of bf16 alone has zeros below its upper half, so that it is rounded like a
// number.
template <bool bfloat16, class T>
FASTREG_INLINE auto load_pair(const T* from) {
  if constexpr (bfloat16)
    return load_two(from);
  else
    return Two<decltype(load(from))>{load(from), load(from + sizeof(load(from)) / sizeof(load(from)[0]))};
}

template <bool from_param, class A, class S, class P>
FASTREG_INLINE void lerp_block(S* average, const P* param, int64_t n, A weight) {
  if constexpr (std::is_same_v<A, float> || (std::is_same_v<P, double> && std::is_same_v<S, double>)) {
    constexpr bool bfloat16 = std::is_same_v<P, BFloat16> && std::is_same_v<S, BFloat16>;
    constexpr int64_t step = 2 * lanes<A>;
    int64_t i = 0;
    for (; i + 2 * step <= n; i += 2 * step) {
      Two<Vec<A> > v[2];
#pragma GCC unroll 2
      for (int u = 0; u < 2; ++u) {
        const auto s = load_pair<bfloat16>(average + i + u * step),
                   p = load_pair<bfloat16>(param + i + u * step);
        v[u] = {lerp<from_param>(s.first, p.first, weight), lerp<from_param>(s.second, p.second, weight)};
      }
#pragma GCC unroll 2
      for (int u = 0; u < 2; ++u) {
        if constexpr (bfloat16) {
          store_two<true>(average + i + u * step, v[u]);
        } else {
          store(average + i + u * step, v[u].first);
          store(average + i + u * step + lanes<A>, v[u].second);
        }
      }
    }
    for (; i + lanes<A> <= n; i += lanes<A>)
      store<bfloat16>(average + i, lerp<from_param>(load(average + i), load(param + i), weight));
    if (i < n) {
      const int64_t left = n - i;
      const Vec<A> s = load_first(average + i, left, A(0)), p = load_first(param + i, left, A(0));
      store_first(average + i, lerp<from_param>(s, p, weight), left);
    }
  } else {
    for (int64_t i = 0; i < n; ++i)
      average[i] = static_cast<S>(lerp<from_param>(wide<A>(average[i]), wide<A>(param[i]), weight));
  }
}

// The parameter in the average's dtype.
template <class S, class P>
FASTREG_INLINE void copy_block(S* average, const P* param, int64_t n) {
  if constexpr (std::is_same_v<P, S>) {
    std::memcpy(average, param, n * sizeof(S));
  } else if constexpr (std::is_same_v<S, double> || std::is_same_v<P, double>) {
    using A = std::conditional_t<std::is_same_v<S, double>, double, float>;
    for (int64_t i = 0; i < n; ++i) average[i] = static_cast<S>(static_cast<A>(param[i]));
  } else {
    int64_t i = 0;
    for (; i + lanes<float> <= n; i += lanes<float>) store(average + i, load(param + i));
    if (i < n) store_first(average + i, load_first(param + i, n - i, 0.0f), n - i);
  }
}

// lerp_block with stochastic rounding; `index` is that of the first element.
template <class A, class S, class P>
FASTREG_INLINE void stochastic_block(S* average, const P* param, int64_t n, A weight, uint32_t key,
                                     uint32_t index) {
  float value[kBlock];
  for (int64_t i = 0; i < n; ++i) {
    const A s = wide<A>(average[i]), p = wide<A>(param[i]);
    const float x =
        static_cast<float>(weight < A(0.5) ? lerp<false>(s, p, weight) : lerp<true>(s, p, weight));
    const uint32_t random = av::random_bits(key, index + static_cast<uint32_t>(i));
    value[i] = std::is_same_v<S, Half> ? av::stochastic_half(x, random) : av::stochastic_bfloat16(x, random);
  }
  copy_block(average, value, n);
}

// Elements [begin, end) of one row.
template <class P, class S>
void average_run(const av::Launch& launch, const int64_t* row, int64_t begin, int64_t end) {
  using A = std::conditional_t<std::is_same_v<P, double> || std::is_same_v<S, double>, double, float>;
  const bool copied = row[av::kCodes] & av::kCopied;
  const int64_t averages = launch.columns - av::kAverages;
  // Measured: of several averages, blocks of 2 KB; for a single one, a block of parameters fetched ahead of
  // the average, since two streams from memory in turn are faster than side by side.
  const int64_t block = averages == 1 ? kBlock : std::min<int64_t>(kBlock, 2048 / sizeof(S));
  for (int64_t at = begin; at < end; at += block) {
    const int64_t n = std::min(block, end - at);
    const P* p = reinterpret_cast<const P*>(row[av::kParam]) + at;
    if (averages == 1)
      for (int64_t i = 0; i < n; i += 64 / sizeof(P)) __builtin_prefetch(p + i);
    for (int64_t j = 0; j < averages; ++j) {
      S* s = reinterpret_cast<S*>(row[av::kAverages + j]) + at;
      const double weight = copied ? 1 : launch.weights[j];
      const A w = static_cast<A>(weight);
      if (weight == 0) continue;
      if (weight == 1) {
        copy_block(s, p, n);
        continue;
      }
      if constexpr (sizeof(S) == 2) {
        if (launch.seed != nullptr) {
          const int64_t number = (row - launch.table) / launch.columns;
          const uint32_t key = av::rounding_key(*launch.seed, launch.n, j, number, at >> 32);
          stochastic_block(s, p, n, w, key, static_cast<uint32_t>(at));
          continue;
        }
      }
      int64_t done = 0;
      if constexpr (std::is_same_v<P, BFloat16> && std::is_same_v<S, BFloat16>)
        if (launch.lerp_bfloat16 != nullptr) done = launch.lerp_bfloat16(s, p, n, w);
      if (w < A(0.5))
        lerp_block<false>(s + done, p + done, n - done, w);
      else
        lerp_block<true>(s + done, p + done, n - done, w);
    }
  }
}

template <class P>
void average_param(const av::Launch& launch, const int64_t* row, int64_t begin, int64_t end) {
  switch (av::average_code(row[av::kCodes])) {
    case av::kFloat:
      return average_run<P, float>(launch, row, begin, end);
    case av::kHalf:
      return average_run<P, Half>(launch, row, begin, end);
    case av::kBFloat16:
      return average_run<P, BFloat16>(launch, row, begin, end);
    case av::kDouble:
      return average_run<P, double>(launch, row, begin, end);
  }
}

void average_chunk(const av::Launch& launch, const int64_t* row, int64_t begin, int64_t end) {
  switch (av::param_code(row[av::kCodes])) {
    case av::kFloat:
      return average_param<float>(launch, row, begin, end);
    case av::kHalf:
      return average_param<Half>(launch, row, begin, end);
    case av::kBFloat16:
      return average_param<BFloat16>(launch, row, begin, end);
    case av::kDouble:
      return average_param<double>(launch, row, begin, end);
  }
  for (int64_t j = 0; j < launch.columns - av::kAverages; ++j)  // raw: always copied
    std::memcpy(reinterpret_cast<char*>(row[av::kAverages + j]) + begin,
                reinterpret_cast<const char*>(row[av::kParam]) + begin, end - begin);
}

void average_chunks(const av::Launch& launch, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    const int64_t* row = launch.table + launch.chunks[2 * i] * launch.columns;
    if (i + 2 < last && launch.chunks[2 * i + 5] == 0) {  // where the next tensors begin, no pattern tells
      const int64_t* ahead = launch.table + launch.chunks[2 * i + 4] * launch.columns;
      for (int64_t column = av::kParam; column < launch.columns; ++column)
        for (int line = 0; line < 4; ++line)
          __builtin_prefetch(reinterpret_cast<const char*>(ahead[column]) + 64 * line);
    }
    const int64_t begin = launch.chunks[2 * i + 1];
    average_chunk(launch, row, begin, std::min(row[av::kElements], begin + launch.chunk));
  }
}
#endif
}  // namespace fastreg::FASTREG_ISA
#endif
