// Cross-entropy of rows of logits against integer targets: loss = logsumexp(logits) - logits[target], and its variants
// with capped logits, a z-loss, smoothed labels and class weights (the formula is in fastgpt/kernels/ops.py).
// A row whose target is ignore_index has loss 0 and gradient 0.
#include <stdexcept>
#include <string>

#include "tensor.h"

namespace fastgpt {
namespace {

// ---- the variants of the loss that change the loops over a row; each has its own loops ----

// Capped logits, and their derivatives by the logits.
struct Capped {
  Vec value, slope;
};

// The logits as they are.
struct Uncapped {
  static constexpr bool kCaps = false;
  FASTGPT_INLINE Vec operator()(Vec logits) const { return logits; }
};

// cap tanh(logits / cap). It must have the same bits wherever it is computed, because differences of equal numbers are
// taken: hence a division, and no product whose result is added at once, which the compiler might fuse here and not
// there.
struct SoftCap {
  static constexpr bool kCaps = true;
  float cap;
  explicit SoftCap(float softcap) : cap(softcap) {}
  FASTGPT_INLINE Capped with_slope(Vec logits) const {
    const Tanh tanh = tanh_of_half_nonpositive((logits > Vec{} ? -logits : logits) / (0.5f * cap));
    const Vec negative = tanh.value * cap;
    return {logits > Vec{} ? -negative : negative, tanh.derivative};
  }
  FASTGPT_INLINE Vec operator()(Vec logits) const { return with_slope(logits).value; }
};

// Which classes the labels are smoothed over: none, all alike, or all by their weights.
struct Sharp {
  static constexpr bool kSmooths = false;
};
struct SmoothAlike {
  static constexpr bool kSmooths = true;
  FASTGPT_INLINE Vec operator()(int64_t, int64_t) const { return broadcast(1.0f); }
};
struct SmoothWeighted {
  static constexpr bool kSmooths = true;
  const float* weight;
  FASTGPT_INLINE Vec operator()(int64_t i, int64_t n) const { return load(weight + i, n); }
};

// The options of a call for V classes.
class Options {
 public:
  Options(double softcap, double z_loss, double label_smoothing, const std::optional<Tensor>& class_weight, int64_t V)
      : z_loss(z_loss),
        spread(label_smoothing / V),
        softcap_(softcap),
        sharp_(1.0 - label_smoothing),
        weight_(to_floats(class_weight)) {
    double total = weight_.empty() ? V : 0.0;
    for (float weight : weight_) total += weight;
    smoothed = spread * total;
  }

  float z_loss;    // the factor of lse**2
  float spread;    // the share of a smoothed label that each class gets, before its weight
  float smoothed;  // the sum of these shares

  float weight_of(int64_t target) const { return weight_.empty() ? 1.0f : weight_[target]; }
  // What the target gets directly.
  float of_target(int64_t target) const { return sharp_ * weight_of(target); }

  // Calls body(cap, smooth) with the two types that the options call for.
  template <class Body>
  void dispatch(Body&& body) const {
    if (softcap_ != 0.0)
      with_smoothing(SoftCap(softcap_), body);
    else
      with_smoothing(Uncapped{}, body);
  }

 private:
  template <class Cap, class Body>
  void with_smoothing(const Cap& cap, Body& body) const {
    if (spread == 0.0f) return body(cap, Sharp{});
    if (weight_.empty()) return body(cap, SmoothAlike{});
    body(cap, SmoothWeighted{weight_.data()});
  }

  double softcap_;
  float sharp_;
  std::vector<float> weight_;
};

// ---- a row ----

// A capped number.
template <class Cap, class T>
float capped(const Cap& cap, T logit) {
  return cap(broadcast(static_cast<float>(logit)))[0];
}

// The largest of V logits.
template <class T>
float row_max(const T* logits, int64_t V) {
  Vec running = broadcast(-INFINITY);
  for_each_vector(
      V, [&](int64_t i, int64_t n) { running = max(running, keep_first(load(logits + i, n), n, -INFINITY)); });
  return max(running);
}

// Over V capped logits z, whose maximum is `top`: the sum of exp(z - top), of which no term exceeds 1, and if labels
// are smoothed that of weight (top - z). `block` is a multiple of the lanes, or V.
constexpr int64_t kBlock = 2048;
struct Sums {
  float exp, below;
};
template <class T, class Cap, class Smooth>
Sums row_sums(const T* logits, const Cap& cap, const Smooth& smooth, float top, int64_t block, int64_t V) {
  Vec total{}, total_below{};
  for (int64_t begin = 0; begin < V; begin += block) {
    Vec exp{}, below{};
    for_each_vector(std::min(block, V - begin), [&](int64_t i, int64_t n) {
      const Vec z = cap(load(logits + begin + i, n));
      exp += keep_first(exp_nonpositive(z - top), n);
      if constexpr (Smooth::kSmooths) below += keep_first((top - z) * smooth(begin + i, n), n);
    });
    total += exp;
    total_below += below;
  }
  return {sum(total), sum(total_below)};
}

// The logarithms of a row, and its loss.
struct RowLoss {
  float lse, loss;
};
template <class T, class Cap, class Smooth>
RowLoss row_loss(
    const T* logits, int64_t target, bool counts, const Options& options, const Cap& cap, const Smooth& smooth,
    int64_t V) {
  const float top = capped(cap, row_max(logits, V));  // the cap keeps the order
  // Terms added up in blocks lose fewer digits than in one sum, which the loss without options is, and stays.
  const bool in_blocks = Cap::kCaps || Smooth::kSmooths || options.z_loss != 0.0f;
  const Sums sums = row_sums(logits, cap, smooth, top, in_blocks ? kBlock : V, V);
  const float log_sum = std::log(sums.exp), lse = top + log_sum;
  if (!counts) return {lse, 0.0f};
  // Where the loss is small, top - at_target is exact; lse - at_target would keep the rounding error of lse.
  float loss = options.of_target(target) * ((top - capped(cap, logits[target])) + log_sum);
  if constexpr (Smooth::kSmooths) loss += options.spread * sums.below + options.smoothed * log_sum;
  if (options.z_loss != 0.0f) loss += options.z_loss * lse * lse;
  return {lse, loss};
}

// Gradient of `scale` times the loss, V elements. grad may be logits. With p the softmax of the capped logits z,
//   d loss / d z = (of_target + smoothed + 2 z_loss lse) p - of_target onehot(target) - spread weight.
// At the target the parts of 1 cancel where p is nearly 1, and the z-loss's part, which remains, is added last.
template <class T, class Cap, class Smooth>
void gradient_row(
    const T* logits, int64_t target, float lse, float scale, const Options& options, const Cap& cap,
    const Smooth& smooth, int64_t V, T* grad) {
  const float of_target = options.of_target(target);
  float factor = of_target;
  if constexpr (Smooth::kSmooths) factor += options.smoothed;
  const float of_lse = options.z_loss != 0.0f ? 2.0f * options.z_loss * lse : 0.0f;
  // The logit is read before the loop, which may overwrite it. 1 is subtracted before the result is rounded to T.
  const float logit = static_cast<float>(logits[target]);
  float label = of_target;
  if constexpr (Smooth::kSmooths) label += options.spread * options.weight_of(target);
  const float p = std::exp(capped(cap, logit) - lse);
  float at_target = factor * p - label;
  if (of_lse != 0.0f) at_target += of_lse * p;
  at_target *= scale;
  if constexpr (Cap::kCaps) at_target *= cap.with_slope(broadcast(logit)).slope[0];
  const float of_softmax = (factor + of_lse) * scale, spread = options.spread * scale;
  for_each_vector(V, [&](int64_t i, int64_t n) {
    const Vec x = load(logits + i, n);
    const auto derivative_by = [&](Vec z) {
      const Vec gradient = exp_nonpositive(z - lse) * of_softmax;
      if constexpr (Smooth::kSmooths) return gradient - smooth(i, n) * spread;
      return gradient;
    };
    if constexpr (Cap::kCaps) {
      const Capped capped = cap.with_slope(x);
      store(grad + i, derivative_by(capped.value) * capped.slope, n);
    } else {
      store(grad + i, derivative_by(x), n);
    }
  });
  grad[target] = static_cast<T>(at_target);
}

// Raises if a target is neither ignore_index nor in [0, V). Called before the parallel loop, because an error raised
// inside it would lose its message.
void check_targets(const Tensor& targets, int64_t ignore_index, int64_t V) {
  for (int64_t row = 0; row < targets.size(0); ++row) {
    const int64_t target = data<int64_t>(targets)[row];
    if (target != ignore_index && (target < 0 || target >= V))
      throw std::runtime_error(  // STD_TORCH_CHECK's message would begin with this file's name
          "targets: " + std::to_string(target) + " is outside the " + std::to_string(V) + " classes");
  }
}

// ---- the operators; the options' meaning is in ops.py ----

// logits: (N, V), any strides. targets: (N) int64. Returns loss and logsumexp of each row, (N) fp32.
std::tuple<Tensor, Tensor> cross_entropy(
    const Tensor& logits_in, const Tensor& targets_in, int64_t ignore_index, double softcap, double z_loss,
    double label_smoothing, const std::optional<Tensor>& class_weight) {
  const Tensor logits = dense(logits_in), targets = dense(targets_in);
  const int64_t N = logits.size(0), V = logits.size(1);
  check_targets(targets, ignore_index, V);
  const Options options(softcap, z_loss, label_smoothing, class_weight, V);
  Tensor losses = empty({N}, ScalarType::Float), lse = empty({N}, ScalarType::Float);
  dispatch(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    options.dispatch([&](const auto& cap, const auto& smooth) {
      torch::stable::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t target = data<int64_t>(targets)[row];
          const RowLoss found =
              row_loss(data<T>(logits) + row * V, target, target != ignore_index, options, cap, smooth, V);
          data<float>(lse)[row] = found.lse;
          data<float>(losses)[row] = found.loss;
        }
      });
    });
  });
  return {losses, lse};
}

// dlosses: (N) fp32. logits: (N, V), any strides. targets: (N) int64. lse: (N) fp32. Returns the gradient, (N, V).
Tensor cross_entropy_backward(
    const Tensor& dlosses_in, const Tensor& logits_in, const Tensor& targets_in, const Tensor& lse,
    int64_t ignore_index, double softcap, double z_loss, double label_smoothing,
    const std::optional<Tensor>& class_weight) {
  const Tensor dlosses = dense(dlosses_in), logits = dense(logits_in), targets = dense(targets_in);
  const int64_t N = logits.size(0), V = logits.size(1);
  const Options options(softcap, z_loss, label_smoothing, class_weight, V);
  Tensor dlogits = empty({N, V}, logits.scalar_type());
  dispatch(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    options.dispatch([&](const auto& cap, const auto& smooth) {
      torch::stable::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          T* grad = data<T>(dlogits) + row * V;
          const int64_t target = data<int64_t>(targets)[row];
          if (target == ignore_index)
            std::memset(static_cast<void*>(grad), 0, V * sizeof(T));
          else
            gradient_row(
                data<T>(logits) + row * V, target, data<float>(lse)[row], data<float>(dlosses)[row], options, cap,
                smooth, V, grad);
        }
      });
    });
  });
  return dlogits;
}

// logits: (N, V), contiguous, overwritten by the gradient of sum(scale * losses). targets: (N) int64. scale: () or (N)
// fp32. Returns the losses, (N) fp32.
Tensor cross_entropy_(
    Tensor logits, const Tensor& targets_in, const Tensor& scale_in, int64_t ignore_index, double softcap,
    double z_loss, double label_smoothing, const std::optional<Tensor>& class_weight) {
  const Tensor targets = dense(targets_in), scale = dense(scale_in);
  const int64_t N = logits.size(0), V = logits.size(1), of_each_row = scale.dim();
  check_targets(targets, ignore_index, V);
  const Options options(softcap, z_loss, label_smoothing, class_weight, V);
  Tensor losses = empty({N}, ScalarType::Float);
  dispatch(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    options.dispatch([&](const auto& cap, const auto& smooth) {
      torch::stable::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          T* x = data<T>(logits) + row * V;
          const int64_t target = data<int64_t>(targets)[row];
          if (target == ignore_index) {
            std::memset(static_cast<void*>(x), 0, V * sizeof(T));
            data<float>(losses)[row] = 0.0f;
            continue;
          }
          const RowLoss found = row_loss(x, target, true, options, cap, smooth, V);
          data<float>(losses)[row] = found.loss;
          const float grad_scale = data<float>(scale)[row * of_each_row];
          gradient_row(x, target, found.lse, grad_scale, options, cap, smooth, V, x);
        }
      });
    });
  });
  return losses;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
  m.impl("cross_entropy_", TORCH_BOX(&cross_entropy_));
}

}  // namespace fastgpt
