// Backward of a layer from x and what forward saved: gradients of x, of the mixing weights and of every
// weight wanted.
#pragma once

#include "cpu/mbinvres_backward_image.h"
#include "cpu/mbinvres_forward.h"

namespace tfnas::TFNAS_ISA {

// Sums per image and channel by which SE's backward is closed without another pass over the wide tensors:
// of dz a2, dz a2', dz a2' (y2 - mean), a2', a2' (y2 - mean), where a2' is the activation's derivative.
constexpr int kGateSums = 5;

// dz = W3^T dy3 of a block of pixels; `wide` becomes dh2 (with SE: dz), `tile` z; sums for BN2 or SE.
template <class E>
inline void backward_project_block(const Geometry& g, const CandidatePlan<E>& c,
                                   const CandidateBackward<E>& b, Chunk chunk, int64_t m0, int64_t count,
                                   int64_t n, const Packed<E>* project, Compute<E>* dz, E* tile,
                                   double* sum_g, double* sum_gh, Compute<E>* gate_sums) {
  using T = Compute<E>;
  expand_tile<E>(chunk.planes, count, b.dy3 + m0 * g.co, g.co, g.out_channels, project, g.co * kLanes, dz,
                 kBlock * kLanes);
  with_act(g.act, [&](auto act) {
    constexpr Act A = decltype(act)::value;
    for (int v = 0; v < chunk.planes; ++v) {
      const int64_t plane = chunk.plane + v, channel = plane * kLanes;
      const T* in = dz + v * kBlock * kLanes;
      const E* y2 = c.y2 + (plane * g.m2 + m0) * kLanes;
      E* wide = b.wide + (plane * g.m2 + m0) * kLanes;
      E* z = tile + v * kBlock * kLanes;
      const auto mean = load(c.mean2 + channel), bias = load(c.bias2 + channel),
                 scale = mul(load(c.gain2 + channel), load(c.rstd2 + channel));
      if (!c.gate) {
        auto s1 = splat(T(0)), s2 = s1;
        for (int64_t m = 0; m < count * kLanes; m += kLanes) {
          const auto centred = sub(load(y2 + m), mean);
          auto a = centred, d = centred;
          activate_with_derivative<T, A>(fma(centred, scale, bias), a, d);
          const auto gradient = mul(d, load(in + m));
          store(z + m, a);
          store(wide + m, gradient);
          s1 = add(s1, gradient);
          s2 = fma(gradient, centred, s2);
        }
        add_lanes<T>(s1, sum_g + channel);
        add_lanes<T>(s2, sum_gh + channel);
        continue;
      }
      T* sums = gate_sums + n * c.padded + channel;
      const int64_t apart = g.batch * c.padded;
      const auto gate = load(c.gate + n * c.padded + channel);
      auto s0 = splat(T(0)), s1 = s0, s2 = s0, s3 = s0, s4 = s0;
      for (int64_t m = 0; m < count * kLanes; m += kLanes) {
        const auto centred = sub(load(y2 + m), mean), value = load(in + m);
        auto a = centred, d = centred;
        activate_with_derivative<T, A>(fma(centred, scale, bias), a, d);
        const auto product = mul(value, d);
        store(z + m, mul(a, gate));
        store(wide + m, value);
        s0 = fma(value, a, s0);
        s1 = add(s1, product);
        s2 = fma(product, centred, s2);
        s3 = add(s3, d);
        s4 = fma(d, centred, s4);
      }
      store(sums, add(load(sums), s0));
      store(sums + apart, add(load(sums + apart), s1));
      store(sums + 2 * apart, add(load(sums + 2 * apart), s2));
      store(sums + 3 * apart, add(load(sums + 3 * apart), s3));
      store(sums + 4 * apart, add(load(sums + 4 * apart), s4));
    }
  });
}

// From sum(dh2) and sum(dh2 (y2 - mean)) of channels [begin, end): BN2's backward and its affine gradients.
template <class E>
inline void close_norm2(const Geometry& g, const CandidatePlan<E>& c, const CandidateBackward<E>& b,
                        const double* sum_g, const double* sum_gh, int64_t begin, int64_t end,
                        const CandidateGradient<Compute<E>>* gradient) {
  using T = Compute<E>;
  for (int64_t i = begin; i < end; ++i) {
    b.mean_g[i] = static_cast<T>(sum_g[i] / g.m2);
    b.mean_gh[i] = static_cast<T>(sum_gh[i] / g.m2 * c.rstd2[i] * c.rstd2[i]);
    if (!gradient || i >= c.width) continue;
    if (gradient->bn_weight[1]) gradient->bn_weight[1][i] = static_cast<T>(sum_gh[i] * c.rstd2[i]);
    if (gradient->bn_bias[1]) gradient->bn_bias[1][i] = static_cast<T>(sum_g[i]);
  }
}

// Depthwise sums [planes][taps][16] to the caller's gradient.
template <class E>
inline void unpack_depthwise(const CandidatePlan<E>& c, const Compute<E>* sums, int64_t plane,
                             Weight<Compute<E>> out) {
  const int64_t taps = c.kernel * c.kernel, lanes = minimum(kLanes, c.width - plane * kLanes);
  for (int64_t i = 0; i < lanes; ++i)
    for (int64_t t = 0; t < taps; ++t)
      out.data[(plane * kLanes + i) * out.mid_stride + t * out.stride] = sums[t * kLanes + i];
}

// Channels: from dh2 to dx for one chunk and the whole batch; `dx` is the thread's partial sum [m][ci].
template <class E>
inline void backward_channels(const LayerPlan<E>& plan, const CandidatePlan<E>& c,
                              const CandidateBackward<E>& b, Chunk chunk, Compute<E>* dx, bool accumulate,
                              const CandidateGradient<Compute<E>>* gradient) {
  using T = Compute<E>;
  const Geometry& g = plan.g;
  Scratch scratch;
  const int64_t taps = c.kernel * c.kernel, channel = chunk.plane * kLanes;
  T* depthwise = scratch.take<T>(2 * chunk.planes * taps * kLanes);
  T* flipped = depthwise + chunk.planes * taps * kLanes;
  pack_depthwise(c, chunk.plane, chunk.planes, depthwise, flipped);
  double dh1_sums[2][Blocking<T>::planes * kLanes] = {};
  ImageSums<T> sums{scratch.zeros<T>(chunk.planes * taps * kLanes), dh1_sums[0], dh1_sums[1], nullptr};
  T* dh1 = scratch.take<T>(chunk.planes * g.m * kLanes);
  T* memory = scratch.zeros<T>(backward_memory<T>(g, c.kernel, g.height));
  for (int64_t n = 0; n < g.batch; ++n)
    backward_image(plan, c, b, chunk, n, ChunkWeights<E>{nullptr, depthwise, flipped}, g.height, memory, sums,
                   dh1, false);
  if (b.depthwise_wanted)
    for (int v = 0; v < chunk.planes; ++v)
      unpack_depthwise(c, sums.depthwise + v * taps * kLanes, chunk.plane + v, gradient->depthwise);
  for (int64_t i = 0; gradient && i < minimum(chunk.planes * kLanes, c.width - channel); ++i) {
    if (gradient->bn_weight[0]) gradient->bn_weight[0][channel + i] = static_cast<T>(dh1_sums[1][i]);
    if (gradient->bn_bias[0]) gradient->bn_bias[0][channel + i] = static_cast<T>(dh1_sums[0][i]);
  }
  if (!b.dx_wanted && !b.expand_wanted) return;
  T means[2][Blocking<T>::planes * kLanes];
  for (int s = 0; s < 2; ++s)
    for (int64_t i = 0; i < chunk.planes * kLanes; ++i) means[s][i] = static_cast<T>(dh1_sums[s][i] / g.m);
  T* weights = b.expand_wanted ? scratch.zeros<T>(chunk.planes * kLanes * g.ci) : nullptr;
  E* dy1 = scratch.take<E>(chunk.planes * kBlock * kLanes);
  for (int64_t m0 = 0; m0 < g.m; m0 += kBlock) {
    const int64_t block = minimum(kBlock, g.m - m0);
    for (int v = 0; v < chunk.planes; ++v) {
      const int64_t plane = chunk.plane + v, at = plane * kLanes;
      const auto rstd = load(c.rstd1 + at), scale = mul(load(c.gain1 + at), rstd), mean = load(c.mean1 + at),
                 mean_g = load(means[0] + v * kLanes), mean_gh = mul(load(means[1] + v * kLanes), rstd);
      const E* y1 = c.y1 + (plane * g.m + m0) * kLanes;
      const T* in = dh1 + (v * g.m + m0) * kLanes;
      E* out = dy1 + v * kBlock * kLanes;
      for (int64_t m = 0; m < block * kLanes; m += kLanes) {
        const auto centred = sub(load(y1 + m), mean);
        store(out + m, mul(scale, sub(sub(load(in + m), mean_g), mul(centred, mean_gh))));
      }
    }
    if (b.dx_wanted)
      project_tile<E>(block, g.ci, dy1, kBlock * kLanes, minimum(chunk.planes * kLanes, c.width - channel),
                      b.rows + channel * g.ci, g.ci, dx + m0 * g.ci, g.ci, accumulate);
    if (!weights) continue;
    pair_pixels(dy1, kBlock * kLanes, chunk.planes, block);
    outer_tile<E>(block, g.ci, dy1, kBlock * kLanes, chunk.planes, b.x_pairs.at(0, m0), g.ci, weights, g.ci);
  }
  if (weights) {
    Weight<T> out = gradient->expand;
    out.data += channel * out.mid_stride;
    unpack_rows(weights, g.ci, g.in_channels, 0, minimum(chunk.planes * kLanes, c.width - channel), out);
  }
}

// The narrow correction that stands for BN1's backward: dx = wide - offset - (x - mean) B, summed over
// candidates.
template <class T>
struct NarrowCorrection {
  T* offset;  // [ci]
  T* matrix;  // B [ci][ci]
};

// Strips: closes BN1 of a candidate from G = dh1^T x (`products` [padded][ci]) and the sums of dh1 and dh1
// h1.
template <class E>
inline void close_norm1(const LayerPlan<E>& plan, const CandidatePlan<E>& c, const CandidateBackward<E>& b,
                        Compute<E>* products, const double* sum_g, const double* sum_gh,
                        const NarrowCorrection<Compute<E>>& correction,
                        const CandidateGradient<Compute<E>>* gradient, const Threads& threads) {
  using T = Compute<E>;
  const Geometry& g = plan.g;
  Scratch scratch;
  const int64_t size = g.ci * (g.ci + 1);
  T* parts = scratch.zeros<T>(threads.count * size);
  parallel(threads, [&](int thread) {
    Scratch local;
    T* row = local.take<T>(g.ci);       // rstd1 W1 of one channel
    T* weighted = local.take<T>(g.ci);  // row C
    T* offset = parts + thread * size;
    T* matrix = offset + g.ci;
    const Range range = share(c.width, thread, threads.count);
    for (int64_t i = range.begin; i < range.end; ++i) {
      const Weight<const T>& w = c.weights->expand;
      for (int64_t j = 0; j < g.ci; ++j)
        row[j] = j < g.in_channels ? c.rstd1[i] * w.data[i * w.mid_stride + j * w.stride] : T(0);
      const T mean_g = static_cast<T>(sum_g[i] / g.m);
      double total = sum_gh[i];
      T* product = products + i * g.ci;
      if (!b.direct) {
        total = 0;
        for (int64_t j = 0; j < g.ci; ++j) {
          product[j] -= static_cast<T>(sum_g[i] * plan.mean_x[j]);
          total += static_cast<double>(product[j]) * row[j];
        }
      }
      const T mean_gh = static_cast<T>(total / g.m), scale = c.gain1[i];
      if (gradient && gradient->bn_weight[0]) gradient->bn_weight[0][i] = static_cast<T>(total);
      if (gradient && gradient->bn_bias[0]) gradient->bn_bias[0][i] = static_cast<T>(sum_g[i]);
      if (b.expand_wanted) {
        std::memset(weighted, 0, g.ci * sizeof(T));
        for (int64_t j = 0; j < g.in_channels; ++j)
          add_scaled(plan.covariance + j * g.ci, row[j], g.ci, weighted);
        const Weight<T>& out = gradient->expand;
        for (int64_t j = 0; j < g.in_channels; ++j)
          out.data[i * out.mid_stride + j * out.stride] =
              scale * c.rstd1[i] * (product[j] - static_cast<T>(total) * weighted[j]);
      }
      if (!b.dx_wanted) continue;
      add_scaled(row, scale * mean_g, g.ci, offset);
      // B[j][i'] = sum_c (rstd W1)[c][j] mean_gh[c] (gain rstd W1)[c][i']
      for (int64_t j = 0; j < g.in_channels; ++j)
        add_scaled(row, row[j] * mean_gh * scale, g.ci, matrix + j * g.ci);
    }
  });
  for (int t = 0; t < threads.count; ++t) {
    add_scaled(parts + t * size, T(1), g.ci, correction.offset);
    add_scaled(parts + t * size + g.ci, T(1), g.ci * g.ci, correction.matrix);
  }
}

// dx [m][in_channels] = sum of parts - offset - (x - mean) B + weight * residual.
template <class E>
inline void correct_dx(const LayerPlan<E>& plan, const NarrowCorrection<Compute<E>>& correction, const E* x,
                       const Compute<E>* const* parts, int count, const E* residual, Compute<E> weight, E* dx,
                       const Threads& threads) {
  using T = Compute<E>;
  const Geometry& g = plan.g;
  Scratch scratch;
  const int64_t planes = (g.ci + kLanes - 1) / kLanes;
  Packed<E>* packed = scratch.take<Packed<E>>(planes * g.ci * kLanes);
  T* offset = scratch.zeros<T>(planes * kLanes);
  for (int64_t i = 0; i < g.ci; ++i) offset[i] = correction.offset[i];
  const Weight<const T> columns{correction.matrix, 1, g.ci};
  for (int64_t plane = 0; plane < planes; ++plane)
    pack_columns<E>(columns, g.ci, plane, g.ci, g.ci, packed + plane * g.ci * kLanes);
  for (int64_t j = 0; j < g.ci; ++j)  // what meets the mean is what meets x: the matrix as packed
    for (int64_t i = 0; i < g.ci; ++i)
      offset[i] -= plan.mean_x[j] * to_compute(to_element<Packed<E>>(correction.matrix[j * g.ci + i]));
  parallel(threads, [&](int thread) {
    Scratch local;
    T* tile = local.take<T>(planes * kBlock * kLanes);
    const Range range = share(g.m, thread, threads.count);
    for (int64_t m0 = range.begin; m0 < range.end; m0 += kBlock) {
      const int64_t block = minimum(kBlock, range.end - m0);
      for_chunks<T>(0, planes, [&](Chunk chunk) {
        expand_tile<E>(chunk.planes, block, x + m0 * g.ci, g.ci, g.in_channels,
                       packed + chunk.plane * g.ci * kLanes, g.ci * kLanes,
                       tile + chunk.plane * kBlock * kLanes, kBlock * kLanes);
      });
      for (int64_t m = 0; m < block; ++m) {
        for (int64_t j = 0; j < g.ci; j += 8) {
          const int64_t at = (m0 + m) * g.ci + j;
          auto value = load_half(parts[0] + at);
          for (int i = 1; i < count; ++i) value = add(value, load_half(parts[i] + at));
          value = sub(value, load_half(offset + j));
          value = sub(value, load_half(tile + (j / kLanes * kBlock + m) * kLanes + j % kLanes));
          if (residual) value = fma(splat_half(weight), load_half(residual + at), value);
          E* out = dx + (m0 + m) * g.in_channels + j;
          if (j + 8 <= g.in_channels) {
            store(out, value);
          } else {
            E tail[8];
            store(tail, value);
            for (int64_t i = j; i < g.in_channels; ++i) out[i - j] = tail[i - j];
          }
        }
      }
    }
  });
}

}  // namespace tfnas::TFNAS_ISA
