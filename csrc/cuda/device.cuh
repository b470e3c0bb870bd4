// What every .cu file shares: launching, error checks, device attributes. No torch header here or in any .cu.
//
// The same sources compile with g++ for tests/cuda_emulator, whose cuda_runtime.h stands in for NVIDIA's and defines
// PETUNE_EMULATOR: only the two things that are not C++ (a launch, dynamic shared memory) need a macro.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "../common/ops.h"
#include "../common/philox.h"

#ifndef PETUNE_EMULATOR
#define PETUNE_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define PETUNE_DYNAMIC_SHARED(name)     \
  extern __shared__ uint4 name##_raw[]; \
  float* name = reinterpret_cast<float*>(name##_raw)
#endif

// Every __launch_bounds__ names its blocks per multiprocessor too: left alone, ptxas may spill a few registers to make
// room for one block more.
namespace petune::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("petune: ") + what + ": " + cudaGetErrorString(status));
}

inline void check_launch(const char* what) { check(cudaGetLastError(), what); }

// Streaming multiprocessors of the current device, asked once per device: the query costs more than a launch.
inline int multiprocessors() {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (device < kDevices && (count = known[device].load(std::memory_order_relaxed)) > 0) return count;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  if (device < kDevices) known[device].store(count, std::memory_order_relaxed);
  return count;
}

// Blocks of a kernel that a multiprocessor of the current device holds at a time, asked once for each size of block.
template <typename... P>
inline int resident_blocks(void (*kernel)(P...), int threads, size_t shared) {
  static std::mutex mutex;
  static std::map<std::tuple<void (*)(P...), int, int, size_t>, int> known;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard lock(mutex);
  int& blocks = known[{kernel, device, threads, shared}];
  if (blocks == 0) {
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    blocks = std::max(1, blocks);
  }
  return blocks;
}

template <typename I>
PETUNE_HD I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

template <typename I>
inline I clamp(I value, I low, I high) {
  return value < low ? low : value > high ? high : value;
}

// Columns are counted in int inside a row; rows and element offsets in int64.
inline int checked_width(int64_t H, const char* what) {
  if (H < 0 || H > std::numeric_limits<int>::max() - 65536)
    throw std::invalid_argument(std::string("petune: ") + what + ": row width " + std::to_string(H) +
                                " is not below 2^31");
  return static_cast<int>(H);
}

template <typename... P>
inline bool aligned16(P... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

inline size_t dtype_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline void require_workspace(const void* workspace, size_t bytes, const char* what) {
  if (workspace == nullptr && bytes > 0)
    throw std::invalid_argument(std::string("petune: ") + what + ": workspace is null, " + std::to_string(bytes) +
                                " bytes are needed");
}

// Calls f with a value of the C++ type that `dtype` names. PETUNE_ONLY_BF16 builds a third of the kernels, for a quick
// look at their machine code.
template <typename F>
inline void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16:
      return f(__nv_bfloat16{});
#ifndef PETUNE_ONLY_BF16
    case DType::f32:
      return f(float{});
    case DType::f16:
      return f(__half{});
#endif
    default:
      break;
  }
  throw std::invalid_argument("petune: unknown dtype " + std::to_string(static_cast<int>(dtype)));
}

}  // namespace petune::cuda
