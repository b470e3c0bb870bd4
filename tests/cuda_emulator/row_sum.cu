// The kernels' own sum over the threads of a row, alone on a stage. A test builds this as it is and with one line of
// reduce.cuh broken, and sees the emulator notice.
#include "reduce.cuh"

namespace {

using namespace petune::cuda;

// out[row, thread]: three times the sum of in[row, :], as every thread of the row got it, from two sums in a row
__global__ void row_sums(const float* in, float* out, int threads) {
  __shared__ RowScratch scratch;
  int turn = 0;
  float first[1] = {in[blockIdx.x * blockDim.x + threadIdx.x]};
  float second[1] = {2.0f * first[0]};
  row_sum(first, threads, scratch, turn);
  row_sum(second, threads, scratch, turn);
  out[blockIdx.x * blockDim.x + threadIdx.x] = first[0] + second[0];
}

// Half of a warp leaves before the sum.
__global__ void half_leaves(float* out) {
  if (threadIdx.x >= 16) return;
  float v[1] = {1.0f};
  warp_sum(v);
  out[threadIdx.x] = v[0];
}

// One warp takes another barrier than the rest.
__global__ void two_barriers(float* out) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 1.0f;
}

__global__ void past_the_end(float* out, int n) {
  PETUNE_DYNAMIC_SHARED(shared);
  shared[threadIdx.x] = 1.0f;
  __syncthreads();
  if (threadIdx.x == 0) out[0] = shared[n];
}

template <typename F>
const char* guarded(F&& f) {
  static std::string message;
  try {
    f();
    check_launch("row_sum.cu");
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

}  // namespace

extern "C" {
const char* stage_row_sums(const float* in, float* out, int rows, int threads, int groups) {
  return guarded([&] { PETUNE_LAUNCH(row_sums, rows / groups, threads * groups, 0, nullptr, in, out, threads); });
}
const char* stage_half_leaves(float* out) {
  return guarded([&] { PETUNE_LAUNCH(half_leaves, 1, 32, 0, nullptr, out); });
}
const char* stage_two_barriers(float* out) {
  return guarded([&] { PETUNE_LAUNCH(two_barriers, 1, 64, 0, nullptr, out); });
}
const char* stage_no_blocks(float* out) {
  return guarded([&] { PETUNE_LAUNCH(two_barriers, 0, 64, 0, nullptr, out); });
}
const char* stage_past_the_end(float* out, int n) {
  return guarded([&] { PETUNE_LAUNCH(past_the_end, 1, 32, 32 * sizeof(float), nullptr, out, n); });
}
}
