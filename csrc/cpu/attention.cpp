// attention on the CPU: one (batch, head) at a time, kTileRows query rows at a time, everything in fp32 scratch that
// stays in the second-level cache (bf16 pairs where the processor multiplies those, below). A tile holds whole rows of
// scores, so softmax needs no running rescaling, and backward finds the same maximum, sum and dropout mask again by the
// same steps. It also sums delta = sum_j dropped(P)_j dP_j from that row instead of dO . O, which costs nothing and is
// not rounded to bf16; so it reads neither O nor the logsumexp. The derivation is in petune_kernels/ops/attention.py.
//
// Each row is computed by one thread, d_k and d_v of a head too, tile after tile: results do not depend on the number
// of threads. flops: 4 B h S K D forward, 10 backward; an exponential and, with dropout, a random word per score.
#include <initializer_list>
#include <utility>

#define PETUNE_FILE "attention.cpp"
#include "foreach_isa.h"

#ifdef PETUNE_ISA
#include "vec.h"
#include "vec_math.h"
#include "vec_matmul.h"

namespace petune::cpu::PETUNE_ISA {

// Exchanges the off-diagonal w x w blocks of every 2w x 2w block; from w = kLanes / 2 down to 1, it transposes.
template <int w, size_t... lane>
PETUNE_INLINE void exchange(f32v* v, std::index_sequence<lane...> lanes) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & w) continue;
    const f32v a = v[i], b = v[i + w];
    v[i] = __builtin_shufflevector(a, b, (lane & w ? lane - w + kLanes : lane)...);
    v[i + w] = __builtin_shufflevector(a, b, (lane & w ? lane + kLanes : lane + w)...);
  }
  if constexpr (w > 1) exchange<w / 2>(v, lanes);
}

// Rows [n, D] of X as fp32 columns: to [D, whole_vectors(n)], zero past n.
template <class X>
void widen_transposed(const X* from, int64_t stride, int64_t n, int64_t D, float* to, int64_t to_row) {
  constexpr auto lanes = std::make_index_sequence<kLanes>{};
  for (int64_t t = 0; t < n; t += kLanes)
    for_vectors(D, [&](int64_t i, auto width) {
      f32v v[kLanes];
      for (int r = 0; r < kLanes; ++r) v[r] = t + r < n ? load(from + (t + r) * stride + i, width) : f32v{};
      exchange<kLanes / 2>(v, lanes);
      for (int r = 0; r < width; ++r) store(to + (i + r) * to_row + t, v[r]);
    });
}

// How a matrix of inputs becomes an operand: fp32, or pairs.
// Depth along D: rows [n, depth(D)], and the same transposed.
template <bool pairs, class X>
void operand_rows(const X* from, int64_t stride, int64_t n, int64_t D, float* to, int64_t to_row) {
  if constexpr (pairs)
    widen(reinterpret_cast<const float*>(from), stride / 2, n, D / 2, to, to_row);
  else
    widen(from, stride, n, D, to, to_row);
}

template <bool pairs, class X>
void operand_columns(const X* from, int64_t stride, int64_t n, int64_t D, float* to, int64_t to_row) {
  if constexpr (pairs)
    widen_transposed(reinterpret_cast<const float*>(from), stride / 2, n, D / 2, to, to_row);
  else
    widen_transposed(from, stride, n, D, to, to_row);
}

#if PETUNE_BF16
PETUNE_INLINE f32v pair(u16v first, u16v second) { return (f32v)(widened(first) | widened(second) << 16); }
#endif

// Depth along the rows: [depth(n), D]. A missing partner of the last row is zero.
template <bool pairs, class X>
void operand_depth(const X* from, int64_t stride, int64_t n, int64_t D, float* to, int64_t to_row) {
#if PETUNE_BF16
  if constexpr (pairs) {
    for (int64_t t = 0; t < n; t += 2, to += to_row)
      for_vectors(D, [&](int64_t i, auto lanes) {
        const X* row = from + t * stride + i;
        const f32v second = t + 1 < n ? load(row + stride, lanes) : f32v{};
        store(to + i, (f32v)((u32v)load(row, lanes) >> 16 | (u32v)second));  // a bf16 is a float's upper half
      });
    return;
  }
#endif
  widen(from, stride, n, D, to, to_row);
}

template <bool pairs>
constexpr int64_t depth(int64_t n) {
  return pairs ? (n + 1) / 2 : n;
}

// A row of fp32 weights as an operand with depth along it.
template <bool pairs>
void weights_along(const float* from, int64_t n, float* to) {
#if PETUNE_BF16
  if constexpr (pairs)
    for (int64_t i = 0; i < n; i += kLanes) {
      const u16v bits = round_to_bf16(load(from + i));
      std::memcpy(to + i / 2, &bits, sizeof bits);
    }
#endif
}

// Rows of fp32 weights as an operand with depth along the rows, in place: pair d stands in row 2 d.
template <bool pairs>
void weights_across(float* rows, int64_t row, int64_t count, int64_t n) {
#if PETUNE_BF16
  if constexpr (pairs)
    for (int64_t r = 0; r < count; r += 2)
      for (int64_t i = 0; i < n; i += kLanes) {
        float* first = rows + r * row + i;
        const u16v none = {};
        store(first, pair(round_to_bf16(load(first)), r + 1 < count ? round_to_bf16(load(first + row)) : none));
      }
#endif
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
  const float* drawn = nullptr;  // multipliers of rows drawn_from to drawn_to - 1
  int64_t drawn_from = 0, drawn_to = 0;

  // Rows follow one another in the mask, and few long draws cost less than many short ones.
  static int64_t rows_drawn(const Attention& a) {
    return a.causal ? 1 : std::clamp<int64_t>(4096 / std::max<int64_t>(a.K, 1), 1, kTileRows);
  }

  static int64_t scratch_floats(const Attention& a) { return padded(a.K) + padded(rows_drawn(a) * a.K); }

  Head(const Attention& a, Scratch& scratch)
      : a(a),
        dropper(a.p),
        width(whole_vectors(a.K)),
        score_row(whole_vectors(a.K) + kLanes),  // no power of two: rows would fall on the same cache lines
        head_row(whole_vectors(a.D)),
        mask(scratch.take(padded(a.K))),
        multipliers(scratch.take(padded(rows_drawn(a) * a.K))) {}

  const X* at(const void* p, const Strides& s, int64_t row = 0) const {
    return static_cast<const X*>(p) + b * s.b + h * s.h + row * s.s;
  }

  void select(int64_t unit) {
    b = unit / a.h, h = unit % a.h, drawn_to = 0;
    if (!a.mask)
      std::fill(mask, mask + width, 0.0f);
    else if (a.mask_strides[2] == 0)
      read_mask(0);
  }

  void read_mask(int64_t row) {
    const X* from =
        static_cast<const X*>(a.mask) + b * a.mask_strides[0] + h * a.mask_strides[1] + row * a.mask_strides[2];
    for_vectors(a.K, [&](int64_t i, auto lanes) { store(mask + i, load(from + i, lanes)); });
  }

  // Columns that `row` may look at.
  int64_t visible(int64_t row) const { return a.causal ? std::clamp<int64_t>(row + 1 + a.K - a.S, 0, a.K) : a.K; }

  const float* keep(int64_t row) {
    if (!a.seed) return nullptr;
    if (row < drawn_from || row >= drawn_to) {
      const int64_t batch = a.B / a.seeds, first = ((b % batch * a.h + h) * a.S + row) * a.K;
      drawn_from = row, drawn_to = std::min(row + rows_drawn(a), a.S);
      const int64_t n = a.causal ? visible(row) : (drawn_to - row) * a.K;
      drawn = dropper.multipliers(static_cast<uint64_t>(a.seed[b / batch]), first, n, multipliers);
    }
    return drawn + (row - drawn_from) * a.K;
  }

  // Turns a row of q k^T into scale * q k^T + mask, -inf where it may not look; returns the maximum.
  float scores(int64_t row, float* s) {
    if (a.mask && a.mask_strides[2] != 0) read_mask(row);
    const int64_t n = visible(row);
    const float scale = static_cast<float>(a.scale);
    const f32v hidden = splat(-std::numeric_limits<float>::infinity());
    f32v top = hidden;
    for_vectors(n, [&](int64_t i, auto lanes) {
      f32v v = load(s + i) * scale + load(mask + i);
      if constexpr (!std::is_same_v<decltype(lanes), std::integral_constant<int, kLanes>>) {
        const i32v lane = lane_numbers();
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
template <class X>
PETUNE_INLINE float exponentials(float* s, int64_t visible, int64_t width, float top) {
  f32v total = {};
  for_vectors(visible, [&](int64_t i, auto) {
    const f32v e = exp_for<X>(load(s + i) - top);
    total += e;
    store(s + i, e);
  });
  std::fill(s + whole_vectors(visible), s + width, 0.0f);
  return sum(total);
}

// Units are pieces of kPieceRows query rows of one (batch, head), so that few heads still feed many threads.
constexpr int64_t kPieceRows = 4 * kTileRows;

template <class X, bool pairs>
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
      operand_columns<pairs>(head.at(a.k, a.k_strides), a.k_strides.s, K, D, k, score_row);
      operand_depth<pairs>(head.at(a.v, a.v_strides), a.v_strides.s, K, D, v, head_row);
    }
    const int64_t begin = piece % pieces * kPieceRows, end = std::min(begin + kPieceRows, S);
    for (int64_t row = begin; row < end; row += kTileRows) {
      const int64_t rows = std::min(kTileRows, end - row), seen = head.visible(row + rows - 1);
      const int64_t columns = whole_vectors(seen);
      operand_rows<pairs>(head.at(a.q, a.q_strides, row), a.q_strides.s, rows, D, q, head_row);
      matmul<pairs>(q, head_row, 1, k, score_row, s, score_row, rows, columns, depth<pairs>(D), false);
      for (int64_t r = 0; r < rows; ++r) {
        float* weights = s + r * score_row;
        const float top = head.scores(row + r, weights);
        if (top == -std::numeric_limits<float>::infinity()) {  // nothing to look at
          std::fill(weights, weights + columns, 0.0f);
          inverse[r] = 0.0f;
          continue;
        }
        const float total = exponentials<X>(weights, head.visible(row + r), columns, top);
        inverse[r] = 1.0f / total;
        if (const float* keep = head.keep(row + r))
          for_vectors(head.visible(row + r), [&](int64_t i, auto n) {
            store(weights + i, load(weights + i) * first_lanes(load(keep + i), n));
          });
        weights_along<pairs>(weights, columns, weights);
      }
      matmul<pairs>(s, score_row, 1, v, head_row, o, head_row, rows, head_row, depth<pairs>(seen), false);
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

template <class X, bool pairs>
void attention_backward_heads(const AttentionBackward& args, int64_t first, int64_t last) {
  const Attention& a = args.forward;
  const int64_t S = a.S, K = a.K, D = a.D;
  const int64_t score_row = whole_vectors(K) + kLanes, head_row = whole_vectors(D);
  const float scale = static_cast<float>(a.scale);
  Scratch scratch(Head<X>::scratch_floats(a) + 2 * D * score_row + 3 * K * head_row +
                  kTileRows * (3 * score_row + 5 * head_row));
  Head<X> head(a, scratch);
  float *k = scratch.take(K * head_row), *k_columns = scratch.take(D * score_row),
        *v_columns = scratch.take(D * score_row), *dk = scratch.take(K * head_row), *dv = scratch.take(K * head_row),
        *q = scratch.take(kTileRows * head_row), *d_o = scratch.take(kTileRows * head_row),
        *dq = scratch.take(kTileRows * head_row), *s = scratch.take(kTileRows * score_row),
        *ds = scratch.take(kTileRows * score_row);
  // the same matrices with the depth of another product: fp32 has one form for all, pairs need a second
  float *q_depth = pairs ? scratch.take(kTileRows * head_row) : q,
        *do_depth = pairs ? scratch.take(kTileRows * head_row) : d_o,
        *ds_along = pairs ? scratch.take(kTileRows * score_row) : ds;
  const int64_t across = pairs ? 2 * score_row : score_row;
  const bool want_scores = args.dq || args.dk;
  for (int64_t unit = first; unit < last; ++unit) {
    head.select(unit);
    const X* keys = head.at(a.k, a.k_strides);
    operand_columns<pairs>(keys, a.k_strides.s, K, D, k_columns, score_row);
    if (want_scores) operand_columns<pairs>(head.at(a.v, a.v_strides), a.v_strides.s, K, D, v_columns, score_row);
    if (args.dq) operand_depth<pairs>(keys, a.k_strides.s, K, D, k, head_row);
    std::fill(dk, dk + K * head_row, 0.0f);
    std::fill(dv, dv + K * head_row, 0.0f);
    for (int64_t row = 0; row < S; row += kTileRows) {
      const int64_t rows = std::min(kTileRows, S - row), seen = head.visible(row + rows - 1);
      const int64_t columns = whole_vectors(seen);
      operand_rows<pairs>(head.at(a.q, a.q_strides, row), a.q_strides.s, rows, D, q, head_row);
      operand_rows<pairs>(head.at(args.d_o, args.do_strides, row), args.do_strides.s, rows, D, d_o, head_row);
      if constexpr (pairs) {
        operand_depth<pairs>(head.at(a.q, a.q_strides, row), a.q_strides.s, rows, D, q_depth, head_row);
        operand_depth<pairs>(head.at(args.d_o, args.do_strides, row), args.do_strides.s, rows, D, do_depth, head_row);
      }
      matmul<pairs>(q, head_row, 1, k_columns, score_row, s, score_row, rows, columns, depth<pairs>(D), false);
      if (want_scores)
        matmul<pairs>(d_o, head_row, 1, v_columns, score_row, ds, score_row, rows, columns, depth<pairs>(D), false);
      for (int64_t r = 0; r < rows; ++r) {
        float *weights = s + r * score_row, *slopes = ds + r * score_row;
        const float top = head.scores(row + r, weights);
        if (top == -std::numeric_limits<float>::infinity()) {
          std::fill(weights, weights + columns, 0.0f);
          std::fill(slopes, slopes + columns, 0.0f);
          continue;
        }
        const int64_t n = head.visible(row + r);
        const float inverse = 1.0f / exponentials<X>(weights, n, columns, top);
        const float* keep = head.keep(row + r);
        f32v product = {};
        if (want_scores)
          for_vectors(n, [&](int64_t i, auto lanes) {
            f32v d = load(slopes + i);
            if (keep) store(slopes + i, d *= first_lanes(load(keep + i), lanes));
            product += load(weights + i) * d;
          });
        const float delta = sum(product) * inverse;
        for_vectors(n, [&](int64_t i, auto lanes) {
          const f32v p = load(weights + i) * inverse;
          if (want_scores) store(slopes + i, p * ((load(slopes + i) - delta) * scale));
          store(weights + i, keep ? p * first_lanes(load(keep + i), lanes) : p);
        });
        std::fill(slopes + whole_vectors(n), slopes + columns, 0.0f);
      }
      if (args.dq)
        for (int64_t r = 0; r < rows; ++r) weights_along<pairs>(ds + r * score_row, columns, ds_along + r * score_row);
      weights_across<pairs>(s, score_row, rows, columns);
      weights_across<pairs>(ds, score_row, rows, columns);
      const int64_t d = depth<pairs>(rows);
      if (args.dv) matmul<pairs>(s, 1, across, do_depth, head_row, dv, head_row, seen, head_row, d, true);
      if (args.dk) matmul<pairs>(ds, 1, across, q_depth, head_row, dk, head_row, seen, head_row, d, true);
      if (args.dq) {
        matmul<pairs>(ds_along, score_row, 1, k, head_row, dq, head_row, rows, head_row, depth<pairs>(seen), false);
        narrow(dq, head_row, rows, D, head.at(args.dq, args.dq_strides, row), args.dq_strides.s);
      }
    }
    if (args.dk) narrow(dk, head_row, K, D, head.at(args.dk, args.dk_strides), args.dk_strides.s);
    if (args.dv) narrow(dv, head_row, K, D, head.at(args.dv, args.dv_strides), args.dv_strides.s);
  }
}

// Pairs need an even D and even row strides (rows are read 32 bits at a time) and the instructions.
inline bool takes_pairs(const Attention& a, std::initializer_list<Strides> strides) {
#if PETUNE_BF16
  return kHasBf16 && a.dtype == DType::bf16 && a.D % 2 == 0 &&
         std::all_of(strides.begin(), strides.end(), [](const Strides& s) { return s.s % 2 == 0; });
#else
  return false;
#endif
}

inline void attention_forward(const Attention& a) {
  const int64_t pieces = a.B * a.h * ((a.S + kPieceRows - 1) / kPieceRows);
  const bool pairs = takes_pairs(a, {a.q_strides, a.k_strides, a.v_strides});
  parallel(pieces, 1, [&](int64_t begin, int64_t end) {
    pairs                   ? attention_pieces<bf16, PETUNE_BF16>(a, begin, end)
    : a.dtype == DType::f32 ? attention_pieces<float, false>(a, begin, end)
                            : attention_pieces<bf16, false>(a, begin, end);
  });
}

inline void attention_backward_all(const AttentionBackward& b) {
  const Attention& a = b.forward;
  const bool pairs = takes_pairs(a, {a.q_strides, a.k_strides, a.v_strides, b.do_strides});
  parallel(a.B * a.h, 1, [&](int64_t begin, int64_t end) {
    pairs                   ? attention_backward_heads<bf16, PETUNE_BF16>(b, begin, end)
    : a.dtype == DType::f32 ? attention_backward_heads<float, false>(b, begin, end)
                            : attention_backward_heads<bf16, false>(b, begin, end);
  });
}

}  // namespace petune::cpu::PETUNE_ISA

#else

namespace petune::cpu {

void attention(const Attention& args) { PETUNE_DISPATCH(attention_forward)(args); }
void attention_backward(const AttentionBackward& args) { PETUNE_DISPATCH(attention_backward_all)(args); }

}  // namespace petune::cpu

#endif
