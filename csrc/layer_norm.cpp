// Layer norm over the last dimension, alone or after a residual add, and the backward of both.
// Ba, Kiros and Hinton, "Layer Normalization", 2016.
#include "rows.h"

namespace fastgpt {
namespace {

// Rows whose weight gradients one task sums. A constant, so that the order of summation, and with it every bit of the
// result, is the same for any number of threads. Short sums also keep rounding errors small.
constexpr int64_t kRowsPerPartial = 64;

// One row of C elements: y = (x - mean) * rstd * weight + bias. The mean is taken first and the variance about it, in
// two passes over a row that sits in the first-level cache: sum(x^2) - mean^2 in one pass would cancel. bias may be
// null.
template <class T>
void normalise_row(
    const T* x, const float* weight, const float* bias, float eps, int64_t C, T* y, float* mean, float* rstd) {
  Vec total{};
  for_each_vector(C, [&](int64_t i, int64_t n) { total += load(x + i, n); });
  const float mu = sum(total) / C;
  Vec squares{};
  for_each_vector(C, [&](int64_t i, int64_t n) {
    const Vec centred = keep_first(load(x + i, n) - mu, n);
    squares += centred * centred;
  });
  const float r = 1.0f / std::sqrt(sum(squares) / C + eps);
  for_each_vector(C, [&](int64_t i, int64_t n) {
    Vec normal = (load(x + i, n) - mu) * r * load(weight + i, n);
    if (bias) normal += load(bias + i, n);
    store(y + i, normal, n);
  });
  *mean = mu;
  *rstd = r;
}

// x: (..., C), any strides. weight, bias: (C). Returns y (..., C), and mean and rstd (...) fp32.
std::tuple<Tensor, Tensor, Tensor> layer_norm(
    const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in, double eps) {
  const Tensor x = dense(x_in);
  const auto weight = to_floats(weight_in), bias = to_floats(bias_in);
  const auto [rows, C] = shape_of(x);
  Tensor y = empty(sizes_of(x), x.scalar_type());
  Tensor mean = empty(leading_sizes(x), ScalarType::Float), rstd = empty(leading_sizes(x), ScalarType::Float);
  dispatch(x.scalar_type(), [&, C = C, rows = rows](auto element) {
    using T = decltype(element);
    torch::stable::parallel_for(0, rows, row_grain(C), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        normalise_row(
            data<T>(x) + row * C, weight.data(), bias_in ? bias.data() : nullptr, eps, C, data<T>(y) + row * C,
            data<float>(mean) + row, data<float>(rstd) + row);
    });
  });
  return {y, mean, rstd};
}

// x, residual: (..., C), any strides. weight, bias: (C). Returns y and the sum (..., C), and mean and rstd (...) fp32.
// The sum is rounded to the dtype of x before it is normalised.
std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(
    const Tensor& x_in, const Tensor& residual_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in,
    double eps) {
  const Tensor x = dense(x_in), residual = dense(residual_in);
  const auto weight = to_floats(weight_in), bias = to_floats(bias_in);
  const auto [rows, C] = shape_of(x);
  Tensor y = empty(sizes_of(x), x.scalar_type()), total = empty(sizes_of(x), x.scalar_type());
  Tensor mean = empty(leading_sizes(x), ScalarType::Float), rstd = empty(leading_sizes(x), ScalarType::Float);
  dispatch(x.scalar_type(), [&, C = C, rows = rows](auto element) {
    using T = decltype(element);
    torch::stable::parallel_for(0, rows, row_grain(C), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T *a = data<T>(x) + row * C, *b = data<T>(residual) + row * C;
        T* s = data<T>(total) + row * C;
        for_each_vector(C, [&](int64_t i, int64_t n) { store(s + i, load(a + i, n) + load(b + i, n), n); });
        normalise_row(
            s, weight.data(), bias_in ? bias.data() : nullptr, eps, C, data<T>(y) + row * C, data<float>(mean) + row,
            data<float>(rstd) + row);
      }
    });
  });
  return {y, total, mean, rstd};
}

// With xhat = (x - mean) rstd and g = dy weight:
//   dx = rstd (g - mean(g) - xhat mean(g xhat)) + dsum,  dweight = sum dy xhat,  dbias = sum dy,
// where dsum is the gradient that flows directly into the residual sum; it may be null. dy, dsum, x and dx are one row
// of C elements. dweight, dbias and dx_sums, (C) fp32, are added to; dx_sums, the sum of dx, may be null.
template <class T>
void backward_row(
    const T* dy, const T* dsum, const T* x, const float* weight, float mean, float rstd, int64_t C, T* dx,
    float* dweight, float* dbias, float* dx_sums) {
  Vec g_total{}, g_xhat_total{};
  for_each_vector(C, [&](int64_t i, int64_t n) {
    const Vec grad = load(dy + i, n), xhat = (load(x + i, n) - mean) * rstd;
    const Vec g = grad * load(weight + i, n), grad_xhat = grad * xhat;
    g_total += g;
    g_xhat_total += g * xhat;
    store(dweight + i, load(dweight + i, n) + grad_xhat, n);
    store(dbias + i, load(dbias + i, n) + grad, n);
  });
  const float g_mean = sum(g_total) / C, g_xhat_mean = sum(g_xhat_total) / C;
  for_each_vector(C, [&](int64_t i, int64_t n) {
    const Vec xhat = (load(x + i, n) - mean) * rstd;
    Vec grad = (load(dy + i, n) * load(weight + i, n) - g_mean - xhat * g_xhat_mean) * rstd;
    if (dsum) grad += load(dsum + i, n);
    store(dx + i, grad, n);
    if (dx_sums) store(dx_sums + i, load(dx_sums + i, n) + grad, n);
  });
}

// dy, dsum, x: (..., C), any strides. weight: (C). mean, rstd: (...) fp32. weight_main_grad, bias_main_grad, dx_sums:
// (C) fp32, added to. Returns dx (..., C), dweight and dbias (C); those that were added to a main_grad are empty.
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& dy_in, const std::optional<Tensor>& dsum_in, const Tensor& x_in, const Tensor& weight_in,
    const Tensor& mean, const Tensor& rstd, bool needs_dbias, std::optional<Tensor> weight_main_grad_in,
    std::optional<Tensor> bias_main_grad_in, std::optional<Tensor> dx_sums_in) {
  const Tensor dy = dense(dy_in), x = dense(x_in);
  const std::optional<Tensor> dsum = dsum_in ? std::optional(dense(*dsum_in)) : std::nullopt;
  const auto weight = to_floats(weight_in);
  const auto [rows, C] = shape_of(x);
  Tensor dx = empty(sizes_of(x), x.scalar_type());
  float* weight_main_grad = main_grad_of(weight_main_grad_in, C, "weight_main_grad");
  float* bias_main_grad = main_grad_of(bias_main_grad_in, C, "bias_main_grad");
  float* dx_sums = main_grad_of(dx_sums_in, C, "dx_sums");
  Tensor dweight = empty({weight_main_grad ? 0 : C}, weight_in.scalar_type());
  Tensor dbias = empty({needs_dbias && !bias_main_grad ? C : 0}, weight_in.scalar_type());

  const int64_t n_partials = (rows + kRowsPerPartial - 1) / kRowsPerPartial;
  const int64_t of_partial = (dx_sums ? 3 : 2) * C;  // dweight, dbias and the sums of dx, side by side
  std::vector<float> partials(n_partials * of_partial);
  dispatch(x.scalar_type(), [&, C = C, rows = rows](auto element) {
    using T = decltype(element);
    torch::stable::parallel_for(0, n_partials, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * kRowsPerPartial; row < std::min(end * kRowsPerPartial, rows); ++row) {
        float* partial = partials.data() + row / kRowsPerPartial * of_partial;
        backward_row(
            data<T>(dy) + row * C, dsum ? data<T>(*dsum) + row * C : nullptr, data<T>(x) + row * C, weight.data(),
            data<float>(mean)[row], data<float>(rstd)[row], C, data<T>(dx) + row * C, partial, partial + C,
            dx_sums ? partial + 2 * C : nullptr);
      }
    });
  });
  // the partial sums are added in order, column by column
  dispatch(weight_in.scalar_type(), [&, C = C](auto element) {
    using W = decltype(element);
    for_each_vector(C, [&](int64_t i, int64_t n) {
      Vec dw{}, db{}, dx_total{};
      for (const float* partial = partials.data() + i; partial < partials.data() + partials.size();
           partial += of_partial) {
        dw += load(partial, n);
        db += load(partial + C, n);
        if (dx_sums) dx_total += load(partial + 2 * C, n);
      }
      deliver(dw, weight_main_grad ? weight_main_grad + i : nullptr, data<W>(dweight) + i, n);
      if (needs_dbias) deliver(db, bias_main_grad ? bias_main_grad + i : nullptr, data<W>(dbias) + i, n);
      if (dx_sums) store(dx_sums + i, load(dx_sums + i, n) + dx_total, n);
    });
  });
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace fastgpt
