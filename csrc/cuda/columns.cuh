// Element-wise kernels over [T, N] whose threads own columns: bias_act, column_sum.
//
// A block is `across` threads along a row by kBlock / across rows. A thread keeps one chunk of columns and walks down
// the rows, kRows of them in flight, so a bias stays in registers and a column sum is a register per column. The
// columns of one block are a slab; slabs are separate jobs of ColumnSums, so the finish is as parallel as the slabs are
// many.
#pragma once
#include "reduce.cuh"

namespace petune::cuda {

constexpr int kColumnBlock = 256;

struct Columns {
  int64_t per_replica;  // rows
  int N;
  int across;         // threads along a row, a power of two up to 32
  int slabs, blocks;  // slabs of a replica, blocks of a slab
  bool param_f32;
};

// `rows`: rows in flight per thread; most_blocks: of the whole grid.
inline Columns make_columns(int64_t T, int64_t G, int N, int chunk, int rows, int64_t most_blocks, DType param_dtype) {
  Columns columns{};
  columns.per_replica = T / G;
  columns.N = N;
  columns.across = 1;
  while (columns.across < 32 && columns.across * chunk < N) columns.across *= 2;
  columns.slabs = ceil_div(N, columns.across * chunk);
  const int64_t useful = ceil_div<int64_t>(columns.per_replica, kColumnBlock / columns.across * rows);
  columns.blocks = static_cast<int>(clamp<int64_t>(most_blocks / (columns.slabs * G), 1, useful));
  columns.param_f32 = param_dtype == DType::f32;
  return columns;
}

inline int grid_of(const Columns& columns, int64_t G, const char* what) {
  const int64_t grid = G * columns.slabs * columns.blocks;
  if (grid > std::numeric_limits<int>::max())
    throw std::invalid_argument(std::string("petune: ") + what + ": " + std::to_string(grid) +
                                " blocks do not fit one grid");
  return static_cast<int>(grid);
}

// Where a thread is. Neighbouring blocks take neighbouring slabs of the same rows.
struct ColumnPlace {
  int64_t g, first_row;
  int slab, block, thread, row, rows, column, valid;  // valid: columns from `column` on, may be <= 0

  __device__ ColumnPlace(const Columns& columns, int chunk) {
    slab = blockIdx.x % columns.slabs;
    const int rest = blockIdx.x / columns.slabs;
    block = rest % columns.blocks;
    g = rest / columns.blocks;
    first_row = g * columns.per_replica;
    thread = threadIdx.x % columns.across;
    row = threadIdx.x / columns.across;
    rows = kColumnBlock / columns.across;
    column = (slab * columns.across + thread) * chunk;
    valid = columns.N - column;
  }
};

// Adds the threads' sums up over the block and over the slab's blocks, into sums.out[k].
template <typename T, int V>
__device__ __forceinline__ void finish_slab(const ColumnSums& sums, int k, const Columns& columns,
                                            const ColumnPlace& at, const float (&sum)[V]) {
  alignas(16) __shared__ float shared[kColumnBlock * 8];  // [rows][across * V], V up to 8
  const int width = columns.across * V;
#pragma unroll
  for (int j = 0; j < V; j += 4)
    *reinterpret_cast<float4*>(shared + at.row * width + at.thread * V + j) =
        make_float4(sum[j], sum[j + 1], sum[j + 2], sum[j + 3]);
  __syncthreads();
  const int begin = at.slab * width, end = min(begin + width, columns.N);
  float* partial = (k == 0   ? sums.partial[0]
                    : k == 1 ? sums.partial[1]
                             : sums.partial[2]) +
                   (at.g * columns.blocks + at.block) * columns.N;
  for (int column = threadIdx.x; column < end - begin; column += kColumnBlock) {
    float total = 0.0f;
    for (int row = 0; row < at.rows; ++row) total += shared[row * width + column];
    partial[begin + column] = total;
  }
  finish<T>(sums, at.g * columns.slabs + at.slab, at.g, at.block, columns.N, begin, end);
}

}  // namespace petune::cuda
