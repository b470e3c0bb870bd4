// __half as bits, with CUDA's own names for its conversions; round to nearest, ties to even, subnormals kept.
#pragma once
#include "cuda_runtime.h"

struct __half {
  unsigned short bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
inline unsigned short __half_as_ushort(__half v) { return v.bits; }
inline __half __ushort_as_half(unsigned short v) { return {v}; }
inline float __half2float(__half v) {
  const unsigned sign = (v.bits & 0x8000u) << 16, exponent = v.bits >> 10 & 0x1fu, mantissa = v.bits & 0x3ffu;
  if (exponent == 0x1f) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent != 0) return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}
inline __half __float2half_rn(float f) {
  const unsigned v = __float_as_uint(f), sign = v >> 16 & 0x8000u, magnitude = v & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x477ff000u) return {static_cast<unsigned short>(sign | 0x7c00u)};  // 65520 rounds up to infinity
  if (magnitude < 0x38800000u) {  // below 2^-14: steps of 2^-24; the sum below rounds as an fp32 sum does
    const float shifted = __uint_as_float(magnitude) + 0.5f;
    return {static_cast<unsigned short>(sign | (__float_as_uint(shifted) - 0x3f000000u))};
  }
  return {static_cast<unsigned short>(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13))};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
