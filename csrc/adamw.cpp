// AdamW over a list of tensors, which may be one flat buffer, in one pass: gradient scale, decoupled weight
// decay, moments, update, and optionally a low-precision copy of the new parameter and a zeroed gradient. Moments
// may have 8 bits (moments_8bit.py explains the codes), and bf16 values may be rounded stochastically.
// Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
#include <algorithm>

#include "philox.h"
#include "tensor.h"

namespace fastgpt {
namespace {

// Elements of a task. Small enough that a list of small tensors occupies all threads. A constant, so that the norm is
// summed in the same order for any number of threads.
constexpr int64_t kChunk = 1 << 15;

// Elements that share a scale of 8-bit moments. An update keeps them in the cache, because the scale depends on all of
// them.
constexpr int64_t kBlock = 256;
static_assert(kChunk % kBlock == 0 && kBlock % (4 * kLanes) == 0);

// How far ahead memory is prefetched, in elements. Unlike the hardware's prefetching, this does not stop at the end of
// a page.
constexpr int64_t kAhead = 256;

// Copies of more elements than this bypass the caches, which could not keep them until the next forward pass.
constexpr int64_t kKept = 4 << 20;

// Elements [begin, end) of one tensor of a list.
struct Chunk {
  size_t tensor;
  int64_t begin, end;
};

std::vector<Chunk> chunks_of(const std::vector<Tensor>& tensors) {
  std::vector<Chunk> chunks;
  for (size_t t = 0; t < tensors.size(); ++t)
    for (int64_t begin = 0; begin < tensors[t].numel(); begin += kChunk)
      chunks.push_back({t, begin, std::min(begin + kChunk, tensors[t].numel())});
  return chunks;
}

// x: n elements, contiguous.
template <class T>
double sum_of_squares(const T* x, int64_t n) {
  double total = 0.0;
  for (int64_t block = 0; block < n; block += 1024) {  // fp32 inside a block, fp64 between them
    Vec squares{};
    for_each_vector(std::min<int64_t>(1024, n - block), [&](int64_t i, int64_t lanes) {
      __builtin_prefetch(x + block + i + kAhead);
      const Vec value = load(x + block + i, lanes);
      squares += value * value;
    });
    total += sum(squares);
  }
  return total;
}

// grads: contiguous, any shapes. Returns the L2 norm of all of them taken as one vector, () fp32.
Tensor grad_norm(const std::vector<Tensor>& grads) {
  const auto chunks = chunks_of(grads);
  make_own(grads);
  std::vector<double> partials(chunks.size());
  torch::stable::parallel_for(0, chunks.size(), 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const auto [t, begin, end] = chunks[c];
      dispatch(grads[t].scalar_type(), [&, t = t, begin = begin, end = end](auto element) {
        partials[c] = sum_of_squares(data<decltype(element)>(grads[t]) + begin, end - begin);
      });
    }
  });
  double total = 0.0;
  for (const double partial : partials) total += partial;
  Tensor norm = empty({}, ScalarType::Float);
  *data<float>(norm) = static_cast<float>(std::sqrt(total));
  return norm;
}

// ---- random numbers ----

// A random word for each element of a block; fastgpt/kernels/philox.py says what its two halves are used for.
struct Words {
  alignas(64) uint32_t words[kBlock];

  void draw(uint64_t key, int64_t first, size_t tensor, uint32_t purpose) {
    for (int64_t i = 0; i < kBlock; i += 4 * kLanes) philox(key, first + i, tensor, purpose, words + i);
  }
  FASTGPT_INLINE IntVec upper_halves(int64_t i) const { return (IntVec)(load(words + i) >> 16); }
  FASTGPT_INLINE IntVec lower_halves(int64_t i) const { return (IntVec)(load(words + i) & 0xffff); }
};

template <class T>
constexpr bool is_bf16 = std::is_same_v<T, BFloat16>;

// Rounds to an fp32 that bf16 can hold. `random`, in [0, 2**16), is added to the bits of x, and the carry out of their
// lower half rounds up. A NaN is made quiet instead, because the carry could change all its bits.
FASTGPT_INLINE Vec round_stochastically(Vec x, IntVec random) {
  return x == x ? (Vec)(((UintVec)x + (UintVec)random) & 0xffff0000u) : (Vec)((UintVec)x | 0x00400000u);
}

// ---- moments ----
//
// A block is opened, each of its vectors is loaded and stored once, and the block is closed. random(i) returns numbers
// in [0, 2**16) for the vector at i.

// A moment of element type T. With `stochastic` a bf16 moment is rounded stochastically.
template <class T>
class PlainMoment {
 public:
  PlainMoment(T* values, bool stochastic) : values_(values), stochastic_(stochastic && is_bf16<T>) {}

  bool needs_random() const { return stochastic_; }
  void open_block(int64_t first, int64_t) { block_ = values_ + first; }
  FASTGPT_INLINE Vec load(int64_t i, int64_t lanes) const { return fastgpt::load(block_ + i, lanes); }
  FASTGPT_INLINE void fetch(int64_t i) const { __builtin_prefetch(block_ + i); }
  template <class Random>
  FASTGPT_INLINE void store(int64_t i, Vec value, int64_t lanes, const Random& random) {
    if constexpr (is_bf16<T>)
      if (stochastic_) return store_exactly(block_ + i, round_stochastically(value, random(i)), lanes);
    fastgpt::store(block_ + i, value, lanes);
  }
  template <class Random>
  void close_block(const Random&) {}

 private:
  T *values_, *block_ = nullptr;
  bool stochastic_;
};

constexpr int kCodeShift = 20;  // a code keeps three of fp32's 23 fraction bits

// The smallest and the largest biased exponent of a scale. Below 33 the least of 255 codes would not be a normal fp32;
// 255 is infinity's.
constexpr int32_t kLeastScale = 33, kLargestScale = 254;

// A moment of 8-bit codes; moments_8bit.py explains the arithmetic. kLargest is the largest code without its sign: 127
// for exp_avg, whose highest bit is the sign, and 255 for exp_avg_sq, which has no sign. scales: one fp32 for each
// block.
template <int32_t kLargest>
class CodedMoment {
 public:
  CodedMoment(uint8_t* codes, float* scales) : codes_(codes), scales_(scales) {}

  bool needs_random() const { return true; }

  void open_block(int64_t first, int64_t n) {
    first_ = first;
    n_ = n;
    alignas(64) uint32_t codes[kBlock];  // widened in a loop, because GCC takes a vector of bytes apart
    for (int64_t i = 0; i < n; ++i) codes[i] = codes_[first + i];
    const IntVec zero = zero_of(as_int(broadcast(scales_[first / kBlock])));
    for_each_vector(n, [&](int64_t i, int64_t) {
      const IntVec code = (IntVec)fastgpt::load(codes + i), magnitude = code & kLargest;
      const Vec value = magnitude > 0 ? as_float((zero + magnitude) << kCodeShift) : Vec{};
      fastgpt::store(block_ + i, code > kLargest ? -value : value);
    });
  }

  FASTGPT_INLINE Vec load(int64_t i, int64_t lanes) const { return keep_first(fastgpt::load(block_ + i), lanes); }
  FASTGPT_INLINE void fetch(int64_t) const {}
  template <class Random>
  FASTGPT_INLINE void store(int64_t i, Vec value, int64_t lanes, const Random&) {
    fastgpt::store(block_ + i, value);
    largest_ = max(largest_, magnitude_bits(keep_first(value, lanes)));
  }

  template <class Random>
  void close_block(const Random& random) {
    const int32_t exponent = std::clamp((max(largest_) >> 23) + 1, kLeastScale, kLargestScale);
    const IntVec scale = IntVec{} + (exponent << 23);
    const IntVec zero = zero_of(scale), smallest = (zero + 1) << kCodeShift;
    const Vec unit = as_float(smallest) * 0x1p-16f;
    alignas(64) uint32_t codes[kBlock];
    for_each_vector(n_, [&](int64_t i, int64_t) {
      const Vec value = fastgpt::load(block_ + i);
      const IntVec bits = min(magnitude_bits(value), scale), up = random(i);
      IntVec code = ((bits + (up << 4)) >> kCodeShift) - zero;
      if constexpr (kLargest == 127) {
        const IntVec is_up = __builtin_convertvector(up, Vec) * unit < as_float(bits);
        code = bits < smallest ? is_up & 1 : code;
        code = (value < Vec{}) & (code > 0) ? code + 128 : code;
      } else {
        code = bits > 0 ? max(code, IntVec{} + 1) : IntVec{};
      }
      fastgpt::store(codes + i, (UintVec)code);
    });
    for (int64_t i = 0; i < n_; ++i) codes_[first_ + i] = static_cast<uint8_t>(codes[i]);
    scales_[first_ / kBlock] = as_float(scale)[0];
    largest_ = IntVec{};
  }

 private:
  FASTGPT_INLINE static IntVec magnitude_bits(Vec x) { return as_int(x) & 0x7fffffff; }
  FASTGPT_INLINE static IntVec zero_of(IntVec scale) { return (scale >> kCodeShift) - kLargest; }

  uint8_t* codes_;
  float* scales_;
  int64_t first_ = 0, n_ = 0;
  alignas(64) float block_[kBlock];
  IntVec largest_{};
};

// ---- the update ----

// Each is computed in fp64 and rounded once. Computed in fp32, 1 - beta2 would have a relative error of 1e-4.
struct Coefficients {
  float grad_scale, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, inverse_sqrt_correction2, eps;
};

Coefficients coefficients(
    const Tensor& step, const Tensor& lr_, const std::optional<Tensor>& grad_scale, double beta1, double beta2,
    double eps, double weight_decay) {
  const double t = *data<float>(step), lr = *data<double>(lr_);
  return {
      grad_scale ? *data<float>(*grad_scale) : 1.0f,
      static_cast<float>(1.0 - lr * weight_decay),
      static_cast<float>(1.0 - beta1),
      static_cast<float>(beta2),
      static_cast<float>(1.0 - beta2),
      static_cast<float>(lr / (1.0 - std::pow(beta1, t))),
      static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, t))),
      static_cast<float>(eps),
  };
}

template <class P>
FASTGPT_INLINE void store_parameter(P* at, Vec p, int64_t lanes, bool stochastic) {
  if constexpr (is_bf16<P>)
    if (stochastic) return store_exactly(at, p, lanes);
  store(at, p, lanes);
}

struct Options {
  bool zero_grad, stochastic;
  uint64_t key;  // of the random numbers, if there are any
};

// One chunk, block by block:
//   m += (g - m) (1 - beta1),  v = beta2 v + (1 - beta2) g^2,
//   p = decay p - step_size m / (sqrt(v) / sqrt(correction2) + eps).
// param, grad and copy are a whole tensor's elements; copy, bf16, may be null.
template <class P, class G, class ExpAvg, class ExpAvgSq>
void update(
    const Chunk& chunk, P* param, G* grad, ExpAvg exp_avg, ExpAvgSq exp_avg_sq, BFloat16* copy, bool past_caches,
    const Coefficients& c, const Options& options) {
  const bool stochastic = options.stochastic && is_bf16<P>;
  Words for_moments, for_param;
  const auto for_exp_avg = [&](int64_t i) { return for_moments.upper_halves(i); };
  const auto for_exp_avg_sq = [&](int64_t i) { return for_moments.lower_halves(i); };
  for (int64_t first = chunk.begin; first < chunk.end; first += kBlock) {
    const int64_t n = std::min(kBlock, chunk.end - first);
    if (exp_avg.needs_random()) for_moments.draw(options.key, first, chunk.tensor, 0);  // purpose 0: moments
    if (stochastic) for_param.draw(options.key, first, chunk.tensor, 1);                // purpose 1: parameters
    exp_avg.open_block(first, n);
    exp_avg_sq.open_block(first, n);
    for_each_vector(n, [&](int64_t k, int64_t lanes) {
      const int64_t i = first + k;
      __builtin_prefetch(grad + i + kAhead);
      __builtin_prefetch(param + i + kAhead);
      exp_avg.fetch(k + kAhead);
      exp_avg_sq.fetch(k + kAhead);
      const Vec g = load(grad + i, lanes) * c.grad_scale;
      const Vec old_m = exp_avg.load(k, lanes);
      const Vec m = old_m + (g - old_m) * c.one_minus_beta1;
      const Vec v = exp_avg_sq.load(k, lanes) * c.beta2 + g * g * c.one_minus_beta2;
      Vec p = load(param + i, lanes) * c.decay;
      p -= c.step_size * m / (sqrt(v) * c.inverse_sqrt_correction2 + c.eps);
      exp_avg.store(k, m, lanes, for_exp_avg);
      exp_avg_sq.store(k, v, lanes, for_exp_avg_sq);
      if (stochastic) p = round_stochastically(p, for_param.lower_halves(k));
      store_parameter(param + i, p, lanes, stochastic);
      if (copy && past_caches)
        stream(copy + i, p, lanes);
      else if (copy)
        store(copy + i, p, lanes);
      if (options.zero_grad) store(grad + i, Vec{}, lanes);
    });
    exp_avg.close_block(for_exp_avg);
    exp_avg_sq.close_block(for_exp_avg_sq);
  }
}

// Updates all chunks of all tensors. moments_of(T{}, i) returns both moments of tensor i, whose parameter has elements
// of type T.
template <class MomentsOf>
void update_all(
    const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& copies,
    const Coefficients& c, const Options& options, const MomentsOf& moments_of) {
  const auto chunks = chunks_of(params);
  for (const auto* list : {&params, &grads, &copies}) make_own(*list);
  int64_t copied = 0;
  for (const Tensor& copy : copies) copied += copy.numel();
  torch::stable::parallel_for(0, chunks.size(), 1, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      const size_t i = chunks[k].tensor;
      dispatch(params[i].scalar_type(), [&](auto element) {
        dispatch(grads[i].scalar_type(), [&](auto grad_element) {
          const auto [exp_avg, exp_avg_sq] = moments_of(element, i);
          update(
              chunks[k], data<decltype(element)>(params[i]), data<decltype(grad_element)>(grads[i]), exp_avg,
              exp_avg_sq, copies.empty() ? nullptr : data<BFloat16>(copies[i]), copied > kKept, c, options);
        });
      });
    }
    fence();  // after stream()
  });
}

auto plain_moments(const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs, bool stochastic) {
  return [&, stochastic](auto element, size_t i) {
    using T = decltype(element);
    const auto of = [&](const Tensor& moment) { return PlainMoment<T>(data<T>(moment), stochastic); };
    return std::pair(of(exp_avgs[i]), of(exp_avg_sqs[i]));
  };
}

// Returns whether found_inf is set, so that this step is skipped. If it is, and zero_grad too, sets the gradients to
// zero.
bool is_skipped(const std::optional<Tensor>& found_inf, const std::vector<Tensor>& grads, bool zero_grad) {
  if (!found_inf || *data<float>(*found_inf) == 0.0f) return false;
  if (zero_grad)
    for (Tensor grad : grads) torch::stable::zero_(grad);
  return true;
}

// params, grads, exp_avgs, exp_avg_sqs: lists of contiguous tensors, one shape for each index; params and moments of
// one dtype, grads of any. copies: bf16, or an empty list. step: () fp32. lr: () fp64. grad_scale and
// found_inf: () fp32.
void adamw_(
    const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& exp_avgs,
    const std::vector<Tensor>& exp_avg_sqs, const std::vector<Tensor>& copies, const Tensor& step, const Tensor& lr,
    const std::optional<Tensor>& grad_scale, double beta1, double beta2, double eps, double weight_decay,
    bool zero_grad, const std::optional<Tensor>& found_inf) {
  if (is_skipped(found_inf, grads, zero_grad)) return;
  const auto c = coefficients(step, lr, grad_scale, beta1, beta2, eps, weight_decay);
  for (const auto* list : {&exp_avgs, &exp_avg_sqs}) make_own(*list);
  update_all(params, grads, copies, c, {zero_grad, false, 0}, plain_moments(exp_avgs, exp_avg_sqs, false));
}

// As adamw_. exp_avgs, exp_avg_sqs: uint8 codes if there are scales. exp_avg_scales, exp_avg_sq_scales: lists of
// (ceil(numel / 256)) fp32, or empty lists. seed: () int64.
void adamw_8bit_(
    const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& exp_avgs,
    const std::vector<Tensor>& exp_avg_sqs, const std::vector<Tensor>& exp_avg_scales,
    const std::vector<Tensor>& exp_avg_sq_scales, const std::vector<Tensor>& copies, const Tensor& step,
    const Tensor& lr, const std::optional<Tensor>& grad_scale, const Tensor& seed, double beta1, double beta2,
    double eps, double weight_decay, bool zero_grad, bool stochastic_rounding, const std::optional<Tensor>& found_inf) {
  if (is_skipped(found_inf, grads, zero_grad)) return;
  const auto c = coefficients(step, lr, grad_scale, beta1, beta2, eps, weight_decay);
  const auto key = static_cast<uint64_t>(*data<int64_t>(seed) + static_cast<int64_t>(*data<float>(step)));
  for (const auto* list : {&exp_avgs, &exp_avg_sqs, &exp_avg_scales, &exp_avg_sq_scales}) make_own(*list);
  const Options options{zero_grad, stochastic_rounding, key};
  if (exp_avg_scales.empty())
    return update_all(params, grads, copies, c, options, plain_moments(exp_avgs, exp_avg_sqs, stochastic_rounding));
  update_all(params, grads, copies, c, options, [&](auto, size_t i) {
    return std::pair(
        CodedMoment<127>(data<uint8_t>(exp_avgs[i]), data<float>(exp_avg_scales[i])),
        CodedMoment<255>(data<uint8_t>(exp_avg_sqs[i]), data<float>(exp_avg_sq_scales[i])));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("grad_norm", TORCH_BOX(&grad_norm));
  m.impl("adamw_", TORCH_BOX(&adamw_));
  m.impl("adamw_8bit_", TORCH_BOX(&adamw_8bit_));
}

}  // namespace fastgpt
