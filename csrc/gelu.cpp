// GELU, exact (erf) and its tanh approximation: y = x * Phi(x) and y = x * sigmoid(2u(x)) with
// u(x) = sqrt(2/pi) (x + 0.044715 x^3), the latter the same function as 0.5 x (1 + tanh u).
// Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
#include "tensor.h"

namespace fastgpt {
namespace {

constexpr int64_t kGrain = 8192;  // elements a thread takes at least
constexpr float kTwoSqrt2OverPi = 1.59576912160573071f;
constexpr float kCubic = 0.044715f;

struct Exact {
  static FASTGPT_INLINE Vec value(Vec x) { return x * normal(x).cdf; }
  static FASTGPT_INLINE Vec derivative(Vec x) {
    const Normal n = normal(x);
    return n.cdf + x * n.pdf;
  }
};

struct Tanh {
  static FASTGPT_INLINE Vec value(Vec x) { return x * sigmoid(two_u(x)).value; }
  static FASTGPT_INLINE Vec derivative(Vec x) {
    const Sigmoid s = sigmoid(two_u(x));
    const Vec slope = kTwoSqrt2OverPi * (1.0f + 3.0f * kCubic * x * x);  // d(2u)/dx
    // far out the sigmoid's slope is 0 while x times this one grows without bound: 0 * inf would be NaN
    return s.value + (s.derivative == Vec{} ? Vec{} : x * slope * s.derivative);
  }

 private:
  static FASTGPT_INLINE Vec two_u(Vec x) { return kTwoSqrt2OverPi * x * (1.0f + kCubic * x * x); }
};

template <class T, class Kind>
void forward(const T* x, T* y, int64_t n) {
  torch::stable::parallel_for(0, n, kGrain, [=](int64_t begin, int64_t end) {
    for_each_vector(end - begin, [&](int64_t i, int64_t lanes) {
      store(y + begin + i, Kind::value(load(x + begin + i, lanes)), lanes);
    });
  });
}

template <class T, class Kind>
void backward(const T* dy, const T* x, T* dx, int64_t n) {
  torch::stable::parallel_for(0, n, kGrain, [=](int64_t begin, int64_t end) {
    for_each_vector(end - begin, [&](int64_t i, int64_t lanes) {
      const int64_t at = begin + i;
      store(dx + at, load(dy + at, lanes) * Kind::derivative(load(x + at, lanes)), lanes);
    });
  });
}

Tensor gelu(const Tensor& x_in, bool tanh) {
  const Tensor x = dense(x_in);
  Tensor y = empty(sizes_of(x), x.scalar_type());
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    (tanh ? forward<T, Tanh> : forward<T, Exact>)(data<T>(x), data<T>(y), x.numel());
  });
  return y;
}

Tensor gelu_backward(const Tensor& dy_in, const Tensor& x_in, bool tanh) {
  const Tensor dy = dense(dy_in), x = dense(x_in);
  Tensor dx = empty(sizes_of(x), x.scalar_type());
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    (tanh ? backward<T, Tanh> : backward<T, Exact>)(data<T>(dy), data<T>(x), data<T>(dx), x.numel());
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("gelu", TORCH_BOX(&gelu));
  m.impl("gelu_backward", TORCH_BOX(&gelu_backward));
}

}  // namespace fastgpt
