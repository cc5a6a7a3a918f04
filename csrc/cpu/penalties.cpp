// Lp penalties and FGM on the CPU: one pass over the tensors of a plan. See fastreg/penalties.py.
#ifndef FASTREG_ISA
#include "penalties.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/capability.h"
#include "cpu/tensors.h"

namespace fastreg::penalties {
struct Passes {
  // The sum of |x * inverse|^p, or the largest of them; `exact` if its rounding has to be fp64's.
  double (*reduce)(int64_t code, const void* x, int64_t n, double p, double inverse, bool exact);
  // To out, added to what is there or, where there is much of it, past the caches.
  void (*gradient)(int64_t code, const void* x, void* out, int64_t n, double p, Slope slope, bool add,
                   bool stream);
  // What is copied goes past the caches too, if `stream`.
  void (*attack)(int64_t code, void* x, const void* g, void* backup, uint8_t* marks, int64_t n,
                 double inverse, double step, bool stream);
  void (*restore)(int64_t code, void* x, const void* backup, uint8_t* marks, int64_t n, bool stream);
};
}  // namespace fastreg::penalties

#define FASTREG_FILE "cpu/penalties.cpp"
#include "cpu/foreach_isa.h"

namespace fastreg {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {
using namespace penalties;

constexpr int64_t kStream = 1 << 20;  // elements of gradients or backups that bypass the caches
constexpr int64_t kRun = 32768;       // elements of a tensor that a thread takes at a time, at least

int64_t size_of_code(int64_t code) {
  return code == max_norm::kDouble ? 8 : code == max_norm::kFloat ? 4 : 2;
}

// The chunks of a plan: body(chunk, its tensor's row of the table, first element, elements).
struct Chunks {
  const int64_t *table, *places;
  int64_t columns, count, chunk;

  Chunks(const Tensor& t, const Tensor& c, int64_t chunk)
      : table(static_cast<const int64_t*>(t.const_data_ptr())),
        places(static_cast<const int64_t*>(c.const_data_ptr())),
        columns(t.size(1)),
        count(c.size(0)),
        chunk(chunk) {}

  const int64_t* row(int64_t i) const { return table + places[2 * i] * columns; }
  bool many() const { return count * chunk >= kStream; }

  // Chunks of less than kRun are taken together, by the first of them, whatever the threads; by each thread
  // from its last to its first if `backwards`.
  template <class Body>
  void each(const Body& body, bool backwards = false) const {
    const int64_t run = std::max(chunk, kRun);
    torch::stable::parallel_for(0, count, run / chunk, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t i = backwards ? begin + end - 1 - k : k;
        const int64_t first = places[2 * i + 1];
        if (first % run == 0) body(i, row(i), first, std::min(run, row(i)[kElements] - first));
      }
    });
  }
};

char* element(int64_t address, int64_t index, int64_t code) {
  return reinterpret_cast<char*>(address) + index * size_of_code(code);
}

// Per tensor whose address stands in that column (scale, s), the norm being scale * s. Chunks are summed in
// their order.
void norms_of(const Chunks& all, int64_t tensors, int column, double p, bool exact, double* out) {
  const auto passes = FASTREG_PICK(penalty_passes)();
  const max_norm::Order order = max_norm::order_of(p);
  std::vector<double> parts(all.count, 0.0), sums(tensors), scales(tensors, 1.0);

  const auto collect = [&](double with_p, const auto& scale, const auto& wanted, std::vector<double>& into,
                           bool largest) {
    all.each([&](int64_t i, const int64_t* row, int64_t first, int64_t n) {
      const int64_t t = all.places[2 * i];
      if (wanted(t))
        parts[i] =
            passes.reduce(row[kCode], element(row[column], first, row[kCode]), n, with_p, scale(t), exact);
    });
    for (int64_t t = 0; t < tensors; ++t)
      if (wanted(t)) into[t] = 0;
    for (int64_t i = 0; i < all.count; ++i) {
      const int64_t t = all.places[2 * i];
      if (!wanted(t)) continue;
      if (largest)
        into[t] = parts[i] > into[t] || parts[i] != parts[i] ? parts[i] : into[t];
      else
        into[t] += parts[i];
    }
  };
  std::fill(sums.begin(), sums.end(), 0.0);
  const bool max_order = order == max_norm::Order::largest;
  collect(p, [](int64_t) { return 1.0; }, [](int64_t) { return true; }, sums, max_order);
  std::vector<char> unsafe(tensors);
  bool any = false;
  for (int64_t t = 0; t < tensors; ++t) any |= unsafe[t] = !max_norm::is_safe(sums[t], order);
  if (any) {
    std::vector<double> tops(tensors);
    collect(HUGE_VAL, [](int64_t) { return 1.0; }, [&](int64_t t) { return unsafe[t]; }, tops, true);
    for (int64_t t = 0; t < tensors; ++t) {
      if (!unsafe[t]) continue;
      unsafe[t] = tops[t] > 0 && tops[t] < HUGE_VAL && !max_order;
      if (unsafe[t]) scales[t] = order == max_norm::Order::any ? tops[t] : max_norm::power_of_two(tops[t]);
    }
    collect(p, [&](int64_t t) { return 1 / scales[t]; }, [&](int64_t t) { return unsafe[t]; }, sums, false);
  }
  for (int64_t t = 0; t < tensors; ++t) out[2 * t] = scales[t], out[2 * t + 1] = max_norm::root(sums[t], p);
}
}  // namespace

// The penalty, and the norms.
std::tuple<Tensor, Tensor> lp_norms(const Tensor& table, const Tensor& chunks, int64_t chunk, double p,
                                    bool squared, bool wide) {
  const int64_t tensors = table.size(0);
  Tensor norms = new_tensor({tensors, 2}, ScalarType::Double);
  auto* out = static_cast<double*>(norms.mutable_data_ptr());
  norms_of(Chunks(table, chunks, chunk), tensors, kWeight, p, wide, out);
  double total = 0;
  for (int64_t t = 0; t < tensors; ++t) total += term(out[2 * t], out[2 * t + 1], p, squared);
  Tensor penalty = new_tensor({}, wide ? ScalarType::Double : ScalarType::Float);
  if (wide)
    *static_cast<double*>(penalty.mutable_data_ptr()) = total;
  else
    *static_cast<float*>(penalty.mutable_data_ptr()) = static_cast<float>(total);
  return {penalty, norms};
}

// Writes the gradients to the addresses in `outs`, or adds them to what is there.
void lp_penalty_backward(const Tensor& table, const Tensor& chunks, int64_t chunk, const Tensor& outs,
                         const Tensor& norms, const Tensor& grad, double p, bool squared, bool add) {
  const Chunks all(table, chunks, chunk);
  const auto passes = FASTREG_PICK(penalty_passes)();
  const auto* addresses = static_cast<const int64_t*>(outs.const_data_ptr());
  const auto* norm = static_cast<const double*>(norms.const_data_ptr());
  const double g = *static_cast<const double*>(grad.const_data_ptr());
  int64_t elements = 0;
  for (int64_t t = 0; t < table.size(0); ++t) {
    if (addresses[t] == 0) continue;
    const int64_t *row = all.table + t * all.columns, n = row[kElements];
    elements += n;
    if (!add) use_huge_pages(element(addresses[t], 0, row[kCode]), n * size_of_code(row[kCode]));
  }
  const bool stream = !add && elements >= kStream;
  all.each([&](int64_t i, const int64_t* row, int64_t first, int64_t n) {
    const int64_t t = all.places[2 * i], code = row[kCode];
    if (addresses[t] == 0) return;
    const Slope slope = slope_of(norm[2 * t], norm[2 * t + 1], g, p, squared);
    passes.gradient(code, element(row[kWeight], first, code), element(addresses[t], first, code), n, p, slope,
                    add, stream);
  });
}

// w += epsilon * g / |g| in the blocks where g is not zero, which are backed up first unless they already
// are.
void fgm_attack(const Tensor& table, const Tensor& chunks, int64_t chunk, double epsilon, bool wide) {
  const Chunks all(table, chunks, chunk);
  const auto passes = FASTREG_PICK(penalty_passes)();
  std::vector<double> norm(2 * table.size(0));
  norms_of(all, table.size(0), kGrad, 2, wide, norm.data());
  const auto body = [&](int64_t i, const int64_t* row, int64_t first, int64_t n) {
    const int64_t t = all.places[2 * i], code = row[kCode];
    const double scale = norm[2 * t], s = norm[2 * t + 1];
    if (!(s > 0 && s < HUGE_VAL)) return;
    passes.attack(code, element(row[kWeight], first, code), element(row[kGrad], first, code),
                  element(row[kBackup], first, code),
                  reinterpret_cast<uint8_t*>(row[kMarks]) + first / kBlock, n, 1 / scale, epsilon / s,
                  all.many());
  };
  all.each(body, true);  // what the norms have read last is still in the caches
}

void fgm_restore(const Tensor& table, const Tensor& chunks, int64_t chunk) {
  const Chunks all(table, chunks, chunk);
  const auto passes = FASTREG_PICK(penalty_passes)();
  all.each([&](int64_t, const int64_t* row, int64_t first, int64_t n) {
    const int64_t code = row[kCode];
    passes.restore(code, element(row[kWeight], first, code), element(row[kBackup], first, code),
                   reinterpret_cast<uint8_t*>(row[kMarks]) + first / kBlock, n, all.many());
  });
}
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg, CPU, m) {
  m.impl("lp_norms.cpu", TORCH_BOX(&fastreg::lp_norms));
  m.impl("lp_penalty_backward.cpu", TORCH_BOX(&fastreg::lp_penalty_backward));
  m.impl("fgm_attack.cpu", TORCH_BOX(&fastreg::fgm_attack));
  m.impl("fgm_restore.cpu", TORCH_BOX(&fastreg::fgm_restore));
}

#else
#include "cpu/simd.h"
// and over it
#include "cpu/rows.h"

namespace fastreg::FASTREG_ISA {
using penalties::Slope;

#if FASTREG_VECTOR_BYTES == 32
// The sum of |x|^p of p = 1 or 2. A lane adds eight terms in fp32, and four lanes their sums, before those go
// on in fp64: at most ten roundings of 2^-24. NaN, or little or much enough that fp32 may have lost some,
// where it is not safe.
//
// Memory is all that this waits for. It comes a fifth faster in vectors of 32 bytes than of 64, and as much
// again where the four lanes read four parts of a long run: each is a stream to the prefetchers.
template <class T, Order kind>
double sum_in_floats(const T* x, int64_t n) {
  using V = Vec<float>;
  constexpr int64_t width = lanes<float>, slots = 4, terms = 8, run = terms * slots * width;
  const bool parts = n >= 1 << 15;
  const int64_t apart = parts ? n / run * terms * width : width, step = parts ? width : slots * width;
  Doubles low = {}, high = {};
  V total[slots] = {};
  const auto add = [&](const V v, int64_t slot) __attribute__((always_inline)) {
    total[slot] += kind == Order::one ? bits<V>(bits<Int<float> >(v) & 0x7fffffff) : v * v;
  };
  const auto fold = [&]() __attribute__((always_inline)) {
    const V sum = (total[0] + total[1]) + (total[2] + total[3]);
    HalfFloats halves[2];
    __builtin_memcpy(halves, &sum, sizeof(sum));
    low += to_double(halves[0]), high += to_double(halves[1]);
    for (V& each : total) each = V{};
  };
  const T* at = x;
  for (int64_t runs = n / run; runs > 0; --runs) {
#pragma GCC unroll 1  // else GCC reads one slot's vectors of the run before the next slot's
    for (int64_t term = 0; term < terms; ++term, at += step)
      for (int64_t slot = 0; slot < slots; ++slot) add(load(at + slot * apart), slot);
    fold();
  }
  for (int64_t i = n / run * run, slot = 0; i < n; i += width, slot = (slot + 1) % slots)
    add(i + width <= n ? load(x + i) : load_first(x + i, n - i, 0.0f), slot);
  fold();
  return horizontal_sum(low + high);
}
#endif

// `reduce`, but for p = 1 and 2 of the narrow dtypes in fp32 first.
static double sum_powers(int64_t code, const void* x, int64_t n, double p, double inverse,
                         [[maybe_unused]] bool exact) {
#if FASTREG_VECTOR_BYTES > 16
  if (!exact && inverse == 1 && code != max_norm::kDouble && (p == 1 || p == 2)) {
    const auto sum = [&]<class T>() {
      const T* from = static_cast<const T*>(x);
      return p == 1 ? avx2::sum_in_floats<T, Order::one>(from, n)
                    : avx2::sum_in_floats<T, Order::two>(from, n);
    };
    const double total = code == max_norm::kFloat  ? sum.template operator()<float>()
                         : code == max_norm::kHalf ? sum.template operator()<Half>()
                                                   : sum.template operator()<BFloat16>();
    if (total > 0x1p-80 && total < 0x1p100) return total;
  }
#endif
  return reduce(code, x, n, p, inverse);
}

enum class Form { linear, sign, power };

template <Form form>
FASTREG_INLINE Doubles slope_at(Doubles w, Slope slope, double p) {
  if constexpr (form == Form::linear) {
    return w * slope.inverse * slope.factor;
  } else if constexpr (form == Form::sign) {
    return w > 0 ? splat(slope.factor) : w < 0 ? splat(-slope.factor) : w * 0.0;
  } else {
    Doubles out;
    for (int64_t i = 0; i < lanes<double>; ++i) {
      const double size = __builtin_pow(__builtin_fabs(w[i]) * slope.inverse, p - 1) * slope.factor;
      out[i] = w[i] < 0 ? -size : w[i] == 0 ? 0.0 : size;
    }
    return out;
  }
}

template <class T, Form form, bool add>
void gradient_run(const T* x, T* out, int64_t n, double p, Slope slope) {
  for_pairs(x, n, [&](Pair w, int, int64_t at, int64_t count) __attribute__((always_inline)) {
    w.low = slope_at<form>(w.low, slope, p);
    w.high = slope_at<form>(w.high, slope, p);
    T block[kPair];
    T* to = count == kPair ? out + at : block;
    if constexpr (add) {
      const Pair old = count == kPair ? pair_of(out + at) : first_of(out + at, count);
      w.low += old.low;
      w.high += old.high;
    }
    put(to, w);
    if (to == block)
      for (int64_t i = 0; i < count; ++i) out[at + i] = block[i];
  });
}

#if FASTREG_VECTOR_BYTES > 16
// The gradients of p = 1 and 2 in fp32: the factor is all that needs more digits.
template <class T, Form form>
void gradient_floats(const T* x, T* out, int64_t n, double factor, bool stream) {
  using V = Vec<float>;
  constexpr int64_t width = lanes<float>;
  const Factor by(factor);
  const float size = static_cast<float>(factor);
  const auto value = [&](V v) __attribute__((always_inline)) {
    if constexpr (form == Form::linear)
      return by.times(v);
    else
      return v > 0 ? splat(size) : v < 0 ? splat(-size) : v * 0.0f;
  };
  const auto some = [&](int64_t at, int64_t count) {
    store_first(out + at, value(load_first(x + at, count, 0.0f)), count);
  };
  int64_t i = 0;
  if constexpr (std::is_same_v<T, float>) {
    if (stream && reinterpret_cast<uintptr_t>(out) % sizeof(T) == 0) {
      const int64_t head = before_vector(out);
      if (head >= n) return n ? some(0, n) : void();
      if (head) some(0, head);
      // In turn from four parts, each a stream to the prefetchers.
      constexpr int64_t parts = 4;
      const int64_t apart = (n - head) / (parts * width) * width;
      for (int64_t at = head; at < head + apart; at += width)
        for (int64_t part = 0; part < parts; ++part)
          store_past_caches(out + at + part * apart, value(load(x + at + part * apart)));
      i = head + parts * apart;
      finish_writing();
    }
  }
  for (; i + width <= n; i += width) store(out + i, value(load(x + i)));
  if (i < n) some(i, n - i);
}
#endif

template <class T, bool add>
void gradient_typed(const T* x, T* out, int64_t n, double p, Slope slope) {
  if (slope.factor == 0 || p == 1)
    gradient_run<T, Form::sign, add>(x, out, n, p, slope);
  else if (p == 2)
    gradient_run<T, Form::linear, add>(x, out, n, p, slope);
  else
    gradient_run<T, Form::power, add>(x, out, n, p, slope);
}

template <class T>
void gradient_either(const T* x, T* out, int64_t n, double p, Slope slope, bool add, bool stream) {
#if FASTREG_VECTOR_BYTES > 16
  if constexpr (!std::is_same_v<T, double>) {
    if (!add && p == 1) return gradient_floats<T, Form::sign>(x, out, n, slope.factor, stream);
    if (!add && p == 2 && Factor::takes(slope.inverse * slope.factor))
      return gradient_floats<T, Form::linear>(x, out, n, slope.inverse * slope.factor, stream);
  }
#endif
  if (add)
    gradient_typed<T, true>(x, out, n, p, slope);
  else
    gradient_typed<T, false>(x, out, n, p, slope);
}

template <class T>
FASTREG_INLINE bool is_zero(const T* g, int64_t n) {
  using Bits =
      std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t> >;
  Bits any = 0;
  for (int64_t i = 0; i < n; ++i) any |= static_cast<Bits>(bits<Bits>(g[i]) << 1);  // -0 is zero too
  return any == 0;
}

// w + d * step where d is not zero: adding a zero would turn -0 into 0.
template <class T>
FASTREG_INLINE void step_block(T* x, const T* g, int64_t n, double inverse, double step) {
  for_pairs(g, n, [&](Pair d, int, int64_t i, int64_t m) __attribute__((always_inline)) {
    T block[kPair];
    T* to = m == kPair ? x + i : block;
    Pair w = m == kPair ? pair_of(x + i) : first_of(x + i, m);
    w.low = d.low != 0 ? w.low + d.low * inverse * step : w.low;
    w.high = d.high != 0 ? w.high + d.high * inverse * step : w.high;
    put(to, w);
    if (to == block)
      for (int64_t j = 0; j < m; ++j) x[i + j] = block[j];
  });
}

// body(first element, elements) for each block, with a number of elements that the compiler knows but for the
// last: then a copy is a few moves, not a call.
template <class Body>
FASTREG_INLINE void each_block(int64_t n, const Body& body) {
  constexpr int64_t size = penalties::kBlock;
  int64_t at = 0;
  for (; at + size <= n; at += size) body(at, std::integral_constant<int64_t, size>{});
  if (at < n) body(at, n - at);
}

// Whether what is written to `to` can go past the caches.
struct Streaming {
  bool on = false;
  Streaming([[maybe_unused]] const void* to, [[maybe_unused]] bool wanted) {
#if FASTREG_VECTOR_BYTES > 16
    on = wanted && reinterpret_cast<uintptr_t>(to) % FASTREG_VECTOR_BYTES == 0;
#endif
  }
  ~Streaming() {
#if FASTREG_VECTOR_BYTES > 16
    if (on) finish_writing();
#endif
  }
};

// A block, past the caches if `stream` and it is a whole one.
template <class T, class Count>
FASTREG_INLINE void copy_block(T* to, const T* from, Count count, bool stream) {
#if FASTREG_VECTOR_BYTES > 16
  if constexpr (!std::is_same_v<Count, int64_t>) {
    if (stream) {
      for (int64_t i = 0; i < count * int64_t(sizeof(T)) / FASTREG_VECTOR_BYTES; ++i)
        store_past_caches(reinterpret_cast<float*>(to) + i * lanes<float>,
                          load_raw<Vec<float> >(reinterpret_cast<const float*>(from) + i * lanes<float>));
      return;
    }
  }
#endif
  __builtin_memcpy(to, from, count * sizeof(T));
}

// A whole block of a narrow dtype, in float: what is read stays in registers, for all that this waits for is
// what passes between the caches.
template <class T>
FASTREG_INLINE void attack_floats(T* x, const T* g, T* backup, uint8_t& mark, Vec<float> by, bool stream) {
  constexpr int64_t width = lanes<float>, count = penalties::kBlock / width;
  Vec<float> d[count], w[count];
  Words any = {};
  for (int64_t k = 0; k < count; ++k) {
    d[k] = load(g + k * width);
    any |= bits<Words>(d[k]) << 1;  // -0 is zero too
  }
  if (!any_different(bits<Vec<float> >(any), Vec<float>{})) return;
  for (int64_t k = 0; k < count; ++k) w[k] = load(x + k * width);
  if (!mark) copy_block(backup, x, std::integral_constant<int64_t, penalties::kBlock>{}, stream);
  mark = 1;
  for (int64_t k = 0; k < count; ++k) store(x + k * width, d[k] != 0 ? w[k] + d[k] * by : w[k]);
}

template <class T>
void attack_typed(T* x, const T* g, T* backup, uint8_t* marks, int64_t n, double inverse, double step,
                  bool stream) {
  const Streaming streaming(backup, stream);
  const double both = inverse * step, size = __builtin_fabs(both);
  const bool in_floats = !std::is_same_v<T, double> && size > 0x1p-100 && size < 0x1p100;
  const Vec<float> by = splat(static_cast<float>(in_floats ? both : 0));
  each_block(n, [&](int64_t at, auto count) __attribute__((always_inline)) {
    uint8_t& mark = marks[at / penalties::kBlock];
    if constexpr (!std::is_same_v<T, double> && !std::is_same_v<decltype(count), int64_t>)
      if (in_floats) return attack_floats(x + at, g + at, backup + at, mark, by, streaming.on);
    if (is_zero(g + at, count)) return;
    if (!mark) copy_block(backup + at, x + at, count, streaming.on);
    mark = 1;
    step_block(x + at, g + at, count, inverse, step);
  });
}

template <class T>
void restore_typed(T* x, const T* backup, uint8_t* marks, int64_t n, bool stream) {
  const Streaming streaming(x, stream);
  each_block(n, [&](int64_t at, auto count) __attribute__((always_inline)) {
    uint8_t& mark = marks[at / penalties::kBlock];
    if (mark) copy_block(x + at, backup + at, count, streaming.on);
    mark = 0;
  });
}

static void gradient(int64_t code, const void* x, void* out, int64_t n, double p, Slope slope, bool add,
                     bool stream) {
  FASTREG_BY_CODE(code,
                  gradient_either(static_cast<const T*>(x), static_cast<T*>(out), n, p, slope, add, stream))
}
static void attack(int64_t code, void* x, const void* g, void* backup, uint8_t* marks, int64_t n,
                   double inverse, double step, bool stream) {
  FASTREG_BY_CODE(code, attack_typed(static_cast<T*>(x), static_cast<const T*>(g), static_cast<T*>(backup),
                                     marks, n, inverse, step, stream))
}
static void restore(int64_t code, void* x, const void* backup, uint8_t* marks, int64_t n, bool stream){
    FASTREG_BY_CODE(code, restore_typed(static_cast<T*>(x), static_cast<const T*>(backup), marks, n, stream))}

penalties::Passes penalty_passes() {
  return {sum_powers, gradient, attack, restore};
}
}  // namespace fastreg::FASTREG_ISA
#endif
