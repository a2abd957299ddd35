// Rotary position embeddings, alone or after an RMS norm of each head, and the gradients of both.
// Su et al., "RoFormer", 2021; the norm: Henry et al., "Query-Key Normalization for Transformers", 2020, with the RMS
// as in Qwen3.
//
// The factors of a position are laid out once as the loops over its heads read them. One loop turns a head from one
// place to another, which may be the same, so in place and out of place give the same bits.
#include "tensor.h"

namespace fastgpt {
namespace {

// Minimum elements of a task: fewer cost less than handing them to a thread. 32 KiB of fp32, a first-level cache.
constexpr int64_t kElementsPerTask = 8192;

// Heads whose weight gradients one task sums, or all those of a position if it has more. A constant, so that the order
// of summation, and with it every bit of the result, is the same for any number of threads.
constexpr int64_t kHeadsPerShare = 64;

typedef uint64_t PairVec __attribute__((vector_size(kLanes * 4)));

// Exchanges lanes 2i and 2i + 1.
FASTGPT_INLINE Vec swap_neighbours(Vec value) {
  const PairVec pairs = (PairVec)value;
  return (Vec)((pairs << 32) | (pairs >> 32));
}

// The elements that are turned together: none; i and i + D/2; 2i and 2i + 1.
enum class Pairs { kNone, kHalves, kNeighbours };

// Turns the D elements that `in(i, lanes)` gives, and hands the result to `out(i, value, lanes)`. A pair is read before
// it is written. cos, sin: as Factors lays them out.
template <Pairs kPairs, class In, class Out>
FASTGPT_INLINE void turn(const float* cos, const float* sin, int64_t D, In&& in, Out&& out) {
  if constexpr (kPairs == Pairs::kHalves) {
    const int64_t half = D / 2;
    for_each_vector(half, [&](int64_t i, int64_t n) {
      const Vec c = load(cos + i, n), s = load(sin + i, n), a = in(i, n), b = in(half + i, n);
      out(i, a * c - b * s, n);
      out(half + i, b * c + a * s, n);
    });
  } else if constexpr (kPairs == Pairs::kNeighbours) {
    for_each_vector(D, [&](int64_t i, int64_t n) {
      const Vec a = in(i, n);
      out(i, a * load(cos + i, n) + swap_neighbours(a) * load(sin + i, n), n);
    });
  } else {
    for_each_vector(D, [&](int64_t i, int64_t n) { out(i, in(i, n), n); });
  }
}

// Sizes, and strides in elements, of heads (B, T, H, D).
struct Layout {
  int64_t B, T, H, D, of_batch, of_position, of_head, of_element;
  int64_t positions() const { return B * T; }
  // Where a position begins.
  int64_t at(int64_t position) const { return position / T * of_batch + position % T * of_position; }
};
Layout layout_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "rotary: takes (B, T, H, D)");
  return {x.size(0), x.size(1), x.size(2), x.size(3), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}
// Of packed heads (B, T, n D).
Layout packed_layout_of(const Tensor& x, int64_t n) {
  STD_TORCH_CHECK(x.dim() == 3 && n > 0 && x.size(2) % n == 0, "rotary_qkv: takes (B, T, ", n, " D)");
  const int64_t D = x.size(2) / n;
  return {x.size(0), x.size(1), n, D, x.stride(0), x.stride(1), D * x.stride(2), x.stride(2)};
}

// cos and sin, (T, D/2) or (B, T, D/2) fp32, or neither.
struct Tables {
  std::optional<Tensor> cos_owner, sin_owner;  // keep the memory alive
  const float *cos = nullptr, *sin = nullptr;
  int64_t of_batch = 0;  // elements between two sequences' rows
};
Tables tables_of(const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, const Layout& x) {
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "cos: expected with sin, or neither");
  if (!cos) return {};
  for (const auto& t : {*cos, *sin}) {
    const int64_t dim = t.dim();
    STD_TORCH_CHECK(
        t.is_cpu() && t.scalar_type() == ScalarType::Float && (dim == 2 || (dim == 3 && t.size(0) == x.B)) &&
            t.size(dim - 2) == x.T && 2 * t.size(dim - 1) == x.D && dim == cos->dim(),
        "cos, sin: expected (", x.T, ", ", x.D, " / 2) or (", x.B, ", ", x.T, ", ", x.D, " / 2), float32 on the CPU");
  }
  const Tensor c = dense(*cos), s = dense(*sin);
  return {c, s, data<float>(c), data<float>(s), cos->dim() == 3 ? x.T * x.D / 2 : 0};
}

// Calls body with the constant of the pairs that `tables` turn.
template <class Body>
void with_pairs(const Tables& tables, bool interleaved, Body&& body) {
  if (!tables.cos) return body(std::integral_constant<Pairs, Pairs::kNone>{});
  if (interleaved) return body(std::integral_constant<Pairs, Pairs::kNeighbours>{});
  return body(std::integral_constant<Pairs, Pairs::kHalves>{});
}

// The factors of one position, for all of its heads. Halves: D/2 of cos and of sin. Neighbours: D of cos, each twice,
// and D of sin, the first of a pair with its sign changed. With `inverse` those of the negative angle.
template <Pairs kPairs>
class Factors {
 public:
  // `T`: positions. `inverse_squares`: whether 1 / (cos^2 + sin^2) is needed too.
  Factors(const Tables& tables, int64_t T, int64_t D, bool inverse, bool inverse_squares = false)
      : tables_(tables),
        T_(T),
        half_(D / 2),
        sign_(inverse ? -1.0f : 1.0f),
        buffer_(2 * D),
        inverse_squares_(inverse_squares ? D : 0, 1.0f) {}

  void go_to(int64_t position) {
    if constexpr (kPairs == Pairs::kNone) return;
    const int64_t row = position / T_ * tables_.of_batch + position % T_ * half_;
    const float *cos = tables_.cos + row, *sin = tables_.sin + row;
    float *c = buffer_.data(), *s = c + 2 * half_;
    for (int64_t i = 0; i < half_; ++i) {
      if constexpr (kPairs == Pairs::kHalves) {
        c[i] = cos[i];
        s[i] = sign_ * sin[i];
      } else {
        c[2 * i] = c[2 * i + 1] = cos[i];
        s[2 * i] = -sign_ * sin[i];
        s[2 * i + 1] = sign_ * sin[i];
      }
    }
    for (int64_t i = 0; i < static_cast<int64_t>(inverse_squares_.size()) / 2; ++i) {
      const float inverse = 1.0f / (cos[i] * cos[i] + sin[i] * sin[i]);
      inverse_squares_[kPairs == Pairs::kHalves ? i : 2 * i] = inverse;
      inverse_squares_[kPairs == Pairs::kHalves ? half_ + i : 2 * i + 1] = inverse;
    }
  }

  const float* cos() const { return buffer_.data(); }
  const float* sin() const { return buffer_.data() + 2 * half_; }
  const float* inverse_squares() const { return inverse_squares_.data(); }  // one for each of the D elements

 private:
  const Tables& tables_;
  int64_t T_, half_;
  float sign_;
  std::vector<float> buffer_, inverse_squares_;
};

// The D elements of a head, contiguous: where they lie, or else copied to `buffer`.
template <class T>
const T* gathered(const T* head, int64_t stride, int64_t D, T* buffer) {
  if (stride == 1) return head;
  for (int64_t i = 0; i < D; ++i) buffer[i] = head[i * stride];
  return buffer;
}
// Where D contiguous elements can be written that scatter() then brings to `head`.
template <class T>
T* place_for(T* head, int64_t stride, T* buffer) {
  return stride == 1 ? head : buffer;
}
template <class T>
void scatter(const T* from, T* head, int64_t stride, int64_t D) {
  if (stride == 1) return;  // written there already
  for (int64_t i = 0; i < D; ++i) head[i * stride] = from[i];
}

// Copies the heads of a position, which begins at `from` and `to`, from `first` on.
template <class T>
void copy_rest(const T* from, const Layout& a, T* to, const Layout& b, int64_t first) {
  from += first * a.of_head;
  to += first * b.of_head;
  if (a.of_element == 1 && a.of_head == a.D && b.of_element == 1 && b.of_head == b.D) {
    std::memcpy(to, from, (a.H - first) * a.D * sizeof(T));
    return;
  }
  for (int64_t h = 0; h < a.H - first; ++h)
    for (int64_t i = 0; i < a.D; ++i) to[h * b.of_head + i * b.of_element] = from[h * a.of_head + i * a.of_element];
}

int64_t position_grain(const Layout& x) { return 1 + kElementsPerTask / std::max<int64_t>(1, x.H * x.D); }

// ---- forward ----

// 1 / sqrt(mean(x^2) + eps) of a head.
template <class T>
FASTGPT_INLINE float rstd_of(const T* x, int64_t D, float eps) {
  Vec squares{};
  for_each_vector(D, [&](int64_t i, int64_t n) {
    const Vec a = load(x + i, n);
    squares += a * a;
  });
  return 1.0f / std::sqrt(sum(squares) / D + eps);
}

// One head: y, which may be x, is x * scale * weight turned. weight: (D), or null for ones.
template <class T, Pairs kPairs>
__attribute__((noinline)) void turn_head(
    const T* x, const float* cos, const float* sin, const float* weight, float scale, int64_t D, T* y) {
  if (weight)
    turn<kPairs>(
        cos, sin, D, [&](int64_t i, int64_t n) { return load(x + i, n) * scale * load(weight + i, n); },
        [&](int64_t i, Vec value, int64_t n) { store(y + i, value, n); });
  else
    turn<kPairs>(
        cos, sin, D, [&](int64_t i, int64_t n) { return load(x + i, n) * scale; },
        [&](int64_t i, Vec value, int64_t n) { store(y + i, value, n); });
}

// y, which may be x: its first n_turned heads are those of x, normalised if there is an rstd, (B, T, n_turned) fp32,
// which is then written, and turned. The other heads are copied. weight: (D), or null for ones.
template <class T, Pairs kPairs>
void forward(
    const T* x, const Layout& from, T* y, const Layout& to, int64_t n_turned, const Tables& tables, bool inverse,
    const float* weight, float* rstd, float eps) {
  torch::stable::parallel_for(0, from.positions(), position_grain(from), [&](int64_t begin, int64_t end) {
    Factors<kPairs> factors(tables, from.T, from.D, inverse);
    std::vector<T> buffer(from.D);
    for (int64_t p = begin; p < end; ++p) {
      factors.go_to(p);
      const T* heads = x + from.at(p);
      T* results = y + to.at(p);
      // first the statistics of all heads: the CPU computes several at a time, as none waits for another
      for (int64_t h = 0; rstd && h < n_turned; ++h) {
        const T* head = gathered(heads + h * from.of_head, from.of_element, from.D, buffer.data());
        rstd[p * n_turned + h] = rstd_of(head, from.D, eps);
      }
      for (int64_t h = 0; h < n_turned; ++h) {
        const T* head = gathered(heads + h * from.of_head, from.of_element, from.D, buffer.data());
        const float scale = rstd ? rstd[p * n_turned + h] : 1.0f;
        T *there = results + h * to.of_head, *result = place_for(there, to.of_element, buffer.data());
        turn_head<T, kPairs>(head, factors.cos(), factors.sin(), weight, scale, from.D, result);
        scatter(result, there, to.of_element, from.D);
      }
      if (n_turned < from.H) copy_rest(heads, from, results, to, n_turned);
    }
  });
}

// The same of tensors. x and y: (B, T, H, D) by their layouts.
void forward(
    const Tensor& x, const Layout& from, const Tensor& y, const Layout& to, int64_t n_turned,
    const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, bool interleaved, bool inverse,
    const std::optional<Tensor>& weight_in, const Tensor* rstd, double eps) {
  const Tables tables = tables_of(cos, sin, from);
  const auto weight = to_floats(weight_in);
  STD_TORCH_CHECK(!weight_in || weight_in->numel() == from.D, "weight: expected ", from.D, " elements");
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    with_pairs(tables, interleaved, [&](auto pairs) {
      forward<T, decltype(pairs)::value>(
          data<T>(x), from, data<T>(y), to, n_turned, tables, inverse, weight_in ? weight.data() : nullptr,
          rstd ? data<float>(*rstd) : nullptr, eps);
    });
  });
}

// x: (B, T, H, D), any strides. cos, sin: (T, D/2) or (B, T, D/2) fp32. Returns (B, T, H, D), contiguous.
Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved, bool inverse) {
  const Tensor y = empty(sizes_of(x), x.scalar_type());
  forward(x, layout_of(x), y, layout_of(y), x.size(2), cos, sin, interleaved, inverse, std::nullopt, nullptr, 0.0);
  return y;
}

void rotary_(Tensor x, const Tensor& cos, const Tensor& sin, bool interleaved, bool inverse) {
  const Layout heads = layout_of(x);
  forward(x, heads, x, heads, heads.H, cos, sin, interleaved, inverse, std::nullopt, nullptr, 0.0);
}

// The same after an RMS norm of each head. weight: (D). Returns y, contiguous, and rstd, (B, T, H) fp32.
std::tuple<Tensor, Tensor> rms_norm_rotary(
    const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& cos,
    const std::optional<Tensor>& sin, double eps, bool interleaved) {
  const Layout heads = layout_of(x);
  const Tensor y = empty(sizes_of(x), x.scalar_type()), rstd = empty({heads.B, heads.T, heads.H}, ScalarType::Float);
  forward(x, heads, y, layout_of(y), heads.H, cos, sin, interleaved, false, weight, &rstd, eps);
  return {y, rstd};
}

Tensor rms_norm_rotary_(
    Tensor x, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, double eps, bool interleaved) {
  const Layout heads = layout_of(x);
  const Tensor rstd = empty({heads.B, heads.T, heads.H}, ScalarType::Float);
  forward(x, heads, x, heads, heads.H, cos, sin, interleaved, false, std::nullopt, &rstd, eps);
  return rstd;
}

// qkv: (B, T, (n_head + 2 n_kv_head) D), any strides. Returns q and k turned beside v, contiguous, and rstd, (B, T,
// n_head + n_kv_head) fp32, empty without qk_norm.
std::tuple<Tensor, Tensor> rotary_qkv(
    const Tensor& qkv, int64_t n_head, int64_t n_kv_head, const std::optional<Tensor>& cos,
    const std::optional<Tensor>& sin, bool qk_norm, double eps, bool interleaved) {
  const int64_t n = n_head + 2 * n_kv_head, n_turned = n_head + n_kv_head;
  const Layout heads = packed_layout_of(qkv, n);
  const Tensor out = empty(sizes_of(qkv), qkv.scalar_type());
  const Tensor rstd = qk_norm ? empty({heads.B, heads.T, n_turned}, ScalarType::Float) : empty({0}, ScalarType::Float);
  forward(
      qkv, heads, out, packed_layout_of(out, n), n_turned, cos, sin, interleaved, false, std::nullopt,
      qk_norm ? &rstd : nullptr, eps);
  return {out, rstd};
}

// ---- the gradient, from the result ----

// The mean of the products of two heads.
template <class T>
FASTGPT_INLINE float mean_product(const T* a, const T* b, int64_t D) {
  Vec products{};
  for_each_vector(D, [&](int64_t i, int64_t n) { products += load(a + i, n) * load(b + i, n); });
  return sum(products) / D;
}

// Of a head without a weight. With R for the rotation, y = R xhat and g = R' dy:
//   dx = rstd (g - xhat mean(g xhat)),  where the mean is that of dy y, and xhat = R' y / (cos^2 + sin^2).
// dx may be dy.
template <class T, Pairs kPairs>
void backward_from_result(
    const T* dy, const T* y, const float* cos, const float* sin, const float* inverse_squares, float mean, float rstd,
    int64_t D, T* dx) {
  turn<kPairs>(
      cos, sin, D,
      [&](int64_t i, int64_t n) { return load(dy + i, n) - load(y + i, n) * (load(inverse_squares + i, n) * mean); },
      [&](int64_t i, Vec value, int64_t n) { store(dx + i, value * rstd, n); });
}

// dy, y and dx, which may be dy, by their layouts. rstd: (B, T, n_turned) fp32. Heads from n_turned on are copied.
void backward_from_result(
    const Tensor& dy, const Layout& of_dy, const Tensor& y, const Layout& of_y, const Tensor& dx, const Layout& of_dx,
    int64_t n_turned, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, const Tensor& rstd_in,
    bool interleaved) {
  const Tables tables = tables_of(cos, sin, of_dy);
  const Tensor rstd = dense(rstd_in);
  STD_TORCH_CHECK(rstd.numel() == of_dy.positions() * n_turned, "rstd: expected one number for each head");
  dispatch(dy.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T *from = data<T>(dy), *result = data<T>(y);
    T* to = data<T>(dx);
    const float* scales = data<float>(rstd);
    with_pairs(tables, interleaved, [&](auto pairs) {
      constexpr Pairs kPairs = decltype(pairs)::value;
      torch::stable::parallel_for(0, of_dy.positions(), position_grain(of_dy), [&](int64_t begin, int64_t end) {
        const int64_t D = of_dy.D;
        Factors<kPairs> factors(tables, of_dy.T, D, true, true);
        std::vector<T> buffer(2 * D);
        std::vector<float> means(n_turned);
        for (int64_t p = begin; p < end; ++p) {
          factors.go_to(p);
          const T *grads = from + of_dy.at(p), *results = result + of_y.at(p);
          T* dxs = to + of_dx.at(p);
          const auto grad_at = [&](int64_t h) {
            return gathered(grads + h * of_dy.of_head, of_dy.of_element, D, buffer.data());
          };
          const auto result_at = [&](int64_t h) {
            return gathered(results + h * of_y.of_head, of_y.of_element, D, buffer.data() + D);
          };
          for (int64_t h = 0; h < n_turned; ++h) means[h] = mean_product(grad_at(h), result_at(h), D);
          for (int64_t h = 0; h < n_turned; ++h) {
            const T *grad = grad_at(h), *head = result_at(h);
            T *there = dxs + h * of_dx.of_head, *place = place_for(there, of_dx.of_element, buffer.data());
            backward_from_result<T, kPairs>(
                grad, head, factors.cos(), factors.sin(), factors.inverse_squares(), means[h], scales[p * n_turned + h],
                D, place);
            scatter(place, there, of_dx.of_element, D);
          }
          if (n_turned < of_dy.H) copy_rest(grads, of_dy, dxs, of_dx, n_turned);
        }
      });
    });
  });
}

// dy: (B, T, H, D), any strides; dx afterwards. y: the forward's result. rstd: (B, T, H) fp32.
void rms_norm_rotary_backward_(
    Tensor dy, const Tensor& y, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, const Tensor& rstd,
    bool interleaved) {
  const Layout heads = layout_of(dy);
  backward_from_result(dy, heads, y, layout_of(y), dy, heads, heads.H, cos, sin, rstd, interleaved);
}

// dout: (B, T, (n_head + 2 n_kv_head) D), any strides. out, rstd: what the forward returned, or neither without the
// norm.
Tensor rotary_qkv_backward(
    const Tensor& dout, const std::optional<Tensor>& out, const std::optional<Tensor>& rstd, int64_t n_head,
    int64_t n_kv_head, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, bool interleaved) {
  const int64_t n = n_head + 2 * n_kv_head, n_turned = n_head + n_kv_head;
  const Tensor dqkv = empty(sizes_of(dout), dout.scalar_type());
  const Layout from = packed_layout_of(dout, n), to = packed_layout_of(dqkv, n);
  if (out && rstd)
    backward_from_result(dout, from, *out, packed_layout_of(*out, n), dqkv, to, n_turned, cos, sin, *rstd, interleaved);
  else
    forward(dout, from, dqkv, to, n_turned, cos, sin, interleaved, true, std::nullopt, nullptr, 0.0);
  return dqkv;
}

// ---- the gradient, from the input ----

// Of a head. With g = R' dy: dweight += g xhat, and with h = g weight: dx = rstd (h - xhat mean(h xhat)). weight: (D),
// or null for ones. dweight: (D) fp32, or null. scratch: D fp32.
template <class T, Pairs kPairs>
void backward_from_input(
    const T* dy, const T* x, const float* cos, const float* sin, const float* weight, float rstd, int64_t D, T* dx,
    float* dweight, float* scratch) {
  Vec products{};
  turn<kPairs>(
      cos, sin, D, [&](int64_t i, int64_t n) { return load(dy + i, n); },
      [&](int64_t i, Vec g, int64_t n) {
        const Vec normal = load(x + i, n) * rstd;
        if (dweight) {
          store(dweight + i, load(dweight + i, n) + g * normal, n);
          g *= load(weight + i, n);
        }
        products += g * normal;
        store(scratch + i, g, n);
      });
  const float mean = sum(products) / D;
  for_each_vector(D, [&](int64_t i, int64_t n) {
    const Vec normal = load(x + i, n) * rstd;
    store(dx + i, (load(scratch + i, n) - normal * mean) * rstd, n);
  });
}

// dy, x: (B, T, H, D), any strides. weight: (D). rstd: (B, T, H) fp32. weight_main_grad: (D) fp32, added to. Returns
// dx, contiguous, and dweight (D), empty without a weight or if it was added to the main_grad.
std::tuple<Tensor, Tensor> rms_norm_rotary_backward(
    const Tensor& dy, const Tensor& x, const std::optional<Tensor>& weight_in, const std::optional<Tensor>& cos,
    const std::optional<Tensor>& sin, const Tensor& rstd_in, bool interleaved,
    std::optional<Tensor> weight_main_grad_in) {
  const Layout of_dy = layout_of(dy), of_x = layout_of(x);
  const int64_t H = of_x.H, D = of_x.D;
  const Tables tables = tables_of(cos, sin, of_x);
  const Tensor rstd = dense(rstd_in);
  STD_TORCH_CHECK(rstd.numel() == of_x.positions() * H, "rstd: expected one number for each head");
  const auto weight = to_floats(weight_in);
  STD_TORCH_CHECK(!weight_in || weight_in->numel() == D, "weight: expected ", D, " elements");
  float* main_grad = weight_in ? main_grad_of(weight_main_grad_in, D, "weight_main_grad") : nullptr;
  const Tensor dx = empty(sizes_of(x), x.scalar_type());
  const Tensor dweight = empty({weight_in && !main_grad ? D : 0}, x.scalar_type());
  const int64_t per_share = std::max<int64_t>(1, kHeadsPerShare / std::max<int64_t>(1, H));
  const int64_t shares = (of_x.positions() + per_share - 1) / per_share;
  std::vector<float> partials(weight_in ? shares * D : 0);
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T *from = data<T>(dy), *input = data<T>(x);
    T* to = data<T>(dx);
    const float* scales = data<float>(rstd);
    with_pairs(tables, interleaved, [&](auto pairs) {
      constexpr Pairs kPairs = decltype(pairs)::value;
      torch::stable::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
        Factors<kPairs> factors(tables, of_x.T, D, true);
        std::vector<T> buffer(2 * D);
        std::vector<float> scratch(D);
        for (int64_t p = first * per_share; p < std::min(last * per_share, of_x.positions()); ++p) {
          factors.go_to(p);
          float* sums = weight_in ? partials.data() + p / per_share * D : nullptr;
          const T *grads = from + of_dy.at(p), *heads = input + of_x.at(p);
          for (int64_t h = 0; h < H; ++h)
            backward_from_input<T, kPairs>(
                gathered(grads + h * of_dy.of_head, of_dy.of_element, D, buffer.data()),
                gathered(heads + h * of_x.of_head, of_x.of_element, D, buffer.data() + D), factors.cos(), factors.sin(),
                weight.data(), scales[p * H + h], D, to + (p * H + h) * D, sums, scratch.data());
        }
      });
    });
    if (!weight_in) return;
    // the shares are added in order
    for_each_vector(D, [&](int64_t i, int64_t n) {
      Vec total{};
      for (int64_t share = 0; share < shares; ++share) total += load(partials.data() + share * D + i, n);
      deliver(total, main_grad ? main_grad + i : nullptr, data<T>(dweight) + i, n);
    });
  });
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("rotary", TORCH_BOX(&rotary));
  m.impl("rotary_", TORCH_BOX(&rotary_));
  m.impl("rms_norm_rotary", TORCH_BOX(&rms_norm_rotary));
  m.impl("rms_norm_rotary_", TORCH_BOX(&rms_norm_rotary_));
  m.impl("rms_norm_rotary_backward", TORCH_BOX(&rms_norm_rotary_backward));
  m.impl("rms_norm_rotary_backward_", TORCH_BOX(&rms_norm_rotary_backward_));
  m.impl("rotary_qkv", TORCH_BOX(&rotary_qkv));
  m.impl("rotary_qkv_backward", TORCH_BOX(&rotary_qkv_backward));
}

}  // namespace fastgpt
