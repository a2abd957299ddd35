// Philox-4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// 2011. Dropout draws one 32-bit number per attention weight from it, the same on every backend:
// key = seed; counter = (column / 4, row, batch * n_head + head, 0); output word column % 4.
// AdamW draws from it too; its rows are tensors, its columns their elements. fastgpt/kernels/philox.py has the details.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace fastgpt {

// The upper 32 bits of each lane's 64-bit product with b. On x86, one vpmuludq multiplies the even lanes and another
// the odd lanes. GCC would compile a product of 64-bit lanes to up to three of them, because it does not know that the
// upper halves are zero.
FASTGPT_INLINE UintVec multiply_high(UintVec a, uint32_t b) {
#if defined(__AVX2__)
  typedef uint64_t PairVec __attribute__((vector_size(sizeof(UintVec))));
  const auto even_products = [factor = UintVec{} + b](PairVec pairs) {
#if defined(__AVX512F__)
    return (PairVec)_mm512_maskz_mul_epu32(0xff, (__m512i)pairs, (__m512i)factor);  // GCC 12 warns if unmasked
#else
    return (PairVec)_mm256_mul_epu32((__m256i)pairs, (__m256i)factor);
#endif
  };
  const PairVec even = even_products((PairVec)a), odd = even_products((PairVec)a >> 32);
  return (UintVec)((even >> 32) | (odd & ~0xffffffffull));
#else
  return __builtin_convertvector((__builtin_convertvector(a, WideVec) * uint64_t{b}) >> 32, UintVec);
#endif
}

// Writes words[i], the number of column first_column + i, for i in [0, 4 * kLanes). first_column is a multiple of 4.
FASTGPT_INLINE void philox(uint64_t seed, int64_t first_column, uint32_t row, uint32_t head, uint32_t* words) {
  UintVec c0 = (UintVec)lane_index() + static_cast<uint32_t>(first_column / 4);
  UintVec c1 = UintVec{} + row, c2 = UintVec{} + head, c3{};
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    // the multipliers of the paper
    const UintVec high0 = multiply_high(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const UintVec high1 = multiply_high(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ key0;
    c2 = high0 ^ c3 ^ key1;
    c1 = low1;
    c3 = low0;
    key0 += 0x9E3779B9u;  // 2**32 (golden ratio - 1)
    key1 += 0xBB67AE85u;  // 2**32 (sqrt(3) - 1)
  }
  const UintVec counter[4] = {c0, c1, c2, c3};
  uint32_t lanes[4][kLanes];  // GCC interleaves arrays with shuffles, but takes vectors apart lane by lane
  std::memcpy(lanes, counter, sizeof(lanes));
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i) words[4 * lane + i] = lanes[i][lane];
}

}  // namespace fastgpt
