// Gated linear units: activation(gate) * up, with SiLU (SwiGLU) or GELU (GEGLU).
// Shazeer, "GLU Variants Improve Transformer", 2020.
#include "activations.h"
#include "rows.h"

namespace fastgpt {
namespace {

// The activations, numbered as in fastgpt/kernels/ops.py.
enum : int64_t { kSilu = 0, kGeluTanh = 1, kGeluExact = 2 };

// Calls body(Kind{}) with the C++ type of the activation.
template <class Body>
void with_activation(int64_t activation, Body&& body) {
  if (activation == kSilu) return body(Silu{});
  if (activation == kGeluTanh) return body(GeluTanh{});
  if (activation == kGeluExact) return body(GeluExact{});
  STD_TORCH_CHECK(false, "activation: expected 0, 1 or 2, got ", activation);
}

// rows x columns elements, cut into runs that lie in one row; several threads take them. Calls body(row, column, n)
// for each run. If all rows of all tensors follow one another without gaps, they count as one long row.
template <class Body>
void for_each_run(int64_t rows, int64_t columns, bool gaps, Body&& body) {
  const int64_t total = rows * columns, length = gaps ? columns : total;
  torch::stable::parallel_for(0, total, kElementsPerTask, [&, length](int64_t begin, int64_t end) {
    for (int64_t at = begin, n; at < end; at += n) {
      const int64_t row = at / length, column = at % length;
      n = std::min(length - column, end - at);
      body(row, column, n);
    }
  });
}

// gate, up: (..., H), any strides. Returns activation(gate) * up, contiguous.
Tensor glu(const Tensor& gate_in, const Tensor& up_in, int64_t activation) {
  const Rows gate = rows_of(gate_in), up = rows_of(up_in);
  const Tensor y = empty(sizes_of(gate_in), gate_in.scalar_type());
  const int64_t H = gate_in.dim() ? gate_in.size(gate_in.dim() - 1) : 1, rows = H ? gate_in.numel() / H : 0;
  const bool gaps = gate.stride != H || up.stride != H;
  dispatch(y.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T *from_gate = data<T>(gate.tensor), *from_up = data<T>(up.tensor);
    T* to = data<T>(y);
    with_activation(activation, [&](auto kind) {
      using Kind = decltype(kind);
      for_each_run(rows, H, gaps, [&](int64_t row, int64_t column, int64_t n_run) {
        const T *g = from_gate + row * gate.stride + column, *u = from_up + row * up.stride + column;
        T* out = to + row * H + column;
        for_each_vector(
            n_run, [&](int64_t i, int64_t n) { store(out + i, Kind::at(load(g + i, n)).value * load(u + i, n), n); });
      });
    });
  });
  return y;
}

// With a = activation: dgate = dy up a'(gate), dup = dy a(gate), y = a(gate) up.
// dgate, dup, y: (..., H), written in place, rows contiguous and evenly spaced. dy, gate, up: (..., H), any strides.
void glu_backward_(
    Tensor dgate_out, Tensor dup_out, const Tensor& dy_in, const Tensor& gate_in, const Tensor& up_in,
    int64_t activation, std::optional<Tensor> y_out) {
  const Rows dgate = rows_to_write(dgate_out, "dgate"), dup = rows_to_write(dup_out, "dup");
  const Rows y = y_out ? rows_to_write(*y_out, "y") : dgate;
  const Rows dy = rows_of(dy_in), gate = rows_of(gate_in), up = rows_of(up_in);
  const int64_t H = gate_in.dim() ? gate_in.size(gate_in.dim() - 1) : 1, rows = H ? gate_in.numel() / H : 0;
  bool gaps = false;
  for (const Rows* each : {&dgate, &dup, &y, &dy, &gate, &up}) gaps |= each->stride != H;
  dispatch(gate_in.scalar_type(), [&](auto element) {
    using T = decltype(element);
    T *to_gate = data<T>(dgate.tensor), *to_up = data<T>(dup.tensor), *to_y = y_out ? data<T>(y.tensor) : nullptr;
    const T *from_dy = data<T>(dy.tensor), *from_gate = data<T>(gate.tensor), *from_up = data<T>(up.tensor);
    with_activation(activation, [&](auto kind) {
      using Kind = decltype(kind);
      for_each_run(rows, H, gaps, [&](int64_t row, int64_t column, int64_t n_run) {
        const T *grad = from_dy + row * dy.stride + column, *g = from_gate + row * gate.stride + column;
        const T* u = from_up + row * up.stride + column;
        T *dg = to_gate + row * dgate.stride + column, *du = to_up + row * dup.stride + column;
        T* again = to_y ? to_y + row * y.stride + column : nullptr;
        for_each_vector(n_run, [&](int64_t i, int64_t n) {
          const Activation a = Kind::at(load(g + i, n));
          const Vec dout = load(grad + i, n), factor = load(u + i, n);
          store(dg + i, dout * factor * a.derivative, n);
          store(du + i, dout * a.value, n);
          if (again) store(again + i, a.value * factor, n);
        });
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("glu", TORCH_BOX(&glu));
  m.impl("glu_backward_", TORCH_BOX(&glu_backward_));
}

}  // namespace fastgpt
