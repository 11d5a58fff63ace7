// Every identity behind the fused block (docs/kernels.md), on what the kernels computed: each check says
// which one it is. Float64, so that an identity that only nearly holds shows; kernel sizes, strides, SE,
// activations and residual in all combinations, then mixtures of eight candidates.
#include <map>
#include <string>

#include "layer_backward.cuh"
#include "reference_layer.h"

using namespace emulator_check;
using namespace tfnas::cuda;

namespace {

constexpr double kTolerance = 1e-10;
std::map<std::string, double> worst;

using Values = std::vector<double>;

// `least_scale`: for quantities that cancel, the size of what they were made of.
void check(const std::string& name, const Values& got, const Values& want, double least_scale = 1e-30) {
  double error = got.size() == want.size() ? 0 : INFINITY, scale = least_scale;
  for (size_t i = 0; i < want.size(); i++) {
    const double e = std::fabs(got[i] - want[i]);
    if (!(e <= error)) error = e;
    scale = std::fmax(scale, std::fabs(want[i]));
  }
  double& entry = worst[name];
  if (!(error / scale <= entry)) entry = error / scale;
}

// One layer in float64, forward and backward, with all that lies in its two allocations open to view.
struct Run {
  ReferenceBlock<double>& block;
  LayerArgs<double> args{};
  Values dout, u, out, dx, du, dexpand, ddepthwise, dproject, reduce_weight, reduce_bias, expand_weight,
      expand_bias;
  std::vector<char> saved_bytes, forward_bytes, backward_bytes;

  Run(ReferenceBlock<double>& block, const LayerTable& table, const int& choice, bool residual,
      const Values& dout)
      : block(block), dout(dout), u(block.u) {
    const Shape& shape = block.shape;
    args = layer_args(block, table, choice, residual, u);
    const LayerSizes size(args);
    out.resize(shape.out_pixels() * shape.out_channels), dx.resize(shape.in_pixels() * shape.in_channels);
    du.resize(size.slots), dexpand.resize(size.active * shape.in_channels);
    ddepthwise.resize(size.active * size.taps), dproject.resize(size.active * shape.out_channels);
    // a value of its own where no gradient belongs
    reduce_weight.assign(block.reduce_weight.size(), -7), reduce_bias.assign(block.reduce_bias.size(), -7);
    expand_weight.assign(reduce_weight.size(), -7), expand_bias.assign(block.expand_bias.size(), -7);
    saved_bytes.assign(layer_saved_bytes(args), char(0xFF));
  }
  LayerGrads<double> grads(bool weights) {
    LayerGrads<double> g{};
    g.dx = dx.data(), g.du = du.data();
    if (weights) {
      g.expand = dexpand.data(), g.depthwise = ddepthwise.data(), g.project = dproject.data();
      g.se = {reduce_weight.data(), reduce_bias.data(), expand_weight.data(), expand_bias.data()};
    }
    return g;
  }
  void forward() {
    forward_bytes.assign(
        layer_forward<double, Math::kFma>(args, nullptr, nullptr, saved_bytes.data(), nullptr), char(0xFF));
    layer_forward<double, Math::kFma>(args, block.x.data(), out.data(), saved_bytes.data(),
                                      forward_bytes.data());
  }
  void backward(bool weights) {
    const LayerGrads<double> g = grads(weights);
    backward_bytes.assign(
        layer_backward<double, Math::kFma>(args, nullptr, nullptr, g, saved_bytes.data(), nullptr),
        char(0xFF));
    layer_backward<double, Math::kFma>(args, block.x.data(), dout.data(), g, saved_bytes.data(),
                                       backward_bytes.data());
  }
  SavedLayer<double> saved() {
    Arena arena(saved_bytes.data());
    return SavedLayer<double>(args, arena);
  }
  BackwardScratch<double> scratch(bool weights) {
    size_t bytes;
    const LayerSizes size(args);
    const int tiles = args.stride == 1
                          ? depthwise_backward_args<double, Math::kFma, 1>(args, size, bytes).tiles()
                          : depthwise_backward_args<double, Math::kFma, 2>(args, size, bytes).tiles();
    Arena arena(backward_bytes.data());
    return BackwardScratch<double>(args, grads(weights), tiles, arena);
  }
};

// What the reference lays out for 7 x 7 filters, and the kernels for the largest filter of the layer.
void check_weight_gradients(Run& run, bool with_se) {
  const Shape& shape = run.block.shape;
  const LayerSizes size(run.args);
  Values got[3], want[3];
  run.block.for_each_channel([&](int k, const CandidateRows& rows, int c) {
    const int v = run.block.active_at[k] + c, taps = rows.kernel_size * rows.kernel_size;
    for (int i = 0; i < shape.in_channels; i++) {
      got[0].push_back(run.dexpand[v * shape.in_channels + i]);
      want[0].push_back(run.block.dexpand[v * shape.in_channels + i]);
    }
    for (int i = 0; i < taps; i++) {
      got[1].push_back(run.ddepthwise[v * size.taps + i]);
      want[1].push_back(run.block.dfilter[v * 49 + i]);
    }
    for (int i = 0; i < shape.out_channels; i++) {
      got[2].push_back(run.dproject[v * shape.out_channels + i]);
      want[2].push_back(run.block.dproject[v * shape.out_channels + i]);
    }
  });
  check("dW1 = r1 (G - M m1 mu^T - M diag(m2) W1' C)", got[0], want[0]);
  check("dWdw = corr(act(W1' x + b), dy2), dy2 from dh2 and its two means", got[1], want[1]);
  check("dW3 = dy3 z^T, z formed again from y2", got[2], want[2]);
  if (!with_se) return;
  Values* mine[4] = {&run.reduce_weight, &run.reduce_bias, &run.expand_weight, &run.expand_bias};
  const Values* theirs[4] = {&run.block.dreduce_weight, &run.block.dreduce_bias, &run.block.dexpand_weight,
                             &run.block.dexpand_bias};
  const char* names[4] = {"SE: dR", "SE: db_R", "SE: dE", "SE: db_E"};
  for (int i = 0; i < 4; i++) {
    Values written, expected, frozen;
    for (size_t j = 0; j < mine[i]->size(); j++) {
      // the reference has zero where no active channel is
      const bool untouched = (*mine[i])[j] == -7;
      (untouched ? frozen : written).push_back(untouched ? (*theirs[i])[j] : (*mine[i])[j]);
      if (!untouched) expected.push_back((*theirs[i])[j]);
    }
    check(names[i], written, expected, 1e-3);
    check("frozen channels have no gradient", frozen, Values(frozen.size()), 1);
  }
}

void one(int kernel, int stride, bool se, bool residual, int act, unsigned seed) {
  const int width = 17, cin = 6, choice = 0;
  const Shape shape{3, 10, 9, cin, residual ? cin : 9, stride, act};
  const LayerTable table = make_table({{kernel, width, se ? cin : 0}});
  ReferenceBlock<double> block(shape, table, choice, seed);
  for (size_t i = 0; i < block.x.size(); i++)
    block.x[i] = 1.7 * block.x[i] + static_cast<double>(i % cin) - 1.5;
  block.forward_to_y2(), block.forward_from_y2();
  const Values dout = block.random.normal<double>(shape.out_pixels() * shape.out_channels, 1, 0.3);
  block.backward(dout, residual);
  if (residual) {
    for (size_t i = 0; i < block.out.size(); i++) block.out[i] += block.x[i];
  }

  Run run(block, table, choice, residual, dout);
  run.forward();
  run.backward(true);
  const SavedLayer<double> saved = run.saved();
  const BackwardScratch<double> scratch = run.scratch(true);
  const int active = block.active;
  const double in_pixels = shape.in_pixels(), out_pixels = shape.out_pixels();

  Values mean, want_mean, variance, want_variance, affine, want_affine, m2, m2_of_g, m2_of_relu, size_of_m2;
  for (int c = 0; c < width; c++) {
    const double r1 = saved.rstd1[c], gain = 0.5 + 0.05 * c, bias = 0.3 - 0.02 * c;
    const double* w = &block.expand[c * cin];
    double projected = 0, quadratic = 0;
    for (int i = 0; i < cin; i++) {
      projected += w[i] * saved.mean_x[i];
      for (int j = 0; j < cin; j++) quadratic += w[i] * saved.covariance_x[i * cin + j] * w[j];
    }
    mean.push_back(projected), want_mean.push_back(-block.shift1[c] / block.rstd1[c]);
    variance.push_back(quadratic), want_variance.push_back(1 / (block.rstd1[c] * block.rstd1[c]) - block.eps);
    double of_g = 0;
    for (int i = 0; i < cin; i++) {
      double wc = 0;
      for (int j = 0; j < cin; j++) wc += r1 * w[j] * saved.covariance_x[j * cin + i];
      const double g = run.dexpand[c * cin + i] / r1 + in_pixels * scratch.means1[active + c] * wc;
      of_g += g * r1 * w[i] / in_pixels;
    }
    m2.push_back(scratch.means1[active + c]), m2_of_g.push_back(of_g);
    m2_of_relu.push_back(block.eps * saved.rstd2[c] * saved.rstd2[c] * scratch.means2[active + c] *
                         out_pixels / in_pixels);
    double size = 0;
    for (int64_t p = 0; p < shape.in_pixels(); p++) {
      double y1 = 0;
      for (int i = 0; i < cin; i++) y1 += w[i] * block.x[p * cin + i];
      affine.push_back(gain * r1 * y1 + bias - gain * r1 * projected);
      want_affine.push_back(gain * block.h1[block.wide(0, c, p, shape.in_pixels())] + bias);
      size += std::fabs(block.dh1[block.wide(0, c, p, shape.in_pixels())] *
                        block.h1[block.wide(0, c, p, shape.in_pixels())]) /
              in_pixels;
    }
    size_of_m2.push_back(size);
  }
  double scale = 0;
  for (double size : size_of_m2) scale = std::fmax(scale, size);
  check("mean(y1) = W1 mu", mean, want_mean);
  check("var(y1) = w C w^T", variance, want_variance);
  check("BN1 folded: r1 and shift", Values(saved.shift1, saved.shift1 + width),
        Values(block.shift1.begin(), block.shift1.begin() + width));
  check("affine fold: g r1 W1 x + beta - W1' mu", affine, want_affine);
  check("m2 = rowsum((G - M m1 mu^T) * W1') / M = mean(dh1 h1)", m2_of_g, m2, scale);
  if (act == kRelu) check("relu only: m2 = eps r2^2 S2 / M", m2_of_relu, m2, scale);
  check("out", run.out, block.out);
  check("dx = W1'^T dh1 - W1'^T m1 - Q (x - mu)", run.dx, block.dx);
  check_weight_gradients(run, se);

  const Values dx = run.dx;
  run.backward(false);
  check("dx without G", run.dx, block.dx);

  // A permutation of the active channels, and other values in the frozen ones, change nothing.
  Run permuted(block, table, choice, residual, dout);
  std::vector<int> order;
  for (int c = 0; c < width; c++) order.push_back((c * 5 + 3) % width);
  auto permute = [&](std::vector<double>& rows, int columns) {
    Values moved = rows;
    for (int c = 0; c < width; c++) {
      for (int i = 0; i < columns; i++) moved[c * columns + i] = rows[order[c] * columns + i];
    }
    for (size_t i = width * columns; i < moved.size(); i++) moved[i] = 1e6;
    rows = moved;
  };
  permute(block.expand, cin), permute(block.depthwise, kernel * kernel),
      permute(block.project, shape.out_channels);
  if (se) permute(block.reduce_weight, cin), permute(block.expand_weight, cin), permute(block.expand_bias, 1);
  permuted.args.expand = block.expand.data(), permuted.args.depthwise = block.depthwise.data();
  permuted.args.project = block.project.data();
  permuted.args.se = {block.reduce_weight.data(), block.reduce_bias.data(), block.expand_weight.data(),
                      block.expand_bias.data()};
  permuted.forward();
  check("permuted channels, frozen ones changed: out", permuted.out, block.out);
  permuted.backward(false);
  check("permuted channels, frozen ones changed: dx", permuted.dx, block.dx);
}

void mixture(int stride, bool residual, int act, unsigned seed) {
  std::vector<std::array<int, 3>> rows;
  for (int i = 0; i < 8; i++)
    rows.push_back({i / 2 % 2 ? 5 : 3, i % 2 ? 36 : 18, i >= 4 ? 6 * (1 + i % 2) : 0});
  const Shape shape{3, 9, 8, 6, residual ? 6 : 9, stride, act};
  const LayerTable table = make_table(rows);
  const int choice = -1;
  ReferenceBlock<double> block(shape, table, choice, seed);
  double total = 0;
  for (double weight : block.u) total += weight;
  for (double& weight : block.u) weight /= total;
  block.forward_to_y2(), block.forward_from_y2();
  const Values dout = block.random.normal<double>(shape.out_pixels() * shape.out_channels, 1, 0.3);
  block.backward(dout, residual);
  double with_input = 0;
  if (residual) {
    for (size_t i = 0; i < block.out.size(); i++)
      block.out[i] += block.x[i], with_input += dout[i] * block.x[i];
  }
  Run run(block, table, choice, residual, dout);
  run.forward();
  run.backward(false);
  check("mixture out: one moments pass, x once", run.out, block.out);
  check("mixture du_i = <dout, BN3_i> + <dout, x>", run.du, block.du);
  auto dlogits = [&](const Values& du, double less) {
    double mean = 0;
    for (size_t i = 0; i < du.size(); i++) mean += block.u[i] * (du[i] - less);
    Values out;
    for (size_t i = 0; i < du.size(); i++) out.push_back(block.u[i] * (du[i] - less - mean));
    return out;
  };
  check("mixture dlogits: <dout, x> cancels", dlogits(run.du, with_input), dlogits(block.du, 0));
  check("mixture dx: parts add up, one Q", run.dx, block.dx);
  run.backward(true);
  check_weight_gradients(run, true);
}

}  // namespace

int main() {
  unsigned seed = 100;
  for (int kernel : {3, 5}) {
    for (int stride : {1, 2}) {
      for (bool se : {false, true}) {
        for (int act : {kRelu, kSwish}) {
          for (int residual = 0; residual < (stride == 1 ? 2 : 1); residual++)
            one(kernel, stride, se, residual, act, seed++);
        }
      }
    }
  }
  for (int act : {kRelu, kSwish}) {
    mixture(1, false, act, seed++), mixture(1, true, act, seed++), mixture(2, false, act, seed++);
  }
  for (const auto& [name, error] : worst) {
    const bool good = error <= kTolerance;
    failures += !good;
    std::printf("  %-68s %.1e%s\n", name.c_str(), error, good ? "" : "  FAIL");
  }
  std::printf("%u cases, seeds 100 to %u\n%s\n", seed - 100, seed - 1, failures ? "FAIL" : "PASS");
  return failures ? 1 : 0;
}
