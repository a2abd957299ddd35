// C = A B + bias, or C += A B, with C in fp32, A and B in fp32 or bf16, and any strides of A and B. Each row of A can
// be summed on the way: where A is a transposed gradient, that is the bias's.
//
// PyTorch's fp32 products on x86 come from MKL, which uses AVX-512 on Intel's CPUs alone; on AMD's it stops at
// AVX2, half the arithmetic that Zen 4 and 5 offer. Its products of bf16 come from oneDNN and are fast, but end in
// bf16: to add one to an fp32 gradient takes a temporary and two more passes. In both cases this product runs
// instead, blocked after Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008.
#include <cstring>
#include <memory>
#include <type_traits>

#include "tensor.h"

namespace fastgpt {
namespace {

// The output tile held in registers: 12 x 2 vectors of AVX-512's 32 registers, 4 x 3 of AVX2's 16.
constexpr int64_t kRows = kLanes == 16 ? 12 : 4;
constexpr int64_t kVectors = kLanes == 16 ? 2 : 3;
constexpr int64_t kColumns = kVectors * kLanes;

// Packed blocks, in words of four bytes: kDepth x kColumns of B stay in the first-level cache, kRowBlock x kDepth
// of A in the second. A deeper block would be a little faster and its longer sums less exact.
constexpr int64_t kDepth = 192;
constexpr int64_t kRowBlock = 16 * kRows;
constexpr int64_t kColumnBlock = 48 * kColumns;

// What packed operands are made of: an fp32 element, or two of bf16 that follow each other along the depth.
using Pair = uint32_t;
template <class Word>
constexpr int64_t kElements = std::is_same_v<Word, Pair> ? 2 : 1;

template <class T>
struct Matrix {
  const T* base;
  int64_t row, column;  // strides

  Matrix at(int64_t i, int64_t j) const { return {base + i * row + j * column, row, column}; }
  Matrix transposed() const { return {base, column, row}; }
  T operator()(int64_t i, int64_t j) const { return base[i * row + j * column]; }
};

FASTGPT_INLINE Pair pair(BFloat16 first, BFloat16 second) { return first.x | static_cast<Pair>(second.x) << 16; }
FASTGPT_INLINE float first_of(Pair pair) { return BFloat16(static_cast<uint16_t>(pair), BFloat16::from_bits()); }
FASTGPT_INLINE float second_of(Pair pair) { return BFloat16(static_cast<uint16_t>(pair >> 16), BFloat16::from_bits()); }

// Rows of `from` in panels of kWidth, each stored word by word along the columns; what is missing is zero.
template <int64_t kWidth, class Word, class T>
void pack(const Matrix<T>& from, int64_t rows, int64_t columns, Word* out) {
  static_assert(kWidth % 4 == 0);
  constexpr int64_t n = kElements<Word>;
  constexpr bool kSameBytes = sizeof(Word) == n * sizeof(T);  // words lie in memory already
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

// Adds up each row of packed panels.
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

// Where a tile goes: added to what C holds, or to the bias if there is one.
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

// One tile over one stretch of depth, summed from zero and only then added: short sums keep the rounding error small.
void multiply_tile(const float* a, const float* b, int64_t words, const Target& target) {
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

#if defined(__AVX512F__)
// The same in AVX512_BF16, which multiplies pairs and adds both products in fp32.
__attribute__((target("avx512bf16"))) void multiply_tile(
    const Pair* a, const Pair* b, int64_t words, const Target& target) {
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

bool has_bf16_products() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16");
}
#endif

template <class T>
struct Product {
  int64_t M, N, K;
  Matrix<T> a, b;
  const float* bias;
  bool accumulate;
  float* c;
  int64_t ldc;
  float* row_sums;  // of A, added to what is there; or null
};

// A tile that hangs over the edge of C goes through a buffer of its own.
template <class Word>
void multiply_edge(const Word* a, const Word* b, int64_t words, const Target& target, int64_t rows, int64_t columns) {
  float tile[kRows * kColumns] = {}, bias[kColumns] = {};
  for (int64_t r = 0; target.accumulate && r < rows; ++r)
    std::copy_n(target.c + r * target.ldc, columns, tile + r * kColumns);
  if (target.bias) std::copy_n(target.bias, columns, bias);
  multiply_tile(a, b, words, {tile, kColumns, target.bias ? bias : nullptr, target.accumulate});
  for (int64_t r = 0; r < rows; ++r) std::copy_n(tile + r * kColumns, columns, target.c + r * target.ldc);
}

// One thread's share.
template <class Word, class T>
void multiply(const Product<T>& p) {
  thread_local const std::unique_ptr<Word[]> packed_a(new Word[kRowBlock * kDepth]);
  thread_local const std::unique_ptr<Word[]> packed_b(new Word[kColumnBlock * kDepth]);
  constexpr int64_t n = kElements<Word>, kDeepest = kDepth * n;
  const int64_t K = std::max<int64_t>(1, p.K);  // without depth there is a stretch too: C is then the bias, or zero
  const int64_t stretches = (K + kDeepest - 1) / kDeepest;
  const int64_t deep = round_up((K + stretches - 1) / stretches, 4 * n);  // all alike, and words in fours
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

// Splits C among threads as a grid: every share packs its own operands, so the squarer the shares the better.
template <class Word, class T>
void multiply_parallel(const Product<T>& p) {
  const int64_t threads = torch::stable::get_num_threads();
  int64_t down = 1, least = INT64_MAX;
  for (int64_t d = 1; d <= threads; ++d) {
    if (threads % d) continue;
    const int64_t packed = p.M / d + p.N / (threads / d);
    if (packed < least) least = packed, down = d;
  }
  const int64_t across = threads / down;
  const int64_t rows = round_up((p.M + down - 1) / down, kRows);
  const int64_t columns = round_up((p.N + across - 1) / across, kColumns);
  torch::stable::parallel_for(0, down * across, 1, [&](int64_t begin, int64_t end) {
    for (int64_t cell = begin; cell < end; ++cell) {
      const int64_t i = cell / across * rows, j = cell % across * columns;
      const int64_t M = std::min(rows, p.M - i), N = std::min(columns, p.N - j);
      if (M <= 0 || N <= 0) continue;
      multiply<Word, T>({M, N, p.K, p.a.at(i, 0), p.b.at(0, j), p.bias ? p.bias + j : nullptr,
                        p.accumulate, p.c + i * p.ldc + j, p.ldc, p.row_sums && j == 0 ? p.row_sums + i : nullptr});
    }
  });
}

template <class T>
void multiply_in_words_of_this_cpu(const Product<T>& p) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, BFloat16>)
    if (has_bf16_products()) return multiply_parallel<Pair>(p);
#endif
  multiply_parallel<float>(p);
}

void matmul_(
    Tensor out, const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias, bool accumulate,
    std::optional<Tensor> row_sums) {
  const int64_t M = out.size(0), N = out.size(1), K = a.size(1);
  STD_TORCH_CHECK(a.size(0) == M && b.size(0) == K && b.size(1) == N, "matmul_: shapes do not fit");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == N), "bias: expected ", N, " elements");
  for (const Tensor& t : {a, b, bias ? *bias : a})
    STD_TORCH_CHECK(t.scalar_type() == a.scalar_type() && t.is_cpu(), "matmul_: takes operands of one dtype on the CPU");
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float && out.is_cpu(), "out: expected float32 on the CPU");
  STD_TORCH_CHECK(out.stride(1) == 1 || out.size(1) == 1, "out: rows must be contiguous");
  STD_TORCH_CHECK(
      !row_sums || (row_sums->dim() == 1 && row_sums->size(0) == M && row_sums->scalar_type() == a.scalar_type() &&
                    row_sums->is_contiguous()),
      "row_sums: expected ", M, " elements of the operands' dtype");
  const std::vector<float> bias_values = to_floats(bias);
  std::vector<float> sums(row_sums ? M : 0);
  dispatch(a.scalar_type(), [&](auto element) {
    using T = decltype(element);
    multiply_in_words_of_this_cpu<T>({
        M, N, K, {data<T>(a), a.stride(0), a.stride(1)}, {data<T>(b), b.stride(0), b.stride(1)},
        bias ? bias_values.data() : nullptr, accumulate, data<float>(out), out.stride(0),
        row_sums ? sums.data() : nullptr});
    for (size_t i = 0; i < sums.size(); ++i) data<T>(*row_sums)[i] = static_cast<T>(sums[i]);
  });
}

// Whether matmul_ is worth calling on this CPU. Not on Intel's: MKL has AVX-512 there, and oneDNN perhaps AMX.
bool matmul_beats_torch() {
#if defined(__AVX512F__)
  __builtin_cpu_init();
  return !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastgpt, m) { m.def("matmul_beats_torch() -> bool"); }
STABLE_TORCH_LIBRARY_IMPL(fastgpt, CompositeExplicitAutograd, m) {
  m.impl("matmul_beats_torch", TORCH_BOX(&matmul_beats_torch));
}
STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) { m.impl("matmul_", TORCH_BOX(&matmul_)); }

}  // namespace fastgpt
