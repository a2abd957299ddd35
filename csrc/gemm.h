// A small matrix product on operands that sit in cache, for attention.
//
// C[M, N] (+)= A[M, K] B[K, N] in fp32. A has any two strides, so a transposed A costs nothing; B and C are
// row-major with leading dimensions ldb and ldc; N is a multiple of kLanes. An output tile of kRows rows by up to
// kVectors vectors is held in registers: 6 x 4 of AVX-512's 32, 6 x 2 of AVX2's 16. The rest hold a row of B and an
// element of A.
#pragma once

#include "simd.h"

namespace fastgpt {

constexpr int kTileRows = 6;
constexpr int kTileVectors = kLanes == 16 ? 4 : 2;

struct Gemm {
  int64_t M, N, K;
  const float* a;           // (M, K)
  int64_t a_row, a_column;  // A's strides, in elements
  const float* b;           // (K, N)
  int64_t ldb;
  float* c;  // (M, N)
  int64_t ldc;
  bool accumulate;  // add to C instead of overwriting it
};

// Computes the tile of kRows by kVectors * kLanes at (m, n).
template <int kRows, int kVectors>
FASTGPT_INLINE void gemm_tile(const Gemm& g, int64_t m, int64_t n) {
  Vec tile[kRows][kVectors];
  float* c = g.c + m * g.ldc + n;
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) tile[r][v] = Vec{};
  const float* a = g.a + m * g.a_row;
  const float* b = g.b + n;
  for (int64_t k = 0; k < g.K; ++k) {
    Vec row_of_b[kVectors];
    for (int v = 0; v < kVectors; ++v) row_of_b[v] = load(b + k * g.ldb + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const float scalar = a[r * g.a_row + k * g.a_column];
      for (int v = 0; v < kVectors; ++v) tile[r][v] += scalar * row_of_b[v];
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) {
      float* at = c + r * g.ldc + v * kLanes;  // C is added last, so rounding errors grow with this K only
      store(at, g.accumulate ? load(at) + tile[r][v] : tile[r][v]);
    }
}

// Computes kRows rows from m on. The last columns take narrower tiles.
template <int kRows>
FASTGPT_INLINE void gemm_rows(const Gemm& g, int64_t m) {
  int64_t n = 0;
  for (; n + kTileVectors * kLanes <= g.N; n += kTileVectors * kLanes) gemm_tile<kRows, kTileVectors>(g, m, n);
  for (; n + 2 * kLanes <= g.N; n += 2 * kLanes) gemm_tile<kRows, 2>(g, m, n);
  for (; n < g.N; n += kLanes) gemm_tile<kRows, 1>(g, m, n);
}

inline void gemm(const Gemm& g) {
  int64_t m = 0;
  for (; m + kTileRows <= g.M; m += kTileRows) gemm_rows<kTileRows>(g, m);
  for (; m + 2 <= g.M; m += 2) gemm_rows<2>(g, m);
  for (; m < g.M; ++m) gemm_rows<1>(g, m);
}

}  // namespace fastgpt
