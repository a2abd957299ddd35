// The description of a matrix product, C = A B + bias or C += A B, with any strides of A and B.
#pragma once

#include <algorithm>
#include <memory>

#include "tensor.h"

namespace fastgpt {

// A view of a matrix with elements of type T.
template <class T>
struct Matrix {
  const T* base;
  int64_t row, column;  // strides, in elements

  Matrix at(int64_t i, int64_t j) const { return {base + i * row + j * column, row, column}; }
  Matrix transposed() const { return {base, column, row}; }
  T operator()(int64_t i, int64_t j) const { return base[i * row + j * column]; }
};

template <class T, class Out>
struct Product {
  int64_t M, N, K;
  Matrix<T> a, b;     // (M, K), (K, N)
  const float* bias;  // (N) or null
  bool accumulate;    // add to C instead of overwriting it
  Out* c;             // (M, N), rows contiguous
  int64_t ldc;        // elements from one row of C to the next
  float* sums;        // (M, N), rows ldc apart, for the partial sums of a C that is narrower than fp32; or null
  float* row_sums;    // (M): the sum of each row of A is added to it; or null

  // The part of C of at most `rows` rows from i on and `columns` columns from j on. Only the cells with j = 0 sum the
  // rows of A, so that each row is summed once.
  Product cell(int64_t i, int64_t j, int64_t rows, int64_t columns) const {
    return {
        std::min(rows, M - i),
        std::min(columns, N - j),
        K,
        a.at(i, 0),
        b.at(0, j),
        bias ? bias + j : nullptr,
        accumulate,
        c + i * ldc + j,
        ldc,
        sums ? sums + i * ldc + j : nullptr,
        row_sums && j == 0 ? row_sums + i : nullptr};
  }
};

// K is summed in stretches, one after the other. Returns their length: a multiple of `step`, at most `deepest`. The
// last stretch may be shorter. The length depends on K alone, so the bits are the same on any number of threads.
inline int64_t even_stretch(int64_t K, int64_t deepest, int64_t step) {
  const int64_t stretches = std::max<int64_t>(1, (K + deepest - 1) / deepest);
  return std::max(step, round_up((K + stretches - 1) / stretches, step));
}

}  // namespace fastgpt
