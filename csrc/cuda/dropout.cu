// dropout: y = x / (1 - p) where the mask keeps, else 0. Flat: element e of seed s is x[s * n / seeds + e].
#include "chunk.cuh"

namespace petune::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 2;  // chunks per thread: more would need registers that Philox takes

// Chunks start at multiples of the chunk in e, so one Philox call masks four elements whatever n is.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads, 2) dropout_kernel(Dropout op, Drop drop, int64_t per_seed, int blocks) {
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

void dropout(const Dropout& op, Stream stream_handle) {
  if (op.n == 0) return;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const int64_t per_seed = op.n / op.seeds;
  const Drop drop = make_drop(op.seed, op.p);
  with_dtype(op.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t chunks = ceil_div<int64_t>(per_seed, kChunk<T>);
    const int64_t useful = ceil_div<int64_t>(chunks, kThreads * kInFlight);
    const int64_t blocks = clamp<int64_t>(multiprocessors() * int64_t{8} / op.seeds, 1, useful);
    if (blocks * op.seeds > std::numeric_limits<int>::max())
      throw std::invalid_argument("petune: dropout: " + std::to_string(op.seeds) + " seeds are too many for one grid");
    // a second seed's elements must start on a 16-byte boundary too
    const bool vector = aligned16(op.x, op.y) && (op.seeds == 1 || per_seed % kChunk<T> == 0);
    const auto kernel = vector ? dropout_kernel<T, true> : dropout_kernel<T, false>;
    PETUNE_LAUNCH(kernel, static_cast<int>(blocks * op.seeds), kThreads, 0, stream, op, drop, per_seed,
                  static_cast<int>(blocks));
  });
  check_launch("dropout");
}

}  // namespace petune::cuda
