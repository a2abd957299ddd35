// Tensors (..., C) as rows of C elements.
#pragma once

#include "tensor.h"

namespace fastgpt {

// Minimum elements of a task: fewer cost less than handing them to a thread. 32 KiB of fp32, a first-level cache.
constexpr int64_t kElementsPerTask = 8192;

inline int64_t row_grain(int64_t n_columns) { return 1 + kElementsPerTask / n_columns; }

// (..., C) as rows by C.
struct Shape {
  int64_t rows, columns;
};
inline Shape shape_of(const Tensor& x) {
  const int64_t columns = x.size(x.dim() - 1);
  return {columns ? x.numel() / columns : 0, columns};
}
inline std::vector<int64_t> leading_sizes(const Tensor& x) {
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.pop_back();
  return sizes;
}

// The distance in elements between neighbouring rows of `t`, (..., C), if rows are contiguous and evenly spaced;
// otherwise -1.
inline int64_t row_stride_of(const Tensor& t) {
  if (t.is_contiguous()) return t.dim() ? t.size(t.dim() - 1) : 1;
  if (t.dim() == 0 || (t.size(t.dim() - 1) != 1 && t.stride(t.dim() - 1) != 1)) return -1;
  int64_t stride = -1, next = -1;  // of the rows; what the next dimension's stride must be
  for (int64_t i = t.dim() - 2; i >= 0; --i) {
    if (t.size(i) == 1) continue;
    if (stride < 0) stride = t.stride(i);
    if (next >= 0 && t.stride(i) != next) return -1;
    next = t.stride(i) * t.size(i);
  }
  return stride < 0 ? t.size(t.dim() - 1) : stride;  // a single row is as far from the next as one likes
}

// A tensor (..., C) whose rows are read or written in place.
struct Rows {
  Tensor tensor;
  int64_t stride;  // from row to row, in elements
};

// `t` itself if its rows are contiguous and evenly spaced, otherwise a copy.
inline Rows rows_of(const Tensor& t) {
  const int64_t stride = row_stride_of(t);
  if (stride < 0) return {dense(t), shape_of(t).columns};
  make_own(t);
  return {t, stride};
}

// `t` itself, to be written. Raises an error that says `name` if its rows are not contiguous and evenly spaced.
inline Rows rows_to_write(const Tensor& t, const char* name) {
  const int64_t stride = row_stride_of(t);
  STD_TORCH_CHECK(stride >= 0, name, ": expected rows that are contiguous and evenly spaced");
  make_own(t);
  return {t, stride};
}

}  // namespace fastgpt
