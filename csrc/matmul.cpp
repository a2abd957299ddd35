// C = A B + bias, or C += A B. The same pass can sum the rows of A: if A is the transposed gradient of a linear layer's
// result, these sums are the gradient of the bias.
//
// Which product runs where, and why PyTorch's does not:
// - CPUs with AMX (amx_product.h): every product. oneDNN's products of bf16 reach a third of the tiles' rate and read
//   past the ends of rows whose length is not a multiple of 32. Their result is bf16: adding it to an fp32 gradient
//   takes a temporary and two more passes. MKL's products of fp32 do not use the tiles.
// - AVX-512 on AMD's CPUs (vector_product.h): operands of fp32, for which MKL stops at AVX2, half of what Zen 4 and 5
//   can do; and operands of bf16 whose product is added to fp32.
// - A few rows (few_rows.h): a weight is read once, and not packed. MKL reads it at half the memory's rate.
#include "amx_product.h"
#include "few_rows.h"
#include "vector_product.h"

namespace fastgpt {
namespace {

// Splits C among threads as a grid of cells, in multiples of a tile. Each cell packs its own operands, whose size grows
// with its rows plus its columns. So the best grid has the cells that are nearest to squares.
template <class T, class Out, class Multiply>
void in_parallel(const Product<T, Out>& p, int64_t tile_rows, int64_t tile_columns, const Multiply& multiply) {
  const int64_t threads = torch::stable::get_num_threads();
  int64_t down = 1, least = INT64_MAX;
  for (int64_t d = 1; d <= threads; ++d) {
    if (threads % d) continue;
    const int64_t packed = p.M / d + p.N / (threads / d);  // rows and columns that a cell packs
    if (packed < least) least = packed, down = d;
  }
  const int64_t across = threads / down;
  const int64_t rows = round_up((p.M + down - 1) / down, tile_rows);
  const int64_t columns = round_up((p.N + across - 1) / across, tile_columns);
  torch::stable::parallel_for(0, down * across, 1, [&](int64_t begin, int64_t end) {
    for (int64_t cell = begin; cell < end; ++cell) {
      const int64_t i = cell / across * rows, j = cell % across * columns;
      if (i < p.M && j < p.N) multiply(p.cell(i, j, rows, columns));
    }
  });
}

// A bf16 result of a deeper product needs an fp32 buffer for its partial sums: rounded to bf16 after each stretch of
// depth, they would lose precision.
#if defined(FASTGPT_AMX)
constexpr int64_t kDeepestUnrounded = amx::kDeepest<BFloat16>;
#else
constexpr int64_t kDeepestUnrounded = 0;
#endif

template <class T, class Out>
void multiply(const Product<T, Out>& p) {
  if (is_few_rows(p)) return multiply_few_rows(p);
#if defined(FASTGPT_AMX)
  if (has_amx()) return in_parallel(p, amx::kLanesOfPanel, amx::kLanesOfPanel, amx::multiply<T, Out>);
#endif
  if constexpr (std::is_same_v<Out, float>) {
    in_parallel(p, vectors::kRows, vectors::kColumns, vectors::multiply<T>);
  } else {
    STD_TORCH_CHECK(false, "out: a result of bfloat16 needs a CPU with AMX");
  }
}

// out: (M, N), rows contiguous, dtype of a or fp32. a: (M, K), b: (K, N), any strides, one dtype. bias: (N).
// row_sums: (M), dtype of a or fp32: the sums of the rows of a, added if accumulate is set.
void matmul_(
    Tensor out, const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias, bool accumulate,
    std::optional<Tensor> row_sums) {
  const int64_t M = out.size(0), N = out.size(1), K = a.size(1);
  STD_TORCH_CHECK(a.size(0) == M && b.size(0) == K && b.size(1) == N, "matmul_: shapes do not fit");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == N), "bias: expected ", N, " elements");
  for (const Tensor& t : {a, b, bias ? *bias : a})
    STD_TORCH_CHECK(
        t.scalar_type() == a.scalar_type() && t.is_cpu(), "matmul_: takes operands of one dtype on the CPU");
  const bool same = out.scalar_type() == a.scalar_type();
  STD_TORCH_CHECK(
      out.is_cpu() && (same || out.scalar_type() == ScalarType::Float), "out: expected the operands' dtype or float32");
  STD_TORCH_CHECK(out.stride(1) == 1 || out.size(1) == 1, "out: rows must be contiguous");
  STD_TORCH_CHECK(
      !row_sums || (row_sums->is_cpu() && row_sums->dim() == 1 && row_sums->size(0) == M && row_sums->is_contiguous() &&
                    (row_sums->scalar_type() == a.scalar_type() || row_sums->scalar_type() == ScalarType::Float)),
      "row_sums: expected ", M, " elements of the operands' dtype or float32");
  const std::vector<float> bias_values = to_floats(bias);
  std::vector<float> sums_of_rows(row_sums ? M : 0);
  dispatch(a.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Matrix<T> left{data<T>(a), a.stride(0), a.stride(1)}, right{data<T>(b), b.stride(0), b.stride(1)};
    const auto into = [&](auto* c, float* sums) {
      using Out = std::remove_pointer_t<decltype(c)>;
      multiply<T, Out>(
          {M, N, K, left, right, bias ? bias_values.data() : nullptr, accumulate, c, out.stride(0), sums,
           row_sums ? sums_of_rows.data() : nullptr});
    };
    if (out.scalar_type() == ScalarType::Float) {
      into(data<float>(out), nullptr);
    } else {
      const Tensor sums = empty({K > kDeepestUnrounded ? M : 0, out.stride(0)}, ScalarType::Float);
      into(data<BFloat16>(out), data<float>(sums));
    }
  });
  if (row_sums)
    dispatch(row_sums->scalar_type(), [&](auto element) {
      using T = decltype(element);
      T* sums = data<T>(*row_sums);
      for (int64_t i = 0; i < M; ++i)
        sums[i] = static_cast<T>(sums_of_rows[i] + (accumulate ? static_cast<float>(sums[i]) : 0.0f));
    });
}

// Whether matmul_ is faster on this CPU than PyTorch's product. bf16: of the operands, otherwise fp32; bf16_result: of
// the result. On AMD's CPUs PyTorch's product of bf16 with a bf16 result uses AVX512_BF16 too, so it is kept.
bool matmul_beats_torch(bool bf16, bool bf16_result) {
#if defined(__AVX512F__)
  if (has_amx()) return true;
  __builtin_cpu_init();
  return !__builtin_cpu_is("intel") && !bf16_result;
#else
  return false;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastgpt, m) { m.def("matmul_beats_torch(bool bf16, bool bf16_result) -> bool"); }
STABLE_TORCH_LIBRARY_IMPL(fastgpt, CompositeExplicitAutograd, m) {
  m.impl("matmul_beats_torch", TORCH_BOX(&matmul_beats_torch));
}
STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) { m.impl("matmul_", TORCH_BOX(&matmul_)); }

}  // namespace fastgpt
