// Activations and their derivatives, and the loops of those that take one tensor.
#pragma once

#include "tensor.h"

namespace fastgpt {

constexpr int64_t kGrain = 8192;  // minimum elements of a task: fewer cost less than handing them to a thread
constexpr float kTwoSqrt2OverPi = 1.59576912160573071f;  // 2 sqrt(2/pi), the factor of GELU's 2u
constexpr float kCubic = 0.044715f;                      // of GELU's approximation, from the paper

// An activation and its derivative at the same places.
struct Activation {
  Vec value, derivative;
};

// x sigmoid(x). Elfwing, Uchibe and Doya, "Sigmoid-Weighted Linear Units", 2017.
struct Silu {
  static FASTGPT_INLINE Activation at(Vec x) {
    const Sigmoid s = sigmoid(x);
    return {x * s.value, s.value + x * s.derivative};
  }
};

// GELU. Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
struct GeluExact {
  static FASTGPT_INLINE Activation at(Vec x) {
    const Normal n = normal(x);
    return {x * n.cdf, n.cdf + x * n.pdf};  // (x Phi)' = Phi + x phi
  }
};

// The approximation by tanh, 0.5 x (1 + tanh u) with u(x) = sqrt(2/pi) (x + 0.044715 x^3), as x sigmoid(2u): the same
// function without a tanh.
struct GeluTanh {
  static FASTGPT_INLINE Activation at(Vec x) {
    const Sigmoid s = sigmoid(kTwoSqrt2OverPi * x * (1.0f + kCubic * x * x));
    const Vec slope = kTwoSqrt2OverPi * (1.0f + 3.0f * kCubic * x * x);  // of the sigmoid's argument
    // for large |x| the sigmoid's derivative is 0 while x * slope overflows: 0 * inf would be NaN
    return {x * s.value, s.value + (s.derivative == Vec{} ? Vec{} : x * slope * s.derivative)};
  }
};

// max(x, 0)^2. So et al., "Primer: Searching for Efficient Transformers for Language Modeling", 2021.
struct Relu2 {
  static FASTGPT_INLINE Activation at(Vec x) {
    const Vec positive = x < Vec{} ? Vec{} : x;  // a NaN stays one
    return {positive * positive, 2.0f * positive};
  }
};

// x, y: n elements, contiguous.
template <class T, class Kind>
void activate(const T* x, T* y, int64_t n) {
  torch::stable::parallel_for(0, n, kGrain, [=](int64_t begin, int64_t end) {
    for_each_vector(end - begin, [&](int64_t i, int64_t lanes) {
      store(y + begin + i, Kind::at(load(x + begin + i, lanes)).value, lanes);
    });
  });
}

// x, dy, dx, y: n elements, contiguous; dx may be dy. Writes the activation to y unless y is null.
template <class T, class Kind>
void differentiate(const T* dy, const T* x, T* dx, T* y, int64_t n) {
  torch::stable::parallel_for(0, n, kGrain, [=](int64_t begin, int64_t end) {
    for_each_vector(end - begin, [&](int64_t i, int64_t lanes) {
      const int64_t at = begin + i;
      const Activation a = Kind::at(load(x + at, lanes));
      store(dx + at, load(dy + at, lanes) * a.derivative, lanes);
      if (y) store(y + at, a.value, lanes);
    });
  });
}

}  // namespace fastgpt
