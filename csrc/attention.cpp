// Scaled dot-product attention, forward and backward, in blocks that stay in cache: the T x T matrix of
// weights is never in memory. The forward keeps a running maximum and sum of each row (online softmax) and saves
// the logsumexp. The backward recomputes the weights from it.
// Dao et al., "FlashAttention", 2022; Dao, "FlashAttention-2", 2023.
#include "amx_attention.h"
#include "vector_attention.h"

namespace fastgpt {
namespace {

// AMX for bf16 where the CPU has it, vectors otherwise, and for few queries. lse: (n_heads, n_query).
template <class T>
void forward(const Problem& p, const Inputs<const T>& x, Heads<T> out, float* lse) {
  if (p.n_query < vectors::kFewQueries) return vectors::forward_few(p, x, out, lse);
#if defined(FASTGPT_AMX)
  if constexpr (std::is_same_v<T, BFloat16>)
    if (has_amx()) return amx::forward(p, x, out, lse);
#endif
  if (p.local()) return vectors::forward<T, true>(p, x, out, lse);
  vectors::forward<T, false>(p, x, out, lse);
}

template <class T>
void backward(
    const Problem& p, Heads<const T> dout, const Inputs<const T>& x, Heads<const T> out, const float* lse,
    const Inputs<T>& gradient) {
#if defined(FASTGPT_AMX)
  if constexpr (std::is_same_v<T, BFloat16>)
    if (has_amx()) return amx::backward(p, dout, x, out, lse, gradient);
#endif
  if (p.local()) return vectors::backward<T, true>(p, dout, x, out, lse, gradient);
  vectors::backward<T, false>(p, dout, x, out, lse, gradient);
}

// The options of all four operators that say what becomes of a score, as they are passed. window: 0 for none. softcap:
// 0 for none. documents: (B, 2, S) int32.
struct Options {
  bool causal;
  double scale, dropout_p;
  const std::optional<Tensor>& seed;
  int64_t window;
  double softcap;
  std::optional<Tensor> documents;

  Options(
      bool causal, double scale, double dropout_p, const std::optional<Tensor>& seed, int64_t window, double softcap,
      const std::optional<Tensor>& documents)
      : causal(causal), scale(scale), dropout_p(dropout_p), seed(seed), window(window), softcap(softcap) {
    if (documents) this->documents = dense(*documents);
  }

  // Of B batch entries, H heads of T queries and Hk heads of S keys.
  Problem problem(int64_t B, int64_t H, int64_t Hk, int64_t T, int64_t S, int64_t D) const {
    const int32_t* bounds = nullptr;
    if (window > 0 || documents) {
      STD_TORCH_CHECK(causal && T <= S, "causal: windows and documents need it, and as many keys as queries");
    }
    if (documents) {
      STD_TORCH_CHECK(
          documents->is_cpu() && documents->scalar_type() == ScalarType::Int && documents->numel() == B * 2 * S,
          "documents: expected (B, 2, S) int32 on the CPU");
      bounds = data<int32_t>(*documents);
    }
    return {
        B * H,
        H,
        H / Hk,
        T,
        S,
        D,
        round_up(D, kLanes),
        causal,
        static_cast<float>(scale),
        window,
        static_cast<float>(softcap),
        bounds,
        {dropout_p, seed}};
  }
};

// `t` itself if its last dimension is contiguous, otherwise a copy.
Tensor with_contiguous_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

// (B, H, T, D) laid out in memory as (B, T, H, D), the order in which a GPT reads it next.
Tensor empty_heads(const Tensor& like, int64_t T) {
  const int64_t B = like.size(0), H = like.size(1), D = like.size(3);
  return empty_strided({B, H, T, D}, {T * H * D, D, H * D, 1}, like.scalar_type());
}

// q: (B, H, T, D). k, v: (B, Hk, S, D); Hk divides H, S >= T if causal. Any strides. seed: () int64, present if
// dropout_p > 0. Returns out (B, H, T, D), laid out as (B, T, H, D), and lse (B, H, T) fp32.
std::tuple<Tensor, Tensor> attention(
    const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, bool causal, double scale, double dropout_p,
    const std::optional<Tensor>& seed, int64_t window, double softcap, const std::optional<Tensor>& documents) {
  const Tensor q = with_contiguous_rows(q_in), k = with_contiguous_rows(k_in), v = with_contiguous_rows(v_in);
  const int64_t B = q.size(0), H = q.size(1), T = q.size(2), D = q.size(3);
  const Options options(causal, scale, dropout_p, seed, window, softcap, documents);
  const Problem p = options.problem(B, H, k.size(1), T, k.size(2), D);
  Tensor out = empty_heads(q, T), lse = empty({B, H, T}, ScalarType::Float);
  dispatch(q.scalar_type(), [&](auto element) {
    using E = decltype(element);
    forward<E>(
        p, {heads_of<const E>(q), heads_of<const E>(k), heads_of<const E>(v)}, heads_of<E>(out), data<float>(lse));
  });
  return {out, lse};
}

// dout, out: (B, H, T, D). lse: (B, H, T) fp32, contiguous. The others as in the forward. Returns dq, dk and dv in the
// shapes of q, k and v, laid out as (B, T, H, D).
std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& dout_in, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& out_in,
    const Tensor& lse, bool causal, double scale, double dropout_p, const std::optional<Tensor>& seed,
    bool /*deterministic: always*/, int64_t window, double softcap, const std::optional<Tensor>& documents) {
  const Tensor dout = with_contiguous_rows(dout_in), out = with_contiguous_rows(out_in);
  const Tensor q = with_contiguous_rows(q_in), k = with_contiguous_rows(k_in), v = with_contiguous_rows(v_in);
  const int64_t B = q.size(0), H = q.size(1), T = q.size(2), D = q.size(3);
  const Options options(causal, scale, dropout_p, seed, window, softcap, documents);
  const Problem p = options.problem(B, H, k.size(1), T, k.size(2), D);
  Tensor dq = empty_heads(q, T), dk = empty_heads(k, p.n_key), dv = empty_heads(v, p.n_key);
  dispatch(q.scalar_type(), [&](auto element) {
    using E = decltype(element);
    backward<E>(
        p, heads_of<const E>(dout), {heads_of<const E>(q), heads_of<const E>(k), heads_of<const E>(v)},
        heads_of<const E>(out), data<float>(lse), {heads_of<E>(dq), heads_of<E>(dk), heads_of<E>(dv)});
  });
  return {dq, dk, dv};
}

// ---- the same on q, k and v packed side by side ----

// qkv: (B, T, (n_head + 2 n_kv_head) D), any strides; n_kv_head 0 stands for n_head. Returns out (B, T, n_head D) and
// lse (B, n_head, T) fp32.
std::tuple<Tensor, Tensor> attention_qkv(
    const Tensor& qkv_in, int64_t n_head, bool causal, double scale, double dropout_p,
    const std::optional<Tensor>& seed, int64_t n_kv_head, int64_t window, double softcap,
    const std::optional<Tensor>& documents) {
  const Tensor qkv = with_contiguous_rows(qkv_in);
  const int64_t Hk = n_kv_head > 0 ? n_kv_head : n_head;
  const int64_t B = qkv.size(0), T = qkv.size(1), D = qkv.size(2) / (n_head + 2 * Hk);
  const Options options(causal, scale, dropout_p, seed, window, softcap, documents);
  const Problem p = options.problem(B, n_head, Hk, T, T, D);
  Tensor out = empty({B, T, n_head * D}, qkv.scalar_type()), lse = empty({B, n_head, T}, ScalarType::Float);
  dispatch(qkv.scalar_type(), [&](auto element) {
    using E = decltype(element);
    forward<E>(
        p, inputs_of_packed<const E>(qkv, n_head, Hk, D), heads_of_packed<E>(out, 0, n_head, D), data<float>(lse));
  });
  return {out, lse};
}

// dout, out: (B, T, n_head D). qkv: as in the forward. lse: (B, n_head, T) fp32, contiguous. Returns the gradient of
// qkv, in its shape.
Tensor attention_qkv_backward(
    const Tensor& dout_in, const Tensor& qkv_in, const Tensor& out_in, const Tensor& lse, int64_t n_head, bool causal,
    double scale, double dropout_p, const std::optional<Tensor>& seed, bool /*deterministic: always*/,
    int64_t n_kv_head, int64_t window, double softcap, const std::optional<Tensor>& documents) {
  const Tensor dout = with_contiguous_rows(dout_in), qkv = with_contiguous_rows(qkv_in);
  const Tensor out = with_contiguous_rows(out_in);
  const int64_t Hk = n_kv_head > 0 ? n_kv_head : n_head;
  const int64_t B = qkv.size(0), T = qkv.size(1), D = qkv.size(2) / (n_head + 2 * Hk);
  const Options options(causal, scale, dropout_p, seed, window, softcap, documents);
  const Problem p = options.problem(B, n_head, Hk, T, T, D);
  Tensor dqkv = empty(sizes_of(qkv), qkv.scalar_type());
  dispatch(qkv.scalar_type(), [&](auto element) {
    using E = decltype(element);
    backward<E>(
        p, heads_of_packed<const E>(dout, 0, n_head, D), inputs_of_packed<const E>(qkv, n_head, Hk, D),
        heads_of_packed<const E>(out, 0, n_head, D), data<float>(lse), inputs_of_packed<E>(dqkv, n_head, Hk, D));
  });
  return dqkv;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("attention_qkv", TORCH_BOX(&attention_qkv));
  m.impl("attention_qkv_backward", TORCH_BOX(&attention_qkv_backward));
}

}  // namespace fastgpt
