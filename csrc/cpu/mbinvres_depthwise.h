// Depthwise convolutions of one plane of 16 channels, register-blocked over columns.
//
// Rows are given by pointers, so that they may lie in ring buffers. A row of the larger map (`in`) points at
// column -k/2 of a row whose side columns are zero; weights are packed [k * k][16].
#pragma once

#include "cpu/mbinvres_bf16.h"

namespace tfnas::TFNAS_ISA {

// Calls f(tag of the block's width, first column) for blocks that cover `columns`.
template <int N>
struct Columns {
  static constexpr int value = N;
};
template <class T, class F>
TFNAS_INLINE void for_column_blocks(int64_t columns, F&& f) {
  int64_t x = 0;
  if constexpr (Blocking<T>::columns == 14) {
    if (columns % 7 == 0) {
      for (; x + 14 <= columns; x += 14) f(Columns<14>{}, x);
      if (x < columns) f(Columns<7>{}, x);
      return;
    }
    for (; x + 8 <= columns; x += 8) f(Columns<8>{}, x);
  }
  for (; x + 4 <= columns; x += 4) f(Columns<4>{}, x);
  for (; x < columns; ++x) f(Columns<1>{}, x);
}

template <class T, int K, int S, int XB, class E>
TFNAS_INLINE void depthwise_block(const T* const* in, const T* weights, int64_t x0, E* out,
                                  typename Simd<T>::V& sum, typename Simd<T>::V& sum_squares,
                                  typename Simd<T>::V shift) {
  using V = typename Simd<T>::V;
  V acc[XB];
  for (int j = 0; j < XB; ++j) acc[j] = splat(T(0));
#pragma GCC unroll 7
  for (int ky = 0; ky < K; ++ky) {
    V w[K];
    for (int kx = 0; kx < K; ++kx) w[kx] = load(weights + (ky * K + kx) * kLanes);
    const T* row = in[ky] + x0 * S * kLanes;
#pragma GCC unroll 40
    for (int i = 0; i < (XB - 1) * S + K; ++i) {
      const V value = load(row + i * kLanes);
#pragma GCC unroll 7
      for (int kx = 0; kx < K; ++kx)
        if (i >= kx && (i - kx) % S == 0 && (i - kx) / S < XB)
          acc[(i - kx) / S] = fma(value, w[kx], acc[(i - kx) / S]);
    }
  }
  V block_sum = splat(T(0)), block_squares = block_sum;  // sums of sums round less than one long one
  for (int j = 0; j < XB; ++j) {
    store(out + (x0 + j) * kLanes, acc[j]);
    const V centred = sub(acc[j], shift);
    block_sum = add(block_sum, centred);
    block_squares = fma(centred, centred, block_squares);
  }
  sum = add(sum, block_sum);
  sum_squares = add(sum_squares, block_squares);
}

// One output row; adds (y - shift) and its square to the two sums.
template <class T, int K, int S, class E>
inline void depthwise_row(const T* const* in, const T* weights, int64_t columns, E* out,
                          typename Simd<T>::V& sum, typename Simd<T>::V& sum_squares,
                          typename Simd<T>::V shift) {
  for_column_blocks<T>(columns, [&](auto width, int64_t x) {
    depthwise_block<T, K, S, decltype(width)::value>(in, weights, x, out, sum, sum_squares, shift);
  });
}

// What the input gradient's epilogue does: dh1 = da1 * derivative, and sums of dh1 and dh1 * factor.
template <class T>
struct InputGradientEpilogue {
  using V = typename Simd<T>::V;
  const T* derivative;  // [columns][16]
  const T* factor;      // [columns][16] or null
  T* out;               // [columns][16]; may be `derivative`
  V sum, sum_factor;
  TFNAS_INLINE void operator()(int64_t x, V gradient) {
    const V g = mul(gradient, load(derivative + x * kLanes));
    store(out + x * kLanes, g);
    sum = add(sum, g);
    if (factor) sum_factor = fma(g, load(factor + x * kLanes), sum_factor);
  }
};

template <class T, int K, int XB>
TFNAS_INLINE void input_gradient_block_s1(const T* const* in, const T* flipped, int64_t x0,
                                          InputGradientEpilogue<T>& epilogue) {
  using V = typename Simd<T>::V;
  V acc[XB];
  for (int j = 0; j < XB; ++j) acc[j] = splat(T(0));
#pragma GCC unroll 7
  for (int ky = 0; ky < K; ++ky) {
    V w[K];
    for (int kx = 0; kx < K; ++kx) w[kx] = load(flipped + (ky * K + kx) * kLanes);
    const T* row = in[ky] + x0 * kLanes;
#pragma GCC unroll 40
    for (int i = 0; i < XB - 1 + K; ++i) {
      const V value = load(row + i * kLanes);
#pragma GCC unroll 7
      for (int kx = 0; kx < K; ++kx)
        if (i >= kx && i - kx < XB) acc[i - kx] = fma(value, w[kx], acc[i - kx]);
    }
  }
  for (int j = 0; j < XB; ++j) epilogue(x0 + j, acc[j]);
}

// Stride 1: the convolution of dy2 with the flipped weights. in[ky] is row y + ky - k/2 of dy2, at column
// -k/2.
template <class T, int K>
inline void input_gradient_row_s1(const T* const* in, const T* flipped, int64_t columns,
                                  InputGradientEpilogue<T>& epilogue) {
  for_column_blocks<T>(columns, [&](auto width, int64_t x) {
    input_gradient_block_s1<T, K, decltype(width)::value>(in, flipped, x, epilogue);
  });
}

// Stride 2, input columns 2 j + PARITY for j in [j0, j0 + XB): only weights of one column parity meet them.
template <class T, int K, int PARITY, int XB>
TFNAS_INLINE void input_gradient_block_s2(int rows, const T* const* in, const T* const* weights, int64_t j0,
                                          InputGradientEpilogue<T>& epilogue) {
  using V = typename Simd<T>::V;
  constexpr int P = K / 2, first = (PARITY + P) & 1, count = (K - first + 1) / 2;
  V acc[XB];
  for (int j = 0; j < XB; ++j) acc[j] = splat(T(0));
  for (int t = 0; t < rows; ++t) {
#pragma GCC unroll 4
    for (int q = 0; q < count; ++q) {
      const V w = load(weights[t] + (first + 2 * q) * kLanes);
      const T* row = in[t] + (j0 + (PARITY + P - first - 2 * q) / 2 + P) * kLanes;
      for (int j = 0; j < XB; ++j) acc[j] = fma(load(row + j * kLanes), w, acc[j]);
    }
  }
  for (int j = 0; j < XB; ++j) epilogue(2 * (j0 + j) + PARITY, acc[j]);
}

// One row of da1 from `rows` rows of dy2 (each at column -k/2) and the weight rows that meet them.
template <class T, int K>
inline void input_gradient_row_s2(int rows, const T* const* in, const T* const* weights, int64_t columns,
                                  InputGradientEpilogue<T>& epilogue) {
  constexpr int XB = Blocking<T>::columns == 14 ? 8 : 4;
  const int64_t even = (columns + 1) / 2, odd = columns / 2;
  int64_t j = 0;
  for (; j + XB <= odd; j += XB) {
    input_gradient_block_s2<T, K, 0, XB>(rows, in, weights, j, epilogue);
    input_gradient_block_s2<T, K, 1, XB>(rows, in, weights, j, epilogue);
  }
  for (int64_t i = j; i < even; ++i) input_gradient_block_s2<T, K, 0, 1>(rows, in, weights, i, epilogue);
  for (int64_t i = j; i < odd; ++i) input_gradient_block_s2<T, K, 1, 1>(rows, in, weights, i, epilogue);
}

template <class T, int K, int S, int XB>
TFNAS_INLINE void weight_gradient_block(const T* const* in, const T* dy, T* gradient, int64_t x0) {
  using V = typename Simd<T>::V;
  V d[XB];
  for (int j = 0; j < XB; ++j) d[j] = load(dy + (x0 + j) * kLanes);
#pragma GCC unroll 7
  for (int ky = 0; ky < K; ++ky) {
    V acc[K];
    for (int kx = 0; kx < K; ++kx) acc[kx] = load(gradient + (ky * K + kx) * kLanes);
    const T* row = in[ky] + x0 * S * kLanes;
#pragma GCC unroll 40
    for (int i = 0; i < (XB - 1) * S + K; ++i) {
      const V value = load(row + i * kLanes);
#pragma GCC unroll 7
      for (int kx = 0; kx < K; ++kx)
        if (i >= kx && (i - kx) % S == 0 && (i - kx) / S < XB) acc[kx] = fma(value, d[(i - kx) / S], acc[kx]);
    }
    for (int kx = 0; kx < K; ++kx) store(gradient + (ky * K + kx) * kLanes, acc[kx]);
  }
}

// gradient[ky][kx] += sum_x dy[x] in[ky][x S + kx]
template <class T, int K, int S>
inline void weight_gradient_row(const T* const* in, const T* dy, T* gradient, int64_t columns) {
  for_column_blocks<T>(columns, [&](auto width, int64_t x) {
    weight_gradient_block<T, K, S, decltype(width)::value>(in, dy, gradient, x);
  });
}

// Run-time kernel size and stride to compile-time ones: f(tag of K, tag of S).
template <class F>
TFNAS_INLINE void with_kernel(int kernel, int stride, F&& f) {
  if (stride == 1) {
    if (kernel == 3) return f(Columns<3>{}, Columns<1>{});
    if (kernel == 5) return f(Columns<5>{}, Columns<1>{});
    return f(Columns<7>{}, Columns<1>{});
  }
  if (kernel == 3) return f(Columns<3>{}, Columns<2>{});
  if (kernel == 5) return f(Columns<5>{}, Columns<2>{});
  return f(Columns<7>{}, Columns<2>{});
}

}  // namespace tfnas::TFNAS_ISA
