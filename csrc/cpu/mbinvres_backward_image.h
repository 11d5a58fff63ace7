// Backward of one image and one chunk of mid channels, in strips: from the gradient before BN2 to the one
// after BN1.
#pragma once

#include "cpu/mbinvres_image.h"

namespace tfnas::TFNAS_ISA {

// What backward of a candidate works on besides its plan. Null pointers: not wanted.
template <class E>
struct CandidateBackward {
  using T = Compute<E>;
  const E* x;               // [m][ci]
  PixelPairs<E> x_pairs;    // the same, groups being images (strips) or the batch (channels)
  const E* dy3;             // [m2][co]
  PixelPairs<E> dy3_pairs;  // the same, groups being images with SE, else the batch
  E* wide;                  // [planes][m2][16]: gradient of h2, with SE of z
  const T* dpooled;         // SE: [batch][padded], per pixel
  T *mean_g, *mean_gh;      // [padded]: dy2 = gain rstd (dh2 - mean_g - (y2 - mean) mean_gh)
  bool depthwise_wanted, expand_wanted, dx_wanted;
  bool direct;            // strips: mean(dh1 h1) summed directly, since G = dh1^T x is not formed
  const Packed<E>* rows;  // rows [width][ci] of the expand weights, strips: times gain1 rstd1
};

// A thread's sums over the images it has done, planes of a chunk apart.
template <class T>
struct ImageSums {
  T* depthwise;          // [planes][k * k][16]
  double *dh1, *dh1_h1;  // [planes][16]
  T* expand;             // strips: G, [16 planes][ci]
};

template <class T>
inline int64_t backward_memory(const Geometry& g, int kernel, int64_t strip_rows) {
  const int planes = Blocking<T>::planes;
  return Ring<T>::size(planes, strip_rows + 2 * kernel + 2, g.width, kernel / 2) +
         Ring<T>::size(planes, strip_rows / g.stride + 2 * kernel + 2, g.out_width, kernel / 2) +
         2 * planes * strip_rows * g.width * kLanes + (g.width + 2 * kernel) * kLanes +
         2 * planes * kBlock * kLanes + planes * kernel * kernel * kLanes;
}

// Activation (ring, where wanted), derivative and normalised y1 (`h1`, where not null) of input rows [r0,
// r1), again from x or the saved y1.
template <class E>
inline void fill_backward(const LayerPlan<E>& plan, const CandidatePlan<E>& c, const CandidateBackward<E>& b,
                          Chunk chunk, int64_t n, const Packed<E>* expand, int64_t r0, int64_t r1,
                          const Ring<Compute<E>>& ring, Compute<E>* derivative, Compute<E>* h1,
                          int64_t strip_plane, Compute<E>* tile) {
  using T = Compute<E>;
  const Geometry& g = plan.g;
  const int64_t first = r0 * g.width, count = (r1 - r0) * g.width;
  if (!c.expands) {
    if (b.depthwise_wanted) fill_forward(plan, c, chunk, n, b.x, expand, r0, r1, ring, tile);
    for (int v = 0; v < chunk.planes; ++v)
      for (int64_t i = 0; i < count; ++i) store(derivative + v * strip_plane + i * kLanes, splat(T(1)));
    return;
  }
  const bool channels = plan.design == Design::channels;
  for (int64_t m0 = 0; m0 < count; m0 += kBlock) {
    const int64_t block = minimum(kBlock, count - m0);
    if (!channels)
      expand_tile<E>(chunk.planes, block, b.x + (n * g.pixels + first + m0) * g.ci, g.ci, g.in_channels,
                     expand, g.ci * kLanes, tile, kBlock * kLanes);
    with_act(g.act, [&](auto act) {
      constexpr Act A = decltype(act)::value;
      for (int v = 0; v < chunk.planes; ++v) {
        const int64_t plane = chunk.plane + v, channel = plane * kLanes;
        const auto mean = load(c.mean1 + channel), rstd = load(c.rstd1 + channel),
                   scale = mul(load(c.gain1 + channel), rstd), bias = load(c.bias1 + channel);
        T* slope = derivative + v * strip_plane + m0 * kLanes;
        T* kept = h1 ? h1 + v * strip_plane + m0 * kLanes : nullptr;
        auto fill = [&](const auto* y1) {
          for_runs(first + m0, block, g.width, [&](int64_t i, int64_t length, int64_t y, int64_t column) {
            T* out = b.depthwise_wanted ? ring.pixel(v, y, column) : nullptr;
            for (int64_t j = 0; j < length; ++j) {
              const auto centred = sub(load(y1 + (i + j) * kLanes), mean);
              auto a = centred, d = centred;
              activate_with_derivative<T, A>(fma(centred, scale, bias), a, d);
              if (out) store(out + j * kLanes, a);
              if (kept) store(kept + (i + j) * kLanes, mul(centred, rstd));
              store(slope + (i + j) * kLanes, d);
            }
          });
        };
        if (channels) {
          fill(c.y1 + (plane * g.m + n * g.pixels + first + m0) * kLanes);
        } else {
          fill(tile + v * kBlock * kLanes);
        }
      }
    });
  }
}

// dy2 of output rows [y0, y1) of plane v into its ring.
template <class E>
inline void fill_dy2(const Geometry& g, const CandidatePlan<E>& c, const CandidateBackward<E>& b,
                     int64_t plane, int v, int64_t n, int64_t y0, int64_t y1, const Ring<Compute<E>>& ring) {
  using T = Compute<E>;
  const int64_t channel = plane * kLanes, base = (plane * g.m2 + n * g.out_pixels) * kLanes;
  const auto mean = load(c.mean2 + channel), scale = mul(load(c.gain2 + channel), load(c.rstd2 + channel)),
             bias = load(c.bias2 + channel), mean_g = load(b.mean_g + channel),
             mean_gh = load(b.mean_gh + channel);
  auto rows = [&](auto gradient) {
    for (int64_t y = y0; y < y1; ++y) {
      const E* y2 = c.y2 + base + y * g.out_width * kLanes;
      const E* wide = b.wide + base + y * g.out_width * kLanes;
      T* out = ring.pixel(v, y, 0);
      for (int64_t x = 0; x < g.out_width; ++x) {
        const auto centred = sub(load(y2 + x * kLanes), mean);
        const auto rest = sub(gradient(centred, load(wide + x * kLanes)), mean_g);
        store(out + x * kLanes, mul(scale, sub(rest, mul(centred, mean_gh))));
      }
    }
  };
  if (!c.gate) return rows([](auto, auto gradient) { return gradient; });
  const auto gate = load(c.gate + n * c.padded + channel), dpooled = load(b.dpooled + n * c.padded + channel);
  with_act(g.act, [&](auto act) {
    rows([&](auto centred, auto dz) {
      auto a = centred, d = centred;
      activate_with_derivative<T, decltype(act)::value>(fma(centred, scale, bias), a, d);
      return mul(fma(dz, gate, dpooled), d);
    });
  });
}

// Adds a strip's gradient (planes `strip_plane` apart) to narrow rows of dx where the depthwise reads x
// itself.
template <class T>
inline void add_to_narrow(const T* strip, int64_t strip_plane, Chunk chunk, int64_t count, int64_t ci,
                          T* dx) {
  for (int v = 0; v < chunk.planes; ++v) {
    const int64_t channel = (chunk.plane + v) * kLanes;
    for (int64_t m = 0; m < count; ++m) {
      const T* in = strip + v * strip_plane + m * kLanes;
      store(dx + m * ci + channel, load_half(in));
      if (channel + 8 < ci) store(dx + m * ci + channel + 8, load_half(in + 8));
    }
  }
}

// `count` pixels of a strip (planes `strip_plane` apart) as elements, in `tile` (planes kBlock pixels apart)
// where they are not elements already. Returns the planes' distance.
template <class E>
TFNAS_INLINE int64_t elements_of(const Compute<E>* strip, int64_t strip_plane, int planes, int64_t count,
                                 E* tile, const E** elements) {
  if constexpr (sizeof(E) == sizeof(Compute<E>)) {
    (void)planes, (void)count, (void)tile;
    *elements = strip;
    return strip_plane;
  } else {
    for (int v = 0; v < planes; ++v)
      for (int64_t m = 0; m < count; ++m)
        store(tile + (v * kBlock + m) * kLanes, load(strip + v * strip_plane + m * kLanes));
    *elements = tile;
    return kBlock * kLanes;
  }
}

// `memory`: backward_memory elements, zero before the first image, then left alone.
// `target`: channels: dh1 of the chunk [planes][m][16]; strips: dx [m][ci], overwritten or (accumulate) added
// to.
template <class E>
inline void backward_image(const LayerPlan<E>& plan, const CandidatePlan<E>& c, const CandidateBackward<E>& b,
                           Chunk chunk, int64_t n, const ChunkWeights<E>& weights, int64_t strip_rows,
                           Compute<E>* memory, const ImageSums<Compute<E>>& sums, Compute<E>* target,
                           bool accumulate) {
  using T = Compute<E>;
  const Geometry& g = plan.g;
  const bool channels = plan.design == Design::channels;
  const int64_t taps = c.kernel * c.kernel, strip_plane = strip_rows * g.width * kLanes;
  const int64_t in_rows = strip_rows + 2 * c.kernel + 2, out_rows = strip_rows / g.stride + 2 * c.kernel + 2;
  T* zero_row = memory;
  T* tile = zero_row + (g.width + 2 * c.kernel) * kLanes;
  T* derivative = tile + Blocking<T>::planes * kBlock * kLanes;
  T* h1 = derivative + Blocking<T>::planes * strip_plane;
  T* taps_sum = h1 + Blocking<T>::planes * strip_plane;
  E* elements = reinterpret_cast<E*>(taps_sum + Blocking<T>::planes * taps * kLanes);
  T* ring_memory = taps_sum + Blocking<T>::planes * (taps + kBlock) * kLanes;
  const Ring<T> in_ring(ring_memory, in_rows, g.width, c.pad);
  const Ring<T> out_ring(ring_memory + Ring<T>::size(Blocking<T>::planes, in_rows, g.width, c.pad), out_rows,
                         g.out_width, c.pad);
  std::memset(taps_sum, 0, chunk.planes * taps * kLanes * sizeof(T));
  int64_t filled = 0, weighted = 0;  // rows of dy2 so far: in the ring, in the weight gradient
  for (int64_t r0 = 0; r0 < g.height; r0 += strip_rows) {
    const int64_t r1 = minimum(g.height, r0 + strip_rows), count = (r1 - r0) * g.width;
    const int64_t needed =
        r1 == g.height ? g.out_height : minimum(g.out_height, (r1 - 1 + c.pad) / g.stride + 1);
    const int64_t complete = completed_rows(g, c.kernel, r1);
    T* kept = channels || b.direct ? h1 : nullptr;
    fill_backward(plan, c, b, chunk, n, weights.expand, r0, r1, in_ring, derivative, kept, strip_plane, tile);
    for (int v = 0; v < chunk.planes; ++v) {
      fill_dy2(g, c, b, chunk.plane + v, v, n, filled, needed, out_ring);
      InputGradientEpilogue<T> epilogue{nullptr, nullptr, nullptr, splat(T(0)), splat(T(0))};
      with_kernel(c.kernel, g.stride, [&](auto kernel, auto stride) {
        constexpr int K = decltype(kernel)::value, S = decltype(stride)::value;
        if (b.depthwise_wanted) {
          for (int64_t y = weighted; y < complete; ++y) {
            const T* in[K];
            for (int i = 0; i < K; ++i) {
              const int64_t row = y * S - K / 2 + i;
              in[i] = row < 0 || row >= g.height ? zero_row : in_ring.at(v, row);
            }
            weight_gradient_row<T, K, S>(in, out_ring.pixel(v, y, 0), taps_sum + v * taps * kLanes,
                                         g.out_width);
          }
        }
        for (int64_t y = r0; y < r1; ++y) {
          const int64_t at = ((chunk.plane + v) * g.m + n * g.pixels + y * g.width) * kLanes;
          const int64_t in_strip = v * strip_plane + (y - r0) * g.width * kLanes;
          epilogue.derivative = derivative + in_strip;
          epilogue.factor = kept ? kept + in_strip : nullptr;
          epilogue.out = channels ? target + at - chunk.plane * g.m * kLanes : derivative + in_strip;
          const T *in[K], *rows[K];
          if constexpr (S == 1) {
            for (int i = 0; i < K; ++i) {
              const int64_t row = y + i - K / 2;
              in[i] = row < 0 || row >= g.out_height ? zero_row : out_ring.at(v, row);
            }
            input_gradient_row_s1<T, K>(in, weights.flipped + v * taps * kLanes, g.width, epilogue);
          } else {
            int used = 0;
            for (int64_t ky = (y + K / 2) & 1; ky < K; ky += 2) {
              const int64_t row = (y + K / 2 - ky) / 2;
              if (y + K / 2 < ky || row >= g.out_height) continue;
              in[used] = out_ring.at(v, row);
              rows[used++] = weights.depthwise + (v * taps + ky * K) * kLanes;
            }
            input_gradient_row_s2<T, K>(used, in, rows, g.width, epilogue);
          }
        }
      });
      add_lanes<T>(epilogue.sum, sums.dh1 + v * kLanes);
      add_lanes<T>(epilogue.sum_factor, sums.dh1_h1 + v * kLanes);
    }
    filled = needed, weighted = maximum(weighted, complete);
    if (channels) continue;
    const int64_t at = n * g.pixels + r0 * g.width, channel = chunk.plane * kLanes;
    if (!c.expands) {
      if (b.dx_wanted) add_to_narrow(derivative, strip_plane, chunk, count, g.ci, target + at * g.ci);
      continue;
    }
    for (int64_t m0 = 0; m0 < count; m0 += kBlock) {
      const int64_t block = minimum(kBlock, count - m0);
      const E* dh1;
      const int64_t plane =
          elements_of(derivative + m0 * kLanes, strip_plane, chunk.planes, block, elements, &dh1);
      if (b.dx_wanted)
        project_tile<E>(block, g.ci, dh1, plane, minimum(chunk.planes * kLanes, c.width - channel),
                        b.rows + channel * g.ci, g.ci, target + (at + m0) * g.ci, g.ci, accumulate);
      if (b.direct || !sums.expand) continue;
      pair_pixels(elements, plane, chunk.planes, block);
      outer_tile<E>(block, g.ci, dh1, plane, chunk.planes, b.x_pairs.at(n, r0 * g.width + m0), g.ci,
                    sums.expand, g.ci);
    }
  }
  if (b.depthwise_wanted)
    for (int64_t i = 0; i < chunk.planes * taps * kLanes; i += kLanes)
      store(sums.depthwise + i, add(load(sums.depthwise + i), load(taps_sum + i)));
}

}  // namespace tfnas::TFNAS_ISA
