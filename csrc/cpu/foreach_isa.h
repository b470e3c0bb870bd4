// Compiles a kernel file once per instruction set and lets it pick one at run time.
//
// A kernel file looks like this:
//   #define PETUNE_FILE "residual_norm.cpp"
//   #include "foreach_isa.h"                 // includes PETUNE_FILE once per set, with PETUNE_ISA defined
//   #ifdef PETUNE_ISA
//   #include "vec.h"
//   namespace petune::cpu::PETUNE_ISA { ... kernels ... }
//   #else
//   ... the dispatching function, which calls PETUNE_DISPATCH(kernel)(args) ...
//   #endif
// PETUNE_LEVEL is 2, 1, 0 for avx512, avx2, baseline: g++ does not define __AVX512F__ and the like under a target
// pragma. Every function of a pass lives in that pass's namespace, so no two instruction sets share one symbol.
// Standard headers are included here, before any target pragma.
#ifndef PETUNE_ISA

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "../common/ops.h"
#include "../common/philox.h"
#include "isa.h"
#include "parallel.h"

#if PETUNE_X86
#include <immintrin.h>

#define PETUNE_ISA avx512
#define PETUNE_LEVEL 2
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2,prefer-vector-width=512")
#endif
#include PETUNE_FILE
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef PETUNE_ISA
#undef PETUNE_LEVEL

#define PETUNE_ISA avx2
#define PETUNE_LEVEL 1
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
#endif
#include PETUNE_FILE
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef PETUNE_ISA
#undef PETUNE_LEVEL
#endif  // PETUNE_X86

#define PETUNE_ISA baseline
#define PETUNE_LEVEL 0
#include PETUNE_FILE
#undef PETUNE_ISA
#undef PETUNE_LEVEL

#if PETUNE_X86
#define PETUNE_DISPATCH(kernel)                                                       \
  (::petune::cpu::isa() == ::petune::cpu::Isa::avx512 ? ::petune::cpu::avx512::kernel \
   : ::petune::cpu::isa() == ::petune::cpu::Isa::avx2 ? ::petune::cpu::avx2::kernel   \
                                                      : ::petune::cpu::baseline::kernel)
#else
#define PETUNE_DISPATCH(kernel) ::petune::cpu::baseline::kernel
#endif

#endif  // PETUNE_ISA
