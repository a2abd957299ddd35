// The product of a few rows with a transposed weight, as when a text is generated. It is bound by reading the weight,
// whose rows are read once, where they lie.
#pragma once

#include "product.h"
#include "simd.h"

namespace fastgpt {

constexpr int64_t kFewRows = 8;  // from here on packing pays
// Columns of B: that many streams of memory, and as many sums that do not wait for each other.
constexpr int64_t kColumnsAtOnce = 4;

// Whether both operands are contiguous along the depth, and C is a few rows that nothing is added to.
template <class T, class Out>
bool is_few_rows(const Product<T, Out>& p) {
  return p.M < kFewRows && p.a.column == 1 && p.b.row == 1 && !p.accumulate && !p.row_sums;
}

// c[i, j ...] of n columns, at most kColumnsAtOnce, for all rows i.
template <int n, class T, class Out>
void multiply_columns(const Product<T, Out>& p, int64_t j) {
  for (int64_t i = 0; i < p.M; ++i) {
    Vec sums[n] = {};
    for_each_vector(p.K, [&](int64_t k, int64_t lanes) {
      const Vec a = load(p.a.base + i * p.a.row + k, lanes);
      for (int c = 0; c < n; ++c) sums[c] += a * load(p.b.base + (j + c) * p.b.column + k, lanes);
    });
    for (int c = 0; c < n; ++c)
      p.c[i * p.ldc + j + c] = static_cast<Out>(sum(sums[c]) + (p.bias ? p.bias[j + c] : 0.0f));
  }
}

template <class T, class Out>
void multiply_few_rows(const Product<T, Out>& p) {
  torch::stable::parallel_for(0, p.N, 64, [&](int64_t begin, int64_t end) {
    int64_t j = begin;
    for (; j + kColumnsAtOnce <= end; j += kColumnsAtOnce) multiply_columns<kColumnsAtOnce>(p, j);
    for (; j < end; ++j) multiply_columns<1>(p, j);
  });
}

}  // namespace fastgpt
