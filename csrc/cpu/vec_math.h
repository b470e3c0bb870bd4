// Functions of a vector of floats: exp, the normal distribution, the logistic function, reductions, and their select.
// Included after vec.h, once per instruction set. Polynomials are minimax fits by iteratively reweighted least squares;
// the errors named are theirs, fp32 rounding comes on top.

namespace petune::cpu::PETUNE_ISA {

PETUNE_INLINE f32v select(i32v mask, f32v yes, f32v no) { return mask ? yes : no; }

PETUNE_INLINE f32v magnitude(f32v v) { return (f32v)((u32v)v & 0x7FFFFFFFu); }

PETUNE_INLINE f32v larger(f32v a, f32v b) { return select(a > b, a, b); }

PETUNE_INLINE float largest(f32v v) {
  return folded(v, [](f32v a, f32v b) { return larger(a, b); });
}

// exp(x + correction) for x <= 0 and a correction of at most 0.1; 0 below the normal range, exactly 0 at -inf, NaN
// stays NaN. Relative error 2^-28.
PETUNE_INLINE f32v exp_nonpositive(f32v x, f32v correction = f32v{}) {
  const f32v magic = splat(12582912.0f);         // 1.5 * 2^23: adding it rounds to an integer
  const f32v shifted = x * 1.44269504f + magic;  // log2(e)
  const f32v n = shifted - magic;                // x = n * ln 2 + r, ln 2 in two pieces
  const f32v r = (x - n * 0.693359375f) - n * -2.12194440e-4f + correction;
  f32v g = r * 0.00138131448f + 0.00836941879f;
  g = g * r + 0.041668456f;
  g = g * r + 0.166665152f;
  g = g * r + 0.49999994f;
  const f32v fraction = (g * r) * r + r + 1.0f;
  const u32v power = ((u32v)shifted + 127u) << 23;  // the integer stands in the low bits; magic's own fall out
  return select(x < -87.0f, f32v{}, fraction * (f32v)power);
}

// Phi(u) and phi(u), the normal distribution and its density, from one exponential. With a = |u|,
//   Phi(-a) = exp(-a^2 / 2) * R(a),  R(a) * (a + 3.5) = polynomial in t = (a - 3.5) / (a + 3.5),
// which keeps the relative accuracy of the lower tail that 1 + erf(u / sqrt 2) cancels away. Relative error 2^-26.9.
struct Normal {
  f32v cdf, density;
};

PETUNE_INLINE Normal normal(f32v u) {
  const f32v a = magnitude(u);
  // a^2 = high^2 + (a - high)(a + high), the first of which is exact: exp would amplify a rounded square
  const f32v high = (f32v)((u32v)a & 0xFFFFF000u);
  const f32v e = exp_nonpositive(high * high * -0.5f, (a - high) * (a + high) * -0.5f);
  const f32v bounded = select(a < 16.0f, a, splat(16.0f));  // exp is 0 there; keeps inf out of the polynomial
  const f32v q = 1.0f / (bounded + 3.5f), t = (bounded - 3.5f) * q;
  f32v r = t * 0.000108692955f + 0.000418322423f;
  r = r * t + -0.000495039218f;
  r = r * t + -0.00317282788f;
  r = r * t + 0.00649372675f;
  r = r * t + 0.017405821f;
  r = r * t + -0.116053171f;
  r = r * t + 0.315425098f;
  r = r * t + -0.565561712f;
  r = r * t + 0.744416058f;
  const f32v tail = e * (r * q);
  return {select(u > 0.0f, 1.0f - tail, tail), e * 0.398942280f};
}

// 1 / (1 + exp(-u)) and its complement, neither of which cancels.
struct Logistic {
  f32v value, complement;
};

PETUNE_INLINE Logistic logistic(f32v u) {
  const f32v e = exp_nonpositive(-magnitude(u)), q = 1.0f / (1.0f + e), small = e * q;
  const i32v positive = u > 0.0f;
  return {select(positive, q, small), select(positive, small, q)};
}

}  // namespace petune::cpu::PETUNE_ISA
