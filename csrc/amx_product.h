// The matrix product on AMX, for fp32 and bf16: a block of B stays in the second-level cache while panels of A pass.
#pragma once

#include "amx.h"

#if defined(FASTGPT_AMX)

namespace fastgpt {
namespace amx {

// Adds the sum of each packed lane of A to `sums`, (lanes), as a product of its pairs of bf16 with pairs of ones.
template <class T>
FASTGPT_AMX void add_row_sums(const char* packed, int64_t lanes, int64_t depth, float* sums) {
  const __m512bh one = (__m512bh)_mm512_set1_epi16(0x3f80);  // 1.0 in bf16
  const int64_t tiles = (depth + kStep - 1) / kStep * kParts<T>;
  for (int64_t first = 0; first < lanes; first += kLanesOfPanel, packed += tiles * kPairBytes)
    for (int64_t i = 0; i < std::min(kLanesOfPanel, lanes - first); ++i) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t t = 0; t < tiles; ++t)
        sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_load_si512(packed + t * kPairBytes + i * 64), one);
      sums[first + i] += _mm512_reduce_add_ps(sum);
    }
}

// Computes 32 x 32 sums from the unpacked operands, a (rows, depth) and b (depth, columns), if one has a large number.
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

// Where 32 x 32 sums go in C, and what is added to them: what C holds, the sums of earlier stretches of depth, the
// bias.
template <class Out>
struct Target {
  Out* to;
  int64_t ld;
  bool accumulate;
  const float* earlier;  // rows `ld` apart like those of `to`; or null
  const float* bias;     // or null

  Target at(int64_t i, int64_t j) const {
    return {to + i * ld + j, ld, accumulate, earlier ? earlier + i * ld + j : nullptr, bias ? bias + j : nullptr};
  }

  // Prefetches C, so that it is in the cache when the sums are ready.
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

// A packed block of B stays in the second-level cache: 384 pairs of tiles, 768 KiB. Reads of more than 1 MiB of this
// cache's 2 MiB were measured to be slower (Xeon with AMX, in a virtual machine). Panels of A are packed one after the
// other. A stretch of a panel, 32 KiB, stays in the first-level cache of 48 KiB while B passes through. So A and C are
// walked row by row, as prefetching requires. Writing C past the caches made the product alone a fifth faster but a
// training step slower, because the next reader of C then had to fetch it from memory.
template <class T>
constexpr int64_t kStretch = kParts<T> == 1 ? 16 : 4;  // steps of a panel of A that stay in the first-level cache
template <class T>
constexpr int64_t kDeepest = kStep * (kParts<T> == 1 ? 32 : 8);  // depth of a block of B
constexpr int64_t kMostPairs = 384, kMostPanels = 24;            // of a block of B, in pairs of tiles and in panels

// How many panels of A are packed at a time if A's lanes lie side by side in memory. There a panel is only 32 elements
// of each row; several panels use whole cache lines.
constexpr int64_t kGroup = 4;

// A thread's packed operands, and the sums of a panel of A times all panels of a block of B.
struct Scratch {
  alignas(64) char a[kGroup * kDeepest<BFloat16> / kStep * kPairBytes];
  alignas(64) char b[kMostPairs * kPairBytes];
  alignas(64) float sums[kMostPanels * kSumsOfPanels];
  static_assert(kDeepest<float> * kParts<float> <= kDeepest<BFloat16>);
};

// The product of a, (M, depth), and b, (depth, N). b must fit in a block, because it is packed whole. row_sums: (M) or
// null, added to.
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
      for (int64_t step = 0; step == 0 || step < steps; step += stretch)  // once if depth is 0: C is the bias
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

// One thread's share of the product: blocks of depth, and in each blocks of B's columns.
template <class T, class Out>
FASTGPT_AMX void multiply(const Product<T, Out>& p) {
  thread_local const std::unique_ptr<Scratch> scratch(new Scratch);
  const Tiles tiles;
  const int64_t K = std::max<int64_t>(1, p.K);  // K = 0 takes a stretch too: C is then the bias, or zero
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
}

}  // namespace amx
}  // namespace fastgpt
#endif
