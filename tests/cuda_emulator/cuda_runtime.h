// A stand-in for NVIDIA's cuda_runtime.h with which the project's own .cu files compile as C++20 and run on the CPU.
//
// A launch runs its blocks in turn; the threads of a block are fibers that switch only where threads of a block meet:
// at __syncthreads, at __syncwarp and at warp shuffles and votes. What it proves and what it cannot is in README.md.
#pragma once
#define PETUNE_EMULATOR 1

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulator {

using Where = std::source_location;

// Runs body() for every thread of every block; throws std::runtime_error where a GPU would hang or read garbage. A bad
// configuration is recorded for cudaGetLastError, as CUDA does.
void launch(dim3 grid, dim3 block, size_t shared, void (*body)(void*), void* context);

template <typename F>
void launch(dim3 grid, dim3 block, size_t shared, F&& body) {
  launch(grid, block, shared, [](void* f) { (*static_cast<std::remove_reference_t<F>*>(f))(); }, &body);
}

void* dynamic_shared();
void barrier(Where where);

// All lanes in mask meet at `where`; each leaves `value` and gets what lane `source` left. source < 0: only meet.
uint64_t meet(unsigned mask, uint64_t value, int source, Where where);
// The values of all lanes in mask, one bit each.
unsigned vote(unsigned mask, bool value, Where where);
int lane();

template <typename T>
T shuffle(unsigned mask, T value, int source, Where where) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet(mask, bits, source, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

#define PETUNE_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ((void)(stream), emulator::launch(grid, block, shared, [&] { kernel(__VA_ARGS__); }))
#define PETUNE_DYNAMIC_SHARED(name) float* name = static_cast<float*>(emulator::dynamic_shared())

inline void __syncthreads(emulator::Where where = emulator::Where::current()) { emulator::barrier(where); }
inline void __syncwarp(unsigned mask = 0xffffffffu, emulator::Where where = emulator::Where::current()) {
  emulator::meet(mask, 0, -1, where);
}
template <typename T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, emulator::Where where = emulator::Where::current()) {
  const int segment = emulator::lane() / width * width;
  return emulator::shuffle(mask, v, segment + (source & (width - 1)), where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32, emulator::Where where = emulator::Where::current()) {
  const int lane = emulator::lane(), source = lane ^ lanes, end = lane / width * width + width;
  return emulator::shuffle(mask, v, source < end ? source : lane, where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32,
                   emulator::Where where = emulator::Where::current()) {
  const int lane = emulator::lane(), source = lane + static_cast<int>(by), end = lane / width * width + width;
  return emulator::shuffle(mask, v, source < end ? source : lane, where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32, emulator::Where where = emulator::Where::current()) {
  const int lane = emulator::lane(), source = lane - static_cast<int>(by), begin = lane / width * width;
  return emulator::shuffle(mask, v, source >= begin ? source : lane, where);
}
inline unsigned __ballot_sync(unsigned mask, bool v, emulator::Where where = emulator::Where::current()) {
  return emulator::vote(mask, v, where);
}
inline bool __any_sync(unsigned mask, bool v, emulator::Where where = emulator::Where::current()) {
  return emulator::vote(mask, v, where) != 0;
}
inline bool __all_sync(unsigned mask, bool v, emulator::Where where = emulator::Where::current()) {
  return emulator::vote(mask, v, where) == mask;
}

// Integers only: a float atomic would not compile, and that is wanted.
inline int atomicAdd(int* p, int v) { return std::exchange(*p, *p + v); }
inline unsigned atomicAdd(unsigned* p, unsigned v) { return std::exchange(*p, *p + v); }
inline unsigned atomicInc(unsigned* p, unsigned limit) { return std::exchange(*p, *p >= limit ? 0 : *p + 1); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
T __ldg(const T* p) {
  return *p;
}

template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline unsigned __float2uint_rn(float v) {  // saturates; NaN gives 0
  return v >= 4294967296.0f ? ~0u : v > 0.0f ? static_cast<unsigned>(std::nearbyint(v)) : 0u;
}
inline float __uint_as_float(unsigned v) {
  float f;
  std::memcpy(&f, &v, 4);
  return f;
}
inline unsigned __float_as_uint(float f) {
  unsigned v;
  std::memcpy(&v, &f, 4);
  return v;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
// As if every kernel took 128 registers.
template <typename K>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, K*, int threads, size_t) {
  *blocks = 65536 / 128 / threads;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream);
