// Philox-4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// 2011. Dropout draws one 32-bit number per attention weight from it, the same on every backend:
// key = seed; counter = (column / 4, row, batch * n_head + head, 0); output word column % 4.
#pragma once

#include "simd.h"

namespace fastgpt {

struct Products {
  UintVec high, low;
};
FASTGPT_INLINE Products multiply(UintVec a, uint32_t b) {
  const WideVec product = __builtin_convertvector(a, WideVec) * static_cast<uint64_t>(b);
  return {__builtin_convertvector(product >> 32, UintVec), __builtin_convertvector(product, UintVec)};
}

// words[i] for i in [0, 4 * kLanes): the numbers of columns first_column + i; first_column a multiple of 4.
FASTGPT_INLINE void philox(uint64_t seed, int64_t first_column, uint32_t row, uint32_t head, uint32_t* words) {
  UintVec c0 = (UintVec)lane_index() + static_cast<uint32_t>(first_column / 4);
  UintVec c1 = UintVec{} + row, c2 = UintVec{} + head, c3{};
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const auto [high0, low0] = multiply(c0, 0xD2511F53u);
    const auto [high1, low1] = multiply(c2, 0xCD9E8D57u);
    c0 = high1 ^ c1 ^ key0;
    c2 = high0 ^ c3 ^ key1;
    c1 = low1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    words[4 * lane + 0] = c0[lane];
    words[4 * lane + 1] = c1[lane];
    words[4 * lane + 2] = c2[lane];
    words[4 * lane + 3] = c3[lane];
  }
}

}  // namespace fastgpt
