// Scaled dot-product attention, forward and backward, in blocks that stay in cache: the T x T matrix of
// weights never exists. The forward keeps a running maximum and sum per row (online softmax) and saves the
// logsumexp; the backward recomputes the weights from it.
// Dao et al., "FlashAttention", 2022; Dao, "FlashAttention-2", 2023.
#include <memory>

#include "gemm.h"
#include "philox.h"
#include "tensor.h"

namespace fastgpt {
namespace {

constexpr int64_t kQueryBlock = 48;  // rows of a block; a multiple of the GEMM's tile height
constexpr int64_t kKeyBlock = 64;    // columns of a block; a multiple of every vector width

// One (batch, head)'s rows of a tensor: `rows` of D contiguous elements, `stride` elements apart.
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
// View `index` of the n that lie side by side in the last dimension of (B, T, n * C).
template <class U>
Heads<U> heads_of_packed(const Tensor& t, int64_t n_head, int64_t n, int64_t index) {
  const int64_t C = t.size(2) / n;
  return {data<U>(t) + index * C, n_head, t.stride(0), C / n_head, t.stride(1)};
}

template <class U>
struct Inputs {
  Heads<U> q, k, v;
};
template <class U>
Inputs<U> inputs_of_packed(const Tensor& qkv, int64_t n_head) {
  return {heads_of_packed<U>(qkv, n_head, 3, 0), heads_of_packed<U>(qkv, n_head, 3, 1),
          heads_of_packed<U>(qkv, n_head, 3, 2)};
}

struct Dropout {
  uint32_t threshold = 0;  // weights whose random word is below it are dropped: p * 2^32
  float keep_scale = 1.0f;
  uint64_t seed = 0;

  Dropout(double p, const std::optional<Tensor>& seed_tensor) {
    if (p <= 0.0) return;
    threshold = static_cast<uint32_t>(std::min(p * 4294967296.0, 4294967295.0));
    keep_scale = static_cast<float>(1.0 / (1.0 - p));
    seed = static_cast<uint64_t>(*data<int64_t>(*seed_tensor));
  }
  explicit operator bool() const { return threshold != 0; }

  // Factors 0 or 1 / (1 - p) of one row of a key block.
  void factors(int64_t head, int64_t row, int64_t first_column, float* out) const {
    uint32_t words[4 * kLanes];
    for (int64_t column = 0; column < kKeyBlock; column += 4 * kLanes) {
      philox(seed, first_column + column, row, head, words);
      for (int64_t i = 0; i < std::min<int64_t>(4 * kLanes, kKeyBlock - column); ++i)
        out[column + i] = words[i] < threshold ? 0.0f : keep_scale;
    }
  }
};

struct Problem {
  int64_t n_heads, n_query, n_key, head_dim, padded_dim;  // n_heads counts those of every batch entry
  bool causal;
  float scale;
  Dropout dropout;

  // Keys [0, visible(row)) take part in a query row.
  int64_t visible(int64_t row) const { return causal ? std::min(row + 1, n_key) : n_key; }
};

// Copies rows [first, first + n) to fp32 with the padding zeroed: out[i * padded_dim + d].
template <class T>
void pack(Rows<T> rows, int64_t first, int64_t n, const Problem& p, float factor, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    float* row = out + i * p.padded_dim;
    for_each_vector(p.head_dim, [&](int64_t d, int64_t lanes) { store(row + d, load(rows[first + i] + d, lanes) * factor); });
  }
}

// The same transposed: out[d * kKeyBlock + i], columns past n zeroed.
template <class T>
void pack_transposed(Rows<T> rows, int64_t first, int64_t n, const Problem& p, float* out) {
  int64_t done = 0;
  if constexpr (sizeof(T) == sizeof(float))
    if (n == kKeyBlock)
      for (; done + 4 <= p.head_dim; done += 4)
        for (int64_t i = 0; i < kKeyBlock; i += 4)
          transpose_4x4(rows[first + i] + done, rows.stride, out + done * kKeyBlock + i, kKeyBlock);
  for (int64_t i = 0; i < kKeyBlock; ++i)
    for (int64_t d = done; d < p.head_dim; ++d)
      out[d * kKeyBlock + i] = i < n ? static_cast<float>(rows[first + i][d]) : 0.0f;
}

template <class T>
void unpack(const float* from, int64_t first, int64_t n, const Problem& p, Rows<T> rows) {
  for (int64_t i = 0; i < n; ++i)
    for_each_vector(p.head_dim, [&](int64_t d, int64_t lanes) {
      store(rows[first + i] + d, load(from + i * p.padded_dim + d), lanes);
    });
}

using Scratch = std::unique_ptr<float[]>;
Scratch scratch(int64_t n) { return Scratch(new float[n]); }

// Forward of query rows [first, first + n) of one head.
// `keys_transposed` and `values` hold the head's packed blocks; scores are in units of log 2.
template <class T>
void forward_block(
    const Problem& p, int64_t head, Rows<const T> q, int64_t first, int64_t n, const float* keys_transposed,
    const float* values, Rows<T> out, float* lse) {
  const Scratch queries = scratch(kQueryBlock * p.padded_dim), result = scratch(kQueryBlock * p.padded_dim);
  float weights[kQueryBlock * kKeyBlock], keep[kKeyBlock];
  float row_max[kQueryBlock];
  Vec row_sum[kQueryBlock] = {};  // across lanes at the end only
  std::fill_n(row_max, n, -INFINITY);
  std::fill_n(result.get(), n * p.padded_dim, 0.0f);
  pack(q, first, n, p, p.scale, queries.get());

  const int64_t keys_in_use = p.visible(first + n - 1);
  for (int64_t key = 0; key < keys_in_use; key += kKeyBlock) {
    const int64_t columns = round_up(std::min(kKeyBlock, keys_in_use - key), kLanes);
    gemm({n, columns, p.head_dim, queries.get(), p.padded_dim, 1, keys_transposed + key * p.padded_dim, kKeyBlock,
          weights, kKeyBlock, false});
    for (int64_t i = 0; i < n; ++i) {
      float* row = weights + i * kKeyBlock;
      const int64_t visible = std::max<int64_t>(0, std::min(columns, p.visible(first + i) - key));
      Vec top = broadcast(row_max[i]);
      for_each_vector(visible, [&](int64_t j, int64_t lanes) { top = max(top, keep_first(load(row + j), lanes, row_max[i])); });
      const float new_max = max(top);
      Vec total{};
      for_each_vector(visible, [&](int64_t j, int64_t lanes) {
        const Vec weight = keep_first(exp_nonpositive(load(row + j) - new_max), lanes);
        total += weight;
        store(row + j, weight);
      });
      for (int64_t j = round_up(visible, kLanes); j < columns; j += kLanes) store(row + j, Vec{});
      const float shrink = row_max[i] == new_max ? 1.0f : std::exp(row_max[i] - new_max);
      row_sum[i] = row_sum[i] * shrink + total;
      row_max[i] = new_max;
      if (shrink != 1.0f)
        for_each_vector(p.padded_dim, [&](int64_t d, int64_t) {
          float* at = result.get() + i * p.padded_dim + d;
          store(at, load(at) * shrink);
        });
      if (p.dropout) {
        p.dropout.factors(head, first + i, key, keep);
        for_each_vector(columns, [&](int64_t j, int64_t) { store(row + j, load(row + j) * load(keep + j)); });
      }
    }
    gemm({n, p.padded_dim, std::min(columns, keys_in_use - key), weights, kKeyBlock, 1, values + key * p.padded_dim,
          p.padded_dim, result.get(), p.padded_dim, true});
  }
  for (int64_t i = 0; i < n; ++i) {
    const float total = sum(row_sum[i]);
    lse[first + i] = row_max[i] + std::log(total);
    const float inverse = 1.0f / total;
    for_each_vector(p.padded_dim, [&](int64_t d, int64_t) {
      float* at = result.get() + i * p.padded_dim + d;
      store(at, load(at) * inverse);
    });
  }
  unpack(result.get(), first, n, p, out);
}

template <class T>
void forward(const Problem& p, const Inputs<const T>& x, Heads<T> out, float* lse) {
  const int64_t n_query_blocks = (p.n_query + kQueryBlock - 1) / kQueryBlock;
  const int64_t padded_keys = round_up(p.n_key, kKeyBlock);
  torch::stable::parallel_for(0, p.n_heads * n_query_blocks, 1, [&](int64_t begin, int64_t end) {
    const Scratch keys_transposed = scratch(padded_keys * p.padded_dim), values = scratch(padded_keys * p.padded_dim);
    int64_t packed_head = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / n_query_blocks, first = task % n_query_blocks * kQueryBlock;
      if (head != packed_head) {
        for (int64_t key = 0; key < p.n_key; key += kKeyBlock) {
          const int64_t n = std::min(kKeyBlock, p.n_key - key);
          pack_transposed(x.k[head], key, n, p, keys_transposed.get() + key * p.padded_dim);
          pack(x.v[head], key, n, p, 1.0f, values.get() + key * p.padded_dim);
        }
        packed_head = head;
      }
      forward_block(
          p, head, x.q[head], first, std::min(kQueryBlock, p.n_query - first), keys_transposed.get(), values.get(),
          out[head], lse + head * p.n_query);
    }
  });
}

// Backward of one head. With P the weights, Z the dropout factors and delta = rowsum(dout * out):
//   dV = (P Z)^T dO,   dS = P (Z (dO V^T) - delta),   dQ = scale dS K,   dK = scale dS^T Q.
template <class T>
void backward_head(
    const Problem& p, int64_t head, Rows<const T> dout, Rows<const T> q, Rows<const T> k, Rows<const T> v,
    Rows<const T> out, const float* lse, Rows<T> dq, Rows<T> dk, Rows<T> dv) {
  const int64_t D = p.padded_dim;
  const Scratch queries = scratch(p.n_query * D), douts = scratch(p.n_query * D), dqueries = scratch(p.n_query * D);
  const Scratch delta = scratch(p.n_query);
  const Scratch keys = scratch(kKeyBlock * D), keys_transposed = scratch(kKeyBlock * D);
  const Scratch values_transposed = scratch(kKeyBlock * D), dkeys = scratch(kKeyBlock * D), dvalues = scratch(kKeyBlock * D);
  float weights[kQueryBlock * kKeyBlock], dweights[kQueryBlock * kKeyBlock], keep[kKeyBlock];

  pack(q, 0, p.n_query, p, p.scale, queries.get());
  pack(dout, 0, p.n_query, p, 1.0f, douts.get());
  std::fill_n(dqueries.get(), p.n_query * D, 0.0f);
  for (int64_t i = 0; i < p.n_query; ++i) {
    Vec total{};
    for_each_vector(p.head_dim, [&](int64_t d, int64_t lanes) { total += load(douts.get() + i * D + d) * load(out[i] + d, lanes); });
    delta[i] = sum(total);
  }

  for (int64_t key = 0; key < p.n_key; key += kKeyBlock) {
    const int64_t n_keys = std::min(kKeyBlock, p.n_key - key);
    pack(k, key, n_keys, p, 1.0f, keys.get());
    pack_transposed(k, key, n_keys, p, keys_transposed.get());
    pack_transposed(v, key, n_keys, p, values_transposed.get());
    std::fill_n(dkeys.get(), n_keys * D, 0.0f);
    std::fill_n(dvalues.get(), n_keys * D, 0.0f);

    for (int64_t first = p.causal ? key : 0; first < p.n_query; first += kQueryBlock) {
      const int64_t n = std::min(kQueryBlock, p.n_query - first);
      const int64_t in_use = std::min(n_keys, p.visible(first + n - 1) - key), columns = round_up(in_use, kLanes);
      gemm({n, columns, p.head_dim, queries.get() + first * D, D, 1, keys_transposed.get(), kKeyBlock, weights,
            kKeyBlock, false});
      gemm({n, columns, p.head_dim, douts.get() + first * D, D, 1, values_transposed.get(), kKeyBlock, dweights,
            kKeyBlock, false});
      for (int64_t i = 0; i < n; ++i) {
        float *weight = weights + i * kKeyBlock, *dweight = dweights + i * kKeyBlock;
        const int64_t visible = std::max<int64_t>(0, std::min(in_use, p.visible(first + i) - key));
        const float row_lse = lse[first + i], row_delta = delta[first + i];
        if (p.dropout) p.dropout.factors(head, first + i, key, keep);
        for_each_vector(columns, [&](int64_t j, int64_t) {
          const Vec w = keep_first(exp_nonpositive((load(weight + j) - row_lse)), std::max<int64_t>(0, visible - j));
          const Vec z = p.dropout ? load(keep + j) : broadcast(1.0f);
          store(weight + j, w * z);
          store(dweight + j, w * (z * load(dweight + j) - row_delta));
        });
      }
      gemm({in_use, D, n, weights, 1, kKeyBlock, douts.get() + first * D, D, dvalues.get(), D, true});
      gemm({in_use, D, n, dweights, 1, kKeyBlock, queries.get() + first * D, D, dkeys.get(), D, true});
      gemm({n, D, in_use, dweights, kKeyBlock, 1, keys.get(), D, dqueries.get() + first * D, D, true});
    }
    unpack(dkeys.get(), key, n_keys, p, dk);
    unpack(dvalues.get(), key, n_keys, p, dv);
  }
  for_each_vector(p.n_query * D, [&](int64_t i, int64_t lanes) {
    store(dqueries.get() + i, load(dqueries.get() + i, lanes) * p.scale, lanes);
  });
  unpack(dqueries.get(), 0, p.n_query, p, dq);
}

template <class T>
void backward(
    const Problem& p, Heads<const T> dout, const Inputs<const T>& x, Heads<const T> out, const float* lse,
    const Inputs<T>& gradient) {
  torch::stable::parallel_for(0, p.n_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head)
      backward_head<T>(
          p, head, dout[head], x.q[head], x.k[head], x.v[head], out[head], lse + head * p.n_query, gradient.q[head],
          gradient.k[head], gradient.v[head]);
  });
}

Tensor with_contiguous_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

// (B, H, T, D) laid out in memory as (B, T, H, D), the order in which a GPT reads it next.
Tensor empty_heads(const Tensor& like, int64_t T) {
  const int64_t B = like.size(0), H = like.size(1), D = like.size(3);
  return empty_strided({B, H, T, D}, {T * H * D, D, H * D, 1}, like.scalar_type());
}

std::tuple<Tensor, Tensor> attention(
    const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, bool causal, double scale, double dropout_p,
    const std::optional<Tensor>& seed) {
  const Tensor q = with_contiguous_rows(q_in), k = with_contiguous_rows(k_in), v = with_contiguous_rows(v_in);
  const int64_t B = q.size(0), H = q.size(1), T = q.size(2), D = q.size(3);
  const Problem p{B * H, T, k.size(2), D, round_up(D, kLanes), causal, static_cast<float>(scale), {dropout_p, seed}};
  Tensor out = empty_heads(q, T), lse = empty({B, H, T}, ScalarType::Float);
  dispatch(q.scalar_type(), [&](auto element) {
    using E = decltype(element);
    forward<E>(p, {heads_of<const E>(q), heads_of<const E>(k), heads_of<const E>(v)}, heads_of<E>(out), data<float>(lse));
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& dout_in, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& out_in,
    const Tensor& lse, bool causal, double scale, double dropout_p, const std::optional<Tensor>& seed) {
  const Tensor dout = with_contiguous_rows(dout_in), out = with_contiguous_rows(out_in);
  const Tensor q = with_contiguous_rows(q_in), k = with_contiguous_rows(k_in), v = with_contiguous_rows(v_in);
  const int64_t B = q.size(0), H = q.size(1), T = q.size(2), D = q.size(3);
  const Problem p{B * H, T, k.size(2), D, round_up(D, kLanes), causal, static_cast<float>(scale), {dropout_p, seed}};
  Tensor dq = empty_heads(q, T), dk = empty_heads(k, p.n_key), dv = empty_heads(v, p.n_key);
  dispatch(q.scalar_type(), [&](auto element) {
    using E = decltype(element);
    backward<E>(
        p, heads_of<const E>(dout), {heads_of<const E>(q), heads_of<const E>(k), heads_of<const E>(v)},
        heads_of<const E>(out), data<float>(lse), {heads_of<E>(dq), heads_of<E>(dk), heads_of<E>(dv)});
  });
  return {dq, dk, dv};
}

// The same on q, k and v packed side by side as (B, T, 3C), with the output and the gradient packed likewise.

std::tuple<Tensor, Tensor> attention_qkv(
    const Tensor& qkv_in, int64_t n_head, bool causal, double scale, double dropout_p,
    const std::optional<Tensor>& seed) {
  const Tensor qkv = with_contiguous_rows(qkv_in);
  const int64_t B = qkv.size(0), T = qkv.size(1), C = qkv.size(2) / 3, D = C / n_head;
  const Problem p{B * n_head, T, T, D, round_up(D, kLanes), causal, static_cast<float>(scale), {dropout_p, seed}};
  Tensor out = empty({B, T, C}, qkv.scalar_type()), lse = empty({B, n_head, T}, ScalarType::Float);
  dispatch(qkv.scalar_type(), [&](auto element) {
    using E = decltype(element);
    forward<E>(p, inputs_of_packed<const E>(qkv, n_head), heads_of_packed<E>(out, n_head, 1, 0), data<float>(lse));
  });
  return {out, lse};
}

Tensor attention_qkv_backward(
    const Tensor& dout_in, const Tensor& qkv_in, const Tensor& out_in, const Tensor& lse, int64_t n_head, bool causal,
    double scale, double dropout_p, const std::optional<Tensor>& seed) {
  const Tensor dout = with_contiguous_rows(dout_in), qkv = with_contiguous_rows(qkv_in);
  const Tensor out = with_contiguous_rows(out_in);
  const int64_t B = qkv.size(0), T = qkv.size(1), D = qkv.size(2) / 3 / n_head;
  const Problem p{B * n_head, T, T, D, round_up(D, kLanes), causal, static_cast<float>(scale), {dropout_p, seed}};
  Tensor dqkv = empty(sizes_of(qkv), qkv.scalar_type());
  dispatch(qkv.scalar_type(), [&](auto element) {
    using E = decltype(element);
    backward<E>(
        p, heads_of_packed<const E>(dout, n_head, 1, 0), inputs_of_packed<const E>(qkv, n_head),
        heads_of_packed<const E>(out, n_head, 1, 0), data<float>(lse), inputs_of_packed<E>(dqkv, n_head));
  });
  return dqkv;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("attention_qkv", TORCH_BOX(&attention_qkv));
  m.impl("attention_qkv_backward", TORCH_BOX(&attention_qkv_backward));
}

}  // namespace fastgpt
