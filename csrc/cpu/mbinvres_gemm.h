// The three matrix products of the block, as register-blocked micro-kernels.
//
// Wide tensors are planes of 16 channels, [plane][pixel][16]; narrow ones are [pixel][channels], channels
// padded to multiples of 8. With wide tiles of P planes ("chunk") and M pixels:
//   expand_tile:   wide[m][16 P]  = narrow[m][K] B[K][16 P]            y1 = W1 x, dz = W3^T dy3
//   project_tile:  narrow[m][N]  (+)= wide[m][16 P] B[16 P][N]         y3 = W3 z, dx = W1^T dy1
//   outer_tile:    G[16 P][N]    += sum_m wide[m][16 P] narrow[m][N]   dW1, dW3 (mid channel first)
#pragma once

#include "cpu/mbinvres_simd.h"

namespace tfnas::TFNAS_ISA {

template <class T, int MR, int P>
TFNAS_INLINE void expand_rows(const T* a, int64_t lda, int64_t k_count, const T* b, int64_t b_plane, T* c,
                              int64_t c_plane) {
  using V = typename Simd<T>::V;
  V acc[MR][P];
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < P; ++v) acc[i][v] = splat(T(0));
  for (int64_t k = 0; k < k_count; ++k) {
    V right[P];
    for (int v = 0; v < P; ++v) right[v] = load(b + v * b_plane + k * kLanes);
    for (int i = 0; i < MR; ++i) {
      const V left = splat(a[i * lda + k]);
      for (int v = 0; v < P; ++v) acc[i][v] = fma(left, right[v], acc[i][v]);
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < P; ++v) store(c + v * c_plane + i * kLanes, acc[i][v]);
}

template <class T, int P>
inline void expand_planes(int64_t m_count, const T* a, int64_t lda, int64_t k_count, const T* b,
                          int64_t b_plane, T* c, int64_t c_plane) {
  constexpr int MR = Blocking<T>::tile_vectors / P;
  int64_t m = 0;
  for (; m + MR <= m_count; m += MR)
    expand_rows<T, MR, P>(a + m * lda, lda, k_count, b, b_plane, c + m * kLanes, c_plane);
  if constexpr (MR > 4) {
    for (; m + 4 <= m_count; m += 4)
      expand_rows<T, 4, P>(a + m * lda, lda, k_count, b, b_plane, c + m * kLanes, c_plane);
  }
  for (; m < m_count; ++m)
    expand_rows<T, 1, P>(a + m * lda, lda, k_count, b, b_plane, c + m * kLanes, c_plane);
}

// b: [plane][k][16] with planes `b_plane` apart; c: [plane][m][16] with planes `c_plane` apart.
template <class T>
inline void expand_tile(int planes, int64_t m_count, const T* a, int64_t lda, int64_t k_count, const T* b,
                        int64_t b_plane, T* c, int64_t c_plane) {
  if constexpr (Blocking<T>::planes >= 3) {
    if (planes == 3) return expand_planes<T, 3>(m_count, a, lda, k_count, b, b_plane, c, c_plane);
    if (planes == 2) return expand_planes<T, 2>(m_count, a, lda, k_count, b, b_plane, c, c_plane);
  }
  expand_planes<T, 1>(m_count, a, lda, k_count, b, b_plane, c, c_plane);
}

// NV whole vectors and, with HALF, a half one: C_out of 24 and 40 need no padding to 16.
template <class T, int MR, int NV, bool HALF>
TFNAS_INLINE void project_rows(const T* a, int64_t a_plane, int64_t mids, const T* b, int64_t ldb, T* c,
                               int64_t ldc, bool accumulate) {
  using V = typename Simd<T>::V;
  using H = typename Simd<T>::H;
  V acc[MR][NV > 0 ? NV : 1];
  H half[MR];
  for (int i = 0; i < MR; ++i) {
    for (int v = 0; v < NV; ++v) acc[i][v] = accumulate ? load(c + i * ldc + v * kLanes) : splat(T(0));
    if constexpr (HALF) half[i] = accumulate ? load_half(c + i * ldc + NV * kLanes) : splat_half(T(0));
  }
  for (const T* left = a; mids > 0; mids -= kLanes, left += a_plane) {
    const int64_t depth = minimum(kLanes, mids);
    for (int64_t k = 0; k < depth; ++k, b += ldb) {
      V right[NV > 0 ? NV : 1];
      H right_half{};
      for (int v = 0; v < NV; ++v) right[v] = load(b + v * kLanes);
      if constexpr (HALF) right_half = load_half(b + NV * kLanes);
      for (int i = 0; i < MR; ++i) {
        const T value = left[i * kLanes + k];
        for (int v = 0; v < NV; ++v) acc[i][v] = fma(splat(value), right[v], acc[i][v]);
        if constexpr (HALF) half[i] = fma(splat_half(value), right_half, half[i]);
      }
    }
  }
  for (int i = 0; i < MR; ++i) {
    for (int v = 0; v < NV; ++v) store(c + i * ldc + v * kLanes, acc[i][v]);
    if constexpr (HALF) store(c + i * ldc + NV * kLanes, half[i]);
  }
}

template <class T, int NV, bool HALF>
inline void project_columns(int64_t m_count, const T* a, int64_t a_plane, int64_t mids, const T* b,
                            int64_t ldb, T* c, int64_t ldc, bool accumulate) {
  constexpr int MR = maximum(1, minimum(16, Blocking<T>::tile_vectors / (NV + (HALF ? 1 : 0))));
  int64_t m = 0;
  for (; m + MR <= m_count; m += MR)
    project_rows<T, MR, NV, HALF>(a + m * kLanes, a_plane, mids, b, ldb, c + m * ldc, ldc, accumulate);
  if constexpr (MR > 4) {
    for (; m + 4 <= m_count; m += 4)
      project_rows<T, 4, NV, HALF>(a + m * kLanes, a_plane, mids, b, ldb, c + m * ldc, ldc, accumulate);
  }
  for (; m < m_count; ++m)
    project_rows<T, 1, NV, HALF>(a + m * kLanes, a_plane, mids, b, ldb, c + m * ldc, ldc, accumulate);
}

// How `columns` (a multiple of 8) are cut into register tiles: calls f(tag of whole vectors, tag of the half,
// offset).
template <int N>
struct IntTag {
  static constexpr int value = N;
};
template <class T, class F>
TFNAS_INLINE void for_column_tiles(int64_t columns, F&& f) {
  for (int64_t n = 0; n < columns;) {
    const int64_t rest = columns - n;
    if constexpr (Blocking<T>::planes >= 3) {
      if (rest == 40) {
        f(IntTag<2>{}, IntTag<1>{}, n);
        n += 40;
        continue;
      }
      // 56 and 64 are cut in half: an 8 x 16 tile at the end would starve the multipliers.
      if (rest == 32 || rest == 56 || rest == 64) {
        f(IntTag<2>{}, IntTag<0>{}, n);
        n += 32;
        continue;
      }
      if (rest >= 48) {
        f(IntTag<3>{}, IntTag<0>{}, n);
        n += 48;
        continue;
      }
    }
    if (rest == 24 || (Blocking<T>::planes < 3 && rest > 32)) {
      f(IntTag<1>{}, IntTag<1>{}, n);
      n += 24;
    } else if (rest >= 16) {
      f(IntTag<1>{}, IntTag<0>{}, n);
      n += 16;
    } else {
      f(IntTag<0>{}, IntTag<1>{}, n);
      n += 8;
    }
  }
}

// b: [mids][ldb], mids being the real channels of the chunk; c: [m][ldc].
template <class T>
inline void project_tile(int64_t m_count, int64_t columns, const T* a, int64_t a_plane, int64_t mids,
                         const T* b, int64_t ldb, T* c, int64_t ldc, bool accumulate) {
  for_column_tiles<T>(columns, [&](auto vectors, auto half, int64_t n) {
    project_columns<T, decltype(vectors)::value, decltype(half)::value == 1>(m_count, a, a_plane, mids, b + n,
                                                                             ldb, c + n, ldc, accumulate);
  });
}

// Sums start at zero and are added to `g` at the end: long sums are then sums of short ones.
template <class T, int MR, int NV, bool HALF>
TFNAS_INLINE void outer_rows(int64_t m_count, const T* wide, const T* narrow, int64_t ldn, T* g,
                             int64_t ldg) {
  using V = typename Simd<T>::V;
  using H = typename Simd<T>::H;
  V acc[MR][NV > 0 ? NV : 1];
  H half[MR];
  for (int i = 0; i < MR; ++i) {
    for (int v = 0; v < NV; ++v) acc[i][v] = splat(T(0));
    if constexpr (HALF) half[i] = splat_half(T(0));
  }
  for (int64_t m = 0; m < m_count; ++m) {
    V right[NV > 0 ? NV : 1];
    H right_half{};
    for (int v = 0; v < NV; ++v) right[v] = load(narrow + m * ldn + v * kLanes);
    if constexpr (HALF) right_half = load_half(narrow + m * ldn + NV * kLanes);
    for (int i = 0; i < MR; ++i) {
      const T value = wide[m * kLanes + i];
      for (int v = 0; v < NV; ++v) acc[i][v] = fma(splat(value), right[v], acc[i][v]);
      if constexpr (HALF) half[i] = fma(splat_half(value), right_half, half[i]);
    }
  }
  for (int i = 0; i < MR; ++i) {
    for (int v = 0; v < NV; ++v)
      store(g + i * ldg + v * kLanes, add(load(g + i * ldg + v * kLanes), acc[i][v]));
    if constexpr (HALF) store(g + i * ldg + NV * kLanes, add(load_half(g + i * ldg + NV * kLanes), half[i]));
  }
}

// g: [16 planes][ldg].
template <class T>
inline void outer_tile(int64_t m_count, int64_t columns, const T* wide, int64_t wide_plane, int planes,
                       const T* narrow, int64_t ldn, T* g, int64_t ldg) {
  for (int plane = 0; plane < planes; ++plane) {
    for_column_tiles<T>(columns, [&](auto vectors, auto half, int64_t n) {
      constexpr int NV = decltype(vectors)::value;
      constexpr bool HALF = decltype(half)::value == 1;
      constexpr int fit = Blocking<T>::tile_vectors / (NV + (HALF ? 1 : 0));
      constexpr int MR = fit >= 16 ? 16 : fit >= 8 ? 8 : fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
      for (int i = 0; i < kLanes; i += MR)
        outer_rows<T, MR, NV, HALF>(m_count, wide + plane * wide_plane + i, narrow + n, ldn,
                                    g + (plane * kLanes + i) * ldg + n, ldg);
    });
  }
}

}  // namespace tfnas::TFNAS_ISA
