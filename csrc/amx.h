// AMX has tiles of 16 rows by 64 bytes, and sums products of bf16 tiles in fp32. This file has the layout of operands
// in tiles, and the product of two packed operands.
//
// Operands of fp32 are split into three numbers of bf16 each, a = a0 + a1 + a2, which is exact (8 bits of each, 24 in
// all). Six of the nine products are added; the other three are below 2**-26 of the product, less than fp32's own
// rounding. Henry, Tang, Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
// computations", 2019. On a core with AMX six such products take a third of the time of one in AVX-512.
//
// Operands are packed first. A lane is a row of A or a column of B, and its elements lie along the depth (K). A panel
// has 32 lanes. It is a sequence of steps, each 32 deep, and a step has two tiles of 16 lanes for each part of the
// split. The packed copy is zero beyond an operand's edge, and memory beyond the edge is never read.
#pragma once

#include "isa.h"
#include "product.h"

#if defined(FASTGPT_AMX)

namespace fastgpt {
namespace amx {

// The operand of ldtilecfg, as Intel's manual lays it out: all eight tiles have 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Configures the thread's tiles, and releases them when it goes out of scope.
class Tiles {
 public:
  FASTGPT_AMX Tiles() {
    const TileConfig config;
    _tile_loadconfig(&config);
  }
  FASTGPT_AMX ~Tiles() { _tile_release(); }
};

// ---- packing ----

constexpr int64_t kTileLanes = 16, kLanesOfPanel = 32;
constexpr int64_t kStep = 32;  // of depth: 16 pairs of bf16
constexpr int64_t kTileBytes = 1024, kPairBytes = 2 * kTileBytes;

// How many bf16 numbers an element is split into.
template <class T>
constexpr int kParts = std::is_same_v<T, BFloat16> ? 1 : 3;

// A block of 16 lanes by 32 of depth, as 16 vectors of 16 words. A word is a pair of bf16 along the depth. Any pairing
// works if it is the same for A and B. bf16 operands pair 2j and 2j + 1, as they lie in memory; fp32 operands pair j
// and j + 16, which needs no shuffle.
template <class T>
using Block = __m512i[kParts<T>][16];

// A mask of the first n of 16 words.
FASTGPT_AMX FASTGPT_INLINE __mmask16 first_words(int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1);
}

// Transposes 16 x 16 words: first 4 x 4 words in each quarter of a vector, then the quarters.
FASTGPT_AMX FASTGPT_INLINE void transpose(__m512i (&v)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int i = 0; i < 8; i += 4)  // rows 4 to 7 beside 0 to 3, 12 to 15 beside 8 to 11
    for (int j = 0; j < 4; ++j) {
      t[2 * i + j] = _mm512_shuffle_i32x4(v[2 * i + j], v[2 * i + 4 + j], 0x88);
      t[2 * i + 4 + j] = _mm512_shuffle_i32x4(v[2 * i + j], v[2 * i + 4 + j], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    v[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    v[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
  }
}

// Splits fp32 into three bf16, each in the upper half of a word. A magnitude of 2**64 or more, infinity included, sets
// `large`. If the product of two such numbers overflows, the products of their parts can be infinities of both signs,
// whose sum is NaN. Such blocks are multiplied without the split (multiply_plainly).
FASTGPT_AMX FASTGPT_INLINE void split(__m512 x, __m512i (&parts)[3], bool& large) {
  const __m512i upper = _mm512_set1_epi32(0xffff0000), half = _mm512_set1_epi32(0x8000);
  const auto nearest = [&](__m512 v) {
    return _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(v), half), upper);
  };
  const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
  const __mmask16 beyond = _mm512_cmpge_epi32_mask(magnitude, _mm512_set1_epi32(0x5f800000));  // 2**64
  __mmask16 finite = 0xffff;
  parts[0] = nearest(x);
  if (__builtin_expect(beyond != 0, 0)) {
    const __mmask16 nan = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
    finite = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
    // truncated: rounding could give infinity
    parts[0] = _mm512_mask_and_epi32(parts[0], beyond, _mm512_castps_si512(x), upper);
    parts[0] = _mm512_mask_set1_epi32(parts[0], nan, 0x7fc00000);
    large |= (beyond & ~nan) != 0;
  }
  const __m512 rest = _mm512_maskz_sub_ps(finite, x, _mm512_castsi512_ps(parts[0]));
  parts[1] = nearest(rest);
  parts[2] = nearest(_mm512_sub_ps(rest, _mm512_castsi512_ps(parts[1])));
}

// Joins the upper halves of two vectors' words to one word each.
FASTGPT_AMX FASTGPT_INLINE __m512i pair(__m512i lower, __m512i upper) {
  return _mm512_or_si512(_mm512_srli_epi32(lower, 16), upper);
}

// Reads a block whose lanes are contiguous along the depth and `stride` apart: a vector holds one lane.
FASTGPT_AMX FASTGPT_INLINE void read_lanes(
    const BFloat16* from, int64_t stride, int64_t lanes, int64_t depth, Block<BFloat16>& block, bool&) {
  const __mmask32 there = static_cast<__mmask32>(depth >= kStep ? ~0u : (1u << depth) - 1);
  for (int64_t i = 0; i < kTileLanes; ++i)
    block[0][i] = _mm512_maskz_loadu_epi16(i < lanes ? there : 0, from + i * stride);
}
FASTGPT_AMX FASTGPT_INLINE void read_lanes(
    const float* from, int64_t stride, int64_t lanes, int64_t depth, Block<float>& block, bool& large) {
  for (int64_t i = 0; i < kTileLanes; ++i) {
    __m512i lower[3], upper[3];
    split(_mm512_maskz_loadu_ps(i < lanes ? first_words(depth) : 0, from + i * stride), lower, large);
    split(_mm512_maskz_loadu_ps(i < lanes ? first_words(depth - 16) : 0, from + i * stride + 16), upper, large);
    for (int part = 0; part < 3; ++part) block[part][i] = pair(lower[part], upper[part]);
  }
}

// Reads a block whose lanes lie side by side, with depths `stride` apart: a vector holds a pair of depths of all lanes.
FASTGPT_AMX FASTGPT_INLINE void read_depths(
    const BFloat16* from, int64_t stride, int64_t lanes, int64_t depth, Block<BFloat16>& block, bool&) {
  const __mmask16 there = first_words(lanes);
  const auto words = [&](int64_t k) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(k < depth ? there : 0, from + k * stride));
  };
  for (int64_t j = 0; j < 16; ++j) block[0][j] = _mm512_or_si512(words(2 * j), _mm512_slli_epi32(words(2 * j + 1), 16));
}
FASTGPT_AMX FASTGPT_INLINE void read_depths(
    const float* from, int64_t stride, int64_t lanes, int64_t depth, Block<float>& block, bool& large) {
  const __mmask16 there = first_words(lanes);
  for (int64_t j = 0; j < 16; ++j) {
    __m512i lower[3], upper[3];
    split(_mm512_maskz_loadu_ps(j < depth ? there : 0, from + j * stride), lower, large);
    split(_mm512_maskz_loadu_ps(j + 16 < depth ? there : 0, from + (j + 16) * stride), upper, large);
    for (int part = 0; part < 3; ++part) block[part][j] = pair(lower[part], upper[part]);
  }
}

// Packs `from`, (lanes, depth), in the order in which it lies in memory. A row of A's tiles is a lane (kRowsAreLanes),
// a row of B's tiles is a pair of depths. Returns whether a large number was split.
template <bool kRowsAreLanes, class T>
FASTGPT_AMX bool pack(const Matrix<T>& from, int64_t lanes, int64_t depth, char* out) {
  const bool lanes_lie_together = from.row == 1 && from.column != 1;
  const int64_t steps = (depth + kStep - 1) / kStep;
  bool large = false;
  const auto pack_block = [&](int64_t lane, int64_t step) FASTGPT_AMX {
    const int64_t n = std::min(kTileLanes, lanes - lane), deep = std::min(kStep, depth - step * kStep);
    const Matrix<T> source = from.at(lane, step * kStep);
    Block<T> block;
    bool flip = kRowsAreLanes;
    if (n <= 0) {
      for (auto& part : block)
        for (auto& word : part) word = _mm512_setzero_si512();
    } else if (from.column == 1) {
      for (int64_t i = 0; i < n; ++i)
        __builtin_prefetch(source.base + (i + kTileLanes) * from.row);  // of the next block
      read_lanes(source.base, from.row, n, deep, block, large);
      flip = !kRowsAreLanes;
    } else if (from.row == 1) {
      read_depths(source.base, from.column, n, deep, block, large);
    } else {
      T copy[kTileLanes][kStep];
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < deep; ++j) copy[i][j] = source(i, j);
      read_lanes(copy[0], kStep, n, deep, block, large);
      flip = !kRowsAreLanes;
    }
    char* tile = out + (lane / kLanesOfPanel * steps + step) * kParts<T> * kPairBytes +
                 lane % kLanesOfPanel / kTileLanes * kTileBytes;
    for (int part = 0; part < kParts<T>; ++part, tile += kPairBytes) {
      if (flip) transpose(block[part]);
      for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + i * 64, block[part][i]);
    }
  };
  const int64_t padded = round_up(lanes, kLanesOfPanel);
  if (lanes_lie_together) {
    for (int64_t step = 0; step < steps; ++step)
      for (int64_t lane = 0; lane < padded; lane += kTileLanes) pack_block(lane, step);
  } else {
    for (int64_t panel = 0; panel < padded; panel += kLanesOfPanel)
      for (int64_t step = 0; step < steps; ++step)
        for (int64_t half = 0; half < kLanesOfPanel; half += kTileLanes) pack_block(panel + half, step);
  }
  return large;
}

// ---- multiplying ----

// 32 x 32 sums in fp32: four tiles of 16 x 16 that follow each other in memory, two rows of two.
constexpr int64_t kSumsOfTile = kTileLanes * kTileLanes, kSumsOfPanels = 4 * kSumsOfTile;

// Multiplies a pair of A's tiles (4 and 5) by a pair of B's tiles (6 and 7), and adds the products to tiles 0 to 3. A's
// tiles are used again while B's pass through, so B's are loaded with a hint that leaves the first-level cache to A.
template <bool kLoadA, bool kLoadB>
FASTGPT_AMX FASTGPT_INLINE void multiply_pair(const char* a, const char* b) {
  if constexpr (kLoadA) _tile_loadd(4, a, 64);
  if constexpr (kLoadB) _tile_stream_loadd(6, b, 64);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kLoadB) _tile_stream_loadd(7, b + kTileBytes, 64);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (kLoadA) _tile_loadd(5, a + kTileBytes, 64);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// Multiplies a panel of A by a panel of B over `steps` steps. Writes the product to `sums`, 32 x 32 as four tiles, or
// adds it if `accumulate` is set.
template <class T>
FASTGPT_AMX void multiply_panels(const char* a, const char* b, int64_t steps, bool accumulate, float* sums) {
  if (accumulate) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + kSumsOfTile, 64);
    _tile_loadd(2, sums + 2 * kSumsOfTile, 64);
    _tile_loadd(3, sums + 3 * kSumsOfTile, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < steps; ++k, a += kParts<T> * kPairBytes, b += kParts<T> * kPairBytes) {
    if constexpr (kParts<T> == 1) {
      multiply_pair<true, true>(a, b);
    } else {  // the products ai bj with i + j <= 2, the largest last, in an order that loads few tiles
      const char *a1 = a + kPairBytes, *a2 = a1 + kPairBytes, *b1 = b + kPairBytes, *b2 = b1 + kPairBytes;
      multiply_pair<true, true>(a, b2);
      multiply_pair<false, true>(a, b1);
      multiply_pair<true, false>(a1, b1);
      multiply_pair<false, true>(a1, b);
      multiply_pair<true, false>(a2, b);
      multiply_pair<true, false>(a, b);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kSumsOfTile, 64);
  _tile_stored(2, sums + 2 * kSumsOfTile, 64);
  _tile_stored(3, sums + 3 * kSumsOfTile, 64);
}

}  // namespace amx
}  // namespace fastgpt
#endif
