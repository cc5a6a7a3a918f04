// GroupNorm with residual and activation in CUDA. The formulas are in csrc/group_norm.h.
//
// Tensors are rows of adjacent elements: channels of S positions, or for channels_last (LAST) positions of C
// channels. A slab is what a block works on: some channels of one sample, whole groups of them or a part of
// one group, and a piece of the positions.
//
// Bytes and launches: groups that fit on chip wait in shared memory between their statistics and what is made
// of them: forward, x once and y once in one launch; backward, x and dy once and dx once in two, the second
// for the gradients of the parameters. Groups too large for a block, or too few for the GPU, are shared by a
// cluster of two to eight blocks, on sm_90 and later, which find each other's sums in memory: as many bytes
// and launches. Larger groups are cut into slabs enough for the whole GPU: forward x twice in three launches
// (statistics of slabs, merge, apply), backward x and dy twice in four. What is applied begins with the slabs
// that were read last, which may still be in the cache.
//
// Accesses: 16 bytes, four in flight per thread, where every row of every tensor is aligned; else single
// elements, neighbouring ones by neighbouring threads. Rows of channels_last are read at least 64 bytes at a
// time, by as many groups to a slab as that takes.
//
// Numerics: fp32 (fp64 for fp64). Each thread takes the deviations of its few elements from the first of
// them, and merges go by count, mean and squared deviations, those of slabs in fp64. Where squares overflow,
// the statistics are taken again of smaller numbers. No atomics, every sum in a fixed order.
//
// Launchers take raw pointers and a stream, so this file compiles without torch, for a GPU or for the host.
#include <cstdint>
#include <type_traits>

#include "cuda/elements.h"
#include "cuda/group_norm_launch.h"
#include "cuda/launch.h"
#include "group_norm.h"

namespace fastreg::cuda {
namespace {

// What group_norm.h asks for, for results of type T.
template <class T>
struct Maths {
  using Scalar = Arithmetic<T>;
  static constexpr bool brief = sizeof(T) == 2;
  static __device__ Scalar exp(Scalar x) {
    if constexpr (sizeof(T) == 8) return ::exp(x > 700 ? 700 : x);
    x = fminf(x, 87.0f);  // of NaN too: those who ask multiply by what they have it from
    if constexpr (brief) return flushed_exp(x);
    return ::expf(x);
  }
  static __device__ Scalar quotient(Scalar a, Scalar b) {
    if constexpr (sizeof(T) == 8) return a / b;
    if constexpr (brief) return a * approximate_inverse(b);
    return a * __frcp_rn(b);
  }
};

// Squares of numbers scaled by this do not overflow.
template <class A>
constexpr A kSmall = sizeof(A) == 8 ? A(0x1p-512) : A(0x1p-64);

template <class T>
constexpr int kMost = sizeof(T) == 8 ? 256 : 512;  // threads of a block
constexpr int kMostLast = 256;                     // with channels_last, where threads hold more
constexpr int kSplitThreads = 256;

// A tensor's rows.
template <class T>
struct Rows {
  T* data;
  int64_t sample, row;
};

struct Parameter {
  const void* data;
  int dtype;

  template <class A>
  __device__ A at(int64_t i, A missing) const {
    if (!data) return missing;
    switch (dtype) {
      case 0:
        return static_cast<A>(static_cast<const float*>(data)[i]);
      case 1:
        return static_cast<A>(__half2float(static_cast<const __half*>(data)[i]));
      case 2:
        return static_cast<A>(__bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]));
      default:
        return static_cast<A>(static_cast<const double*>(data)[i]);
    }
  }
};

// How a call is cut; the same for all of its kernels.
struct Cut {
  int64_t samples, channels, groups, positions, per_group;
  int64_t piece;  // positions of a slab
  int width;      // channels of a slab
  int together;   // whole groups of a slab, or 1
  int parts;      // slabs of a group, or 1
  unsigned slabs, pieces;
  int threads;
  int lanes;      // neighbouring threads with neighbouring elements of a row
  int rows;       // that these threads take at a time (of each group of the slab)
  int row_steps;  // contiguous: times that a thread changes the row
  int steps;      // times that it goes on in the other direction
  bool wide;      // vectors of 16 bytes

  __host__ __device__ int slots() const { return row_steps * steps; }
  __host__ __device__ int chunks() const { return parts * static_cast<int>(pieces); }  // slabs of a group
};

// ---- the slab of a block, and a thread's way through it ---------------------------------------------------

struct Slab {
  int64_t n, group, channel, begin;  // the first of its groups, channels and positions
  int groups, width, length;         // how many there are
  int chunk;                         // its number among those of its group
  unsigned piece;

  __device__ Slab(const Cut& cut, unsigned block) {
    piece = block % cut.pieces, block /= cut.pieces;
    const int slab = static_cast<int>(block % cut.slabs);
    n = block / cut.slabs;
    const int part = slab % cut.parts;
    group = int64_t(slab / cut.parts) * cut.together;
    channel = group * cut.per_group + int64_t(part) * cut.width;
    const int64_t left = cut.groups - group, rest = cut.per_group - int64_t(part) * cut.width;
    groups = left < cut.together ? static_cast<int>(left) : cut.together;
    width = cut.parts > 1 ? static_cast<int>(rest < cut.width ? rest : cut.width)
                          : static_cast<int>(groups * cut.per_group);
    begin = piece * cut.piece;
    length = static_cast<int>(cut.positions - begin < cut.piece ? cut.positions - begin : cut.piece);
    chunk = part * static_cast<int>(cut.pieces) + static_cast<int>(piece);
  }

  // Channels that a group has here.
  __device__ int per_group(const Cut& cut) const {
    return cut.parts > 1 ? width : static_cast<int>(cut.per_group);
  }
};

// The V elements of a thread's slot: adjacent ones (wide), or every lanes-th of a channel, or of every
// rows-th position one of the same channel. Of them `valid` exist. Numbers count from the slab's begin.
struct Place {
  int channel, position, valid;
};

template <int V, bool LAST>
struct Walk {
  const Cut& cut;
  const Slab& slab;
  int column, row, team, i = 0, j = 0;

  __device__ Walk(const Cut& cut, const Slab& slab) : cut(cut), slab(slab) {
    const int thread = threadIdx.x, of_team = LAST ? cut.threads : cut.threads / cut.together;
    team = LAST ? 0 : thread / of_team;
    column = thread % of_team % cut.lanes;
    row = thread % of_team / cut.lanes;
  }

  __device__ bool works() const { return LAST ? row < cut.rows : team < slab.groups; }
  __device__ int channel() const {
    return LAST ? (cut.wide ? column * V : column)
                : team * static_cast<int>(cut.per_group) + i * cut.rows + row;
  }

  __device__ Place place() const {
    const int stride = LAST ? cut.rows : cut.lanes, across = LAST ? row : column;
    Place at = {channel(), 0, 0};
    if (!works() || (LAST ? at.channel >= slab.width : i * cut.rows + row >= slab.per_group(cut))) return at;
    if (cut.wide) {
      at.position = LAST ? j * stride + across : (j * stride + across) * V;
      at.valid = at.position < slab.length ? V : 0;
    } else {
      at.position = j * V * stride + across;
#pragma unroll
      for (int k = 0; k < V; ++k) at.valid += at.position + k * stride < slab.length;
    }
    return at;
  }

  __device__ bool row_begins() const { return j == 0; }
  __device__ bool row_ends() const { return j == cut.steps - 1; }
  __device__ void next() {
    if (++j == cut.steps) j = 0, ++i;
  }
};

// A tensor's part of a slab.
template <class T, bool LAST>
struct Part {
  static constexpr int V = Vector<std::remove_const_t<T>>::size;
  using Values = std::remove_const_t<T>[V];
  T* base;
  int64_t row, step;
  bool wide;

  __device__ Part(const Cut& cut, const Slab& slab, const Rows<T>& of)
      : base(of.data + slab.n * of.sample +
             (LAST ? slab.begin * of.row + slab.channel : slab.channel * of.row + slab.begin)),
        row(of.row),
        step(LAST ? cut.rows * of.row : cut.lanes),
        wide(cut.wide) {}

  __device__ T* at(const Place& p) const {
    return base + (LAST ? p.position * row + p.channel : p.channel * row + p.position);
  }
  // The elements of a slot; 0 where there is none.
  __device__ void load(Values& out, const Place& p) const {
    using Element = std::remove_const_t<T>;
    *reinterpret_cast<Vector<Element>*>(out) = Vector<Element>{};
    if (wide) {
      if (p.valid) cuda::load<1>(reinterpret_cast<Element(&)[1][V]>(out), at(p), 0);
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k)
        if (k < p.valid) out[k] = at(p)[k * step];
    }
  }
  __device__ void store(const Place& p, const Vector<std::remove_const_t<T>>& values) const {
    if (wide) {
      if (p.valid) cuda::store(at(p), values);
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k)
        if (k < p.valid) at(p)[k * step] = values.values[k];
    }
  }
};

template <class T, class A, int V>
__device__ Vector<T> narrow(const A (&values)[V]) {
  Vector<T> out;
#pragma unroll
  for (int k = 0; k < V; ++k) out.values[k] = static_cast<T>(values[k]);
  return out;
}

// ---- sums over the block ----------------------------------------------------------------------------------

template <class A>
struct Pair {
  A a, b;
};

template <class A>
__device__ Pair<A> merge(Pair<A> x, Pair<A> y) {
  return {x.a + y.a, x.b + y.b};
}

template <class A>
__device__ Pair<A> from_lane(Pair<A> v, int step) {
  return {__shfl_xor_sync(everyone, v.a, step), __shfl_xor_sync(everyone, v.b, step)};
}

template <class A>
__device__ Moments<A> from_lane(Moments<A> v, int step) {
  return {__shfl_xor_sync(everyone, v.count, step), __shfl_xor_sync(everyone, v.mean, step),
          __shfl_xor_sync(everyone, v.m2, step)};
}

template <class Value>
__device__ Value merge_lanes(Value value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) value = merge(value, from_lane(value, step));
  return value;
}

// Merges item(segment, 0 … items − 1) of each segment, in an order that depends on the numbers alone, and
// calls out(segment, value) from one thread each. `warps` is shared, one per warp.
template <class Value, class Item, class Out>
__device__ void reduce_segments(int segments, int items, Value* warps, Item item, Out out) {
  const int threads = blockDim.x, thread = threadIdx.x;
  int each = threads;  // threads of a segment
  while (each > 1 && threads / each < segments) each /= 2;
  for (int first = 0; first < segments; first += threads / each) {
    const int segment = first + thread / each;
    Value value = {};
    if (segment < segments)
      for (int i = thread % each; i < items; i += each) value = merge(value, item(segment, i));
    value = merge_lanes(value, each < 32 ? each : 32);
    if (each > 32) {  // then this is the only turn
      if (thread % 32 == 0) warps[thread / 32] = value;
      __syncthreads();
      if (thread % each == 0)
        for (int w = 1; w < each / 32; ++w) value = merge(value, warps[thread / 32 + w]);
    }
    if (thread % each == 0 && segment < segments) out(segment, value);
  }
}

// ---- statistics -------------------------------------------------------------------------------------------

template <class A>
struct Input {
  Parameter weight, bias;
  A eps;
  int activation;
  A* stats;  // (2, samples, groups)
};

// A number near those of a group's part of the slab: its first. Means are taken relative to it until the end,
// so that they are rounded once as large numbers.
template <bool LAST, class A, class T>
__device__ A reference_of(const Cut& cut, const Slab& slab, const Rows<const T>& x, int g) {
  const int64_t channel = slab.channel + int64_t(g) * slab.per_group(cut);
  return static_cast<A>(
      x.data[slab.n * x.sample + (LAST ? slab.begin * x.row + channel : channel * x.row + slab.begin)]);
}

// The moments of a thread's elements times `scale`, to items: one per thread, or for channels_last one per
// thread's row and channel. Keeps what it reads in `stash`, a place per slot and thread, unless that is null.
template <class T, bool LAST, class A>
__device__ void thread_moments(const Cut& cut, const Slab& slab, const Rows<const T>& x, A scale,
                               Vector<T>* stash, Moments<A>* items) {
  constexpr int V = Vector<T>::size;
  const Part<const T, LAST> part(cut, slab, x);
  const int slots = cut.slots(), threads = cut.threads, thread = threadIdx.x;
  A pivot[V] = {}, sum[V] = {}, square[V] = {};
  int count[V] = {}, vectors = 0;
  Walk<V, LAST> walk(cut, slab);
  for (int s = 0; s < slots; s += in_flight) {
    alignas(16) T raw[in_flight][V];
    int valid[in_flight] = {};
#pragma unroll
    for (int u = 0; u < in_flight; ++u) {
      if (s + u >= slots) continue;
      const Place place = walk.place();
      part.load(raw[u], place);
      valid[u] = place.valid;
      walk.next();
    }
#pragma unroll
    for (int u = 0; u < in_flight; ++u) {
      if (s + u >= slots) continue;
      if (stash) stash[(s + u) * threads + thread] = *reinterpret_cast<const Vector<T>*>(raw[u]);
      const auto add = [&](int k) {
        const A v = static_cast<A>(raw[u][k]) * scale;
        if (u == 0 && s == 0) pivot[k] = v;
        const A d = v - pivot[k];
        sum[k] += d;
        square[k] += d * d;
      };
      if (cut.wide && valid[u]) {
        ++vectors;
#pragma unroll
        for (int k = 0; k < V; ++k) add(k);
      } else {
#pragma unroll
        for (int k = 0; k < V; ++k)
          if (k < valid[u]) add(k), ++count[k];
      }
    }
  }
  Moments<A> found[V];
  const int here = slab.per_group(cut);
  A reference = 0;
  if (!LAST && walk.team < slab.groups) reference = reference_of<LAST, A>(cut, slab, x, walk.team) * scale;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const int channel = walk.channel() + (cut.wide ? k : 0);
    if (LAST && (k == 0 || cut.wide) && channel < slab.width)
      reference = reference_of<LAST, A>(cut, slab, x, channel / here) * scale;
    const A n = static_cast<A>(cut.wide ? vectors : count[k]), off = sum[k] * inverse(n > 0 ? n : A(1));
    const A m2 = square[k] - sum[k] * off;
    found[k] = {n, (pivot[k] - reference) + off, m2 < 0 ? A(0) : m2};  // NaN and infinity stay
  }
  if (LAST && cut.wide) {
#pragma unroll
    for (int k = 0; k < V; ++k)
      if (walk.works() && walk.channel() + k < slab.width)
        items[walk.row * cut.width + walk.channel() + k] = found[k];
    return;
  }
#pragma unroll
  for (int step = V / 2; step > 0; step /= 2)
#pragma unroll
    for (int k = 0; k < step; ++k) found[k] = merge(found[k], found[k + step]);
  if (!LAST)
    items[thread] = found[0];
  else if (walk.works() && walk.channel() < slab.width)
    items[walk.row * cut.width + walk.channel()] = found[0];
}

// Moments of numbers that were multiplied by `scale`, the mean relative to the reference.
template <class A>
struct Scaled {
  Moments<A> moments;
  A scale;

  __device__ bool overflowed() const { return moments.m2 - moments.m2 != 0; }
  __device__ Pair<A> statistics(A reference, A eps) const {  // mean and 1 / √(variance + eps)
    const A variance = moments.m2 * inverse(moments.count) + eps * scale * scale;
    return {reference + moments.mean * inverse(scale), scale * inverse(sqrt(variance))};
  }
};

// The moments of each group's part of the slab. `found` is shared, as the others are.
template <class T, bool LAST, class A>
__device__ void slab_moments(const Cut& cut, const Slab& slab, const Rows<const T>& x, Vector<T>* stash,
                             Moments<A>* items, Moments<A>* warps, Scaled<A>* found) {
  const int of_team = cut.threads / cut.together, here = slab.per_group(cut);
  for (A scale = 1;; scale = kSmall<A>) {
    const bool first = scale == 1;
    thread_moments<T, LAST>(cut, slab, x, scale, stash, items);
    __syncthreads();
    reduce_segments(
        slab.groups, LAST ? cut.rows * here : of_team, warps,
        [&](int g, int i) {
          return LAST ? items[i / here * cut.width + g * here + i % here] : items[g * of_team + i];
        },
        [&](int g, const Moments<A>& moments) {
          if (first || found[g].overflowed()) found[g] = {moments, scale};
        });
    __syncthreads();
    bool again = false;
    for (int g = threadIdx.x % 32; g < slab.groups; g += 32) again |= found[g].overflowed();
    if (!first || !__any_sync(everyone, again)) return;
    __syncthreads();
  }
}

// ---- y ----------------------------------------------------------------------------------------------------

template <class T, class A, int V>
__device__ void activate_all(int activation, A (&z)[V]) {
  using M = Maths<T>;
  switch (activation) {
#define FASTREG_CASE(act)                                                        \
  case act: {                                                                    \
    _Pragma("unroll") for (int k = 0; k < V; ++k) z[k] = activate<act, M>(z[k]); \
    return;                                                                      \
  }
    FASTREG_CASE(kRelu)
    FASTREG_CASE(kSilu)
    FASTREG_CASE(kGelu)
    FASTREG_CASE(kGeluTanh)
#undef FASTREG_CASE
  }
}

// dz from dy, in place.
template <class T, class A, int V>
__device__ void activation_gradients(int activation, A (&dy)[V], const A (&z)[V]) {
  using M = Maths<T>;
  switch (activation) {
#define FASTREG_CASE(act)                                                                           \
  case act: {                                                                                       \
    _Pragma("unroll") for (int k = 0; k < V; ++k) dy[k] = activation_gradient<act, M>(dy[k], z[k]); \
    return;                                                                                         \
  }
    FASTREG_CASE(kRelu)
    FASTREG_CASE(kSilu)
    FASTREG_CASE(kGelu)
    FASTREG_CASE(kGeluTanh)
#undef FASTREG_CASE
  }
}

// What the elements of a channel are computed with, of a slab: a table in shared memory.
template <class A>
struct alignas(16) Channel {
  A mean, rstd, weight, bias;
};

// statistic(group of the slab) gives mean and rstd. The block must meet before the table is read.
template <class A, class Statistic>
__device__ void fill_channels(const Cut& cut, const Slab& slab, const Input<A>& in, Channel<A>* table,
                              Statistic statistic) {
  const int here = slab.per_group(cut);
  for (int c = threadIdx.x; c < slab.width; c += blockDim.x) {
    const Pair<A> of = statistic(c / here);
    table[c] = {of.a, of.b, in.weight.template at<A>(slab.channel + c, 1),
                in.bias.template at<A>(slab.channel + c, 0)};
  }
}

// Calls enter(k, channel) for the channels of a slot.
template <int V, bool LAST, class Enter>
__device__ void each_channel(const Cut& cut, const Slab& slab, const Walk<V, LAST>& walk, Enter enter) {
  const int first = walk.channel();
#pragma unroll
  for (int k = 0; k < (LAST ? V : 1); ++k) {
    const int channel = first + (LAST && cut.wide ? k : 0);
    if (walk.works() && channel < slab.width) enter(k, channel);
  }
}

// Writes the slab's part of y. fetch(values, place, slot) gives x.
template <class T, bool LAST, class A, class Fetch>
__device__ void write_output(const Cut& cut, const Slab& slab, int activation, const Channel<A>* table,
                             const Rows<const T>& residual, const Rows<T>& y, Fetch fetch) {
  constexpr int V = Vector<T>::size, N = LAST ? V : 1;  // channels of a slot
  const Part<T, LAST> to(cut, slab, y);
  const Part<const T, LAST> added(cut, slab, residual);
  const int slots = cut.slots();
  Walk<V, LAST> walk(cut, slab);
  A mean[N] = {}, scale[N] = {}, shift[N] = {};
  const auto enter = [&](int k, int channel) {
    const Channel<A> of = table[channel];
    mean[k] = of.mean, scale[k] = of.rstd * of.weight, shift[k] = of.bias;
  };
  if (LAST) each_channel(cut, slab, walk, enter);
  alignas(16) T next[V];
  Place place = walk.place();
  fetch(next, place, 0);
  for (int s = 0; s < slots; ++s) {
    const Place now = place;
    if (!LAST && walk.row_begins()) each_channel(cut, slab, walk, enter);
    A z[V];
#pragma unroll
    for (int k = 0; k < V; ++k) z[k] = (static_cast<A>(next[k]) - mean[k % N]) * scale[k % N] + shift[k % N];
    if (residual.data) {
      alignas(16) T other[V];
      added.load(other, now);
#pragma unroll
      for (int k = 0; k < V; ++k) z[k] += static_cast<A>(other[k]);
    }
    walk.next();
    if (s + 1 < slots) {
      place = walk.place();
      fetch(next, place, s + 1);
    }
    activate_all<T>(activation, z);
    to.store(now, narrow<T>(z));
  }
}

template <class T>
__device__ void from_stash(T (&out)[Vector<T>::size], const Vector<T>* stash, const Cut& cut, int slot) {
  *reinterpret_cast<Vector<T>*>(out) = stash[slot * cut.threads + threadIdx.x];
}

// The shared memory of a block, in the order in which it is taken.
struct Shared {
  unsigned char* at;

  template <class X>
  __host__ __device__ X* take(int64_t count) {
    static_assert(alignof(X) <= 16, "what DYN_SMEM promises");
    X* taken = reinterpret_cast<X*>(at);
    at += (count * static_cast<int64_t>(sizeof(X)) + 15) / 16 * 16;
    return taken;
  }
};

// How many items thread_moments leaves, and what channel_sums needs.
template <bool LAST>
__host__ __device__ int64_t moment_items(const Cut& cut) {
  return LAST ? int64_t(cut.rows) * cut.width : cut.threads;
}
template <bool LAST>
__host__ __device__ int sums_per_channel(const Cut& cut) {
  return LAST ? cut.rows : cut.lanes > 32 ? cut.lanes / 32 : 1;
}

// Leaves the moments of each group's part of a slab in parts: (samples, groups, chunks).
template <bool LAST, class A, class T>
__device__ void leave_moments(const Cut& cut, const Slab& slab, const Rows<const T>& x,
                              const Scaled<A>* found, Moments<double>* parts) {
  for (int g = threadIdx.x; g < slab.groups; g += blockDim.x) {
    const Moments<A>& of = found[g].moments;
    const double unit = 1 / static_cast<double>(found[g].scale);
    const double mean = static_cast<double>(reference_of<LAST, A>(cut, slab, x, g)) + of.mean * unit;
    parts[(slab.n * cut.groups + slab.group + g) * cut.chunks() + slab.chunk] = {of.count, mean,
                                                                                 of.m2 * unit * unit};
  }
}

// Of a group whose blocks have left their moments.
template <class A>
__device__ Pair<A> merged_statistics(const Cut& cut, const Moments<double>* parts, int64_t group,
                                     double eps) {
  Moments<double> all = {};
  for (int i = 0; i < cut.chunks(); ++i) all = merge(all, parts[group * cut.chunks() + i]);
  const Pair<double> of = Scaled<double>{all, 1}.statistics(0, eps);
  return {static_cast<A>(of.a), static_cast<A>(of.b)};
}

// The slab of a block of a kernel whose clusters, or single blocks, have whole groups.
__device__ inline Slab slab_of_cluster(const Cut& cut) { return {cut, blockIdx.x * cut.pieces + blockIdx.y}; }

// `parts`: for clusters.
template <class T, bool LAST, class A = Arithmetic<T>>
__global__ void __launch_bounds__(LAST ? kMostLast : kMost<T>, 1)
    forward_whole(Cut cut, Input<A> in, Rows<const T> x, Rows<const T> residual, Rows<T> y,
                  Moments<double>* parts) {
  DYN_SMEM(unsigned char, memory);
  Shared shared = {memory};
  Vector<T>* stash = shared.take<Vector<T>>(int64_t(cut.slots()) * cut.threads);
  Moments<A>* items = shared.take<Moments<A>>(moment_items<LAST>(cut));
  Moments<A>* warps = shared.take<Moments<A>>(32);
  Scaled<A>* found = shared.take<Scaled<A>>(cut.together);
  Pair<A>* stats = shared.take<Pair<A>>(cut.together);
  Channel<A>* table = shared.take<Channel<A>>(cut.width);
  const Slab slab = slab_of_cluster(cut);
  slab_moments<T, LAST>(cut, slab, x, stash, items, warps, found);
  if (cut.pieces > 1) {
    leave_moments<LAST>(cut, slab, x, found, parts);
    wait_for_cluster();
  }
  const int64_t group = slab.n * cut.groups + slab.group, groups = cut.samples * cut.groups;
  for (int g = threadIdx.x; g < slab.groups; g += blockDim.x) {
    stats[g] = cut.pieces > 1 ? merged_statistics<A>(cut, parts, group + g, in.eps)
                              : found[g].statistics(reference_of<LAST, A>(cut, slab, x, g), in.eps);
    if (in.stats && slab.piece == 0)
      in.stats[group + g] = stats[g].a, in.stats[groups + group + g] = stats[g].b;
  }
  __syncthreads();
  fill_channels(cut, slab, in, table, [&](int g) { return stats[g]; });
  __syncthreads();
  write_output<T, LAST>(
      cut, slab, in.activation, table, residual, y,
      [&](T(&out)[Vector<T>::size], const Place&, int slot) { from_stash(out, stash, cut, slot); });
}

template <class T, bool LAST, class A = Arithmetic<T>>
__global__ void __launch_bounds__(kSplitThreads, 1)
    slab_statistics(Cut cut, Rows<const T> x, Moments<double>* parts) {
  DYN_SMEM(unsigned char, memory);
  Shared shared = {memory};
  Moments<A>* items = shared.take<Moments<A>>(moment_items<LAST>(cut));
  Moments<A>* warps = shared.take<Moments<A>>(32);
  Scaled<A>* found = shared.take<Scaled<A>>(cut.together);
  const Slab slab(cut, blockIdx.x);
  slab_moments<T, LAST>(cut, slab, x, static_cast<Vector<T>*>(nullptr), items, warps, found);
  leave_moments<LAST>(cut, slab, x, found, parts);
}

// A block per group.
template <class A>
__global__ void __launch_bounds__(128)
    merge_statistics(Cut cut, const Moments<double>* parts, double eps, A* stats) {
  __shared__ Moments<double> warps[4];
  const int64_t group = blockIdx.x, groups = cut.samples * cut.groups;
  reduce_segments(
      1, cut.chunks(), warps, [&](int, int i) { return parts[group * cut.chunks() + i]; },
      [&](int, Moments<double> found) {
        const Pair<double> of = Scaled<double>{found, 1}.statistics(0, eps);
        stats[group] = static_cast<A>(of.a);
        stats[groups + group] = static_cast<A>(of.b);
      });
}

template <class A>
struct Statistics {  // of a slab, in memory
  const A* stats;
  int64_t first, groups;

  __device__ Statistics(const Cut& cut, const Slab& slab, const A* stats)
      : stats(stats), first(slab.n * cut.groups + slab.group), groups(cut.samples * cut.groups) {}
  __device__ Pair<A> operator()(int g) const { return {stats[first + g], stats[groups + first + g]}; }
};

template <class T, bool LAST, class A = Arithmetic<T>>
__global__ void __launch_bounds__(kSplitThreads, 1)
    apply(Cut cut, Input<A> in, Rows<const T> x, Rows<const T> residual, Rows<T> y) {
  DYN_SMEM(Channel<A>, table);
  const Slab slab(cut, gridDim.x - 1 - blockIdx.x);
  fill_channels(cut, slab, in, table, Statistics<A>(cut, slab, in.stats));
  __syncthreads();
  const Part<const T, LAST> part(cut, slab, x);
  write_output<T, LAST>(cut, slab, in.activation, table, residual, y,
                        [&](T(&out)[Vector<T>::size], const Place& place, int) { part.load(out, place); });
}

// ---- backward ---------------------------------------------------------------------------------------------

template <class T>
struct Gradients {
  Rows<const T> dy, x, residual;
  Rows<T> dx, dr;
};

// What a thread knows of the channels of a slot.
template <class T, bool LAST, class A>
struct Channels {
  static constexpr int V = Vector<T>::size, N = LAST ? V : 1;
  A mean[N] = {}, rstd[N] = {}, weight[N] = {}, bias[N] = {};

  __device__ void enter(int k, const Channel<A>& of) {
    mean[k] = of.mean, rstd[k] = of.rstd, weight[k] = of.weight, bias[k] = of.bias;
  }

  // x̂ and dz of a slot, from dy and the residual; where there is no element dz is 0, as dy is.
  __device__ void derive(int activation, const T (&x)[V], const T (&dy)[V], const T (&residual)[V],
                         bool added, A (&normal)[V], A (&dz)[V]) const {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      normal[k] = (static_cast<A>(x[k]) - mean[k % N]) * rstd[k % N];
      dz[k] = static_cast<A>(dy[k]);
    }
    if (activation == kNone) return;
    A z[V];
#pragma unroll
    for (int k = 0; k < V; ++k) z[k] = normal[k] * weight[k % N] + bias[k % N];
    if (added)
#pragma unroll
      for (int k = 0; k < V; ++k) z[k] += static_cast<A>(residual[k]);
    activation_gradients<T>(activation, dz, z);
  }
};

// Σ dz and Σ dz·x̂ of each channel of the slab: channel_out(channel, sums). Writes dr where it is wanted, and
// keeps x and dz in the stash, unless that is null. `items` is shared, sums_per_channel · width of them.
template <class T, bool LAST, class A, class Out>
__device__ void channel_sums(const Cut& cut, const Slab& slab, int activation, const Channel<A>* table,
                             const Gradients<T>& of, Vector<T>* stash, Pair<A>* items, Pair<A>* warps,
                             Out channel_out) {
  constexpr int V = Vector<T>::size;
  const Part<const T, LAST> x(cut, slab, of.x), dy(cut, slab, of.dy), added(cut, slab, of.residual);
  const Part<T, LAST> dr(cut, slab, of.dr);
  const int slots = cut.slots(), per_channel = sums_per_channel<LAST>(cut);
  Channels<T, LAST, A> channels;
  Walk<V, LAST> walk(cut, slab);
  const auto enter = [&](int k, int channel) { channels.enter(k, table[channel]); };
  if (LAST) each_channel(cut, slab, walk, enter);
  Pair<A> sums[LAST ? V : 1] = {};
  alignas(16) T next_x[V], next_dy[V], other[V];
  Place place = walk.place();
  x.load(next_x, place);
  dy.load(next_dy, place);
  for (int s = 0; s < slots; ++s) {
    const Place now = place;
    if (!LAST && walk.row_begins()) each_channel(cut, slab, walk, enter);
    if (of.residual.data) added.load(other, now);
    const Vector<T> kept_x = *reinterpret_cast<const Vector<T>*>(next_x);
    A normal[V], dz[V];
    channels.derive(activation, next_x, next_dy, other, of.residual.data != nullptr, normal, dz);
    const bool ends = walk.row_ends();
    walk.next();
    if (s + 1 < slots) {
      place = walk.place();
      x.load(next_x, place);
      dy.load(next_dy, place);
    }
    const Vector<T> rounded = narrow<T>(dz);
    if (of.dr.data) dr.store(now, rounded);
    if (stash) {
      Vector<T>* to = stash + 2 * s * cut.threads + threadIdx.x;
      to[0] = kept_x;
      to[cut.threads] = rounded;
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      Pair<A>& sum = sums[LAST ? k : 0];
      sum.a += dz[k];
      sum.b += dz[k] * normal[k];
    }
    if (!LAST && ends) {
      const int lanes = cut.lanes < 32 ? cut.lanes : 32;
      const Pair<A> all = merge_lanes(sums[0], lanes);
      if (walk.column % lanes == 0 && now.channel < slab.width &&
          now.channel - walk.team * static_cast<int>(cut.per_group) < slab.per_group(cut))
        items[now.channel * per_channel + walk.column / 32] = all;
      sums[0] = {};
    }
  }
  if (LAST && walk.works()) {
    const int channel = walk.channel();
    if (cut.wide) {
#pragma unroll
      for (int k = 0; k < V; ++k)
        if (channel + k < slab.width) items[(channel + k) * per_channel + walk.row] = sums[LAST ? k : 0];
    } else if (channel < slab.width) {
#pragma unroll
      for (int k = 1; k < V; ++k) sums[0] = merge(sums[0], sums[LAST ? k : 0]);
      items[channel * per_channel + walk.row] = sums[0];
    }
  }
  __syncthreads();
  reduce_segments(
      slab.width, per_channel, warps, [&](int c, int i) { return items[c * per_channel + i]; }, channel_out);
}

// Writes the slab's part of dx. fetch(x, dz, residual, place, slot) gives the elements; with an activation,
// dz is dy, to be made with the residual if there is one `added`. term(group of the slab) gives m1 and m2.
template <class T, bool LAST, class A, class Fetch, class Term>
__device__ void write_gradient(const Cut& cut, const Slab& slab, int activation, const Channel<A>* table,
                               const Rows<T>& dx, bool added, Fetch fetch, Term term) {
  constexpr int V = Vector<T>::size, N = LAST ? V : 1;
  const Part<T, LAST> to(cut, slab, dx);
  const int slots = cut.slots(), here = slab.per_group(cut);
  // Of a single element dx is 0, which rounding would miss.
  const A factor = cut.per_group * cut.positions == 1 ? 0 : 1;
  Channels<T, LAST, A> channels;
  Walk<V, LAST> walk(cut, slab);
  A m1[N] = {}, m2[N] = {};
  const auto enter = [&](int k, int channel) {
    channels.enter(k, table[channel]);
    const Pair<A> of = term(channel / here);
    m1[k] = of.a, m2[k] = of.b;
  };
  if (LAST) each_channel(cut, slab, walk, enter);
  alignas(16) T next_x[V], next_dz[V], residual[V];
  Place place = walk.place();
  fetch(next_x, next_dz, residual, place, 0);
  for (int s = 0; s < slots; ++s) {
    const Place now = place;
    if (!LAST && walk.row_begins()) each_channel(cut, slab, walk, enter);
    A normal[V], dz[V];
    channels.derive(activation, next_x, next_dz, residual, added, normal, dz);
    walk.next();
    if (s + 1 < slots) {
      place = walk.place();
      fetch(next_x, next_dz, residual, place, s + 1);
    }
#pragma unroll
    for (int k = 0; k < V; ++k)
      dz[k] = ((dz[k] * channels.weight[k % N] - m1[k % N]) - normal[k] * m2[k % N]) *
              (channels.rstd[k % N] * factor);
    to.store(now, narrow<T>(dz));
  }
}

// Where the sums of a sample's channels go: (2, samples, pieces, channels).
template <class A>
struct PartialSums {
  A* data;

  __device__ A* at(const Cut& cut, int which, int64_t n, int64_t piece) const {
    return data + ((which * cut.samples + n) * cut.pieces + piece) * cut.channels;
  }
};

template <class T, bool LAST, class A = Arithmetic<T>>
__global__ void __launch_bounds__(LAST ? kMostLast : kMost<T>, 1)
    backward_whole(Cut cut, Input<A> in, Gradients<T> of, PartialSums<A> sums) {
  DYN_SMEM(unsigned char, memory);
  Shared shared = {memory};
  Vector<T>* stash = shared.take<Vector<T>>(2 * int64_t(cut.slots()) * cut.threads);
  Pair<A>* items = shared.take<Pair<A>>(int64_t(sums_per_channel<LAST>(cut)) * cut.width);
  Pair<A>* warps = shared.take<Pair<A>>(32);
  Pair<A>* per_channel = shared.take<Pair<A>>(cut.width);
  Pair<A>* terms = shared.take<Pair<A>>(cut.together);
  Channel<A>* table = shared.take<Channel<A>>(cut.width);
  const Slab slab = slab_of_cluster(cut);
  fill_channels(cut, slab, in, table, Statistics<A>(cut, slab, in.stats));
  __syncthreads();
  A* to = sums.at(cut, 0, slab.n, slab.piece) + slab.channel;
  A* to_x = sums.at(cut, 1, slab.n, slab.piece) + slab.channel;
  const auto weigh = [&](int c, Pair<A> found) {
    per_channel[c] = {table[c].weight * found.a, table[c].weight * found.b};
  };
  channel_sums<T, LAST>(cut, slab, in.activation, table, of, stash, items, warps, [&](int c, Pair<A> found) {
    to[c] = found.a, to_x[c] = found.b;
    if (cut.pieces == 1) weigh(c, found);
  });
  if (!of.dx.data) return;
  if (cut.pieces > 1) {
    wait_for_cluster();
    for (int c = threadIdx.x; c < slab.width; c += blockDim.x) {
      Pair<A> found = {};
      for (unsigned piece = 0; piece < cut.pieces; ++piece)
        found = merge(found, {sums.at(cut, 0, slab.n, piece)[slab.channel + c],
                              sums.at(cut, 1, slab.n, piece)[slab.channel + c]});
      weigh(c, found);
    }
  }
  __syncthreads();
  const int here = static_cast<int>(cut.per_group);
  const A count = static_cast<A>(cut.per_group) * static_cast<A>(cut.positions);
  reduce_segments(
      slab.groups, here, warps, [&](int g, int c) { return per_channel[g * here + c]; },
      [&](int g, Pair<A> found) { terms[g] = {found.a / count, found.b / count}; });
  __syncthreads();
  write_gradient<T, LAST>(
      cut, slab, kNone, table, of.dx, false,
      [&](auto& x, auto& dz, auto&, const Place&, int slot) {
        from_stash(x, stash, cut, 2 * slot);
        from_stash(dz, stash, cut, 2 * slot + 1);
      },
      [&](int g) { return terms[g]; });
}

template <class T, bool LAST, class A = Arithmetic<T>>
__global__ void __launch_bounds__(kSplitThreads, 1)
    slab_sums(Cut cut, Input<A> in, Gradients<T> of, PartialSums<A> sums) {
  DYN_SMEM(unsigned char, memory);
  Shared shared = {memory};
  Pair<A>* items = shared.take<Pair<A>>(int64_t(sums_per_channel<LAST>(cut)) * cut.width);
  Pair<A>* warps = shared.take<Pair<A>>(32);
  Channel<A>* table = shared.take<Channel<A>>(cut.width);
  const Slab slab(cut, blockIdx.x);
  fill_channels(cut, slab, in, table, Statistics<A>(cut, slab, in.stats));
  __syncthreads();
  A* to = sums.at(cut, 0, slab.n, slab.piece) + slab.channel;
  A* to_x = sums.at(cut, 1, slab.n, slab.piece) + slab.channel;
  channel_sums<T, LAST>(cut, slab, in.activation, table, of, static_cast<Vector<T>*>(nullptr), items, warps,
                        [&](int c, Pair<A> found) { to[c] = found.a, to_x[c] = found.b; });
}

// m1 and m2 of each group, a block each: (2, samples, groups).
template <class A>
__global__ void __launch_bounds__(128) merge_terms(Cut cut, Parameter weight, PartialSums<A> sums, A* terms) {
  __shared__ Pair<double> warps[4];
  const int64_t n = blockIdx.x / cut.groups, g = blockIdx.x % cut.groups;
  const int per_group = static_cast<int>(cut.per_group);
  const double count = static_cast<double>(cut.per_group) * static_cast<double>(cut.positions);
  reduce_segments(
      1, per_group * static_cast<int>(cut.pieces), warps,
      [&](int, int i) {
        const int64_t piece = i / per_group, c = g * per_group + i % per_group;
        const double factor = weight.at<double>(c, 1);
        return Pair<double>{factor * sums.at(cut, 0, n, piece)[c], factor * sums.at(cut, 1, n, piece)[c]};
      },
      [&](int, Pair<double> found) {
        terms[blockIdx.x] = static_cast<A>(found.a / count);
        terms[cut.samples * cut.groups + blockIdx.x] = static_cast<A>(found.b / count);
      });
}

template <class T, bool LAST, class A = Arithmetic<T>>
__global__ void __launch_bounds__(kSplitThreads, 1)
    apply_backward(Cut cut, Input<A> in, Gradients<T> of, const A* terms) {
  DYN_SMEM(Channel<A>, table);
  const Slab slab(cut, gridDim.x - 1 - blockIdx.x);
  fill_channels(cut, slab, in, table, Statistics<A>(cut, slab, in.stats));
  __syncthreads();
  const Part<const T, LAST> x(cut, slab, of.x), dy(cut, slab, of.dy), added(cut, slab, of.residual);
  write_gradient<T, LAST>(
      cut, slab, in.activation, table, of.dx, of.residual.data != nullptr,
      [&](auto& to_x, auto& to_dy, auto& to_residual, const Place& place, int) {
        x.load(to_x, place);
        dy.load(to_dy, place);
        if (of.residual.data) added.load(to_residual, place);
      },
      Statistics<A>(cut, slab, terms));
}

// Gradients of the parameters: the sums over samples and pieces. 32 channels to a block, a warp's lanes.
constexpr int kParameterRows = 16;

template <class A>
__global__ void __launch_bounds__(32 * kParameterRows)
    parameter_gradients(int64_t rows, int64_t channels, const A* sums, void* dweight, int dweight_type,
                        void* dbias, int dbias_type) {
  __shared__ double shared[kParameterRows][32];
  const int64_t channel = int64_t(blockIdx.x) * 32 + threadIdx.x;
  const A* from = sums + blockIdx.y * rows * channels + channel;  // y: 0 for dbias, 1 for dweight
  void* to = blockIdx.y ? dweight : dbias;
  if (!to) return;
  double sum = 0;
  if (channel < channels)
    for (int64_t r = threadIdx.y; r < rows; r += kParameterRows) sum += from[r * channels];
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || channel >= channels) return;
  for (int r = 1; r < kParameterRows; ++r) sum += shared[r][threadIdx.x];
  switch (blockIdx.y ? dweight_type : dbias_type) {
    case 0:
      static_cast<float*>(to)[channel] = static_cast<float>(sum);
      break;
    case 1:
      static_cast<__half*>(to)[channel] = static_cast<__half>(static_cast<float>(sum));
      break;
    case 2:
      static_cast<__nv_bfloat16*>(to)[channel] = static_cast<__nv_bfloat16>(static_cast<float>(sum));
      break;
    default:
      static_cast<double*>(to)[channel] = sum;
  }
}

// ---- launching --------------------------------------------------------------------------------------------

// Launch shapes from arithmetic; nothing here has been tuned on a GPU yet.
struct Plan {
  Cut cut;
  bool whole;            // groups wait in shared memory, of a block or, cut into pieces, of a cluster
  int64_t shared_bytes;  // of forward_whole or backward_whole, else of slab_statistics or slab_sums

  unsigned blocks() const { return static_cast<unsigned>(cut.samples * cut.slabs * cut.pieces); }
  dim3 grid_of_clusters() const { return {blocks() / cut.pieces, cut.pieces}; }
};

int64_t power_above(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

// With `chunks` vectors to a row, the number of neighbouring lanes that leaves the fewest of them idle.
int best_lanes(int64_t rows, int64_t chunks, int threads) {
  int64_t lanes = power_above(chunks) < 32 ? power_above(chunks) : 32, least = INT64_MAX;
  if (lanes > threads) lanes = threads;
  int best = static_cast<int>(lanes);
  for (; lanes <= threads; lanes *= 2) {
    const int64_t steps = ceil_div(rows, threads / lanes) * ceil_div(chunks, lanes);
    if (steps < least) least = steps, best = static_cast<int>(lanes);
  }
  return best;
}

template <class T, bool LAST>
int64_t shared_bytes_of(const Cut& cut, bool backward, bool whole) {
  using A = Arithmetic<T>;
  Shared shared = {nullptr};
  if (whole) shared.take<Vector<T>>((backward ? 2 : 1) * int64_t(cut.slots()) * cut.threads);
  if (backward) {
    shared.take<Pair<A>>(int64_t(sums_per_channel<LAST>(cut)) * cut.width);
    shared.take<Pair<A>>(32);
    if (whole) shared.take<Pair<A>>(cut.width), shared.take<Pair<A>>(cut.together);
    shared.take<Channel<A>>(cut.width);
  } else {
    shared.take<Moments<A>>(moment_items<LAST>(cut));
    shared.take<Moments<A>>(32);
    shared.take<Scaled<A>>(cut.together);
    if (whole) shared.take<Pair<A>>(cut.together), shared.take<Channel<A>>(cut.width);
  }
  return reinterpret_cast<intptr_t>(shared.at);
}

// As many groups as rows of `bytes` take; vectors must not reach from one slab into the next.
template <class T>
int64_t groups_together(const Cut& cut, int64_t bytes) {
  constexpr int V = Vector<T>::size;
  int64_t together = 1;
  while (together < cut.groups && (together * cut.per_group * static_cast<int64_t>(sizeof(T)) < bytes ||
                                   (cut.wide && together * cut.per_group % V)))
    ++together;
  return together;
}

// For clusters of so many blocks, or fewer, each with a piece of the positions.
template <class T, bool LAST>
bool cut_whole(Cut& cut, int blocks) {
  constexpr int V = Vector<T>::size;
  constexpr int64_t most = LAST ? kMostLast : kMost<T>, fits = 227 << 10;
  const int64_t size = sizeof(T), per_group = cut.per_group;
  int64_t piece = ceil_div(cut.positions, blocks);
  if (blocks > 1 && !LAST) piece = ceil_div(piece, V) * V;
  if (per_group * piece > fits / size) return false;
  int64_t together = 1;
  if (LAST) {
    // Enough of them, too, for a block of some warps.
    together = groups_together<T>(cut, 64);
    while (together < cut.groups && together * per_group * piece < 128 * V &&
           (!cut.wide || 2 * together * per_group % V == 0))
      together *= 2;
    if (together > cut.groups) together = cut.groups;
    const int64_t vectors = cut.wide ? together * per_group / V : together * per_group;
    const int64_t rows = cut.wide ? piece : ceil_div(piece, V);
    int64_t threads = power_above(ceil_div(vectors * rows, in_flight));
    if (threads < power_above(vectors)) threads = power_above(vectors);
    if (threads < 32) threads = 32;
    if (threads > most) threads = most;
    if (vectors > threads) return false;
    cut.threads = static_cast<int>(threads);
    cut.lanes = static_cast<int>(vectors);
    cut.rows = static_cast<int>(threads / vectors);
    cut.row_steps = 1;
    cut.steps = static_cast<int>(ceil_div(rows, cut.rows));
  } else {
    const int64_t chunks = ceil_div(piece, V);
    int64_t of_team = power_above(ceil_div(per_group * chunks, in_flight));
    if (of_team > most) of_team = most;
    while (of_team * together < 128 && together < cut.groups) together *= 2;
    if (of_team * together < 32) of_team = 32 / together;
    cut.threads = static_cast<int>(of_team * together);
    cut.lanes = best_lanes(per_group, chunks, static_cast<int>(of_team));
    cut.rows = static_cast<int>(of_team / cut.lanes);
    cut.row_steps = static_cast<int>(ceil_div(per_group, cut.rows));
    cut.steps = static_cast<int>(ceil_div(chunks, cut.lanes));
  }
  cut.together = static_cast<int>(together);
  cut.width = static_cast<int>(together * per_group);
  cut.parts = 1;
  cut.slabs = static_cast<unsigned>(ceil_div(cut.groups, together));
  cut.piece = piece;
  cut.pieces = static_cast<unsigned>(ceil_div(cut.positions, piece));
  return true;
}

template <class T, bool LAST>
void cut_split(Cut& cut, int multiprocessors) {
  constexpr int V = Vector<T>::size, threads = kSplitThreads;
  const int64_t per_group = cut.per_group, positions = cut.positions;
  // A thread has 4 to 16 vectors of a slab: fewer where the GPU would not be full otherwise.
  int64_t volume = cut.samples * cut.channels * positions / (4 * int64_t(multiprocessors));
  constexpr int64_t least = int64_t(in_flight) * threads * V;
  if (volume > 4 * least) volume = 4 * least;
  if (volume < least) volume = least;
  cut.threads = threads;
  cut.together = 1;
  int64_t width = per_group, piece = positions;
  if (LAST) {
    int64_t together = groups_together<T>(cut, 128);
    if (together * per_group > (cut.wide ? threads * V : threads)) {
      together = 1;
      if (per_group % V) cut.wide = false;  // a group's first channel is not aligned
      const int64_t most = cut.wide ? threads * V : threads;
      width = per_group < most ? per_group : most;
    } else {
      width = together * per_group;
    }
    cut.together = static_cast<int>(together);
    cut.lanes = static_cast<int>(cut.wide ? width / V : width);
    cut.rows = threads / cut.lanes;
    cut.row_steps = 1;
    piece = ceil_div(volume, width);
    if (piece > positions) piece = positions;
    cut.steps = static_cast<int>(ceil_div(piece, cut.wide ? cut.rows : cut.rows * V));
  } else {
    if (positions < volume) {
      width = volume / positions < 1024 ? volume / positions : 1024;
      if (width > per_group) width = per_group;
    } else {
      width = 1;
      piece = ceil_div(ceil_div(positions, positions / volume), V) * V;
    }
    const int64_t chunks = ceil_div(piece, V);
    cut.lanes = best_lanes(width, chunks, threads);
    cut.rows = threads / cut.lanes;
    cut.row_steps = static_cast<int>(ceil_div(width, cut.rows));
    cut.steps = static_cast<int>(ceil_div(chunks, cut.lanes));
  }
  cut.width = static_cast<int>(width);
  cut.parts = cut.together > 1 ? 1 : static_cast<int>(ceil_div(per_group, width));
  cut.slabs = static_cast<unsigned>(ceil_div(cut.groups, cut.together) * cut.parts);
  cut.piece = piece;
  cut.pieces = static_cast<unsigned>(ceil_div(positions, piece));
}

// `wide`: whether every row of every tensor is aligned.
template <class T, bool LAST>
Plan plan(int64_t n, int64_t channels, int64_t groups, int64_t positions, bool wide, bool backward,
          int multiprocessors, int shared_bytes, int capability) {
  constexpr int64_t large = 64 << 10;  // shared memory of blocks that should keep every multiprocessor busy
  Plan plan = {}, shared = {};
  Cut& cut = plan.cut;
  cut.samples = n, cut.channels = channels, cut.groups = groups, cut.positions = positions;
  cut.per_group = channels / groups, cut.wide = wide;
  for (int blocks = 1; blocks <= (has_clusters(capability) ? most_blocks_of_cluster : 1); blocks *= 2) {
    Plan next = plan;
    if (!cut_whole<T, LAST>(next.cut, blocks)) continue;
    next.shared_bytes = shared_bytes_of<T, LAST>(next.cut, backward, true);
    if (next.shared_bytes > shared_bytes) continue;
    shared = next, shared.whole = true;
    if (next.shared_bytes <= large || n * next.cut.slabs * next.cut.pieces >= multiprocessors) break;
  }
  // On few multiprocessors a second way through the cache of all of them takes less time.
  if (shared.whole &&
      (shared.shared_bytes <= large || n * shared.cut.slabs * shared.cut.pieces * 4 >= multiprocessors))
    return shared;
  cut_split<T, LAST>(cut, multiprocessors);
  plan.shared_bytes = shared_bytes_of<T, LAST>(cut, backward, false);
  return plan;
}

template <class T>
bool aligned(const Rows<T>& of, int64_t samples, int64_t rows) {
  constexpr int V = Vector<std::remove_const_t<T>>::size;
  return reinterpret_cast<uintptr_t>(of.data) % 16 == 0 && (rows <= 1 || of.row % V == 0) &&
         (samples <= 1 || of.sample % V == 0);
}

template <class T>
bool divides(bool last, int64_t channels, int64_t positions) {
  return (last ? channels : positions) % Vector<T>::size == 0;
}

template <class T>
int64_t forward_workspace(const Plan& plan) {
  const Cut& cut = plan.cut;
  if (plan.whole && cut.pieces == 1) return 0;
  return cut.samples * cut.groups *
         (cut.chunks() * static_cast<int64_t>(sizeof(Moments<double>)) +
          2 * static_cast<int64_t>(sizeof(double)));
}

template <class T>
int64_t backward_workspace(const Plan& plan) {
  const Cut& cut = plan.cut;
  return 2 * cut.samples * (cut.pieces * cut.channels + cut.groups) *
         static_cast<int64_t>(sizeof(Arithmetic<T>));
}

bool too_many(const Cut& cut) {
  return cut.samples * cut.slabs > INT64_MAX / (cut.pieces + 1) ||
         cut.samples * cut.slabs * cut.pieces > 0x7fffffff || cut.samples * cut.groups > 0x7fffffff;
}

template <class T, bool LAST, class A = Arithmetic<T>>
cudaError_t forward(const Plan& plan, Input<A> in, double eps, const Rows<const T>& x,
                    const Rows<const T>& residual, const Rows<T>& y, void* workspace, cudaStream_t stream) {
  const Cut& cut = plan.cut;
  const dim3 grid(plan.blocks()), block(static_cast<unsigned>(cut.threads));
  const auto bytes = static_cast<size_t>(plan.shared_bytes);
  auto* parts = static_cast<Moments<double>*>(workspace);
  if (plan.whole) {
    auto* kernel = forward_whole<T, LAST>;
    if (const cudaError_t error = allow(kernel, plan.shared_bytes)) return error;
    if (cut.pieces == 1)
      LAUNCH(kernel, grid, block, bytes, stream, cut, in, x, residual, y, parts);
    else
      LAUNCH_CLUSTERS(kernel, cut.pieces, plan.grid_of_clusters(), block, bytes, stream, cut, in, x, residual,
                      y, parts);
    return cudaGetLastError();
  }
  auto* statistics = slab_statistics<T, LAST>;
  auto* write = apply<T, LAST>;
  const int64_t total = cut.samples * cut.groups;
  if (!in.stats) in.stats = reinterpret_cast<A*>(parts + total * cut.chunks());
  if (const cudaError_t error = allow(statistics, plan.shared_bytes)) return error;
  LAUNCH(statistics, grid, block, bytes, stream, cut, x, parts);
  LAUNCH(merge_statistics<A>, dim3(static_cast<unsigned>(total)), dim3(128), 0, stream, cut, parts, eps,
         in.stats);
  LAUNCH(write, grid, block, cut.width * sizeof(Channel<A>), stream, cut, in, x, residual, y);
  return cudaGetLastError();
}

struct ParameterGradient {
  void* data;
  int dtype;
};

template <class T, bool LAST, class A = Arithmetic<T>>
cudaError_t backward(const Plan& plan, const Input<A>& in, Gradients<T> of, ParameterGradient dweight,
                     ParameterGradient dbias, void* workspace, cudaStream_t stream) {
  const Cut& cut = plan.cut;
  const dim3 grid(plan.blocks()), block(static_cast<unsigned>(cut.threads));
  const auto bytes = static_cast<size_t>(plan.shared_bytes);
  const PartialSums<A> sums = {static_cast<A*>(workspace)};
  if (plan.whole) {
    auto* kernel = backward_whole<T, LAST>;
    if (const cudaError_t error = allow(kernel, plan.shared_bytes)) return error;
    if (cut.pieces == 1)
      LAUNCH(kernel, grid, block, bytes, stream, cut, in, of, sums);
    else
      LAUNCH_CLUSTERS(kernel, cut.pieces, plan.grid_of_clusters(), block, bytes, stream, cut, in, of, sums);
  } else {
    auto* gather = slab_sums<T, LAST>;
    auto* write = apply_backward<T, LAST>;
    A* terms = sums.data + 2 * cut.samples * cut.pieces * cut.channels;
    if (const cudaError_t error = allow(gather, plan.shared_bytes)) return error;
    LAUNCH(gather, grid, block, bytes, stream, cut, in, of, sums);
    if (of.dx.data) {
      LAUNCH(merge_terms<A>, dim3(static_cast<unsigned>(cut.samples * cut.groups)), dim3(128), 0, stream, cut,
             in.weight, sums, terms);
      LAUNCH(write, grid, block, cut.width * sizeof(Channel<A>), stream, cut, in, of, terms);
    }
  }
  if (dweight.data || dbias.data)
    LAUNCH(parameter_gradients<A>, dim3(static_cast<unsigned>(ceil_div(cut.channels, 32)), 2),
           dim3(32, kParameterRows), 0, stream, cut.samples * cut.pieces, cut.channels, sums.data,
           dweight.data, dweight.dtype, dbias.data, dbias.dtype);
  return cudaGetLastError();
}

template <class T>
Rows<const T> rows(const void* data, int64_t sample, int64_t row) {
  return {static_cast<const T*>(data), sample, row};
}
template <class T>
Rows<T> rows(void* data, int64_t sample, int64_t row) {
  return {static_cast<T*>(data), sample, row};
}

// Calls run.operator()<T, LAST>().
template <class Run>
cudaError_t with_kind(int dtype, bool last, Run run) {
  return with_type(dtype, [&]<class T>() {
    return last ? run.template operator()<T, true>() : run.template operator()<T, false>();
  });
}

}  // namespace

cudaError_t group_norm_workspace(int dtype, bool backward, bool last, int64_t n, int64_t channels,
                                 int64_t groups, int64_t positions, int multiprocessors, int shared_bytes,
                                 int capability, int64_t* bytes) {
  return with_kind(dtype, last, [&]<class T, bool LAST>() {
    *bytes = 0;
    for (int wide = 0; wide < 2; ++wide) {  // which of them depends on addresses
      if (wide && !divides<T>(last, channels, positions)) break;
      const Plan made = plan<T, LAST>(n, channels, groups, positions, wide, backward, multiprocessors,
                                      shared_bytes, capability);
      const int64_t needed = backward ? backward_workspace<T>(made) : forward_workspace<T>(made);
      if (needed > *bytes) *bytes = needed;
    }
    return cudaSuccess;
  });
}

cudaError_t group_norm_forward(int dtype, bool last, int64_t n, int64_t channels, int64_t groups,
                               int64_t positions, const void* input, int64_t input_n, int64_t input_row,
                               const void* residual, int64_t residual_n, int64_t residual_row,
                               const void* weight, int weight_dtype, const void* bias, int bias_dtype,
                               void* output, int64_t output_n, int64_t output_row, void* stats,
                               void* workspace, double eps, int activation, int multiprocessors,
                               int shared_bytes, int capability, cudaStream_t stream) {
  return with_kind(dtype, last, [&]<class T, bool LAST>() {
    using A = Arithmetic<T>;
    const Rows<const T> x = rows<T>(input, input_n, input_row);
    const Rows<const T> r = rows<T>(residual, residual_n, residual_row);
    const Rows<T> y = rows<T>(output, output_n, output_row);
    const int64_t rows_of_sample = last ? positions : channels;
    const auto fits = [&](const auto& of) { return !of.data || aligned(of, n, rows_of_sample); };
    const bool wide = divides<T>(last, channels, positions) && fits(x) && fits(y) && fits(r);
    const Plan made =
        plan<T, LAST>(n, channels, groups, positions, wide, false, multiprocessors, shared_bytes, capability);
    if (too_many(made.cut)) return cudaErrorInvalidValue;
    const Input<A> in = {
        {weight, weight_dtype}, {bias, bias_dtype}, static_cast<A>(eps), activation, static_cast<A*>(stats)};
    return forward<T, LAST>(made, in, eps, x, r, y, workspace, stream);
  });
}

cudaError_t group_norm_backward(int dtype, bool last, int64_t n, int64_t channels, int64_t groups,
                                int64_t positions, const void* grad_output, int64_t grad_output_n,
                                int64_t grad_output_row, const void* input, int64_t input_n,
                                int64_t input_row, const void* residual, int64_t residual_n,
                                int64_t residual_row, const void* weight, int weight_dtype, const void* bias,
                                int bias_dtype, const void* stats, void* grad_input, int64_t grad_input_n,
                                int64_t grad_input_row, void* grad_residual, int64_t grad_residual_n,
                                int64_t grad_residual_row, void* grad_weight, int grad_weight_dtype,
                                void* grad_bias, int grad_bias_dtype, void* workspace, int activation,
                                int multiprocessors, int shared_bytes, int capability, cudaStream_t stream) {
  return with_kind(dtype, last, [&]<class T, bool LAST>() {
    using A = Arithmetic<T>;
    const Gradients<T> of = {rows<T>(grad_output, grad_output_n, grad_output_row),
                             rows<T>(input, input_n, input_row),
                             rows<T>(activation ? residual : nullptr, residual_n, residual_row),
                             rows<T>(grad_input, grad_input_n, grad_input_row),
                             rows<T>(grad_residual, grad_residual_n, grad_residual_row)};
    const int64_t rows_of_sample = last ? positions : channels;
    const auto fits = [&](const auto& tensor) { return !tensor.data || aligned(tensor, n, rows_of_sample); };
    const bool wide = divides<T>(last, channels, positions) && fits(of.dy) && fits(of.x) &&
                      fits(of.residual) && fits(of.dx) && fits(of.dr);
    const Plan made =
        plan<T, LAST>(n, channels, groups, positions, wide, true, multiprocessors, shared_bytes, capability);
    if (too_many(made.cut)) return cudaErrorInvalidValue;
    // The kernels only read the statistics here.
    const Input<A> in = {{weight, weight_dtype},
                         {bias, bias_dtype},
                         A(0),
                         activation,
                         static_cast<A*>(const_cast<void*>(stats))};
    return backward<T, LAST>(made, in, of, {grad_weight, grad_weight_dtype}, {grad_bias, grad_bias_dtype},
                             workspace, stream);
  });
}

}  // namespace fastreg::cuda
