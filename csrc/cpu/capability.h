// Which instruction set this process uses.
#pragma once
#include <cstdint>

namespace fastreg {
enum class Capability : int64_t { baseline = 0, avx2 = 1, avx512 = 2 };

// What the processor has, or less if FASTREG_CPU_CAPABILITY says so (baseline, avx2, avx512). Read once.
Capability capability();
}  // namespace fastreg
