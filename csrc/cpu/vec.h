// Rows in registers: loads and stores of fp32 and bf16, and the dropout multipliers.
// Included once per instruction set by foreach_isa.h's kernel files (no include guard on purpose). A vector is one
// register of the set: wider ones the compiler lowers through memory.

// Instructions beyond the AVX-512 pass's target (vcvtneps2bf16, vdpbf16ps) stand in it as assembly, where kHasBf16.
#undef PETUNE_BF16
#if PETUNE_LEVEL == 2 && !defined(__clang__)
#define PETUNE_BF16 1
#else
#define PETUNE_BF16 0
#endif

namespace petune::cpu::PETUNE_ISA {

constexpr int kLanes = 4 << PETUNE_LEVEL;  // floats in a register

typedef float f32v __attribute__((vector_size(4 * kLanes)));
typedef int32_t i32v __attribute__((vector_size(4 * kLanes)));
typedef uint32_t u32v __attribute__((vector_size(4 * kLanes)));
typedef uint64_t u64v __attribute__((vector_size(4 * kLanes)));
typedef uint16_t u16v __attribute__((vector_size(2 * kLanes)));

struct bf16 {
  uint16_t bits;
};

#define PETUNE_INLINE inline __attribute__((always_inline))

PETUNE_INLINE f32v splat(float v) { return v - f32v{}; }

PETUNE_INLINE f32v load(const float* p) {
  f32v v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Conversions to and from 16 and 8 bits are written out: g++ 12 widens 16 bits by halves and 8 bits lane by lane.
PETUNE_INLINE u32v widened(u16v half) {
#if PETUNE_LEVEL == 2
  return (u32v)_mm512_cvtepu16_epi32((__m256i)half);
#elif PETUNE_LEVEL == 1
  return (u32v)_mm256_cvtepu16_epi32((__m128i)half);
#else
  return __builtin_convertvector(half, u32v);
#endif
}

PETUNE_INLINE u16v narrowed(u32v whole) {
#if PETUNE_LEVEL == 2
  return (u16v)_mm512_cvtepi32_epi16((__m512i)whole);
#else
  return __builtin_convertvector(whole, u16v);
#endif
}

PETUNE_INLINE f32v load(const bf16* p) {
  u16v half;
  std::memcpy(&half, p, sizeof half);
  return (f32v)(widened(half) << 16);
}

PETUNE_INLINE void store(float* p, f32v v) { std::memcpy(p, &v, sizeof v); }

#if PETUNE_BF16
PETUNE_INLINE u16v round_to_bf16(f32v v) {
  u16v half;
  asm("vcvtneps2bf16 %1, %0" : "=v"(half) : "v"(v));  // to nearest, ties to even; what is below the normal range is 0
  return half;
}
#endif

PETUNE_INLINE void store(bf16* p, f32v v) {
#if PETUNE_BF16
  if (kHasBf16) {
    const u16v half = round_to_bf16(v);
    std::memcpy(p, &half, sizeof half);
    return;
  }
#endif
  const u32v bits = (u32v)v;
  const u32v rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const u16v half = narrowed(v == v ? rounded : 0x7FC0u - u32v{});
  std::memcpy(p, &half, sizeof half);
}

// One number: what moves against the grain of a matrix.
PETUNE_INLINE float number(bf16 from) {
  const uint32_t bits = static_cast<uint32_t>(from.bits) << 16;
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

PETUNE_INLINE void store(float* p, float v) { *p = v; }

PETUNE_INLINE void store(bf16* p, float v) {
  bf16 rounded[kLanes];
  store(rounded, splat(v));
  *p = rounded[0];
}

// Bytes as whole numbers.
PETUNE_INLINE f32v load(const uint8_t* p) {
#if PETUNE_LEVEL == 2
  return (f32v)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif PETUNE_LEVEL == 1
  return (f32v)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#elif PETUNE_X86
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  const __m128i zero = _mm_setzero_si128(), pairs = _mm_unpacklo_epi8(_mm_cvtsi32_si128(word), zero);
  return (f32v)_mm_cvtepi32_ps(_mm_unpacklo_epi16(pairs, zero));
#else
  f32v v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
#endif
}

// Rounds to nearest, ties to even. Below 0 and for NaN it stores 0; v is below 255.5.
PETUNE_INLINE void store(uint8_t* p, f32v v) {
#if PETUNE_LEVEL == 2
  const __m512i whole = _mm512_cvtps_epi32((__m512)v);  // NaN becomes the least integer
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm512_cvtepi32_epi8(_mm512_max_epi32(whole, _mm512_setzero_si512())));
#elif PETUNE_LEVEL == 1
  const __m256i whole = _mm256_cvtps_epi32((__m256)v);
  const __m128i pairs = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(pairs, pairs));
#elif PETUNE_X86
  const __m128i whole = _mm_cvtps_epi32((__m128)v), pairs = _mm_packs_epi32(whole, whole);
  const int32_t word = _mm_cvtsi128_si32(_mm_packus_epi16(pairs, pairs));
  std::memcpy(p, &word, sizeof word);
#else
  for (int i = 0; i < kLanes; ++i) p[i] = v[i] > 0.0f ? static_cast<uint8_t>(std::nearbyint(v[i])) : 0;
#endif
}

// The first n lanes; the others read as zero.
template <class X>
PETUNE_INLINE f32v load(const X* p, int n) {
  if (n >= kLanes) return load(p);
  X part[kLanes] = {};
  std::memcpy(part, p, n * sizeof(X));
  return load(part);
}

template <class X>
PETUNE_INLINE void store(X* p, f32v v, int n) {
  if (n >= kLanes) return store(p, v);
  X part[kLanes];
  store(part, v);
  std::memcpy(p, part, n * sizeof(X));
}

template <class V, class E, int... lane>
PETUNE_INLINE V counting(std::integer_sequence<int, lane...>) {
  return V{static_cast<E>(lane)...};
}

PETUNE_INLINE i32v lane_numbers() { return counting<i32v, int32_t>(std::make_integer_sequence<int, kLanes>{}); }

PETUNE_INLINE f32v first_lanes(f32v v, int n) {
  if (n >= kLanes) return v;
  return (f32v)((i32v)v & (lane_numbers() < n));
}

template <int width, int... lane>
PETUNE_INLINE f32v rotated(f32v v, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(v, v, (lane + width) % kLanes...);
}

// All lanes put together by a commutative function of two vectors.
template <int width = kLanes / 2, class Join>
PETUNE_INLINE float folded(f32v v, Join join) {
  v = join(v, rotated<width>(v, std::make_integer_sequence<int, kLanes>{}));
  if constexpr (width > 1)
    return folded<width / 2>(v, join);
  else
    return v[0];
}

PETUNE_INLINE float sum(f32v v) {
  return folded(v, [](f32v a, f32v b) { return a + b; });
}

// body(i, n) for the vectors of a row of H: n is kLanes but for the last.
template <class Body>
PETUNE_INLINE void for_vectors(int64_t H, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes <= H; i += kLanes) body(i, std::integral_constant<int, kLanes>{});
  if (i < H) body(i, static_cast<int>(H - i));
}

// Scratch rows are rounded up to whole vectors, with one more for a reader that starts off a vector's edge.
inline int64_t padded(int64_t H) { return (H + 5 * kLanes) / kLanes * kLanes; }

inline std::unique_ptr<float[]> scratch(int64_t rows, int64_t H) {
  return std::unique_ptr<float[]>(new float[rows * padded(H)]);
}

// Reads a small parameter [H] as floats; `otherwise` where there is none.
inline void expand(const void* param, DType dtype, int64_t offset, int64_t H, float otherwise, float* out) {
  for_vectors(H, [&](int64_t i, auto n) {
    store(out + i, !param                 ? splat(otherwise)
                   : dtype == DType::bf16 ? load(static_cast<const bf16*>(param) + offset + i, n)
                                          : load(static_cast<const float*>(param) + offset + i, n));
  });
}

inline void write_small(void* out, DType dtype, int64_t offset, int64_t n, const float* values) {
  for_vectors(n, [&](int64_t i, auto lanes) {
    if (dtype == DType::bf16)
      store(static_cast<bf16*>(out) + offset + i, load(values + i), lanes);
    else
      store(static_cast<float*>(out) + offset + i, load(values + i), lanes);
  });
}

// out[0, n) = the sums that `pieces` pieces of rows have left, `step` floats apart, added in their order.
inline void add_pieces(const float* sums, int64_t pieces, int64_t step, int64_t n, float* out) {
  for_vectors(n, [&](int64_t i, auto lanes) {
    f32v total = {};
    for (int64_t piece = 0; piece < pieces; ++piece) total += load(sums + piece * step + i, lanes);
    store(out + i, total, lanes);
  });
}

// low 32 bits of each lane times a 32-bit constant, in 64 bits; the high half of a lane is ignored
PETUNE_INLINE u64v multiply_low(u64v a, uint32_t m) {
#if PETUNE_LEVEL == 2
  return (u64v)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif PETUNE_LEVEL == 1
  return (u64v)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#elif PETUNE_X86
  return (u64v)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(m));
#else
  return (a & 0xFFFFFFFFull) * static_cast<uint64_t>(m);
#endif
}

constexpr int kGroups = 4;  // of counters side by side: fewer wait for their own multiplies, more leave the registers
constexpr int kWords = 2 * kLanes * kGroups;  // a group has kLanes / 2 counters of four words

// The two keys of every round.
struct PhiloxKeys {
  uint64_t key[10][2];

  explicit PhiloxKeys(uint64_t seed) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (auto& round : key) {
      round[0] = k0, round[1] = k1;
      k0 += kPhiloxW0, k1 += kPhiloxW1;
    }
  }
};

// Lane 2 i holds counter i and lane 2 i + 1 counter i + kLanes / 4, so that lanes need not cross the register below.
template <int... i>
PETUNE_INLINE u64v counters(std::integer_sequence<int, i...>) {
  return u64v{static_cast<uint64_t>(i / 2 + i % 2 * (kLanes / 4))...};
}

template <int first, int... i>
PETUNE_INLINE u32v interleaved(u64v low, u64v high, std::integer_sequence<int, i...>) {
  return (u32v)__builtin_shufflevector(low, high, (first + i / 2 * 2 + i % 2 * (kLanes / 2))...);
}

// Both halves of a product are words at the end: the high one, xor a and b, and behind it the low one.
template <int... i>
PETUNE_INLINE u64v last_words(u64v product, u64v a, u64v b, std::integer_sequence<int, i...>) {
  const u64v swapped = (u64v)__builtin_shufflevector((u32v)product, (u32v)product, (i ^ 1)...);
#if PETUNE_LEVEL == 2
  return (u64v)_mm512_mask_ternarylogic_epi32((__m512i)swapped, 0x5555, (__m512i)a, (__m512i)b, 0x96);
#else
  return swapped ^ ((a ^ b) & 0xFFFFFFFFull);
#endif
}

// Words of kWords consecutive elements, the first of which is element 4 * counter: words[i] holds kLanes of them.
PETUNE_INLINE void philox_words(const PhiloxKeys& keys, uint64_t counter, u32v (&words)[2 * kGroups]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes / 2>{};
  constexpr auto halves = std::make_integer_sequence<int, kLanes>{};
  const u64v step = counters(lanes);
  u64v c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    c0[g] = step + (counter + kLanes / 2 * g);
    c1[g] = c0[g] >> 32;
    c2[g] = c3[g] = u64v{};
  }
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const auto [k0, k1] = keys.key[round];
    for (int g = 0; g < kGroups; ++g) {
      const u64v product0 = multiply_low(c0[g], kPhiloxM0), product1 = multiply_low(c2[g], kPhiloxM1);
      if (round < 9) {
        c0[g] = (product1 >> 32) ^ c1[g] ^ k0;
        c2[g] = (product0 >> 32) ^ c3[g] ^ k1;
        c1[g] = product1, c3[g] = product0;
      } else {
        const u64v low = last_words(product1, c1[g], k0 - u64v{}, halves);
        const u64v high = last_words(product0, c3[g], k1 - u64v{}, halves);
        words[2 * g] = interleaved<0>(low, high, lanes);
        words[2 * g + 1] = interleaved<1>(low, high, lanes);
      }
    }
  }
}

// Dropout of one call: multipliers 0 or 1/(1-p) for a run of elements under one seed.
struct Dropper {
  uint32_t threshold;
  float scale;

  explicit Dropper(double p) : threshold(drop_threshold(p)), scale(static_cast<float>(1.0 / (1.0 - p))) {}

  PETUNE_INLINE f32v multiplier(u32v word) const { return word >= threshold ? splat(scale) : f32v{}; }

  // Fills `buffer` (padded(n) floats) and returns where in it element `first` stands.
  PETUNE_INLINE const float* multipliers(uint64_t seed, uint64_t first, int64_t n, float* buffer) const {
    const int64_t offset = static_cast<int64_t>(first % 4), whole = n + offset;
    const PhiloxKeys keys(seed);
    for (int64_t i = 0; i < whole; i += kWords) {
      u32v words[2 * kGroups];
      philox_words(keys, (first + i) / 4, words);
      if (i + kWords <= whole)
        for (int j = 0; j < 2 * kGroups; ++j) store(buffer + i + j * kLanes, multiplier(words[j]));
      else
        for (int j = 0; i + j * kLanes < whole; ++j) store(buffer + i + j * kLanes, multiplier(words[j]));
    }
    return buffer + offset;
  }
};

}  // namespace petune::cpu::PETUNE_ISA
