// The forward of one layer: the sequence of launches from x to out, for a sampled candidate or the mixture.
#pragma once

#include "expand_dw.cuh"
#include "finish.cuh"
#include "finish_stats.cuh"
#include "fold.cuh"
#include "layer_plan.cuh"
#include "moments.cuh"
#include "narrow_product.cuh"

namespace tfnas::cuda {

// How the wide kernels are instantiated, in one place for forward and backward.
template <int S>
struct WideShape {
  static constexpr int kWarps = 8, kProductTiles = 1, kRegisterRows = S == 1 ? 2 : 1, kRegisterColumns = 7;
};
template <class T, Math M>
using ProductTile = NarrowProductTile<T, M, 4, 2, 4>;  // 64 pixels x 64 columns
constexpr int kSmallMapPixels = 4096;  // below this a product's channels are split over blocks

inline int splits_for(int64_t pixels, int chunks_of_one_slot) {
  return pixels >= kSmallMapPixels ? 1 : chunks_of_one_slot >= 8 ? 4 : 1;
}

// What only this call needs.
template <class T>
struct ForwardScratch {
  using A = Acc<T>;
  static constexpr int kRuns = 256;
  int64_t x_run, parts_run;
  int x_runs, splits, parts_runs;
  A *x_sums, *gram_parts, *partial2, *parts, *partial3;
  ForwardScratch(const LayerArgs<T>& a, int tiles, int product_blocks, Arena& arena) {
    const LayerSizes size(a);
    const GramTiling tiling(a.in_channels);
    x_run = run_length(size.in_pixels, kRuns, kGramPixels), x_runs = run_count(size.in_pixels, x_run);
    splits = splits_for(size.out_pixels, size.chunks / size.slots);
    parts_run = run_length(size.out_pixels, kRuns, 8), parts_runs = run_count(size.out_pixels, parts_run);
    x_sums = arena.take<A>(int64_t{x_runs} * a.in_channels);
    gram_parts = arena.take<A>(int64_t{x_runs} * tiling.pairs() * tiling.tile * tiling.tile);
    partial2 = arena.take<A>(int64_t{2} * tiles * size.active);
    parts = splits > 1 ? arena.take<A>(size.slots * splits * size.out_pixels * a.out_channels) : nullptr;
    const int rows = splits > 1 ? parts_runs : product_blocks;
    partial3 = arena.take<A>(int64_t{2} * size.slots * rows * a.out_channels);
  }
};

template <class T, Math M, int S>
ExpandDwArgs<T> expand_dw_args(const LayerArgs<T>& a, const LayerSizes& size, size_t& shared_bytes) {
  using Shape = WideShape<S>;
  using Tile = ExpandDwTile<T, M, Shape::kProductTiles, Shape::kWarps>;
  ExpandDwArgs<T> args{};
  args.expand = a.expand, args.depthwise = a.depthwise, args.table = a.table, args.choice = a.choice;
  args.batch = a.batch, args.height = a.height, args.width = a.width, args.channels = a.in_channels;
  args.stride = S, args.act = a.act, args.active = size.active;
  shared_bytes = fit_tile<Tile>(
      args, a, size, size.out_height, size.out_width, Shape::kRegisterRows, Shape::kRegisterColumns,
      kExpandBlocks<M, S>,
      [&](const ExpandDwArgs<T>& tried) {
        return Tile(tried, size.largest_kernel).shared_bytes(tried.tile_images, size.largest_kernel);
      },
      [&](const ExpandDwArgs<T>& tried) {
        const double taps = size.taps,
                     outputs = double(tried.tile_images) * tried.tile_height * tried.tile_width;
        return tried.tiles() *
               (Tile(tried, size.largest_kernel).rows * (2.0 + a.in_channels / 8.0) + outputs * taps);
      });
  return args;
}

template <class T, Math M, int S>
int64_t layer_forward_strided(const LayerArgs<T>& a, const T* x, T* out, void* saved_base,
                              void* scratch_base) {
  using A = Acc<T>;
  using Shape = WideShape<S>;
  using Product = ProductTile<T, M>;
  const LayerSizes size(a);
  size_t wide_bytes;
  ExpandDwArgs<T> wide = expand_dw_args<T, M, S>(a, size, wide_bytes);
  const int tiles = wide.tiles(), blocks = run_count(size.out_pixels, Product::kPixels), slots = size.slots;
  Arena scratch_arena(scratch_base), saved_arena(saved_base);
  const ForwardScratch<T> scratch(a, tiles, blocks, scratch_arena);
  const SavedLayer<T> saved(a, saved_arena);
  if (!scratch_base) return scratch_arena.bytes();
  const LayerTable* table = a.table;
  const int* choice = a.choice;
  const int channels = a.in_channels, outs = a.out_channels, active = size.active, batch = a.batch,
            act = a.act;
  const double eps = a.eps;

  if (a.expand) {
    const int64_t pixels = size.in_pixels, run = scratch.x_run;
    const int runs = scratch.x_runs;
    A *sums = scratch.x_sums, *mean = saved.mean_x, *parts = scratch.gram_parts,
      *covariance = saved.covariance_x;
    A *rstd1 = saved.rstd1, *shift1 = saved.shift1;
    const GramTiling tiling(channels);
    TFNAS_LAUNCH((channel_sums<T, A>), dim3(runs, ceil_div(channels, 32)), dim3(32, 8), 0, a.stream, x, sums,
                 pixels, channels, run);
    TFNAS_LAUNCH((finish_mean<A>), dim3(ceil_div(channels, 64)), dim3(64), 0, a.stream, sums, mean, runs,
                 channels, pixels);
    const Centred<T> centred{x, mean, channels};
    allow_shared(gram<A, Centred<T>>, tiling.shared_bytes<A>());
    TFNAS_LAUNCH((gram<A, Centred<T>>), dim3(runs, tiling.pairs()), dim3(kGramThreads),
                 tiling.shared_bytes<A>(), a.stream, centred, parts, pixels, channels, run);
    TFNAS_LAUNCH((finish_gram<A>), dim3(ceil_div(tiling.tile * tiling.tile, 256), tiling.pairs()), dim3(256),
                 0, a.stream, parts, covariance, runs, channels, pixels);
    const size_t bytes = fold_shared_elements(channels) * sizeof(A);
    const A* expand = a.expand;
    allow_shared(fold<A>, bytes);
    TFNAS_LAUNCH((fold<A>), dim3(size.chunks), dim3(kFoldThreads), bytes, a.stream, expand, mean, covariance,
                 rstd1, shift1, table, choice, channels, eps);
  }

  wide.x = x, wide.rstd1 = saved.rstd1, wide.shift1 = saved.shift1, wide.y2 = saved.y2,
  wide.partial = scratch.partial2;
  auto* expand_kernel =
      expand_dw<T, M, S, Shape::kProductTiles, Shape::kWarps, Shape::kRegisterRows, Shape::kRegisterColumns>;
  allow_shared(expand_kernel, wide_bytes);
  TFNAS_LAUNCH((expand_kernel), dim3(tiles, ceil_div(size.chunks, wide.chunks_per_block)),
               dim3(32 * Shape::kWarps), wide_bytes, a.stream, wide);
  A *partial2 = scratch.partial2, *mean2 = saved.mean2, *rstd2 = saved.rstd2;
  const int64_t out_pixels = size.out_pixels;
  TFNAS_LAUNCH((finish_stats<A>), dim3(ceil_div(active, 32)), dim3(32 * kStatsGroups), 0, a.stream, partial2,
               mean2, rstd2, tiles, active, out_pixels, eps);

  const int map = size.out_height * size.out_width, stride = size.squeezed_stride;
  if (size.widest_se) {
    const int image_groups = ceil_div(batch, kSeImages);
    const SqueezeExciteWeights<A> weights = a.se;
    const T* y2 = saved.y2;
    A *pooled = saved.pooled, *squeezed = saved.squeezed, *gate = saved.gate;
    TFNAS_LAUNCH((se_pool<T>), dim3(batch, size.chunks), dim3(32, 8), 0, a.stream, y2, mean2, rstd2, pooled,
                 table, choice, batch, map, active, act);
    TFNAS_LAUNCH((se_reduce<A>), dim3(image_groups, ceil_div(size.widest_se, 32), slots), dim3(32, 8), 0,
                 a.stream, pooled, weights, squeezed, table, choice, batch, active, stride);
    TFNAS_LAUNCH((se_expand<A>), dim3(image_groups, size.chunks), dim3(32, 8), 0, a.stream, squeezed, weights,
                 gate, table, choice, batch, active, stride, act);
  }

  NarrowProductArgs<T, NormActivateGate<T>> product{};
  product.f = {saved.y2, mean2, rstd2, saved.gate, active, map, act};
  product.weights = a.project, product.parts = scratch.parts, product.out = saved.y3;
  product.partial = scratch.partial3, product.table = table, product.choice = choice;
  product.pixels = out_pixels, product.columns = outs, product.splits = scratch.splits;
  auto* project_kernel = narrow_product<T, M, 4, 2, 4, NormActivateGate<T>>;
  allow_shared(project_kernel, Product::kSharedBytes);
  TFNAS_LAUNCH((project_kernel), dim3(blocks, ceil_div(outs, Product::kColumns) * scratch.splits, slots),
               dim3(Product::kThreads), Product::kSharedBytes, a.stream, product);
  const A* parts = scratch.parts;
  A *partial3 = scratch.partial3, *mean3 = saved.mean3, *rstd3 = saved.rstd3;
  T* y3 = saved.y3;
  const int splits = scratch.splits, rows = splits > 1 ? scratch.parts_runs : blocks;
  const int64_t run = scratch.parts_run;
  if (splits > 1) {
    TFNAS_LAUNCH((add_parts<T>), dim3(rows, ceil_div(outs, 32), slots), dim3(32, 8), 0, a.stream, parts, y3,
                 partial3, out_pixels, outs, splits, run);
  }
  TFNAS_LAUNCH((finish_stats<A>), dim3(ceil_div(outs, 32), slots), dim3(32 * kStatsGroups), 0, a.stream,
               partial3, mean3, rstd3, rows, outs, out_pixels, eps);
  const A* u = a.u;
  const T* residual = a.residual ? x : nullptr;
  const int grid = run_count(out_pixels * outs, 1024);
  TFNAS_LAUNCH((finish<T>), dim3(grid < 4096 ? grid : 4096), dim3(256), 0, a.stream, y3, mean3, rstd3, u,
               residual, out, slots, out_pixels, outs);
  return scratch_arena.bytes();
}

template <class T, Math M>
int64_t layer_forward(const LayerArgs<T>& a, const T* x, T* out, void* saved_base, void* scratch_base) {
  return a.stride == 1 ? layer_forward_strided<T, M, 1>(a, x, out, saved_base, scratch_base)
                       : layer_forward_strided<T, M, 2>(a, x, out, saved_base, scratch_base);
}

template <class T>
int64_t layer_saved_bytes(const LayerArgs<T>& a) {
  Arena arena(nullptr);
  SavedLayer<T>(a, arena);
  return arena.bytes();
}

}  // namespace tfnas::cuda
