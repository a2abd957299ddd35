// Squared ReLU, max(x, 0)^2. So et al., "Primer: Searching for Efficient Transformers for Language Modeling", 2021.
#include "activations.h"

namespace fastgpt {
namespace {

// x: any shape and strides. Returns the same shape, contiguous.
Tensor relu2(const Tensor& x_in) {
  const Tensor x = dense(x_in);
  const Tensor y = empty(sizes_of(x), x.scalar_type());
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    activate<T, Relu2>(data<T>(x), data<T>(y), x.numel());
  });
  return y;
}

// dy, x, dx, *y: one shape, contiguous. Writes dx, which may be dy, and the value to *y unless y is null.
void backward(const Tensor& dy, const Tensor& x, const Tensor& dx, const Tensor* y) {
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    differentiate<T, Relu2>(data<T>(dy), data<T>(x), data<T>(dx), y ? data<T>(*y) : nullptr, x.numel());
  });
}

// dy, x: one shape, any strides. Returns dx, contiguous.
Tensor relu2_backward(const Tensor& dy, const Tensor& x) {
  const Tensor dx = empty(sizes_of(x), x.scalar_type());
  backward(dense(dy), dense(x), dx, nullptr);
  return dx;
}

// The same with dx written over dy, which must be contiguous. Returns the squared ReLU of x, recomputed.
Tensor relu2_backward_recompute_(Tensor dy, const Tensor& x) {
  STD_TORCH_CHECK(dy.is_contiguous(), "dy: expected to be contiguous");
  const Tensor y = empty(sizes_of(x), x.scalar_type());
  backward(dy, dense(x), dy, &y);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("relu2", TORCH_BOX(&relu2));
  m.impl("relu2_backward", TORCH_BOX(&relu2_backward));
  m.impl("relu2_backward_recompute_", TORCH_BOX(&relu2_backward_recompute_));
}

}  // namespace fastgpt
