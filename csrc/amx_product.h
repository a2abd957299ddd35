// The matrix product on AMX: tiles of 16 rows by 64 bytes, whose products of bf16 are summed in fp32.
//
// Operands of fp32 are split into three numbers of bf16 each, a = a0 + a1 + a2, which is exact (8 bits of each, 24 in
// all). Six of the nine products are added up; the other three are below 2**-26 of the product, less than fp32's own
// rounding. Henry, Tang, Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
// computations", 2019. On a core with AMX six such products take a third of the time of one in AVX-512.
//
// Operands are packed first: into panels of 32 rows of A or columns of B ("lanes"), each panel a sequence of steps of
// 32 along the depth, each step two tiles for each part of the split. What lies beyond an operand's edge is zero in
// the packed copy and is never read.
#pragma once

#include "isa.h"
#include "product.h"

#if defined(FASTGPT_AMX)

namespace fastgpt {
namespace amx {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// ---- packing ----

constexpr int64_t kTileLanes = 16, kLanesOfPanel = 32;
constexpr int64_t kStep = 32;  // of depth: 16 pairs of bf16
constexpr int64_t kTileBytes = 1024, kPairBytes = 2 * kTileBytes;

template <class T>
constexpr int kParts = std::is_same_v<T, BFloat16> ? 1 : 3;

// A block of 16 lanes by 32 of depth, as 16 vectors of 16 words. A word is a pair of bf16 along the depth. Which two
// make a pair is the same for A and B and matters to nothing else: 2j and 2j + 1 of bf16 operands, as they lie in
// memory, and j and j + 16 of fp32 ones, which need no shuffle.
template <class T>
using Block = __m512i[kParts<T>][16];

FASTGPT_AMX FASTGPT_INLINE __mmask16 first_words(int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1);
}

// Rows become columns: of 4 x 4 words in each quarter, then of the quarters.
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

// Splits fp32 into three bf16, each in the upper half of a word. A number beyond 2**64 makes `large` true: where a
// product overflows, those of the parts may be infinities of either sign, whose sum is no number.
FASTGPT_AMX FASTGPT_INLINE void split(__m512 x, __m512i (&parts)[3], bool& large) {
  const __m512i upper = _mm512_set1_epi32(0xffff0000), half = _mm512_set1_epi32(0x8000);
  const auto nearest = [&](__m512 v) {
    return _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(v), half), upper);
  };
  const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
  const __mmask16 beyond = _mm512_cmpge_epi32_mask(magnitude, _mm512_set1_epi32(0x5f800000));
  __mmask16 finite = 0xffff;
  parts[0] = nearest(x);
  if (__builtin_expect(beyond != 0, 0)) {
    const __mmask16 nan = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
    finite = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
    parts[0] = _mm512_mask_and_epi32(parts[0], beyond, _mm512_castps_si512(x), upper);  // rounded, it may be infinite
    parts[0] = _mm512_mask_set1_epi32(parts[0], nan, 0x7fc00000);
    large |= (beyond & ~nan) != 0;
  }
  const __m512 rest = _mm512_maskz_sub_ps(finite, x, _mm512_castsi512_ps(parts[0]));
  parts[1] = nearest(rest);
  parts[2] = nearest(_mm512_sub_ps(rest, _mm512_castsi512_ps(parts[1])));
}

FASTGPT_AMX FASTGPT_INLINE __m512i pair(__m512i lower, __m512i upper) {  // of the upper halves of words
  return _mm512_or_si512(_mm512_srli_epi32(lower, 16), upper);
}

// Lanes whose depth is contiguous: a vector holds a lane.
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

// Lanes that lie side by side: a vector holds a pair of depths of all lanes.
FASTGPT_AMX FASTGPT_INLINE void read_depths(
    const BFloat16* from, int64_t stride, int64_t lanes, int64_t depth, Block<BFloat16>& block, bool&) {
  const __mmask16 there = first_words(lanes);
  const auto words = [&](int64_t k) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(k < depth ? there : 0, from + k * stride));
  };
  for (int64_t j = 0; j < 16; ++j)
    block[0][j] = _mm512_or_si512(words(2 * j), _mm512_slli_epi32(words(2 * j + 1), 16));
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

// Packs `lanes` by `depth` of `from`, whose rows are the lanes, in the order in which they lie in memory. A's tiles have
// a row a lane, B's a row a pair of depths. Returns whether a large number was split.
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

// Adds up the lanes of packed panels of A.
template <class T>
FASTGPT_AMX void add_row_sums(const char* packed, int64_t lanes, int64_t depth, float* sums) {
  const __m512bh one = (__m512bh)_mm512_set1_epi16(0x3f80);
  const int64_t tiles = (depth + kStep - 1) / kStep * kParts<T>;
  for (int64_t first = 0; first < lanes; first += kLanesOfPanel, packed += tiles * kPairBytes)
    for (int64_t i = 0; i < std::min(kLanesOfPanel, lanes - first); ++i) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t t = 0; t < tiles; ++t)
        sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_load_si512(packed + t * kPairBytes + i * 64), one);
      sums[first + i] += _mm512_reduce_add_ps(sum);
    }
}

// ---- multiplying ----

// 32 x 32 sums: four tiles of 16 x 16 that follow each other in memory, two rows of two.
constexpr int64_t kSumsOfTile = kTileLanes * kTileLanes, kSumsOfPanels = 4 * kSumsOfTile;

// Tiles 0 to 3 += a pair of A's tiles, in 4 and 5, times a pair of B's, in 6 and 7. B's pass through while A's are used
// over and over: their loads leave the first-level cache to A.
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

// A panel of A times a panel of B over so many steps; starts from zero or from what `sums` holds.
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
    } else {  // parts whose numbers add up to 2 at most, in an order in which each part of B is loaded once
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

// The same from the operands themselves, for those with a large number: `rows` by `columns` over `depth`.
template <class T>
void multiply_plainly(
    const Matrix<T>& a, const Matrix<T>& b, int64_t rows, int64_t columns, int64_t depth, float* sums) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      float sum = 0;
      for (int64_t k = 0; k < depth; ++k) sum += static_cast<float>(a(i, k)) * static_cast<float>(b(k, j));
      sums[(i / 16 * 2 + j / 16) * kSumsOfTile + i % 16 * 16 + j % 16] = sum;
    }
}

// Where sums of 32 x 32 go, and what is added to them: what is there, the sums of earlier stretches, the bias.
template <class Out>
struct Target {
  Out* to;
  int64_t ld;
  bool accumulate;
  const float* earlier;  // rows as far apart as those of `to`; or null
  const float* bias;     // or null

  Target at(int64_t i, int64_t j) const {
    return {to + i * ld + j, ld, accumulate, earlier ? earlier + i * ld + j : nullptr, bias ? bias + j : nullptr};
  }

  // Asks for the memory early, so that it is there when the sums are.
  FASTGPT_AMX FASTGPT_INLINE void fetch(int64_t rows) const {
    for (int64_t i = 0; i < rows; ++i)
      for (size_t j = 0; j < kLanesOfPanel; j += 64 / sizeof(Out)) __builtin_prefetch(to + i * ld + j, 1);
  }

  FASTGPT_AMX FASTGPT_INLINE void write(const float* sums, int64_t rows, int64_t columns) const {
    const __mmask16 left = first_words(columns), right = first_words(columns - 16);
    const __m512 left_bias = bias ? _mm512_maskz_loadu_ps(left, bias) : _mm512_setzero_ps();
    const __m512 right_bias = bias ? _mm512_maskz_loadu_ps(right, bias + 16) : _mm512_setzero_ps();
    for (int64_t i = 0; i < rows; ++i) {
      const float* at = sums + i / 16 * 2 * kSumsOfTile + i % 16 * 16;
      __m512 a = _mm512_add_ps(_mm512_load_ps(at), left_bias);
      __m512 b = _mm512_add_ps(_mm512_load_ps(at + kSumsOfTile), right_bias);
      if (earlier) {
        a = _mm512_add_ps(a, _mm512_maskz_loadu_ps(left, earlier + i * ld));
        b = _mm512_add_ps(b, _mm512_maskz_loadu_ps(right, earlier + i * ld + 16));
      }
      Out* row = to + i * ld;
      if constexpr (std::is_same_v<Out, float>) {
        if (accumulate) {
          a = _mm512_add_ps(a, _mm512_maskz_loadu_ps(left, row));
          b = _mm512_add_ps(b, _mm512_maskz_loadu_ps(right, row + 16));
        }
        _mm512_mask_storeu_ps(row, left, a);
        _mm512_mask_storeu_ps(row + 16, right, b);
      } else {
        if (accumulate) {
          a = _mm512_add_ps(a, widened(_mm256_maskz_loadu_epi16(left, row)));
          b = _mm512_add_ps(b, widened(_mm256_maskz_loadu_epi16(right, row + 16)));
        }
        _mm512_mask_storeu_epi16(row, _mm512_kunpackw(right, left), (__m512i)_mm512_cvtne2ps_pbh(b, a));
      }
    }
  }

 private:
  FASTGPT_AMX FASTGPT_INLINE static __m512 widened(__m256i bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
  }
};

// A block of B is packed and stays in the second-level cache: 768 KiB, as reads were measured to slow down beyond 1 MiB
// of 2 (Xeon with AMX, in a virtual machine). Panels of A are packed one after the other, and a stretch of one stays in the first-level cache (32 KiB of
// 48) while B passes through. So A and C are gone through row by row, as prefetching wants it.
template <class T>
constexpr int64_t kStretch = kParts<T> == 1 ? 16 : 4;  // steps
template <class T>
constexpr int64_t kDeepest = kStep * (kParts<T> == 1 ? 32 : 8);
constexpr int64_t kMostPairs = 384, kMostPanels = 24;  // of B, in pairs of tiles and in panels

// Where lanes of A lie together its panels are narrower than a row in memory, and some are packed at a time.
constexpr int64_t kGroup = 4;

struct Scratch {
  alignas(64) char a[kGroup * kDeepest<BFloat16> / kStep * kPairBytes];
  alignas(64) char b[kMostPairs * kPairBytes];
  alignas(64) float sums[kMostPanels * kSumsOfPanels];
  static_assert(kDeepest<float> * kParts<float> <= kDeepest<BFloat16>);
};

// (M, depth) times (depth, N), where the latter can be packed as a whole.
template <class T, class Out>
FASTGPT_AMX void multiply_block(
    const Matrix<T>& a, const Matrix<T>& b, int64_t M, int64_t N, int64_t depth, const Target<Out>& target,
    float* row_sums, Scratch& scratch) {
  const int64_t steps = (depth + kStep - 1) / kStep, stretch = even_stretch(steps, kStretch<T>, 1);
  const int64_t step_bytes = kParts<T> * kPairBytes, panel_bytes = steps * step_bytes;
  const int64_t group = (a.column == 1 ? 1 : kGroup) * kLanesOfPanel;
  const bool large_b = pack<false>(b.transposed(), N, depth, scratch.b);
  for (int64_t first = 0; first < M; first += group) {
    const int64_t in_group = std::min(group, M - first);
    const bool large = pack<true>(a.at(first, 0), in_group, depth, scratch.a) || large_b;
    if (row_sums) add_row_sums<T>(scratch.a, in_group, depth, row_sums + first);
    for (int64_t i = 0; i < in_group; i += kLanesOfPanel)
      for (int64_t step = 0; step == 0 || step < steps; step += stretch)  // once without depth too: C is then the bias
        for (int64_t j = 0; j < N; j += kLanesOfPanel) {
          const int64_t rows = std::min(kLanesOfPanel, in_group - i), columns = std::min(kLanesOfPanel, N - j);
          const Target<Out> here = target.at(first + i, j);
          float* sums = scratch.sums + j / kLanesOfPanel * kSumsOfPanels;
          const bool last = step + stretch >= steps;
          if (last) here.fetch(rows);
          if (!large)
            multiply_panels<T>(
                scratch.a + i / kLanesOfPanel * panel_bytes + step * step_bytes,
                scratch.b + j / kLanesOfPanel * panel_bytes + step * step_bytes, std::min(stretch, steps - step),
                step > 0, sums);
          else if (last)
            multiply_plainly(a.at(first + i, 0), b.at(0, j), rows, columns, depth, sums);
          if (last) here.write(sums, rows, columns);
        }
  }
}

// One thread's share.
template <class T, class Out>
FASTGPT_AMX void multiply(const Product<T, Out>& p) {
  thread_local const std::unique_ptr<Scratch> scratch(new Scratch);
  const TileConfig config;
  _tile_loadconfig(&config);
  const int64_t K = std::max<int64_t>(1, p.K);  // without depth there is a stretch too: C is then the bias, or zero
  const int64_t deep = even_stretch(K, kDeepest<T>, kStep);
  const int64_t most = std::min(kMostPanels, kMostPairs / (deep / kStep * kParts<T>)) * kLanesOfPanel;
  const int64_t wide = even_stretch(p.N, most, kLanesOfPanel);
  for (int64_t k = 0; k < K; k += deep)
    for (int64_t column = 0; column < p.N; column += wide) {
      const auto into = [&](auto* to, bool accumulate, const float* earlier) {
        const Target<std::remove_pointer_t<decltype(to)>> target{
            to, p.ldc, accumulate, earlier, k == 0 ? p.bias : nullptr};
        multiply_block(
            p.a.at(0, k), p.b.at(k, column), p.M, std::min(wide, p.N - column), std::min(deep, p.K - k),
            target.at(0, column), column == 0 ? p.row_sums : nullptr, *scratch);
      };
      if constexpr (std::is_same_v<Out, float>)
        into(p.c, p.accumulate || k > 0, nullptr);
      else if (k + deep >= K)
        into(p.c, p.accumulate, k > 0 ? p.sums : nullptr);
      else
        into(p.sums, k > 0, nullptr);
    }
  _tile_release();
}

}  // namespace amx
}  // namespace fastgpt
#endif
