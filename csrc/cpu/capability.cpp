#include "cpu/capability.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace fastreg {
namespace {
Capability detect() {
  auto best = Capability::baseline;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = Capability::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      best = Capability::avx512;
  }
#endif
  const char* asked = std::getenv("FASTREG_CPU_CAPABILITY");
  if (asked == nullptr) return best;
  if (std::strcmp(asked, "baseline") == 0) return Capability::baseline;
  if (std::strcmp(asked, "avx2") == 0) return std::min(best, Capability::avx2);
  return best;
}
}  // namespace

Capability capability() {
  static const Capability found = detect();
  return found;
}

int64_t cpu_capability() { return static_cast<int64_t>(capability()); }
}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&fastreg::cpu_capability));
}
