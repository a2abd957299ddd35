// AdamW over a list of tensors, which may be one flat buffer, in one pass: gradient scale, decoupled weight
// decay, moments, update, and optionally a low-precision copy of the new parameter and a zeroed gradient.
// Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
#include "tensor.h"

namespace fastgpt {
namespace {

// Elements a task handles: small enough to share out a list of small tensors, and a constant, so that
// the norm is summed in the same order for any number of threads.
constexpr int64_t kChunk = 1 << 15;

struct Chunk {
  size_t tensor;
  int64_t begin, end;
};

std::vector<Chunk> chunks_of(const std::vector<Tensor>& tensors) {
  std::vector<Chunk> chunks;
  for (size_t t = 0; t < tensors.size(); ++t)
    for (int64_t begin = 0; begin < tensors[t].numel(); begin += kChunk)
      chunks.push_back({t, begin, std::min(begin + kChunk, tensors[t].numel())});
  return chunks;
}

template <class T>
double sum_of_squares(const T* x, int64_t n) {
  double total = 0.0;
  for (int64_t block = 0; block < n; block += 1024) {  // fp32 inside a block, fp64 between them
    Vec squares{};
    for_each_vector(std::min<int64_t>(1024, n - block), [&](int64_t i, int64_t lanes) {
      const Vec value = load(x + block + i, lanes);
      squares += value * value;
    });
    total += sum(squares);
  }
  return total;
}

// The L2 norm of all gradients taken as one vector.
Tensor grad_norm(const std::vector<Tensor>& grads) {
  const auto chunks = chunks_of(grads);
  std::vector<double> partials(chunks.size());
  torch::stable::parallel_for(0, chunks.size(), 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const auto [t, begin, end] = chunks[c];
      dispatch(grads[t].scalar_type(), [&, t = t, begin = begin, end = end](auto element) {
        partials[c] = sum_of_squares(data<decltype(element)>(grads[t]) + begin, end - begin);
      });
    }
  });
  double total = 0.0;
  for (const double partial : partials) total += partial;
  Tensor norm = empty({}, ScalarType::Float);
  *data<float>(norm) = static_cast<float>(std::sqrt(total));
  return norm;
}

// Each computed in double and rounded once: 1 - beta2 taken in fp32 would be off by 1e-4 of itself.
struct Coefficients {
  float grad_scale, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, inverse_sqrt_correction2, eps;
  bool zero_grad;
};

template <class P, class G>
void update(P* param, G* grad, P* exp_avg, P* exp_avg_sq, BFloat16* copy, int64_t n, const Coefficients& c) {
  for_each_vector(n, [&](int64_t i, int64_t lanes) {
    const Vec g = load(grad + i, lanes) * c.grad_scale;
    const Vec old_m = load(exp_avg + i, lanes);
    const Vec m = old_m + (g - old_m) * c.one_minus_beta1;
    const Vec v = load(exp_avg_sq + i, lanes) * c.beta2 + g * g * c.one_minus_beta2;
    Vec p = load(param + i, lanes) * c.decay;
    p -= c.step_size * m / (sqrt(v) * c.inverse_sqrt_correction2 + c.eps);
    store(exp_avg + i, m, lanes);
    store(exp_avg_sq + i, v, lanes);
    store(param + i, p, lanes);
    if (copy) store(copy + i, p, lanes);
    if (c.zero_grad) store(grad + i, Vec{}, lanes);
  });
}

void adamw_(
    const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& exp_avgs,
    const std::vector<Tensor>& exp_avg_sqs, const std::vector<Tensor>& copies, const Tensor& step, const Tensor& lr_,
    const std::optional<Tensor>& grad_scale, double beta1, double beta2, double eps, double weight_decay,
    bool zero_grad) {
  const double t = *data<float>(step), lr = *data<double>(lr_);
  const Coefficients coefficients{
      grad_scale ? *data<float>(*grad_scale) : 1.0f,
      static_cast<float>(1.0 - lr * weight_decay),
      static_cast<float>(1.0 - beta1),
      static_cast<float>(beta2),
      static_cast<float>(1.0 - beta2),
      static_cast<float>(lr / (1.0 - std::pow(beta1, t))),
      static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, t))),
      static_cast<float>(eps),
      zero_grad,
  };
  const auto chunks = chunks_of(params);
  torch::stable::parallel_for(0, chunks.size(), 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const auto [tensor, begin, end] = chunks[c];
      dispatch(params[tensor].scalar_type(), [&, i = tensor, begin = begin, end = end](auto element) {
        using P = decltype(element);
        dispatch(grads[i].scalar_type(), [&](auto grad_element) {
          using G = decltype(grad_element);
          update(
              data<P>(params[i]) + begin, data<G>(grads[i]) + begin, data<P>(exp_avgs[i]) + begin,
              data<P>(exp_avg_sqs[i]) + begin, copies.empty() ? nullptr : data<BFloat16>(copies[i]) + begin,
              end - begin, coefficients);
        });
      });
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("grad_norm", TORCH_BOX(&grad_norm));
  m.impl("adamw_", TORCH_BOX(&adamw_));
}

}  // namespace fastgpt
