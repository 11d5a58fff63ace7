// bfloat16 numbers as vectors of floats, and how products of an element are formed.
//
// Loads widen, stores round to the nearest even. Matrix products take their right operands packed: plain
// elements multiply one pair of numbers at a time; where the processor has dot products of bfloat16 numbers
// (`depth` 2), two neighbours along the summed dimension are multiplied and added at once, so that packed
// operands hold pairs of rows, [row / 2][column][2].
#pragma once

#include "cpu/mbinvres.h"
#include "cpu/mbinvres_simd.h"

namespace tfnas::TFNAS_ISA {

#if defined(__AVX512BF16__)
TFNAS_INLINE __m512 load(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
TFNAS_INLINE __m256 load_half(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
TFNAS_INLINE void store(BFloat16* p, __m512 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
}
TFNAS_INLINE void store(BFloat16* p, __m256 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), (__m128i)_mm256_cvtneps_pbh(v));
}
#else
// The compiler's own vectors of N numbers, whatever registers there are.
template <int N>
struct Bits;
template <>
struct Bits<8> {
  using Short = uint16_t __attribute__((vector_size(16)));
  using Word = uint32_t __attribute__((vector_size(32)));
};
template <>
struct Bits<16> {
  using Short = uint16_t __attribute__((vector_size(32)));
  using Word = uint32_t __attribute__((vector_size(64)));
};
template <int N>
TFNAS_INLINE typename Bits<N>::Word widened(const BFloat16* p) {
  return __builtin_convertvector(load_vector<typename Bits<N>::Short>(p), typename Bits<N>::Word) << 16;
}
template <int N, class V>
TFNAS_INLINE void store_rounded(BFloat16* p, V v) {
  using Word = typename Bits<N>::Word;
  const Word bits = (Word)v, rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const Word number = (Word)((bits & 0x7fffffff) <= 0x7f800000);  // all ones, or zero for a NaN
  const Word kept = ((rounded & number) | ((bits | 0x400000) & ~number)) >> 16;
  const auto result = __builtin_convertvector(kept, typename Bits<N>::Short);
  std::memcpy(p, &result, sizeof result);
}
TFNAS_INLINE Simd<float>::H load_half(const BFloat16* p) { return (Simd<float>::H)widened<8>(p); }
TFNAS_INLINE void store(BFloat16* p, Simd<float>::H v) { store_rounded<8>(p, v); }
#if defined(__AVX2__) && !defined(__AVX512F__)
TFNAS_INLINE Pair load(const BFloat16* p) { return {load_half(p), load_half(p + 8)}; }
TFNAS_INLINE void store(BFloat16* p, Pair v) {
  store(p, v.lo);
  store(p + 8, v.hi);
}
#else
TFNAS_INLINE Simd<float>::V load(const BFloat16* p) { return (Simd<float>::V)widened<16>(p); }
TFNAS_INLINE void store(BFloat16* p, Simd<float>::V v) { store_rounded<16>(p, v); }
#endif
#endif

TFNAS_INLINE float to_compute(float value) { return value; }
TFNAS_INLINE double to_compute(double value) { return value; }
TFNAS_INLINE float to_compute(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
// Rounded as `store` rounds.
template <class E, class T>
TFNAS_INLINE E to_element(T value) {
  if constexpr (sizeof(E) == sizeof(T)) {
    return value;
  } else {
    E elements[8];
    store(elements, splat_half(value));
    return elements[0];
  }
}

// Products of one number each.
template <class E>
struct Product {
  using T = Compute<E>;
  using V = typename Simd<T>::V;
  using H = typename Simd<T>::H;
  using Packed = T;  // of a right operand
  static constexpr int depth = 1;

  template <class P>
  static TFNAS_INLINE V right(const P* p) {
    return load(p);
  }
  template <class P>
  static TFNAS_INLINE H right_half(const P* p) {
    return load_half(p);
  }
  static TFNAS_INLINE V left(const E* p) { return splat(to_compute(*p)); }
  static TFNAS_INLINE H left_half(const E* p) { return splat_half(to_compute(*p)); }
  static TFNAS_INLINE V add(V left, V right, V sum) { return fma(left, right, sum); }
  static TFNAS_INLINE H add(H left, H right, H sum) { return fma(left, right, sum); }
};

#if defined(__AVX512BF16__)
// Products of two neighbours, added: a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1].
template <>
struct Product<BFloat16> {
  using T = float;
  using V = __m512;
  using H = __m256;
  using Packed = BFloat16;
  static constexpr int depth = 2;

  static TFNAS_INLINE __m512i right(const BFloat16* p) { return _mm512_loadu_si512(p); }
  static TFNAS_INLINE __m256i right_half(const BFloat16* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static TFNAS_INLINE int32_t pair(const BFloat16* p) {
    int32_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return bits;
  }
  static TFNAS_INLINE __m512i left(const BFloat16* p) { return _mm512_set1_epi32(pair(p)); }
  static TFNAS_INLINE __m256i left_half(const BFloat16* p) { return _mm256_set1_epi32(pair(p)); }
  static TFNAS_INLINE V add(__m512i left, __m512i right, V sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
  }
  static TFNAS_INLINE H add(__m256i left, __m256i right, H sum) {
    return _mm256_dpbf16_ps(sum, (__m256bh)left, (__m256bh)right);
  }
};

// (low[i], high[i]) as neighbours.
TFNAS_INLINE void store_pairs(BFloat16* p, __m512 low, __m512 high) {
  const __m512i first = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low));
  const __m512i second = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high));
  _mm512_storeu_si512(p, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
}
TFNAS_INLINE void store_pairs(BFloat16* p, __m256 low, __m256 high) {
  const __m256i first = _mm256_cvtepu16_epi32((__m128i)_mm256_cvtneps_pbh(low));
  const __m256i second = _mm256_cvtepu16_epi32((__m128i)_mm256_cvtneps_pbh(high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_or_si256(first, _mm256_slli_epi32(second, 16)));
}
#endif

template <class E>
using Packed = typename Product<E>::Packed;
template <class E>
constexpr int64_t kDepth = Product<E>::depth;

// Two rows of a right operand (`high` is not read at depth 1): V or H.
template <class E, class V>
TFNAS_INLINE void store_packed(Packed<E>* p, V low, V high) {
  if constexpr (kDepth<E> == 1) {
    (void)high;
    store(p, low);
  } else {
    store_pairs(p, low, high);
  }
}

}  // namespace tfnas::TFNAS_ISA
