// attention on the CPU: one (batch, head) at a time, kTileRows query rows at a time, everything in fp32 scratch that
// stays in the second-level cache. A tile holds whole rows of scores, so softmax needs no running rescaling, and
// backward finds the same maximum, sum and dropout mask again by the same steps. It also sums
// delta = sum_j dropped(P)_j dP_j from that row instead of dO . O, which costs nothing and is not rounded to bf16; so it
// reads neither O nor the logsumexp. The derivation is in petune_kernels/ops/attention.py.
//
// Each row is computed by one thread, d_k and d_v of a head too, tile after tile: results do not depend on the number
// of threads. flops: 4 B h S K D forward, 10 backward; an exponential and, with dropout, a random word per score.
#define PETUNE_FILE "attention.cpp"
#include "foreach_isa.h"

#ifdef PETUNE_ISA
#include "vec.h"
#include "vec_math.h"

namespace petune::cpu::PETUNE_ISA {

// One register of the instruction set: accumulators in the compiler's wider vectors would go through memory.
#if PETUNE_LEVEL == 2
constexpr int kRegister = 16, kBlockRows = 8, kBlockRegisters = 4;
#elif PETUNE_LEVEL == 1
constexpr int kRegister = 8, kBlockRows = 4, kBlockRegisters = 2;
#else
constexpr int kRegister = 4, kBlockRows = 2, kBlockRegisters = 4;
#endif
typedef float f32xr __attribute__((vector_size(4 * kRegister)));

// c [R, V registers] = or += a [R, depth] b [depth, V registers]
template <int R, int V>
PETUNE_INLINE void block(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
                         int64_t c_row, int64_t depth, bool add) {
  f32xr total[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      if (add)
        std::memcpy(&total[r][v], c + r * c_row + v * kRegister, sizeof(f32xr));
      else
        total[r][v] = f32xr{};
    }
  for (int64_t d = 0; d < depth; ++d) {
    f32xr right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) std::memcpy(&right[v], b + d * b_row + v * kRegister, sizeof(f32xr));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float left = a[r * a_row + d * a_column];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) total[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) std::memcpy(c + r * c_row + v * kRegister, &total[r][v], sizeof(f32xr));
}

template <int R, int V>
inline void rows_of_blocks(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
                           int64_t c_row, int64_t M, int64_t depth, bool add) {
  int64_t m = 0;
  for (; m + R <= M; m += R)
    block<R, V>(a + m * a_row, a_row, a_column, b, b_row, c + m * c_row, c_row, depth, add);
  if constexpr (R > 1)
    if (m < M)
      rows_of_blocks<R / 2, V>(a + m * a_row, a_row, a_column, b, b_row, c + m * c_row, c_row, M - m, depth, add);
}

// c [M, N] = or += a [M, depth] b [depth, N]; a's element (m, d) stands at m * a_row + d * a_column, so that a may be
// read transposed. N is a multiple of 16. Columns outside, so that a panel of b stays in the first-level cache.
inline void matmul(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
                   int64_t c_row, int64_t M, int64_t N, int64_t depth, bool add) {
  constexpr int kWide = kBlockRegisters * kRegister;
  int64_t n = 0;
  if constexpr (kWide > kLanes) {
    // eight rows of four AVX-512 registers would spill
    for (; n + kWide <= N; n += kWide)
      rows_of_blocks<kBlockRows / 2, kBlockRegisters>(a, a_row, a_column, b + n, b_row, c + n, c_row, M, depth, add);
    for (; n + kWide / 2 <= N; n += kWide / 2)
      rows_of_blocks<kBlockRows, kBlockRegisters / 2>(a, a_row, a_column, b + n, b_row, c + n, c_row, M, depth, add);
  }
  for (; n < N; n += kLanes)
    rows_of_blocks<kBlockRows, kLanes / kRegister>(a, a_row, a_column, b + n, b_row, c + n, c_row, M, depth, add);
}

// Aligned fp32 scratch, cut into pieces.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : memory_(new float[floats + kLanes]) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    next_ = memory_.get() + (64 - address % 64) % 64 / sizeof(float);
  }
  float* take(int64_t floats) {  // a multiple of 16
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

// Exchanges the off-diagonal w x w blocks of every 2w x 2w block; with w = 8, 4, 2, 1 in turn, a 16 x 16 transpose.
template <int w, size_t... lane>
PETUNE_INLINE void exchange(f32x16* v, std::index_sequence<lane...>) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & w) continue;
    const f32x16 a = v[i], b = v[i + w];
    v[i] = __builtin_shufflevector(a, b, (lane & w ? lane - w + kLanes : lane)...);
    v[i + w] = __builtin_shufflevector(a, b, (lane & w ? lane + kLanes : lane + w)...);
  }
}

// Rows [n, D] of X as fp32 columns: to [D, whole_vectors(n)], zero past n.
template <class X>
void widen_transposed(const X* from, int64_t stride, int64_t n, int64_t D, float* to, int64_t to_row) {
  constexpr auto lanes = std::make_index_sequence<kLanes>{};
  for (int64_t t = 0; t < n; t += kLanes)
    for_vectors(D, [&](int64_t i, auto width) {
      f32x16 v[kLanes];
      for (int r = 0; r < kLanes; ++r) v[r] = t + r < n ? load(from + (t + r) * stride + i, width) : f32x16{};
      exchange<8>(v, lanes);
      exchange<4>(v, lanes);
      exchange<2>(v, lanes);
      exchange<1>(v, lanes);
      for (int r = 0; r < width; ++r) store(to + (i + r) * to_row + t, v[r]);
    });
}

constexpr int64_t kTileRows = 32;

// What forward and backward share for the (batch, head) at hand.
template <class X>
struct Head {
  const Attention& a;
  const Dropper dropper;
  const int64_t width, score_row, head_row;  // K and D in whole vectors, and the distance of their scratch rows
  int64_t b = 0, h = 0;
  float *mask, *multipliers;

  static int64_t scratch_floats(const Attention& a) { return 2 * padded(a.K); }

  Head(const Attention& a, Scratch& scratch)
      : a(a),
        dropper(a.p),
        width(whole_vectors(a.K)),
        score_row(whole_vectors(a.K) + kLanes),  // no power of two: rows would fall on the same cache lines
        head_row(whole_vectors(a.D)),
        mask(scratch.take(padded(a.K))),
        multipliers(scratch.take(padded(a.K))) {}

  const X* at(const void* p, const Strides& s, int64_t row = 0) const {
    return static_cast<const X*>(p) + b * s.b + h * s.h + row * s.s;
  }

  void select(int64_t unit) {
    b = unit / a.h, h = unit % a.h;
    if (!a.mask)
      std::fill(mask, mask + width, 0.0f);
    else if (a.mask_strides[2] == 0)
      read_mask(0);
  }

  void read_mask(int64_t row) {
    const X* from = static_cast<const X*>(a.mask) + b * a.mask_strides[0] + h * a.mask_strides[1] +
                    row * a.mask_strides[2];
    for_vectors(a.K, [&](int64_t i, auto lanes) { store(mask + i, load(from + i, lanes)); });
  }

  // Columns that `row` may look at.
  int64_t visible(int64_t row) const {
    return a.causal ? std::clamp<int64_t>(row + 1 + a.K - a.S, 0, a.K) : a.K;
  }

  const float* keep(int64_t row) const {
    const int64_t first = ((b * a.h + h) * a.S + row) * a.K;
    return a.seed ? dropper.multipliers(static_cast<uint64_t>(*a.seed), first, visible(row), multipliers) : nullptr;
  }

  // Turns a row of q k^T into scale * q k^T + mask, -inf where it may not look; returns the maximum.
  float scores(int64_t row, float* s) {
    if (a.mask && a.mask_strides[2] != 0) read_mask(row);
    const int64_t n = visible(row);
    const float scale = static_cast<float>(a.scale);
    const f32x16 hidden = splat(-std::numeric_limits<float>::infinity());
    f32x16 top = hidden;
    for_vectors(n, [&](int64_t i, auto lanes) {
      f32x16 v = load(s + i) * scale + load(mask + i);
      if constexpr (!std::is_same_v<decltype(lanes), std::integral_constant<int, kLanes>>) {
        const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        v = PETUNE_ISA::select(lane < lanes, v, hidden);
      }
      store(s + i, v);
      top = larger(top, v);  // a NaN lost here stays in the row, and in its sum
    });
    const float maximum = largest(top);
    if (maximum == -std::numeric_limits<float>::infinity())  // nothing to look at, or nothing but NaN
      for (int64_t i = 0; i < n; ++i)
        if (s[i] != s[i]) return s[i];
    return maximum;
  }
};

// Exponentials of a row against its maximum; zero from the last vector it looks at to `width`.
PETUNE_INLINE float exponentials(float* s, int64_t visible, int64_t width, float top) {
  f32x16 total = {};
  for_vectors(visible, [&](int64_t i, auto) {
    const f32x16 e = exp_nonpositive(load(s + i) - top);
    total += e;
    store(s + i, e);
  });
  std::fill(s + whole_vectors(visible), s + width, 0.0f);
  return sum(total);
}

// Units are pieces of kPieceRows query rows of one (batch, head), so that few heads still feed many threads.
constexpr int64_t kPieceRows = 4 * kTileRows;

template <class X>
void attention_pieces(const Attention& a, int64_t first, int64_t last) {
  const int64_t S = a.S, K = a.K, D = a.D, pieces = (S + kPieceRows - 1) / kPieceRows;
  const int64_t score_row = whole_vectors(K) + kLanes, head_row = whole_vectors(D);
  Scratch scratch(Head<X>::scratch_floats(a) + D * score_row + K * head_row + kTileRows * (score_row + 2 * head_row));
  Head<X> head(a, scratch);
  float *k = scratch.take(D * score_row), *v = scratch.take(K * head_row), *q = scratch.take(kTileRows * head_row),
        *o = scratch.take(kTileRows * head_row), *s = scratch.take(kTileRows * score_row);
  float inverse[kTileRows];
  int64_t unit = -1;
  for (int64_t piece = first; piece < last; ++piece) {
    if (piece / pieces != unit) {
      unit = piece / pieces;
      head.select(unit);
      widen_transposed(head.at(a.k, a.k_strides), a.k_strides.s, K, D, k, score_row);
      widen(head.at(a.v, a.v_strides), a.v_strides.s, K, D, v, head_row);
    }
    const int64_t begin = piece % pieces * kPieceRows, end = std::min(begin + kPieceRows, S);
    for (int64_t row = begin; row < end; row += kTileRows) {
      const int64_t rows = std::min(kTileRows, end - row), seen = head.visible(row + rows - 1);
      const int64_t columns = whole_vectors(seen);
      widen(head.at(a.q, a.q_strides, row), a.q_strides.s, rows, D, q, head_row);
      matmul(q, head_row, 1, k, score_row, s, score_row, rows, columns, D, false);
      for (int64_t r = 0; r < rows; ++r) {
        float* weights = s + r * score_row;
        const float top = head.scores(row + r, weights);
        float& lse = a.lse[unit * S + row + r];
        if (top == -std::numeric_limits<float>::infinity()) {  // nothing to look at
          std::fill(weights, weights + columns, 0.0f);
          inverse[r] = 0.0f;
          lse = top;
          continue;
        }
        const float total = exponentials(weights, head.visible(row + r), columns, top);
        inverse[r] = 1.0f / total;
        lse = top + std::log(total);
        if (const float* keep = head.keep(row + r))
          for_vectors(head.visible(row + r),
                      [&](int64_t i, auto n) { store(weights + i, load(weights + i) * first_lanes(load(keep + i), n)); });
      }
      matmul(s, score_row, 1, v, head_row, o, head_row, rows, head_row, seen, false);
      for (int64_t r = 0; r < rows; ++r) {
        X* out = const_cast<X*>(head.at(a.o, a.o_strides, row + r));
        for_vectors(D, [&](int64_t i, auto n) { store(out + i, load(o + r * head_row + i) * inverse[r], n); });
      }
    }
  }
}

template <class X>
void narrow(const float* from, int64_t from_row, int64_t n, int64_t D, const X* to, int64_t stride) {
  for (int64_t t = 0; t < n; ++t)
    for_vectors(D, [&](int64_t i, auto lanes) {
      store(const_cast<X*>(to) + t * stride + i, load(from + t * from_row + i), lanes);
    });
}

template <class X>
void attention_backward_heads(const AttentionBackward& args, int64_t first, int64_t last) {
  const Attention& a = args.forward;
  const int64_t S = a.S, K = a.K, D = a.D;
  const int64_t score_row = whole_vectors(K) + kLanes, head_row = whole_vectors(D);
  const float scale = static_cast<float>(a.scale);
  Scratch scratch(Head<X>::scratch_floats(a) + 2 * D * score_row + 3 * K * head_row +
                  kTileRows * (2 * score_row + 3 * head_row));
  Head<X> head(a, scratch);
  float *k = scratch.take(K * head_row), *k_columns = scratch.take(D * score_row),
        *v_columns = scratch.take(D * score_row), *dk = scratch.take(K * head_row), *dv = scratch.take(K * head_row),
        *q = scratch.take(kTileRows * head_row), *d_o = scratch.take(kTileRows * head_row),
        *dq = scratch.take(kTileRows * head_row), *s = scratch.take(kTileRows * score_row),
        *ds = scratch.take(kTileRows * score_row);
  const bool want_scores = args.dq || args.dk;
  for (int64_t unit = first; unit < last; ++unit) {
    head.select(unit);
    const X* keys = head.at(a.k, a.k_strides);
    widen_transposed(keys, a.k_strides.s, K, D, k_columns, score_row);
    if (want_scores) widen_transposed(head.at(a.v, a.v_strides), a.v_strides.s, K, D, v_columns, score_row);
    if (args.dq) widen(keys, a.k_strides.s, K, D, k, head_row);
    std::fill(dk, dk + K * head_row, 0.0f);
    std::fill(dv, dv + K * head_row, 0.0f);
    for (int64_t row = 0; row < S; row += kTileRows) {
      const int64_t rows = std::min(kTileRows, S - row), seen = head.visible(row + rows - 1);
      const int64_t columns = whole_vectors(seen);
      widen(head.at(a.q, a.q_strides, row), a.q_strides.s, rows, D, q, head_row);
      widen(head.at(args.d_o, args.do_strides, row), args.do_strides.s, rows, D, d_o, head_row);
      matmul(q, head_row, 1, k_columns, score_row, s, score_row, rows, columns, D, false);
      if (want_scores) matmul(d_o, head_row, 1, v_columns, score_row, ds, score_row, rows, columns, D, false);
      for (int64_t r = 0; r < rows; ++r) {
        float *weights = s + r * score_row, *slopes = ds + r * score_row;
        const float top = head.scores(row + r, weights);
        if (top == -std::numeric_limits<float>::infinity()) {
          std::fill(weights, weights + columns, 0.0f);
          std::fill(slopes, slopes + columns, 0.0f);
          continue;
        }
        const int64_t n = head.visible(row + r);
        const float inverse = 1.0f / exponentials(weights, n, columns, top);
        const float* keep = head.keep(row + r);
        f32x16 product = {};
        if (want_scores)
          for_vectors(n, [&](int64_t i, auto lanes) {
            f32x16 d = load(slopes + i);
            if (keep) store(slopes + i, d *= first_lanes(load(keep + i), lanes));
            product += load(weights + i) * d;
          });
        const float delta = sum(product) * inverse;
        for_vectors(n, [&](int64_t i, auto lanes) {
          const f32x16 p = load(weights + i) * inverse;
          if (want_scores) store(slopes + i, p * ((load(slopes + i) - delta) * scale));
          store(weights + i, keep ? p * first_lanes(load(keep + i), lanes) : p);
        });
        std::fill(slopes + whole_vectors(n), slopes + columns, 0.0f);
      }
      if (args.dv) matmul(s, 1, score_row, d_o, head_row, dv, head_row, seen, head_row, rows, true);
      if (args.dk) matmul(ds, 1, score_row, q, head_row, dk, head_row, seen, head_row, rows, true);
      if (args.dq) {
        matmul(ds, score_row, 1, k, head_row, dq, head_row, rows, head_row, seen, false);
        narrow(dq, head_row, rows, D, head.at(args.dq, args.dq_strides, row), args.dq_strides.s);
      }
    }
    if (args.dk) narrow(dk, head_row, K, D, head.at(args.dk, args.dk_strides), args.dk_strides.s);
    if (args.dv) narrow(dv, head_row, K, D, head.at(args.dv, args.dv_strides), args.dv_strides.s);
  }
}

inline void attention_forward(const Attention& a) {
  const int64_t pieces = a.B * a.h * ((a.S + kPieceRows - 1) / kPieceRows);
  parallel(pieces, 1, [&](int64_t begin, int64_t end) {
    a.dtype == DType::bf16 ? attention_pieces<bf16>(a, begin, end) : attention_pieces<float>(a, begin, end);
  });
}

inline void attention_backward_all(const AttentionBackward& a) {
  parallel(a.forward.B * a.forward.h, 1, [&](int64_t begin, int64_t end) {
    a.forward.dtype == DType::bf16 ? attention_backward_heads<bf16>(a, begin, end)
                                   : attention_backward_heads<float>(a, begin, end);
  });
}

}  // namespace petune::cpu::PETUNE_ISA

#else

namespace petune::cpu {

void attention(const Attention& args) { PETUNE_DISPATCH(attention_forward)(args); }
void attention_backward(const AttentionBackward& args) { PETUNE_DISPATCH(attention_backward_all)(args); }

}  // namespace petune::cpu

#endif
