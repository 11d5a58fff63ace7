// The backward of one layer: the sequence of launches from dout to dx, the mixture's weights and the weight
// gradients.
#pragma once

#include "depthwise_backward.cuh"
#include "expand_backward.cuh"
#include "finish_backward.cuh"
#include "layer_forward.cuh"
#include "outer_product.cuh"
#include "project_backward.cuh"
#include "squeeze_excite_backward.cuh"

namespace tfnas::cuda {

template <class T, Math M, int S>
DepthwiseBackwardArgs<T> depthwise_backward_args(const LayerArgs<T>& a, const LayerSizes& size,
                                                 size_t& shared_bytes) {
  using Tile = DepthwiseBackwardTile<T, M, WideShape<S>::kWarps>;
  DepthwiseBackwardArgs<T> args{};
  args.expand = a.expand, args.depthwise = a.depthwise, args.table = a.table, args.choice = a.choice;
  args.batch = a.batch, args.height = a.height, args.width = a.width, args.channels = a.in_channels;
  args.stride = S, args.act = a.act, args.active = size.active, args.taps = size.taps;
  shared_bytes = fit_tile<Tile>(
      args, a, size, a.height, a.width, 2, 4, 1,
      [&](const DepthwiseBackwardArgs<T>& tried) {
        return Tile(tried, size.largest_kernel).shared_bytes(size.largest_kernel);
      },
      [&](const DepthwiseBackwardArgs<T>& tried) {
        const Tile sizes(tried, size.largest_kernel);
        return tried.tiles() * (sizes.rows * (2.0 + a.in_channels / 4.0 + 2.0 * size.taps / (S * S)) +
                                8.0 * sizes.out_pixels);
      });
  return args;
}

template <class T>
struct BackwardScratch {
  using A = Acc<T>;
  static constexpr int kRuns = 256;
  T *dy3, *dh2, *dh1;
  A *output_parts, *residual_parts, *means3, *residual_sum, *factor;
  A *dgate, *dpooled, *dsqueezed, *partial2, *means2, *partial1, *means1;
  A *weight_parts, *filter_parts, *q_parts, *correction, *shift, *dx_parts;
  int64_t out_run, outer_run_out, outer_run_in, row_run;
  int out_runs, groups, outer_runs_out, outer_runs_in, row_runs;
  BackwardScratch(const LayerArgs<T>& a, const LayerGrads<T>& grads,
                  const DepthwiseBackwardArgs<T>& depthwise, Arena& arena) {
    const LayerSizes size(a);
    const GramTiling tiling(a.in_channels);
    const int64_t active = size.active, outs = a.out_channels, ins = a.in_channels;
    out_run = run_length(size.out_pixels, kRuns, 8), out_runs = run_count(size.out_pixels, out_run);
    const int64_t fill = 2 * a.device.multiprocessors / size.chunks + 1;  // blocks a chunk, to fill the card
    groups = static_cast<int>(fill < run_count(size.out_pixels, 64) ? fill : run_count(size.out_pixels, 64));
    outer_run_out = run_length(size.out_pixels, fill, kOuterPixels);
    outer_runs_out = run_count(size.out_pixels, outer_run_out);
    outer_run_in = run_length(size.in_pixels, fill, kOuterPixels);
    outer_runs_in = run_count(size.in_pixels, outer_run_in);
    row_run = run_length(active, 32, kGramPixels), row_runs = run_count(active, row_run);
    const int64_t tiles = depthwise.tiles();
    const int64_t gates = size.widest_se ? a.batch * active : 0;
    dy3 = arena.take<T>(size.slots * size.out_pixels * outs);
    dh2 = arena.take<T>(size.out_pixels * active);
    // With expansion for G alone, which dW1 is made of; without it, it is dx.
    dh1 = arena.take<T>((a.expand ? grads.weights() : !grads.dx) ? size.in_pixels * active : 0);
    output_parts = arena.take<A>(2 * size.slots * out_runs * outs);
    residual_parts = arena.take<A>(out_runs * outs);
    means3 = arena.take<A>(2 * size.slots * outs);
    residual_sum = arena.take<A>(outs), factor = arena.take<A>(1);
    dgate = arena.take<A>(gates), dpooled = arena.take<A>(gates);
    dsqueezed = arena.take<A>(int64_t{a.batch} * size.squeezed_stride);
    partial2 = arena.take<A>(2 * groups * active), means2 = arena.take<A>(2 * active);
    partial1 = arena.take<A>(2 * tiles * active), means1 = arena.take<A>(2 * active);
    const int64_t project_parts = outer_runs_out * active * outs, expand_parts = outer_runs_in * active * ins;
    weight_parts =
        arena.take<A>(grads.weights() ? (project_parts > expand_parts ? project_parts : expand_parts) : 0);
    filter_parts = arena.take<A>(grads.weights() ? tiles * active * size.taps : 0);
    q_parts = arena.take<A>(int64_t{row_runs} * tiling.pairs() * tiling.tile * tiling.tile);
    correction = arena.take<A>(ins * ins), shift = arena.take<A>(ins);
    dx_parts =
        arena.take<A>(grads.dx && a.expand ? depthwise.chunk_runs(size.chunks) * size.in_pixels * ins : 0);
  }
};

// factor = sum of u, or 1: how often the residual counts.
template <class A>
__global__ void residual_factor(const A* u, A* factor, int slots) {
  A sum = u ? A(0) : A(1);
  for (int i = 0; u && i < slots; i++) sum += u[i];
  *factor = sum;
}

// dx += factor dout, for a block without expansion.
template <class T>
__global__ void add_residual(const T* dout, const Acc<T>* factor, T* dx, int64_t count) {
  for (int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; at < count;
       at += int64_t{gridDim.x} * blockDim.x) {
    store(dx + at, load(dx + at) + *factor * load(dout + at));
  }
}

template <class T, Math M, int S>
int64_t layer_backward_strided(const LayerArgs<T>& a, const T* x, const T* dout, const LayerGrads<T>& grads,
                               void* saved_base, void* scratch_base) {
  using A = Acc<T>;
  constexpr int kDzWarps = 4, kWarps = WideShape<S>::kWarps;
  const LayerSizes size(a);
  size_t depthwise_bytes;
  DepthwiseBackwardArgs<T> depthwise = depthwise_backward_args<T, M, S>(a, size, depthwise_bytes);
  const int tiles = depthwise.tiles(), slots = size.slots, chunk_runs = depthwise.chunk_runs(size.chunks);
  Arena scratch_arena(scratch_base), saved_arena(saved_base);
  const BackwardScratch<T> scratch(a, grads, depthwise, scratch_arena);
  const SavedLayer<T> saved(a, saved_arena);
  if (!scratch_base) return scratch_arena.bytes();
  const LayerTable* table = a.table;
  const int* choice = a.choice;
  const int channels = a.in_channels, outs = a.out_channels, active = size.active, batch = a.batch,
            act = a.act;
  const int map = size.out_height * size.out_width, chunks = size.chunks;
  const int64_t out_pixels = size.out_pixels, in_pixels = size.in_pixels;
  const A *mean2 = saved.mean2, *rstd2 = saved.rstd2, *gate = saved.gate, *u = a.u;

  // End of the layer.
  {
    const T *y3 = saved.y3, *residual = a.residual ? x : nullptr;
    const A *mean3 = saved.mean3, *rstd3 = saved.rstd3;
    A *parts = scratch.output_parts, *residual_parts = scratch.residual_parts, *means3 = scratch.means3;
    A *factor = scratch.factor, *residual_sum = a.residual ? scratch.residual_sum : nullptr;
    A* residual_in = a.residual ? residual_parts : nullptr;
    T* dy3 = scratch.dy3;
    const int64_t run = scratch.out_run;
    const int runs = scratch.out_runs;
    TFNAS_LAUNCH((output_sums<T>), dim3(runs, ceil_div(outs, 32), slots), dim3(32, 8), 0, a.stream, dout, y3,
                 mean3, rstd3, residual, parts, residual_parts, out_pixels, outs, run);
    TFNAS_LAUNCH((output_means<A>), dim3(ceil_div(outs, 128), slots), dim3(128), 0, a.stream, parts,
                 residual_in, means3, residual_sum, runs, outs, out_pixels);
    TFNAS_LAUNCH((residual_factor<A>), dim3(1), dim3(1), 0, a.stream, u, factor, slots);
    if (grads.du) {
      A* du = grads.du;
      TFNAS_LAUNCH((mixture_grad<A>), dim3(1), dim3(32 * slots), 0, a.stream, means3, residual_sum, du, outs,
                   out_pixels);
    }
    const int grid = run_count(out_pixels * outs, 1024);
    TFNAS_LAUNCH((project_grad<T>), dim3(grid < 2048 ? grid : 2048, slots), dim3(256), 0, a.stream, dout, y3,
                 mean3, rstd3, means3, u, dy3, out_pixels, outs);
  }

  // Squeeze-and-excitation, then dh2.
  ProjectBackwardArgs<T> dz{};
  dz.dy3 = scratch.dy3, dz.weights = a.project, dz.y2 = saved.y2, dz.mean2 = mean2, dz.rstd2 = rstd2;
  dz.gate = gate, dz.dpooled = scratch.dpooled, dz.dh2 = scratch.dh2, dz.table = table, dz.choice = choice;
  dz.pixels = out_pixels, dz.batch = batch, dz.columns = outs, dz.active = active, dz.act = act;
  const size_t dz_bytes = ProjectBackwardTile<T, M, kDzWarps>(outs).shared_bytes();
  if (size.widest_se) {
    auto* kernel = project_backward<T, M, kDzWarps, DzMode::kGate>;
    dz.partial = scratch.dgate;
    allow_shared(kernel, dz_bytes);
    TFNAS_LAUNCH((kernel), dim3(batch, chunks), dim3(32 * kDzWarps), dz_bytes, a.stream, dz);
    const SqueezeExciteState<A> state{saved.pooled, saved.squeezed, gate,   scratch.dgate,        table,
                                      choice,       batch,          active, size.squeezed_stride, act};
    const SqueezeExciteWeights<A> weights = a.se;
    A *dsqueezed = scratch.dsqueezed, *dpooled = scratch.dpooled;
    const int image_groups = ceil_div(batch, kSeImages), se_blocks = ceil_div(size.widest_se, 32);
    TFNAS_LAUNCH((se_expand_backward<A>), dim3(image_groups, se_blocks, slots), dim3(32, 8), 0, a.stream,
                 state, weights, dsqueezed);
    TFNAS_LAUNCH((se_reduce_backward<A>), dim3(image_groups, chunks), dim3(32, 8), 0, a.stream, state,
                 weights, dsqueezed, dpooled, map);
    if (grads.weights()) {
      const SqueezeExciteGrads<A> se = grads.se;
      TFNAS_LAUNCH((se_weight_grad<A>), dim3(chunks, se_blocks), dim3(32, 8), 0, a.stream, state, dsqueezed,
                   se);
    }
  }
  auto* dz_kernel = project_backward<T, M, kDzWarps, DzMode::kWide>;
  dz.partial = scratch.partial2;
  allow_shared(dz_kernel, dz_bytes);
  TFNAS_LAUNCH((dz_kernel), dim3(scratch.groups, chunks), dim3(32 * kDzWarps), dz_bytes, a.stream, dz);
  A *partial2 = scratch.partial2, *means2 = scratch.means2;
  const int groups = scratch.groups;
  TFNAS_LAUNCH((finish_means<A>), dim3(ceil_div(active, 32)), dim3(32, 8), 0, a.stream, partial2, means2,
               groups, active, out_pixels);

  if (grads.weights()) {
    OuterProductArgs<T, NormActivateGate<T>> outer{};
    outer.f = {saved.y2, mean2, rstd2, gate, active, map, act};
    outer.narrow = scratch.dy3, outer.by_slot = true, outer.parts = scratch.weight_parts, outer.table = table;
    outer.choice = choice, outer.pixels = out_pixels, outer.run = scratch.outer_run_out, outer.columns = outs;
    outer.active = active;
    const int runs = scratch.outer_runs_out;
    TFNAS_LAUNCH((outer_product<T, kAcross<M>, NormActivateGate<T>>),
                 dim3(runs, ceil_div(outs, kOuterColumns), chunks), dim3(kOuterThreads), 0, a.stream, outer);
    A *parts = scratch.weight_parts, *out = grads.project;
    const int64_t count = int64_t{active} * outs;
    TFNAS_LAUNCH((finish_parts<A>), dim3(run_count(count, 256)), dim3(256), 0, a.stream, parts, out, runs,
                 count);
  }

  // Depthwise, and the wide product of dx (without expansion dx itself).
  depthwise.x = x, depthwise.rstd1 = saved.rstd1, depthwise.shift1 = saved.shift1, depthwise.y2 = saved.y2;
  depthwise.dh2 = scratch.dh2, depthwise.mean2 = mean2, depthwise.rstd2 = rstd2, depthwise.means = means2;
  depthwise.dh1 = a.expand ? (grads.weights() ? scratch.dh1 : nullptr) : grads.dx ? grads.dx : scratch.dh1;
  depthwise.dx_parts = a.expand && grads.dx ? scratch.dx_parts : nullptr;
  depthwise.partial = scratch.partial1;
  depthwise.filter_parts = grads.weights() ? scratch.filter_parts : nullptr;
  auto* depthwise_kernel = depthwise_backward<T, M, S, kWarps, 2, 4>;
  allow_shared(depthwise_kernel, depthwise_bytes);
  TFNAS_LAUNCH((depthwise_kernel), dim3(tiles, chunk_runs), dim3(32 * kWarps), depthwise_bytes, a.stream,
               depthwise);
  if (grads.weights()) {
    A *parts = scratch.filter_parts, *out = grads.depthwise;
    const int64_t count = int64_t{active} * size.taps;
    TFNAS_LAUNCH((finish_parts<A>), dim3(run_count(count, 256)), dim3(256), 0, a.stream, parts, out, tiles,
                 count);
  }
  A* factor = scratch.factor;
  if (!a.expand) {
    if (a.residual && grads.dx) {
      T* dx = grads.dx;
      const int64_t count = in_pixels * channels;
      TFNAS_LAUNCH((add_residual<T>), dim3(run_count(count, 1024)), dim3(256), 0, a.stream, dout, factor, dx,
                   count);
    }
    return scratch_arena.bytes();
  }

  // Expand.
  A *partial1 = scratch.partial1, *means1 = scratch.means1;
  TFNAS_LAUNCH((finish_means<A>), dim3(ceil_div(active, 32)), dim3(32, 8), 0, a.stream, partial1, means1,
               tiles, active, in_pixels);
  const CorrectionFactors<A> factors{a.expand, saved.rstd1, means1, table, choice, channels, active};
  const A *mean_x = saved.mean_x, *covariance_x = saved.covariance_x;
  if (grads.dx) {
    const GramTiling tiling(channels);
    A *parts = scratch.q_parts, *correction = scratch.correction, *shift = scratch.shift,
      *dx_parts = scratch.dx_parts;
    const int64_t rows = active, run = scratch.row_run, one = 1;
    const int runs = scratch.row_runs;
    allow_shared(gram<A, CorrectionFactors<A>>, tiling.shared_bytes<A>());
    TFNAS_LAUNCH((gram<A, CorrectionFactors<A>>), dim3(runs, tiling.pairs()), dim3(kGramThreads),
                 tiling.shared_bytes<A>(), a.stream, factors, parts, rows, channels, run);
    TFNAS_LAUNCH((finish_gram<A>), dim3(ceil_div(tiling.tile * tiling.tile, 256), tiling.pairs()), dim3(256),
                 0, a.stream, parts, correction, runs, channels, one);
    TFNAS_LAUNCH((input_shift<A>), dim3(ceil_div(channels, 32)), dim3(32, 8), 0, a.stream, factors, shift);
    const size_t bytes = kInputGradPixels * channels * sizeof(A);
    const A* residual = a.residual ? factor : nullptr;
    T* dx = grads.dx;
    allow_shared(input_grad<T>, bytes);
    TFNAS_LAUNCH((input_grad<T>), dim3(run_count(in_pixels, kInputGradPixels)), dim3(256), bytes, a.stream,
                 dx_parts, shift, correction, x, mean_x, dout, residual, dx, chunk_runs, in_pixels, channels);
  }
  if (grads.weights()) {
    OuterProductArgs<T, AsIs<T>> outer{};
    outer.f = {scratch.dh1}, outer.narrow = x, outer.parts = scratch.weight_parts, outer.table = table;
    outer.choice = choice, outer.pixels = in_pixels, outer.run = scratch.outer_run_in,
    outer.columns = channels;
    outer.active = active;
    const int runs = scratch.outer_runs_in;
    TFNAS_LAUNCH((outer_product<T, kAcross<M>, AsIs<T>>),
                 dim3(runs, ceil_div(channels, kOuterColumns), chunks), dim3(kOuterThreads), 0, a.stream,
                 outer);
    A *parts = scratch.weight_parts, *out = grads.expand;
    const int64_t count = int64_t{active} * channels;
    TFNAS_LAUNCH((finish_parts<A>), dim3(run_count(count, 256)), dim3(256), 0, a.stream, parts, out, runs,
                 count);
    const size_t bytes = fold_shared_elements(channels) * sizeof(A);
    allow_shared(expand_weight_grad<A>, bytes);
    TFNAS_LAUNCH((expand_weight_grad<A>), dim3(chunks), dim3(kFoldThreads), bytes, a.stream, factors, mean_x,
                 covariance_x, out, in_pixels);
  }
  return scratch_arena.bytes();
}

template <class T, Math M>
bool layer_fits(const LayerArgs<T>& a) {
  if (a.in_channels > 32 * kFoldColumns) return false;
  const LayerSizes size(a);
  size_t forward, backward;
  if (a.stride == 1) {
    expand_dw_args<T, M, 1>(a, size, forward), depthwise_backward_args<T, M, 1>(a, size, backward);
  } else {
    expand_dw_args<T, M, 2>(a, size, forward), depthwise_backward_args<T, M, 2>(a, size, backward);
  }
  const size_t room = a.device.shared_bytes;
  return forward > 0 && backward > 0 && fold_shared_elements(a.in_channels) * sizeof(Acc<T>) <= room &&
         kInputGradPixels * a.in_channels * sizeof(Acc<T>) <= room &&
         ProjectBackwardTile<T, M, 4>(a.out_channels).shared_bytes() <= room;
}

template <class T, Math M>
int64_t layer_backward(const LayerArgs<T>& a, const T* x, const T* dout, const LayerGrads<T>& grads,
                       void* saved_base, void* scratch_base) {
  return a.stride == 1 ? layer_backward_strided<T, M, 1>(a, x, dout, grads, saved_base, scratch_base)
                       : layer_backward_strided<T, M, 2>(a, x, dout, grads, saved_base, scratch_base);
}

}  // namespace tfnas::cuda
