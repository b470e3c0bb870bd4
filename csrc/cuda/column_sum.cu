// column_sum: out[g, n] = sum over the rows t of replica g of x[t, n], in fp32. One read of x, one kernel.
#include "columns.cuh"

namespace petune::cuda {
namespace {

constexpr int kRows = 8;  // in flight per thread: nothing but loads here

template <typename T, bool kVector>
__global__ void __launch_bounds__(kColumnBlock, 2) column_sum_kernel(ColumnSum op, Columns columns, ColumnSums sums) {
  constexpr int V = kChunk<T>;
  const ColumnPlace at(columns, V);
  const int64_t step = static_cast<int64_t>(columns.blocks) * at.rows;
  const T* x = static_cast<const T*>(op.x) + at.first_row * columns.N + at.column;
  float sum[V] = {};
  for (int64_t i0 = static_cast<int64_t>(at.block) * at.rows + at.row; i0 < columns.per_replica; i0 += step * kRows) {
    uint4 raw[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t i = i0 + r * step;
      raw[r] = load<kVector>(x + i * columns.N, i < columns.per_replica ? at.valid : 0);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float v[V];
      unpack<T>(raw[r], v);
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] += v[j];
    }
  }
  finish_slab<float>(sums, 0, columns, at, sum);
}

struct Plan {
  Columns columns;
  ColumnSums sums;
  size_t workspace;
};

Plan plan_of(const ColumnSum& op) {
  Plan plan{};
  const int N = checked_width(op.N, "column_sum");
  if (op.T == 0 || N == 0 || op.G == 0) return plan;
  const int chunk = static_cast<int>(16 / dtype_size(op.dtype));
  plan.columns = make_columns(op.T, op.G, N, chunk, kRows, multiprocessors() * int64_t{3}, DType::f32);
  void* const out[kMaxSums] = {op.out, nullptr, nullptr};
  plan.workspace =
      ColumnSums::plan(plan.sums, op.workspace, op.G, op.G * plan.columns.slabs, plan.columns.blocks, N, out, true);
  return plan;
}

}  // namespace

size_t column_sum_workspace(const ColumnSum& op) {
  ColumnSum counted = op;
  counted.workspace = nullptr;
  float wanted;
  counted.out = &wanted;  // the size does not depend on where the result goes
  return plan_of(counted).workspace;
}

void column_sum(const ColumnSum& op, Stream stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (op.T == 0 || op.N == 0 || op.G == 0) {
    if (op.G * op.N > 0) check(cudaMemsetAsync(op.out, 0, op.G * op.N * sizeof(float), stream), "cudaMemsetAsync");
    return;
  }
  const Plan plan = plan_of(op);
  plan.sums.start("column_sum", stream);
  with_dtype(op.dtype, [&](auto type) {
    using T = decltype(type);
    const bool vector = op.N % kChunk<T> == 0 && aligned16(op.x);
    const auto kernel = vector ? column_sum_kernel<T, true> : column_sum_kernel<T, false>;
    PETUNE_LAUNCH(kernel, grid_of(plan.columns, op.G, "column_sum"), kColumnBlock, 0, stream, op, plan.columns,
                  plan.sums);
  });
  check_launch("column_sum");
}

}  // namespace petune::cuda
