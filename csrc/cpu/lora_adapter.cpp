// The low-rank half of lora_linear on the CPU: y += scale (dropout(x) A^T B^T + bias_b), and its backward, a block of
// rows at a time. A block's mask, its widened x and everything of rank r live in fp32 scratch that stays in cache: no
// mask, no fp32 row and no x A^T is ever written to memory. The derivation is in petune_kernels/ops/lora_linear.py.
//
// flops: 2 T r (K + N) forward, and backward 2 T r (N for dy B + N for dB + 2 K for x A^T and dA + K for dx); a random
// word per element of x each way. Sums over rows are made in pieces that depend on T and G alone.
#include <utility>

#define PETUNE_FILE "lora_adapter.cpp"
#include "foreach_isa.h"

#ifdef PETUNE_ISA
#include "vec.h"
#include "vec_math.h"
#include "vec_matmul.h"

namespace petune::cpu::PETUNE_ISA {

constexpr int64_t kBlock = 16;    // rows at a time; whole in kAcrossRows
constexpr int64_t kPanel = 1536;  // columns at a time: long runs in memory, yet three panels fit the second-level cache
constexpr int64_t kPanelRow = kPanel + kLanes;

// Rows whose sums are made together, at least: fewer where there are few, so that every thread has some.
inline int64_t piece_rows(int64_t T, int64_t G) { return std::clamp<int64_t>(T / G / 8, 2 * kBlock, 8 * kBlock); }

inline int64_t spaced(int64_t n) { return whole_vectors(n) + kLanes; }

// A [r, K] and B transposed, [r, N], of every replica, as fp32 rows with zeros behind them, and four rows at a time.
struct Factors {
  int64_t ranks, a_row, b_row;
  std::unique_ptr<float[]> memory;

  template <class Args>
  explicit Factors(const Args& args)
      : ranks((args.r + 3) / 4 * 4),
        a_row(spaced(args.K)),
        b_row(spaced(args.N)),
        memory(new float[args.G * ranks * (a_row + b_row)]()) {
    for (int64_t g = 0; g < args.G; ++g) {
      for (int64_t j = 0; j < args.r; ++j)
        expand(args.a, args.param_dtype, (g * args.r + j) * args.K, args.K, 0.0f, const_cast<float*>(a(g)) + j * a_row);
      float* columns = const_cast<float*>(b(g));
      for (int64_t n = 0; n < args.N; ++n)
        for (int64_t j = 0; j < args.r; ++j) {
          const int64_t at = (g * args.N + n) * args.r + j;
          columns[j * b_row + n] = args.param_dtype == DType::bf16 ? number(static_cast<const bf16*>(args.b)[at])
                                                                   : static_cast<const float*>(args.b)[at];
        }
    }
  }
  const float* a(int64_t g) const { return memory.get() + g * ranks * (a_row + b_row); }
  const float* b(int64_t g) const { return a(g) + ranks * a_row; }
};

// What dropout multiplies columns [first, first + n) of rows [row, row + rows) by.
template <class Args>
void draw(const Args& a, const Dropper& dropper, int64_t row, int64_t rows, int64_t first, int64_t n, float* keep) {
  const int64_t seed_rows = a.T / a.seeds;
  for (int64_t t = row; t < row + rows; ++t, keep += kPanelRow) {
    const uint64_t seed = static_cast<uint64_t>(a.seed[t / seed_rows]);
    const uint64_t element = (t % seed_rows) * a.K + first;
    if (element % 4 == 0) {
      dropper.multipliers(seed, element, n, keep);
    } else {
      float shifted[kPanel + 5 * kLanes];
      std::memcpy(keep, dropper.multipliers(seed, element, n, shifted), n * sizeof(float));
    }
  }
}

PETUNE_INLINE f32v kept(f32v v, f32v keep) { return select(keep > 0.0f, v * keep, f32v{}); }  // a dropped NaN is 0

// Columns [first, first + n) of a block of rows of width H as fp32 rows of kPanelRow, zeros behind them and below;
// dropped by `keep` unless it is null.
template <class X>
void widen_panel(const void* from, const float* keep, int64_t row, int64_t rows, int64_t H, int64_t first, int64_t n,
                 float* to) {
  for (int64_t t = 0; t < rows; ++t) {
    const X* x = static_cast<const X*>(from) + (row + t) * H + first;
    for_vectors(n, [&](int64_t i, auto lanes) {
      const f32v v = load(x + i, lanes);
      store(to + t * kPanelRow + i, keep ? kept(v, first_lanes(load(keep + t * kPanelRow + i), lanes)) : v);
    });
  }
  for (int64_t t = rows; t < kBlock; ++t) std::fill(to + t * kPanelRow, to + t * kPanelRow + whole_vectors(n), 0.0f);
}

// body(first, n) for the panels of a row of width H.
template <class Body>
void for_panels(int64_t H, Body&& body) {
  for (int64_t first = 0; first < H; first += kPanel) body(first, std::min(kPanel, H - first));
}

inline void times(float* values, int64_t n, double scale) {
  for (int64_t i = 0; i < n; ++i) values[i] *= static_cast<float>(scale);
}

template <class X>
void adapter_blocks(const LoraAdapter& a, const Factors& factors, int64_t begin, int64_t end) {
  const int64_t replica_rows = a.T / a.G, blocks = (replica_rows + kBlock - 1) / kBlock, ranks = factors.ranks;
  Scratch scratch(3 * kBlock * kPanelRow + kBlock * ranks + padded(a.N) + 4 * kLanes);
  float *x = scratch.take(kBlock * kPanelRow), *keep = scratch.take(kBlock * kPanelRow),
        *change = scratch.take(kBlock * kPanelRow), *low = scratch.take(kBlock * ranks),
        *bias = scratch.take(padded(a.N));
  const Dropper dropper(a.p);
  int64_t replica = -1;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t g = block / blocks, within = block % blocks * kBlock, row = g * replica_rows + within;
    const int64_t rows = std::min(kBlock, replica_rows - within);
    if (g != replica) {
      replica = g;
      expand(a.bias_b, a.param_dtype, g * a.N, a.N, 0.0f, bias);
      times(bias, a.N, a.scale);
    }
    std::fill(low, low + kBlock * ranks, 0.0f);
    for_panels(a.K, [&](int64_t first, int64_t n) {
      if (a.seed) draw(a, dropper, row, rows, first, n, keep);
      widen_panel<X>(a.x, a.seed ? keep : nullptr, row, rows, a.K, first, n, x);
      matmul_across(x, kPanelRow, factors.a(g) + first, factors.a_row, low, ranks, rows, ranks, whole_vectors(n));
    });
    times(low, kBlock * ranks, a.scale);
    for_panels(a.N, [&](int64_t first, int64_t n) {
      matmul<false>(low, ranks, 1, factors.b(g) + first, factors.b_row, change, kPanelRow, rows, whole_vectors(n), a.r,
                    false);
      for (int64_t t = 0; t < rows; ++t) {
        X* y = static_cast<X*>(a.y) + (row + t) * a.N + first;
        for_vectors(n, [&](int64_t i, auto lanes) {
          store(y + i, load(y + i, lanes) + load(change + t * kPanelRow + i) + load(bias + first + i), lanes);
        });
      }
    });
  }
}

// Rows [begin, end) of replica g; adds to da [r, K] and db, transposed [r, N].
template <class X>
void backward_piece(const LoraAdapterBackward& a, const Factors& factors, int64_t g, int64_t begin, int64_t end,
                    float* da, float* db) {
  const int64_t ranks = factors.ranks;
  Scratch scratch(3 * kBlock * kPanelRow + 2 * kBlock * ranks + 4 * kLanes);
  float *wide = scratch.take(kBlock * kPanelRow), *keep = scratch.take(kBlock * kPanelRow),
        *change = scratch.take(kBlock * kPanelRow), *xa = scratch.take(kBlock * ranks),
        *dxa = scratch.take(kBlock * ranks);
  const Dropper dropper(a.p);
  for (int64_t row = begin; row < end; row += kBlock) {
    const int64_t rows = std::min(kBlock, end - row);
    std::fill(xa, xa + kBlock * ranks, 0.0f);
    std::fill(dxa, dxa + kBlock * ranks, 0.0f);
    if (a.dx || a.da)
      for_panels(a.N, [&](int64_t first, int64_t n) {
        widen_panel<X>(a.dy, nullptr, row, rows, a.N, first, n, wide);
        matmul_across(wide, kPanelRow, factors.b(g) + first, factors.b_row, dxa, ranks, rows, ranks, whole_vectors(n));
      });
    times(dxa, kBlock * ranks, a.scale);
    for_panels(a.K, [&](int64_t first, int64_t n) {
      const int64_t width = whole_vectors(n);
      if (a.seed) draw(a, dropper, row, rows, first, n, keep);
      if (a.da || a.db) widen_panel<X>(a.x, a.seed ? keep : nullptr, row, rows, a.K, first, n, wide);
      if (a.db) matmul_across(wide, kPanelRow, factors.a(g) + first, factors.a_row, xa, ranks, rows, ranks, width);
      if (a.da) matmul<false>(dxa, 1, ranks, wide, kPanelRow, da + first, factors.a_row, a.r, width, rows, true);
      if (!a.dx) return;
      matmul<false>(dxa, ranks, 1, factors.a(g) + first, factors.a_row, change, kPanelRow, rows, width, a.r, false);
      for (int64_t t = 0; t < rows; ++t) {
        X* dx = static_cast<X*>(a.dx) + (row + t) * a.K + first;
        for_vectors(n, [&](int64_t i, auto lanes) {
          f32v v = load(change + t * kPanelRow + i);
          if (a.seed) v = kept(v, load(keep + t * kPanelRow + i));
          store(dx + i, load(dx + i, lanes) + v, lanes);
        });
      }
    });
    times(xa, kBlock * ranks, a.scale);
    if (a.db)
      for_panels(a.N, [&](int64_t first, int64_t n) {
        widen_panel<X>(a.dy, nullptr, row, rows, a.N, first, n, wide);
        matmul<false>(xa, 1, ranks, wide, kPanelRow, db + first, factors.b_row, a.r, whole_vectors(n), rows, true);
      });
  }
}

// Floats of one piece's sums: da [r, a_row], then db transposed, [r, b_row].
inline int64_t piece_floats(int64_t r, int64_t K, int64_t N) { return r * (spaced(K) + spaced(N)); }

// Adds the pieces' sums in their fixed order, for row j of replica g's da and column j of its db.
inline void finish(const LoraAdapterBackward& a, const RowChunks& chunks, int64_t g, int64_t j) {
  const int64_t piece = piece_floats(a.r, a.K, a.N);
  const float* partial = static_cast<const float*>(a.workspace) + g * chunks.per_replica * piece;
  const auto row = scratch(1, std::max(a.K, a.N));
  if (a.da) {
    add_pieces(partial + j * spaced(a.K), chunks.per_replica, piece, a.K, row.get());
    write_small(a.da, a.param_dtype, (g * a.r + j) * a.K, a.K, row.get());
  }
  if (a.db) {
    add_pieces(partial + a.r * spaced(a.K) + j * spaced(a.N), chunks.per_replica, piece, a.N, row.get());
    const auto scatter = [&](auto* db) {
      for (int64_t n = 0; n < a.N; ++n) store(db + (g * a.N + n) * a.r + j, row.get()[n]);
    };
    a.param_dtype == DType::bf16 ? scatter(static_cast<bf16*>(a.db)) : scatter(static_cast<float*>(a.db));
  }
}

inline void adapter_forward(const LoraAdapter& a) {
  const Factors factors(a);
  const int64_t blocks = a.G * ((a.T / a.G + kBlock - 1) / kBlock);
  parallel(blocks, 1, [&](int64_t begin, int64_t end) {
    a.dtype == DType::bf16 ? adapter_blocks<bf16>(a, factors, begin, end)
                           : adapter_blocks<float>(a, factors, begin, end);
  });
}

inline void adapter_backward(const LoraAdapterBackward& a) {
  const RowChunks chunks(a.T, a.G, piece_rows(a.T, a.G));
  const Factors factors(a);
  const int64_t piece = piece_floats(a.r, a.K, a.N);
  parallel(a.G * chunks.per_replica, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t g = i / chunks.per_replica, chunk = i % chunks.per_replica;
      float* sums = static_cast<float*>(a.workspace) + i * piece;
      std::fill(sums, sums + piece, 0.0f);
      const int64_t begin = chunks.begin(g, chunk), end = chunks.end(g, chunk);
      a.dtype == DType::bf16 ? backward_piece<bf16>(a, factors, g, begin, end, sums, sums + a.r * factors.a_row)
                             : backward_piece<float>(a, factors, g, begin, end, sums, sums + a.r * factors.a_row);
    }
  });
  if (a.da || a.db)
    parallel(a.G * a.r, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) finish(a, chunks, i / a.r, i % a.r);
    });
}

inline size_t workspace(const LoraAdapterBackward& a) {
  const RowChunks chunks(a.T, a.G, piece_rows(a.T, a.G));
  return static_cast<size_t>(a.G * chunks.per_replica * piece_floats(a.r, a.K, a.N)) * sizeof(float);
}

}  // namespace petune::cpu::PETUNE_ISA

#else

namespace petune::cpu {

void lora_adapter(const LoraAdapter& args) { PETUNE_DISPATCH(adapter_forward)(args); }
void lora_adapter_backward(const LoraAdapterBackward& args) { PETUNE_DISPATCH(adapter_backward)(args); }
size_t lora_adapter_backward_workspace(const LoraAdapterBackward& args) { return PETUNE_DISPATCH(workspace)(args); }

}  // namespace petune::cpu

#endif
