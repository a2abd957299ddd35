// Cross-entropy of rows of logits against integer targets: loss = logsumexp(logits) - logits[target].
// A row whose target is ignore_index has loss 0 and gradient 0.
#include <stdexcept>
#include <string>

#include "tensor.h"

namespace fastgpt {
namespace {

// The largest of V logits.
template <class T>
float row_max(const T* logits, int64_t V) {
  Vec running = broadcast(-INFINITY);
  for_each_vector(
      V, [&](int64_t i, int64_t n) { running = max(running, keep_first(load(logits + i, n), n, -INFINITY)); });
  return max(running);
}

// The sum of exp(logit - shift) over V logits; shift is their maximum, so no term exceeds 1.
template <class T>
float sum_of_exp(const T* logits, float shift, int64_t V) {
  Vec total{};
  for_each_vector(
      V, [&](int64_t i, int64_t n) { total += keep_first(exp_nonpositive(load(logits + i, n) - shift), n); });
  return sum(total);
}

// The loss of a row from its maximum, the logarithm of its sum and the target's logit. Where the loss is small,
// top - at_target is exact; lse - at_target would keep the rounding error of lse.
template <class T>
float loss_of(float top, float log_sum, T at_target) {
  return (top - static_cast<float>(at_target)) + log_sum;
}

// Gradient of `scale` times the loss: scale (softmax(logits) - onehot(target)), V elements. grad may be logits.
template <class T>
void gradient_row(const T* logits, int64_t target, float lse, float scale, int64_t V, T* grad) {
  // The logit is read before the loop, which may overwrite it. 1 is subtracted before the result is rounded to T.
  const float at_target = std::exp(static_cast<float>(logits[target]) - lse) - 1.0f;
  for_each_vector(
      V, [&](int64_t i, int64_t n) { store(grad + i, exp_nonpositive(load(logits + i, n) - lse) * scale, n); });
  grad[target] = static_cast<T>(at_target * scale);
}

// Raises if a target is neither ignore_index nor in [0, V). Called before the parallel loop, because an error raised
// inside it would lose its message.
void check_targets(const Tensor& targets, int64_t ignore_index, int64_t V) {
  for (int64_t row = 0; row < targets.size(0); ++row) {
    const int64_t target = data<int64_t>(targets)[row];
    if (target != ignore_index && (target < 0 || target >= V))
      throw std::runtime_error(  // STD_TORCH_CHECK's message would begin with this file's name
          "targets: " + std::to_string(target) + " is outside the " + std::to_string(V) + " classes");
  }
}

// logits: (N, V), any strides. targets: (N) int64. Returns loss and logsumexp of each row, (N) fp32.
std::tuple<Tensor, Tensor> cross_entropy(const Tensor& logits_in, const Tensor& targets_in, int64_t ignore_index) {
  const Tensor logits = dense(logits_in), targets = dense(targets_in);
  const int64_t N = logits.size(0), V = logits.size(1);
  check_targets(targets, ignore_index, V);
  Tensor losses = empty({N}, ScalarType::Float), lse = empty({N}, ScalarType::Float);
  dispatch(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    torch::stable::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* x = data<T>(logits) + row * V;
        const int64_t target = data<int64_t>(targets)[row];
        const float top = row_max(x, V), log_sum = std::log(sum_of_exp(x, top, V));
        data<float>(lse)[row] = top + log_sum;
        if (target == ignore_index) {
          data<float>(losses)[row] = 0.0f;
          continue;
        }
        data<float>(losses)[row] = loss_of(top, log_sum, x[target]);
      }
    });
  });
  return {losses, lse};
}

// dlosses: (N) fp32. logits: (N, V), any strides. targets: (N) int64. lse: (N) fp32. Returns the gradient, (N, V).
Tensor cross_entropy_backward(
    const Tensor& dlosses_in, const Tensor& logits_in, const Tensor& targets_in, const Tensor& lse,
    int64_t ignore_index) {
  const Tensor dlosses = dense(dlosses_in), logits = dense(logits_in), targets = dense(targets_in);
  const int64_t N = logits.size(0), V = logits.size(1);
  Tensor dlogits = empty({N, V}, logits.scalar_type());
  dispatch(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    torch::stable::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* grad = data<T>(dlogits) + row * V;
        const int64_t target = data<int64_t>(targets)[row];
        if (target == ignore_index)
          std::memset(static_cast<void*>(grad), 0, V * sizeof(T));
        else
          gradient_row(data<T>(logits) + row * V, target, data<float>(lse)[row], data<float>(dlosses)[row], V, grad);
      }
    });
  });
  return dlogits;
}

// logits: (N, V), contiguous, overwritten by the gradient of scale * sum(losses). targets: (N) int64. scale: () fp32.
// Returns the losses, (N) fp32.
Tensor cross_entropy_(Tensor logits, const Tensor& targets_in, const Tensor& scale, int64_t ignore_index) {
  const Tensor targets = dense(targets_in);
  const int64_t N = logits.size(0), V = logits.size(1);
  check_targets(targets, ignore_index, V);
  Tensor losses = empty({N}, ScalarType::Float);
  const float grad_scale = *data<float>(scale);
  dispatch(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    torch::stable::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* x = data<T>(logits) + row * V;
        const int64_t target = data<int64_t>(targets)[row];
        if (target == ignore_index) {
          std::memset(static_cast<void*>(x), 0, V * sizeof(T));
          data<float>(losses)[row] = 0.0f;
          continue;
        }
        const float top = row_max(x, V), log_sum = std::log(sum_of_exp(x, top, V));
        data<float>(losses)[row] = loss_of(top, log_sum, x[target]);
        gradient_row(x, target, top + log_sum, grad_scale, V, x);
      }
    });
  });
  return losses;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
  m.impl("cross_entropy_", TORCH_BOX(&cross_entropy_));
}

}  // namespace fastgpt
