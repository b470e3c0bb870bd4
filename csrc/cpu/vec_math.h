// Functions of a vector of floats: exp, the normal distribution, the logistic function, reductions, and their select.
// Included after vec.h, once per instruction set. Polynomials are minimax fits by iteratively reweighted least squares;
// the errors named are theirs, fp32 rounding comes on top.

namespace petune::cpu::PETUNE_ISA {

PETUNE_INLINE f32v select(i32v mask, f32v yes, f32v no) { return mask ? yes : no; }

PETUNE_INLINE f32v magnitude(f32v v) { return (f32v)((u32v)v & 0x7FFFFFFFu); }

PETUNE_INLINE f32v larger(f32v a, f32v b) { return select(a > b, a, b); }

// The smaller one, b where either is NaN.
PETUNE_INLINE f32v smaller(f32v a, f32v b) {
#if PETUNE_LEVEL == 2
  return (f32v)_mm512_min_ps((__m512)a, (__m512)b);
#elif PETUNE_LEVEL == 1
  return (f32v)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return select(a < b, a, b);
#endif
}

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

// 2^x for x <= 0, for what is rounded to 16 bits: relative error 2^-18, 0 below the normal range. NaN stays NaN if its
// last nine bits are 0, as of those that arithmetic makes or 16 bits hold.
PETUNE_INLINE f32v exp2_short(f32v x) {
  const f32v magic = splat(12582912.0f), shifted = x + magic, r = x - (shifted - magic);
  f32v g = r * 0.00957038812f + 0.0559180975f;
  g = g * r + 0.240247354f;
  g = g * r + 0.693121791f;
  g = g * r + 0.999999285f;
  return select(x < -125.0f, f32v{}, (f32v)((u32v)g + ((u32v)shifted << 23)));
}

// exp(x) for x <= 0, as exact as a result that is stored as X needs.
template <class X>
PETUNE_INLINE f32v exp_for(f32v x) {
  return sizeof(X) == 2 ? exp2_short(x * 1.44269504f) : exp_nonpositive(x);
}

// Phi(u) and phi(u), the normal distribution and its density, from one exponential. With a = |u|,
//   Phi(-a) = exp(-a^2 / 2) * R(a),  R(a) * (a + 3.5) = polynomial in t = (a - 3.5) / (a + 3.5),
// which keeps the relative accuracy of the lower tail that 1 + erf(u / sqrt 2) cancels away. Relative error 2^-26.9.
struct Normal {
  f32v cdf, density;
};

template <class X>
PETUNE_INLINE Normal normal(f32v u) {
  const f32v a = magnitude(u);
  const auto both = [&](f32v tail, f32v e) { return Normal{select(u > 0.0f, 1.0f - tail, tail), e * 0.398942280f}; };
  if constexpr (sizeof(X) == 2) {
    const f32v e = exp2_short(a * a * -0.721347520f), bounded = smaller(a, splat(16.0f));
    f32v r = bounded * 1.11488816e-05f + -0.000242024646f;
    r = r * bounded + 0.00229333923f;
    r = r * bounded + -0.0126468707f;
    r = r * bounded + 0.0460867696f;
    r = r * bounded + -0.121002942f;
    r = r * bounded + 0.245292664f;
    r = r * bounded + -0.398182362f;
    r = r * bounded + 0.499978215f;
    return both(e * r, e);
  }
  // a^2 = high^2 + (a - high)(a + high), the first of which is exact: exp would amplify a rounded square
  const f32v high = (f32v)((u32v)a & 0xFFFFF000u);
  const f32v e = exp_nonpositive(high * high * -0.5f, (a - high) * (a + high) * -0.5f);
  const f32v bounded = smaller(a, splat(16.0f));  // exp is 0 there; keeps inf out of the polynomial
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
  return both(e * (r * q), e);
}

// 1 / (1 + exp(-u)) and its complement, neither of which cancels.
struct Logistic {
  f32v value, complement;
};

template <class X>
PETUNE_INLINE Logistic logistic(f32v u) {
  const f32v e = exp_for<X>(-magnitude(u)), q = 1.0f / (1.0f + e), small = e * q;
  const i32v positive = u > 0.0f;
  return {select(positive, q, small), select(positive, small, q)};
}

}  // namespace petune::cpu::PETUNE_ISA
