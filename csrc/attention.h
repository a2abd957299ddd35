// The description of an attention problem: the tensors' rows by head, who sees whom, the soft cap and dropout.
#pragma once

#include <algorithm>
#include <cmath>

#include "philox.h"
#include "tensor.h"

namespace fastgpt {

// The rows of one head of one batch entry: D contiguous elements each, `stride` elements from one row to the next.
template <class T>
struct Rows {
  T* base;
  int64_t stride;
  T* operator[](int64_t row) const { return base + row * stride; }
};

// A (B, H, T, D) view whose last dimension is contiguous, of element type U.
template <class U>
struct Heads {
  U* base;
  int64_t n_head, batch_stride, head_stride, row_stride;
  Rows<U> operator[](int64_t batch_and_head) const {
    const int64_t b = batch_and_head / n_head, h = batch_and_head % n_head;
    return {base + b * batch_stride + h * head_stride, row_stride};
  }
};
template <class U>
Heads<U> heads_of(const Tensor& t) {
  return {data<U>(t), t.size(1), t.stride(0), t.stride(1), t.stride(2)};
}
// n_head heads of D elements of (B, T, width), side by side from head `first` on.
template <class U>
Heads<U> heads_of_packed(const Tensor& t, int64_t first, int64_t n_head, int64_t D) {
  return {data<U>(t) + first * D, n_head, t.stride(0), D, t.stride(1)};
}

// q, k and v, or their gradients.
template <class U>
struct Inputs {
  Heads<U> q, k, v;
};
template <class U>
Inputs<U> inputs_of_packed(const Tensor& qkv, int64_t n_head, int64_t n_kv_head, int64_t D) {
  return {
      heads_of_packed<U>(qkv, 0, n_head, D), heads_of_packed<U>(qkv, n_head, n_kv_head, D),
      heads_of_packed<U>(qkv, n_head + n_kv_head, n_kv_head, D)};
}

struct Dropout {
  uint32_t threshold = 0;  // a weight is dropped if its random word is below p * 2^32
  float keep_scale = 1.0f;
  uint64_t seed = 0;

  Dropout(double p, const std::optional<Tensor>& seed_tensor) {
    if (p <= 0.0) return;
    threshold = static_cast<uint32_t>(std::min(p * 4294967296.0, 4294967295.0));
    keep_scale = static_cast<float>(1.0 / (1.0 - p));
    seed = static_cast<uint64_t>(*data<int64_t>(*seed_tensor));
  }
  explicit operator bool() const { return threshold != 0; }

  // Writes the factors, 0 or 1 / (1 - p), of `columns` columns of a row to `out`. first_column must be a multiple of 4,
  // because one Philox counter gives the words of four columns.
  void factors(int64_t head, int64_t row, int64_t first_column, int64_t columns, float* out) const {
    uint32_t words[4 * kLanes];
    for (int64_t column = 0; column < columns; column += 4 * kLanes) {
      philox(seed, first_column + column, row, head, words);
      for (int64_t i = 0; i < std::min<int64_t>(4 * kLanes, columns - column); ++i)
        out[column + i] = words[i] < threshold ? 0.0f : keep_scale;
    }
  }
};

struct Problem {
  int64_t n_heads;         // B * H, of queries
  int64_t n_head, group;   // H, and how many heads of queries read one of keys, H / Hk
  int64_t n_query, n_key;  // T, S
  int64_t head_dim;        // D
  int64_t padded_dim;      // D rounded up to whole vectors
  bool causal;             // the queries are the last of the keys' positions, so n_key >= n_query
  float scale;
  int64_t window;            // how many keys a query sees at most, its own included; 0 for all
  float softcap;             // bounds the scaled scores; 0 for none
  const int32_t* documents;  // (B, 2, S), the first position of each one's document and the end of it; or null
  Dropout dropout;

  int64_t n_key_heads() const { return n_heads / group; }
  // Whether a query may see only some of the keys up to its own.
  bool local() const { return window > 0 || documents; }
  // Under the causal mask: the position of the first query among the keys.
  int64_t offset() const { return n_key - n_query; }
  // The query in this row attends to the keys [first_key(head, row), visible(row)).
  int64_t visible(int64_t row) const { return causal ? std::min(row + offset() + 1, n_key) : n_key; }
  int64_t first_key(int64_t head, int64_t row) const {
    if (!local()) return 0;
    const int64_t position = row + offset();
    int64_t first = window > 0 ? position - window + 1 : 0;
    if (documents) first = std::max<int64_t>(first, of_document(head, 0, position));
    return std::clamp<int64_t>(first, 0, position);  // whatever the documents say
  }
  // The queries [first_query(key), end_query(head, key)) attend to this key.
  int64_t first_query(int64_t key) const { return causal ? std::max<int64_t>(0, key - offset()) : 0; }
  int64_t end_query(int64_t head, int64_t key) const {
    int64_t end = n_key;
    if (window > 0) end = std::min(end, key + window);
    if (documents) end = std::min<int64_t>(end, of_document(head, 1, key));
    return std::max<int64_t>(0, end - offset());
  }

 private:
  int64_t of_document(int64_t head, int64_t which, int64_t position) const {
    return documents[(head / n_head * 2 + which) * n_key + position];
  }
};

// Backward: a task is a share of the heads that read one head of keys, and adds up dk and dv over them. The number of
// shares follows from the shape alone, because the order of the additions does. It is more than 1 only where there are
// few heads of keys for the threads to share.
inline int64_t shares_of_group(const Problem& p) {
  constexpr int64_t kTasks = 32;
  return std::min(p.group, (kTasks + p.n_key_heads() - 1) / p.n_key_heads());
}

// What the online softmax subtracts from scores with the maximum `top`. It is 0 while all are -infinity, because
// -infinity - -infinity is NaN, and a later key may have a finite score.
inline float finite_or_zero(float top) { return top == -INFINITY ? 0.0f : top; }

}  // namespace fastgpt
