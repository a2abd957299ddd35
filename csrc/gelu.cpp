// GELU, exact (erf) and its tanh approximation: y = x * Phi(x) and y = x * sigmoid(2u(x)) with
// u(x) = sqrt(2/pi) (x + 0.044715 x^3). The latter is the same function as 0.5 x (1 + tanh u), without a tanh.
// Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
#include "activations.h"

namespace fastgpt {
namespace {

// A constant for each number of columns, so that sums are taken in the same order for any number of threads. At most
// 64, so that a sum over many rows is taken in two steps and its rounding errors stay small.
int64_t rows_per_task(int64_t columns) {
  return std::clamp<int64_t>(8 * kGrain / std::max<int64_t>(1, columns), 1, 64);
}

// x, y: (rows, columns), contiguous. bias: (columns).
template <class T, class Kind>
void forward_with_bias(const T* x, const T* bias, T* y, int64_t rows, int64_t columns) {
  torch::stable::parallel_for(0, rows, rows_per_task(columns), [=](int64_t begin, int64_t end) {
    for (int64_t at = begin * columns; at < end * columns; at += columns)
      for_each_vector(columns, [&](int64_t i, int64_t lanes) {
        store(y + at + i, Kind::at(load(x + at + i, lanes) + load(bias + i, lanes)).value, lanes);
      });
  });
}

// x, dy, dx, y: (rows, columns), contiguous; dx may be dy, and y null. bias: (columns). Its gradient is written to
// dbias (columns), or added to main_grad (columns) fp32. A task takes a fixed number of rows and sums into a share of
// its own. The shares are added in order, so the result does not depend on the number of threads.
template <class T, class Kind>
void backward_with_bias(
    const T* dy, const T* x, const T* bias, T* dx, T* dbias, float* main_grad, T* y, int64_t rows, int64_t columns) {
  const int64_t per_share = rows_per_task(columns), shares = (rows + per_share - 1) / per_share;
  std::vector<float> partial(shares * columns, 0.0f);
  torch::stable::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
    for (int64_t share = first; share < last; ++share) {
      float* sum = partial.data() + share * columns;
      for (int64_t row = share * per_share; row < std::min(rows, (share + 1) * per_share); ++row) {
        const int64_t at = row * columns;
        for_each_vector(columns, [&](int64_t i, int64_t lanes) {
          const Activation gelu = Kind::at(load(x + at + i, lanes) + load(bias + i, lanes));
          const Vec gradient = load(dy + at + i, lanes) * gelu.derivative;
          store(dx + at + i, gradient, lanes);
          if (y) store(y + at + i, gelu.value, lanes);
          store(sum + i, load(sum + i, lanes) + gradient, lanes);
        });
      }
    }
  });
  for_each_vector(columns, [&](int64_t i, int64_t lanes) {
    Vec total{};
    for (int64_t share = 0; share < shares; ++share) total += load(partial.data() + share * columns + i, lanes);
    deliver(total, main_grad ? main_grad + i : nullptr, dbias + i, lanes);
  });
}

// x: (..., C), any strides and, without a bias, any shape. bias: (C). Returns GELU of x + bias, contiguous.
Tensor gelu(const Tensor& x_in, const std::optional<Tensor>& bias_in, bool tanh) {
  const Tensor x = dense(x_in);
  Tensor y = empty(sizes_of(x), x.scalar_type());
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (!bias_in) return (tanh ? activate<T, GeluTanh> : activate<T, GeluExact>)(data<T>(x), data<T>(y), x.numel());
    const Tensor bias = dense(*bias_in);
    const int64_t columns = bias.numel(), rows = columns ? x.numel() / columns : 0;
    (tanh ? forward_with_bias<T, GeluTanh> : forward_with_bias<T, GeluExact>)(data<T>(x), data<T>(bias), data<T>(y),
                                                                              rows, columns);
  });
  return y;
}

// dy, x, dx, *y: (..., C), contiguous. Writes dx, which may be dy, and the value to *y unless y is null. Returns the
// bias's gradient (C), empty if there is no bias or if it is added to the main_grad, (C) fp32.
Tensor backward(
    const Tensor& dy, const Tensor& x, const std::optional<Tensor>& bias_in, bool tanh,
    const std::optional<Tensor>& main_grad_in, const Tensor& dx, const Tensor* y) {
  const int64_t n_bias = bias_in ? bias_in->numel() : 0;
  float* main_grad = main_grad_of(main_grad_in, n_bias, "bias_main_grad");
  Tensor dbias = empty({main_grad ? 0 : n_bias}, x.scalar_type());
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    T* value = y ? data<T>(*y) : nullptr;
    if (!bias_in)
      return (tanh ? differentiate<T, GeluTanh> : differentiate<T, GeluExact>)(data<T>(dy), data<T>(x), data<T>(dx),
                                                                               value, x.numel());
    const Tensor bias = dense(*bias_in);
    const int64_t columns = bias.numel(), rows = columns ? x.numel() / columns : 0;
    (tanh ? backward_with_bias<T, GeluTanh> : backward_with_bias<T, GeluExact>)(data<T>(dy), data<T>(x), data<T>(bias),
                                                                                data<T>(dx), data<T>(dbias), main_grad,
                                                                                value, rows, columns);
  });
  return dbias;
}

// dy, x: (..., C), any strides. bias: (C). bias_main_grad: (C) fp32. Returns dx (..., C) and dbias.
std::tuple<Tensor, Tensor> gelu_backward(
    const Tensor& dy, const Tensor& x, const std::optional<Tensor>& bias, bool tanh,
    std::optional<Tensor> bias_main_grad) {
  const Tensor dx = empty(sizes_of(x), x.scalar_type());
  return {dx, backward(dense(dy), dense(x), bias, tanh, bias_main_grad, dx, nullptr)};
}

// The same with dx written over dy, which must be contiguous. Returns GELU of x + bias, recomputed, and dbias.
std::tuple<Tensor, Tensor> gelu_backward_recompute_(
    Tensor dy, const Tensor& x, const std::optional<Tensor>& bias, bool tanh, std::optional<Tensor> bias_main_grad) {
  STD_TORCH_CHECK(dy.is_contiguous(), "dy: expected to be contiguous");
  const Tensor y = empty(sizes_of(x), x.scalar_type());
  return {y, backward(dy, dense(x), bias, tanh, bias_main_grad, dy, &y)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("gelu", TORCH_BOX(&gelu));
  m.impl("gelu_backward", TORCH_BOX(&gelu_backward));
  m.impl("gelu_backward_recompute_", TORCH_BOX(&gelu_backward_recompute_));
}

}  // namespace fastgpt
