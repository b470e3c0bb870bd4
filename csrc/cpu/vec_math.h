// Functions of sixteen floats: exp, the normal distribution, the logistic function, reductions, and their select.
// Included after vec.h, once per instruction set. Polynomials are minimax fits by iteratively reweighted least squares;
// the errors named are theirs, fp32 rounding comes on top.

#ifndef PETUNE_LEVEL  // 2, 1, 0; g++ does not define __AVX512F__ and the like under a target pragma
#define PETUNE_LEVEL_avx512 2
#define PETUNE_LEVEL_avx2 1
#define PETUNE_LEVEL_baseline 0
#define PETUNE_JOIN_(a, b) a##b
#define PETUNE_JOIN(a, b) PETUNE_JOIN_(a, b)
#define PETUNE_LEVEL PETUNE_JOIN(PETUNE_LEVEL_, PETUNE_ISA)
#endif

namespace petune::cpu::PETUNE_ISA {

PETUNE_INLINE f32x16 select(i32x16 mask, f32x16 yes, f32x16 no) { return mask ? yes : no; }

PETUNE_INLINE f32x16 magnitude(f32x16 v) { return (f32x16)((u32x16)v & 0x7FFFFFFFu); }

PETUNE_INLINE f32x16 larger(f32x16 a, f32x16 b) { return select(a > b, a, b); }

template <int width>
PETUNE_INLINE f32x16 rotated(f32x16 v) {
  return __builtin_shufflevector(v, v, width, width + 1, width + 2, width + 3, width + 4, width + 5, width + 6,
                                 width + 7, width + 8, width + 9, width + 10, width + 11, width + 12, width + 13,
                                 width + 14, width + 15);
}

PETUNE_INLINE float largest(f32x16 v) {
  v = larger(v, rotated<8>(v));
  v = larger(v, rotated<4>(v));
  v = larger(v, rotated<2>(v));
  return larger(v, rotated<1>(v))[0];
}

PETUNE_INLINE float total(f32x16 v) {
  v += rotated<8>(v);
  v += rotated<4>(v);
  v += rotated<2>(v);
  return (v + rotated<1>(v))[0];
}

// exp(x + correction) for x <= 0 and a correction of at most 0.1; 0 below the normal range, exactly 0 at -inf, NaN
// stays NaN. Relative error 2^-28.
PETUNE_INLINE f32x16 exp_nonpositive(f32x16 x, f32x16 correction = f32x16{}) {
  const f32x16 magic = splat(12582912.0f);              // 1.5 * 2^23: adding it rounds to an integer
  const f32x16 shifted = x * 1.44269504f + magic;       // log2(e)
  const f32x16 n = shifted - magic;                     // x = n * ln 2 + r, ln 2 in two pieces
  const f32x16 r = (x - n * 0.693359375f) - n * -2.12194440e-4f + correction;
  f32x16 g = r * 0.00138131448f + 0.00836941879f;
  g = g * r + 0.041668456f;
  g = g * r + 0.166665152f;
  g = g * r + 0.49999994f;
  const f32x16 fraction = (g * r) * r + r + 1.0f;
  const u32x16 power = ((u32x16)shifted + 127u) << 23;  // the integer stands in the low bits; magic's own fall out
  return select(x < -87.0f, f32x16{}, fraction * (f32x16)power);
}

// Phi(u) and phi(u), the normal distribution and its density, from one exponential. With a = |u|,
//   Phi(-a) = exp(-a^2 / 2) * R(a),  R(a) * (a + 3.5) = polynomial in t = (a - 3.5) / (a + 3.5),
// which keeps the relative accuracy of the lower tail that 1 + erf(u / sqrt 2) cancels away. Relative error 2^-26.9.
struct Normal {
  f32x16 cdf, density;
};

PETUNE_INLINE Normal normal(f32x16 u) {
  const f32x16 a = magnitude(u);
  // a^2 = high^2 + (a - high)(a + high), the first of which is exact: exp would amplify a rounded square
  const f32x16 high = (f32x16)((u32x16)a & 0xFFFFF000u);
  const f32x16 e = exp_nonpositive(high * high * -0.5f, (a - high) * (a + high) * -0.5f);
  const f32x16 bounded = select(a < 16.0f, a, splat(16.0f));  // exp is 0 there; keeps inf out of the polynomial
  const f32x16 q = 1.0f / (bounded + 3.5f), t = (bounded - 3.5f) * q;
  f32x16 r = t * 0.000108692955f + 0.000418322423f;
  r = r * t + -0.000495039218f;
  r = r * t + -0.00317282788f;
  r = r * t + 0.00649372675f;
  r = r * t + 0.017405821f;
  r = r * t + -0.116053171f;
  r = r * t + 0.315425098f;
  r = r * t + -0.565561712f;
  r = r * t + 0.744416058f;
  const f32x16 tail = e * (r * q);
  return {select(u > 0.0f, 1.0f - tail, tail), e * 0.398942280f};
}

// 1 / (1 + exp(-u)) and its complement, neither of which cancels.
struct Logistic {
  f32x16 value, complement;
};

PETUNE_INLINE Logistic logistic(f32x16 u) {
  const f32x16 e = exp_nonpositive(-magnitude(u)), q = 1.0f / (1.0f + e), small = e * q;
  const i32x16 positive = u > 0.0f;
  return {select(positive, q, small), select(positive, small, q)};
}

}  // namespace petune::cpu::PETUNE_ISA
