// Vectors of floats as wide as the instruction set this file is compiled for, and the maths on them.
//
// Written in the vector extensions that GCC and Clang share, so one source serves AVX-512, AVX2 and NEON: setup.py
// compiles csrc/ once per instruction set, and fastgpt/kernels/cpp.py loads the library that this CPU can run.
// Arithmetic is fp32 whatever the tensors hold.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#if defined(__clang__)
#include <immintrin.h>
#else
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's header leaves vectors uninitialised on purpose
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
#endif

#include <torch/headeronly/util/BFloat16.h>

namespace fastgpt {

using BFloat16 = c10::BFloat16;

// fp32 lanes of a vector.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

#define FASTGPT_INLINE inline __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UintVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfwordVec __attribute__((vector_size(kLanes * 2)));
typedef uint64_t WideVec __attribute__((vector_size(kLanes * 8)));

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

FASTGPT_INLINE Vec broadcast(float value) { return Vec{} + value; }

FASTGPT_INLINE IntVec lane_index() {
  IntVec index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  return index;
}

FASTGPT_INLINE Vec as_float(IntVec bits) { return (Vec)bits; }
FASTGPT_INLINE IntVec as_int(Vec value) { return (IntVec)value; }

#if defined(__AVX512F__)  // one instruction; GCC may compile the other form to a comparison and a blend
FASTGPT_INLINE Vec max(Vec a, Vec b) { return _mm512_maskz_max_ps(0xffff, a, b); }
#else
FASTGPT_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
#endif
FASTGPT_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
FASTGPT_INLINE IntVec max(IntVec a, IntVec b) { return a > b ? a : b; }
FASTGPT_INLINE IntVec min(IntVec a, IntVec b) { return a < b ? a : b; }

// The first n lanes of `value`, `fill` in the others.
FASTGPT_INLINE Vec keep_first(Vec value, int64_t n, float fill = 0.0f) {
  if (n >= kLanes) return value;
  return lane_index() < static_cast<int32_t>(n) ? value : broadcast(fill);
}

// ---- memory: fp32, bf16 and 32-bit words, whole vectors or the first n lanes (missing lanes read as zero) ----

FASTGPT_INLINE Vec widen(HalfwordVec bits) {
#if defined(__AVX512F__)  // one instruction; GCC would widen each half of the vector and join them
  return as_float((IntVec)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)bits) << 16);
#else
  return as_float(__builtin_convertvector(bits, IntVec) << 16);
#endif
}

// Round to nearest, ties to even; a NaN stays a NaN. AVX512_BF16's instruction flushes subnormal numbers to zero.
FASTGPT_INLINE HalfwordVec narrow(Vec value) {
#if defined(__AVX512BF16__)
  return (HalfwordVec)_mm512_cvtneps_pbh((__m512)value);
#else
  const IntVec bits = as_int(value);
  // The upper 16 bits are kept. 0x7fff is just below half of their lowest bit; adding that bit sends ties to even.
  const UintVec rounded = (UintVec)bits + 0x7fff + (((UintVec)bits >> 16) & 1);
  const UintVec quiet_nan = UintVec{} + 0x7fc00000u;
  return __builtin_convertvector((value == value ? rounded : quiet_nan) >> 16, HalfwordVec);
#endif
}

FASTGPT_INLINE Vec load(const float* p) {
  Vec value;
  std::memcpy(&value, p, sizeof(Vec));
  return value;
}
FASTGPT_INLINE Vec load(const BFloat16* p) {
  HalfwordVec bits;
  std::memcpy(&bits, p, sizeof(HalfwordVec));
  return widen(bits);
}
FASTGPT_INLINE UintVec load(const uint32_t* p) {
  UintVec words;
  std::memcpy(&words, p, sizeof(UintVec));
  return words;
}
FASTGPT_INLINE void store(uint32_t* p, UintVec words) { std::memcpy(p, &words, sizeof(UintVec)); }
FASTGPT_INLINE void store(float* p, Vec value) { std::memcpy(p, &value, sizeof(Vec)); }
FASTGPT_INLINE void store(BFloat16* p, Vec value) {
  const HalfwordVec bits = narrow(value);
  std::memcpy(p, &bits, sizeof(HalfwordVec));
}

// Stores the first n values, which bf16 must hold exactly. Unlike narrow(), it keeps subnormal numbers.
FASTGPT_INLINE void store_exactly(BFloat16* p, Vec value, int64_t n) {
  const HalfwordVec bits = __builtin_convertvector((UintVec)value >> 16, HalfwordVec);
  std::memcpy(p, &bits, std::min<int64_t>(n, kLanes) * sizeof(BFloat16));
}

template <class T>
FASTGPT_INLINE Vec load(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  alignas(64) T lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class T>
FASTGPT_INLINE void store(T* p, Vec value, int64_t n) {
  if (n >= kLanes) return store(p, value);
  alignas(64) T lanes[kLanes];
  store(lanes, value);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

// Stores n values. A whole, aligned vector bypasses the caches: call fence() before another thread reads it.
FASTGPT_INLINE void stream(BFloat16* p, Vec value, int64_t n) {
#if defined(__AVX2__)
  const HalfwordVec bits = narrow(value);
  if (n == kLanes && reinterpret_cast<uintptr_t>(p) % sizeof(bits) == 0) {
#if defined(__AVX512F__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)bits);
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)bits);
#endif
    return;
  }
#endif
  store(p, value, n);
}
FASTGPT_INLINE void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// out[j * out_stride + i] = in[i * in_stride + j] for 4 x 4 elements of four bytes; strides in elements.
FASTGPT_INLINE void transpose_4x4(const void* in, int64_t in_stride, void* out, int64_t out_stride) {
  const auto* from = static_cast<const char*>(in);
  auto* to = static_cast<char*>(out);
#if defined(__x86_64__)
  __m128 row[4];
  for (int i = 0; i < 4; ++i) row[i] = _mm_loadu_ps(reinterpret_cast<const float*>(from + 4 * i * in_stride));
  _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
  for (int j = 0; j < 4; ++j) _mm_storeu_ps(reinterpret_cast<float*>(to + 4 * j * out_stride), row[j]);
#else
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < 4; ++i) std::memcpy(to + 4 * (j * out_stride + i), from + 4 * (i * in_stride + j), 4);
#endif
}

// Calls body(offset, lanes) over [0, n), a vector at a time. In the main loop `lanes` is the constant kLanes, so that
// load and store above fold to their whole-vector forms.
template <class Body>
FASTGPT_INLINE void for_each_vector(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, static_cast<int64_t>(kLanes));
  if (i < n) body(i, n - i);
}

// ---- reductions across lanes ----

// Lanes are added four at a time, in a fixed order, so that every compiler gives the same sum.
typedef float Quad __attribute__((vector_size(16)));
struct Quads {
  Quad at[kLanes / 4];
  explicit FASTGPT_INLINE Quads(Vec value) { std::memcpy(at, &value, sizeof(Vec)); }
};

FASTGPT_INLINE float sum(Vec value) {
  Quads quads(value);
  for (int i = 1; i < kLanes / 4; ++i) quads.at[0] += quads.at[i];
  const Quad q = quads.at[0];
  return (q[0] + q[1]) + (q[2] + q[3]);
}
FASTGPT_INLINE float max(Vec value) {
  Quads quads(value);
  for (int i = 1; i < kLanes / 4; ++i) quads.at[0] = quads.at[0] > quads.at[i] ? quads.at[0] : quads.at[i];
  const Quad q = quads.at[0];
  const float a = q[0] > q[1] ? q[0] : q[1], b = q[2] > q[3] ? q[2] : q[3];
  return a > b ? a : b;
}

FASTGPT_INLINE int32_t max(IntVec value) {
  int32_t largest = value[0];
  for (int i = 1; i < kLanes; ++i) largest = largest > value[i] ? largest : value[i];
  return largest;
}

// ---- maths ----

constexpr float kLog2e = 1.44269504088896341f;

// `value` is x rounded to an integer, `power` is 2**value. If x is NaN, `power` has arbitrary bits; a product of it
// with a NaN is still NaN.
struct Rounded {
  Vec value;
  Vec power;
};
FASTGPT_INLINE Rounded round(Vec x) {
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2**23: fp32 has no fraction bits at this size
  const Vec shifted = x + magic;             // its lowest bits are the integer; shifted left by 23 they are an exponent
  return {shifted - magic, as_float((IntVec)(((UintVec)shifted << 23) + 0x3f800000u))};
}

// e**x for x <= 0 (or slightly above), within 2 ulp; 0 below -87.33, where the result would be subnormal; NaN for NaN.
// e**x = 2**n e**r with r = x - n ln 2, so that no rounding of x log2(e) enters the result. ln 2 is taken as
// 0.693359375 - 2.12194440e-4: the first part has nine bits, so its product with n is exact (Cody and Waite, 1980).
// e**r is its Taylor series to degree 7, since |r| <= ln(2) / 2.
FASTGPT_INLINE Vec exp_nonpositive(Vec x) {
  const Rounded n = round(x * kLog2e);
  const Vec r = (x - n.value * 0.693359375f) + n.value * 2.12194440e-4f;
  Vec p = broadcast(1.98412698e-4f);
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 5.0e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return x < broadcast(-87.3365448f) ? Vec{} : p * n.power;
}

// tanh(x), within 3 ulp. Below 0.6 an odd polynomial, fitted by least squares to a relative error of 3e-9; from there
// on 1 - 2 / (1 + e**2|x|), written with e**-2|x|, whose subtraction would cancel below.
FASTGPT_INLINE Vec tanh(Vec x) {
  const Vec magnitude = x < Vec{} ? -x : x, square = x * x;
  Vec p = broadcast(-0.0058939453f);
  p = p * square + 0.0207946177f;
  p = p * square - 0.053783293f;
  p = p * square + 0.133319153f;
  p = p * square - 0.333332975f;
  const Vec small = x + x * square * p;
  const Vec e = exp_nonpositive(magnitude * -2.0f);
  const Vec large = (1.0f - e) / (1.0f + e);
  return magnitude < broadcast(0.6f) ? small : (x < Vec{} ? -large : large);
}

// s(x) = 1 / (1 + e**-x) and s' = s (1 - s), both from e = e**-|x|: s = 1 / (1 + e) or e / (1 + e), s' = e / (1 +
// e)**2. Neither subtracts, so neither cancels.
struct Sigmoid {
  Vec value, derivative;
};
FASTGPT_INLINE Sigmoid sigmoid(Vec x) {
  const Vec e = exp_nonpositive(x > Vec{} ? -x : x);
  const Vec inverse = 1.0f / (1.0f + e);
  return {(x > Vec{} ? broadcast(1.0f) : e) * inverse, e * inverse * inverse};
}

// tanh(x / 2) for x <= 0, within 3 ulp, and its derivative by x / 2, 1 - tanh**2 = 4 e / (1 + e)**2 with e = e**x.
// tanh = (e - 1) / (e + 1) would cancel for small x, so e - 1 is computed without e: with e = 2**n e**r as in
// exp_nonpositive, e - 1 = 2**n (e**r - 1) + (2**n - 1), and e**r - 1 is the Taylor series without its first term.
struct Tanh {
  Vec value, derivative;
};
FASTGPT_INLINE Tanh tanh_of_half_nonpositive(Vec x) {
  const Rounded n = round(x * kLog2e);
  const Vec r = (x - n.value * 0.693359375f) + n.value * 2.12194440e-4f;
  Vec p = broadcast(1.98412698e-4f);
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 5.0e-1f;
  p = (p * r) * r + r;
  const IntVec far = x < broadcast(-87.3365448f);  // e would be subnormal
  const Vec e = far ? Vec{} : p * n.power + n.power;
  const Vec e_minus_1 = far ? broadcast(-1.0f) : p * n.power + (n.power - 1.0f);
  const Vec inverse = 1.0f / (2.0f + e_minus_1);
  return {e_minus_1 * inverse, 4.0f * e * inverse * inverse};
}

// Phi(x), the standard normal distribution function, and its density phi, from one exponential. Abramowitz and Stegun
// 7.1.26 for erf: 1 - erf(z) = (a1 t + ... + a5 t^5) e**-z^2 with t = 1 / (1 + 0.3275911 z), z = |x| / sqrt(2). Its
// error in Phi is below 7.5e-8; with rounding, 4e-7. The left tail is computed directly, so it does not cancel.
struct Normal {
  Vec cdf, pdf;
};
FASTGPT_INLINE Normal normal(Vec x) {
  const Vec magnitude = (x < Vec{} ? -x : x);
  const Vec gauss = exp_nonpositive(x * x * -0.5f);
  const Vec t = 1.0f / (1.0f + 0.3275911f * 0.707106781186547524f * magnitude);
  Vec p = broadcast(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vec tail = 0.5f * p * t * gauss;
  return {x < Vec{} ? tail : 1.0f - tail, 0.398942280401432678f * gauss};
}

// Correctly rounded. The compiler turns the loop into one instruction.
FASTGPT_INLINE Vec sqrt(Vec x) {
  Vec root;
  for (int i = 0; i < kLanes; ++i) root[i] = std::sqrt(x[i]);
  return root;
}

}  // namespace fastgpt
