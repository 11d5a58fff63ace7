// Forward: y2 by one of the two designs, then squeeze and excitation, project, third batch norm and residual.
#pragma once

#include "cpu/mbinvres_image.h"
#include "cpu/mbinvres_se.h"

namespace tfnas::TFNAS_ISA {

template <class T>
inline NormView<T> norm_at(const NormView<T>& norm, int64_t channel) {
  auto at = [channel](const T* data) { return data ? data + channel : nullptr; };
  return {at(norm.weight), at(norm.bias), at(norm.mean), at(norm.var)};
}
template <class T>
inline T* offset(T* data, int64_t count) {
  return data ? data + count : nullptr;
}

// A number as the packed operands hold it.
template <class E, class V>
TFNAS_INLINE V rounded_to_packed(V value) {
  Packed<E> packed[kLanes];
  store(packed, value);
  return load(packed);
}

// Strips: closes BN1 from the moments of x and the expand weights, or by given statistics. The weights are
// taken as packed, so that the statistics are exactly those of what is computed.
template <class E>
inline void close_expand_norm(const LayerPlan<E>& plan, const CandidatePlan<E>& c, bool training, double eps,
                              const BatchStatistics<Compute<E>>& statistics, const Threads& threads) {
  using T = Compute<E>;
  const Geometry& g = plan.g;
  const NormView<T>& norm = c.weights->bn1;
  if (!training) return given_norm(norm, c.width, c.padded, eps, c.mean1, c.rstd1, c.gain1, c.bias1);
  parallel(threads, [&](int thread) {
    Scratch scratch;
    T* w = scratch.take<T>(g.ci * kLanes);
    const Range range = share(c.planes, thread, threads.count);
    for (int64_t plane = range.begin; plane < range.end; ++plane) {
      const int64_t channel = plane * kLanes;
      pack_plane(c.weights->expand, c.width, plane, g.in_channels, g.ci, w);
      for (int64_t i = 0; i < g.ci; ++i) store(w + i * kLanes, rounded_to_packed<E>(load(w + i * kLanes)));
      auto mean = splat(T(0)), var = mean;
      for (int64_t i = 0; i < g.in_channels; ++i) {
        auto product = splat(T(0));
        for (int64_t j = 0; j < g.in_channels; ++j)
          product = fma(splat(plan.covariance[i * g.ci + j]), load(w + j * kLanes), product);
        var = fma(product, load(w + i * kLanes), var);
        mean = fma(load(w + i * kLanes), splat(plan.mean_x[i]), mean);
      }
      double sum[kLanes], squares[kLanes];
      T lanes[kLanes];
      store(lanes, mean);
      for (int64_t i = 0; i < kLanes; ++i) sum[i] = lanes[i];
      store(lanes, var);
      for (int64_t i = 0; i < kLanes; ++i) squares[i] = lanes[i] + sum[i] * sum[i];
      finish_norm(sum, squares, 1, c.width - channel, kLanes, norm_at(norm, channel), eps, c.mean1 + channel,
                  c.rstd1 + channel, c.gain1 + channel, c.bias1 + channel, offset(statistics.mean1, channel),
                  offset(statistics.var1, channel));
    }
  });
}

// Mean over an image of a2 for planes of one chunk.
template <class E>
inline void pool_plane(const Geometry& g, const CandidatePlan<E>& c, int64_t plane, int64_t n) {
  using T = Compute<E>;
  const int64_t channel = plane * kLanes;
  const E* y2 = c.y2 + (plane * g.m2 + n * g.out_pixels) * kLanes;
  const auto mean = load(c.mean2 + channel), bias = load(c.bias2 + channel),
             scale = mul(load(c.gain2 + channel), load(c.rstd2 + channel));
  with_act(g.act, [&](auto act) {
    auto total = splat(T(0));
    for (int64_t m0 = 0; m0 < g.out_pixels; m0 += kNarrowBlock) {
      auto sum = splat(T(0));
      for (int64_t m = m0; m < minimum(m0 + kNarrowBlock, g.out_pixels); ++m)
        sum = add(sum, activate<T, decltype(act)::value>(fma(sub(load(y2 + m * kLanes), mean), scale, bias)));
      total = add(total, sum);
    }
    store(c.pooled + n * c.padded + channel, mul(total, splat(T(1) / static_cast<T>(g.out_pixels))));
  });
}

// Channels: everything up to y2 for one chunk and the whole batch.
template <class E>
inline void forward_channels(const LayerPlan<E>& plan, const CandidatePlan<E>& c, Chunk chunk, const E* x,
                             double eps, const BatchStatistics<Compute<E>>& statistics) {
  using T = Compute<E>;
  const Geometry& g = plan.g;
  Scratch scratch;
  const int64_t taps = c.kernel * c.kernel, channel = chunk.plane * kLanes;
  Packed<E>* expand = scratch.take<Packed<E>>(chunk.planes * g.ci * kLanes);
  T* depthwise = scratch.take<T>(chunk.planes * taps * kLanes);
  T* tile = scratch.take<T>(chunk.planes * kBlock * kLanes);
  for (int v = 0; v < chunk.planes; ++v)
    pack_columns<E>(c.weights->expand, c.width, chunk.plane + v, g.in_channels, g.ci,
                    expand + v * g.ci * kLanes);
  pack_depthwise<E>(c, chunk.plane, chunk.planes, depthwise, nullptr);
  double sums[2][Blocking<T>::planes * kLanes];
  PlaneMoments<T> moments[Blocking<T>::planes];
  for (int64_t m0 = 0; m0 < g.m; m0 += kBlock) {
    const int64_t block = minimum(kBlock, g.m - m0);
    expand_tile<E>(chunk.planes, block, x + m0 * g.ci, g.ci, g.in_channels, expand, g.ci * kLanes, tile,
                   kBlock * kLanes);
    for (int v = 0; v < chunk.planes; ++v) {
      const T* values = tile + v * kBlock * kLanes;
      E* y1 = c.y1 + ((chunk.plane + v) * g.m + m0) * kLanes;
      for (int64_t m = 0; m < block; ++m) store(y1 + m * kLanes, load(values + m * kLanes));
      if (m0 == 0) moments[v].centre(values, block);
      moments[v].add_values(values, block);
    }
  }
  take_moments(moments, chunk.planes, sums[0], sums[1]);
  finish_norm(sums[0], sums[1], g.m, c.width - channel, chunk.planes * kLanes,
              norm_at(c.weights->bn1, channel), eps, c.mean1 + channel, c.rstd1 + channel, c.gain1 + channel,
              c.bias1 + channel, offset(statistics.mean1, channel), offset(statistics.var1, channel));

  for (int v = 0; v < chunk.planes; ++v) moments[v] = PlaneMoments<T>();
  T* memory = scratch.zeros<T>(forward_memory<T>(g, c.kernel, g.height));
  for (int64_t n = 0; n < g.batch; ++n)
    forward_image(plan, c, chunk, n, x, ChunkWeights<E>{nullptr, depthwise, nullptr}, g.height, memory,
                  moments);
  take_moments(moments, chunk.planes, sums[0], sums[1]);
  finish_norm(sums[0], sums[1], g.m2, c.width - channel, chunk.planes * kLanes,
              norm_at(c.weights->bn2, channel), eps, c.mean2 + channel, c.rstd2 + channel, c.gain2 + channel,
              c.bias2 + channel, offset(statistics.mean2, channel), offset(statistics.var2, channel));
  if (!c.gate) return;
  for (int v = 0; v < chunk.planes; ++v)
    for (int64_t n = 0; n < g.batch; ++n) pool_plane(g, c, chunk.plane + v, n);
}

// Channels: y2 of one chunk and the whole batch once more, from y1 and BN1's statistics.
template <class E>
inline void depthwise_channels(const LayerPlan<E>& plan, const CandidatePlan<E>& c, Chunk chunk) {
  using T = Compute<E>;
  const Geometry& g = plan.g;
  Scratch scratch;
  const int64_t taps = c.kernel * c.kernel;
  T* depthwise = scratch.take<T>(chunk.planes * taps * kLanes);
  pack_depthwise<E>(c, chunk.plane, chunk.planes, depthwise, nullptr);
  T* memory = scratch.zeros<T>(forward_memory<T>(g, c.kernel, g.height));
  PlaneMoments<T> ignored[Blocking<T>::planes];
  for (int64_t n = 0; n < g.batch; ++n)
    forward_image<E>(plan, c, chunk, n, nullptr, ChunkWeights<E>{nullptr, depthwise, nullptr}, g.height,
                     memory, ignored);
}

// Strips, from BN1's statistics on: y2 of all images; images and chunks are shared out over the threads.
// `sums_by_thread` [threads][2][padded], zero before, become the sums of y2 and of its square.
template <class E>
inline void depthwise_strips(const LayerPlan<E>& plan, const CandidatePlan<E>& c, const E* x,
                             double* sums_by_thread, const Threads& threads) {
  using T = Compute<E>;
  const Geometry& g = plan.g;
  Scratch scratch;
  const int64_t taps = c.kernel * c.kernel;
  T* depthwise = scratch.take<T>(c.planes * taps * kLanes);
  pack_depthwise<E>(c, 0, c.planes, depthwise, nullptr);
  Packed<E>* columns = c.expands ? scratch.take<Packed<E>>(c.planes * g.ci * kLanes) : nullptr;
  if (c.expands) pack_all_columns(c.weights->expand, c, g.in_channels, g.ci, columns, threads);
  Chunk* chunks = scratch.take<Chunk>(c.planes);
  int64_t count = 0;
  for_chunks<T>(0, c.planes, [&](Chunk chunk) { chunks[count++] = chunk; });

  const int64_t strip_rows = rows_per_strip<T>(g, c.kernel, 1);
  parallel(threads, [&](int thread) {
    Scratch local;
    double* sums = sums_by_thread + thread * 2 * c.padded;
    T* memory = local.zeros<T>(forward_memory<T>(g, c.kernel, strip_rows));
    PlaneMoments<T>* moments = local.take<PlaneMoments<T>>(c.planes);
    for (int64_t i = 0; i < c.planes; ++i) moments[i] = PlaneMoments<T>();
    const Range range = share(g.batch * count, thread, threads.count);
    for (int64_t task = range.begin; task < range.end; ++task) {
      const Chunk chunk = chunks[task % count];
      const Packed<E>* expand = c.expands ? columns + chunk.plane * g.ci * kLanes : nullptr;
      forward_image(plan, c, chunk, task / count, x,
                    ChunkWeights<E>{expand, depthwise + chunk.plane * taps * kLanes, nullptr}, strip_rows,
                    memory, moments + chunk.plane);
    }
    take_moments(moments, c.planes, sums, sums + c.padded);
  });
}

// Strips: both batch norms, y2 of all images, its means for SE.
template <class E>
inline void forward_strips(const LayerPlan<E>& plan, const CandidatePlan<E>& c, const E* x, bool training,
                           double eps, const BatchStatistics<Compute<E>>& statistics,
                           const Threads& threads) {
  const Geometry& g = plan.g;
  Scratch scratch;
  if (c.expands) close_expand_norm(plan, c, training, eps, statistics, threads);
  double* parts = scratch.zeros<double>(threads.count * 2 * c.padded);
  depthwise_strips(plan, c, x, parts, threads);
  if (training) {
    for (int t = 1; t < threads.count; ++t)
      for (int64_t i = 0; i < 2 * c.padded; ++i) parts[i] += parts[t * 2 * c.padded + i];
    finish_norm(parts, parts + c.padded, g.m2, c.width, c.padded, c.weights->bn2, eps, c.mean2, c.rstd2,
                c.gain2, c.bias2, statistics.mean2, statistics.var2);
  } else {
    given_norm(c.weights->bn2, c.width, c.padded, eps, c.mean2, c.rstd2, c.gain2, c.bias2);
  }
  if (!c.gate) return;
  parallel(threads, [&](int thread) {
    const Range range = share(g.batch * c.planes, thread, threads.count);
    for (int64_t task = range.begin; task < range.end; ++task)
      pool_plane(g, c, task % c.planes, task / c.planes);
  });
}

// z of pixels [m0, m0 + count) of image n (any image without SE) as a tile of the chunk.
template <class E>
inline void load_projected(const Geometry& g, const CandidatePlan<E>& c, Chunk chunk, int64_t m0,
                           int64_t count, int64_t n, E* tile) {
  using T = Compute<E>;
  with_act(g.act, [&](auto act) {
    constexpr Act A = decltype(act)::value;
    for (int v = 0; v < chunk.planes; ++v) {
      const int64_t channel = (chunk.plane + v) * kLanes;
      const E* y2 = c.y2 + ((chunk.plane + v) * g.m2 + m0) * kLanes;
      E* out = tile + v * kBlock * kLanes;
      const auto mean = load(c.mean2 + channel), bias = load(c.bias2 + channel),
                 scale = mul(load(c.gain2 + channel), load(c.rstd2 + channel));
      if (c.gate) {
        const auto gate = load(c.gate + n * c.padded + channel);
        for (int64_t m = 0; m < count; ++m)
          store(out + m * kLanes,
                mul(activate<T, A>(fma(sub(load(y2 + m * kLanes), mean), scale, bias)), gate));
      } else {
        for (int64_t m = 0; m < count; ++m)
          store(out + m * kLanes, activate<T, A>(fma(sub(load(y2 + m * kLanes), mean), scale, bias)));
      }
    }
  });
}

// A thread's share of the output pixels. It begins at a whole pair of pixels, of an image where blocks stay
// within one.
TFNAS_INLINE Range share_blocks(const Geometry& g, bool within_images, int thread, int count) {
  auto paired = [&](int64_t m) { return m == g.m2 ? m : m - (within_images ? m % g.out_pixels : m) % 2; };
  const Range range = share(g.m2, thread, count);
  return {paired(range.begin), paired(range.end)};
}

// Calls f(first pixel, pixels, image) for blocks of [begin, end) that stay within one image.
template <class F>
TFNAS_INLINE void for_blocks(const Geometry& g, bool within_images, int64_t begin, int64_t end, F&& f) {
  for (int64_t m0 = begin; m0 < end;) {
    const int64_t n = m0 / g.out_pixels;
    const int64_t stop = within_images ? minimum(end, (n + 1) * g.out_pixels) : end;
    const int64_t count = minimum(kBlock, stop - m0);
    f(m0, count, n);
    m0 += count;
  }
}

// Weight rows [width][padded count] for project_tile: in place where they already are, else packed in
// scratch.
template <class E>
inline const Packed<E>* rows_of(const Weight<const Compute<E>>& weight, const Compute<E>* scale,
                                const CandidatePlan<E>& c, int64_t count, int64_t padded_count,
                                Scratch& scratch, const Threads& threads) {
  if constexpr (sizeof(E) == sizeof(Packed<E>) && kDepth<E> == 1) {
    if (!scale && weight.stride == 1 && weight.mid_stride == padded_count) return weight.data;
  }
  Packed<E>* rows = scratch.take<Packed<E>>(c.padded * padded_count);
  parallel(threads, [&](int thread) {
    const Range range = share_pairs(c.padded, thread, threads.count);
    pack_rows<E>(weight, scale, c.width, range.begin, range.end, count, padded_count, rows);
  });
  return rows;
}

// y3 and BN3's statistics.
template <class E>
inline void forward_project(const LayerPlan<E>& plan, const CandidatePlan<E>& c, bool training, double eps,
                            const BatchStatistics<Compute<E>>& statistics, const Threads& threads) {
  using T = Compute<E>;
  const Geometry& g = plan.g;
  Scratch scratch;
  const Packed<E>* rows = rows_of<E>(c.weights->project, nullptr, c, g.out_channels, g.co, scratch, threads);
  double* parts = scratch.zeros<double>(threads.count * 2 * g.co);
  parallel(threads, [&](int thread) {
    Scratch local;
    E* tile = local.take<E>(Blocking<T>::planes * kBlock * kLanes);
    double* sums = parts + thread * 2 * g.co;
    const Range range = share(g.m2, thread, threads.count);
    for_blocks(g, c.gate != nullptr, range.begin, range.end, [&](int64_t m0, int64_t count, int64_t n) {
      T* y3 = c.y3 + m0 * g.co;
      for_chunks<T>(0, c.planes, [&](Chunk chunk) {
        load_projected(g, c, chunk, m0, count, n, tile);
        const int64_t channel = chunk.plane * kLanes;
        project_tile<E>(count, g.co, tile, kBlock * kLanes, minimum(chunk.planes * kLanes, c.width - channel),
                        rows + channel * g.co, g.co, y3, g.co, channel > 0);
      });
      if (training) add_moments(y3, g.co, count, g.co, m0 - range.begin, sums, sums + g.co);
    });
  });
  if (!training)
    return given_norm(c.weights->bn3, g.out_channels, g.co, eps, c.mean3, c.rstd3, c.gain3, c.bias3);
  for (int t = 1; t < threads.count; ++t)
    for (int64_t i = 0; i < 2 * g.co; ++i) parts[i] += parts[t * 2 * g.co + i];
  finish_norm(parts, parts + g.co, g.m2, g.out_channels, g.co, c.weights->bn3, eps, c.mean3, c.rstd3, c.gain3,
              c.bias3, statistics.mean3, statistics.var3);
}

template <class E>
inline void run_forward(const Layer<Compute<E>>& layer, const E* x, E* out, void* saved,
                        const BatchStatistics<Compute<E>>& statistics, bool training,
                        const Threads& threads) {
  using T = Compute<E>;
  Scratch scratch;
  LayerPlan<E>& plan = *scratch.take<LayerPlan<E>>(1);
  make_plan<E>(layer, saved, plan, training);
  const Geometry& g = plan.g;
  const E* padded = padded_narrow(x, g.m, g.in_channels, g.ci, scratch, threads);
  share_y2(plan, scratch);
  if (training && plan.covariance) moments(g, padded, plan.mean_x, plan.covariance, threads);
  for (int i = 0; i < plan.count; ++i) {
    const CandidatePlan<E>& c = plan.candidates[i];
    if (plan.design == Design::channels) {
      parallel(threads, [&](int thread) {
        const Range range = share(c.planes, thread, threads.count);
        for_chunks<T>(range.begin, range.end,
                      [&](Chunk chunk) { forward_channels(plan, c, chunk, padded, layer.eps, statistics); });
      });
    } else {
      forward_strips(plan, c, padded, training, layer.eps, statistics, threads);
    }
    if (c.gate) forward_se(g, c, threads);
    forward_project(plan, c, training, layer.eps, statistics, threads);
  }
  finish_output(plan, layer.mix, layer.residual != 0 ? padded : nullptr, static_cast<T>(layer.residual), out,
                threads);
}

}  // namespace tfnas::TFNAS_ISA
