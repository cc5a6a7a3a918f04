// Counts the global memory accesses of kernels that run on the host, and finds races between blocks.
//
// The kernels are compiled with -fsanitize=thread, which puts a call before every access, and linked with
// this file instead of TSan's runtime. Only accesses to the arrays that were passed to the launcher count:
// local variables, shared memory and the harness itself are left out. The compiler optimises first (-O1): a
// value that it keeps in a register is not loaded twice, as on the GPU.
#include "cudahost_meter.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace {

using cudahost::Buffer;
using cudahost::Metered;

constexpr int nobody = -1, several = -2;

struct WarpLoads {  // of one element, by one instruction, by the warp that executed it last
  const void* instruction;
  int warp;
  unsigned char most, by_lane[32];

  bool counts(int thread) {
    if (warp != thread / 32) *this = {instruction, thread / 32, 0, {}};
    unsigned char& mine = by_lane[thread % 32];
    if (++mine <= most) return false;
    most = mine;
    return true;
  }
};

bool counts(std::vector<WarpLoads>& loads, const void* instruction, int thread) {
  for (WarpLoads& known : loads)
    if (known.instruction == instruction) return known.counts(thread);
  loads.push_back({instruction, -1, 0, {}});
  return loads.back().counts(thread);
}

struct State {  // of one buffer during one launch
  std::vector<int> writer, reader;
  std::vector<bool> atomic;
  std::vector<std::vector<WarpLoads>> warp_loads;
};

std::vector<Buffer> buffers;  // sorted by address
std::vector<Metered> launches;
std::vector<State> states;
int block = 0, thread = 0;  // thread: over the whole grid, so that no two blocks share a warp
size_t blocks_so_far = 0;   // this one too: one runs after the other
std::map<uintptr_t, std::set<int>> released;  // through this address, what these blocks did is known
std::map<int, std::set<int>> acquired;        // block -> blocks that it comes after
std::string race;

bool conflicts(int owner) {
  if (owner == nobody || owner == block) return false;
  auto known = acquired.find(block);
  if (known == acquired.end()) return true;
  if (owner == several) return known->second.size() + !known->second.count(block) < blocks_so_far;
  return !known->second.count(owner);
}

void complain(const Buffer& buffer, size_t unit, int other, const char* did, const char* other_did) {
  if (!race.empty()) return;
  std::string who = other == several ? "several blocks" : "block number " + std::to_string(other);
  race = "race: block number " + std::to_string(block) + " " + did + " element " + std::to_string(unit) +
         " of argument " + std::to_string(buffer.argument) + ", which " + who + " " + other_did;
}

enum Kind { load, store, update };

void touch(const void* address, size_t size, Kind kind, const void* instruction) {
  if (launches.empty()) return;
  auto at = reinterpret_cast<uintptr_t>(address);
  auto after = std::upper_bound(buffers.begin(), buffers.end(), at,
                                [](uintptr_t value, const Buffer& buffer) { return value < buffer.start; });
  if (after == buffers.begin()) return;
  const size_t index = size_t(after - buffers.begin()) - 1;
  const Buffer& buffer = buffers[index];
  if (at >= buffer.start + buffer.size) return;
  Metered& launch = launches.back();
  State& state = states[index];
  if (kind != load) (kind == store ? launch.stored : launch.atomic) += size;
  if (kind != update) ++(kind == load ? launch.load_widths : launch.store_widths)[8 * size];
  const size_t first = (at - buffer.start) / buffer.unit;
  const size_t last = std::min(at + size - 1 - buffer.start, buffer.size - 1) / buffer.unit;
  for (size_t unit = first; unit <= last; ++unit) {
    if (kind == load) {
      if (counts(state.warp_loads[unit], instruction, thread)) {
        ++launch.loads[index][unit];
        launch.loaded += std::min(size, buffer.unit);
      }
      if (conflicts(state.writer[unit])) complain(buffer, unit, state.writer[unit], "loads", "wrote");
      int& reader = state.reader[unit];
      reader = reader == nobody || reader == block ? block : several;
      continue;
    }
    ++launch.stores[index][unit];
    if (kind == store || !state.atomic[unit]) {
      const char* did = kind == store ? "stores to" : "atomically updates";
      if (conflicts(state.writer[unit])) complain(buffer, unit, state.writer[unit], did, "wrote");
      if (conflicts(state.reader[unit])) complain(buffer, unit, state.reader[unit], did, "read");
    }
    if (kind == update) state.atomic[unit] = true;
    state.writer[unit] = block;
  }
  if (kind == update) {
    acquired[block].insert(released[at].begin(), released[at].end());
    released[at].insert(acquired[block].begin(), acquired[block].end());
    released[at].insert(block);
  }
}

void begin(const Buffer* given, int count) {
  buffers.assign(given, given + count);
  std::sort(buffers.begin(), buffers.end(), [](auto& a, auto& b) { return a.start < b.start; });
  launches.clear();
  race.clear();
}

void end(std::vector<Buffer>& out_buffers, std::vector<Metered>& out) {
  out_buffers = std::move(buffers);
  out = std::move(launches);
  buffers.clear(), launches.clear(), states.clear();
}

}  // namespace

extern "C" {
__attribute__((visibility("default"))) cudahost::Meter cudahost_meter = {begin, end};

void cudahost_meter_launch(const void* kernel) {
  Metered launch;
  launch.kernel = kernel;
  states.clear();
  for (const Buffer& buffer : buffers) {
    const size_t units = (buffer.size + buffer.unit - 1) / buffer.unit;
    launch.loads.emplace_back(units), launch.stores.emplace_back(units);
    states.push_back({std::vector<int>(units, nobody), std::vector<int>(units, nobody),
                      std::vector<bool>(units), std::vector<std::vector<WarpLoads>>(units)});
  }
  launches.push_back(std::move(launch));
  released.clear(), acquired.clear();
  blocks_so_far = 0;
}

void cudahost_meter_block(int number, bool begins) { block = number, blocks_so_far += begins; }
// What these blocks have done is known to all of them.
void cudahost_meter_cluster(const int* numbers, int count) {
  for (int i = 0; count > 1 && i < count; ++i) acquired[numbers[i]].insert(numbers, numbers + count);
}
void cudahost_meter_thread(int number) { thread = block * 1024 + number; }
const char* cudahost_meter_race() { return race.empty() ? nullptr : race.c_str(); }

// ---- what -fsanitize=thread calls
#define ACCESS(size)                                                                                 \
  void __tsan_read##size(void* p) { touch(p, size, load, __builtin_return_address(0)); }             \
  void __tsan_write##size(void* p) { touch(p, size, store, __builtin_return_address(0)); }           \
  void __tsan_unaligned_read##size(void* p) { touch(p, size, load, __builtin_return_address(0)); }   \
  void __tsan_unaligned_write##size(void* p) { touch(p, size, store, __builtin_return_address(0)); } \
  void __tsan_volatile_read##size(void* p) { touch(p, size, load, __builtin_return_address(0)); }    \
  void __tsan_volatile_write##size(void* p) { touch(p, size, store, __builtin_return_address(0)); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* p, size_t size) { touch(p, size, load, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t size) { touch(p, size, store, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_atomic_thread_fence(int) {}
void __tsan_atomic_signal_fence(int) {}

// cudahost.h makes every atomic of a load and a compare-exchange, of which the latter counts.
#define ATOMIC(bits)                                                                                    \
  uint##bits##_t __tsan_atomic##bits##_load(const uint##bits##_t* p, int) { return *p; }                \
  int __tsan_atomic##bits##_compare_exchange_strong(uint##bits##_t* p, uint##bits##_t* expected,        \
                                                    uint##bits##_t desired, int, int) {                 \
    if (*p != *expected) return *expected = *p, 0;                                                      \
    touch(p, bits / 8, update, __builtin_return_address(0));                                            \
    return *p = desired, 1;                                                                             \
  }                                                                                                     \
  uint##bits##_t __tsan_atomic##bits##_compare_exchange_val(uint##bits##_t* p, uint##bits##_t expected, \
                                                            uint##bits##_t desired, int a, int b) {     \
    __tsan_atomic##bits##_compare_exchange_strong(p, &expected, desired, a, b);                         \
    return expected;                                                                                    \
  }
ATOMIC(16)
ATOMIC(32)
ATOMIC(64)
}
