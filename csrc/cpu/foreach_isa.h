// Compiles a kernel file once per instruction set.
//
// A kernel file `f.cpp` defines FASTREG_FILE as its own name and includes this header once, which includes
// the file again for each instruction set with FASTREG_ISA defined (`baseline`, `avx2`, `avx512`) and the
// compiler told to use that set. What stands under `#ifdef FASTREG_ISA` belongs in `namespace
// fastreg::FASTREG_ISA`, so no code of one level can be linked into another. `FASTREG_PICK(name)` is the
// level of this machine. Headers must be included before, outside of any level: inline functions of the
// standard library stay baseline.
#ifndef FASTREG_FILE
#error "define FASTREG_FILE as the file to compile for each instruction set"
#endif

#define FASTREG_ISA baseline
#define FASTREG_VECTOR_BYTES 16
#include FASTREG_FILE
#undef FASTREG_ISA
#undef FASTREG_VECTOR_BYTES

#if defined(__x86_64__)

#define FASTREG_ISA avx2
#define FASTREG_VECTOR_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include FASTREG_FILE
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef FASTREG_ISA
#undef FASTREG_VECTOR_BYTES

#define FASTREG_ISA avx512
#define FASTREG_VECTOR_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#include FASTREG_FILE
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef FASTREG_ISA
#undef FASTREG_VECTOR_BYTES

#define FASTREG_PICK(name)                                             \
  (fastreg::capability() == fastreg::Capability::avx512 ? avx512::name \
   : fastreg::capability() == fastreg::Capability::avx2 ? avx2::name   \
                                                        : baseline::name)
#else
#define FASTREG_PICK(name) (baseline::name)
#endif
