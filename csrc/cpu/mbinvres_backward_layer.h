// The order of backward's phases over candidates, threads and designs.
#pragma once

#include "cpu/mbinvres_backward.h"

namespace tfnas::TFNAS_ISA {

// out[i] = sum of `parts`[t][i], in parallel; parts lie `size` apart and the first one becomes the sum.
template <class T>
inline void sum_threads(T* parts, int64_t size, const Threads& threads) {
  parallel(threads, [&](int thread) {
    const Range range = share(size, thread, threads.count);
    for (int t = 1; t < threads.count; ++t)
      for (int64_t i = range.begin; i < range.end; ++i) parts[i] += parts[t * size + i];
  });
}

// Everything that the phases of one candidate share.
template <class E>
struct BackwardState {
  using T = Compute<E>;
  const LayerPlan<E>& plan;
  const Threads& threads;
  T** dx_parts;      // by thread (channels, or images shared by threads), or one
  bool* dx_written;  // by thread: whether its part holds anything yet (channels)
  bool by_image;     // strips: every image belongs to one thread, one part is enough
  NarrowCorrection<T> correction;
};

// Project's backward and BN2's: fills b.wide, b.mean_g, b.mean_gh (and b.dpooled); channels without SE go on
// to dx.
template <class E>
inline void backward_project(const BackwardState<E>& state, const CandidatePlan<E>& c,
                             CandidateBackward<E>& b, const CandidateGradient<Compute<E>>* gradient) {
  using T = Compute<E>;
  const LayerPlan<E>& plan = state.plan;
  const Geometry& g = plan.g;
  const Threads& threads = state.threads;
  const bool channels = plan.design == Design::channels, wanted = gradient && gradient->project.data;
  Scratch scratch;
  if (c.y2_again && !channels) {
    Scratch again;
    depthwise_strips(plan, c, b.x, again.zeros<double>(threads.count * 2 * c.padded), threads);
  }
  Packed<E>* packed = scratch.take<Packed<E>>(c.planes * g.co * kLanes);
  pack_all_columns(c.weights->project, c, g.out_channels, g.co, packed, threads);
  if (wanted)
    b.dy3_pairs = c.gate ? pair_narrow(b.dy3, g.batch, g.out_pixels, g.co, scratch, threads)
                         : pair_narrow(b.dy3, 1, g.m2, g.co, scratch, threads);
  const int copies = channels ? 1 : threads.count;  // channels: every thread writes its own part of one
  const int64_t weight_size = wanted ? c.padded * g.co : 0,
                gate_size = c.gate ? kGateSums * g.batch * c.padded : 0;
  T* weights = scratch.zeros<T>(copies * weight_size);
  T* gate_sums = scratch.zeros<T>(copies * gate_size);
  double* sums = scratch.zeros<double>(copies * 2 * c.padded);
  parallel(threads, [&](int thread) {
    Scratch local;
    const int64_t tile_size = Blocking<T>::planes * kBlock * kLanes;
    T* dz = local.take<T>(tile_size);
    E* z = local.take<E>(tile_size);
    const int copy = channels ? 0 : thread;
    double *sum_g = sums + copy * 2 * c.padded, *sum_gh = sum_g + c.padded;
    auto block = [&](Chunk chunk, int64_t m0, int64_t count, int64_t n) {
      backward_project_block(g, c, b, chunk, m0, count, n, packed + chunk.plane * g.co * kLanes, dz, z, sum_g,
                             sum_gh, gate_sums + copy * gate_size);
      if (!wanted) return;
      pair_pixels(z, kBlock * kLanes, chunk.planes, count);
      outer_tile<E>(count, g.co, z, kBlock * kLanes, chunk.planes,
                    c.gate ? b.dy3_pairs.at(n, m0 - n * g.out_pixels) : b.dy3_pairs.at(0, m0), g.co,
                    weights + copy * weight_size + chunk.plane * kLanes * g.co, g.co);
    };
    if (!channels) {
      const Range range = share_blocks(g, c.gate != nullptr, thread, threads.count);
      for_blocks(g, c.gate != nullptr, range.begin, range.end, [&](int64_t m0, int64_t count, int64_t n) {
        for_chunks<T>(0, c.planes, [&](Chunk chunk) { block(chunk, m0, count, n); });
      });
      return;
    }
    const Range range = share(c.planes, thread, threads.count);
    for_chunks<T>(range.begin, range.end, [&](Chunk chunk) {
      if (c.y2_again) depthwise_channels(plan, c, chunk);
      for_blocks(g, c.gate != nullptr, 0, g.m2,
                 [&](int64_t m0, int64_t count, int64_t n) { block(chunk, m0, count, n); });
      const int64_t begin = chunk.plane * kLanes, end = begin + chunk.planes * kLanes;
      if (wanted) unpack_rows(weights, g.co, g.out_channels, begin, minimum(end, c.width), gradient->project);
      if (c.gate) return;
      close_norm2(g, c, b, sum_g, sum_gh, begin, end, gradient);
      backward_channels(plan, c, b, chunk, state.dx_parts[thread], state.dx_written[thread], gradient);
      state.dx_written[thread] = true;
    });
  });
  if (channels && !c.gate) return;
  if (!channels) {
    if (wanted) {
      sum_threads(weights, weight_size, threads);
      parallel(threads, [&](int thread) {
        const Range range = share(c.width, thread, threads.count);
        unpack_rows(weights, g.co, g.out_channels, range.begin, range.end, gradient->project);
      });
    }
    sum_threads(gate_sums, gate_size, threads);
    for (int t = 1; t < threads.count; ++t)
      for (int64_t i = 0; i < 2 * c.padded; ++i) sums[i] += sums[t * 2 * c.padded + i];
  }
  if (c.gate) {
    T* dpooled = const_cast<T*>(b.dpooled);
    backward_se(g, c, gate_sums, dpooled, gradient, threads);
    const int64_t apart = g.batch * c.padded;
    for (int64_t n = 0; n < g.batch; ++n) {
      for (int64_t i = 0; i < c.padded; ++i) {
        const int64_t at = n * c.padded + i;
        const double gate = c.gate[at], dp = dpooled[at];
        sums[i] += gate * gate_sums[apart + at] + dp * gate_sums[3 * apart + at];
        sums[c.padded + i] += gate * gate_sums[2 * apart + at] + dp * gate_sums[4 * apart + at];
      }
    }
  }
  close_norm2(g, c, b, sums, sums + c.padded, 0, c.padded, gradient);
}

// Strips: from dh2 to the uncorrected dx of all images, and the sums that close BN1.
template <class E>
inline void backward_strips(const BackwardState<E>& state, const CandidatePlan<E>& c,
                            const CandidateBackward<E>& b, bool first_candidate,
                            const CandidateGradient<Compute<E>>* gradient) {
  using T = Compute<E>;
  const LayerPlan<E>& plan = state.plan;
  const Geometry& g = plan.g;
  const Threads& threads = state.threads;
  Scratch scratch;
  const int64_t taps = c.kernel * c.kernel;
  T* depthwise = scratch.take<T>(2 * c.padded * taps);
  T* flipped = depthwise + c.padded * taps;
  pack_depthwise(c, 0, c.planes, depthwise, flipped);
  Packed<E>* columns = c.expands ? scratch.take<Packed<E>>(c.planes * g.ci * kLanes) : nullptr;
  if (c.expands) pack_all_columns(c.weights->expand, c, g.in_channels, g.ci, columns, threads);
  Chunk* chunks = scratch.take<Chunk>(c.planes);
  int64_t count = 0;
  for_chunks<T>(0, c.planes, [&](Chunk chunk) { chunks[count++] = chunk; });
  const int64_t strip_rows = rows_per_strip<T>(g, c.kernel, 3);
  const int64_t taps_size = c.padded * taps, products_size = c.expands && !b.direct ? c.padded * g.ci : 0;
  T* taps_sums = scratch.zeros<T>(threads.count * taps_size);
  T* products = scratch.zeros<T>(threads.count * products_size);
  double* sums = scratch.zeros<double>(threads.count * 2 * c.padded);
  parallel(threads, [&](int thread) {
    Scratch local;
    T* memory = local.zeros<T>(backward_memory<T>(g, c.kernel, strip_rows));
    Range range = share(state.by_image ? g.batch : g.batch * count, thread, threads.count);
    if (state.by_image) range.begin *= count, range.end *= count;
    for (int64_t task = range.begin; task < range.end; ++task) {
      const Chunk chunk = chunks[task % count];
      const int64_t at = chunk.plane * kLanes;
      double* mine = sums + thread * 2 * c.padded + at;
      const ImageSums<T> image{taps_sums + thread * taps_size + at * taps, mine, mine + c.padded,
                               products_size ? products + thread * products_size + at * g.ci : nullptr};
      const ChunkWeights<E> weights{c.expands ? columns + at * g.ci : nullptr, depthwise + at * taps,
                                    flipped + at * taps};
      backward_image(plan, c, b, chunk, task / count, weights, strip_rows, memory, image,
                     state.dx_parts[state.by_image ? 0 : thread],
                     !(state.by_image && first_candidate && chunk.plane == 0));
    }
  });
  for (int t = 1; t < threads.count; ++t)
    for (int64_t i = 0; i < 2 * c.padded; ++i) sums[i] += sums[t * 2 * c.padded + i];
  if (b.depthwise_wanted) {
    sum_threads(taps_sums, taps_size, threads);
    for (int64_t plane = 0; plane < c.planes; ++plane)
      unpack_depthwise(c, taps_sums + plane * taps * kLanes, plane, gradient->depthwise);
  }
  if (!c.expands) return;
  sum_threads(products, products_size, threads);
  close_norm1(plan, c, b, products, sums, sums + c.padded, state.correction, gradient, threads);
}

// Strips: whether mean(dh1 h1) is summed directly, G = dh1^T x being of no other use.
template <class E>
inline bool sums_directly(const CandidatePlan<E>& c, const CandidateGradient<Compute<E>>* gradient) {
  if (c.weights->bn1.weight || c.weights->bn1.bias) return false;
  return !gradient || !(gradient->expand.data || gradient->bn_weight[0] || gradient->bn_bias[0]);
}

template <class E>
inline void run_backward(const Layer<Compute<E>>& layer, const E* x, const void* saved, const E* dout, E* dx,
                         Compute<E>* dmix, const CandidateGradient<Compute<E>>* gradients,
                         const Threads& threads) {
  using T = Compute<E>;
  Scratch scratch;
  LayerPlan<E>& plan = *scratch.take<LayerPlan<E>>(1);
  make_plan<E>(layer, const_cast<void*>(saved), plan);
  const Geometry& g = plan.g;
  const bool channels = plan.design == Design::channels, expands = plan.candidates[0].expands;
  x = padded_narrow(x, g.m, g.in_channels, g.ci, scratch, threads);
  dout = padded_narrow(dout, g.m2, g.out_channels, g.co, scratch, threads);

  const bool by_image = !channels && (g.batch % threads.count == 0 || g.batch >= 4 * threads.count);
  const int part_count = by_image ? 1 : threads.count;
  T** parts = scratch.take<T*>(part_count);
  bool* written = scratch.take<bool>(threads.count);
  for (int t = 0; t < part_count; ++t) {
    parts[t] = dx ? scratch.take<T>(g.m * g.ci) : nullptr;
    if (dx && !channels && !by_image) std::memset(parts[t], 0, g.m * g.ci * sizeof(T));
  }
  for (int t = 0; t < threads.count; ++t) written[t] = false;
  const BackwardState<E> state{
      plan,    threads,  parts,
      written, by_image, NarrowCorrection<T>{scratch.zeros<T>(g.ci), scratch.zeros<T>(g.ci * g.ci)}};
  E* dy3 = scratch.take<E>(g.m2 * g.co);
  E* wide = scratch.take<E>(largest_padded(plan) * g.m2);
  share_y2(plan, scratch);
  bool products_wanted = false;  // of any candidate, with x: its expand gradient, or what closes its BN1
  for (int i = 0; i < plan.count; ++i)
    products_wanted |= (gradients && gradients[i].expand.data) ||
                       (!channels && !sums_directly(plan.candidates[i], gradients ? gradients + i : nullptr));
  PixelPairs<E> x_pairs{};
  if (products_wanted && expands)
    x_pairs = channels ? pair_narrow(x, 1, g.m, g.ci, scratch, threads)
                       : pair_narrow(x, g.batch, g.pixels, g.ci, scratch, threads);
  double* sums = scratch.take<double>(2 * g.co);

  for (int i = 0; i < plan.count; ++i) {
    Scratch local;
    const CandidatePlan<E>& c = plan.candidates[i];
    const CandidateGradient<T>* gradient = gradients ? gradients + i : nullptr;
    const T mix = layer.mix ? layer.mix[i] : T(1);
    backward_norm3(g, c, mix, dout, dy3, sums, threads);
    double along_mix = 0;
    for (int64_t j = 0; j < g.out_channels; ++j) {
      along_mix += sums[g.co + j] * c.gain3[j] + sums[j] * c.bias3[j];
      if (gradient && gradient->bn_weight[2])
        gradient->bn_weight[2][j] = static_cast<T>(mix * sums[g.co + j]);
      if (gradient && gradient->bn_bias[2]) gradient->bn_bias[2][j] = static_cast<T>(mix * sums[j]);
    }
    if (dmix) dmix[i] = static_cast<T>(along_mix);
    const bool wanted = gradient != nullptr;
    CandidateBackward<E> b;
    b.x = x, b.x_pairs = x_pairs, b.dy3 = dy3, b.wide = wide;
    b.dpooled = c.gate ? local.take<T>(g.batch * c.padded) : nullptr;
    b.mean_g = local.take<T>(c.padded), b.mean_gh = local.take<T>(c.padded);
    b.depthwise_wanted = wanted && gradient->depthwise.data;
    b.expand_wanted = c.expands && wanted && gradient->expand.data;
    b.dx_wanted = dx != nullptr;
    b.direct = !channels && c.expands && sums_directly(c, gradient);
    T* scale = nullptr;  // strips: dh1 goes back through BN1 here, but for the narrow correction
    if (!channels && c.expands) {
      scale = local.take<T>(c.padded);
      for (int64_t j = 0; j < c.padded; ++j) scale[j] = c.gain1[j] * c.rstd1[j];
    }
    b.rows =
        c.expands ? rows_of<E>(c.weights->expand, scale, c, g.in_channels, g.ci, local, threads) : nullptr;
    backward_project(state, c, b, gradient);
    if (!channels) {
      backward_strips(state, c, b, i == 0, gradient);
    } else if (c.gate) {
      parallel(threads, [&](int thread) {
        const Range range = share(c.planes, thread, threads.count);
        for_chunks<T>(range.begin, range.end, [&](Chunk chunk) {
          backward_channels(plan, c, b, chunk, parts[thread], written[thread], gradient);
          written[thread] = true;
        });
      });
    }
  }
  if (!dx) return;
  const E* residual = layer.residual != 0 ? dout : nullptr;
  const T weight = static_cast<T>(layer.residual);
  if (!channels && expands)
    return correct_dx(plan, state.correction, x, parts, part_count, residual, weight, dx, threads);
  int used = 0;
  for (int t = 0; t < part_count; ++t)
    if (!channels || written[t]) parts[used++] = parts[t];
  sum_parts(parts, used, residual, weight, g.m, g.in_channels, g.ci, dx, threads);
}

}  // namespace tfnas::TFNAS_ISA
