// Sums, in a fixed order: over the threads of one row, and over the blocks of one column sum.
//
// Column sums take ONE kernel and no float atomics. Every block writes one row of fp32 partials; an int ticket tells
// which block of a team of about sqrt(blocks) came last, that block adds up its team's rows, and the last of those adds
// up the teams. Which block does the work varies; which numbers are added in which order does not, so the result is
// bit-equal from run to run. Two levels, because one block alone would read all the partials through one
// multiprocessor: blocks * H * 4 bytes at some 100 GB/s, 4 us for 132 x 768, against 2 * sqrt(132) * H * 4 in two
// levels.
//
// Tickets start at 0: `start` clears them on the stream, some hundred bytes, before the kernel. The partials need no
// clearing.
#pragma once
#include "chunk.cuh"

namespace petune::cuda {

constexpr int kMaxWarps = 32;

// Adds up v over the lanes of one warp; every lane gets the sums.
template <int N>
__device__ __forceinline__ void warp_sum(float (&v)[N]) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] += __shfl_xor_sync(0xffffffffu, v[k], step);
}

// Adds up v over the `threads` consecutive threads (whole warps) that share a row; each of them gets the sums.
// scratch is shared and two deep: a warp can write its next sums while a slower one still reads the last, so one
// barrier per sum is enough. All threads of the block call it equally often.
using RowScratch = float[2][2 * kMaxWarps];

template <int N>
__device__ __forceinline__ void row_sum(float (&v)[N], int threads, RowScratch& scratch, int& turn) {
  static_assert(N <= 2);
  warp_sum(v);
  if (threads == 32) return;
  const int warp = threadIdx.x / 32, warps = threads / 32, first = warp / warps * warps;
  float* mine = scratch[turn];
  turn ^= 1;
  if (threadIdx.x % 32 == 0)
#pragma unroll
    for (int k = 0; k < N; ++k) mine[N * warp + k] = v[k];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < N; ++k) {
    float sum = 0.0f;
    for (int w = first; w < first + warps; ++w) sum += mine[N * w + k];
    v[k] = sum;
  }
}

constexpr int kMaxSums = 3;  // column sums in one launch

// One job is one set of columns that `blocks` blocks share: a replica, or a replica's slab of columns.
struct ColumnSums {
  float* partial[kMaxSums];  // each [G][blocks][width]; null: not wanted
  void* out[kMaxSums];       // each [G][width]
  bool out_f32;              // out is fp32, else it has the kernel's type
  int* tickets;              // [jobs][1 + teams], zero when the kernel begins
  size_t ticket_bytes;
  int blocks, team, teams;  // blocks of a job, blocks of a team, teams of a job

  // Lays out `workspace` (null: only count) and returns its size in bytes.
  static size_t plan(ColumnSums& sums, void* workspace, int64_t G, int64_t jobs, int blocks, int64_t width,
                     void* const (&out)[kMaxSums], bool out_f32) {
    int root = 1;
    while (root * root < blocks) ++root;
    sums.blocks = blocks;
    sums.team = root;
    sums.teams = ceil_div(blocks, root);
    sums.out_f32 = out_f32;
    sums.tickets = static_cast<int*>(workspace);
    sums.ticket_bytes = jobs * (1 + sums.teams) * sizeof(int);
    size_t bytes = ceil_div<size_t>(sums.ticket_bytes, 256) * 256;
    for (int k = 0; k < kMaxSums; ++k) {
      sums.out[k] = out[k];
      sums.partial[k] = nullptr;
      if (out[k] == nullptr) continue;
      if (workspace != nullptr) sums.partial[k] = reinterpret_cast<float*>(static_cast<char*>(workspace) + bytes);
      bytes += ceil_div<size_t>(G * blocks * width * sizeof(float), 256) * 256;
    }
    return bytes;
  }

  void start(const char* op, cudaStream_t stream) const {
    if (ticket_bytes == 0) return;
    require_workspace(tickets, ticket_bytes, op);
    check(cudaMemsetAsync(tickets, 0, ticket_bytes, stream), "cudaMemsetAsync");
  }
};

// True in all threads of the last of `expected` blocks to come here; what the others wrote before is then visible.
__device__ __forceinline__ bool arrive_last(int* ticket, int expected) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(ticket, 1) == expected - 1;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// For each wanted sum and each column in [begin, end): the sum over `count` rows `step` floats apart, from `base` on.
// It goes to out (last level) or over the first of those rows, which only the same thread reads.
template <typename T, int W>
__device__ __forceinline__ void add_partials(const ColumnSums& sums, int64_t base, int64_t step, int count,
                                             int64_t out_base, int begin, int end, bool last_level) {
  constexpr int kBatch = 8;  // rows in flight, the last batch's too: what waits here is the kernel's tail
  const int per_sum = ceil_div(end - begin, W);
  int item = threadIdx.x;  // threads go on to the next sum's columns where one's end
#pragma unroll 1
  for (int k = 0; k < kMaxSums; ++k) {
    float* const partial = k == 0 ? sums.partial[0] : k == 1 ? sums.partial[1] : sums.partial[2];
    void* const out = k == 0 ? sums.out[0] : k == 1 ? sums.out[1] : sums.out[2];
    if (partial == nullptr) continue;
    for (; item < per_sum; item += blockDim.x) {
      const int column = begin + item * W;
      float* p = partial + base + column;
      float sum[W] = {};
      for (int first = 0; first < count; first += kBatch) {
        float v[kBatch][W];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {  // __ldcg: the rows come from other multiprocessors, whose L1 is not ours
          const float* row = p + (first + i) * step;
          const bool there = first + i < count;
          if constexpr (W == 4) {
            const float4 four = there ? __ldcg(reinterpret_cast<const float4*>(row)) : make_float4(0, 0, 0, 0);
            v[i][0] = four.x, v[i][1] = four.y, v[i][2] = four.z, v[i][3] = four.w;
          } else {
            v[i][0] = there ? __ldcg(row) : 0.0f;
          }
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
#pragma unroll
          for (int j = 0; j < W; ++j) sum[j] += v[i][j];
      }
#pragma unroll
      for (int i = 0; i < W; ++i) {
        if (last_level)
          store_param<T>(out, sums.out_f32, out_base + column + i, sum[i]);
        else
          p[i] = sum[i];
      }
    }
    item -= per_sum;
  }
}

// Called by all threads of every block once its partials [begin, end) are written at partial[k] + (g * blocks + block)
// * width. T: the type of out unless out_f32.
template <typename T>
__device__ __forceinline__ void finish(const ColumnSums& sums, int64_t job, int64_t g, int block, int64_t width,
                                       int begin, int end) {
  const int team = block / sums.team, first = team * sums.team, size = min(sums.team, sums.blocks - first);
  int* tickets = sums.tickets + job * (1 + sums.teams);
  const int64_t base = g * sums.blocks * width;
  const bool by_four = width % 4 == 0;
  const auto add = [&](int64_t from, int64_t step, int count, bool last_level) {
    if (by_four)
      add_partials<T, 4>(sums, from, step, count, g * width, begin, end, last_level);
    else
      add_partials<T, 1>(sums, from, step, count, g * width, begin, end, last_level);
  };
  if (!arrive_last(tickets + 1 + team, size)) return;
  add(base + first * width, width, size, sums.teams == 1);
  if (sums.teams == 1 || !arrive_last(tickets, sums.teams)) return;
  add(base, sums.team * width, sums.teams, true);
}

}  // namespace petune::cuda
