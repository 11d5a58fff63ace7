// expand_dw.cuh and finish_stats.cuh against float64: y2 and the statistics of batch norm 2.
#include "expand_dw.cuh"
#include "finish_stats.cuh"
#include "reference_block.h"

using namespace emulator_check;
using tfnas::cuda::Math;

namespace {

template <class T, Math M, int S, int MT = 1, int WARPS = 3, int RBH = 1, int RBW = 4>
void check(const char* name, const Shape& shape, const tfnas::cuda::LayerTable& table, int choice,
           int tile_height, int tile_width, int tile_images, int chunks_per_block, double tolerance) {
  std::printf("%s: %dx%dx%dx%d, stride %d\n", name, shape.batch, shape.height, shape.width, shape.in_channels,
              shape.stride);
  using A = tfnas::cuda::Acc<T>;
  ReferenceBlock<T> block(shape, table, choice, 5);
  block.forward_to_y2();
  const std::vector<A> rstd1 = converted<A>(block.rstd1), shift1 = converted<A>(block.shift1);
  tfnas::cuda::ExpandDwArgs<T> args{};
  args.x = block.x.data(), args.expand = block.expand.data(), args.depthwise = block.depthwise.data();
  args.rstd1 = rstd1.data(), args.shift1 = shift1.data();
  args.table = &table, args.choice = choice < 0 ? nullptr : &choice;
  args.batch = shape.batch, args.height = shape.height, args.width = shape.width,
  args.channels = shape.in_channels;
  args.stride = S, args.act = shape.act, args.active = block.active;
  args.tile_height = tile_height, args.tile_width = tile_width, args.tile_images = tile_images;
  args.chunks_per_block = chunks_per_block;
  std::vector<T> y2(block.y2.size());
  std::vector<A> partial(int64_t{2} * args.tiles() * block.active), mean(block.active), rstd(block.active);
  args.y2 = y2.data(), args.partial = partial.data();
  int chunks = 0, largest = 0;
  for (int i : block.chosen) {
    chunks += tfnas::cuda::ceil_div(table.candidate[i].width, tfnas::cuda::kChunk);
    largest = std::max(largest, table.candidate[i].kernel_size);
  }
  const size_t bytes =
      tfnas::cuda::ExpandDwTile<T, M, MT, WARPS>(args, largest).shared_bytes(tile_images, largest);
  TFNAS_LAUNCH((tfnas::cuda::expand_dw<T, M, S, MT, WARPS, RBH, RBW>),
               dim3(args.tiles(), tfnas::cuda::ceil_div(chunks, chunks_per_block) + 1), dim3(WARPS * 32),
               bytes, 0, args);
  const A* partial_data = partial.data();
  A *mean_data = mean.data(), *rstd_data = rstd.data();
  const int rows = args.tiles(), active = block.active;
  const int64_t pixels = shape.out_pixels();
  TFNAS_LAUNCH((tfnas::cuda::finish_stats<A>), dim3(tfnas::cuda::ceil_div(active, 32)),
               dim3(32 * tfnas::cuda::kStatsGroups), 0, 0, partial_data, mean_data, rstd_data, rows, active,
               pixels, block.eps);
  expect_close("y2", y2, block.y2, tolerance, 1);
  // Vectors have gaps between width and pitch: compare used channels only.
  std::vector<double> used_mean, used_rstd;
  std::vector<A> got_mean, got_rstd;
  block.for_each_channel([&](int k, const tfnas::cuda::CandidateRows&, int c) {
    const int v = block.active_at[k] + c;
    used_mean.push_back(block.mean2[v]), used_rstd.push_back(block.rstd2[v]);
    got_mean.push_back(mean[v]), got_rstd.push_back(rstd[v]);
  });
  expect_close("BN2 mean", got_mean, used_mean, tolerance, 1);
  expect_close("BN2 1/std", got_rstd, used_rstd, tolerance);
}

}  // namespace

int main() {
  const tfnas::cuda::LayerTable mixed = make_table({{3, 33, 0}, {5, 1, 0}, {3, 40, 0}, {7, 9, 0}});
  return run_in_all_orders([&] {
    check<double, Math::kFma, 1>("fp64, mixture", {1, 5, 7, 9, 4, 1, tfnas::cuda::kSwish}, mixed, -1, 3, 4, 1,
                                 2, 1e-12);
    check<double, Math::kFma, 2>("fp64, stride 2", {3, 5, 7, 3, 4, 2, tfnas::cuda::kHardSwish}, mixed, 0, 3,
                                 4, 2, 1, 1e-12);
    check<float, Math::kTf32x3, 1, 2, 2, 2, 4>("3xTF32", {2, 9, 11, 24, 4, 1, tfnas::cuda::kRelu}, mixed, -1,
                                               4, 8, 1, 3, 3e-6);
    check<float, Math::kTf32x3, 2>("3xTF32, 1x1 maps", {3, 1, 1, 17, 4, 2, tfnas::cuda::kSwish}, mixed, 3, 2,
                                   4, 1, 1, 3e-6);
    check<float, Math::kFma, 2>("fp32 without tensor cores", {2, 9, 6, 16, 4, 2, tfnas::cuda::kRelu6}, mixed,
                                1, 2, 4, 2, 1, 3e-6);
    check<float, Math::kTf32, 1>("tf32", {2, 7, 7, 20, 4, 1, tfnas::cuda::kSwish}, mixed, -1, 7, 8, 2, 2,
                                 4e-3);
    check<__nv_bfloat16, Math::kBf16, 1>("bf16", {2, 7, 9, 23, 4, 1, tfnas::cuda::kSwish}, mixed, -1, 4, 4, 1,
                                         2, 2e-2);
  });
}
