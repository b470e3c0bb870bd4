// Sixteen floats at a time: loads and stores of fp32 and bf16 rows, and the dropout multipliers.
// Included once per instruction set by foreach_isa.h's kernel files (no include guard on purpose); the compiler's own
// vector types become one AVX-512, two AVX2 or four SSE registers.

namespace petune::cpu::PETUNE_ISA {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint64_t u64x8 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

constexpr int kLanes = 16;

struct bf16 {
  uint16_t bits;
};

#define PETUNE_INLINE inline __attribute__((always_inline))

PETUNE_INLINE f32x16 splat(float v) { return v - f32x16{}; }

PETUNE_INLINE f32x16 load(const float* p) {
  f32x16 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

PETUNE_INLINE f32x16 load(const bf16* p) {
  u16x16 half;
  std::memcpy(&half, p, sizeof half);
  return (f32x16)(__builtin_convertvector(half, u32x16) << 16);
}

PETUNE_INLINE void store(float* p, f32x16 v) { std::memcpy(p, &v, sizeof v); }

PETUNE_INLINE void store(bf16* p, f32x16 v) {
  const u32x16 bits = (u32x16)v;
  const u32x16 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const u32x16 is_nan = (u32x16)((bits & 0x7FFFFFFFu) > 0x7F800000u);
  const u16x16 half = __builtin_convertvector((rounded & ~is_nan) | (0x7FC0u & is_nan), u16x16);
  std::memcpy(p, &half, sizeof half);
}

// The first n lanes; the others read as zero.
template <class X>
PETUNE_INLINE f32x16 load(const X* p, int n) {
  if (n >= kLanes) return load(p);
  X part[kLanes] = {};
  std::memcpy(part, p, n * sizeof(X));
  return load(part);
}

template <class X>
PETUNE_INLINE void store(X* p, f32x16 v, int n) {
  if (n >= kLanes) return store(p, v);
  X part[kLanes];
  store(part, v);
  std::memcpy(p, part, n * sizeof(X));
}

PETUNE_INLINE f32x16 first_lanes(f32x16 v, int n) {
  if (n >= kLanes) return v;
  const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return (f32x16)((i32x16)v & (lane < n));
}

PETUNE_INLINE float sum(f32x16 v) {
  float total = 0;
  for (int width = kLanes / 2; width >= 1; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  return total + v[0];
}

// body(i, n) for the vectors of a row of H: n is 16 but for the last.
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

// low 32 bits of a times a 32-bit constant, in 64 bits; the high half of a is ignored
PETUNE_INLINE u64x8 multiply_low(u64x8 a, uint32_t m) {
#if defined(__AVX512F__)
  return (u64x8)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
  __m256i half[2];
  std::memcpy(half, &a, sizeof a);
  for (auto& part : half) part = _mm256_mul_epu32(part, _mm256_set1_epi64x(m));
  std::memcpy(&a, half, sizeof a);
  return a;
#else
  return (a & 0xFFFFFFFFull) * static_cast<uint64_t>(m);
#endif
}

// Words of 64 consecutive elements, the first of which is element 4 * counter: two groups of eight counters side by
// side, because one alone waits for its own multiplies.
PETUNE_INLINE void philox64(uint64_t seed, uint64_t counter, uint32_t* words) {
  constexpr int kGroups = 2;
  const u64x8 step = {0, 1, 2, 3, 4, 5, 6, 7};
  u64x8 c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    c0[g] = step + (counter + 8 * g);
    c1[g] = c0[g] >> 32;
    c2[g] = c3[g] = u64x8{};
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    for (int g = 0; g < kGroups; ++g) {
      const u64x8 product0 = multiply_low(c0[g], kPhiloxM0), product1 = multiply_low(c2[g], kPhiloxM1);
      c0[g] = (product1 >> 32) ^ c1[g] ^ static_cast<uint64_t>(k0);
      c1[g] = product1;
      c2[g] = (product0 >> 32) ^ c3[g] ^ static_cast<uint64_t>(k1);
      c3[g] = product0;
    }
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  for (int g = 0; g < kGroups; ++g) {
    const u64x8 low = (c0[g] & 0xFFFFFFFFull) | (c1[g] << 32), high = (c2[g] & 0xFFFFFFFFull) | (c3[g] << 32);
    const u64x8 first = __builtin_shufflevector(low, high, 0, 8, 1, 9, 2, 10, 3, 11);
    const u64x8 second = __builtin_shufflevector(low, high, 4, 12, 5, 13, 6, 14, 7, 15);
    std::memcpy(words + 32 * g, &first, sizeof first);
    std::memcpy(words + 32 * g + 16, &second, sizeof second);
  }
}

// Dropout of one call: multipliers 0 or 1/(1-p) for a run of elements under one seed.
struct Dropper {
  uint32_t threshold;
  float scale;

  explicit Dropper(double p) : threshold(drop_threshold(p)), scale(static_cast<float>(1.0 / (1.0 - p))) {}

  // Fills `buffer` (padded(n) floats) and returns where in it element `first` stands.
  PETUNE_INLINE const float* multipliers(uint64_t seed, uint64_t first, int64_t n, float* buffer) const {
    const int64_t offset = static_cast<int64_t>(first % 4);
    for (int64_t i = 0; i < n + offset; i += 64) {
      alignas(64) uint32_t words[64];
      philox64(seed, (first + i) / 4, words);
      for (int j = 0; j < 64 && i + j < padded(n); j += kLanes) {
        u32x16 word;
        std::memcpy(&word, words + j, sizeof word);
        const i32x16 keep = word >= threshold;
        store(buffer + i + j, (f32x16)(keep & (i32x16)splat(scale)));
      }
    }
    return buffer + offset;
  }
};

}  // namespace petune::cpu::PETUNE_ISA
