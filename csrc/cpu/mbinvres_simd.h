// Vectors of 16 channels ("lanes") and half vectors of 8, over AVX-512, AVX2 or plain C++ loops.
//
// The wide tensors of the block live in planes of 16 channels whatever the instruction set, so that every set
// shares one layout. Only register blocking differs (`Blocking`). This file is included by files compiled
// once per instruction set and keeps everything in that set's namespace; it must not pull in inline functions
// of the standard library.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#define TFNAS_INLINE inline __attribute__((always_inline))

namespace tfnas::TFNAS_ISA {

constexpr int64_t kLanes = 16;

// ---------------------------------------------------------------- the compiler's own vectors: any processor,
// any type GCC and Clang lower them to whatever registers there are. float64 uses them everywhere, float
// elsewhere only.
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC's own intrinsics
using Float16 = float __attribute__((vector_size(64)));
using Float8 = float __attribute__((vector_size(32)));
using Double16 = double __attribute__((vector_size(128)));
using Double8 = double __attribute__((vector_size(64)));

template <class V, class T>
TFNAS_INLINE V load_vector(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
// max(bound, value), min(bound, value): a NaN in `b` stays. above: 1 where a > b, else 0.
#define TFNAS_VECTOR_OPERATIONS(V, T)                                  \
  TFNAS_INLINE void store(T* p, V v) { std::memcpy(p, &v, sizeof v); } \
  TFNAS_INLINE V add(V a, V b) { return a + b; }                       \
  TFNAS_INLINE V sub(V a, V b) { return a - b; }                       \
  TFNAS_INLINE V mul(V a, V b) { return a * b; }                       \
  TFNAS_INLINE V fma(V a, V b, V c) { return a * b + c; }              \
  TFNAS_INLINE V max(V a, V b) { return a > b ? a : b; }               \
  TFNAS_INLINE V min(V a, V b) { return a < b ? a : b; }               \
  TFNAS_INLINE V above(V a, V b) { return a > b ? V{} + T(1) : V{}; }
TFNAS_VECTOR_OPERATIONS(Double16, double)
TFNAS_VECTOR_OPERATIONS(Double8, double)
#if !defined(__AVX2__)
TFNAS_VECTOR_OPERATIONS(Float16, float)
TFNAS_VECTOR_OPERATIONS(Float8, float)
#endif
#undef TFNAS_VECTOR_OPERATIONS

TFNAS_INLINE Double16 sigmoid(Double16 h) {
  Double16 r;
  for (int i = 0; i < 16; ++i) r[i] = 1.0 / (1.0 + __builtin_exp(-h[i]));
  return r;
}

// The numbers 2^r = sum c_i r^i on [-0.5, 0.5] (Chebyshev fit, relative error 8e-8).
constexpr float kExp2[6] = {1.000000075f,    6.931471880e-1f, 2.402210749e-1f,
                            5.550357114e-2f, 9.676031918e-3f, 1.339086336e-3f};
constexpr float kMinusLog2E = -1.44269504f;

template <class T>
struct Simd;

template <>
struct Simd<double> {
  using V = Double16;
  using H = Double8;
};
TFNAS_INLINE Double16 load(const double* p) { return load_vector<Double16>(p); }
TFNAS_INLINE Double8 load_half(const double* p) { return load_vector<Double8>(p); }
TFNAS_INLINE Double16 splat(double f) { return Double16{} + f; }
TFNAS_INLINE Double8 splat_half(double f) { return Double8{} + f; }

#if defined(__AVX512F__)
// ---------------------------------------------------------------- AVX-512: one register a plane
template <>
struct Simd<float> {
  using V = __m512;
  using H = __m256;
};
TFNAS_INLINE __m512 load(const float* p) { return _mm512_loadu_ps(p); }
TFNAS_INLINE void store(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
TFNAS_INLINE __m512 splat(float f) { return _mm512_set1_ps(f); }
TFNAS_INLINE __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
TFNAS_INLINE __m512 sub(__m512 a, __m512 b) { return _mm512_sub_ps(a, b); }
TFNAS_INLINE __m512 mul(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
TFNAS_INLINE __m512 max(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
TFNAS_INLINE __m512 min(__m512 a, __m512 b) { return _mm512_min_ps(a, b); }
TFNAS_INLINE __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
TFNAS_INLINE __m512 above(__m512 a, __m512 b) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), splat(1.f));
}
TFNAS_INLINE __m512 sigmoid(__m512 h) {
  const __m512 t = min(splat(126.f), mul(h, splat(kMinusLog2E)));
  const __m512 n = _mm512_roundscale_ps(t, 8), r = sub(t, n);
  __m512 p = fma(r, splat(kExp2[5]), splat(kExp2[4]));
  for (int i = 3; i >= 0; --i) p = fma(r, p, splat(kExp2[i]));
  const __m512 d = add(_mm512_scalef_ps(p, n), splat(1.f));
  const __m512 y = _mm512_rcp14_ps(d);  // 14 bits, then one Newton step
  return mul(y, _mm512_fnmadd_ps(d, y, splat(2.f)));
}
// out [16][16] = the transpose of 16 rows of 16, `stride` apart.
TFNAS_INLINE void transpose_tile(const float* rows, int64_t stride, float* out) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = load(rows + i * stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d lo = _mm512_castps_pd(b[i + j]), hi = _mm512_castps_pd(b[i + j + 2]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
    }
  }
  // a[4 q + r] now holds, in its lane l of four, column 4 l + r of rows 4 q .. 4 q + 3
  for (int r = 0; r < 4; ++r) {
    const __m512 even_low = _mm512_shuffle_f32x4(a[r], a[4 + r], 0x88),
                 odd_low = _mm512_shuffle_f32x4(a[r], a[4 + r], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(a[8 + r], a[12 + r], 0x88),
                 odd_high = _mm512_shuffle_f32x4(a[8 + r], a[12 + r], 0xdd);
    store(out + r * kLanes, _mm512_shuffle_f32x4(even_low, even_high, 0x88));
    store(out + (8 + r) * kLanes, _mm512_shuffle_f32x4(even_low, even_high, 0xdd));
    store(out + (4 + r) * kLanes, _mm512_shuffle_f32x4(odd_low, odd_high, 0x88));
    store(out + (12 + r) * kLanes, _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd));
  }
}
#elif defined(__AVX2__)
// ---------------------------------------------------------------- AVX2: two registers a plane
struct Pair {
  __m256 lo, hi;
};
template <>
struct Simd<float> {
  using V = Pair;
  using H = __m256;
};
TFNAS_INLINE Pair load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
TFNAS_INLINE void store(float* p, Pair v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
TFNAS_INLINE Pair splat(float f) { return {_mm256_set1_ps(f), _mm256_set1_ps(f)}; }
TFNAS_INLINE Pair add(Pair a, Pair b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
TFNAS_INLINE Pair sub(Pair a, Pair b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
TFNAS_INLINE Pair mul(Pair a, Pair b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
TFNAS_INLINE Pair max(Pair a, Pair b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
TFNAS_INLINE Pair min(Pair a, Pair b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
TFNAS_INLINE Pair fma(Pair a, Pair b, Pair c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
TFNAS_INLINE Pair above(Pair a, Pair b) {
  const __m256 one = _mm256_set1_ps(1.f);
  return {_mm256_and_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ), one),
          _mm256_and_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ), one)};
}
TFNAS_INLINE __m256 sigmoid8(__m256 h) {
  const __m256 scaled = _mm256_mul_ps(h, _mm256_set1_ps(kMinusLog2E));
  const __m256 t = _mm256_max_ps(_mm256_set1_ps(-126.f), _mm256_min_ps(_mm256_set1_ps(126.f), scaled));
  const __m256 n = _mm256_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm256_sub_ps(t, n);
  __m256 p = _mm256_fmadd_ps(r, _mm256_set1_ps(kExp2[5]), _mm256_set1_ps(kExp2[4]));
  for (int i = 3; i >= 0; --i) p = _mm256_fmadd_ps(r, p, _mm256_set1_ps(kExp2[i]));
  const __m256i bits = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  p = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), bits));
  return _mm256_div_ps(_mm256_set1_ps(1.f), _mm256_add_ps(p, _mm256_set1_ps(1.f)));
}
TFNAS_INLINE Pair sigmoid(Pair h) { return {sigmoid8(h.lo), sigmoid8(h.hi)}; }
#else
// ---------------------------------------------------------------- any processor
template <>
struct Simd<float> {
  using V = Float16;
  using H = Float8;
};
TFNAS_INLINE Float16 load(const float* p) { return load_vector<Float16>(p); }
TFNAS_INLINE Float8 load_half(const float* p) { return load_vector<Float8>(p); }
TFNAS_INLINE Float16 splat(float f) { return Float16{} + f; }
TFNAS_INLINE Float8 splat_half(float f) { return Float8{} + f; }
TFNAS_INLINE Float16 sigmoid(Float16 h) {
  using Int16 = int32_t __attribute__((vector_size(64)));
  const Float16 scaled = h * kMinusLog2E, t = min(splat(126.f), max(splat(-126.f), scaled));
  const Int16 n = __builtin_convertvector(t + (t < 0 ? splat(-0.5f) : splat(0.5f)), Int16);
  const Float16 r = t - __builtin_convertvector(n, Float16);
  Float16 p = splat(kExp2[5]);
  for (int i = 4; i >= 0; --i) p = r * p + kExp2[i];
  return 1.f / (1.f + (Float16)((Int16)p + (n << 23)));  // a cast between vectors keeps the bits
}
#endif

#if defined(__AVX2__)
TFNAS_INLINE __m256 load_half(const float* p) { return _mm256_loadu_ps(p); }
TFNAS_INLINE void store(float* p, __m256 v) { _mm256_storeu_ps(p, v); }
TFNAS_INLINE __m256 splat_half(float f) { return _mm256_set1_ps(f); }
TFNAS_INLINE __m256 add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
TFNAS_INLINE __m256 sub(__m256 a, __m256 b) { return _mm256_sub_ps(a, b); }
TFNAS_INLINE __m256 mul(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
TFNAS_INLINE __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
#endif

// Where there is nothing better; the one for float with AVX-512 is above.
template <class T>
TFNAS_INLINE void transpose_tile(const T* rows, int64_t stride, T* out) {
  for (int64_t j = 0; j < kLanes; ++j)
    for (int64_t i = 0; i < kLanes; ++i) out[j * kLanes + i] = rows[i * stride + j];
}

// Rows and planes of a register tile, columns of a depthwise block.
template <class T>
struct Blocking {
#if defined(__AVX512F__)
  static constexpr bool wide_registers = sizeof(T) == 4;
#else
  static constexpr bool wide_registers = false;
#endif
  static constexpr int planes = wide_registers ? 3 : 1;
  static constexpr int columns = wide_registers ? 14 : 4;
#if defined(__AVX2__)
  static constexpr int tile_vectors = wide_registers ? 24 : (sizeof(T) == 4 ? 6 : 1);
#else
  static constexpr int tile_vectors = sizeof(T) == 4 ? 2 : 1;
#endif
};

template <class T>
constexpr TFNAS_INLINE T minimum(T a, T b) {
  return a < b ? a : b;
}
template <class T>
constexpr TFNAS_INLINE T maximum(T a, T b) {
  return a > b ? a : b;
}
constexpr TFNAS_INLINE int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

}  // namespace tfnas::TFNAS_ISA
