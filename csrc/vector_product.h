// The matrix product in the vectors of simd.h, blocked after Goto and van de Geijn, "Anatomy of High-Performance
// Matrix Multiplication", 2008.
#pragma once

#include <cstring>
#include <memory>
#include <type_traits>

#include "product.h"

namespace fastgpt {
namespace vectors {

// The output tile held in registers: 12 x 2 vectors of AVX-512's 32 registers, 4 x 3 of AVX2's 16.
constexpr int64_t kRows = kLanes == 16 ? 12 : 4;
constexpr int64_t kVectors = kLanes == 16 ? 2 : 3;
constexpr int64_t kColumns = kVectors * kLanes;

// Packed blocks, in words of four bytes: kDepth x kColumns of B stay in the first-level cache (24 KiB with AVX-512),
// kRowBlock x kDepth of A in the second (144 KiB). kDepth x kColumnBlock of B (1.125 MiB) are packed once for all
// blocks of A. A deeper block would be a little faster, but its longer sums would be less exact.
constexpr int64_t kDepth = 192;
constexpr int64_t kRowBlock = 16 * kRows;
constexpr int64_t kColumnBlock = 48 * kColumns;

// The word of packed operands: one element of fp32, or two of bf16 that follow each other along the depth.
using Pair = uint32_t;
template <class Word>
constexpr int64_t kElements = std::is_same_v<Word, Pair> ? 2 : 1;

#if defined(__AVX512BF16__)
template <class T>
using PackedWord = std::conditional_t<std::is_same_v<T, BFloat16>, Pair, float>;
#else
template <class T>
using PackedWord = float;
#endif

FASTGPT_INLINE Pair pair(BFloat16 first, BFloat16 second) { return first.x | static_cast<Pair>(second.x) << 16; }
FASTGPT_INLINE float first_of(Pair pair) { return BFloat16(static_cast<uint16_t>(pair), BFloat16::from_bits()); }
FASTGPT_INLINE float second_of(Pair pair) { return BFloat16(static_cast<uint16_t>(pair >> 16), BFloat16::from_bits()); }

// Packs `from`, (rows, columns), in panels of kWidth rows: out[panel][k][i] is word k of the panel's row i. Missing
// rows and columns are zero.
template <int64_t kWidth, class Word, class T>
void pack(const Matrix<T>& from, int64_t rows, int64_t columns, Word* out) {
  static_assert(kWidth % 4 == 0);
  constexpr int64_t n = kElements<Word>;
  constexpr bool kSameBytes = sizeof(Word) == n * sizeof(T);  // a word is what lies in memory: no conversion
  const int64_t words = (columns + n - 1) / n, whole_words = columns / n;
  for (int64_t first = 0; first < rows; first += kWidth, out += kWidth * words) {
    const Matrix<T> panel = from.at(first, 0);
    const bool whole = first + kWidth <= rows;
    int64_t k = 0;
    if (kSameBytes && whole && panel.column == 1 && panel.row % n == 0) {
      for (; k + 4 <= whole_words; k += 4)
        for (int64_t i = 0; i < kWidth; i += 4)
          transpose_4x4(panel.base + i * panel.row + n * k, panel.row / n, out + k * kWidth + i, kWidth);
    } else if (whole && panel.row == 1) {
      for (; k < whole_words; ++k) {
        const T* column = panel.base + n * k * panel.column;
        for (int64_t i = 0; i < kWidth; ++i) {
          if constexpr (n == 2)
            out[k * kWidth + i] = pair(column[i], column[i + panel.column]);
          else
            out[k * kWidth + i] = static_cast<float>(column[i]);
        }
      }
    }
    for (; k < words; ++k)
      for (int64_t i = 0; i < kWidth; ++i) {
        const auto at = [&](int64_t j) { return first + i < rows && j < columns ? panel(i, j) : T{}; };
        if constexpr (n == 2)
          out[k * kWidth + i] = pair(at(2 * k), at(2 * k + 1));
        else
          out[k * kWidth + i] = static_cast<float>(at(k));
      }
  }
}

// Adds the sum of each packed row to `sums`, (rows).
template <class Word>
void add_row_sums(const Word* packed, int64_t rows, int64_t words, float* sums) {
  for (int64_t first = 0; first < rows; first += kRows) {
    float panel[kRows] = {};
    for (int64_t k = 0; k < words; ++k, packed += kRows)
      for (int64_t i = 0; i < kRows; ++i) {
        if constexpr (kElements<Word> == 2)
          panel[i] += first_of(packed[i]) + second_of(packed[i]);
        else
          panel[i] += packed[i];
      }
    for (int64_t i = 0; i < std::min(kRows, rows - first); ++i) sums[first + i] += panel[i];
  }
}

// Where a tile goes in C, and what is added to it: what C holds if `accumulate` is set, otherwise the bias if there is
// one.
struct Target {
  float* c;
  int64_t ldc;
  const float* bias;
  bool accumulate;

  FASTGPT_INLINE void fetch() const {
    if (!accumulate) return;
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(c + i * ldc + v * kLanes, 1);
  }
  FASTGPT_INLINE void add(Vec (&tile)[kRows][kVectors]) const {
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVectors; ++v) {
        float* at = c + i * ldc + v * kLanes;
        if (accumulate)
          tile[i][v] += load(at);
        else if (bias)
          tile[i][v] += load(bias + v * kLanes);
        store(at, tile[i][v]);
      }
  }
};

// One tile over one stretch of depth. a: (words, kRows), b: (words, kColumns), packed. The stretch is summed from zero
// and then added to C: short sums keep rounding errors small.
inline void multiply_tile(const float* a, const float* b, int64_t words, const Target& target) {
  target.fetch();
  Vec tile[kRows][kVectors] = {};
  for (int64_t k = 0; k < words; ++k, a += kRows, b += kColumns) {
    Vec row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * kLanes);
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVectors; ++v) tile[i][v] += a[i] * row[v];
  }
  target.add(tile);
}

#if defined(__AVX512BF16__)
// The same in AVX512_BF16, which multiplies pairs and adds both products in fp32.
inline void multiply_tile(const Pair* a, const Pair* b, int64_t words, const Target& target) {
  target.fetch();
  Vec tile[kRows][kVectors] = {};
  for (int64_t k = 0; k < words; ++k, a += kRows, b += kColumns) {
    __m512bh row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = (__m512bh)_mm512_loadu_si512(b + v * kLanes);
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVectors; ++v)
        tile[i][v] = _mm512_dpbf16_ps(tile[i][v], (__m512bh)_mm512_set1_epi32(a[i]), row[v]);
  }
  target.add(tile);
}
#endif

// A tile that crosses the edge of C is computed in a buffer; its first `rows` and `columns` are copied.
template <class Word>
void multiply_edge(const Word* a, const Word* b, int64_t words, const Target& target, int64_t rows, int64_t columns) {
  float tile[kRows * kColumns] = {}, bias[kColumns] = {};
  for (int64_t r = 0; target.accumulate && r < rows; ++r)
    std::copy_n(target.c + r * target.ldc, columns, tile + r * kColumns);
  if (target.bias) std::copy_n(target.bias, columns, bias);
  multiply_tile(a, b, words, {tile, kColumns, target.bias ? bias : nullptr, target.accumulate});
  for (int64_t r = 0; r < rows; ++r) std::copy_n(tile + r * kColumns, columns, target.c + r * target.ldc);
}

// One thread's share of the product. The loops are those of Goto and van de Geijn: a block of B is packed once, blocks
// of A pass over it, and a tile of C is loaded and stored once for each stretch of depth.
template <class T, class Word = PackedWord<T>>
void multiply(const Product<T, float>& p) {
  thread_local const std::unique_ptr<Word[]> packed_a(new Word[kRowBlock * kDepth]);
  thread_local const std::unique_ptr<Word[]> packed_b(new Word[kColumnBlock * kDepth]);
  constexpr int64_t n = kElements<Word>, kDeepest = kDepth * n;
  const int64_t K = std::max<int64_t>(1, p.K);            // K = 0 takes a stretch too: C is then the bias, or zero
  const int64_t deep = even_stretch(K, kDeepest, 4 * n);  // words in fours
  for (int64_t column = 0; column < p.N; column += kColumnBlock) {
    const int64_t columns = std::min(kColumnBlock, p.N - column);
    for (int64_t k = 0; k < K; k += deep) {
      const int64_t depth = std::min(deep, p.K - k), words = (depth + n - 1) / n;
      const bool accumulate = p.accumulate || k > 0;
      pack<kColumns>(p.b.at(k, column).transposed(), columns, depth, packed_b.get());
      for (int64_t row = 0; row < p.M; row += kRowBlock) {
        const int64_t rows = std::min(kRowBlock, p.M - row);
        pack<kRows>(p.a.at(row, k), rows, depth, packed_a.get());
        if (p.row_sums && column == 0) add_row_sums(packed_a.get(), rows, words, p.row_sums + row);
        for (int64_t j = 0; j < columns; j += kColumns)
          for (int64_t i = 0; i < rows; i += kRows) {
            const Word *a = packed_a.get() + i * words, *b = packed_b.get() + j * words;
            const Target target{
                p.c + (row + i) * p.ldc + column + j, p.ldc, p.bias ? p.bias + column + j : nullptr, accumulate};
            if (i + kRows <= rows && j + kColumns <= columns)
              multiply_tile(a, b, words, target);
            else
              multiply_edge(a, b, words, target, std::min(kRows, rows - i), std::min(kColumns, columns - j));
          }
      }
    }
  }
}

}  // namespace vectors
}  // namespace fastgpt
