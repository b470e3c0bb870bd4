// residual_norm: z = residual + dropout(x + bias), y = xhat * gamma + beta, and its backward.
//
//   forward    LayerNorm  xhat = (z - mean z) * rstd, rstd = 1 / sqrt(var z + eps);  RMSNorm  xhat = z * rstd,
//              rstd = 1 / sqrt(mean z^2 + eps)
//   backward   g = dy * gamma,  d = rstd * (g - xhat * mean(g * xhat) - [LayerNorm] mean g) + dz
//              d_residual = d, d_x = dropout(d), d_bias = sum d_x, d_gamma = sum dy * xhat, d_beta = sum dy
//              One pass over dy and the saved row; xhat comes from whichever row was saved.
//
// Two kernels each. `_rows`: H is a multiple of a 16-byte chunk, pointers are aligned, and one row fits in the
// registers of a group of threads, a warp where H is small (up to 1024 in 16-bit types), several warps above; a block
// holds as many groups as fit in 256 threads and each group walks over its rows. `_any`: every other H and alignment.
//
// The column sums of the backward live in fp32 registers over all rows of a group and are switched at compile time
// (kSums), because they decide how many registers a thread needs. Everything else unwanted is a null pointer that the
// whole grid agrees on: one predicate, no load, no store, no arithmetic.
#include <utility>

#include "reduce.cuh"

namespace petune::cuda {
namespace {

constexpr int kBlock = 256;                      // threads, where a row does not need more
constexpr int kWide = 512;                       // most threads on one row
constexpr int kGamma = 1, kBeta = 2, kBias = 4;  // kSums
constexpr int kTile = kBlock / 32;               // rows that an `_any` backward block handles at a time

PETUNE_HD constexpr int count_sums(int sums) { return (sums & 1) + (sums >> 1 & 1) + (sums >> 2 & 1); }

// Sums cost a thread one register per column, so fewer warps fit; such a kernel loads its next row while it works on
// this one, which keeps as many bytes in flight. Without sums, more warps do that.
PETUNE_HD constexpr bool prefetches(int sums) { return sums != 0; }
PETUNE_HD constexpr int most_threads(int sums) { return sums == 0 ? kWide : kBlock; }

// Backward blocks of 256 threads on a multiprocessor: two leave a thread 128 registers. What it needs is the sums,
// five packed rows (dy, saved, both again for the next row, dz) and about 60 more.
PETUNE_HD constexpr int blocks_per_multiprocessor(int chunks, int chunk, int sums) {
  return sums != 0 && count_sums(sums) * chunks * chunk + 5 * 4 * chunks + 60 <= 128 ? 2 : 1;
}

// Whether gamma stays in registers, packed, over all rows. With four chunks and one sum blocks of 160 threads (H = 5120
// in 16 bits) fit twice only without it; with three sums no register is left.
PETUNE_HD constexpr bool keeps_gamma(int chunks, int sums) {
  return sums != 0 && (chunks < 4 || count_sums(sums) == 2);
}

// How the rows of a replica are dealt out. Blocks of one replica never touch another's rows.
struct Rows {
  int64_t per_replica;
  int H, threads, groups;  // threads of one row, rows of a block at a time
  int blocks;              // of one replica
  Drop drop;
  int64_t seeds, rows_per_seed;
  bool seed_per_replica;
  bool param_f32;
};

// Chunks per thread and threads per row, or chunks = 0 where the `_rows` kernels do not apply.
struct Shape {
  int chunks, threads;
};

Shape shape_of(int H, int chunk, bool aligned, int most) {
  if (!aligned || H % chunk != 0) return {0, kBlock};
  const int n = H / chunk;
  if (n <= 4 * 32) return {std::max(1, ceil_div(n, 32)), 32};
  Shape best{0, kBlock};
  int least = std::numeric_limits<int>::max();
  for (int chunks = 4; chunks >= 2; --chunks) {  // on a tie more chunks: more loads in flight, fewer warps at a barrier
    const int threads = ceil_div(n, chunks * 32) * 32, slots = threads * chunks;
    if (threads <= most && slots < least) least = slots, best = {chunks, threads};
  }
  return best;
}

// Rows of a block at a time.
int groups_of(Shape shape) { return shape.chunks == 0 ? 1 : std::max(1, kBlock / shape.threads); }

template <typename Op>
Rows deal(const Op& op, int H, Shape shape, int most_blocks) {
  Rows rows{};
  rows.per_replica = op.T / op.G;
  rows.H = H;
  rows.threads = shape.threads;
  rows.groups = groups_of(shape);
  const int64_t useful = ceil_div<int64_t>(rows.per_replica, rows.groups);
  rows.blocks = static_cast<int>(std::min<int64_t>(useful, std::max<int64_t>(1, most_blocks / op.G)));
  rows.drop = make_drop(op.seed, op.p);
  rows.seeds = std::max<int64_t>(1, op.seeds);
  rows.rows_per_seed = op.T / rows.seeds;
  rows.seed_per_replica = rows.seeds == op.G;
  rows.param_f32 = op.param_dtype == DType::f32;
  return rows;
}

int grid_of(const Rows& rows, int64_t G) {
  if (G * rows.blocks > std::numeric_limits<int>::max())
    throw std::invalid_argument("petune: residual_norm: G = " + std::to_string(G) +
                                " replicas are too many for one grid");
  return static_cast<int>(G * rows.blocks);
}

// Where a thread is, and where its chunks are.
struct Place {
  int64_t g, first_row;
  int block, group, thread;

  __device__ explicit Place(const Rows& rows)
      : g(blockIdx.x / rows.blocks),
        first_row(g * rows.per_replica),
        block(blockIdx.x % rows.blocks),
        group(threadIdx.x / rows.threads),
        thread(threadIdx.x % rows.threads) {}

  // The C chunks of a thread are 32 chunks apart: each warp owns a stretch of the row, and the distance is a constant
  // that addresses fold into the instruction.
  template <int C, int V>
  __device__ int first_column() const {
    return (thread / 32 * C * 32 + thread % 32) * V;
  }
  // Where this replica's values of a small parameter begin: [G, H], or [H] for all replicas.
  template <typename Op>
  __device__ int64_t parameter(const Op& op, Shared which, int H) const {
    return op.shared & which ? 0 : g * H;
  }
};

// The mask of one row i of a replica: its seed, read once and early. Elements are counted within the rows of one seed;
// a division finds them only where seeds and replicas differ in number.
struct Mask {
  int64_t seed = 0, first_element = 0;

  __device__ Mask(const Rows& rows, const Place& at, int64_t i) {
    if (rows.drop.seed == nullptr || i >= rows.per_replica) return;
    const int64_t row = at.first_row + i;
    const int64_t s = rows.seed_per_replica ? at.g : rows.seeds == 1 ? 0 : row / rows.rows_per_seed;
    seed = rows.drop.seed[s];
    first_element = (row - s * rows.rows_per_seed) * rows.H;
  }
};

// ---------------------------------------------------------------------------------------------------------- forward

// z of one chunk, from x, bias, the mask and the residual, in that order.
template <typename T, bool kVector>
__device__ __forceinline__ void make_z(const ResidualNorm& op, const Rows& rows, const Place& at, const Mask& mask,
                                       int column, int n, uint4 x, uint4 residual, float (&z)[kChunk<T>]) {
  constexpr int V = kChunk<T>;
  unpack<T>(x, z);
  if (op.bias != nullptr) {
    float bias[V];
    load_param<kVector, T>(op.bias, rows.param_f32, at.parameter(op, kSharedBias, rows.H) + column, n, bias);
#pragma unroll
    for (int j = 0; j < V; ++j) z[j] += bias[j];
  }
  if (rows.drop.seed != nullptr) apply_dropout<kVector>(rows.drop, mask.seed, mask.first_element + column, z);
  if (op.residual != nullptr) {
    float r[V];
    unpack<T>(residual, r);
#pragma unroll
    for (int j = 0; j < V; ++j) z[j] += r[j];
  }
}

// Writes one chunk of z, xhat and y.
template <typename T, bool kVector>
__device__ __forceinline__ void write_row(const ResidualNorm& op, const Rows& rows, const Place& at, int64_t offset,
                                          int column, int n, float mean, float rstd, float (&z)[kChunk<T>]) {
  constexpr int V = kChunk<T>;
  if (op.z != nullptr) store<kVector>(static_cast<T*>(op.z) + offset + column, n, z);
#pragma unroll
  for (int i = 0; i < V; ++i) z[i] = (z[i] - mean) * rstd;
  if (op.xhat != nullptr) store<kVector>(static_cast<T*>(op.xhat) + offset + column, n, z);
  if (op.gamma != nullptr) {
    float gamma[V];
    load_param<kVector, T>(op.gamma, rows.param_f32, at.parameter(op, kSharedGamma, rows.H) + column, n, gamma);
#pragma unroll
    for (int i = 0; i < V; ++i) z[i] *= gamma[i];
  }
  if (op.beta != nullptr) {
    float beta[V];
    load_param<kVector, T>(op.beta, rows.param_f32, at.parameter(op, kSharedBeta, rows.H) + column, n, beta);
#pragma unroll
    for (int i = 0; i < V; ++i) z[i] += beta[i];
  }
  store<kVector>(static_cast<T*>(op.y) + offset + column, n, z);
}

template <typename T, int C>
__global__ void __launch_bounds__(kWide, 1) residual_norm_rows(ResidualNorm op, Rows rows) {
  constexpr int V = kChunk<T>;
  __shared__ RowScratch scratch;
  int turn = 0;
  const Place at(rows);
  const int first_column = at.first_column<C, V>();
  const float inverse = 1.0f / rows.H;
  // all groups of a block go round equally often: a row past the end is worked on with zeros, for the barriers' sake
  for (int64_t i0 = static_cast<int64_t>(at.block) * rows.groups; i0 < rows.per_replica;
       i0 += static_cast<int64_t>(rows.blocks) * rows.groups) {
    const int64_t i = i0 + at.group, row = at.first_row + i, offset = row * rows.H;
    const int width = i < rows.per_replica ? rows.H : 0;
    const Mask mask(rows, at, i);
    uint4 x[C], residual[C] = {};
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int column = first_column + c * 32 * V;
      x[c] = load<true>(static_cast<const T*>(op.x) + offset + column, width - column);
      if (op.residual != nullptr)
        residual[c] = load<true>(static_cast<const T*>(op.residual) + offset + column, width - column);
    }
    float z[C][V], sum[1] = {0.0f}, squares[1] = {0.0f}, mean = 0.0f;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int column = first_column + c * 32 * V;
      if (column < width) {
        make_z<T, true>(op, rows, at, mask, column, width - column, x[c], residual[c], z[c]);
#pragma unroll
        for (int j = 0; j < V; ++j) sum[0] += z[c][j];
      }
    }
    if (!op.rms) {
      row_sum(sum, rows.threads, scratch, turn);
      mean = sum[0] * inverse;
    }
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int column = first_column + c * 32 * V;
      if (column < width) {
#pragma unroll
        for (int j = 0; j < V; ++j) squares[0] += (z[c][j] - mean) * (z[c][j] - mean);
      }
    }
    row_sum(squares, rows.threads, scratch, turn);
    const float rstd = rsqrtf(squares[0] * inverse + static_cast<float>(op.eps));
    if (at.thread == 0 && width > 0) op.rstd[row] = rstd;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int column = first_column + c * 32 * V;
      if (column < width) write_row<T, true>(op, rows, at, offset, column, width - column, mean, rstd, z[c]);
    }
  }
}

// One row per block, read three times (from cache after the first): mean, variance, result.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kBlock, 2) residual_norm_any(ResidualNorm op, Rows rows) {
  constexpr int V = kChunk<T>;
  __shared__ RowScratch scratch;
  int turn = 0;
  const Place at(rows);
  const float inverse = 1.0f / rows.H;
  for (int64_t i = at.block; i < rows.per_replica; i += rows.blocks) {
    const int64_t row = at.first_row + i, offset = row * rows.H;
    const Mask mask(rows, at, i);
    const auto each_chunk = [&](auto&& use) {
      for (int column = at.thread * V; column < rows.H; column += kBlock * V) {
        const int n = rows.H - column;
        const uint4 x = load<kVector>(static_cast<const T*>(op.x) + offset + column, n);
        uint4 residual = make_uint4(0, 0, 0, 0);
        if (op.residual != nullptr) residual = load<kVector>(static_cast<const T*>(op.residual) + offset + column, n);
        float z[V];
        make_z<T, kVector>(op, rows, at, mask, column, n, x, residual, z);
        use(column, n, z);
      }
    };
    float sum[1] = {0.0f}, squares[1] = {0.0f}, mean = 0.0f;
    if (!op.rms) {
      each_chunk([&](int, int n, float (&z)[V]) {
#pragma unroll
        for (int j = 0; j < V; ++j) sum[0] += j < n ? z[j] : 0.0f;
      });
      row_sum(sum, kBlock, scratch, turn);
      mean = sum[0] * inverse;
    }
    each_chunk([&](int, int n, float (&z)[V]) {
#pragma unroll
      for (int j = 0; j < V; ++j) squares[0] += j < n ? (z[j] - mean) * (z[j] - mean) : 0.0f;
    });
    row_sum(squares, kBlock, scratch, turn);
    const float rstd = rsqrtf(squares[0] * inverse + static_cast<float>(op.eps));
    if (at.thread == 0) op.rstd[row] = rstd;
    each_chunk([&](int column, int n, float (&z)[V]) {
      write_row<T, kVector>(op, rows, at, offset, column, n, mean, rstd, z);
    });
  }
}

// --------------------------------------------------------------------------------------------------------- backward

template <typename T, bool kVector>
__device__ __forceinline__ void load_gamma(const ResidualNormBackward& op, const Rows& rows, const Place& at,
                                           int column, int n, float (&gamma)[kChunk<T>]) {
  if (op.gamma != nullptr) {
    load_param<kVector, T>(op.gamma, rows.param_f32, at.parameter(op, kSharedGamma, rows.H) + column, n, gamma);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) gamma[i] = 1.0f;
  }
}

// dy, g = dy * gamma and xhat of one chunk. mean matters where the row is z.
template <typename T>
__device__ __forceinline__ void make_xhat(const ResidualNormBackward& op, uint4 dy, uint4 row, float mean, float rstd,
                                          const float (&gamma)[kChunk<T>], float (&wide_dy)[kChunk<T>],
                                          float (&g)[kChunk<T>], float (&xhat)[kChunk<T>]) {
  constexpr int V = kChunk<T>;
  unpack<T>(dy, wide_dy);
  unpack<T>(row, xhat);
  if (op.row_is_z) {
#pragma unroll
    for (int i = 0; i < V; ++i) xhat[i] = (xhat[i] - mean) * rstd;
  }
#pragma unroll
  for (int i = 0; i < V; ++i) g[i] = wide_dy[i] * gamma[i];
}

// From g and xhat of one chunk: writes d_residual and d_x, leaves d_x in g.
template <typename T, bool kVector>
__device__ __forceinline__ void write_d(const ResidualNormBackward& op, const Rows& rows, const Mask& mask,
                                        int64_t offset, int column, int n, uint4 dz, float mean_gx, float mean_g,
                                        float rstd, const float (&xhat)[kChunk<T>], float (&g)[kChunk<T>]) {
  constexpr int V = kChunk<T>;
#pragma unroll
  for (int j = 0; j < V; ++j) g[j] = (g[j] - xhat[j] * mean_gx - mean_g) * rstd;
  if (op.dz != nullptr) {
    float d[V];
    unpack<T>(dz, d);
#pragma unroll
    for (int j = 0; j < V; ++j) g[j] += d[j];
  }
  if (op.dresidual != nullptr) store<kVector>(static_cast<T*>(op.dresidual) + offset + column, n, g);
  if (rows.drop.seed != nullptr) apply_dropout<kVector>(rows.drop, mask.seed, mask.first_element + column, g);
  if (op.dx != nullptr) store<kVector>(static_cast<T*>(op.dx) + offset + column, n, g);
}

template <typename T, int C, int kSums>
__global__ void __launch_bounds__(most_threads(kSums), blocks_per_multiprocessor(C, kChunk<T>, kSums))
    residual_norm_backward_rows(ResidualNormBackward op, Rows rows, ColumnSums sums) {
  constexpr int V = kChunk<T>;
  constexpr bool kPrefetch = prefetches(kSums), kKeepGamma = keeps_gamma(C, kSums);
  __shared__ RowScratch scratch;
  int turn = 0;
  const Place at(rows);
  const int first_column = at.first_column<C, V>();
  const float inverse = 1.0f / rows.H;
  const bool want_d = (kSums & kBias) != 0 || op.dresidual != nullptr || op.dx != nullptr;
  // d_beta alone needs neither the row nor rstd
  const bool want_row = want_d || (kSums & kGamma) != 0;
  const bool want_mean = want_row && op.row_is_z && !op.rms;

  float sum_gamma[kSums & kGamma ? C : 1][V] = {}, sum_beta[kSums & kBeta ? C : 1][V] = {},
                                       sum_bias[kSums & kBias ? C : 1][V] = {};

  const int64_t step = static_cast<int64_t>(rows.blocks) * rows.groups;
  const auto load_row = [&](int64_t i, uint4(&dy)[C], uint4(&row)[C], float& rstd) {
    const int64_t offset = (at.first_row + i) * rows.H;
    const int width = i < rows.per_replica ? rows.H : 0;
    rstd = want_row && width > 0 ? op.rstd[at.first_row + i] : 0.0f;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int column = first_column + c * 32 * V;
      dy[c] = load<true>(static_cast<const T*>(op.dy) + offset + column, width - column);
      if (want_row) row[c] = load<true>(static_cast<const T*>(op.row) + offset + column, width - column);
    }
  };

  uint4 kept_gamma[kKeepGamma ? C : 1];
  const bool kept = kKeepGamma && (sizeof(T) == 4 || !rows.param_f32);
  if constexpr (kKeepGamma) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      float gamma[V];
      const int column = first_column + c * 32 * V;
      load_gamma<T, true>(op, rows, at, column, rows.H - column, gamma);
      kept_gamma[c] = pack<T>(gamma);
    }
  }
  const auto gamma_of = [&](int c, float (&gamma)[V]) {
    if (kept)
      unpack<T>(kept_gamma[kKeepGamma ? c : 0], gamma);
    else
      load_gamma<T, true>(op, rows, at, first_column + c * 32 * V, V, gamma);
  };

  uint4 next_dy[kPrefetch ? C : 1], next_row[kPrefetch ? C : 1] = {};
  float next_rstd = 0.0f;
  const int64_t begin = static_cast<int64_t>(at.block) * rows.groups;
  if constexpr (kPrefetch) load_row(begin + at.group, next_dy, next_row, next_rstd);
  for (int64_t i0 = begin; i0 < rows.per_replica; i0 += step) {
    const int64_t i = i0 + at.group, offset = (at.first_row + i) * rows.H;
    const int width = i < rows.per_replica ? rows.H : 0;
    const Mask mask(rows, at, want_d ? i : rows.per_replica);
    uint4 dy[C], row[C] = {}, dz[C] = {};
    float rstd = next_rstd;
    if constexpr (kPrefetch) {
#pragma unroll
      for (int c = 0; c < C; ++c) dy[c] = next_dy[c], row[c] = next_row[c];
    } else {
      load_row(i, dy, row, rstd);
    }
    if (op.dz != nullptr && want_d) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int column = first_column + c * 32 * V;
        dz[c] = load<true>(static_cast<const T*>(op.dz) + offset + column, width - column);
      }
    }
    if constexpr (kPrefetch) load_row(i + step, next_dy, next_row, next_rstd);

    float mean[1] = {0.0f};
    if (want_mean) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        float z[V];
        unpack<T>(row[c], z);  // zeros past the end
#pragma unroll
        for (int j = 0; j < V; ++j) mean[0] += z[j];
      }
      row_sum(mean, rows.threads, scratch, turn);
      mean[0] *= inverse;
    }

    float dots[2] = {0.0f, 0.0f};  // sums of g * xhat and of g
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int column = first_column + c * 32 * V;
      if (column >= width) continue;
      float gamma[V], wide_dy[V], g[V], xhat[V];
      gamma_of(c, gamma);
      make_xhat<T>(op, dy[c], row[c], mean[0], rstd, gamma, wide_dy, g, xhat);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        dots[0] += g[j] * xhat[j];
        dots[1] += g[j];
        if constexpr ((kSums & kGamma) != 0) sum_gamma[c][j] += wide_dy[j] * xhat[j];
        if constexpr ((kSums & kBeta) != 0) sum_beta[c][j] += wide_dy[j];
      }
    }
    if (!want_d) continue;
    keep_packed<T>(dy), keep_packed<T>(row);
    row_sum(dots, rows.threads, scratch, turn);
    const float mean_gx = dots[0] * inverse, mean_g = op.rms ? 0.0f : dots[1] * inverse;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int column = first_column + c * 32 * V;
      if (column >= width) continue;
      float gamma[V], wide_dy[V], g[V], xhat[V];
      gamma_of(c, gamma);
      make_xhat<T>(op, dy[c], row[c], mean[0], rstd, gamma, wide_dy, g, xhat);
      write_d<T, true>(op, rows, mask, offset, column, V, dz[c], mean_gx, mean_g, rstd, xhat, g);
      if constexpr ((kSums & kBias) != 0) {
#pragma unroll
        for (int j = 0; j < V; ++j) sum_bias[c][j] += g[j];
      }
    }
  }

  if constexpr (kSums != 0) {
    // the groups of this block, added in order, are its row of partials
    PETUNE_DYNAMIC_SHARED(shared);
    const auto write_partials = [&](float* partial, const auto& sum) {
      partial += (at.g * rows.blocks + at.block) * rows.H;
      float* mine = rows.groups == 1 ? partial : shared + at.group * rows.H;
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int column = first_column + c * 32 * V;
        if (column >= rows.H) continue;
#pragma unroll
        for (int j = 0; j < V; j += 4)
          *reinterpret_cast<float4*>(mine + column + j) =
              make_float4(sum[c][j], sum[c][j + 1], sum[c][j + 2], sum[c][j + 3]);
      }
      if (rows.groups == 1) return;
      __syncthreads();
      for (int column = threadIdx.x * 4; column < rows.H; column += blockDim.x * 4) {
        float4 total = *reinterpret_cast<const float4*>(shared + column);
        for (int group = 1; group < rows.groups; ++group) {
          const float4 v = *reinterpret_cast<const float4*>(shared + group * rows.H + column);
          total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
        }
        *reinterpret_cast<float4*>(partial + column) = total;
      }
      __syncthreads();
    };
    if constexpr ((kSums & kGamma) != 0) write_partials(sums.partial[0], sum_gamma);
    if constexpr ((kSums & kBeta) != 0) write_partials(sums.partial[1], sum_beta);
    if constexpr ((kSums & kBias) != 0) write_partials(sums.partial[2], sum_bias);
    finish<T>(sums, at.g, at.g, at.block, rows.H, 0, rows.H);
  }
}

// Any H. A block takes a tile of 8 rows: first each warp finds the means of one row, then each thread owns columns and
// walks down the tile (read again, from cache), so column sums stay in registers over the tile and are added to the
// block's own row of partials once per tile.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kBlock, 2)
    residual_norm_backward_any(ResidualNormBackward op, Rows rows, ColumnSums sums) {
  constexpr int V = kChunk<T>;
  __shared__ float tile_mean[kTile], tile_rstd[kTile], tile_gx[kTile], tile_g[kTile];
  const Place at(rows);
  const float inverse = 1.0f / rows.H;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* const d_gamma = sums.partial[0];
  float* const d_beta = sums.partial[1];
  float* const d_bias = sums.partial[2];
  const bool want_d = d_bias != nullptr || op.dresidual != nullptr || op.dx != nullptr;
  const bool want_row = want_d || d_gamma != nullptr;
  const int64_t partial = (at.g * rows.blocks + at.block) * rows.H;

  bool first_tile = true;
  for (int64_t i0 = static_cast<int64_t>(at.block) * kTile; i0 < rows.per_replica;
       i0 += static_cast<int64_t>(rows.blocks) * kTile) {
    if (want_row && i0 + warp < rows.per_replica) {
      const int64_t row = at.first_row + i0 + warp, offset = row * rows.H;
      const float rstd = op.rstd[row];
      float mean[1] = {0.0f}, dots[2] = {0.0f, 0.0f};
      if (op.row_is_z && !op.rms) {
        for (int column = lane * V; column < rows.H; column += 32 * V) {
          float z[V];
          unpack<T>(load<kVector>(static_cast<const T*>(op.row) + offset + column, rows.H - column), z);
#pragma unroll
          for (int j = 0; j < V; ++j) mean[0] += z[j];
        }
        warp_sum(mean);
        mean[0] *= inverse;
      }
      if (want_d) {
        for (int column = lane * V; column < rows.H; column += 32 * V) {
          const int n = rows.H - column;
          const uint4 dy = load<kVector>(static_cast<const T*>(op.dy) + offset + column, n);
          const uint4 saved = load<kVector>(static_cast<const T*>(op.row) + offset + column, n);
          float gamma[V], wide_dy[V], g[V], xhat[V];
          load_gamma<T, kVector>(op, rows, at, column, n, gamma);
          make_xhat<T>(op, dy, saved, mean[0], rstd, gamma, wide_dy, g, xhat);
#pragma unroll
          for (int j = 0; j < V; ++j) {
            dots[0] += j < n ? g[j] * xhat[j] : 0.0f;  // past the end 0 * xhat, which may be infinite
            dots[1] += g[j];
          }
        }
        warp_sum(dots);
      }
      if (lane == 0) {
        tile_mean[warp] = mean[0];
        tile_rstd[warp] = rstd;
        tile_gx[warp] = dots[0] * inverse;
        tile_g[warp] = op.rms ? 0.0f : dots[1] * inverse;
      }
    }
    __syncthreads();
    const int tile = static_cast<int>(min(static_cast<int64_t>(kTile), rows.per_replica - i0));
    for (int column = threadIdx.x * V; column < rows.H; column += kBlock * V) {
      const int n = rows.H - column;
      float gamma[V], sum_gamma[V] = {}, sum_beta[V] = {}, sum_bias[V] = {};
      load_gamma<T, kVector>(op, rows, at, column, n, gamma);
      for (int r = 0; r < tile; ++r) {
        const int64_t i = i0 + r, offset = (at.first_row + i) * rows.H;
        const Mask mask(rows, at, want_d ? i : rows.per_replica);
        const uint4 dy = load<kVector>(static_cast<const T*>(op.dy) + offset + column, n);
        uint4 saved = make_uint4(0, 0, 0, 0), dz = make_uint4(0, 0, 0, 0);
        if (want_row) saved = load<kVector>(static_cast<const T*>(op.row) + offset + column, n);
        if (want_d && op.dz != nullptr) dz = load<kVector>(static_cast<const T*>(op.dz) + offset + column, n);
        float wide_dy[V], g[V], xhat[V];
        make_xhat<T>(op, dy, saved, want_row ? tile_mean[r] : 0.0f, want_row ? tile_rstd[r] : 0.0f, gamma, wide_dy, g,
                     xhat);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          sum_gamma[j] += wide_dy[j] * xhat[j];
          sum_beta[j] += wide_dy[j];
        }
        if (want_d) {
          write_d<T, kVector>(op, rows, mask, offset, column, n, dz, tile_gx[r], tile_g[r], tile_rstd[r], xhat, g);
#pragma unroll
          for (int j = 0; j < V; ++j) sum_bias[j] += g[j];
        }
      }
      const auto add = [&](float* to, const float (&sum)[V]) {
        if (to == nullptr) return;
#pragma unroll
        for (int j = 0; j < V; ++j)
          if (j < n) to[partial + column + j] = first_tile ? sum[j] : to[partial + column + j] + sum[j];
      };
      add(d_gamma, sum_gamma);
      add(d_beta, sum_beta);
      add(d_bias, sum_bias);
    }
    first_tile = false;
    __syncthreads();
  }
  if (d_gamma != nullptr || d_beta != nullptr || d_bias != nullptr)
    finish<T>(sums, at.g, at.g, at.block, rows.H, 0, rows.H);
}

using BackwardKernel = void (*)(ResidualNormBackward, Rows, ColumnSums);

template <typename T, int C, int... kSums>
BackwardKernel backward_rows(int sums, std::integer_sequence<int, kSums...>) {
  const BackwardKernel kernels[] = {residual_norm_backward_rows<T, C, kSums>...};
  return kernels[sums];
}

template <typename T>
BackwardKernel backward_kernel(int chunks, int sums, bool vector) {
  constexpr auto kEverySum = std::make_integer_sequence<int, 1 << kMaxSums>();
  switch (chunks) {
    case 1:
      return backward_rows<T, 1>(sums, kEverySum);
    case 2:
      return backward_rows<T, 2>(sums, kEverySum);
    case 3:
      return backward_rows<T, 3>(sums, kEverySum);
    case 4:
      return backward_rows<T, 4>(sums, kEverySum);
    default:
      return vector ? residual_norm_backward_any<T, true> : residual_norm_backward_any<T, false>;
  }
}

struct BackwardPlan {
  BackwardKernel kernel;
  Rows rows;
  ColumnSums sums;
  int wanted;     // kSums
  size_t shared;  // bytes
  size_t workspace;
};

BackwardPlan plan_backward(const ResidualNormBackward& op) {
  BackwardPlan plan{};
  const int H = checked_width(op.H, "residual_norm_backward");
  plan.wanted = (op.dgamma ? kGamma : 0) | (op.dbeta ? kBeta : 0) | (op.dbias ? kBias : 0);
  if (op.T == 0 || H == 0) return plan;
  const int chunk = static_cast<int>(16 / dtype_size(op.dtype));
  const bool aligned = aligned16(op.dy, op.dz, op.row, op.gamma, op.dresidual, op.dx);
  const Shape shape = shape_of(H, chunk, aligned, most_threads(plan.wanted));
  with_dtype(op.dtype, [&](auto type) {
    plan.kernel = backward_kernel<decltype(type)>(shape.chunks, plan.wanted, aligned && H % chunk == 0);
  });
  const int groups = groups_of(shape);
  plan.shared = plan.wanted == 0 || groups == 1 ? 0 : sizeof(float) * groups * H;
  // as many blocks as run at once: each more is a row of partials; without sums there are none, and more balance better
  const int per_sm = plan.wanted == 0 ? 8 : resident_blocks(plan.kernel, shape.threads * groups, plan.shared);
  plan.rows = deal(op, H, shape, multiprocessors() * per_sm);
  if (shape.chunks == 0)  // a block takes kTile rows at a time
    plan.rows.blocks = static_cast<int>(std::min<int64_t>(plan.rows.blocks, ceil_div<int64_t>(op.T / op.G, kTile)));
  void* const out[kMaxSums] = {op.dgamma, op.dbeta, op.dbias};
  if (plan.wanted != 0)
    plan.workspace =
        ColumnSums::plan(plan.sums, op.workspace, op.G, op.G, plan.rows.blocks, H, out, plan.rows.param_f32);
  return plan;
}

}  // namespace

void residual_norm(const ResidualNorm& op, Stream stream_handle) {
  const int H = checked_width(op.H, "residual_norm");
  if (op.T == 0 || H == 0) return;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const bool aligned = aligned16(op.x, op.bias, op.residual, op.gamma, op.beta, op.y, op.z, op.xhat);
  const Shape shape = shape_of(H, static_cast<int>(16 / dtype_size(op.dtype)), aligned, kWide);
  const Rows rows = deal(op, H, shape, multiprocessors() * 8);
  const int grid = grid_of(rows, op.G), block = rows.threads * rows.groups;
  with_dtype(op.dtype, [&](auto type) {
    using T = decltype(type);
    const bool vector = aligned && H % kChunk<T> == 0;
    const auto kernel = shape.chunks == 1   ? residual_norm_rows<T, 1>
                        : shape.chunks == 2 ? residual_norm_rows<T, 2>
                        : shape.chunks == 3 ? residual_norm_rows<T, 3>
                        : shape.chunks == 4 ? residual_norm_rows<T, 4>
                        : vector            ? residual_norm_any<T, true>
                                            : residual_norm_any<T, false>;
    PETUNE_LAUNCH(kernel, grid, block, 0, stream, op, rows);
  });
  check_launch("residual_norm");
}

size_t residual_norm_backward_workspace(const ResidualNormBackward& op) {
  ResidualNormBackward counted = op;
  counted.workspace = nullptr;
  return plan_backward(counted).workspace;
}

void residual_norm_backward(const ResidualNormBackward& op, Stream stream_handle) {
  const BackwardPlan plan = plan_backward(op);
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (op.T == 0 || op.H == 0) {
    for (void* small : {op.dgamma, op.dbeta, op.dbias})
      if (small != nullptr && op.G * op.H > 0)
        check(cudaMemsetAsync(small, 0, op.G * op.H * dtype_size(op.param_dtype), stream), "cudaMemsetAsync");
    return;
  }
  if (plan.wanted == 0 && op.dresidual == nullptr && op.dx == nullptr) return;
  plan.sums.start("residual_norm_backward", stream);
  const auto kernel = plan.kernel;
  PETUNE_LAUNCH(kernel, grid_of(plan.rows, op.G), plan.rows.threads * plan.rows.groups, plan.shared, stream, op,
                plan.rows, plan.sums);
  check_launch("residual_norm_backward");
}

}  // namespace petune::cuda
