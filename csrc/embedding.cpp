// The gradient of an embedding: row i of dy is added to row index[i] of a matrix.
//
// Each thread owns some columns and goes through all rows in order. So no two threads write to the same place, and
// every sum is taken in the same order for any number of threads.
#include "tensor.h"

namespace fastgpt {
namespace {

// Threads own multiples of 64 columns: 256 bytes of fp32 are whole cache lines, so that no two threads share one.
constexpr int64_t kColumns = 64;

// main_grad: (V, C) fp32, contiguous, added to. dy: (N, C), any strides. index: (N) int64 in [0, V).
void embedding_backward_(Tensor main_grad, const Tensor& dy_in, const Tensor& index_in) {
  const Tensor dy = dense(dy_in), index = dense(index_in);
  STD_TORCH_CHECK(
      main_grad.dim() == 2 && dy.dim() == 2 && index.dim() == 1, "embedding_backward_: takes (V, C), (N, C), (N)");
  const int64_t V = main_grad.size(0), C = main_grad.size(1), N = dy.size(0);
  STD_TORCH_CHECK(dy.size(1) == C && index.size(0) == N, "embedding_backward_: shapes do not fit");
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long && index.is_cpu(), "index: expected int64 on the CPU");
  float* sums = main_grad_of(main_grad, V * C, "main_grad");
  const int64_t* tokens = data<int64_t>(index);
  for (int64_t i = 0; i < N; ++i)
    STD_TORCH_CHECK(0 <= tokens[i] && tokens[i] < V, "index: ", tokens[i], " lies outside [0, ", V, ")");
  dispatch(dy.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* from = data<T>(dy);
    const int64_t stretches = (C + kColumns - 1) / kColumns;
    torch::stable::parallel_for(0, stretches, 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kColumns, columns = std::min(end * kColumns, C) - first;
      for (int64_t row = 0; row < N; ++row) {
        const T* x = from + row * C + first;
        float* to = sums + tokens[row] * C + first;
        for_each_vector(columns, [&](int64_t i, int64_t n) { store(to + i, load(to + i, n) + load(x + i, n), n); });
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) { m.impl("embedding_backward_", TORCH_BOX(&embedding_backward_)); }

}  // namespace fastgpt
