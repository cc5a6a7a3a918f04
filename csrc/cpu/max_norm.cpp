// Max-norm and its kin on the CPU: every row of every tensor of a plan. See fastreg/max_norm.py.
#ifndef FASTREG_ISA
#include "max_norm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/capability.h"
#include "cpu/tensors.h"

namespace fastreg::max_norm {
// What is done to each element, in double, before it is rounded: x * inverse * factor, or for the l1 ball
// sign(x) * max(|x| - top - theta, 0), or for the l-infinity ball sign(x) * min(|x|, bound).
struct Change {
  Kind kind;
  double a, b;
  bool blind = false;  // nobody asks for what the rounded elements add up to
};

// Passes over a run of contiguous elements of one dtype.
struct Passes {
  // Order of |x * inverse|^p, or the largest of them; NaN if an element is NaN, or inf where the largest is
  // asked for.
  double (*reduce)(int64_t code, const void* x, int64_t n, double p, double inverse);
  // The sum of squares to a relative 2 * kEstimate, if it is far from float's ends; NaN and inf show.
  double (*squares)(int64_t code, const void* x, int64_t n);
  // Writes the changed elements, rounded to the nearest or towards zero, and reduces the rounded ones:
  // squares of 16-bit elements as roughly as `squares`.
  double (*change)(int64_t code, const void* x, void* out, int64_t n, double p, Change change,
                   bool toward_zero);
  // How many |x| - top are above theta, and their sum.
  double (*gaps)(int64_t code, const void* x, int64_t n, double top, double theta, double* count);
  void (*decay)(int64_t code, void* x, int64_t n, double keep);
  // x rounded towards zero to the dtype.
  double (*lower)(int64_t code, double x);
  // The sum of g * x * inverse.
  double (*dot)(int64_t code, const void* x, const void* g, int64_t n, double inverse);
  // How many |x| are `size`.
  double (*equal)(int64_t code, const void* x, int64_t n, double size);
  // out = a * g + b * slope, without g if it is null; slope = sign(x) * (|x| / norm)^(p - 1), for p = inf
  // that of the elements whose size is the norm.
  void (*combine)(int64_t code, const void* x, const void* g, void* out, int64_t n, double p, double norm,
                  double a, double b);
};
}  // namespace fastreg::max_norm

#define FASTREG_FILE "cpu/max_norm.cpp"
#include "cpu/foreach_isa.h"

namespace fastreg {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {
using namespace max_norm;

constexpr int64_t kSegment = 16384;  // elements summed at a time
constexpr int64_t kLong = 1 << 18;   // rows longer than this are shared among the threads
// Shorter rows, where half a unit in the last place shows, are brought as close to their caps as they go.
constexpr int64_t kBlind = 16;
// Three roundings of a square and of sums, half of which the root halves.
constexpr double kEstimate = 1.5 * 0x1p-24;

int64_t size_of(int64_t code) { return code == kDouble ? 8 : code == kFloat ? 4 : 2; }

// Whether a sum of squares, some of them added in float, has lost nothing that matters at float's ends.
bool in_float(double squares) { return squares > 0x1p-60 && squares < 0x1p120; }

// Memory of a thread for one row.
char* scratch(int64_t bytes) {
  thread_local std::vector<char> memory;
  if (static_cast<int64_t>(memory.size()) < bytes) memory.resize(bytes);
  return memory.data();
}

// A row as one run of elements, with the passes over it taken segment by segment: in parallel if it is long,
// and in the same order whatever the number of threads.
struct Row {
  const Passes& passes;
  int64_t code, n;
  char* data;
  Order sum;
  double p;

  template <class Body>
  double collect(const Body& body) const {
    if (n <= kSegment) return body(0, n);
    const int64_t count = (n + kSegment - 1) / kSegment;
    std::vector<double> parts(count);
    torch::stable::parallel_for(0, count, n > kLong ? 1 : count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        parts[i] = body(i * kSegment, std::min(kSegment, n - i * kSegment));
    });
    double all = parts[0];
    for (int64_t i = 1; i < count; ++i)
      all = sum != Order::largest  ? all + parts[i]
            : parts[i] == parts[i] ? (all >= parts[i] ? all
                                      : all != all    ? all
                                                      : parts[i])
                                   : parts[i];
    return all;
  }

  char* at(int64_t i) const { return data + i * size_of(code); }
  double reduce(double order, double inverse) const {
    return collect([&](int64_t i, int64_t m) { return passes.reduce(code, at(i), m, order, inverse); });
  }
  double change(char* out, Change how, bool toward_zero) const {
    return collect([&](int64_t i, int64_t m) {
      return passes.change(code, at(i), out + i * size_of(code), m, p, how, toward_zero);
    });
  }
  double largest() const {
    Row other{passes, code, n, data, Order::largest, HUGE_VAL};
    return other.reduce(HUGE_VAL, 1);
  }

  // Among how many elements the derivative of the norm is shared.
  double sharers(double norm) const {
    if (p != HUGE_VAL) return 1;
    return collect([&](int64_t i, int64_t m) { return passes.equal(code, at(i), m, norm); });
  }

  // False for a row with NaN or inf.
  bool norm(Norm* out) const {
    const double plain = reduce(p, 1);
    if (is_safe(plain, sum)) {
      *out = {1, root(plain, p)};
      return true;
    }
    const double top = largest();
    if (!(top < HUGE_VAL)) return false;
    if (top == 0 || sum == Order::largest) {
      *out = {1, top};
      return true;
    }
    const double scale = sum == Order::any ? top : power_of_two(top);
    *out = {scale, root(reduce(p, 1 / scale), p)};
    return true;
  }

  // The Euclidean norm of a row of a narrow dtype, in half of the time, if it can be told: too short by
  // kEstimate of it at most.
  bool estimate(Norm* out) const {
    if (sum != Order::two || code == kDouble || n < kBlind) return false;
    const double squares = collect([&](int64_t i, int64_t m) { return passes.squares(code, at(i), m); });
    *out = {1, sqrt(squares)};
    return in_float(squares);
  }

  // The norm of what `change` has just written, from its sum; NaN-free, since the row was finite.
  double norm_of(double sum_written, const char* written) const {
    if (is_safe(sum_written, sum)) return root(sum_written, p);
    Row other{passes, code, n, const_cast<char*>(written), sum, p};
    Norm norm{1, 0};
    return other.norm(&norm) ? norm.scale * norm.s : HUGE_VAL;
  }

  // Theta of the soft threshold that brings the l1 norm to `radius`, relative to the largest value:
  // Michelot's iteration, in which the kept set only shrinks, from the elements within `radius` of the
  // largest.
  double theta(double top, double radius) const {
    double theta = -radius, kept = -1;
    while (true) {
      std::vector<double> counts((n + kSegment - 1) / kSegment);
      const double total = collect([&](int64_t i, int64_t m) {
        return passes.gaps(code, at(i), m, top, theta, &counts[i / kSegment]);
      });
      double count = 0;
      for (double c : counts) count += c;
      if (count == kept || count == 0) return theta;
      kept = count;
      theta = (total - radius) / count;
    }
  }
};

// An estimated norm that is closer to the cap, relatively, decides nothing.
constexpr double kDoubt = 0x1p-20;

// Does what `kind` says to one row, and writes it to `out`, which may be where it lies, if it changes.
// Returns whether it does, and where asked its norm.
bool treat(const Row& row, Kind kind, double cap, double tau, char* out, double* norm_out = nullptr) {
  const bool bounded = kind != Kind::normalize && tau == 1;
  Norm norm;
  bool known = kind == Kind::cap && tau == 1 && row.estimate(&norm);
  if (known && norm.s < cap * (1 - kDoubt)) return false;
  known = known && norm.s > cap * (1 + kDoubt);
  if (!known && !row.norm(&norm)) return false;
  const Margins m = margins(row.n, row.p);
  // Rounding to fp32 lengthens a row by 2^-24 of it at most. A row that aims that much lower, and lower by
  // what an estimate may have missed, needs no second look.
  const bool blind = bounded && kind == Kind::cap && row.code == kFloat && row.sum != Order::largest &&
                     row.n >= kBlind && cap > 0x1p-60;
  const double missed = 0x1p-24 + (known ? kEstimate : 0);
  const double margin = blind ? missed * (1 + 0x1p-16) : rounding_margin(row.n, row.code);
  const double bound = cap * (1 - m.below), target = cap * (1 - m.aim - margin);
  Change how{kind, 1 / norm.scale, 0, blind};
  if (kind == Kind::cap || kind == Kind::normalize) {
    how.b = factor_of(norm, cap, target, m, tau, kind);
    if (how.b < 0) return false;
  } else {
    if (!is_over(norm, cap, m)) return false;
    how.a = kind == Kind::l1_ball ? row.largest() : row.passes.lower(row.code, bound);
    how.b = kind == Kind::l1_ball ? row.theta(how.a, target) : 0;
  }
  if (norm_out) {
    if (known) row.norm(&norm);
    *norm_out = norm.scale * norm.s;
  }
  double sum = row.change(out, how, false);
  if (!bounded || blind || row.code == kDouble || kind == Kind::linf_ball) return true;
  // Above the bound after rounding: what was rounded is scaled once more, at last towards zero.
  const Row rounded{row.passes, row.code, row.n, out, row.sum, row.p};
  const bool rough = row.sum == Order::two && row.code != kFloat;
  const auto ratio_of = [&](double sum) {
    const double ratio = row.norm_of(sum, out) / bound;
    if (!rough || (in_float(sum) && fabs(ratio - 1) > kDoubt)) return ratio;
    Norm exact{1, HUGE_VAL};
    rounded.norm(&exact);
    return exact.scale * exact.s / bound;
  };
  double ratio = ratio_of(sum);
  if (ratio > 1) {
    sum = rounded.change(out, {Kind::cap, 1, 1 / (2 * ratio - 1)}, false);
    ratio = ratio_of(sum);
  }
  if (ratio > 1)
    rounded.change(out, {Kind::cap, 1, (1 - (rough ? kDoubt : 8 * 0x1p-53)) / ratio, rough && in_float(sum)},
                   true);
  return true;
}

struct Launch {
  const int64_t* table;
  const double* caps;
  double p, tau, decay;
  Kind kind;
};

// One row of a tensor: gathers it if its elements do not lie side by side. Returns whether it was over its
// cap.
bool treat_row(const Launch& launch, const Passes& passes, const int64_t* tensor, int64_t index) {
  const int64_t code = tensor[kCode], n = tensor[kLength], bytes = size_of(code);
  char* place = reinterpret_cast<char*>(tensor[kAddress]) + index * tensor[kRowStride] * bytes;
  const int64_t* box = tensor + kBox;
  const bool runs = n == 1 || (box[0] == n && box[1] == 1);
  char* data = place;
  const auto each_line = [&](const auto& body) {  // body(place, offset in the run) for each innermost line
    int64_t at = 0;
    for (int64_t i3 = 0; i3 < box[6]; ++i3)
      for (int64_t i2 = 0; i2 < box[4]; ++i2)
        for (int64_t i1 = 0; i1 < box[2]; ++i1, at += box[0])
          body(place + (i3 * box[7] + i2 * box[5] + i1 * box[3]) * bytes, at);
  };
  const auto copy_line = [&](char* line, int64_t at, auto element, bool back) {
    using E = decltype(element);
    E *out = reinterpret_cast<E*>(line), *run = reinterpret_cast<E*>(data) + at;
    if (back)
      for (int64_t i = 0; i < box[0]; ++i) out[i * box[1]] = run[i];
    else
      for (int64_t i = 0; i < box[0]; ++i) run[i] = out[i * box[1]];
  };
  const auto copy = [&](bool back) {
    each_line([&](char* line, int64_t at) {
      if (bytes == 8)
        copy_line(line, at, uint64_t{}, back);
      else if (bytes == 4)
        copy_line(line, at, uint32_t{}, back);
      else
        copy_line(line, at, uint16_t{}, back);
    });
  };
  if (!runs) {
    data = scratch(n * bytes);
    copy(false);
  }
  if (launch.decay != 0) passes.decay(code, data, n, 1 - launch.decay);
  const double cap = usable_cap(launch.caps[tensor[kCap] + index * tensor[kCapStep]]);
  const Row row{passes, code, n, data, order_of(launch.p), launch.p};
  const bool over = treat(row, launch.kind, cap, launch.tau, data);
  if (!runs && (over || launch.decay != 0)) copy(true);
  return over;
}
}  // namespace

Tensor max_norm_rows(const Tensor& table, const Tensor& chunks, int64_t /*traits*/, const Tensor& caps,
                     double p, double tau, double decay, std::optional<Tensor> decay_tensor, int64_t kind) {
  if (decay_tensor) decay = *static_cast<const double*>(decay_tensor->const_data_ptr());
  const auto* rows = static_cast<const int64_t*>(table.const_data_ptr());
  const auto* places = static_cast<const int64_t*>(chunks.const_data_ptr());
  const Launch launch{
      rows, static_cast<const double*>(caps.const_data_ptr()), p, tau, decay, static_cast<Kind>(kind)};
  const Passes passes = FASTREG_PICK(max_norm_passes)();
  std::atomic<int64_t> count{0};
  const auto run = [&](int64_t begin, int64_t end, bool is_long) {
    int64_t over = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t* tensor = rows + places[2 * i] * kColumns;
      if ((tensor[kLength] > kLong) != is_long) continue;
      const int64_t last = std::min(tensor[kRows], places[2 * i + 1] + tensor[kPerChunk]);
      for (int64_t r = places[2 * i + 1]; r < last; ++r) over += treat_row(launch, passes, tensor, r);
    }
    count += over;
  };
  int64_t elements = 0;
  for (int64_t t = 0; t < table.size(0); ++t)
    elements += rows[t * kColumns + kRows] * rows[t * kColumns + kLength];
  const int64_t grain = std::max<int64_t>(1, chunks.size(0) * 32768 / std::max<int64_t>(1, elements));
  torch::stable::parallel_for(0, chunks.size(0), grain,
                              [&](int64_t begin, int64_t end) { run(begin, end, false); });
  run(0, chunks.size(0), true);  // whose passes are parallel themselves
  Tensor out = new_tensor({}, ScalarType::Long);
  *static_cast<int64_t*>(out.mutable_data_ptr()) = count;
  return out;
}

// ---- rows that lie one after the other, out of place ----------------------------------------------------
namespace {
struct Matrix {
  char* data;
  int64_t rows, length, code, row_bytes;

  explicit Matrix(const Tensor& tensor)
      : data(static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()))),
        rows(tensor.size(0)),
        length(tensor.size(1)),
        code(code_of(tensor.scalar_type())),
        row_bytes(length * size_of(code)) {}

  static int64_t code_of(ScalarType dtype) {
    switch (dtype) {
      case ScalarType::Half:
        return kHalf;
      case ScalarType::BFloat16:
        return kBFloat16;
      case ScalarType::Double:
        return kDouble;
      default:
        return kFloat;
    }
  }

  // body(row number), in parallel unless the passes over a row are.
  template <class Body>
  void each(const Body& body) const {
    if (length > kLong) {
      for (int64_t r = 0; r < rows; ++r) body(r);
      return;
    }
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, length)),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t r = begin; r < end; ++r) body(r);
                                });
  }
};

const double* doubles_of(const Tensor& tensor) { return static_cast<const double*>(tensor.const_data_ptr()); }
double* doubles_of(Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()); }
}  // namespace

std::tuple<Tensor, Tensor> max_norm_forward(const Tensor& input, const Tensor& caps, double p, double tau) {
  const Passes passes = FASTREG_PICK(max_norm_passes)();
  const Matrix from(input);
  Tensor output = new_like(input), norms = new_tensor({from.rows}, ScalarType::Double);
  const Matrix to(output);
  const double* cap = doubles_of(caps);
  const int64_t step = caps.size(0) > 1;
  double* norm = doubles_of(norms);
  from.each([&](int64_t r) {
    const Row row{passes, from.code, from.length, from.data + r * from.row_bytes, order_of(p), p};
    char* out = to.data + r * to.row_bytes;
    norm[r] = -1;
    if (!treat(row, Kind::cap, usable_cap(cap[r * step]), tau, out, norm + r))
      std::memcpy(out, row.data, from.row_bytes);
  });
  return {output, norms};
}

std::tuple<Tensor, Tensor> max_norm_backward(const Tensor& grad_output, const Tensor& input,
                                             const Tensor& caps, const Tensor& norms, double p, double tau) {
  const Passes passes = FASTREG_PICK(max_norm_passes)();
  const Matrix x(input), g(grad_output);
  Tensor grad_input = new_like(input), slopes = new_tensor({x.rows}, ScalarType::Double);
  const Matrix out(grad_input);
  const double *cap = doubles_of(caps), *norm = doubles_of(norms);
  const int64_t step = caps.size(0) > 1;
  double* slope = doubles_of(slopes);
  x.each([&](int64_t r) {
    const Row row{passes, x.code, x.length, x.data + r * x.row_bytes, Order::one, p};
    char *gs = g.data + r * g.row_bytes, *to = out.data + r * out.row_bytes;
    slope[r] = 0;
    if (norm[r] < 0) {  // the row stayed
      std::memcpy(to, gs, x.row_bytes);
      return;
    }
    const double inverse = 1 / norm[r];
    const double along = row.collect([&](int64_t i, int64_t m) {
      return passes.dot(x.code, row.at(i), gs + i * size_of(x.code), m, inverse);
    });
    slope[r] = along * power_below(norm[r], tau);
    const double factor = usable_cap(cap[r * step]) * power_below(norm[r], tau) * inverse;
    const double share = -factor * tau * along / row.sharers(norm[r]);
    row.collect([&](int64_t i, int64_t m) {
      passes.combine(x.code, row.at(i), gs + i * size_of(x.code), to + i * size_of(x.code), m, p, norm[r],
                     factor, share);
      return 0.0;
    });
  });
  return {grad_input, slopes};
}

Tensor row_norms(const Tensor& input, double p) {
  const Passes passes = FASTREG_PICK(max_norm_passes)();
  const Matrix x(input);
  Tensor norms = new_tensor({x.rows}, ScalarType::Double);
  double* out = doubles_of(norms);
  x.each([&](int64_t r) {
    const Row row{passes, x.code, x.length, x.data + r * x.row_bytes, order_of(p), p};
    Norm norm;
    // Of a row with NaN or inf, that.
    out[r] = row.norm(&norm) ? norm.scale * norm.s
                             : Row{passes, x.code, x.length, row.data, Order::one, 1}.reduce(1, 1);
  });
  return norms;
}

Tensor row_norms_backward(const Tensor& grad, const Tensor& input, const Tensor& norms, double p) {
  const Passes passes = FASTREG_PICK(max_norm_passes)();
  const Matrix x(input);
  Tensor grad_input = new_like(input);
  const Matrix out(grad_input);
  const double *g = doubles_of(grad), *norm = doubles_of(norms);
  x.each([&](int64_t r) {
    const Row row{passes, x.code, x.length, x.data + r * x.row_bytes, Order::one, p};
    char* to = out.data + r * out.row_bytes;
    const bool zero = norm[r] == 0;
    const double share = zero ? 0 : g[r] / row.sharers(norm[r]);
    row.collect([&](int64_t i, int64_t m) {
      passes.combine(x.code, row.at(i), nullptr, to + i * size_of(x.code), m, zero ? 1 : p,
                     zero ? 1 : norm[r], 0, share);
      return 0.0;
    });
  });
  return grad_input;
}
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg, CPU, m) {
  m.impl("max_norm_forward.cpu", TORCH_BOX(&fastreg::max_norm_forward));
  m.impl("max_norm_backward.cpu", TORCH_BOX(&fastreg::max_norm_backward));
  m.impl("row_norms.cpu", TORCH_BOX(&fastreg::row_norms));
  m.impl("row_norms_backward.cpu", TORCH_BOX(&fastreg::row_norms_backward));
  m.impl("max_norm_rows.cpu", TORCH_BOX(&fastreg::max_norm_rows));
}

#else
#include "cpu/simd.h"
// and over it
#include "cpu/rows.h"

namespace fastreg::FASTREG_ISA {
using max_norm::Change;
using max_norm::Kind;

template <Kind kind>
FASTREG_INLINE Doubles changed(Doubles v, Change how) {
  if constexpr (kind == Kind::l1_ball) {
    const Doubles left = (magnitude(v) - how.a) - how.b;
    return with_sign(left > 0 ? left : Doubles{}, v);
  } else if constexpr (kind == Kind::linf_ball) {
    const Doubles size = magnitude(v);
    return with_sign(size < how.a ? size : splat(how.a), v);
  } else if constexpr (kind == Kind::normalize) {  // here: an unscaled row, how.a is 1
    return v * how.b;
  } else {
    return v * how.a * how.b;
  }
}

FASTREG_INLINE double widened(double x) { return x; }
FASTREG_INLINE double widened(float x) { return x; }
template <class T>
FASTREG_INLINE double widened(T x) {
  return static_cast<float>(x);
}

// Towards zero: the nearest, and one step back where that is farther out than the exact value.
template <class T>
FASTREG_INLINE T rounded_down(double exact) {
  T near;
  if constexpr (sizeof(T) == 2)
    near = static_cast<T>(static_cast<float>(exact));
  else
    near = static_cast<T>(exact);
  if (!(__builtin_fabs(widened(near)) > __builtin_fabs(exact))) return near;
  using Bits =
      std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t> >;
  return bits<T>(static_cast<Bits>(bits<Bits>(near) - 1));
}

template <class T, Order sum, Kind kind, bool toward_zero>
double change_rounded(const T* x, T* out, int64_t n, double p, Change how) {
  Collector<sum> all;
  all.p = p;
  for_pairs(x, n, [&](Pair v, int slot, int64_t at, int64_t count) __attribute__((always_inline)) {
    v.low = changed<kind>(v.low, how);
    v.high = changed<kind>(v.high, how);
    T block[kPair];
    T* to = count == kPair ? out + at : block;
    Pair written;
    if constexpr (!toward_zero) {
      written = put(to, v);
    } else {
      for (int64_t i = 0; i < lanes<double>; ++i) {
        to[i] = rounded_down<T>(v.low[i]);
        to[lanes<double> + i] = rounded_down<T>(v.high[i]);
      }
      written = pair_of(to);
    }
    all.add(written.low, slot);
    all.add(written.high, slot + 1);
    if (to == block)
      for (int64_t i = 0; i < count; ++i) out[at + i] = block[i];
  });
  return all.result();
}

template <class T, Order sum, Kind kind>
double change_run(const T* x, T* out, int64_t n, double p, Change how, bool toward_zero) {
  return toward_zero ? change_rounded<T, sum, kind, true>(x, out, n, p, how)
                     : change_rounded<T, sum, kind, false>(x, out, n, p, how);
}

// To `total`, what is a sum of few terms in float.
FASTREG_INLINE void add_floats(Doubles (&total)[2], Vec<float> sum) {
  HalfFloats halves[2];
  __builtin_memcpy(halves, &sum, sizeof(sum));
  total[0] += to_double(halves[0]);
  total[1] += to_double(halves[1]);
}

#if FASTREG_VECTOR_BYTES > 16  // there is a fused multiply-add
// `store_two` of 16-bit elements, but towards zero.
FASTREG_INLINE void store_two_down(BFloat16* to, Two<Vec<float> > v) {
  const Words w = bits<Words>(v.first) >> 16 | (bits<Words>(v.second) & 0xffff0000);
  __builtin_memcpy(to, &w, sizeof(w));
}
FASTREG_INLINE void store_two_down(Half* to, Two<Vec<float> > v) {
  constexpr int down = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
#if FASTREG_VECTOR_BYTES == 64
  const __m256i first = _mm512_maskz_cvtps_ph(0xffff, bits<__m512>(v.first), down);
  const __m256i second = _mm512_maskz_cvtps_ph(0xffff, bits<__m512>(v.second), down);
#else
  const __m128i first = _mm256_cvtps_ph(bits<__m256>(v.first), down);
  const __m128i second = _mm256_cvtps_ph(bits<__m256>(v.second), down);
#endif
  __builtin_memcpy(to, &first, sizeof(first));
  __builtin_memcpy(to + sizeof(first) / sizeof(Half), &second, sizeof(second));
}
FASTREG_INLINE void store_two_down(float*, Two<Vec<float> >) {}  // not called

// x * factor for narrow T, whose elements are finite, in half of the instructions that double takes. Returns
// the sum of squares, unless blind. Down, which is blind and takes 16-bit elements, it is no larger than
// that.
template <class T, bool blind, bool down = false>
double scale_floats(const T* x, T* out, int64_t n, double factor) {
  using V = Vec<float>;
  const Factor by(down ? factor * (1 - 0x1p-22) : factor);  // the product is rounded, and then cut
  constexpr int64_t width = lanes<float>;
  Doubles total[2] = {};
  const auto two = [&](const T* from, T* to) __attribute__((always_inline)) {
    auto v = load_two(from);
    v.first = by.times(v.first);
    v.second = by.times(v.second);
    if constexpr (down)
      store_two_down(to, v);
    else
      store_two<true>(to, v);
    return blind || std::is_same_v<T, float> ? v : load_two(to);
  };
  const auto collect = [&](Two<V> v) __attribute__((always_inline)) {
    if constexpr (blind) return;
    if constexpr (std::is_same_v<T, float>) {  // each square in double
      HalfFloats quarters[4];
      __builtin_memcpy(quarters, &v, sizeof(v));
      for (int k = 0; k < 4; ++k) {
        const Doubles d = to_double(quarters[k]);
        total[k % 2] += d * d;
      }
    } else {
      add_floats(total, v.first * v.first + v.second * v.second);
    }
  };
  int64_t i = 0;
  if constexpr (sizeof(T) == 2)
    for (; i + 4 * width <= n; i += 4 * width) {
      const auto a = two(x + i, out + i), b = two(x + i + 2 * width, out + i + 2 * width);
      if constexpr (!blind)
        add_floats(total,
                   (a.first * a.first + a.second * a.second) + (b.first * b.first + b.second * b.second));
    }
  for (; i + 2 * width <= n; i += 2 * width) collect(two(x + i, out + i));
  if (i < n) {
    T block[2 * width];
    __builtin_memset(block, 0, sizeof(block));
    __builtin_memcpy(block, x + i, (n - i) * sizeof(T));
    collect(two(block, block));
    __builtin_memcpy(out + i, block, (n - i) * sizeof(T));
  }
  return horizontal_sum(total[0] + total[1]);
}
#endif

template <class T>
double change_typed(const T* x, T* out, int64_t n, double p, Change how, bool toward_zero) {
  if (how.kind == Kind::l1_ball)
    return change_run<T, Order::one, Kind::l1_ball>(x, out, n, p, how, toward_zero);
  if (how.kind == Kind::linf_ball)
    return change_run<T, Order::largest, Kind::linf_ball>(x, out, n, p, how, toward_zero);
  const Order sum = max_norm::order_of(p);
#if FASTREG_VECTOR_BYTES > 16
  if constexpr (!std::is_same_v<T, double>)
    if ((sum == Order::two || how.blind) && how.a == 1 && Factor::takes(how.b)) {
      if (!toward_zero)
        return how.blind ? scale_floats<T, true>(x, out, n, how.b) : scale_floats<T, false>(x, out, n, how.b);
      if (how.blind && sizeof(T) == 2) return scale_floats<T, true, true>(x, out, n, how.b);
    }
#endif
  if (sum == Order::two && how.a == 1)
    return change_run<T, Order::two, Kind::normalize>(x, out, n, p, how, toward_zero);
  switch (sum) {
    case Order::one:
      return change_run<T, Order::one, Kind::cap>(x, out, n, p, how, toward_zero);
    case Order::two:
      return change_run<T, Order::two, Kind::cap>(x, out, n, p, how, toward_zero);
    case Order::largest:
      return change_run<T, Order::largest, Kind::cap>(x, out, n, p, how, toward_zero);
    default:
      return change_run<T, Order::any, Kind::cap>(x, out, n, p, how, toward_zero);
  }
}

// Four squares of narrow elements are added in float before double takes them: converting all would be most
// of the work.
template <class T>
double squares_typed(const T* x, int64_t n) {
  if constexpr (std::is_same_v<T, double>) {
    return reduce_run<double, Order::two, false>(x, n, 2, 1);
  } else {
    constexpr int64_t width = lanes<float>;
    Doubles total[2] = {};
    int64_t i = 0;
    for (; i + 4 * width <= n; i += 4 * width) {
      const auto a = load_two(x + i), b = load_two(x + i + 2 * width);
      add_floats(total,
                 (a.first * a.first + a.second * a.second) + (b.first * b.first + b.second * b.second));
    }
    for (; i < n; i += width) {
      const Vec<float> a = i + width <= n ? load(x + i) : load_first(x + i, n - i, 0.0f);
      add_floats(total, a * a);
    }
    return horizontal_sum(total[0] + total[1]);
  }
}

template <class T>
double gaps_typed(const T* x, int64_t n, double top, double theta, double* count) {
  Doubles total[4] = {}, kept = {};
  int64_t seen = 0;
  for_pairs(x, n, [&](Pair v, int slot, int64_t, int64_t m) __attribute__((always_inline)) {
    const Doubles low = magnitude(v.low) - top, high = magnitude(v.high) - top;
    total[slot] += low > theta ? low : Doubles{};
    total[slot + 1] += high > theta ? high : Doubles{};
    kept += low > theta ? splat(1.0) : Doubles{};
    kept += high > theta ? splat(1.0) : Doubles{};
    seen += kPair - m;
  });
  // The zeros that fill up the last pair lie -top below the largest.
  const double filled = -top > theta ? static_cast<double>(seen) : 0;
  *count = horizontal_sum(kept) - filled;
  return horizontal_sum((total[0] + total[1]) + (total[2] + total[3])) + (filled > 0 ? filled * top : 0);
}

template <class T>
void decay_typed(T* x, int64_t n, double keep) {
  if constexpr (std::is_same_v<T, double>) {
    for (int64_t i = 0; i < n; ++i) x[i] *= keep;
  } else {
    const float factor = static_cast<float>(keep);
    for (int64_t i = 0; i < n; ++i) x[i] = static_cast<T>(static_cast<float>(x[i]) * factor);
  }
}

template <class T>
double dot_typed(const T* x, const T* g, int64_t n, double inverse) {
  Doubles total[4] = {};
  for_pairs(x, n, [&](Pair v, int slot, int64_t at, int64_t m) __attribute__((always_inline)) {
    const Pair w = m == kPair ? pair_of(g + at) : first_of(g + at, m);
    total[slot] += w.low * (v.low * inverse);
    total[slot + 1] += w.high * (v.high * inverse);
  });
  return horizontal_sum((total[0] + total[1]) + (total[2] + total[3]));
}

template <class T>
double equal_typed(const T* x, int64_t n, double size) {
  Doubles total[2] = {};
  int64_t filled = 0;  // with zeros, behind the last element
  for_pairs(x, n, [&](Pair v, int, int64_t, int64_t m) __attribute__((always_inline)) {
    total[0] += magnitude(v.low) == size ? splat(1.0) : Doubles{};
    total[1] += magnitude(v.high) == size ? splat(1.0) : Doubles{};
    filled += kPair - m;
  });
  return horizontal_sum(total[0] + total[1]) - (size == 0 ? static_cast<double>(filled) : 0);
}

enum class Slope { sign, linear, power, largest };

template <Slope slope>
FASTREG_INLINE Doubles slope_of(Doubles v, double p, double norm, double inverse) {
  if constexpr (slope == Slope::linear) {
    return v * inverse;
  } else if constexpr (slope == Slope::largest) {
    return v == norm ? splat(1.0) : v == -norm ? splat(-1.0) : Doubles{};
  } else if constexpr (slope == Slope::sign) {
    return v > 0 ? splat(1.0) : v < 0 ? splat(-1.0) : v * 0.0;
  } else {
    for (int64_t i = 0; i < lanes<double>; ++i) {
      const double size = __builtin_pow(__builtin_fabs(v[i]) * inverse, p - 1);
      v[i] = v[i] == 0 ? 0.0 : __builtin_copysign(size, v[i]);
    }
    return v;
  }
}

template <class T, Slope slope, bool with_g>
void combine_run(const T* x, const T* g, T* out, int64_t n, double p, double norm, double a, double b) {
  const double inverse = 1 / norm;
  for_pairs(x, n, [&](Pair v, int, int64_t at, int64_t m) __attribute__((always_inline)) {
    v.low = slope_of<slope>(v.low, p, norm, inverse) * b;
    v.high = slope_of<slope>(v.high, p, norm, inverse) * b;
    if constexpr (with_g) {
      const Pair w = m == kPair ? pair_of(g + at) : first_of(g + at, m);
      v.low += w.low * a;
      v.high += w.high * a;
    }
    T block[kPair];
    T* to = m == kPair ? out + at : block;
    put(to, v);
    if (to == block)
      for (int64_t i = 0; i < m; ++i) out[at + i] = block[i];
  });
}

template <class T>
void combine_typed(const T* x, const T* g, T* out, int64_t n, double p, double norm, double a, double b) {
  const auto with = [&]<Slope slope>() {
    if (g)
      combine_run<T, slope, true>(x, g, out, n, p, norm, a, b);
    else
      combine_run<T, slope, false>(x, g, out, n, p, norm, a, b);
  };
  if (p == 2)
    with.template operator()<Slope::linear>();
  else if (p == 1)
    with.template operator()<Slope::sign>();
  else if (p == HUGE_VAL)
    with.template operator()<Slope::largest>();
  else
    with.template operator()<Slope::power>();
}

static double lower(int64_t code, double x) { FASTREG_BY_CODE(code, widened(rounded_down<T>(x))) }
static double dot(int64_t code, const void* x, const void* g, int64_t n, double inverse) {
  FASTREG_BY_CODE(code, dot_typed(static_cast<const T*>(x), static_cast<const T*>(g), n, inverse))
}
static double equal(int64_t code, const void* x, int64_t n, double size) {
  FASTREG_BY_CODE(code, equal_typed(static_cast<const T*>(x), n, size))
}
static void combine(int64_t code, const void* x, const void* g, void* out, int64_t n, double p, double norm,
                    double a, double b) {
  FASTREG_BY_CODE(code, combine_typed(static_cast<const T*>(x), static_cast<const T*>(g),
                                      static_cast<T*>(out), n, p, norm, a, b))
}
static double change(int64_t code, const void* x, void* out, int64_t n, double p, Change how,
                     bool toward_zero) {
  FASTREG_BY_CODE(code, change_typed(static_cast<const T*>(x), static_cast<T*>(out), n, p, how, toward_zero))
}
static double squares(int64_t code, const void* x, int64_t n) {
  FASTREG_BY_CODE(code, squares_typed(static_cast<const T*>(x), n))
}
static double gaps(int64_t code, const void* x, int64_t n, double top, double theta, double* count) {
  FASTREG_BY_CODE(code, gaps_typed(static_cast<const T*>(x), n, top, theta, count))
}
static void decay(int64_t code, void* x, int64_t n,
                  double keep){FASTREG_BY_CODE(code, decay_typed(static_cast<T*>(x), n, keep))}

max_norm::Passes max_norm_passes() {
  return {reduce, squares, change, gaps, decay, lower, dot, equal, combine};
}
}  // namespace fastreg::FASTREG_ISA
#endif
