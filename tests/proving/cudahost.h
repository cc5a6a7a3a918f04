// Runs CUDA kernels on the CPU, for tests: one fiber per CUDA thread, the blocks of a grid one after another,
// those of a cluster in turns from one of its barriers to the next.
//
//   g++ -std=c++20 -x c++ -I$CUDA_HOME/include -include cudahost.h kernel.cu
//
// The kernel is compiled by the host compiler from its own source, with CUDA's own headers for vector types,
// half and bf16. __syncthreads, __syncwarp, shuffles, votes and atomics are real: a fiber waits until the
// others have arrived. Errors, with block and thread: a lane that calls a warp operation without being in its
// mask, a shuffle from a lane outside the mask, a warp operation that some lane of its mask never reaches, a
// deadlock, a block of more than 1,024 threads, a grid or shared memory that no GPU has, or shared memory
// that was not asked for. Dynamic shared memory starts as NaN in each block. CUDAHOST_SHARED_BYTES is what a
// block may have (227 KB unless given). -fsanitize=address finds accesses out of bounds, -fsanitize=thread
// missing barriers (__syncthreads orders a block, __syncwarp a warp, shuffles order nothing). CUDAHOST_SEED=n
// runs the threads of a block in a shuffled order.
//
// Not covered: races between blocks, the memory model, inline PTX, tensor cores, cp.async and TMA, shared
// memory of other blocks of a cluster, static shared memory that outlives a cluster's barrier, speed.
#pragma once
#define CUDAHOST 1

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define CUDAHOST_ASAN(...) __VA_ARGS__
#else
#define CUDAHOST_ASAN(...)
#endif

#if defined(__SANITIZE_THREAD__) && !defined(CUDAHOST_METER)
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#define CUDAHOST_TSAN(...) __VA_ARGS__
// Between these, TSan does not look: the scheduler's own accesses are not the kernel's.
#define CUDAHOST_QUIET(edge) \
  (AnnotateIgnoreReads##edge(__FILE__, __LINE__), AnnotateIgnoreWrites##edge(__FILE__, __LINE__))
#else
#define CUDAHOST_TSAN(...)
#define CUDAHOST_QUIET(edge) (void)0
#endif

#if defined(CUDAHOST_METER)
extern "C" {
void cudahost_meter_launch(const void* kernel);
void cudahost_meter_block(int number, bool begins);
void cudahost_meter_cluster(const int* numbers, int count);
void cudahost_meter_thread(int number);
const char* cudahost_meter_race();
}
#define CUDAHOST_METERED(...) __VA_ARGS__
#else
#define CUDAHOST_METERED(...)
#endif

namespace cudahost {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class State { ready, at_block_barrier, at_warp_operation, at_cluster_barrier, done };

constexpr size_t kStack = 64 << 10;

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  uint3 index;  // threadIdx
  int linear;   // its number in the block
  State state = State::ready;
  unsigned mask = 0;         // of the warp operation it waits in
  uint64_t value = 0;        // what it brings to that operation
  uint64_t lane_values[32];  // what all lanes brought
  void* fake_stack = nullptr;
  void* tsan_fiber = nullptr;
  bool orders_memory = false;   // whether the operation it waits in does
  char arrive_tag, resume_tag;  // TSan: from the arriving thread to who completes the barrier, and back
};

struct Release {
  void operator()(char* memory) const { ::operator delete(memory, std::align_val_t(16)); }
};

struct Block {
  int number;
  uint3 index;  // blockIdx
  std::vector<std::unique_ptr<Thread>> threads;
  std::unique_ptr<char, Release> shared_memory;  // of exactly the bytes asked for, so that ASan sees its end
  std::mt19937 random;
};

// One grid runs at a time, on one OS thread.
inline Thread* current = nullptr;
inline Block* current_block = nullptr;
inline std::vector<Block> cluster;
inline ucontext_t scheduler;
inline void *scheduler_fiber = nullptr, *scheduler_fake_stack = nullptr;
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_size = 0;
inline char start_tag, end_tag;  // what TSan's happens-before edges go through
inline std::function<void()> kernel;
inline dim3 grid_size, block_size;
inline std::string error;
inline const unsigned seed = [] {
  const char* text = std::getenv("CUDAHOST_SEED");
  return text ? unsigned(std::atoi(text)) : 0u;
}();

inline std::string where() {
  auto number = [](unsigned n) { return std::to_string(n); };
  const uint3 at = current_block->index;
  return " in block (" + number(at.x) + ", " + number(at.y) + ", " + number(at.z) + "), thread " +
         (current ? std::to_string(current->linear) : "?");
}

// ---- waiting

// The thread of this warp's lane, or null where the block ends before.
inline Thread* lane_of(int warp, int lane) {
  size_t i = size_t(warp) * 32 + lane;
  return i < current_block->threads.size() ? current_block->threads[i].get() : nullptr;
}

// TSan's edges of a barrier that just completed: everything before any arrival is before every resumption.
template <class Each>
void order_memory(Each&& each) {
  CUDAHOST_TSAN(each([](Thread& thread) { __tsan_acquire(&thread.arrive_tag); });
                each([](Thread& thread) { __tsan_release(&thread.resume_tag); });)
}

// If every lane of `mask` waits in the same warp operation: hands each what all brought, and frees them.
inline bool release_warp(int warp, unsigned mask) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Thread* thread = lane_of(warp, lane);
    if (!thread || thread->state != State::at_warp_operation || thread->mask != mask) return false;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Thread* thread = lane_of(warp, lane);
    for (int other = 0; other < 32; ++other)
      thread->lane_values[other] = mask >> other & 1 ? lane_of(warp, other)->value : 0xDEADBEEFDEADBEEFull;
  }
  auto each = [&](auto&& visit) {
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) visit(*lane_of(warp, lane));
  };
  if (current->orders_memory) order_memory(each);
  each([](Thread& thread) { thread.state = State::ready; });
  return true;
}

// If every thread that still runs waits at the block's barrier: frees them.
inline bool release_block() {
  for (auto& thread : current_block->threads)
    if (thread->state != State::at_block_barrier && thread->state != State::done) return false;
  auto each = [](auto&& visit) {
    for (auto& thread : current_block->threads)
      if (thread->state == State::at_block_barrier) visit(*thread);
  };
  bool any = false;
  order_memory(each);
  each([&](Thread& thread) { thread.state = State::ready, any = true; });
  return any;
}

inline void switch_to_scheduler(bool for_good = false) {
  Thread* self = current;
  (void)for_good;
  CUDAHOST_ASAN(__sanitizer_start_switch_fiber(for_good ? nullptr : &self->fake_stack, scheduler_stack,
                                               scheduler_stack_size);)
  CUDAHOST_TSAN(void* back = scheduler_fiber; if (for_good) CUDAHOST_QUIET(End);
                __tsan_switch_to_fiber(back, 1);)
  swapcontext(&self->context, &scheduler);
  CUDAHOST_ASAN(__sanitizer_finish_switch_fiber(self->fake_stack, &scheduler_stack, &scheduler_stack_size);)
}

inline void switch_to(Thread* thread) {
  current = thread;
  CUDAHOST_METERED(cudahost_meter_thread(thread->linear);)
  CUDAHOST_ASAN(__sanitizer_start_switch_fiber(&scheduler_fake_stack, thread->stack.get(), kStack);)
  CUDAHOST_TSAN(__tsan_switch_to_fiber(thread->tsan_fiber, 1);)
  swapcontext(&scheduler, &thread->context);
  CUDAHOST_ASAN(__sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);)
  current = nullptr;
}

// Waits in `state`. Barriers order memory; shuffles and votes do not.
inline void wait(State state, bool orders_memory) {
  CUDAHOST_TSAN(if (orders_memory) __tsan_release(&current->arrive_tag);)
  CUDAHOST_QUIET(Begin);
  current->state = state;
  current->orders_memory = orders_memory;
  if (state != State::at_warp_operation || !release_warp(current->linear / 32, current->mask))
    switch_to_scheduler();
  CUDAHOST_QUIET(End);
  CUDAHOST_TSAN(if (orders_memory) __tsan_acquire(&current->resume_tag);)
}

// ---- running

inline void run_thread() {
  CUDAHOST_ASAN(__sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);)
  CUDAHOST_TSAN(__tsan_acquire(&start_tag);)
  try {
    kernel();
  } catch (const std::exception& exception) {
    error = exception.what();
  }
  CUDAHOST_TSAN(__tsan_release(&end_tag);)
  CUDAHOST_QUIET(Begin);
  current->state = State::done;
  switch_to_scheduler(true);
}

inline std::string describe_standstill() {
  for (auto& thread : current_block->threads) {
    if (thread->state != State::at_warp_operation) continue;
    unsigned alive = 0;
    for (int lane = 0; lane < 32; ++lane) {
      Thread* other = lane_of(thread->linear / 32, lane);
      if (other && other->state != State::done) alive |= 1u << lane;
    }
    char masks[64];
    std::snprintf(masks, sizeof masks, "mask %08x, running lanes %08x", thread->mask, alive);
    current = thread.get();
    std::string text = "divergence: a warp operation never completes" + where() + ": " + masks;
    current = nullptr;
    return text;
  }
  return "deadlock" + where();
}

// Until all threads are done, or those that are not wait for the cluster; returns whether any does.
inline bool run_block() {
  auto& threads = current_block->threads;
  std::vector<int> order(threads.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = int(i);
  for (;;) {
    if (seed) std::shuffle(order.begin(), order.end(), current_block->random);
    bool ran = false, left = false, all_wait = true;
    for (int i : order) {
      Thread* thread = threads[i].get();
      if (thread->state == State::ready) {
        ran = true;
        switch_to(thread);
        if (!error.empty()) return false;
      }
      left |= thread->state != State::done;
      all_wait &= thread->state == State::at_cluster_barrier || thread->state == State::done;
    }
    if (all_wait) return left;
    if (!ran && !release_block()) {
      error = describe_standstill();
      return false;
    }
  }
}

inline void prepare_block(size_t shared_bytes) {
  current_block->shared_memory.reset(static_cast<char*>(::operator new(shared_bytes, std::align_val_t(16))));
  std::memset(current_block->shared_memory.get(), 0xFF, shared_bytes);
  current_block->random.seed(seed + current_block->index.x * 7919u);
  for (size_t i = 0; i < current_block->threads.size(); ++i) {
    auto& slot = current_block->threads[i];
    if (!slot) slot = std::make_unique<Thread>();
    Thread& thread = *slot;
    thread.linear = int(i);
    thread.index = {unsigned(i % block_size.x), unsigned(i / block_size.x % block_size.y),
                    unsigned(i / block_size.x / block_size.y)};
    thread.state = State::ready;
    thread.fake_stack = nullptr;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
  }
}

// Runs the block until it is done or waits for its cluster; returns whether it waits. To TSan, what a block
// does in its turn is before what the next one does.
inline bool take_turn(Block& block, size_t shared_bytes, bool begins) {
  current_block = &block;
  CUDAHOST_METERED(cudahost_meter_block(block.number, begins);)
  if (begins) {
    prepare_block(shared_bytes);
    CUDAHOST_TSAN(scheduler_fiber = __tsan_get_current_fiber();
                  for (auto& thread : block.threads) thread->tsan_fiber = __tsan_create_fiber(0);
                  __tsan_release(&start_tag);)
  }
  for (auto& thread : block.threads)
    if (thread->state == State::at_cluster_barrier) {
      CUDAHOST_TSAN(__tsan_release(&thread->resume_tag);)
      thread->state = State::ready;
    }
  CUDAHOST_QUIET(Begin);
  const bool waits = run_block();
  CUDAHOST_QUIET(End);
  CUDAHOST_TSAN(__tsan_acquire(&end_tag);
                for (auto& thread : block.threads) if (thread->state == State::at_cluster_barrier)
                    __tsan_acquire(&thread->arrive_tag);)
  CUDAHOST_METERED(if (const char* race = cudahost_meter_race(); race && error.empty()) error = race;)
  return waits;
}

inline void run_cluster(size_t shared_bytes) {
  for (bool begins = true, waits = true; waits && error.empty(); begins = false) {
    waits = false;
    for (Block& block : cluster)
      if (error.empty()) waits |= take_turn(block, shared_bytes, begins);
    CUDAHOST_METERED(std::vector<int> numbers; for (Block& block : cluster) numbers.push_back(block.number);
                     cudahost_meter_cluster(numbers.data(), int(numbers.size()));)
  }
  CUDAHOST_TSAN(if (error.empty()) for (Block& block : cluster) for (auto& thread : block.threads)
                    __tsan_destroy_fiber(thread->tsan_fiber);)
}

template <class F>
const void* address_of(F* function) {
  return reinterpret_cast<const void*>(function);
}

// What kernels were allowed by cudaFuncSetAttribute, bytes of dynamic shared memory.
inline std::map<const void*, size_t> allowed;
constexpr size_t kUnasked = 48 << 10;  // that a block may have, the static part included,
constexpr size_t kStatic = 8 << 10;    // which is at most this: tests hold the compiled kernels to it

inline void launch(const void* function, dim3 grid, dim3 block, size_t shared_bytes,
                   std::function<void()> body, unsigned blocks_of_cluster = 1) {
  grid_size = grid, block_size = block, kernel = std::move(body);
  error.clear();
  size_t count = size_t(block.x) * block.y * block.z;
  if (count == 0 || count > 1024) throw Error("a block has 1 to 1024 threads, not " + std::to_string(count));
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) throw Error("a grid has at least one block");
  if (grid.y > 65535 || grid.z > 65535) throw Error("gridDim.y and gridDim.z are at most 65535");
  if (grid.x > 0x7fffffff) throw Error("gridDim.x is at most 2^31 - 1");
  const char* text = std::getenv("CUDAHOST_SHARED_BYTES");
  const size_t most = text ? size_t(std::atoi(text)) : size_t(227) << 10;
  if (shared_bytes > most)
    throw Error("a block has at most " + std::to_string(most) + " bytes of shared memory, not " +
                std::to_string(shared_bytes));
  if (shared_bytes + kStatic > kUnasked && allowed[function] < shared_bytes)
    throw Error("shared memory above 48 KB, the static part included, has to be asked for: " +
                std::to_string(shared_bytes) + " bytes");
  if (blocks_of_cluster == 0 || blocks_of_cluster > 8 || grid.y % blocks_of_cluster)
    throw Error("a cluster has 1 to 8 blocks, and a grid a whole number of clusters");
  CUDAHOST_METERED(cudahost_meter_launch(function);)
  cluster.resize(blocks_of_cluster);
  for (Block& one : cluster) one.threads.resize(count);
  std::vector<int> order(size_t(grid.x) * grid.y * grid.z / blocks_of_cluster);
  for (size_t i = 0; i < order.size(); ++i) order[i] = int(i);
  if (seed) std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  for (int number : order) {
    const unsigned x = number % grid.x, first = number / grid.x * blocks_of_cluster;
    for (unsigned i = 0; i < blocks_of_cluster; ++i) {
      cluster[i].index = {x, (first + i) % grid.y, (first + i) / grid.y};
      cluster[i].number = int((first + i) * grid.x + x);
    }
    run_cluster(shared_bytes);
    if (!error.empty()) {
      cluster.clear();
      throw Error(error);
    }
  }
}

// ---- warp operations

template <class V>
uint64_t to_bits(V value) {
  static_assert(sizeof(V) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(V));
  return bits;
}

template <class V>
V from_bits(uint64_t bits) {
  V value;
  std::memcpy(&value, &bits, sizeof(V));
  return value;
}

// Brings `value` to a warp operation over `mask`; returns what all lanes brought.
inline const uint64_t* exchange(unsigned mask, uint64_t value, bool orders_memory = false) {
  if (!(mask >> (current->linear & 31) & 1)) throw Error("the calling lane is not in its own mask" + where());
  CUDAHOST_QUIET(Begin);
  current->mask = mask;
  current->value = value;
  CUDAHOST_QUIET(End);
  wait(State::at_warp_operation, orders_memory);
  return current->lane_values;
}

template <class V>
V shuffle(unsigned mask, V value, int source, bool inside) {
  const uint64_t* values = exchange(mask, to_bits(value));
  if (!inside) return value;
  if (!(mask >> source & 1))
    throw Error("a shuffle reads lane " + std::to_string(source) + " outside its mask" + where());
  return from_bits<V>(values[source]);
}

inline int lane() { return current->linear & 31; }

// ---- atomics

template <class V, class F>
V atomically(V* target, F&& change) {
  using Bits =
      std::conditional_t<sizeof(V) == 8, uint64_t, std::conditional_t<sizeof(V) == 4, uint32_t, uint16_t>>;
  auto* bits = reinterpret_cast<Bits*>(target);
  Bits expected = __atomic_load_n(bits, __ATOMIC_RELAXED), desired;
  for (;;) {
    V old, changed;
    std::memcpy(&old, &expected, sizeof old);
    changed = change(old);
    std::memcpy(&desired, &changed, sizeof desired);
    if (__atomic_compare_exchange_n(bits, &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
      return old;
  }
}

}  // namespace cudahost

// ---- the CUDA language

#undef __shared__
#define __shared__ static  // blocks run one after another, so a static is per block
#undef __launch_bounds__
#define __launch_bounds__(...)
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  cudahost::launch(cudahost::address_of(kernel), grid, block, shared_bytes, [=] { (kernel)(__VA_ARGS__); })
#define LAUNCH_CLUSTERS(kernel, blocks, grid, block, shared_bytes, stream, ...) \
  cudahost::launch(                                                             \
      cudahost::address_of(kernel), grid, block, shared_bytes, [=] { (kernel)(__VA_ARGS__); }, blocks)
#define DYN_SMEM(T, name) T* name = reinterpret_cast<T*>(cudahost::current_block->shared_memory.get())

#define threadIdx (cudahost::current->index)
#define blockIdx (cudahost::current_block->index)
#define blockDim (cudahost::block_size)
#define gridDim (cudahost::grid_size)
#define warpSize 32

inline void __syncthreads() { cudahost::wait(cudahost::State::at_block_barrier, true); }
inline void wait_for_cluster() { cudahost::wait(cudahost::State::at_cluster_barrier, true); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cudahost::exchange(mask, 0, true); }
inline unsigned __activemask() {
  throw cudahost::Error("__activemask says nothing that a kernel may rely on");
}

template <class V>
V __shfl_sync(unsigned mask, V value, int source, int width = 32) {
  int first = cudahost::lane() & ~(width - 1);
  return cudahost::shuffle(mask, value, first + (source & (width - 1)), true);
}
template <class V>
V __shfl_xor_sync(unsigned mask, V value, int bits, int width = 32) {
  int source = cudahost::lane() ^ bits;
  return cudahost::shuffle(mask, value, source, source < (cudahost::lane() & ~(width - 1)) + width);
}
template <class V>
V __shfl_down_sync(unsigned mask, V value, unsigned distance, int width = 32) {
  int source = cudahost::lane() + int(distance);
  return cudahost::shuffle(mask, value, source, source < (cudahost::lane() & ~(width - 1)) + width);
}
template <class V>
V __shfl_up_sync(unsigned mask, V value, unsigned distance, int width = 32) {
  int source = cudahost::lane() - int(distance);
  return cudahost::shuffle(mask, value, source, source >= (cudahost::lane() & ~(width - 1)));
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* values = cudahost::exchange(mask, predicate != 0);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if ((mask >> lane & 1) && values[lane]) votes |= 1u << lane;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
template <class V>
V __reduce_add_sync(unsigned mask, V value) {
  const uint64_t* values = cudahost::exchange(mask, cudahost::to_bits(value));
  V sum = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) sum += cudahost::from_bits<V>(values[lane]);
  return sum;
}

template <class V>
V atomicAdd(V* target, std::type_identity_t<V> value) {
  return cudahost::atomically(target, [=](V old) { return V(old + value); });
}
template <class V>
V atomicMax(V* target, std::type_identity_t<V> value) {
  return cudahost::atomically(target, [=](V old) { return std::max(old, V(value)); });
}
template <class V>
V atomicMin(V* target, std::type_identity_t<V> value) {
  return cudahost::atomically(target, [=](V old) { return std::min(old, V(value)); });
}
template <class V>
V atomicExch(V* target, std::type_identity_t<V> value) {
  return cudahost::atomically(target, [=](V) { return V(value); });
}
template <class V>
V atomicCAS(V* target, std::type_identity_t<V> expected, std::type_identity_t<V> desired) {
  return cudahost::atomically(target, [=](V old) { return old == V(expected) ? V(desired) : old; });
}
// Wraps to zero past `last`, as the hardware's.
inline unsigned atomicInc(unsigned* target, unsigned last) {
  return cudahost::atomically(target, [=](unsigned old) { return old >= last ? 0u : old + 1; });
}

template <class V>
V __ldg(const V* address) {
  return *address;
}
template <class V>
V __ldcs(const V* address) {
  return *address;
}
template <class V>
V __ldcg(const V* address) {
  return *address;
}
template <class V>
V __ldca(const V* address) {
  return *address;
}
template <class V>
void __stcs(V* address, std::type_identity_t<V> value) {
  *address = value;
}
template <class V>
void __stcg(V* address, std::type_identity_t<V> value) {
  *address = value;
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __trap() { throw cudahost::Error("__trap" + cudahost::where()); }

// The fast ones round in between as the hardware's do, by which their error grows with the exponent.
inline float __log2f(float x) { return std::log2(x); }
inline float __logf(float x) { return __log2f(x) * 0.693147181f; }
inline float __expf(float x) { return std::exp2(x * 1.44269504f); }
inline float __powf(float x, float y) { return std::exp2(y * __log2f(x)); }
inline float __fdividef(float x, float y) {
  return std::fabs(y) > 0x1p126f && std::fabs(x) < HUGE_VALF ? x * 0.0f : x * (1 / y);
}
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
// Never fused with a sum; the rest is compiled so that it is, as nvcc does.
inline float __fmul_rn(float x, float y) {
  volatile float product = x * y;
  return product;
}
inline double __dmul_rn(double x, double y) {
  volatile double product = x * y;
  return product;
}
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __saturatef(float x) { return x > 0 ? std::min(x, 1.0f) : 0.0f; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline int __float_as_int(float x) { return cudahost::from_bits<int>(cudahost::to_bits(x)); }
inline float __int_as_float(int x) { return cudahost::from_bits<float>(cudahost::to_bits(x)); }
inline unsigned __float_as_uint(float x) { return cudahost::from_bits<unsigned>(cudahost::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return cudahost::from_bits<float>(cudahost::to_bits(x)); }
inline long long __double_as_longlong(double x) {
  return cudahost::from_bits<long long>(cudahost::to_bits(x));
}
inline double __longlong_as_double(long long x) { return cudahost::from_bits<double>(cudahost::to_bits(x)); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

// ---- the part of the runtime that launchers use

extern "C" {
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) cudahost::allowed[kernel] = size_t(value);
  return cudaSuccess;
}
// A small GPU: code that sizes its grid by the hardware then takes several turns even for small inputs.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      return *value = 4, cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return *value = 2048, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *value = 227 << 10, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      return *value = 9, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      return *value = 0, cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}
inline cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  return std::memset(target, value, bytes), cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  return std::memcpy(target, source, bytes), cudaSuccess;
}
}
