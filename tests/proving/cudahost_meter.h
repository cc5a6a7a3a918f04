// What the bridge and the meter say to each other. See cudahost_meter.cpp.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

namespace cudahost {

struct Buffer {  // an array that was passed to a launcher
  uintptr_t start;
  size_t size, unit;  // bytes of all of it, bytes of an element
  int argument;
};

struct Metered {  // one kernel launch
  const void* kernel;
  long long loaded = 0, stored = 0, atomic = 0;        // bytes
  std::map<int, long long> load_widths, store_widths;  // bits -> accesses
  std::vector<std::vector<int>> loads, stores;         // per buffer and element
};

struct Meter {
  void (*begin)(const Buffer* buffers, int count);
  void (*end)(std::vector<Buffer>& buffers, std::vector<Metered>& launches);
};

}  // namespace cudahost
