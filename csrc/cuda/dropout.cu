// dropout: y = x / (1 - p) where the mask keeps, else 0. Flat: element e of seed s is x[s * n / seeds + e].
#include "chunk.cuh"

namespace petune::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // chunks per thread

// Chunks start at multiples of the chunk in e, so one Philox call masks four elements whatever n is.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads) dropout_kernel(globals::DropoutOp op, Drop drop, int64_t per_seed, int blocks) {
  constexpr int V = kChunk<T>;
  const int64_t s = blockIdx.x / blocks;
  const uint64_t seed = drop.seed[s];
  const T* x = static_cast<const T*>(op.x) + s * per_seed;
  T* y = static_cast<T*>(op.y) + s * per_seed;
  const int64_t step = static_cast<int64_t>(blocks) * kThreads * V;
  const auto valid = [&](int64_t e) { return static_cast<int>(min(per_seed - e, static_cast<int64_t>(V))); };
  const auto move = [&](auto vector, int64_t e0) {
    constexpr bool kWhole = decltype(vector)::value;
    uint4 raw[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) raw[k] = load<kWhole>(x + e0 + k * step, kWhole ? V : valid(e0 + k * step));
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t e = e0 + k * step;
      float v[V];
      unpack<T>(raw[k], v);
      apply_dropout<true>(drop, seed, e, v);
      store<kWhole>(y + e, kWhole ? V : valid(e), v);
    }
  };
  for (int64_t e = (static_cast<int64_t>(blockIdx.x % blocks) * kThreads + threadIdx.x) * V; e < per_seed;
       e += step * kInFlight) {
    if (kVector && e + (kInFlight - 1) * step + V <= per_seed)
      move(std::bool_constant<kVector>{}, e);
    else
      move(std::false_type{}, e);
  }
}

}  // namespace
}  // namespace petune::cuda
