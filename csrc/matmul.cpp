// C = A B + bias, or C += A B, in fp32 with any strides of A and B.
//
// PyTorch's matrix products on x86 come from MKL, which uses AVX-512 on Intel's CPUs alone; on AMD's it stops at
// AVX2, half the arithmetic that Zen 4 and 5 offer. There this product runs instead, blocked after Goto and van
// de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008; elsewhere PyTorch's does.
#include <algorithm>
#include <cstring>
#include <memory>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "tensor.h"

namespace fastgpt {
namespace {

// The output tile held in registers: 12 x 2 vectors of AVX-512's 32 registers, 4 x 3 of AVX2's 16.
constexpr int64_t kRows = kLanes == 16 ? 12 : 4;
constexpr int64_t kVectors = kLanes == 16 ? 2 : 3;
constexpr int64_t kColumns = kVectors * kLanes;

// Packed blocks: kDepth x kColumns of B stay in the first-level cache, kRowBlock x kDepth of A in the second.
// A deeper block would be a little faster and its longer sums less exact.
constexpr int64_t kDepth = 192;
constexpr int64_t kRowBlock = 16 * kRows;
constexpr int64_t kColumnBlock = 1536;

struct Matrix {
  const float* base;
  int64_t row, column;  // strides

  Matrix at(int64_t i, int64_t j) const { return {base + i * row + j * column, row, column}; }
  Matrix transposed() const { return {base, column, row}; }
  float operator()(int64_t i, int64_t j) const { return base[i * row + j * column]; }
};

// out[j * out_stride + i] = in[i * in_stride + j] of four rows and columns.
FASTGPT_INLINE void transpose_4x4(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
#if defined(__SSE__)
  __m128 row[4];
  for (int i = 0; i < 4; ++i) row[i] = _mm_loadu_ps(in + i * in_stride);
  _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
  for (int j = 0; j < 4; ++j) _mm_storeu_ps(out + j * out_stride, row[j]);
#else
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < 4; ++i) out[j * out_stride + i] = in[i * in_stride + j];
#endif
}

// Rows of `from` in panels of kWidth, each stored column by column; missing rows are zero.
template <int64_t kWidth>
void pack(const Matrix& from, int64_t rows, int64_t columns, float* out) {
  static_assert(kWidth % 4 == 0);
  for (int64_t first = 0; first < rows; first += kWidth, out += kWidth * columns) {
    const Matrix panel = from.at(first, 0);
    int64_t k = 0;
    if (first + kWidth <= rows && panel.column == 1)
      for (; k + 4 <= columns; k += 4)
        for (int64_t i = 0; i < kWidth; i += 4)
          transpose_4x4(panel.base + i * panel.row + k, panel.row, out + k * kWidth + i, kWidth);
    else if (first + kWidth <= rows && panel.row == 1)
      for (; k < columns; ++k) std::memcpy(out + k * kWidth, panel.base + k * panel.column, kWidth * sizeof(float));
    for (; k < columns; ++k)
      for (int64_t i = 0; i < kWidth; ++i) out[k * kWidth + i] = first + i < rows ? panel(i, k) : 0.0f;
  }
}

// One tile over one stretch of depth, summed from zero and then added to what C holds, or to the bias: short
// sums keep the rounding error small.
FASTGPT_INLINE void multiply_tile(
    const float* a, const float* b, int64_t depth, const float* bias, bool accumulate, float* c, int64_t ldc) {
  if (accumulate)
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(c + i * ldc + v * kLanes, 1);
  Vec tile[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k, a += kRows, b += kColumns) {
    Vec row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * kLanes);
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVectors; ++v) tile[i][v] += a[i] * row[v];
  }
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

struct Product {
  int64_t M, N, K;
  Matrix a, b;
  const float* bias;
  bool accumulate;
  float* c;
  int64_t ldc;
};

// A tile that hangs over the edge of C goes through a buffer of its own.
void multiply_edge(
    const Product& p, const float* a, const float* b, int64_t depth, const float* bias, bool accumulate, int64_t i,
    int64_t j) {
  const int64_t rows = std::min(kRows, p.M - i), columns = std::min(kColumns, p.N - j);
  float tile[kRows * kColumns] = {}, tile_bias[kColumns] = {};
  for (int64_t r = 0; accumulate && r < rows; ++r) std::copy_n(p.c + (i + r) * p.ldc + j, columns, tile + r * kColumns);
  if (bias) std::copy_n(bias, columns, tile_bias);
  multiply_tile(a, b, depth, bias ? tile_bias : nullptr, accumulate, tile, kColumns);
  for (int64_t r = 0; r < rows; ++r) std::copy_n(tile + r * kColumns, columns, p.c + (i + r) * p.ldc + j);
}

// One thread's share.
void multiply(const Product& p) {
  thread_local const std::unique_ptr<float[]> packed_a(new float[kRowBlock * kDepth]);
  thread_local const std::unique_ptr<float[]> packed_b(new float[(kColumnBlock + kColumns) * kDepth]);
  for (int64_t column = 0; column < p.N; column += kColumnBlock) {
    const int64_t columns = std::min(kColumnBlock, p.N - column);
    for (int64_t k = 0; k == 0 || k < p.K; k += kDepth) {  // once without depth too: C is then the bias, or zero
      const int64_t depth = std::min(kDepth, p.K - k);
      const bool accumulate = p.accumulate || k > 0;
      pack<kColumns>(p.b.at(k, column).transposed(), columns, depth, packed_b.get());
      for (int64_t row = 0; row < p.M; row += kRowBlock) {
        const int64_t rows = std::min(kRowBlock, p.M - row);
        pack<kRows>(p.a.at(row, k), rows, depth, packed_a.get());
        for (int64_t j = 0; j < columns; j += kColumns)
          for (int64_t i = 0; i < rows; i += kRows) {
            const float *a = packed_a.get() + i * depth, *b = packed_b.get() + j * depth;
            const float* bias = p.bias ? p.bias + column + j : nullptr;
            const bool whole = i + kRows <= rows && j + kColumns <= columns;
            if (whole)
              multiply_tile(a, b, depth, bias, accumulate, p.c + (row + i) * p.ldc + column + j, p.ldc);
            else
              multiply_edge(p, a, b, depth, bias, accumulate, row + i, column + j);
          }
      }
    }
  }
}

// Splits C among threads as a grid: every share packs its own operands, so the squarer the shares the better.
void multiply_parallel(const Product& p) {
  const int64_t threads = torch::stable::get_num_threads();
  int64_t down = 1, least = INT64_MAX;
  for (int64_t d = 1; d <= threads; ++d) {
    if (threads % d) continue;
    const int64_t packed = p.M / d + p.N / (threads / d);
    if (packed < least) least = packed, down = d;
  }
  const int64_t across = threads / down;
  const auto share = [](int64_t size, int64_t parts, int64_t unit) {
    return ((size + parts - 1) / parts + unit - 1) / unit * unit;
  };
  const int64_t rows = share(p.M, down, kRows), columns = share(p.N, across, kColumns);
  torch::stable::parallel_for(0, down * across, 1, [&](int64_t begin, int64_t end) {
    for (int64_t cell = begin; cell < end; ++cell) {
      const int64_t i = cell / across * rows, j = cell % across * columns;
      const int64_t M = std::min(rows, p.M - i), N = std::min(columns, p.N - j);
      if (M <= 0 || N <= 0) continue;
      multiply({M, N, p.K, p.a.at(i, 0), p.b.at(0, j), p.bias ? p.bias + j : nullptr, p.accumulate,
                p.c + i * p.ldc + j, p.ldc});
    }
  });
}

void matmul_(
    Tensor out, const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias, bool accumulate) {
  const int64_t M = out.size(0), N = out.size(1), K = a.size(1);
  STD_TORCH_CHECK(a.size(0) == M && b.size(0) == K && b.size(1) == N, "matmul_: shapes do not fit");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == N), "bias: expected ", N, " elements");
  for (const Tensor& t : {out, a, b, bias ? *bias : out})
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_cpu(), "matmul_: takes float32 on the CPU");
  STD_TORCH_CHECK(out.stride(1) == 1 || out.size(1) == 1, "out: rows must be contiguous");
  const std::vector<float> bias_values = to_floats(bias);
  multiply_parallel({
      M, N, K, {data<float>(a), a.stride(0), a.stride(1)},
      {data<float>(b), b.stride(0), b.stride(1)}, bias ? bias_values.data() : nullptr, accumulate,
      data<float>(out), out.stride(0),
  });
}

// Whether matmul_ is worth calling on this CPU.
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
