// C = A B + bias, or C += A B, in fp32 with any strides of A and B.
//
// PyTorch's matrix products on x86 come from MKL, which uses AVX-512 on Intel's CPUs alone; on AMD's it stops at
// AVX2, half the arithmetic that Zen 4 and 5 offer. There this product runs instead, blocked after Goto and van
// de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008; elsewhere PyTorch's does.
#include <algorithm>
#include <memory>

#include "tensor.h"

namespace fastgpt {
namespace {

// The output tile held in registers: 12 x 2 vectors of AVX-512's 32 registers, 6 x 2 of AVX2's 16.
constexpr int64_t kRows = kLanes == 16 ? 12 : 6;
constexpr int64_t kVectors = 2;
constexpr int64_t kColumns = kVectors * kLanes;

// Packed blocks: kDepth x kColumns of B stay in the first-level cache, kRowBlock x kDepth of A in the second.
// A deeper block would be a little faster and its longer sums less exact.
constexpr int64_t kDepth = 192;
constexpr int64_t kRowBlock = 16 * kRows;
constexpr int64_t kColumnBlock = 512;

struct Matrix {
  const float* base;
  int64_t row, column;  // strides

  Matrix at(int64_t i, int64_t j) const { return {base + i * row + j * column, row, column}; }
  float operator()(int64_t i, int64_t j) const { return base[i * row + j * column]; }
};

// Panels of kRows rows, each stored depth by depth; missing rows are zero.
void pack_a(const Matrix& a, int64_t rows, int64_t depth, float* out) {
  for (int64_t first = 0; first < rows; first += kRows, out += kRows * depth) {
    const Matrix panel = a.at(first, 0);
    const int64_t n = std::min(kRows, rows - first);
    if (a.column == 1)
      for (int64_t i = 0; i < n; ++i)
        for (int64_t k = 0; k < depth; ++k) out[k * kRows + i] = panel.base[i * a.row + k];
    else
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t i = 0; i < n; ++i) out[k * kRows + i] = panel(i, k);
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t i = n; i < kRows; ++i) out[k * kRows + i] = 0.0f;
  }
}

// Panels of kColumns columns, each stored depth by depth; missing columns are zero.
void pack_b(const Matrix& b, int64_t depth, int64_t columns, float* out) {
  for (int64_t first = 0; first < columns; first += kColumns, out += kColumns * depth) {
    const Matrix panel = b.at(0, first);
    const int64_t n = std::min(kColumns, columns - first);
    if (b.column == 1) {
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t v = 0; v < kColumns; v += kLanes)
          store(out + k * kColumns + v, load(panel.base + k * b.row + v, std::clamp<int64_t>(n - v, 0, kLanes)));
    } else {
      for (int64_t j = 0; j < kColumns; ++j)
        for (int64_t k = 0; k < depth; ++k) out[k * kColumns + j] = j < n ? panel(k, j) : 0.0f;
    }
  }
}

// One tile over one stretch of depth, summed from zero and then added to what C holds, or to the bias: short
// sums keep the rounding error small.
FASTGPT_INLINE void multiply_tile(
    const float* a, const float* b, int64_t depth, const float* bias, bool accumulate, float* c, int64_t ldc) {
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
      pack_b(p.b.at(k, column), depth, columns, packed_b.get());
      for (int64_t row = 0; row < p.M; row += kRowBlock) {
        const int64_t rows = std::min(kRowBlock, p.M - row);
        pack_a(p.a.at(row, k), rows, depth, packed_a.get());
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
