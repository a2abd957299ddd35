// Attention of bf16 on AMX: every product of a block is a product of tiles. Between two products the scores are
// processed in vectors, which write the weights as the packed tiles of the next product.
#pragma once

#include <cmath>
#include <memory>

#include "amx.h"
#include "attention.h"

#if defined(FASTGPT_AMX)

namespace fastgpt {
namespace amx {

// How many panels of 32 hold n queries, keys or elements of a head.
constexpr int64_t panels(int64_t n) { return (n + kLanesOfPanel - 1) / kLanesOfPanel; }
constexpr int64_t packed_bytes(int64_t lanes, int64_t depth) { return panels(lanes) * panels(depth) * kPairBytes; }
static_assert(kStep == kLanesOfPanel);  // a panel of weights is a step of the next product

// Memory that starts on a cache line, for packed operands or sums.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : lines_(new Line[(bytes + sizeof(Line) - 1) / sizeof(Line)]) {}
  char* packed() const { return lines_[0].bytes; }
  float* sums() const { return reinterpret_cast<float*>(packed()); }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  std::unique_ptr<Line[]> lines_;
};
inline Buffer buffer_of_sums(int64_t n) { return Buffer(n * static_cast<int64_t>(sizeof(float))); }

// The rows from `first` on as a matrix.
inline Matrix<BFloat16> matrix(Rows<const BFloat16> rows, int64_t first) { return {rows[first], rows.stride, 1}; }

// Where row i of a panel starts in its 32 x 32 sums, in elements: 16 lie there, the other 16 in the next tile.
constexpr int64_t row_of_sums(int64_t i) { return i / kTileLanes * 2 * kSumsOfTile + i % kTileLanes * 16; }
// Where row i of a panel starts in its pair of tiles, in bytes: all 32 bf16 lie there.
constexpr int64_t row_of_tiles(int64_t i) { return i / kTileLanes * kTileBytes + i % kTileLanes * 64; }

// Stores 32 fp32 as a row of bf16 of a tile.
FASTGPT_AMX FASTGPT_INLINE void store_row(char* to, Vec left, Vec right) {
  _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)right, (__m512)left));
}

// ---- forward ----

constexpr int64_t kKeysAtATime = 256;  // with 32 queries 32 KiB of fp32 scores

// Scales a row of scores, which lies in n panels, and bounds it by the soft cap.
FASTGPT_AMX inline void cap(const Problem& p, float* row, int64_t n) {
  const float factor = p.scale * (1.0f / p.softcap);
  for (int64_t j = 0; j < n; ++j)
    for (int64_t half = 0; half < 2; ++half) {
      float* at = row + j * kSumsOfPanels + half * kSumsOfTile;
      store(at, p.softcap * tanh(load(at) * factor));
    }
}

// Forward of the panel of 32 query rows that starts at `first`. `keys` and `values` are the packed head, the B operands
// of Q K^T and of P V. lse: (n_query). The online softmax is the one of vector_attention.h.
FASTGPT_AMX inline void forward_panel(
    const Problem& p, int64_t head, Rows<const BFloat16> q, int64_t first, const char* keys, const char* values,
    Rows<BFloat16> out, float* lse) {
  const int64_t n = std::min(kLanesOfPanel, p.n_query - first), steps = panels(p.head_dim);
  const Buffer queries(packed_bytes(n, p.head_dim)), result = buffer_of_sums(steps * kSumsOfPanels);
  alignas(64) float scores[kKeysAtATime / kLanesOfPanel * kSumsOfPanels], keep[kKeysAtATime];
  alignas(64) char weights[kKeysAtATime / kStep * kPairBytes];
  float row_max[kLanesOfPanel];
  Vec row_sum[kLanesOfPanel] = {};  // a sum for each lane; the lanes are added at the end only
  std::fill_n(row_max, n, -INFINITY);
  std::fill_n(result.sums(), steps * kSumsOfPanels, 0.0f);
  pack<true>(matrix(q, first), n, p.head_dim, queries.packed());

  const int64_t keys_in_use = p.visible(first + n - 1);
  const int64_t first_in_use = p.first_key(head, first) / kLanesOfPanel * kLanesOfPanel;
  const float scale = p.softcap > 0.0f ? 1.0f : p.scale;  // capped scores are scaled already
  for (int64_t key = first_in_use; key < keys_in_use; key += kKeysAtATime) {
    const int64_t n_panels = panels(std::min(kKeysAtATime, keys_in_use - key));
    for (int64_t j = 0; j < n_panels; ++j)
      multiply_panels<BFloat16>(
          queries.packed(), keys + (panels(key) + j) * steps * kPairBytes, steps, false, scores + j * kSumsOfPanels);
    for (int64_t i = 0; i < n; ++i) {
      float* row = scores + row_of_sums(i);
      const int64_t visible = std::max<int64_t>(0, p.visible(first + i) - key);
      if (p.softcap > 0.0f) cap(p, row, n_panels);
      if (p.local()) {  // the keys before the first that the query sees
        const int64_t hidden = std::min(p.first_key(head, first + i) - key, n_panels * kLanesOfPanel);
        for (int64_t j = 0; j < hidden; ++j)
          row[j / kLanesOfPanel * kSumsOfPanels + j / kTileLanes % 2 * kSumsOfTile + j % kTileLanes] = -INFINITY;
      }
      const auto score = [&](int64_t j, int64_t half, float beyond) FASTGPT_AMX {
        const Vec value = load(row + j * kSumsOfPanels + half * kSumsOfTile) * scale;
        return keep_first(value, std::max<int64_t>(0, visible - j * kLanesOfPanel - half * kTileLanes), beyond);
      };
      Vec top = broadcast(row_max[i]);
      for (int64_t j = 0; j < n_panels; ++j) top = max(max(top, score(j, 0, row_max[i])), score(j, 1, row_max[i]));
      const float new_max = max(top), subtracted = finite_or_zero(new_max);
      if (p.dropout) p.dropout.factors(head, first + i, key, n_panels * kLanesOfPanel, keep);
      Vec total{};
      for (int64_t j = 0; j < n_panels; ++j) {
        Vec left = exp_nonpositive(score(j, 0, -INFINITY) - subtracted);
        Vec right = exp_nonpositive(score(j, 1, -INFINITY) - subtracted);
        total += left + right;
        if (p.dropout) {
          left *= load(keep + j * kLanesOfPanel);
          right *= load(keep + j * kLanesOfPanel + kTileLanes);
        }
        store_row(weights + j * kPairBytes + row_of_tiles(i), left, right);
      }
      const float shrink = row_max[i] == new_max ? 1.0f : std::exp(row_max[i] - new_max);
      row_sum[i] = row_sum[i] * shrink + total;
      row_max[i] = new_max;
      if (shrink != 1.0f)
        for (int64_t d = 0; d < steps; ++d)
          for (int64_t half = 0; half < 2; ++half) {
            float* at = result.sums() + d * kSumsOfPanels + row_of_sums(i) + half * kSumsOfTile;
            store(at, load(at) * shrink);
          }
    }
    for (int64_t d = 0; d < steps; ++d)
      multiply_panels<BFloat16>(
          weights, values + (d * panels(p.n_key) + panels(key)) * kPairBytes, n_panels, true,
          result.sums() + d * kSumsOfPanels);
  }
  for (int64_t i = 0; i < n; ++i) {
    const float total = sum(row_sum[i]), inverse = 1.0f / total;
    lse[first + i] = row_max[i] + std::log(total);
    for (int64_t d = 0; d < p.head_dim; d += kTileLanes) {
      const float* at = result.sums() + d / kLanesOfPanel * kSumsOfPanels + row_of_sums(i) + d / 16 % 2 * kSumsOfTile;
      store(out[first + i] + d, load(at) * inverse, p.head_dim - d);
    }
  }
}

// Tasks are panels of queries. A thread packs a head's keys and values once for all its consecutive tasks that read it.
// lse: (n_heads, n_query).
FASTGPT_AMX inline void forward(const Problem& p, const Inputs<const BFloat16>& x, Heads<BFloat16> out, float* lse) {
  const int64_t panels_of_head = panels(p.n_query);
  torch::stable::parallel_for(0, p.n_heads * panels_of_head, 1, [&](int64_t begin, int64_t end) FASTGPT_AMX {
    const Tiles tiles;
    const Buffer keys(packed_bytes(p.n_key, p.head_dim)), values(packed_bytes(p.head_dim, p.n_key));
    int64_t packed_head = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / panels_of_head, first = task % panels_of_head * kLanesOfPanel;
      const int64_t key_head = head / p.group;
      if (key_head != packed_head) {
        pack<false>(matrix(x.k[key_head], 0), p.n_key, p.head_dim, keys.packed());
        pack<false>(matrix(x.v[key_head], 0).transposed(), p.head_dim, p.n_key, values.packed());
        packed_head = key_head;
      }
      forward_panel(p, head, x.q[head], first, keys.packed(), values.packed(), out[head], lse + head * p.n_query);
    }
  });
}

// ---- backward ----
//
// With P the weights, Z the dropout factors and delta = rowsum(dout * out):
//   dV = (P Z)^T dO,   dS = P (Z (dO V^T) - delta),   dQ = scale dS K,   dK = scale dS^T Q.
// A soft cap multiplies dS by 1 - tanh(s / cap)**2, its derivative.
// Scores are computed transposed, with keys as a panel's rows: S^T = K Q^T. Then lse and delta are vectors along a row,
// and the weights come out packed as A of dV and dK. dQ is computed transposed too: dQ^T = K^T dS^T, where dS^T is B. A
// row of B's tiles is a pair of depths, so pairs of rows of dS^T are interleaved ("woven") into one.

// A block of weights is 128 keys by 512 queries: 128 KiB of bf16 each for the weights, dS and its woven copy, which
// stay in the second-level cache of 2 MiB.
constexpr int64_t kKeysOfBlock = 128, kQueriesOfBlock = 512;

// A thread's buffers: a whole head's queries and gradients, and one block of keys by queries.
struct Backward {
  explicit Backward(const Problem& p)
      : queries(packed_bytes(p.n_query, p.head_dim)),
        douts(packed_bytes(p.n_query, p.head_dim)),
        queries_across(packed_bytes(p.head_dim, p.n_query)),
        douts_across(packed_bytes(p.head_dim, p.n_query)),
        dqueries(buffer_of_sums(panels(p.n_query) * panels(p.head_dim) * kSumsOfPanels)),
        lse(buffer_of_sums(panels(p.n_query) * kLanesOfPanel)),
        delta(buffer_of_sums(panels(p.n_query) * kLanesOfPanel)),
        keys(packed_bytes(kKeysOfBlock, p.head_dim)),
        values(packed_bytes(kKeysOfBlock, p.head_dim)),
        keys_across(packed_bytes(p.head_dim, kKeysOfBlock)),
        weights(packed_bytes(kKeysOfBlock, kQueriesOfBlock)),
        dscores(packed_bytes(kKeysOfBlock, kQueriesOfBlock)),
        dscores_woven(packed_bytes(kKeysOfBlock, kQueriesOfBlock)) {}

  Buffer queries, douts;                // (n_query, D): B of S^T and of dP^T
  Buffer queries_across, douts_across;  // (D, n_query): B of dK and of dV
  Buffer dqueries;                      // sums of dQ^T, by panels of queries and then of D
  Buffer lse, delta;                    // (n_query); padding has an infinite lse, so that its weights are zero
  Buffer keys, values, keys_across;     // A of S^T, of dP^T and of dQ^T
  Buffer weights, dscores;              // (keys, queries): A of dV and of dK
  Buffer dscores_woven;                 // (queries, keys): B of dQ^T
  alignas(64) float keep[kKeysOfBlock * kLanesOfPanel];  // dropout's factors of a panel of queries
};

// Where the gradients of a head of keys are added up, by panels of keys and then of D. If one head of queries reads it,
// a block of keys is complete before the next begins, and `dkeys` and `dvalues` hold a block. Otherwise they hold all
// keys.
struct KeySums {
  float *dkeys, *dvalues;
  bool all_keys;     // rather than a block
  bool first, last;  // of the heads that are added: sums begin at zero; sums are complete
};

// Writes the gradients of n keys from `key` on from their sums.
FASTGPT_AMX inline void write_key_gradients(
    const Problem& p, const float* dkeys, const float* dvalues, int64_t key, int64_t n, Rows<BFloat16> dk,
    Rows<BFloat16> dv) {
  const int64_t D = p.head_dim, steps = panels(D);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t d = 0; d < D; d += kTileLanes) {
      const int64_t at = (i / kLanesOfPanel * steps + d / kLanesOfPanel) * kSumsOfPanels +
                         row_of_sums(i % kLanesOfPanel) + d / kTileLanes % 2 * kSumsOfTile;
      store(dk[key + i] + d, load(dkeys + at) * p.scale, D - d);
      store(dv[key + i] + d, load(dvalues + at), D - d);
    }
}

// Turns the scores of 32 keys by 32 queries and the gradients of their weights, both transposed, into panels of weights
// and of gradients of the scores. `key` and `query` are the first of each; `masked` is set if some query does not see
// some key. lse, delta: 32 queries. keep: dropout's factors, 32 x 32, or null.
FASTGPT_AMX inline void weigh(
    const Problem& p, int64_t head, int64_t key, int64_t query, bool masked, const float* scores, const float* dweights,
    const float* lse, const float* delta, const float* keep, char* weights, char* dscores, char* dscores_woven) {
  static constexpr uint16_t kWeave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i weave = _mm512_loadu_si512(kWeave);
  // the positions of the queries among the keys
  const IntVec positions = lane_index() + static_cast<int32_t>(query + p.offset());
  const float factor = p.softcap > 0.0f ? p.scale * (1.0f / p.softcap) : 0.0f;
  for (int64_t i = 0; i < kLanesOfPanel; i += 2) {
    Vec w[2][2], ds[2][2];  // by row and by half
    for (int64_t row = 0; row < 2; ++row)
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t at = row_of_sums(i + row) + half * kSumsOfTile, column = half * kTileLanes;
        const Vec capped = p.softcap > 0.0f ? tanh(load(scores + at) * factor) : Vec{};
        Vec weight = exp_nonpositive(
            p.softcap > 0.0f ? p.softcap * capped - load(lse + column)
                             : load(scores + at) * p.scale - load(lse + column));
        if (masked) {
          const auto this_key = static_cast<int32_t>(key + i + row);
          if (this_key >= p.n_key)
            weight = Vec{};
          else if (p.causal)
            weight = positions + static_cast<int32_t>(column) >= this_key ? weight : Vec{};
          if (p.local() && this_key < p.n_key) {
            const auto end = static_cast<int32_t>(p.end_query(head, this_key) + p.offset());
            weight = positions + static_cast<int32_t>(column) < end ? weight : Vec{};
          }
        }
        const Vec z = keep ? load(keep + (i + row) * kLanesOfPanel + column) : broadcast(1.0f);
        w[row][half] = weight * z;
        ds[row][half] = weight * (z * load(dweights + at) - load(delta + column));
        if (p.softcap > 0.0f) ds[row][half] *= 1.0f - capped * capped;
      }
    for (int64_t row = 0; row < 2; ++row) {
      store_row(weights + row_of_tiles(i + row), w[row][0], w[row][1]);
      store_row(dscores + row_of_tiles(i + row), ds[row][0], ds[row][1]);
    }
    for (int64_t half = 0; half < 2; ++half) {
      const auto rows = (__m512i)_mm512_cvtne2ps_pbh((__m512)ds[1][half], (__m512)ds[0][half]);
      _mm512_store_si512(dscores_woven + half * kTileBytes + i / 2 * 64, _mm512_permutexvar_epi16(weave, rows));
    }
  }
}

// One block of keys, from `key` on, and all queries that see any of them: adds to its dk and dv, which are written with
// the last head, and to dQ^T.
FASTGPT_AMX inline void backward_block(
    const Problem& p, int64_t head, Rows<const BFloat16> k, Rows<const BFloat16> v, Rows<BFloat16> dk,
    Rows<BFloat16> dv, int64_t key, const KeySums& key_sums, Backward& own) {
  const int64_t D = p.head_dim, steps = panels(D), query_panels = panels(p.n_query);
  const int64_t n_keys = std::min(kKeysOfBlock, p.n_key - key), key_panels = panels(n_keys);
  alignas(64) float scores[kSumsOfPanels], dweights[kSumsOfPanels];
  pack<true>(matrix(k, key), n_keys, D, own.keys.packed());
  pack<true>(matrix(v, key), n_keys, D, own.values.packed());
  pack<true>(matrix(k, key).transposed(), D, n_keys, own.keys_across.packed());
  const int64_t place = key_sums.all_keys ? panels(key) * steps * kSumsOfPanels : 0;
  float *dkeys = key_sums.dkeys + place, *dvalues = key_sums.dvalues + place;
  if (key_sums.first) {
    std::fill_n(dkeys, key_panels * steps * kSumsOfPanels, 0.0f);
    std::fill_n(dvalues, key_panels * steps * kSumsOfPanels, 0.0f);
  }

  // From here on all counts are in panels, those of keys from `key` on.
  const int64_t queries_at_a_time = panels(kQueriesOfBlock);
  const auto first_query = [&](int64_t key_panel) {
    return p.first_query(key + key_panel * kLanesOfPanel) / kLanesOfPanel;
  };
  const int64_t end = p.local() ? std::min(query_panels, panels(p.end_query(head, key + n_keys - 1))) : query_panels;
  for (int64_t start = first_query(0); start < end; start += queries_at_a_time) {
    const int64_t stop = std::min(start + queries_at_a_time, end);
    for (int64_t query = start; query < stop; ++query) {
      const int64_t first_row = query * kLanesOfPanel, last_row = first_row + kLanesOfPanel - 1;
      const int64_t seen = std::min(key_panels, panels(p.visible(last_row) - key));
      if (p.dropout)
        for (int64_t i = 0; i < kLanesOfPanel; ++i) {
          alignas(64) float row[kKeysOfBlock];
          p.dropout.factors(head, query * kLanesOfPanel + i, key, seen * kLanesOfPanel, row);
          for (int64_t j = 0; j < seen * kLanesOfPanel; ++j) own.keep[j * kLanesOfPanel + i] = row[j];
        }
      for (int64_t j = 0; j < seen; ++j) {
        const auto multiply = [&](const Buffer& a, const Buffer& b, float* sums) FASTGPT_AMX {
          multiply_panels<BFloat16>(
              a.packed() + j * steps * kPairBytes, b.packed() + query * steps * kPairBytes, steps, false, sums);
        };
        multiply(own.keys, own.queries, scores);
        multiply(own.values, own.douts, dweights);
        const bool masked = p.local() || key + (j + 1) * kLanesOfPanel > p.visible(first_row);
        const int64_t step = (j * queries_at_a_time + query - start) * kPairBytes;
        weigh(
            p, head, key + j * kLanesOfPanel, query * kLanesOfPanel, masked, scores, dweights,
            own.lse.sums() + query * kLanesOfPanel, own.delta.sums() + query * kLanesOfPanel,
            p.dropout ? own.keep + j * kLanesOfPanel * kLanesOfPanel : nullptr, own.weights.packed() + step,
            own.dscores.packed() + step,
            own.dscores_woven.packed() + ((query - start) * panels(kKeysOfBlock) + j) * kPairBytes);
      }
      for (int64_t d = 0; d < steps; ++d)
        multiply_panels<BFloat16>(
            own.keys_across.packed() + d * key_panels * kPairBytes,
            own.dscores_woven.packed() + (query - start) * panels(kKeysOfBlock) * kPairBytes, seen, true,
            own.dqueries.sums() + (query * steps + d) * kSumsOfPanels);
    }
    for (int64_t j = 0; j < key_panels; ++j) {
      const int64_t query = std::max(start, first_query(j));
      if (query >= stop) break;
      for (int64_t d = 0; d < steps; ++d) {
        const auto add = [&](const Buffer& a, const Buffer& b, float* sums) FASTGPT_AMX {
          multiply_panels<BFloat16>(
              a.packed() + (j * queries_at_a_time + query - start) * kPairBytes,
              b.packed() + (d * query_panels + query) * kPairBytes, stop - query, true,
              sums + (j * steps + d) * kSumsOfPanels);
        };
        add(own.weights, own.douts_across, dvalues);
        add(own.dscores, own.queries_across, dkeys);
      }
    }
  }
  if (key_sums.last) write_key_gradients(p, dkeys, dvalues, key, n_keys, dk, dv);
}

// Backward of one head. x: q, k and v. gradient: dq, dk and dv. lse: (n_query).
FASTGPT_AMX inline void backward_head(
    const Problem& p, int64_t head, Rows<const BFloat16> dout, const Rows<const BFloat16> (&x)[3],
    Rows<const BFloat16> out, const float* lse, const Rows<BFloat16> (&gradient)[3], const KeySums& key_sums,
    Backward& own) {
  const int64_t D = p.head_dim, steps = panels(D), query_panels = panels(p.n_query);
  pack<false>(matrix(x[0], 0), p.n_query, D, own.queries.packed());
  pack<false>(matrix(dout, 0), p.n_query, D, own.douts.packed());
  pack<false>(matrix(x[0], 0).transposed(), D, p.n_query, own.queries_across.packed());
  pack<false>(matrix(dout, 0).transposed(), D, p.n_query, own.douts_across.packed());
  std::fill_n(own.dqueries.sums(), query_panels * steps * kSumsOfPanels, 0.0f);
  for (int64_t i = 0; i < query_panels * kLanesOfPanel; ++i) {
    Vec total{};
    if (i < p.n_query)
      for_each_vector(
          D, [&](int64_t d, int64_t lanes) { total += load(dout[i] + d, lanes) * load(out[i] + d, lanes); });
    own.delta.sums()[i] = sum(total);
    own.lse.sums()[i] = i < p.n_query ? lse[i] : INFINITY;
  }
  for (int64_t key = 0; key < p.n_key; key += kKeysOfBlock)
    backward_block(p, head, x[1], x[2], gradient[1], gradient[2], key, key_sums, own);

  for (int64_t query = 0; query < p.n_query; query += kTileLanes)
    for (int64_t d = 0; d < D; d += kTileLanes) {
      const float* tile = own.dqueries.sums() + (query / kLanesOfPanel * steps + d / kLanesOfPanel) * kSumsOfPanels +
                          (d / kTileLanes % 2 * 2 + query / kTileLanes % 2) * kSumsOfTile;
      __m512i rows[kTileLanes];
      for (int64_t i = 0; i < kTileLanes; ++i) rows[i] = _mm512_load_si512(tile + i * kTileLanes);
      transpose(rows);
      for (int64_t i = 0; i < std::min(kTileLanes, p.n_query - query); ++i)
        store(gradient[0][query + i] + d, (Vec)rows[i] * p.scale, D - d);
    }
}

// Tasks are whole heads, or shares of the heads that read one head of keys: one thread sums a head's dQ over all keys,
// and a share's dK and dV over its heads, in a fixed order. lse: (n_heads, n_query).
FASTGPT_AMX inline void backward(
    const Problem& p, Heads<const BFloat16> dout, const Inputs<const BFloat16>& x, Heads<const BFloat16> out,
    const float* lse, const Inputs<BFloat16>& gradient) {
  const int64_t shares = shares_of_group(p);
  const int64_t size = panels(p.group > 1 ? p.n_key : kKeysOfBlock) * panels(p.head_dim) * kSumsOfPanels;
  const Buffer of_shares = buffer_of_sums(shares > 1 ? p.n_key_heads() * shares * 2 * size : 0);
  torch::stable::parallel_for(0, p.n_key_heads() * shares, 1, [&](int64_t begin, int64_t end) FASTGPT_AMX {
    const Tiles tiles;
    const std::unique_ptr<Backward> own(new Backward(p));
    const Buffer own_sums = buffer_of_sums(shares > 1 ? 0 : 2 * size);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t key_head = task / shares, share = task % shares;
      float* sums = shares > 1 ? of_shares.sums() + task * 2 * size : own_sums.sums();
      const int64_t first = share * p.group / shares, last = (share + 1) * p.group / shares - 1;
      for (int64_t i = first; i <= last; ++i) {
        const int64_t head = key_head * p.group + i;
        backward_head(
            p, head, dout[head], {x.q[head], x.k[key_head], x.v[key_head]}, out[head], lse + head * p.n_query,
            {gradient.q[head], gradient.k[key_head], gradient.v[key_head]},
            {sums, sums + size, p.group > 1, i == first, shares == 1 && i == last}, *own);
      }
    }
  });
  if (shares == 1) return;
  const int64_t key_panels = panels(p.n_key), size_of_panel = panels(p.head_dim) * kSumsOfPanels;
  torch::stable::parallel_for(0, p.n_key_heads() * key_panels, 1, [&](int64_t begin, int64_t end) FASTGPT_AMX {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t key_head = task / key_panels, panel = task % key_panels, key = panel * kLanesOfPanel;
      float* dkeys = of_shares.sums() + key_head * shares * 2 * size + panel * size_of_panel;
      for (float* sums : {dkeys, dkeys + size})
        for (int64_t share = 1; share < shares; ++share)
          for (int64_t i = 0; i < size_of_panel; i += kLanes)
            store(sums + i, load(sums + i) + load(sums + share * 2 * size + i));
      write_key_gradients(
          p, dkeys, dkeys + size, key, std::min(kLanesOfPanel, p.n_key - key), gradient.k[key_head],
          gradient.v[key_head]);
    }
  });
}

}  // namespace amx
}  // namespace fastgpt
#endif
