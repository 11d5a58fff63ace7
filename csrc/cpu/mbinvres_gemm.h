// The three matrix products of the block, as register-blocked micro-kernels.
//
// Wide tensors are planes of 16 channels, [plane][pixel][16]; narrow ones are [pixel][channels], channels
// padded to multiples of 8. With wide tiles of P planes ("chunk") and M pixels:
//   expand_tile:   wide[m][16 P]  = narrow[m][K] B[K][16 P]            y1 = W1 x, dz = W3^T dy3
//   project_tile:  narrow[m][N]  (+)= wide[m][16 P] B[16 P][N]         y3 = W3 z, dx = W1^T dy1
//   outer_tile:    G[16 P][N]    += sum_m wide[m][16 P] narrow[m][N]   dW1, dW3 (mid channel first)
// Left operands are elements, B is packed (`Packed`), results are sums in the type of the computation. The
// outer product sums over pixels: both its operands are paired along them (`Product::depth`).
#pragma once

#include "cpu/mbinvres_bf16.h"

namespace tfnas::TFNAS_ISA {

template <class E, int MR, int P>
TFNAS_INLINE void expand_rows(const E* a, int64_t lda, int64_t k_count, const Packed<E>* b, int64_t b_plane,
                              Compute<E>* c, int64_t c_plane) {
  using Op = Product<E>;
  typename Op::V acc[MR][P];
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < P; ++v) acc[i][v] = splat(Compute<E>(0));
  for (int64_t k = 0; k < k_count; k += Op::depth) {
    decltype(Op::right(b)) right[P];
    for (int v = 0; v < P; ++v) right[v] = Op::right(b + v * b_plane + k * kLanes);
    for (int i = 0; i < MR; ++i) {
      const auto left = Op::left(a + i * lda + k);
      for (int v = 0; v < P; ++v) acc[i][v] = Op::add(left, right[v], acc[i][v]);
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < P; ++v) store(c + v * c_plane + i * kLanes, acc[i][v]);
}

template <class E, int P>
inline void expand_planes(int64_t m_count, const E* a, int64_t lda, int64_t k_count, const Packed<E>* b,
                          int64_t b_plane, Compute<E>* c, int64_t c_plane) {
  constexpr int MR = Blocking<Compute<E>>::tile_vectors / P;
  int64_t m = 0;
  for (; m + MR <= m_count; m += MR)
    expand_rows<E, MR, P>(a + m * lda, lda, k_count, b, b_plane, c + m * kLanes, c_plane);
  if constexpr (MR > 4) {
    for (; m + 4 <= m_count; m += 4)
      expand_rows<E, 4, P>(a + m * lda, lda, k_count, b, b_plane, c + m * kLanes, c_plane);
  }
  for (; m < m_count; ++m)
    expand_rows<E, 1, P>(a + m * lda, lda, k_count, b, b_plane, c + m * kLanes, c_plane);
}

// b: [plane][k][16] with planes `b_plane` apart; c: [plane][m][16] with planes `c_plane` apart. At depth 2 an
// odd k_count reads one more channel of `a`, which meets a zero of `b`.
template <class E>
inline void expand_tile(int planes, int64_t m_count, const E* a, int64_t lda, int64_t k_count,
                        const Packed<E>* b, int64_t b_plane, Compute<E>* c, int64_t c_plane) {
  if constexpr (Blocking<Compute<E>>::planes >= 3) {
    if (planes == 3) return expand_planes<E, 3>(m_count, a, lda, k_count, b, b_plane, c, c_plane);
    if (planes == 2) return expand_planes<E, 2>(m_count, a, lda, k_count, b, b_plane, c, c_plane);
  }
  expand_planes<E, 1>(m_count, a, lda, k_count, b, b_plane, c, c_plane);
}

// NV whole vectors and, with HALF, a half one: C_out of 24 and 40 need no padding to 16.
template <class E, int MR, int NV, bool HALF>
TFNAS_INLINE void project_rows(const E* a, int64_t a_plane, int64_t mids, const Packed<E>* b, int64_t ldb,
                               Compute<E>* c, int64_t ldc, bool accumulate) {
  using Op = Product<E>;
  using T = Compute<E>;
  typename Op::V acc[MR][NV > 0 ? NV : 1];
  typename Op::H half[MR];
  for (int i = 0; i < MR; ++i) {
    for (int v = 0; v < NV; ++v) acc[i][v] = accumulate ? load(c + i * ldc + v * kLanes) : splat(T(0));
    if constexpr (HALF) half[i] = accumulate ? load_half(c + i * ldc + NV * kLanes) : splat_half(T(0));
  }
  for (const E* plane = a; mids > 0; mids -= kLanes, plane += a_plane) {
    const int64_t depth = minimum(kLanes, mids);
    for (int64_t k = 0; k < depth; k += Op::depth, b += ldb * Op::depth) {
      decltype(Op::right(b)) right[NV > 0 ? NV : 1];
      decltype(Op::right_half(b)) right_half{};
      for (int v = 0; v < NV; ++v) right[v] = Op::right(b + v * kLanes * Op::depth);
      if constexpr (HALF) right_half = Op::right_half(b + NV * kLanes * Op::depth);
      for (int i = 0; i < MR; ++i) {
        const E* value = plane + i * kLanes + k;
        for (int v = 0; v < NV; ++v) acc[i][v] = Op::add(Op::left(value), right[v], acc[i][v]);
        if constexpr (HALF) half[i] = Op::add(Op::left_half(value), right_half, half[i]);
      }
    }
  }
  for (int i = 0; i < MR; ++i) {
    for (int v = 0; v < NV; ++v) store(c + i * ldc + v * kLanes, acc[i][v]);
    if constexpr (HALF) store(c + i * ldc + NV * kLanes, half[i]);
  }
}

template <class E, int NV, bool HALF>
inline void project_columns(int64_t m_count, const E* a, int64_t a_plane, int64_t mids, const Packed<E>* b,
                            int64_t ldb, Compute<E>* c, int64_t ldc, bool accumulate) {
  constexpr int MR = maximum(1, minimum(16, Blocking<Compute<E>>::tile_vectors / (NV + (HALF ? 1 : 0))));
  int64_t m = 0;
  for (; m + MR <= m_count; m += MR)
    project_rows<E, MR, NV, HALF>(a + m * kLanes, a_plane, mids, b, ldb, c + m * ldc, ldc, accumulate);
  if constexpr (MR > 4) {
    for (; m + 4 <= m_count; m += 4)
      project_rows<E, 4, NV, HALF>(a + m * kLanes, a_plane, mids, b, ldb, c + m * ldc, ldc, accumulate);
  }
  for (; m < m_count; ++m)
    project_rows<E, 1, NV, HALF>(a + m * kLanes, a_plane, mids, b, ldb, c + m * ldc, ldc, accumulate);
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
template <class E>
inline void project_tile(int64_t m_count, int64_t columns, const E* a, int64_t a_plane, int64_t mids,
                         const Packed<E>* b, int64_t ldb, Compute<E>* c, int64_t ldc, bool accumulate) {
  for_column_tiles<Compute<E>>(columns, [&](auto vectors, auto half, int64_t n) {
    project_columns<E, decltype(vectors)::value, decltype(half)::value == 1>(
        m_count, a, a_plane, mids, b + n * kDepth<E>, ldb, c + n, ldc, accumulate);
  });
}

// Sums start at zero and are added to `g` at the end: long sums are then sums of short ones.
template <class E, int MR, int NV, bool HALF>
TFNAS_INLINE void outer_rows(int64_t m_count, const E* wide, const E* narrow, int64_t ldn, Compute<E>* g,
                             int64_t ldg) {
  using Op = Product<E>;
  using T = Compute<E>;
  typename Op::V acc[MR][NV > 0 ? NV : 1];
  typename Op::H half[MR];
  for (int i = 0; i < MR; ++i) {
    for (int v = 0; v < NV; ++v) acc[i][v] = splat(T(0));
    if constexpr (HALF) half[i] = splat_half(T(0));
  }
  for (int64_t m = 0; m < m_count; m += Op::depth) {
    decltype(Op::right(narrow)) right[NV > 0 ? NV : 1];
    decltype(Op::right_half(narrow)) right_half{};
    for (int v = 0; v < NV; ++v) right[v] = Op::right(narrow + m * ldn + v * kLanes * Op::depth);
    if constexpr (HALF) right_half = Op::right_half(narrow + m * ldn + NV * kLanes * Op::depth);
    for (int i = 0; i < MR; ++i) {
      const E* value = wide + m * kLanes + i * Op::depth;
      for (int v = 0; v < NV; ++v) acc[i][v] = Op::add(Op::left(value), right[v], acc[i][v]);
      if constexpr (HALF) half[i] = Op::add(Op::left_half(value), right_half, half[i]);
    }
  }
  for (int i = 0; i < MR; ++i) {
    for (int v = 0; v < NV; ++v)
      store(g + i * ldg + v * kLanes, add(load(g + i * ldg + v * kLanes), acc[i][v]));
    if constexpr (HALF) store(g + i * ldg + NV * kLanes, add(load_half(g + i * ldg + NV * kLanes), half[i]));
  }
}

// g: [16 planes][ldg]. At depth 2 pixels are in pairs, [m / 2][channel][2], an odd one out beside zeros.
template <class E>
inline void outer_tile(int64_t m_count, int64_t columns, const E* wide, int64_t wide_plane, int planes,
                       const E* narrow, int64_t ldn, Compute<E>* g, int64_t ldg) {
  for (int plane = 0; plane < planes; ++plane) {
    for_column_tiles<Compute<E>>(columns, [&](auto vectors, auto half, int64_t n) {
      constexpr int NV = decltype(vectors)::value;
      constexpr bool HALF = decltype(half)::value == 1;
      constexpr int fit = Blocking<Compute<E>>::tile_vectors / (NV + (HALF ? 1 : 0));
      constexpr int MR = fit >= 16 ? 16 : fit >= 8 ? 8 : fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
      for (int i = 0; i < kLanes; i += MR)
        outer_rows<E, MR, NV, HALF>(m_count, wide + plane * wide_plane + i * kDepth<E>,
                                    narrow + n * kDepth<E>, ldn, g + (plane * kLanes + i) * ldg + n, ldg);
    });
  }
}

// Pairs pixels of a tile [plane][m][16] in place, for outer_tile.
template <class E>
inline void pair_pixels(E* tile, int64_t plane, int planes, int64_t m_count) {
#if defined(__AVX512BF16__)
  if constexpr (kDepth<E> == 2) {
    alignas(64) uint16_t order[32];
    for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
    const __m512i index = _mm512_load_si512(order);
    for (int v = 0; v < planes; ++v) {
      E* pixels = tile + v * plane;
      if (m_count % 2 != 0) std::memset(pixels + m_count * kLanes, 0, kLanes * sizeof(E));
      for (int64_t m = 0; m < m_count; m += 2) {
        E* pair = pixels + m * kLanes;
        _mm512_storeu_si512(pair, _mm512_permutexvar_epi16(index, _mm512_loadu_si512(pair)));
      }
    }
  }
#else
  (void)tile, (void)plane, (void)planes, (void)m_count;
#endif
}

}  // namespace tfnas::TFNAS_ISA
