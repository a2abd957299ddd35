// RMS norm over the last dimension, alone or after a residual add, and the backward of both.
// Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
#include "rows.h"

namespace fastgpt {
namespace {

// Rows whose weight gradients one task sums. A constant, so that the order of summation, and with it every bit of the
// result, is the same for any number of threads. Short sums also keep rounding errors small.
constexpr int64_t kRowsPerPartial = 64;

// The sum of term(i, n), a vector of the elements from i on, over a row of C elements; lanes from n on must be 0. Four
// sums are taken at once: in a single one, each addition would wait for the one before it.
template <class Term>
FASTGPT_INLINE float sum_of_row(int64_t C, Term&& term) {
  Vec totals[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= C; i += 4 * kLanes)
    for (int64_t k = 0; k < 4; ++k) totals[k] += term(i + k * kLanes, static_cast<int64_t>(kLanes));
  for_each_vector(C - i, [&](int64_t rest, int64_t n) { totals[0] += term(i + rest, n); });
  return sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
}

// One row of C elements: y = x * rstd * weight, from the row's sum of squares. Returns rstd. weight may be null.
template <class T>
float scale_row(const T* x, float squares, const float* weight, float eps, int64_t C, T* y) {
  const float rstd = 1.0f / std::sqrt(squares / C + eps);
  if (weight)
    for_each_vector(C, [&](int64_t i, int64_t n) { store(y + i, load(x + i, n) * rstd * load(weight + i, n), n); });
  else
    for_each_vector(C, [&](int64_t i, int64_t n) { store(y + i, load(x + i, n) * rstd, n); });
  return rstd;
}

// x: (..., C), any strides. weight: (C), or nothing for ones. Returns y (..., C) and rstd (...) fp32.
std::tuple<Tensor, Tensor> rms_norm(const Tensor& x_in, const std::optional<Tensor>& weight_in, double eps) {
  const Tensor x = dense(x_in);
  const auto weight = to_floats(weight_in);
  const auto [rows, C] = shape_of(x);
  Tensor y = empty(sizes_of(x), x.scalar_type()), rstd = empty(leading_sizes(x), ScalarType::Float);
  dispatch(x.scalar_type(), [&, C = C, rows = rows](auto element) {
    using T = decltype(element);
    torch::stable::parallel_for(0, rows, row_grain(C), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* a = data<T>(x) + row * C;
        const float squares = sum_of_row(C, [&](int64_t i, int64_t n) {
          const Vec v = load(a + i, n);
          return v * v;
        });
        data<float>(rstd)[row] =
            scale_row(a, squares, weight_in ? weight.data() : nullptr, eps, C, data<T>(y) + row * C);
      }
    });
  });
  return {y, rstd};
}

// x, residual: (..., C), any strides. weight: (C), or nothing for ones. Returns y and the sum (..., C), and rstd (...)
// fp32. The sum is rounded to the dtype of x before it is normalised.
std::tuple<Tensor, Tensor, Tensor> add_rms_norm(
    const Tensor& x_in, const Tensor& residual_in, const std::optional<Tensor>& weight_in, double eps) {
  const Tensor x = dense(x_in), residual = dense(residual_in);
  const auto weight = to_floats(weight_in);
  const auto [rows, C] = shape_of(x);
  Tensor y = empty(sizes_of(x), x.scalar_type()), total = empty(sizes_of(x), x.scalar_type());
  Tensor rstd = empty(leading_sizes(x), ScalarType::Float);
  dispatch(x.scalar_type(), [&, C = C, rows = rows](auto element) {
    using T = decltype(element);
    torch::stable::parallel_for(0, rows, row_grain(C), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T *a = data<T>(x) + row * C, *b = data<T>(residual) + row * C;
        T* s = data<T>(total) + row * C;
        const float squares = sum_of_row(C, [&](int64_t i, int64_t n) {
          store(s + i, load(a + i, n) + load(b + i, n), n);
          const Vec v = load(s + i, n);  // rounded
          return v * v;
        });
        data<float>(rstd)[row] =
            scale_row(s, squares, weight_in ? weight.data() : nullptr, eps, C, data<T>(y) + row * C);
      }
    });
  });
  return {y, total, rstd};
}

// With xhat = x rstd and g = dy weight:
//   dx = rstd (g - xhat mean(g xhat)) + dsum,  dweight = sum dy xhat,
// where dsum is the gradient that flows directly into the residual sum; it may be null. dy, dsum, x and dx are one row
// of C elements. weight and dweight, (C) fp32, are both null without a weight; dweight is added to.
template <class T>
void backward_row(
    const T* dy, const T* dsum, const T* x, const float* weight, float rstd, int64_t C, T* dx, float* dweight) {
  const auto xhat = [&](int64_t i, int64_t n) { return load(x + i, n) * rstd; };
  float total;  // of g xhat
  if (weight)
    total = sum_of_row(C, [&](int64_t i, int64_t n) {
      const Vec grad_xhat = load(dy + i, n) * xhat(i, n);
      store(dweight + i, load(dweight + i, n) + grad_xhat, n);
      return grad_xhat * load(weight + i, n);
    });
  else
    total = sum_of_row(C, [&](int64_t i, int64_t n) { return load(dy + i, n) * xhat(i, n); });
  const float mean = total / C;
  for_each_vector(C, [&](int64_t i, int64_t n) {
    Vec g = load(dy + i, n);
    if (weight) g *= load(weight + i, n);
    Vec grad = (g - xhat(i, n) * mean) * rstd;
    if (dsum) grad += load(dsum + i, n);
    store(dx + i, grad, n);
  });
}

// dy, dsum, x: (..., C), any strides. weight: (C), or nothing for ones. rstd: (...) fp32. weight_main_grad: (C) fp32,
// added to. Returns dx (..., C) and dweight (C), empty without a weight or if it was added to weight_main_grad.
std::tuple<Tensor, Tensor> rms_norm_backward(
    const Tensor& dy_in, const std::optional<Tensor>& dsum_in, const Tensor& x_in,
    const std::optional<Tensor>& weight_in, const Tensor& rstd, std::optional<Tensor> weight_main_grad_in) {
  const Tensor dy = dense(dy_in), x = dense(x_in);
  const std::optional<Tensor> dsum = dsum_in ? std::optional(dense(*dsum_in)) : std::nullopt;
  const auto weight = to_floats(weight_in);
  const auto [rows, C] = shape_of(x);
  Tensor dx = empty(sizes_of(x), x.scalar_type());
  float* weight_main_grad = main_grad_of(weight_main_grad_in, C, "weight_main_grad");
  Tensor dweight = empty({weight_in && !weight_main_grad ? C : 0}, x.scalar_type());

  const int64_t n_partials = (rows + kRowsPerPartial - 1) / kRowsPerPartial;
  std::vector<float> partials(weight_in ? n_partials * C : 0);
  dispatch(x.scalar_type(), [&, C = C, rows = rows](auto element) {
    using T = decltype(element);
    torch::stable::parallel_for(0, n_partials, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * kRowsPerPartial; row < std::min(end * kRowsPerPartial, rows); ++row)
        backward_row(
            data<T>(dy) + row * C, dsum ? data<T>(*dsum) + row * C : nullptr, data<T>(x) + row * C,
            weight_in ? weight.data() : nullptr, data<float>(rstd)[row], C, data<T>(dx) + row * C,
            weight_in ? partials.data() + row / kRowsPerPartial * C : nullptr);
    });
    if (!weight_in) return;
    // the partial sums are added in order, column by column
    for_each_vector(C, [&](int64_t i, int64_t n) {
      Vec total{};
      for (int64_t k = 0; k < n_partials; ++k) total += load(partials.data() + k * C + i, n);
      deliver(total, weight_main_grad ? weight_main_grad + i : nullptr, data<T>(dweight) + i, n);
    });
  });
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace fastgpt
