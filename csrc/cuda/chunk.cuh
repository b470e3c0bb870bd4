// A chunk: the 16 bytes of one row that one thread handles at a time (8 bf16/fp16 or 4 fp32 elements).
//
// kVector = true moves it as one 16-byte access and needs the width to be a multiple of the chunk and every pointer
// 16-byte aligned; kVector = false moves element by element and takes any width and any alignment. Chunks stay packed
// in registers between load and use: half the registers of fp32 for the 16-bit types.
#pragma once
#include "device.cuh"

namespace petune::cuda {

template <typename T>
constexpr int kChunk = static_cast<int>(16 / sizeof(T));

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }

template <typename T>
__device__ __forceinline__ T narrow(float v);
template <>
__device__ __forceinline__ float narrow<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float v) {
  return __float2half_rn(v);
}

__device__ __forceinline__ uint32_t pack2(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return __bfloat16_as_ushort(pair.x) | static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16;
}
__device__ __forceinline__ uint32_t pack2(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return __half_as_ushort(pair.x) | static_cast<uint32_t>(__half_as_ushort(pair.y)) << 16;
}

template <typename T>
__device__ __forceinline__ void unpack(uint4 raw, float (&v)[kChunk<T>]) {
  const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      v[i] = __uint_as_float(word[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      v[2 * i] = __uint_as_float(word[i] << 16);
      v[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    } else {
      v[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(word[i])));
      v[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(word[i] >> 16)));
    }
  }
}

template <typename T>
__device__ __forceinline__ uint4 pack(const float (&v)[kChunk<T>]) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4)
      word[i] = __float_as_uint(v[i]);
    else
      word[i] = pack2(v[2 * i], v[2 * i + 1], T{});
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// Makes the compiler forget what it unpacked from these chunks: a second use unpacks again (a shift or a conversion)
// instead of keeping the fp32 values, twice the registers, alive across a row sum.
template <typename T, int C>
__device__ __forceinline__ void keep_packed(uint4 (&raw)[C]) {
  if constexpr (sizeof(T) < 4) {
#pragma unroll
    for (int c = 0; c < C; ++c) asm volatile("" : "+r"(raw[c].x), "+r"(raw[c].y), "+r"(raw[c].z), "+r"(raw[c].w));
  }
}

// The first n elements at p (n <= 0: none) and zeros behind them. With kVector, n is at least a chunk or not positive.
template <bool kVector, typename T>
__device__ __forceinline__ uint4 load(const T* p, int n) {
  if constexpr (kVector) {
    return n > 0 ? *reinterpret_cast<const uint4*>(p) : make_uint4(0, 0, 0, 0);
  } else if constexpr (sizeof(T) == 4) {
    const uint32_t* word = reinterpret_cast<const uint32_t*>(p);
    return make_uint4(n > 0 ? word[0] : 0, n > 1 ? word[1] : 0, n > 2 ? word[2] : 0, n > 3 ? word[3] : 0);
  } else {
    const unsigned short* half = reinterpret_cast<const unsigned short*>(p);
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      word[i] = n > 2 * i ? half[2 * i] : 0;
      word[i] |= (n > 2 * i + 1 ? static_cast<uint32_t>(half[2 * i + 1]) : 0) << 16;
    }
    return make_uint4(word[0], word[1], word[2], word[3]);
  }
}

// One 16-byte store. nvcc 13 makes four of 4 bytes of an assignment for sm_80 and sm_90: a warp's then touch every
// sector four times, a part of it each time. Nothing reads it back in the same kernel.
__device__ __forceinline__ void store16(void* p, uint4 v) {
#ifdef PETUNE_EMULATOR
  *static_cast<uint4*>(p) = v;
#else
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w));
#endif
}

template <bool kVector, typename T>
__device__ __forceinline__ void store(T* p, int n, const float (&v)[kChunk<T>]) {
  if constexpr (kVector) {
    if (n > 0) store16(p, pack<T>(v));
  } else {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i)
      if (i < n) p[i] = narrow<T>(v[i]);
  }
}

// The bytes beside a chunk, one for each of its V elements: 8 (one 8-byte access) or 4. As load and store above.
template <bool kVector, int V>
__device__ __forceinline__ uint2 load_bytes(const uint8_t* p, int n) {
  static_assert(V == 4 || V == 8);
  uint32_t word[2] = {};
  if constexpr (!kVector) {
#pragma unroll
    for (int i = 0; i < V; ++i) word[i / 4] |= (n > i ? static_cast<uint32_t>(p[i]) : 0) << 8 * (i % 4);
  } else if (n > 0) {
    if constexpr (V == 8) return *reinterpret_cast<const uint2*>(p);
    word[0] = *reinterpret_cast<const uint32_t*>(p);
  }
  return make_uint2(word[0], word[1]);
}

template <int V>
__device__ __forceinline__ void unpack_bytes(uint2 raw, float (&v)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = static_cast<float>((i < 4 ? raw.x : raw.y) >> 8 * (i % 4) & 0xffu);
}

// Rounds to nearest, ties to even. Below 0 and for NaN it stores 0; v is below 255.5.
template <bool kVector, int V>
__device__ __forceinline__ void store_bytes(uint8_t* p, int n, const float (&v)[V]) {
  uint32_t word[2] = {};
#pragma unroll
  for (int i = 0; i < V; ++i) word[i / 4] |= __float2uint_rn(v[i]) << 8 * (i % 4);
  if constexpr (!kVector) {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i < n) p[i] = static_cast<uint8_t>(word[i / 4] >> 8 * (i % 4));
  } else if (n > 0) {
    if constexpr (V == 8)
      *reinterpret_cast<uint2*>(p) = make_uint2(word[0], word[1]);
    else
      *reinterpret_cast<uint32_t*>(p) = word[0];
  }
}

// A chunk of a small parameter, which is in T or in fp32: a uniform branch, so that the two need no kernel each.
template <bool kVector, typename T>
__device__ __forceinline__ void load_param(const void* param, bool is_f32, int64_t at, int n, float (&v)[kChunk<T>]) {
  if (sizeof(T) == 4 || !is_f32) {
    unpack<T>(load<kVector>(static_cast<const T*>(param) + at, n), v);
  } else {
    const float* p = static_cast<const float*>(param) + at;
#pragma unroll
    for (int i = 0; i < kChunk<T>; i += 4) {
      const uint4 raw = load<kVector>(p + i, n - i);
      v[i] = __uint_as_float(raw.x), v[i + 1] = __uint_as_float(raw.y);
      v[i + 2] = __uint_as_float(raw.z), v[i + 3] = __uint_as_float(raw.w);
    }
  }
}

template <typename T>
__device__ __forceinline__ void store_param(void* param, bool is_f32, int64_t at, float v) {
  if (sizeof(T) == 4 || !is_f32)
    static_cast<T*>(param)[at] = narrow<T>(v);
  else
    static_cast<float*>(param)[at] = v;
}

// The dropout of one call. p = 0 with a seed keeps everything, as it should.
struct Drop {
  const int64_t* seed;  // null: no dropout
  uint32_t threshold;
  float scale;
};

inline Drop make_drop(const int64_t* seed, double p) {
  return {seed, drop_threshold(p), static_cast<float>(1.0 / (1.0 - p))};
}

// Zeroes or scales V values whose element indices start at e. One Philox call gives the masks of four elements; kVector
// promises e % 4 == 0, otherwise the words are shifted into place (by selects: registers cannot be indexed).
template <bool kVector, int V>
__device__ __forceinline__ void apply_dropout(const Drop& drop, uint64_t seed, uint64_t e, float (&v)[V]) {
  constexpr int kWords = kVector ? V : V + 4;
  uint32_t word[kWords];
#pragma unroll
  for (int j = 0; j < kWords / 4; ++j) {
    const Philox4 random = philox(seed, e / 4 + j);
#pragma unroll
    for (int k = 0; k < 4; ++k) word[4 * j + k] = random.lane[k];
  }
  if constexpr (!kVector) {
    const bool odd = e & 1, two = e & 2;
#pragma unroll
    for (int i = 0; i < V + 2; ++i) word[i] = odd ? word[i + 1] : word[i];
#pragma unroll
    for (int i = 0; i < V; ++i) word[i] = two ? word[i + 2] : word[i];
  }
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = word[i] >= drop.threshold ? v[i] * drop.scale : 0.0f;
}

}  // namespace petune::cuda
