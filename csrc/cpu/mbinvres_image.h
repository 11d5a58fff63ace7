// One image and one chunk of mid channels, in strips of rows that stay in the cache: what both designs share.
#pragma once

#include "cpu/mbinvres_activations.h"
#include "cpu/mbinvres_depthwise.h"
#include "cpu/mbinvres_gemm.h"
#include "cpu/mbinvres_narrow.h"
#include "cpu/mbinvres_plan.h"

namespace tfnas::TFNAS_ISA {

constexpr int64_t kBlock = 128;  // pixels of a tile that stays in L1

// The last rows of a map per plane, at columns -pad .. width + pad - 1. The side columns are never written:
// zero, as `memory` is to begin with.
template <class T>
struct Ring {
  T* data;
  int64_t rows, row, plane, pad;

  static int64_t size(int planes, int64_t rows, int64_t width, int64_t pad) {
    return planes * rows * (width + 2 * pad) * kLanes;
  }
  Ring(T* memory, int64_t ring_rows, int64_t width, int64_t side)
      : data(memory), rows(ring_rows), row((width + 2 * side) * kLanes), plane(ring_rows * row), pad(side) {}
  T* at(int64_t v, int64_t y) const { return data + v * plane + y % rows * row; }  // column -pad
  T* pixel(int64_t v, int64_t y, int64_t x) const { return at(v, y) + (pad + x) * kLanes; }
};

// Rows of the input taken per strip: three planes of `buffers` maps shall fill about a third of a 1 MiB L2.
template <class T>
inline int64_t rows_per_strip(const Geometry& g, int kernel, int buffers) {
  const int64_t row = (g.width + 2 * (kernel / 2)) * kLanes * static_cast<int64_t>(sizeof(T));
  int64_t rows = 320 * 1024 / (row * Blocking<T>::planes * buffers) - kernel;
  rows = maximum<int64_t>(2 * g.stride, rows);
  return minimum(rows - rows % 2, g.height);  // whole strides, and whole pairs of pixels
}

// Output rows of the depthwise convolution that input rows 0 .. rows - 1 complete.
inline int64_t completed_rows(const Geometry& g, int kernel, int64_t rows) {
  if (rows == g.height) return g.out_height;
  const int64_t last = rows + kernel / 2 - kernel;
  return last < 0 ? 0 : minimum(g.out_height, last / g.stride + 1);
}

// Calls f(i, length, y, x) for the runs within rows of pixels first .. first + count - 1; i counts from 0.
template <class F>
TFNAS_INLINE void for_runs(int64_t first, int64_t count, int64_t width, F&& f) {
  int64_t y = first / width, x = first % width;
  for (int64_t i = 0; i < count;) {
    const int64_t length = minimum(count - i, width - x);
    f(i, length, y, x);
    i += length;
    ++y, x = 0;
  }
}

// Sums of y and y^2 per channel about `shift`, in T over runs of pixels, then in double. The shift is a rough
// mean at first, then the mean so far: a far centre would cost digits of the variance, and so would long
// runs.
template <class T>
struct PlaneMoments {
  using V = typename Simd<T>::V;
  static constexpr int64_t kRun = 64;
  V sum = splat(T(0)), squares = splat(T(0)), shift = splat(T(0));
  double sums[kLanes] = {}, sums_of_squares[kLanes] = {};
  int64_t pending = 0, count = 0;

  // A first shift: the mean of some of the values.
  template <class E>
  void centre(const E* values, int64_t pixels) {
    V total = splat(T(0));
    for (int64_t m = 0; m < pixels; ++m) total = add(total, load(values + m * kLanes));
    shift = mul(total, splat(T(1) / static_cast<T>(pixels)));
  }
  void add_values(const T* values, int64_t pixels) {
    add_centred(pixels, shift, sum, squares, [&](int64_t m) { return load(values + m * kLanes); });
    added(pixels);
  }
  // After `pixels` more went into the sums.
  void added(int64_t pixels) {
    pending += pixels;
    if (pending >= kRun) flush();
  }
  void flush() {
    if (pending == 0) return;
    T s[kLanes], q[kLanes], k[kLanes];
    store(s, sum);
    store(q, squares);
    store(k, shift);
    count += pending;
    const double all = static_cast<double>(pending), share = 1.0 / static_cast<double>(count);
    for (int64_t i = 0; i < kLanes; ++i) {
      const double total = s[i], middle = k[i];
      sums[i] += total + all * middle;
      sums_of_squares[i] += q[i] + middle * (2 * total + all * middle);
      k[i] = static_cast<T>(sums[i] * share);
    }
    sum = squares = splat(T(0));
    shift = load(k);
    pending = 0;
  }
};

template <class T>
inline void take_moments(PlaneMoments<T>* moments, int64_t planes, double* sums, double* sums_of_squares) {
  for (int64_t plane = 0; plane < planes; ++plane) {
    moments[plane].flush();
    std::memcpy(sums + plane * kLanes, moments[plane].sums, kLanes * sizeof(double));
    std::memcpy(sums_of_squares + plane * kLanes, moments[plane].sums_of_squares, kLanes * sizeof(double));
  }
}

template <class T>
TFNAS_INLINE void add_lanes(typename Simd<T>::V values, double* out) {
  T lanes[kLanes];
  store(lanes, values);
  for (int64_t i = 0; i < kLanes; ++i) out[i] += lanes[i];
}

// What a chunk needs in either direction. Weights are those of the chunk's first plane.
template <class E>
struct ChunkWeights {
  using T = Compute<E>;
  const Packed<E>* expand;  // strips: [planes][ci][16]
  const T* depthwise;       // [planes][k * k][16]
  const T* flipped;         // backward, stride 1: the same with rows and columns reversed
};

// Of `planes` planes from `plane` on, [planes][k * k][16]; `flipped` may be null.
template <class E>
inline void pack_depthwise(const CandidatePlan<E>& c, int64_t plane, int64_t planes, Compute<E>* out,
                           Compute<E>* flipped) {
  const int64_t taps = c.kernel * c.kernel, size = taps * kLanes;
  for (int64_t v = 0; v < planes; ++v) {
    pack_plane(c.weights->depthwise, c.width, plane + v, taps, taps, out + v * size);
    if (!flipped) continue;
    for (int64_t i = 0; i < taps; ++i)
      store(flipped + v * size + i * kLanes, load(out + v * size + (taps - 1 - i) * kLanes));
  }
}

// a1 of input rows [r0, r1) of image n into the ring.
template <class E>
inline void fill_forward(const LayerPlan<E>& plan, const CandidatePlan<E>& c, Chunk chunk, int64_t n,
                         const E* x, const Packed<E>* expand, int64_t r0, int64_t r1,
                         const Ring<Compute<E>>& ring, Compute<E>* tile) {
  using T = Compute<E>;
  const Geometry& g = plan.g;
  const int64_t first = r0 * g.width, count = (r1 - r0) * g.width;
  if (!c.expands) {
    for (int v = 0; v < chunk.planes; ++v) {
      const int64_t channel = (chunk.plane + v) * kLanes;
      const bool whole = channel + kLanes <= g.ci;
      for_runs(first, count, g.width, [&](int64_t i, int64_t length, int64_t y, int64_t column) {
        const E* in = x + (n * g.pixels + first + i) * g.ci + channel;
        T* out = ring.pixel(v, y, column);
        for (int64_t j = 0; j < length; ++j) {
          if (whole) {
            store(out + j * kLanes, load(in + j * g.ci));
          } else {
            store(out + j * kLanes, load_half(in + j * g.ci));
            store(out + j * kLanes + 8, splat_half(T(0)));
          }
        }
      });
    }
    return;
  }
  const bool channels = plan.design == Design::channels;
  with_act(g.act, [&](auto act) {
    constexpr Act A = decltype(act)::value;
    for (int64_t m0 = 0; m0 < count; m0 += kBlock) {
      const int64_t block = minimum(kBlock, count - m0);
      if (!channels)
        expand_tile<E>(chunk.planes, block, x + (n * g.pixels + first + m0) * g.ci, g.ci, g.in_channels,
                       expand, g.ci * kLanes, tile, kBlock * kLanes);
      for (int v = 0; v < chunk.planes; ++v) {
        const int64_t plane = chunk.plane + v, channel = plane * kLanes;
        const auto mean = load(c.mean1 + channel), bias = load(c.bias1 + channel),
                   scale = mul(load(c.gain1 + channel), load(c.rstd1 + channel));
        auto fill = [&](const auto* y1) {
          for_runs(first + m0, block, g.width, [&](int64_t i, int64_t length, int64_t y, int64_t column) {
            T* out = ring.pixel(v, y, column);
            for (int64_t j = 0; j < length; ++j) {
              const auto centred = sub(load(y1 + (i + j) * kLanes), mean);
              store(out + j * kLanes, activate<T, A>(fma(centred, scale, bias)));
            }
          });
        };
        if (channels) {
          fill(c.y1 + (plane * g.m + n * g.pixels + first + m0) * kLanes);
        } else {
          fill(tile + v * kBlock * kLanes);
        }
      }
    }
  });
}

// y2 of image n and its moments. `memory` holds a row of zeros, the tile and the ring: forward_memory
// elements, zero before the first image, then left alone.
template <class T>
inline int64_t forward_memory(const Geometry& g, int kernel, int64_t strip_rows) {
  return Ring<T>::size(Blocking<T>::planes, strip_rows + kernel, g.width, kernel / 2) +
         (g.width + 2 * kernel) * kLanes + Blocking<T>::planes * kBlock * kLanes;
}
template <class E>
inline void forward_image(const LayerPlan<E>& plan, const CandidatePlan<E>& c, Chunk chunk, int64_t n,
                          const E* x, const ChunkWeights<E>& weights, int64_t strip_rows, Compute<E>* memory,
                          PlaneMoments<Compute<E>>* moments) {
  using T = Compute<E>;
  const Geometry& g = plan.g;
  const int64_t taps = c.kernel * c.kernel;
  T* zero_row = memory;
  T* tile = zero_row + (g.width + 2 * c.kernel) * kLanes;
  const Ring<T> ring(tile + Blocking<T>::planes * kBlock * kLanes, strip_rows + c.kernel, g.width, c.pad);
  int64_t done = 0;
  for (int64_t r0 = 0; r0 < g.height; r0 += strip_rows) {
    const int64_t r1 = minimum(g.height, r0 + strip_rows), end = completed_rows(g, c.kernel, r1);
    fill_forward(plan, c, chunk, n, x, weights.expand, r0, r1, ring, tile);
    with_kernel(c.kernel, g.stride, [&](auto kernel, auto stride) {
      constexpr int K = decltype(kernel)::value, S = decltype(stride)::value;
      for (int v = 0; v < chunk.planes; ++v) {
        E* y2 = c.y2 + ((chunk.plane + v) * g.m2 + n * g.out_pixels) * kLanes;
        PlaneMoments<T>& plane = moments[v];
        for (int64_t y = done; y < end; ++y) {
          const T* in[K];
          for (int i = 0; i < K; ++i) {
            const int64_t row = y * S - K / 2 + i;
            in[i] = row < 0 || row >= g.height ? zero_row : ring.at(v, row);
          }
          E* out = y2 + y * g.out_width * kLanes;
          auto sum = plane.sum, squares = plane.squares;
          depthwise_row<T, K, S>(in, weights.depthwise + v * taps * kLanes, g.out_width, out, sum, squares,
                                 plane.shift);
          if (plane.count == 0 && plane.pending == 0) {  // the very first row: again, about its own mean
            plane.centre(out, g.out_width);
            sum = squares = splat(T(0));
            depthwise_row<T, K, S>(in, weights.depthwise + v * taps * kLanes, g.out_width, out, sum, squares,
                                   plane.shift);
          }
          plane.sum = sum, plane.squares = squares;
          plane.added(g.out_width);
        }
      }
    });
    done = end;
  }
}

}  // namespace tfnas::TFNAS_ISA
