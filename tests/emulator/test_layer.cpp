// A layer's whole sequence of launches, as a GPU runs it, against the textbook forward and backward in
// float64.
#include "layer_run.h"

using namespace emulator_check;
using namespace tfnas::cuda;

namespace {

template <class T, Math M>
void check(const char* name, const Shape& shape, const LayerTable& table, int choice, bool residual,
           double tolerance) {
  std::printf("%s: %dx%dx%dx%d -> %d channels, stride %d\n", name, shape.batch, shape.height, shape.width,
              shape.in_channels, shape.out_channels, shape.stride);
  using A = Acc<T>;
  ReferenceBlock<T> block(shape, table, choice, 33);
  block.forward_to_y2();
  block.forward_from_y2();
  const int64_t out_count = shape.out_pixels() * shape.out_channels,
                in_count = shape.in_pixels() * shape.in_channels;
  const std::vector<T> dout = block.random.template normal<T>(out_count, 1, 0.3);
  block.backward(dout, residual);
  double total = 0;
  for (double weight : block.u) total += weight;
  for (int64_t i = 0; residual && i < out_count; i++) block.out[i] += total * to_double(block.x[i]);

  const std::vector<A> u = converted<A>(block.u);
  const LayerArgs<T> args = layer_args(block, table, choice, residual, u);
  const LayerSizes size(args);

  std::vector<T> out(out_count), dx(in_count);
  std::vector<A> du(size.slots), dexpand(size.active * shape.in_channels),
      ddepthwise(size.active * size.taps), dproject(size.active * shape.out_channels);
  std::vector<A> reduce_weight(block.reduce_weight.size()), reduce_bias(block.reduce_bias.size()),
      expand_weight(reduce_weight.size()), expand_bias(block.expand_bias.size());
  LayerGrads<T> grads{
      dx.data(),       du.data(),
      dexpand.data(),  ddepthwise.data(),
      dproject.data(), {reduce_weight.data(), reduce_bias.data(), expand_weight.data(), expand_bias.data()}};
  std::vector<char> saved(layer_saved_bytes(args),
                          char(0xFF));  // NaN: nothing may be read before it is written
  std::vector<char> forward_scratch(layer_forward<T, M>(args, nullptr, nullptr, saved.data(), nullptr),
                                    char(0xFF));
  layer_forward<T, M>(args, block.x.data(), out.data(), saved.data(), forward_scratch.data());
  std::vector<char> scratch(layer_backward<T, M>(args, nullptr, nullptr, grads, saved.data(), nullptr),
                            char(0xFF));
  layer_backward<T, M>(args, block.x.data(), dout.data(), grads, saved.data(), scratch.data());

  expect_close("out", out, block.out, tolerance);
  expect_close("dx", dx, block.dx, tolerance);
  expect_close("du", du, block.du, tolerance, std::sqrt(out_count));
  // With a choice the vectors are as long as the widest candidate: compare what the chosen one uses.
  auto compare = [&](const char* what, const std::vector<A>& got, const std::vector<double>& expected,
                     int got_columns, int expected_columns) {
    std::vector<A> used;
    std::vector<double> wanted;
    block.for_each_channel([&](int k, const CandidateRows& rows, int c) {
      const int columns = got_columns == expected_columns ? got_columns : rows.kernel_size * rows.kernel_size;
      for (int i = 0; i < columns; i++) {
        used.push_back(got[(block.active_at[k] + c) * got_columns + i]);
        wanted.push_back(expected[(block.active_at[k] + c) * expected_columns + i]);
      }
    });
    expect_close(what, used, wanted, tolerance);
  };
  compare("dW expand", dexpand, block.dexpand, shape.in_channels, shape.in_channels);
  compare("dW depthwise", ddepthwise, block.dfilter, size.taps, 49);
  compare("dW project", dproject, block.dproject, shape.out_channels, shape.out_channels);
  expect_close("dW SE reduce", reduce_weight, block.dreduce_weight, tolerance, 1e-3);
  expect_close("dW SE expand", expand_weight, block.dexpand_weight, tolerance, 1e-3);
  expect_close("db SE expand", expand_bias, block.dexpand_bias, tolerance, 1e-3);

  // The architecture step wants no weight gradients: the rest must not change.
  LayerGrads<T> frozen{};
  std::vector<T> dx_alone(in_count);
  std::vector<A> du_alone(size.slots);
  frozen.dx = dx_alone.data(), frozen.du = du_alone.data();
  std::vector<char> less(layer_backward<T, M>(args, nullptr, nullptr, frozen, saved.data(), nullptr),
                         char(0xFF));
  layer_backward<T, M>(args, block.x.data(), dout.data(), frozen, saved.data(), less.data());
  expect_close("dx without weight gradients", dx_alone, dx, 0);
  expect_close("du without weight gradients", du_alone, du, 0);
}

// A grid may be 65535 blocks high and deep: what a call's batch decides must lie along x.
void check_grids_of_large_batches() {
  const LayerTable table = make_table({{3, 9, 4}, {5, 4, 0}});
  dim3 largest[2];
  for (int i = 0; i < 2; i++) {
    const int choice = -1;
    const ReferenceBlock<float> block({i == 0 ? 3 : 70, 2, 2, 3, 5, 1, kSwish}, table, choice, 5);
    const std::vector<float> dout(block.shape.out_pixels() * block.shape.out_channels, 0.1f);
    LayerRun<float, Math::kTf32> run(block, table, choice, false, dout);
    emulator::reset_largest_grid();
    run.forward();
    run.backward(true);
    largest[i] = emulator::largest_grid();
  }
  const bool good = largest[0].y == largest[1].y && largest[0].z == largest[1].z;
  failures += !good;
  std::printf("grids of batch 3 and 70: y %u and %u, z %u and %u%s\n", largest[0].y, largest[1].y,
              largest[0].z, largest[1].z, good ? "" : "  FAIL");
}

}  // namespace

int main() {
  check_grids_of_large_batches();
  const LayerTable mixed = make_table({{3, 33, 0}, {5, 1, 3}, {5, 40, 35}, {3, 9, 0}});
  return run_in_all_orders([&] {
    check<double, Math::kFma>("fp64, mixture", {2, 5, 7, 7, 7, 1, kSwish}, mixed, -1, true, 1e-12);
    check<double, Math::kFma>("fp64, one candidate", {3, 7, 5, 6, 9, 2, kHardSwish}, mixed, 2, false, 1e-12);
    check<float, Math::kTf32x3>("3xTF32, mixture", {2, 6, 9, 24, 24, 1, kSwish}, mixed, -1, true, 2e-5);
    check<float, Math::kTf32x3>("3xTF32, one candidate", {2, 8, 8, 16, 40, 2, kSwish}, mixed, 0, false, 2e-5);
    check<__nv_bfloat16, Math::kBf16>("bf16", {2, 7, 7, 24, 24, 1, kSwish}, mixed, 2, true, 5e-2);
  });
}
