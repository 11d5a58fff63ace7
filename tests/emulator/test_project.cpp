// The second half of the forward against float64: squeeze-and-excitation, project, batch norm 3, mixture,
// residual.
#include "finish.cuh"
#include "finish_stats.cuh"
#include "narrow_product.cuh"
#include "reference_block.h"
#include "squeeze_excite.cuh"

using namespace emulator_check;
using tfnas::cuda::Math;

namespace {

template <class T, Math M, int WARPS_M = 2, int WARPS_N = 1, int NT = 2>
void check(const char* name, const Shape& shape, const tfnas::cuda::LayerTable& table, int choice, int splits,
           double tolerance) {
  std::printf("%s: %dx%dx%d -> %d channels, %d splits\n", name, shape.batch, shape.height, shape.width,
              shape.out_channels, splits);
  using A = tfnas::cuda::Acc<T>;
  ReferenceBlock<T> block(shape, table, choice, 9);
  block.forward_to_y2();
  const std::vector<T> y2 = converted<T>(block.y2);
  for (size_t i = 0; i < y2.size(); i++) block.y2[i] = to_double(y2[i]);
  block.forward_from_y2();

  const tfnas::cuda::LayerTable* layer = &table;
  const int* chosen = choice < 0 ? nullptr : &choice;
  const int batch = shape.batch, map = shape.out_height() * shape.out_width(), active = block.active;
  const int stride = block.squeezed_stride, act = shape.act, outs = shape.out_channels;
  const int slots = static_cast<int>(block.chosen.size());
  const int64_t pixels = shape.out_pixels();
  int chunks = 0, widest_se = 1;
  for (int i : block.chosen) {
    chunks += tfnas::cuda::ceil_div(table.candidate[i].width, tfnas::cuda::kChunk);
    widest_se = std::max(widest_se, table.candidate[i].se_channels);
  }
  const std::vector<A> mean2 = converted<A>(block.mean2), rstd2 = converted<A>(block.rstd2);
  std::vector<A> pooled(block.pooled.size()), squeezed(block.squeezed.size()), gate(block.gate.size(), A(1));
  const tfnas::cuda::SqueezeExciteWeights<A> weights{block.reduce_weight.data(), block.reduce_bias.data(),
                                                     block.expand_weight.data(), block.expand_bias.data()};
  const T* y2_data = y2.data();
  const A *mean2_data = mean2.data(), *rstd2_data = rstd2.data();
  A *pooled_data = pooled.data(), *squeezed_data = squeezed.data(), *gate_data = gate.data();
  TFNAS_LAUNCH((tfnas::cuda::se_pool<T>), dim3(batch, chunks), dim3(32, 8), 0, 0, y2_data, mean2_data,
               rstd2_data, pooled_data, layer, chosen, batch, map, active, act);
  const int image_groups = tfnas::cuda::ceil_div(batch, tfnas::cuda::kSeImages);
  TFNAS_LAUNCH((tfnas::cuda::se_reduce<A>), dim3(image_groups, tfnas::cuda::ceil_div(widest_se, 32), slots),
               dim3(32, 8), 0, 0, pooled_data, weights, squeezed_data, layer, chosen, batch, active, stride);
  TFNAS_LAUNCH((tfnas::cuda::se_expand<A>), dim3(image_groups, chunks + 1), dim3(32, 8), 0, 0, squeezed_data,
               weights, gate_data, layer, chosen, batch, active, stride, act);
  expect_close("gates", gate, block.gate, tolerance);

  using Tile = tfnas::cuda::NarrowProductTile<T, M, WARPS_M, WARPS_N, NT>;
  const int blocks = tfnas::cuda::ceil_div(static_cast<int>(pixels), Tile::kPixels);
  const int64_t run = 16;
  const int runs = tfnas::cuda::ceil_div(static_cast<int>(pixels), run), rows = splits > 1 ? runs : blocks;
  std::vector<T> y3(block.y3.size()), x = block.random.template normal<T>(pixels * outs), out(pixels * outs);
  std::vector<A> parts(splits > 1 ? splits * y3.size() : 0), partial(int64_t{2} * slots * rows * outs),
      mean3(slots * outs), rstd3(slots * outs);
  tfnas::cuda::NarrowProductArgs<T, tfnas::cuda::NormActivateGate<T>> args{};
  args.f = {y2_data, mean2_data, rstd2_data, gate_data, active, map, act};
  args.weights = block.project.data(), args.table = layer, args.choice = chosen;
  args.pixels = pixels, args.columns = outs, args.splits = splits;
  args.parts = splits > 1 ? parts.data() : nullptr, args.out = y3.data(), args.partial = partial.data();
  TFNAS_LAUNCH((tfnas::cuda::narrow_product<T, M, WARPS_M, WARPS_N, NT, tfnas::cuda::NormActivateGate<T>>),
               dim3(blocks, tfnas::cuda::ceil_div(outs, Tile::kColumns) * splits, slots),
               dim3(Tile::kThreads), Tile::kSharedBytes, 0, args);
  T* y3_data = y3.data();
  A *partial_data = partial.data(), *mean3_data = mean3.data(), *rstd3_data = rstd3.data();
  const A* parts_data = parts.data();
  if (splits > 1) {
    TFNAS_LAUNCH((tfnas::cuda::add_parts<T>), dim3(runs, tfnas::cuda::ceil_div(outs, 32), slots), dim3(32, 8),
                 0, 0, parts_data, y3_data, partial_data, pixels, outs, splits, run);
  }
  TFNAS_LAUNCH((tfnas::cuda::finish_stats<A>), dim3(tfnas::cuda::ceil_div(outs, 32), slots),
               dim3(32 * tfnas::cuda::kStatsGroups), 0, 0, partial_data, mean3_data, rstd3_data, rows, outs,
               pixels, block.eps);
  expect_close("y3", y3, block.y3, tolerance);
  expect_close("BN3 mean", mean3, block.mean3, tolerance, 1);
  expect_close("BN3 1/std", rstd3, block.rstd3, tolerance);

  const std::vector<A> u = converted<A>(block.u);
  const A* u_data = choice < 0 ? u.data() : nullptr;
  const T* x_data = x.data();
  T* out_data = out.data();
  TFNAS_LAUNCH((tfnas::cuda::finish<T>), dim3(3), dim3(64), 0, 0, y3_data, mean3_data, rstd3_data, u_data,
               x_data, out_data, slots, pixels, outs);
  double total = 0;
  for (double weight : block.u) total += weight;
  for (size_t i = 0; i < out.size(); i++) block.out[i] += total * to_double(x[i]);
  expect_close("out", out, block.out, tolerance);
}

}  // namespace

int main() {
  const tfnas::cuda::LayerTable mixed = make_table({{3, 33, 0}, {5, 1, 3}, {3, 40, 35}, {3, 9, 0}});
  return run_in_all_orders([&] {
    check<double, Math::kFma>("fp64, mixture", {2, 5, 7, 3, 7, 1, tfnas::cuda::kSwish}, mixed, -1, 1, 1e-12);
    check<double, Math::kFma>("fp64, one candidate", {3, 3, 5, 3, 20, 2, tfnas::cuda::kHardSwish}, mixed, 2,
                              2, 1e-12);
    check<float, Math::kTf32x3, 4, 2, 2>("3xTF32", {2, 9, 7, 3, 40, 1, tfnas::cuda::kSwish}, mixed, -1, 1,
                                         4e-6);
    check<float, Math::kTf32x3>("3xTF32, split", {9, 3, 3, 3, 24, 1, tfnas::cuda::kRelu}, mixed, -1, 2, 4e-6);
    check<float, Math::kFma>("fp32 without tensor cores", {2, 4, 4, 3, 5, 1, tfnas::cuda::kRelu6}, mixed, 0,
                             1, 4e-6);
    check<float, Math::kTf32>("tf32", {2, 7, 7, 3, 24, 1, tfnas::cuda::kSwish}, mixed, 2, 1, 4e-3);
    check<__nv_bfloat16, Math::kBf16>("bf16", {2, 7, 7, 3, 24, 1, tfnas::cuda::kSwish}, mixed, -1, 1, 2e-2);
  });
}
