// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3"
// (SC 2011). A pure function of (counter, key): nothing to seed or store, the same words on every device and
// rank.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TFNAS_HD __host__ __device__ __forceinline__
#else
#define TFNAS_HD inline
#endif

namespace tfnas {

struct PhiloxWords {
  uint32_t w[4];
};

TFNAS_HD PhiloxWords philox4x32_10(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * counter.w[0];
    const uint64_t b = static_cast<uint64_t>(0xCD9E8D57u) * counter.w[2];
    counter = {{static_cast<uint32_t>(b >> 32) ^ counter.w[1] ^ key0, static_cast<uint32_t>(b),
                static_cast<uint32_t>(a >> 32) ^ counter.w[3] ^ key1, static_cast<uint32_t>(a)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

}  // namespace tfnas
