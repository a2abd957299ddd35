// Attention in vectors of fp32, whatever the tensors hold.
#pragma once

#include <memory>

#include "attention.h"
#include "gemm.h"

namespace fastgpt {
namespace vectors {

// A block of scores is 48 queries by 64 keys, 12 KiB of fp32: with the packed keys and values of D = 64 it stays in the
// first two cache levels.
constexpr int64_t kQueryBlock = 48;  // a multiple of the GEMM's tile height, 6
constexpr int64_t kKeyBlock = 64;    // a multiple of every vector width

// Copies rows [first, first + n), times `factor`, to fp32: out[i * padded_dim + d]. The padding is zeroed.
template <class T>
void pack(Rows<T> rows, int64_t first, int64_t n, const Problem& p, float factor, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    float* row = out + i * p.padded_dim;
    for_each_vector(
        p.head_dim, [&](int64_t d, int64_t lanes) { store(row + d, load(rows[first + i] + d, lanes) * factor); });
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

// Copies n packed rows, (n, padded_dim) fp32, to the rows from `first` on.
template <class T>
void unpack(const float* from, int64_t first, int64_t n, const Problem& p, Rows<T> rows) {
  for (int64_t i = 0; i < n; ++i)
    for_each_vector(p.head_dim, [&](int64_t d, int64_t lanes) {
      store(rows[first + i] + d, load(from + i * p.padded_dim + d), lanes);
    });
}

using Scratch = std::unique_ptr<float[]>;
inline Scratch scratch(int64_t n) { return Scratch(new float[n]); }

// Turns the first n of a row of scores into weights, exp(score - subtracted). Returns their sums, one for each lane.
FASTGPT_INLINE Vec weigh(float* row, int64_t n, float subtracted) {
  Vec total{};
  for_each_vector(n, [&](int64_t j, int64_t lanes) {
    const Vec weight = keep_first(exp_nonpositive(load(row + j) - subtracted), lanes);
    total += weight;
    store(row + j, weight);
  });
  return total;
}

// Bounds n rows of scores by the soft cap.
inline void cap(const Problem& p, float* scores, int64_t n, int64_t columns) {
  const float inverse = 1.0f / p.softcap;
  for (int64_t i = 0; i < n; ++i)
    for_each_vector(columns, [&](int64_t j, int64_t) {
      float* at = scores + i * kKeyBlock + j;
      store(at, p.softcap * tanh(load(at) * inverse));
    });
}

// Where in a row of scores, from key `key` on, the keys begin that the query sees: the scores before are set to
// -infinity. They are at most the first `visible`.
FASTGPT_INLINE void hide_first(
    const Problem& p, int64_t head, int64_t row, int64_t key, int64_t visible, float* scores) {
  std::fill_n(scores, std::clamp<int64_t>(p.first_key(head, row) - key, 0, visible), -INFINITY);
}

// Forward of query rows [first, first + n) of one head. `keys_transposed` and `values` hold the head's packed blocks,
// as pack_transposed and pack write them. lse: (n_query). Online softmax: when a row's maximum grows, its sum and its
// result so far are multiplied by exp(old - new maximum).
template <class T, bool kLocal>
void forward_block(
    const Problem& p, int64_t head, Rows<const T> q, int64_t first, int64_t n, const float* keys_transposed,
    const float* values, Rows<T> out, float* lse) {
  const Scratch queries = scratch(kQueryBlock * p.padded_dim), result = scratch(kQueryBlock * p.padded_dim);
  float weights[kQueryBlock * kKeyBlock], keep[kKeyBlock];
  float row_max[kQueryBlock];
  Vec row_sum[kQueryBlock] = {};  // a sum for each lane; the lanes are added at the end only
  std::fill_n(row_max, n, -INFINITY);
  std::fill_n(result.get(), n * p.padded_dim, 0.0f);
  pack(q, first, n, p, p.scale, queries.get());  // scales the queries once, not every score

  const int64_t keys_in_use = p.visible(first + n - 1);
  const int64_t first_in_use = kLocal ? p.first_key(head, first) / kKeyBlock * kKeyBlock : 0;
  for (int64_t key = first_in_use; key < keys_in_use; key += kKeyBlock) {
    const int64_t columns = round_up(std::min(kKeyBlock, keys_in_use - key), kLanes);
    gemm(
        {n, columns, p.head_dim, queries.get(), p.padded_dim, 1, keys_transposed + key * p.padded_dim, kKeyBlock,
         weights, kKeyBlock, false});
    if (p.softcap > 0.0f) cap(p, weights, n, columns);
    for (int64_t i = 0; i < n; ++i) {
      float* row = weights + i * kKeyBlock;
      const int64_t visible = std::max<int64_t>(0, std::min(columns, p.visible(first + i) - key));
      if constexpr (kLocal) hide_first(p, head, first + i, key, visible, row);
      Vec top = broadcast(row_max[i]);
      for_each_vector(
          visible, [&](int64_t j, int64_t lanes) { top = max(top, keep_first(load(row + j), lanes, row_max[i])); });
      const float new_max = max(top);
      const Vec total = weigh(row, visible, finite_or_zero(new_max));
      for (int64_t j = round_up(visible, kLanes); j < columns; j += kLanes) store(row + j, Vec{});
      const float shrink = row_max[i] == new_max ? 1.0f : std::exp(row_max[i] - new_max);
      row_sum[i] = row_sum[i] * shrink + total;
      row_max[i] = new_max;
      if (shrink != 1.0f)  // most blocks do not raise the maximum
        for_each_vector(p.padded_dim, [&](int64_t d, int64_t) {
          float* at = result.get() + i * p.padded_dim + d;
          store(at, load(at) * shrink);
        });
      if (p.dropout) {
        p.dropout.factors(head, first + i, key, kKeyBlock, keep);
        for_each_vector(columns, [&](int64_t j, int64_t) { store(row + j, load(row + j) * load(keep + j)); });
      }
    }
    gemm(
        {n, p.padded_dim, std::min(columns, keys_in_use - key), weights, kKeyBlock, 1, values + key * p.padded_dim,
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

// Tasks are blocks of queries. A thread packs a head's keys and values once for all its consecutive tasks that read it.
// lse: (n_heads, n_query).
template <class T, bool kLocal>
void forward(const Problem& p, const Inputs<const T>& x, Heads<T> out, float* lse) {
  const int64_t n_query_blocks = (p.n_query + kQueryBlock - 1) / kQueryBlock;
  const int64_t padded_keys = round_up(p.n_key, kKeyBlock);
  torch::stable::parallel_for(0, p.n_heads * n_query_blocks, 1, [&](int64_t begin, int64_t end) {
    const Scratch keys_transposed = scratch(padded_keys * p.padded_dim), values = scratch(padded_keys * p.padded_dim);
    int64_t packed_head = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / n_query_blocks, first = task % n_query_blocks * kQueryBlock;
      const int64_t key_head = head / p.group;
      if (key_head != packed_head) {
        for (int64_t key = p.first_key(head, 0) / kKeyBlock * kKeyBlock; key < p.n_key; key += kKeyBlock) {
          const int64_t n = std::min(kKeyBlock, p.n_key - key);
          pack_transposed(x.k[key_head], key, n, p, keys_transposed.get() + key * p.padded_dim);
          pack(x.v[key_head], key, n, p, 1.0f, values.get() + key * p.padded_dim);
        }
        packed_head = key_head;
      }
      forward_block<T, kLocal>(
          p, head, x.q[head], first, std::min(kQueryBlock, p.n_query - first), keys_transposed.get(), values.get(),
          out[head], lse + head * p.n_query);
    }
  });
}

// ---- few queries ----
//
// As when a text is generated: one query and many keys. A value is read once for each query, so that packing the values
// would cost more than it saves: they are read where they lie. So are keys of 16 bits. Those of fp32 are packed: the
// backward computes the scores again, from packed keys, and any difference from the scores here would be an error of
// its weights, which at fp32's precision shows.

constexpr int64_t kFewQueries = 8;  // from here on blocks are faster

// scores[i * stride + key] of all queries of a head with the keys from `first` on, a multiple of kKeyBlock; `keys` is
// scratch for a block of keys. stride: a multiple of kKeyBlock.
template <class T>
void score_few(
    const Problem& p, Rows<const T> k, const float* queries, float* keys, float* scores, int64_t stride,
    int64_t first) {
  for (int64_t key = first; key < p.n_key; key += kKeyBlock) {
    const int64_t n = std::min(kKeyBlock, p.n_key - key);
    if constexpr (std::is_same_v<T, float>) {
      pack_transposed(k, key, n, p, keys);
      gemm(
          {p.n_query, round_up(n, kLanes), p.head_dim, queries, p.padded_dim, 1, keys, kKeyBlock, scores + key, stride,
           false});
    } else {
      for (int64_t j = key; j < key + n; ++j)
        for (int64_t i = 0; i < p.n_query; ++i) {
          Vec products{};
          for_each_vector(p.head_dim, [&](int64_t d, int64_t lanes) {
            products += load(queries + i * p.padded_dim + d) * load(k[j] + d, lanes);
          });
          scores[i * stride + j] = sum(products);
        }
    }
    if (p.softcap > 0.0f)
      for (int64_t i = 0; i < p.n_query; ++i) cap(p, scores + i * stride + key, 1, round_up(n, kLanes));
  }
}

// The output of one query from its scores, which become its weights.
template <class T>
void attend_row(
    const Problem& p, int64_t head, int64_t row, Rows<const T> v, float* weights, float* keep, Rows<T> out,
    float* lse) {
  const int64_t first = p.first_key(head, row) / kKeyBlock * kKeyBlock, n = p.visible(row) - first;
  weights += first;
  if (p.local()) hide_first(p, head, row, first, n, weights);
  float top = -INFINITY;
  for (int64_t j = 0; j < n; ++j) top = std::max(top, weights[j]);
  const float total = sum(weigh(weights, n, finite_or_zero(top)));
  lse[row] = top + std::log(total);
  if (p.dropout) {
    p.dropout.factors(head, row, first, round_up(n, kLanes), keep);
    for_each_vector(n, [&](int64_t j, int64_t) { store(weights + j, load(weights + j) * load(keep + j)); });
  }
  for (int64_t d = 0; d < p.head_dim; d += kLanes) {
    const int64_t lanes = std::min<int64_t>(kLanes, p.head_dim - d);
    Vec even{}, odd{};  // two sums, because each addition waits for the one before
    int64_t j = 0;
    for (; j + 2 <= n; j += 2) {
      even += weights[j] * load(v[first + j] + d, lanes);
      odd += weights[j + 1] * load(v[first + j + 1] + d, lanes);
    }
    if (j < n) even += weights[j] * load(v[first + j] + d, lanes);
    store(out[row] + d, (even + odd) * (1.0f / total), lanes);
  }
}

template <class T>
void forward_few(const Problem& p, const Inputs<const T>& x, Heads<T> out, float* lse) {
  torch::stable::parallel_for(0, p.n_heads, 1, [&](int64_t begin, int64_t end) {
    const int64_t stride = round_up(p.n_key, kKeyBlock);
    const Scratch queries = scratch(p.n_query * p.padded_dim), scores = scratch(p.n_query * stride);
    const Scratch keys = scratch(kKeyBlock * p.padded_dim), keep = scratch(p.dropout ? stride : 0);
    for (int64_t head = begin; head < end; ++head) {
      const int64_t key_head = head / p.group, first = p.first_key(head, 0) / kKeyBlock * kKeyBlock;
      pack(x.q[head], 0, p.n_query, p, p.scale, queries.get());
      score_few(p, x.k[key_head], queries.get(), keys.get(), scores.get(), stride, first);
      for (int64_t row = 0; row < p.n_query; ++row)
        attend_row(
            p, head, row, x.v[key_head], scores.get() + row * stride, keep.get(), out[head], lse + head * p.n_query);
    }
  });
}

// ---- backward ----

// Where the gradients of a head of keys are added up, (keys, padded_dim) each. If one head of queries reads it, a block
// of keys is complete before the next begins, and `dkeys` and `dvalues` hold a block. Otherwise they hold all keys.
struct KeySums {
  float *dkeys, *dvalues;
  bool all_keys;     // rather than a block
  bool first, last;  // of the heads that are added: sums begin at zero; sums are complete
};

// Backward of one head. With P the weights, Z the dropout factors and delta = rowsum(dout * out):
//   dV = (P Z)^T dO,   dS = P (Z (dO V^T) - delta),   dQ = scale dS K,   dK = scale dS^T Q.
// A soft cap multiplies dS by 1 - tanh(s / cap)**2, its derivative.
// The packed queries contain the scale, so dK needs no other; dQ is scaled at the end. lse: (n_query).
// dk and dv are written with the last head.
template <class T, bool kLocal>
void backward_head(
    const Problem& p, int64_t head, Rows<const T> dout, Rows<const T> q, Rows<const T> k, Rows<const T> v,
    Rows<const T> out, const float* lse, Rows<T> dq, Rows<T> dk, Rows<T> dv, const KeySums& sums) {
  const int64_t D = p.padded_dim;
  const Scratch queries = scratch(p.n_query * D), douts = scratch(p.n_query * D), dqueries = scratch(p.n_query * D);
  const Scratch delta = scratch(p.n_query);
  const Scratch keys = scratch(kKeyBlock * D), keys_transposed = scratch(kKeyBlock * D);
  const Scratch values_transposed = scratch(kKeyBlock * D);
  const float inverse_cap = p.softcap > 0.0f ? 1.0f / p.softcap : 0.0f;
  float weights[kQueryBlock * kKeyBlock], dweights[kQueryBlock * kKeyBlock], keep[kKeyBlock];

  pack(q, 0, p.n_query, p, p.scale, queries.get());
  pack(dout, 0, p.n_query, p, 1.0f, douts.get());
  std::fill_n(dqueries.get(), p.n_query * D, 0.0f);
  for (int64_t i = 0; i < p.n_query; ++i) {
    Vec total{};
    for_each_vector(p.head_dim, [&](int64_t d, int64_t lanes) {
      total += load(douts.get() + i * D + d) * load(out[i] + d, lanes);
    });
    delta[i] = sum(total);
  }

  for (int64_t key = 0; key < p.n_key; key += kKeyBlock) {
    const int64_t n_keys = std::min(kKeyBlock, p.n_key - key);
    pack(k, key, n_keys, p, 1.0f, keys.get());
    pack_transposed(k, key, n_keys, p, keys_transposed.get());
    pack_transposed(v, key, n_keys, p, values_transposed.get());
    float *dkeys = sums.dkeys + (sums.all_keys ? key * D : 0), *dvalues = sums.dvalues + (sums.all_keys ? key * D : 0);
    if (sums.first) {
      std::fill_n(dkeys, n_keys * D, 0.0f);
      std::fill_n(dvalues, n_keys * D, 0.0f);
    }

    const int64_t end = kLocal ? p.end_query(head, key + n_keys - 1) : p.n_query;
    for (int64_t first = p.first_query(key); first < end; first += kQueryBlock) {
      const int64_t n = std::min(kQueryBlock, p.n_query - first);
      const int64_t in_use = std::min(n_keys, p.visible(first + n - 1) - key), columns = round_up(in_use, kLanes);
      gemm(
          {n, columns, p.head_dim, queries.get() + first * D, D, 1, keys_transposed.get(), kKeyBlock, weights,
           kKeyBlock, false});
      gemm(
          {n, columns, p.head_dim, douts.get() + first * D, D, 1, values_transposed.get(), kKeyBlock, dweights,
           kKeyBlock, false});
      if (p.softcap > 0.0f) cap(p, weights, n, columns);
      for (int64_t i = 0; i < n; ++i) {
        float *weight = weights + i * kKeyBlock, *dweight = dweights + i * kKeyBlock;
        const int64_t visible = std::max<int64_t>(0, std::min(in_use, p.visible(first + i) - key));
        if constexpr (kLocal) hide_first(p, head, first + i, key, visible, weight);
        const float row_lse = lse[first + i], row_delta = delta[first + i];
        if (p.dropout) p.dropout.factors(head, first + i, key, kKeyBlock, keep);
        for_each_vector(columns, [&](int64_t j, int64_t) {
          const Vec w = keep_first(exp_nonpositive((load(weight + j) - row_lse)), std::max<int64_t>(0, visible - j));
          const Vec z = p.dropout ? load(keep + j) : broadcast(1.0f);
          Vec dscore = w * (z * load(dweight + j) - row_delta);
          if (p.softcap > 0.0f) {  // the scores that are hidden are -infinity, and count for nothing
            const Vec capped = max(load(weight + j) * inverse_cap, broadcast(-1.0f));
            dscore *= 1.0f - capped * capped;
          }
          store(weight + j, w * z);
          store(dweight + j, dscore);
        });
      }
      gemm({in_use, D, n, weights, 1, kKeyBlock, douts.get() + first * D, D, dvalues, D, true});
      gemm({in_use, D, n, dweights, 1, kKeyBlock, queries.get() + first * D, D, dkeys, D, true});
      gemm({n, D, in_use, dweights, kKeyBlock, 1, keys.get(), D, dqueries.get() + first * D, D, true});
    }
    if (sums.last) {
      unpack(dkeys, key, n_keys, p, dk);
      unpack(dvalues, key, n_keys, p, dv);
    }
  }
  for_each_vector(p.n_query * D, [&](int64_t i, int64_t lanes) {
    store(dqueries.get() + i, load(dqueries.get() + i, lanes) * p.scale, lanes);
  });
  unpack(dqueries.get(), 0, p.n_query, p, dq);
}

// Tasks are whole heads, or shares of the heads that read one head of keys: one thread sums a head's dQ over all keys,
// and a share's dK and dV over its heads, in a fixed order. lse: (n_heads, n_query).
template <class T, bool kLocal>
void backward(
    const Problem& p, Heads<const T> dout, const Inputs<const T>& x, Heads<const T> out, const float* lse,
    const Inputs<T>& gradient) {
  const int64_t shares = shares_of_group(p), D = p.padded_dim;
  const int64_t size = (p.group > 1 ? p.n_key : kKeyBlock) * D;  // of the sums of dK
  const Scratch of_shares = scratch(shares > 1 ? p.n_key_heads() * shares * 2 * size : 0);
  torch::stable::parallel_for(0, p.n_key_heads() * shares, 1, [&](int64_t begin, int64_t end) {
    const Scratch own = scratch(shares > 1 ? 0 : 2 * size);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t key_head = task / shares, share = task % shares;
      float* sums = shares > 1 ? of_shares.get() + task * 2 * size : own.get();
      const int64_t first = share * p.group / shares, last = (share + 1) * p.group / shares - 1;
      for (int64_t i = first; i <= last; ++i) {
        const int64_t head = key_head * p.group + i;
        backward_head<T, kLocal>(
            p, head, dout[head], x.q[head], x.k[key_head], x.v[key_head], out[head], lse + head * p.n_query,
            gradient.q[head], gradient.k[key_head], gradient.v[key_head],
            {sums, sums + size, p.group > 1, i == first, shares == 1 && i == last});
      }
    }
  });
  if (shares == 1) return;
  const int64_t key_blocks = (p.n_key + kKeyBlock - 1) / kKeyBlock;
  torch::stable::parallel_for(0, p.n_key_heads() * key_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t key_head = task / key_blocks, key = task % key_blocks * kKeyBlock;
      const int64_t n = std::min(kKeyBlock, p.n_key - key);
      float* sums = of_shares.get() + key_head * shares * 2 * size + key * D;
      for (int64_t which = 0; which < 2; ++which, sums += size) {
        for (int64_t share = 1; share < shares; ++share)
          for_each_vector(
              n * D, [&](int64_t i, int64_t) { store(sums + i, load(sums + i) + load(sums + share * 2 * size + i)); });
        unpack(sums, key, n, p, (which == 0 ? gradient.k : gradient.v)[key_head]);
      }
    }
  });
}

}  // namespace vectors
}  // namespace fastgpt
