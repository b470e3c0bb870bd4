// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the one source of every
// dropout mask. Key = the two halves of a 64-bit seed, counter = the two halves of (element index / 4) and two zeros,
// lane = element index % 4; an element is kept iff its lane >= floor(p * 2^32).
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define PETUNE_HD __host__ __device__ __forceinline__
#else
#define PETUNE_HD inline
#endif

namespace petune {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

struct Philox4 {
  uint32_t lane[4];
};

PETUNE_HD Philox4 philox(uint64_t seed, uint64_t counter) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxM0) * c0, product1 = static_cast<uint64_t>(kPhiloxM1) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// floor(p * 2^32) for p in [0, 1); exact, because p has at most 53 significant bits.
PETUNE_HD uint32_t drop_threshold(double p) { return static_cast<uint32_t>(p * 4294967296.0); }

}  // namespace petune
