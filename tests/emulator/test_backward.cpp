// The whole backward, kernel by kernel, against the textbook backward in float64: dx, du, and every weight
// gradient.
#include "depthwise_backward.cuh"
#include "expand_backward.cuh"
#include "finish_backward.cuh"
#include "finish_stats.cuh"
#include "moments.cuh"
#include "outer_product.cuh"
#include "project_backward.cuh"
#include "reference_block.h"
#include "squeeze_excite_backward.cuh"

using namespace emulator_check;
using namespace tfnas::cuda;

namespace {

int blocks_of(int64_t count, int64_t size) { return static_cast<int>((count + size - 1) / size); }

struct Tiles {
  int height, width, images, chunks_per_block;
};

// M: of the products that run along their operands; ACROSS: of the outer products, which read bf16 as tf32.
template <class T, Math M, Math ACROSS, int S>
void check(const char* name, const Shape& shape, const LayerTable& table, int choice, bool residual,
           Tiles tiles, double tolerance) {
  std::printf("%s: %dx%dx%dx%d -> %d channels, stride %d\n", name, shape.batch, shape.height, shape.width,
              shape.in_channels, shape.out_channels, S);
  using A = Acc<T>;
  constexpr int kWarps = 2;
  ReferenceBlock<T> block(shape, table, choice, 21);
  block.forward_to_y2();
  const std::vector<T> y2 = converted<T>(block.y2);
  for (size_t i = 0; i < y2.size(); i++) block.y2[i] = to_double(y2[i]);
  block.forward_from_y2();
  const std::vector<T> y3 = converted<T>(block.y3);
  const int64_t pixels = shape.out_pixels(), in_pixels = shape.in_pixels();
  const std::vector<T> dout = block.random.template normal<T>(pixels * shape.out_channels, 1, 0.3);
  block.backward(dout, residual);

  const LayerTable* layer = &table;
  const int* chosen = choice < 0 ? nullptr : &choice;
  const int batch = shape.batch, map = static_cast<int>(pixels / batch), active = block.active,
            act = shape.act;
  const int ins = shape.in_channels, outs = shape.out_channels, slots = static_cast<int>(block.chosen.size());
  int chunks = 0, widest_se = 1, largest = 0;
  for (int i : block.chosen) {
    chunks += ceil_div(table.candidate[i].width, kChunk);
    widest_se = std::max(widest_se, table.candidate[i].se_channels);
    largest = std::max(largest, table.candidate[i].kernel_size);
  }
  const std::vector<A> mean3 = converted<A>(block.mean3), rstd3 = converted<A>(block.rstd3);
  const std::vector<A> mean2 = converted<A>(block.mean2), rstd2 = converted<A>(block.rstd2);
  const std::vector<A> rstd1 = converted<A>(block.rstd1), shift1 = converted<A>(block.shift1);
  const std::vector<A> u = converted<A>(block.u), gate = converted<A>(block.gate);
  const std::vector<A> pooled = converted<A>(block.pooled), squeezed = converted<A>(block.squeezed);
  const T *y2_data = y2.data(), *y3_data = y3.data(), *dout_data = dout.data(), *x_data = block.x.data();
  const T* residual_data = residual ? x_data : nullptr;
  const A *mean3_data = mean3.data(), *rstd3_data = rstd3.data(), *mean2_data = mean2.data();
  const A *rstd2_data = rstd2.data(), *gate_data = gate.data(), *u_data = choice < 0 ? u.data() : nullptr;

  // End of the layer: means, du, dy3.
  const int64_t run = 24;
  int runs = blocks_of(pixels, run);
  std::vector<A> sums(2 * slots * runs * outs), residual_parts(runs * outs), means3(2 * slots * outs),
      residual_sum(outs), du(slots);
  std::vector<T> dy3(y3.size());
  A *sums_data = sums.data(), *residual_parts_data = residual_parts.data(), *means3_data = means3.data();
  A *residual_sum_data = residual ? residual_sum.data() : nullptr, *du_data = du.data();
  T* dy3_data = dy3.data();
  TFNAS_LAUNCH((output_sums<T>), dim3(runs, ceil_div(outs, 32), slots), dim3(32, 8), 0, 0, dout_data, y3_data,
               mean3_data, rstd3_data, residual_data, sums_data, residual_parts_data, pixels, outs, run);
  const A *sums_in = sums_data, *residual_in = residual ? residual_parts_data : nullptr;
  TFNAS_LAUNCH((output_means<A>), dim3(ceil_div(outs, 128), slots), dim3(128), 0, 0, sums_in, residual_in,
               means3_data, residual_sum_data, runs, outs, pixels);
  const A *means3_in = means3_data, *residual_sum_in = residual_sum_data;
  TFNAS_LAUNCH((mixture_grad<A>), dim3(1), dim3(32 * slots), 0, 0, means3_in, residual_sum_in, du_data, outs,
               pixels);
  TFNAS_LAUNCH((project_grad<T>), dim3(2, slots), dim3(64), 0, 0, dout_data, y3_data, mean3_data, rstd3_data,
               means3_in, u_data, dy3_data, pixels, outs);
  expect_close("du", du, block.du, tolerance, std::sqrt(pixels * outs));

  // Squeeze-and-excitation, then dh2.
  ProjectBackwardArgs<T> pa{};
  std::vector<A> dgate(batch * active), dpooled(batch * active), dsqueezed(squeezed.size());
  const int groups = 2;
  std::vector<A> partial2(2 * groups * active), means2(2 * active);
  std::vector<T> dh2(y2.size());
  pa.dy3 = dy3_data, pa.weights = block.project.data(), pa.y2 = y2_data, pa.mean2 = mean2_data,
  pa.rstd2 = rstd2_data;
  pa.gate = gate_data, pa.table = layer, pa.choice = chosen, pa.pixels = pixels, pa.batch = batch,
  pa.columns = outs;
  pa.active = active, pa.act = act, pa.partial = dgate.data();
  const size_t dz_bytes = ProjectBackwardTile<T, M, kWarps>(outs).shared_bytes();
  TFNAS_LAUNCH((project_backward<T, M, kWarps, DzMode::kGate>), dim3(batch, chunks + 1), dim3(32 * kWarps),
               dz_bytes, 0, pa);
  const SqueezeExciteState<A> state{pooled.data(), squeezed.data(), gate_data, dgate.data(),          layer,
                                    chosen,        batch,           active,    block.squeezed_stride, act};
  const SqueezeExciteWeights<A> se_weights{block.reduce_weight.data(), block.reduce_bias.data(),
                                           block.expand_weight.data(), block.expand_bias.data()};
  std::vector<A> dreduce_weight(block.reduce_weight.size()), dexpand_weight(dreduce_weight.size()),
      dreduce_bias(block.reduce_bias.size()), dexpand_bias(block.expand_bias.size());
  const SqueezeExciteGrads<A> se_grads{dreduce_weight.data(), dreduce_bias.data(), dexpand_weight.data(),
                                       dexpand_bias.data()};
  A *dsqueezed_data = dsqueezed.data(), *dpooled_data = dpooled.data();
  const A* dsqueezed_in = dsqueezed_data;
  const int image_groups = ceil_div(batch, kSeImages), se_blocks = ceil_div(widest_se, 32);
  TFNAS_LAUNCH((se_expand_backward<A>), dim3(image_groups, se_blocks, slots), dim3(32, 8), 0, 0, state,
               se_weights, dsqueezed_data);
  TFNAS_LAUNCH((se_reduce_backward<A>), dim3(image_groups, chunks), dim3(32, 8), 0, 0, state, se_weights,
               dsqueezed_in, dpooled_data, map);
  TFNAS_LAUNCH((se_weight_grad<A>), dim3(chunks, se_blocks), dim3(32, 8), 0, 0, state, dsqueezed_in,
               se_grads);
  expect_close("dW SE reduce", dreduce_weight, block.dreduce_weight, tolerance, 1e-3);
  expect_close("db SE reduce", dreduce_bias, block.dreduce_bias, tolerance, 1e-3);
  expect_close("dW SE expand", dexpand_weight, block.dexpand_weight, tolerance, 1e-3);
  expect_close("db SE expand", dexpand_bias, block.dexpand_bias, tolerance, 1e-3);

  pa.dpooled = dpooled_data, pa.dh2 = dh2.data(), pa.partial = partial2.data();
  TFNAS_LAUNCH((project_backward<T, M, kWarps, DzMode::kWide>), dim3(groups, chunks + 1), dim3(32 * kWarps),
               dz_bytes, 0, pa);
  const A* partial2_in = partial2.data();
  A* means2_data = means2.data();
  TFNAS_LAUNCH((finish_means<A>), dim3(ceil_div(active, 32)), dim3(32, 8), 0, 0, partial2_in, means2_data,
               groups, active, pixels);
  block.clear_unused(dh2, pixels);
  expect_close("dh2", dh2, block.dh2, tolerance);

  // dW3.
  OuterProductArgs<T, NormActivateGate<T>> wa{};
  const int64_t outer_run = 48;
  runs = blocks_of(pixels, outer_run);
  std::vector<A> dproject_parts(int64_t{runs} * active * outs), dproject(active * outs);
  wa.f = {y2_data, mean2_data, rstd2_data, gate_data, active, map, act};
  wa.narrow = dy3_data, wa.by_slot = true, wa.parts = dproject_parts.data(), wa.table = layer,
  wa.choice = chosen;
  wa.pixels = pixels, wa.run = outer_run, wa.columns = outs, wa.active = active;
  TFNAS_LAUNCH((outer_product<T, ACROSS, NormActivateGate<T>>),
               dim3(runs, ceil_div(outs, kOuterColumns), chunks), dim3(kOuterThreads), 0, 0, wa);
  const A* dproject_in = dproject_parts.data();
  A* dproject_data = dproject.data();
  const int64_t dproject_count = int64_t{active} * outs;
  TFNAS_LAUNCH((finish_parts<A>), dim3(2), dim3(64), 0, 0, dproject_in, dproject_data, runs, dproject_count);
  expect_close("dW project", dproject, block.dproject, tolerance);

  // Depthwise.
  DepthwiseBackwardArgs<T> da{};
  std::vector<T> dh1(block.h1.size());
  da.x = x_data, da.expand = block.expand.data(), da.rstd1 = rstd1.data(), da.shift1 = shift1.data();
  da.depthwise = block.depthwise.data(), da.y2 = y2_data, da.dh2 = dh2.data(), da.mean2 = mean2_data;
  da.rstd2 = rstd2_data, da.means = means2_data, da.dh1 = dh1.data(), da.table = layer, da.choice = chosen;
  da.batch = batch, da.height = shape.height, da.width = shape.width, da.channels = ins, da.stride = S,
  da.act = act;
  da.active = active, da.taps = 49, da.tile_height = tiles.height, da.tile_width = tiles.width;
  da.tile_images = tiles.images, da.chunks_per_block = tiles.chunks_per_block;
  const int tile_count = da.tiles();
  std::vector<A> filter_parts(int64_t{tile_count} * active * da.taps),
      partial1(int64_t{2} * tile_count * active), dfilter(active * da.taps), means1(2 * active);
  const int chunk_runs = da.chunk_runs(chunks) + 1;  // the last run has no chunk: its part of dx is zero
  std::vector<A> dx_parts(chunk_runs * in_pixels * ins);
  da.filter_parts = filter_parts.data(), da.partial = partial1.data(), da.dx_parts = dx_parts.data();
  TFNAS_LAUNCH((depthwise_backward<T, M, S, kWarps, 2, 2>), dim3(tile_count, chunk_runs), dim3(32 * kWarps),
               (DepthwiseBackwardTile<T, M, kWarps>(da, largest).shared_bytes(largest)), 0, da);
  const A *filter_in = filter_parts.data(), *partial1_in = partial1.data();
  A *dfilter_data = dfilter.data(), *means1_data = means1.data();
  const int64_t filter_count = int64_t{active} * da.taps;
  TFNAS_LAUNCH((finish_parts<A>), dim3(2), dim3(64), 0, 0, filter_in, dfilter_data, tile_count, filter_count);
  TFNAS_LAUNCH((finish_means<A>), dim3(ceil_div(active, 32)), dim3(32, 8), 0, 0, partial1_in, means1_data,
               tile_count, active, in_pixels);
  block.clear_unused(dh1, in_pixels);
  expect_close("dW depthwise", dfilter, block.dfilter, tolerance);
  expect_close("dh1", dh1, block.dh1, tolerance);

  // Expand: moments of x, correction, weight gradient.
  std::vector<double> mean_x(ins), covariance(ins * ins);
  for (int64_t p = 0; p < in_pixels; p++) {
    for (int i = 0; i < ins; i++) mean_x[i] += to_double(block.x[p * ins + i]) / in_pixels;
  }
  for (int64_t p = 0; p < in_pixels; p++) {
    for (int i = 0; i < ins * ins; i++) {
      covariance[i] += (to_double(block.x[p * ins + i / ins]) - mean_x[i / ins]) *
                       (to_double(block.x[p * ins + i % ins]) - mean_x[i % ins]) / in_pixels;
    }
  }
  const std::vector<A> mu = converted<A>(mean_x), c = converted<A>(covariance);
  const A *mu_data = mu.data(), *c_data = c.data();
  const CorrectionFactors<A> factors{
      block.expand.data(), rstd1.data(), means1_data, layer, chosen, ins, active};
  const GramTiling tiling(ins);
  const int64_t item_run = 40, items = active;
  runs = blocks_of(items, item_run);
  std::vector<A> q_parts(int64_t{runs} * tiling.pairs() * tiling.tile * tiling.tile), q(ins * ins),
      shift(ins);
  A *q_parts_data = q_parts.data(), *q_data = q.data(), *shift_data = shift.data();
  TFNAS_LAUNCH((gram<A, CorrectionFactors<A>>), dim3(runs, tiling.pairs()), dim3(kGramThreads),
               tiling.shared_bytes<A>(), 0, factors, q_parts_data, items, ins, item_run);
  const A* q_parts_in = q_parts_data;
  const int64_t one = 1;
  TFNAS_LAUNCH((finish_gram<A>), dim3(ceil_div(tiling.tile * tiling.tile, 256), tiling.pairs()), dim3(256), 0,
               0, q_parts_in, q_data, runs, ins, one);
  TFNAS_LAUNCH((input_shift<A>), dim3(ceil_div(ins, 32)), dim3(32, 8), 0, 0, factors, shift_data);

  std::vector<T> dx(in_pixels * ins);
  A total = 0;
  for (A weight : u) total += weight;
  const A *dx_parts_in = dx_parts.data(), *shift_in = shift_data, *q_in = q_data,
          *total_data = residual ? &total : nullptr;
  T* dx_data = dx.data();
  TFNAS_LAUNCH((input_grad<T>), dim3(blocks_of(in_pixels, kInputGradPixels)), dim3(256),
               kInputGradPixels * ins * sizeof(A), 0, dx_parts_in, shift_in, q_in, x_data, mu_data, dout_data,
               total_data, dx_data, chunk_runs, in_pixels, ins);
  expect_close("dx", dx, block.dx, tolerance);

  OuterProductArgs<T, AsIs<T>> ga{};
  runs = blocks_of(in_pixels, outer_run);
  std::vector<A> g_parts(int64_t{runs} * active * ins), dexpand(active * ins);
  ga.f = {dh1.data()}, ga.narrow = x_data, ga.parts = g_parts.data(), ga.table = layer, ga.choice = chosen;
  ga.pixels = in_pixels, ga.run = outer_run, ga.columns = ins, ga.active = active;
  TFNAS_LAUNCH((outer_product<T, ACROSS, AsIs<T>>), dim3(runs, ceil_div(ins, kOuterColumns), chunks),
               dim3(kOuterThreads), 0, 0, ga);
  const A* g_in = g_parts.data();
  A* dexpand_data = dexpand.data();
  const int64_t dexpand_count = int64_t{active} * ins;
  TFNAS_LAUNCH((finish_parts<A>), dim3(2), dim3(64), 0, 0, g_in, dexpand_data, runs, dexpand_count);
  TFNAS_LAUNCH((expand_weight_grad<A>), dim3(chunks), dim3(kFoldThreads),
               fold_shared_elements(ins) * sizeof(A), 0, factors, mu_data, c_data, dexpand_data, in_pixels);
  expect_close("dW expand", dexpand, block.dexpand, tolerance);
}

}  // namespace

int main() {
  const LayerTable mixed = make_table({{3, 33, 0}, {5, 1, 3}, {5, 40, 35}, {7, 9, 0}});
  return run_in_all_orders([&] {
    check<double, Math::kFma, Math::kFma, 1>("fp64, mixture, residual", {2, 5, 7, 7, 7, 1, kSwish}, mixed, -1,
                                             true, {4, 4, 1, 2}, 1e-12);
    check<double, Math::kFma, Math::kFma, 2>("fp64, stride 2", {2, 5, 7, 6, 9, 2, kHardSwish}, mixed, 2,
                                             false, {4, 8, 2, 1}, 1e-12);
    check<double, Math::kFma, Math::kFma, 2>("fp64, stride 2, k7", {1, 9, 3, 6, 9, 2, kSwish}, mixed, 3,
                                             false, {2, 2, 1, 1}, 1e-12);
    check<float, Math::kTf32x3, Math::kTf32x3, 1>("3xTF32", {2, 6, 5, 24, 24, 1, kSwish}, mixed, -1, true,
                                                  {6, 6, 2, 3}, 2e-5);
    check<float, Math::kFma, Math::kFma, 2>("fp32 without tensor cores", {3, 4, 4, 16, 40, 2, kSwish}, mixed,
                                            0, false, {4, 4, 1, 1}, 2e-5);
    check<float, Math::kTf32, Math::kTf32, 1>("tf32", {2, 7, 7, 20, 20, 1, kSwish}, mixed, 2, true,
                                              {8, 8, 1, 2}, 1e-2);
    check<__nv_bfloat16, Math::kBf16, Math::kTf32, 1>("bf16", {2, 7, 7, 23, 23, 1, kSwish}, mixed, -1, true,
                                                      {8, 8, 1, 2}, 5e-2);
  });
}
