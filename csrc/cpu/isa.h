// Which instruction set the CPU kernels run on. PETUNE_ISA=avx512|avx2|baseline in the environment lowers it (for
// tests).
#pragma once
#include <cstdlib>
#include <cstring>

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define PETUNE_X86 1
#else
#define PETUNE_X86 0
#endif

namespace petune::cpu {

enum class Isa { baseline, avx2, avx512 };

inline Isa isa() {
  static const Isa best = [] {
    Isa have = Isa::baseline;
#if PETUNE_X86
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
      have = Isa::avx2;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        have = Isa::avx512;
    }
#endif
    const char* asked = std::getenv("PETUNE_ISA");
    if (asked && !std::strcmp(asked, "baseline")) return Isa::baseline;
    if (asked && !std::strcmp(asked, "avx2") && have == Isa::avx512) return Isa::avx2;
    return have;
  }();
  return best;
}

#if PETUNE_X86
inline const bool kHasBf16 = __builtin_cpu_supports("avx512bf16");
#endif

inline const char* isa_name() { return isa() == Isa::avx512 ? "avx512" : isa() == Isa::avx2 ? "avx2" : "baseline"; }

}  // namespace petune::cpu
