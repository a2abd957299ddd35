// Helpers for tensors that every op uses: allocation, contiguity and dispatch on the element type.
#pragma once

#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "simd.h"

namespace fastgpt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An uninitialised tensor on the CPU. Strides are in elements.
inline Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype) {
  AtenTensorHandle handle;
  const auto error = aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), aoti_torch_device_type_cpu(), 0, &handle);
  // The stable ABI returns only an error code. The message is worded like PyTorch's.
  STD_TORCH_CHECK(error == 0, "can't allocate memory for a tensor");
  return Tensor(handle);
}

// The same, contiguous.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i];
  }
  return empty_strided(sizes, strides, dtype);
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

// Gives a copy-on-write tensor (torch._lazy_clone) memory of its own, which asking for its address does. PyTorch
// forbids this inside a parallel region, so it is done before one.
inline void make_own(const Tensor& t) { t.data_ptr(); }
inline void make_own(const std::vector<Tensor>& tensors) {
  for (const Tensor& t : tensors) make_own(t);
}

// `t` itself if it is contiguous, otherwise a copy.
inline Tensor dense(const Tensor& t) {
  if (!t.is_contiguous()) return torch::stable::contiguous(t);
  make_own(t);
  return t;
}

// The address of the first element. T must be the tensor's element type: it is not checked.
template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// Calls body(T{}) with the C++ type of `dtype`. The kernels are compiled for fp32 and bf16.
template <class Body>
void dispatch(ScalarType dtype, Body&& body) {
  if (dtype == ScalarType::Float) return body(float{});
  if (dtype == ScalarType::BFloat16) return body(BFloat16{});
  STD_TORCH_CHECK(false, "fastgpt's C++ kernels take float32 and bfloat16");
}

// The address of a main_grad, n contiguous fp32, or null if there is none. Raises an error that says `name` if
// the tensor is anything else.
inline float* main_grad_of(const std::optional<Tensor>& t, int64_t n, const char* name) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(
      t->is_cpu() && t->scalar_type() == ScalarType::Float && t->numel() == n && t->is_contiguous(), name,
      ": expected ", n, " elements of float32 on the CPU, contiguous");
  return data<float>(*t);
}

// Adds the first n sums to `main_grad`, fp32. If it is null, writes them to `out` instead, rounded to T.
template <class T>
FASTGPT_INLINE void deliver(Vec sums, float* main_grad, T* out, int64_t n) {
  if (main_grad)
    store(main_grad, load(main_grad, n) + sums, n);
  else
    store(out, sums, n);
}

// A copy of `t` in fp32, for small tensors that every row reads. Empty if there is no `t`.
inline std::vector<float> to_floats(const std::optional<Tensor>& t) {
  if (!t) return {};
  const Tensor source = dense(*t);
  std::vector<float> values(source.numel());
  dispatch(source.scalar_type(), [&](auto element) {
    using T = decltype(element);
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(data<T>(source)[i]);
  });
  return values;
}

}  // namespace fastgpt
