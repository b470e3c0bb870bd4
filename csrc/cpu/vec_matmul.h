// Small matrix products in fp32 scratch that stays in cache: what attention.cpp and lora_adapter.cpp are built of.
// Included after vec.h, once per instruction set.

namespace petune::cpu::PETUNE_ISA {

// The block of accumulators that fits the registers of the instruction set.
#if PETUNE_LEVEL == 2
constexpr int kBlockRows = 8, kBlockRegisters = 4;
#elif PETUNE_LEVEL == 1
constexpr int kBlockRows = 4, kBlockRegisters = 2;
#else
constexpr int kBlockRows = 2, kBlockRegisters = 4;
#endif

// bf16 inputs stay bf16 where the processor multiplies them (vdpbf16ps, twice the fp32 rate): an element of a matrix is
// then a pair, two neighbours along the depth of the product in the 32 bits of a float. Weights and their slopes are
// rounded to bf16 for it, as eager rounds them.
template <bool pairs>
PETUNE_INLINE void multiply_add(f32v& total, float left, f32v right) {
#if PETUNE_BF16
  if constexpr (pairs) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(total) : "v"(right), "v"(_mm512_set1_ps(left)));
    return;
  }
#endif
  total += left * right;
}

// c [R, V registers] = or += a [R, depth] b [depth, V registers]
template <bool pairs, int R, int V>
PETUNE_INLINE void block(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
                         int64_t c_row, int64_t depth, bool add) {
  f32v total[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      if (add)
        std::memcpy(&total[r][v], c + r * c_row + v * kLanes, sizeof(f32v));
      else
        total[r][v] = f32v{};
    }
  for (int64_t d = 0; d < depth; ++d) {
    f32v right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) std::memcpy(&right[v], b + d * b_row + v * kLanes, sizeof(f32v));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float left = a[r * a_row + d * a_column];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) multiply_add<pairs>(total[r][v], left, right[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) std::memcpy(c + r * c_row + v * kLanes, &total[r][v], sizeof(f32v));
}

template <bool pairs, int R, int V>
inline void rows_of_blocks(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
                           int64_t c_row, int64_t M, int64_t depth, bool add) {
  int64_t m = 0;
  for (; m + R <= M; m += R)
    block<pairs, R, V>(a + m * a_row, a_row, a_column, b, b_row, c + m * c_row, c_row, depth, add);
  if constexpr (R > 1)
    if (m < M)
      rows_of_blocks<pairs, R / 2, V>(a + m * a_row, a_row, a_column, b, b_row, c + m * c_row, c_row, M - m, depth,
                                      add);
}

// c [M, N] = or += a [M, depth] b [depth, N]; a's element (m, d) stands at m * a_row + d * a_column, so that a may be
// read transposed. N is a multiple of kLanes. Columns outside, so that a panel of b stays in the first-level cache.
template <bool pairs>
void matmul(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c, int64_t c_row,
            int64_t M, int64_t N, int64_t depth, bool add) {
  constexpr int kWide = kBlockRegisters * kLanes;
  // eight rows of four AVX-512 registers would spill
  constexpr int kWideRows = PETUNE_LEVEL == 2 ? kBlockRows / 2 : kBlockRows;
  int64_t n = 0;
  for (; n + kWide <= N; n += kWide)
    rows_of_blocks<pairs, kWideRows, kBlockRegisters>(a, a_row, a_column, b + n, b_row, c + n, c_row, M, depth, add);
  for (; n + kWide / 2 <= N; n += kWide / 2)
    rows_of_blocks<pairs, kBlockRows, kBlockRegisters / 2>(a, a_row, a_column, b + n, b_row, c + n, c_row, M, depth,
                                                           add);
  for (; n < N; n += kLanes)
    rows_of_blocks<pairs, kBlockRows, 1>(a, a_row, a_column, b + n, b_row, c + n, c_row, M, depth, add);
}

// Aligned fp32 scratch, cut into pieces.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : memory_(new float[floats + 16]) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    next_ = memory_.get() + (64 - address % 64) % 64 / sizeof(float);
  }
  float* take(int64_t floats) {  // a multiple of kLanes
    float* piece = next_;
    next_ += floats;
    return piece;
  }

 private:
  std::unique_ptr<float[]> memory_;
  float* next_;
};

inline int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Rows [n, D] of X as fp32 rows; lanes past D are zero.
template <class X>
void widen(const X* from, int64_t stride, int64_t n, int64_t D, float* to, int64_t to_row) {
  for (int64_t t = 0; t < n; ++t)
    for_vectors(D, [&](int64_t i, auto lanes) { store(to + t * to_row + i, load(from + t * stride + i, lanes)); });
}

// The sums of the vectors v[0] to v[kLanes - 1], one in each lane.
template <int w, size_t... lane>
PETUNE_INLINE f32v summed(f32v* v, std::index_sequence<lane...> lanes) {
#pragma GCC unroll 16
  for (int i = 0; i < w; ++i) {
    const f32v a = v[i], b = v[i + w];
    v[i] = __builtin_shufflevector(a, b, (lane & w ? lane + kLanes : lane)...) +
           __builtin_shufflevector(a, b, (lane & w ? lane - w + kLanes : lane + w)...);
  }
  if constexpr (w > 1)
    return summed<w / 2>(v, lanes);
  else
    return v[0];
}

// c [M, n] += a [M, depth] b [n, depth]^T: both with depth along their rows, a whole number of vectors of it. n is a
// multiple of four, and a has readable rows up to a whole number of kAcrossRows.
constexpr int kAcrossRows = kLanes / 4;

inline void matmul_across(const float* a, int64_t a_row, const float* b, int64_t b_row, float* c, int64_t c_row,
                          int64_t M, int64_t n, int64_t depth) {
  constexpr auto lanes = std::make_index_sequence<kLanes>{};
  for (int64_t m = 0; m < M; m += kAcrossRows)
    for (int64_t j = 0; j < n; j += 4) {
      f32v total[kLanes] = {};
      for (int64_t d = 0; d < depth; d += kLanes) {
        f32v left[kAcrossRows];
#pragma GCC unroll 4
        for (int i = 0; i < kAcrossRows; ++i) left[i] = load(a + (m + i) * a_row + d);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          const f32v right = load(b + (j + k) * b_row + d);
#pragma GCC unroll 4
          for (int i = 0; i < kAcrossRows; ++i) total[4 * i + k] += left[i] * right;
        }
      }
      float sums[kLanes];
      store(sums, summed<kLanes / 2>(total, lanes));
      for (int i = 0; i < kAcrossRows && m + i < M; ++i)
        for (int k = 0; k < 4; ++k) c[(m + i) * c_row + j + k] += sums[4 * i + k];
    }
}

}  // namespace petune::cpu::PETUNE_ISA
