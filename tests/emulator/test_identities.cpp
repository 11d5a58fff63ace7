// Every identity behind the fused block (docs/kernels.md), on what the kernels computed: each check says
// which one it is. Kernel sizes, strides, SE, activations and residual in all combinations, then mixtures of
// eight.
//
//   fp64        within 1e-10, so that an identity that only nearly holds shows
//   fp32, tf32  by the rule of two, over all cases: the largest error against float64, and the root of the
//               mean square, are at most twice those of the textbook's block in float32 (for tf32 with
//               operands of its 1x1 convolutions rounded to tf32), plus half a unit in the last place
//   bf16        likewise, against a block that keeps every filter, activation and their gradients in bf16
//
// An argument names one precision; without, all of them run.
#include <limits>
#include <map>
#include <string>

#include "layer_run.h"

using namespace emulator_check;
using namespace tfnas::cuda;

namespace {

using Values = std::vector<double>;

// What an identity equates; `least_scale`: for values that cancel, the size of what they were made of.
struct Quantity {
  Values values;
  double least_scale;
};
using Quantities = std::map<std::string, Quantity>;

struct Precision {
  const char* name;
  double tolerance;  // by itself, or on top of twice the plain error
  bool by_plain_error;
};
// Of one identity over all cases, errors relative to the case's largest value: the largest, and the root of
// the mean square, which shows what is a little worse everywhere.
struct Error {
  double largest = 0, squares = 0;
  int64_t count = 0;
  double root_mean_square() const { return count ? std::sqrt(squares / static_cast<double>(count)) : 0; }
};
std::map<std::string, Error> errors, plain_errors;

void add(Error& found, const Quantity& got, const Quantity& want) {
  double scale = want.least_scale;
  for (double value : want.values) scale = std::fmax(scale, std::fabs(value));
  if (got.values.size() != want.values.size()) found.largest = INFINITY;
  for (size_t i = 0; i < want.values.size() && i < got.values.size(); i++) {
    const double e = std::fabs(got.values[i] - want.values[i]) / scale;
    if (!(e <= found.largest)) found.largest = e;  // a NaN stays
    found.squares += e * e, found.count++;
  }
}

void compare(const Quantities& ours, const Quantities& plain, const Quantities& exact) {
  for (const auto& [name, want] : exact) {
    add(errors[name], ours.at(name), want);
    add(plain_errors[name], plain.at(name), want);
  }
}

bool report(const Precision& precision) {
  bool all_good = true;
  for (const auto& [name, ours] : errors) {
    const Error plain = precision.by_plain_error ? plain_errors[name] : Error{};
    const double rms = ours.root_mean_square(), plain_rms = plain.root_mean_square();
    const bool good =
        ours.largest <= 2 * plain.largest + precision.tolerance && rms <= 2 * plain_rms + precision.tolerance;
    all_good &= good;
    std::printf("  %-66s %.1e", name.c_str(), ours.largest);
    if (precision.by_plain_error)
      std::printf(" (plain %.1e), rms %.1e (plain %.1e)", plain.largest, rms, plain_rms);
    std::printf("%s\n", good ? "" : "  FAIL");
  }
  return all_good;
}

template <class V>
Quantity quantity(const V& values, double least_scale = 1e-30) {
  Values found;
  for (const auto& value : values) found.push_back(to_double(value));
  return {found, least_scale};
}
template <class V>
Quantity first_of(const V* values, int64_t count) {
  return {Values(values, values + count), 1e-30};
}

// What the textbook lays out for 7 x 7 filters, and the kernels for the largest filter of the layer.
template <class Block, class V>
void add_weight_gradients(Quantities& found, const Block& block, const V& expand, const V& depthwise,
                          int taps, const V& project) {
  const Shape& shape = block.shape;
  Values rows[3];
  block.for_each_channel([&](int k, const CandidateRows& candidate, int c) {
    const int v = block.active_at[k] + c;
    for (int i = 0; i < shape.in_channels; i++) rows[0].push_back(expand[v * shape.in_channels + i]);
    for (int i = 0; i < candidate.kernel_size * candidate.kernel_size; i++)
      rows[1].push_back(depthwise[v * taps + i]);
    for (int i = 0; i < shape.out_channels; i++) rows[2].push_back(project[v * shape.out_channels + i]);
  });
  found["dW1 = r1 (G - M m1 mu^T - M diag(m2) W1' C)"] = quantity(rows[0]);
  found["dWdw = corr(act(W1' x + b), dy2), dy2 from dh2 and its two means"] = quantity(rows[1]);
  found["dW3 = dy3 z^T, z formed again from y2"] = quantity(rows[2]);
}

// `values` where the kernels wrote gradients, which is where active channels are; what the textbook has
// elsewhere must be nothing.
template <class V, class A>
void add_where_written(Quantities& found, const char* name, const V& values, const std::vector<A>& written) {
  Quantity& gradient = found[name];
  gradient.least_scale = 1e-3;
  for (size_t i = 0; i < written.size(); i++) {
    if (written[i] != A(kUntouched)) gradient.values.push_back(values[i]);
  }
}
template <class V, class A>
bool nothing_elsewhere(const V& values, const std::vector<A>& written) {
  for (size_t i = 0; i < written.size(); i++) {
    if (written[i] == A(kUntouched) && values[i] != 0) return false;
  }
  return true;
}
template <class Run>
void add_se_gradients(Quantities& found, const Run& run) {
  add_where_written(found, "SE: dR", run.reduce_weight, run.reduce_weight);
  add_where_written(found, "SE: db_R", run.reduce_bias, run.reduce_bias);
  add_where_written(found, "SE: dE", run.expand_weight, run.expand_weight);
  add_where_written(found, "SE: db_E", run.expand_bias, run.expand_bias);
  found["frozen channels have no gradient"] = {{1}, 1};
}
template <class Block, class Run>
void add_se_gradients(Quantities& found, const Block& block, const Run& run) {
  add_where_written(found, "SE: dR", block.dreduce_weight, run.reduce_weight);
  add_where_written(found, "SE: db_R", block.dreduce_bias, run.reduce_bias);
  add_where_written(found, "SE: dE", block.dexpand_weight, run.expand_weight);
  add_where_written(found, "SE: db_E", block.dexpand_bias, run.expand_bias);
  const bool nothing = nothing_elsewhere(block.dreduce_weight, run.reduce_weight) &&
                       nothing_elsewhere(block.dreduce_bias, run.reduce_bias) &&
                       nothing_elsewhere(block.dexpand_weight, run.expand_weight) &&
                       nothing_elsewhere(block.dexpand_bias, run.expand_bias);
  found["frozen channels have no gradient"] = {{nothing ? 1. : 0.}, 1};
}

const char* const kDirect = "m2 = mean(dh1 h1), of the kernels";
const char* const kOfG = "m2 = rowsum((G - M m1 mu^T) * W1') / M = mean(dh1 h1)";
const char* const kOfRelu = "relu only: m2 = eps r2^2 S2 / M";
double affine_gain(int c) { return 0.5 + 0.05 * c; }
double affine_bias(int c) { return 0.3 - 0.02 * c; }

// The algebra's side, from what the kernels left, in their precision.
template <class T, Math M>
Quantities algebra(LayerRun<T, M>& run, bool se) {
  using A = Acc<T>;
  const ReferenceBlock<T>& block = run.block;
  const Shape& shape = block.shape;
  const SavedLayer<T> saved = run.saved();
  const BackwardScratch<T> scratch = run.scratch(true);
  const int cin = shape.in_channels, active = block.active, width = block.table.candidate[0].width;
  const A in_pixels = shape.in_pixels(), out_pixels = shape.out_pixels(), eps = block.eps;
  std::vector<A> mean, variance, affine, of_g, of_relu;
  for (int c = 0; c < width; c++) {
    const A r1 = saved.rstd1[c], gain = affine_gain(c), bias = affine_bias(c),
            m2 = scratch.means1[active + c];
    const A* w = &block.expand[c * cin];
    A projected = 0, quadratic = 0, sum = 0;
    for (int i = 0; i < cin; i++) {
      A wc = 0;
      for (int j = 0; j < cin; j++) wc += w[j] * saved.covariance_x[j * cin + i];
      projected += w[i] * saved.mean_x[i], quadratic += wc * w[i];
      const A g = run.dexpand[c * cin + i] / r1 + in_pixels * m2 * r1 * wc;
      sum += g * r1 * w[i] / in_pixels;
    }
    mean.push_back(projected), variance.push_back(quadratic), of_g.push_back(sum);
    of_relu.push_back(eps * saved.rstd2[c] * saved.rstd2[c] * scratch.means2[active + c] * out_pixels /
                      in_pixels);
    for (int64_t p = 0; p < shape.in_pixels(); p++) {
      A y1 = 0;
      for (int i = 0; i < cin; i++) y1 += w[i] * static_cast<A>(to_double(block.x[p * cin + i]));
      affine.push_back(gain * r1 * y1 + (bias - gain * r1 * projected));
    }
  }
  Quantities found;
  found["mean(y1) = W1 mu"] = quantity(mean), found["var(y1) = w C w^T"] = quantity(variance);
  found["BN1 folded: r1"] = first_of(saved.rstd1, width);
  found["BN1 folded: shift"] = first_of(saved.shift1, width);
  found["affine fold: g r1 W1 x + beta - W1' mu"] = quantity(affine);
  found[kDirect] = first_of(scratch.means1 + active, width);
  found[kOfG] = quantity(of_g);
  if (shape.act == kRelu) found[kOfRelu] = quantity(of_relu);
  found["out"] = quantity(run.out), found["dx = W1'^T dh1 - W1'^T m1 - Q (x - mu)"] = quantity(run.dx);
  add_weight_gradients(found, block, run.dexpand, run.ddepthwise, LayerSizes(run.args).taps, run.dproject);
  if (se) add_se_gradients(found, run);
  return found;
}

// rowsum((G - M m1 mu^T) * W1') / M with the textbook's G = dh1^T x.
template <class Block>
auto m2_of_g(const Block& block) {
  using C = typename Block::Computed;
  const int cin = block.shape.in_channels, width = block.table.candidate[0].width;
  const int64_t pixels = block.shape.in_pixels();
  std::vector<C> m2(width);
  for (int i = 0; i < cin; i++) {
    double mean_x = 0;
    for (int64_t p = 0; p < pixels; p++)
      mean_x += to_double(block.x[p * cin + i]) / static_cast<double>(pixels);
    for (int c = 0; c < width; c++) {
      C g = 0;
      for (int64_t p = 0; p < pixels; p++)
        g += block.operand(block.dh1[block.wide(0, c, p, pixels)]) * block.operand(block.x[p * cin + i]);
      m2[c] += (g / pixels - block.means1[c] * static_cast<C>(mean_x)) * block.rstd1[c] *
               block.number(block.expand[c * cin + i]);
    }
  }
  return m2;
}

// The textbook's side: what it has on the wide tensors.
template <class Block, class Run>
Quantities textbook(const Block& block, const Run& run, bool se) {
  using C = typename Block::Computed;
  const Shape& shape = block.shape;
  const int active = block.active, width = block.table.candidate[0].width;
  std::vector<C> mean, variance, affine;
  double size_of_m2 = 0;
  for (int c = 0; c < width; c++) {
    const C r1 = block.rstd1[c], gain = affine_gain(c), bias = affine_bias(c);
    mean.push_back(-block.shift1[c] / r1), variance.push_back(1 / (r1 * r1) - static_cast<C>(block.eps));
    double size = 0;
    for (int64_t p = 0; p < shape.in_pixels(); p++) {
      const int64_t at = block.wide(0, c, p, shape.in_pixels());
      affine.push_back(gain * block.h1[at] + bias);
      size += std::fabs(block.dh1[at] * block.h1[at]) / shape.in_pixels();
    }
    size_of_m2 = std::fmax(size_of_m2, size);
  }
  Quantities found;
  found["mean(y1) = W1 mu"] = quantity(mean), found["var(y1) = w C w^T"] = quantity(variance);
  found["BN1 folded: r1"] = first_of(block.rstd1.data(), width);
  found["BN1 folded: shift"] = first_of(block.shift1.data(), width);
  found["affine fold: g r1 W1 x + beta - W1' mu"] = quantity(affine);
  found[kDirect] = {Values(&block.means1[active], &block.means1[active] + width), size_of_m2};
  found[kOfG] = quantity(m2_of_g(block), size_of_m2);
  if (shape.act == kRelu) found[kOfRelu] = found[kDirect];
  found["out"] = quantity(block.out), found["dx = W1'^T dh1 - W1'^T m1 - Q (x - mu)"] = quantity(block.dx);
  add_weight_gradients(found, block, block.dexpand, block.dfilter, 49, block.dproject);
  if (se) add_se_gradients(found, block, run);
  return found;
}

// A block's results on the same values whatever it computes in; `out` with the residual.
template <class Block, class Change>
auto compute(Block& block, bool residual, Change change) {
  using T = typename Block::Stored;
  change(block);
  block.forward_to_y2(), block.forward_from_y2();
  const Shape& shape = block.shape;
  const auto dout = block.random.template normal<T>(shape.out_pixels() * shape.out_channels, 1, 0.3);
  block.backward(dout, residual);
  for (size_t i = 0; i < block.out.size(); i++)
    block.out[i] = block.stored(residual ? block.out[i] + block.number(block.x[i]) : block.out[i]);
  return dout;
}

// `least_mean`: of the input's channels, whose deviation is 1.7.
template <class T, Math M, class Product>
void one(const Shape& shape, int kernel, int width, bool se, bool residual, unsigned seed,
         double least_mean = -1.5) {
  const int cin = shape.in_channels, choice = 0;
  const LayerTable table = make_table({{kernel, width, se ? cin : 0}});  // elastic: rows beyond it are frozen
  ReferenceBlock<T> exact(shape, table, choice, seed);
  ReferenceBlock<T, Acc<T>, Product> plain(shape, table, choice, seed);
  const auto shift_input = [&](auto& block) {
    for (size_t i = 0; i < block.x.size(); i++)
      block.x[i] = from_double<T>(1.7 * to_double(block.x[i]) + static_cast<double>(i % cin) + least_mean);
  };
  const std::vector<T> dout = compute(exact, residual, shift_input);
  compute(plain, residual, shift_input);
  LayerRun<T, M> run(exact, table, choice, residual, dout);
  run.forward();
  run.backward(true);
  Quantities want = textbook(exact, run, se);
  want[kOfG] = want[kDirect];
  compare(algebra(run, se), textbook(plain, run, se), want);

  run.backward(false);
  const Quantity exact_out = quantity(exact.out), plain_out = quantity(plain.out);
  const Quantity exact_dx = quantity(exact.dx), plain_dx = quantity(plain.dx);
  compare({{"dx without G", quantity(run.dx)}}, {{"dx without G", plain_dx}}, {{"dx without G", exact_dx}});

  // A permutation of the active channels, and other values in the frozen ones, change nothing.
  LayerRun<T, M> permuted(exact, table, choice, residual, dout);
  auto permute = [&](auto& rows, int columns) {
    const auto before = rows;
    for (int c = 0; c < width; c++) {
      for (int i = 0; i < columns; i++) rows[c * columns + i] = before[(c * 5 + 3) % width * columns + i];
    }
    for (size_t i = width * columns; i < rows.size(); i++) rows[i] = 1e6;
  };
  permute(exact.expand, cin), permute(exact.depthwise, kernel * kernel);
  permute(exact.project, shape.out_channels);
  if (se) permute(exact.reduce_weight, cin), permute(exact.expand_weight, cin), permute(exact.expand_bias, 1);
  permuted.forward();
  permuted.backward(false);
  const char *out = "permuted channels, frozen ones changed: out",
             *dx = "permuted channels, frozen ones changed: dx";
  compare({{out, quantity(permuted.out)}, {dx, quantity(permuted.dx)}}, {{out, plain_out}, {dx, plain_dx}},
          {{out, exact_out}, {dx, exact_dx}});
}

template <class T, Math M, class Product>
void mixture(int stride, bool residual, int act, unsigned seed) {
  std::vector<std::array<int, 3>> rows;
  for (int i = 0; i < 8; i++)
    rows.push_back({i / 2 % 2 ? 5 : 3, i % 2 ? 36 : 18, i >= 4 ? 6 * (1 + i % 2) : 0});
  const Shape shape{3, 9, 8, 6, residual ? 6 : 9, stride, act};
  const LayerTable table = make_table(rows);
  const int choice = -1;
  ReferenceBlock<T> exact(shape, table, choice, seed);
  ReferenceBlock<T, Acc<T>, Product> plain(shape, table, choice, seed);
  const auto set_weights = [](auto& block) {
    for (size_t k = 0; k < block.u.size(); k++) block.u[k] = static_cast<Acc<T>>((k + 1) / 36.0);
  };
  const std::vector<T> dout = compute(exact, residual, set_weights);
  compute(plain, residual, set_weights);
  double with_input = 0;
  for (size_t i = 0; residual && i < dout.size(); i++)
    with_input += to_double(dout[i]) * to_double(exact.x[i]);
  LayerRun<T, M> run(exact, table, choice, residual, dout);
  const auto results = [&](const auto& out, const auto& du, const auto& dx, double less) {
    double mean = 0;
    for (size_t i = 0; i < du.size(); i++) mean += exact.u[i] * (du[i] - less);
    Values dlogits;
    for (size_t i = 0; i < du.size(); i++) dlogits.push_back(exact.u[i] * (du[i] - less - mean));
    Quantities found;
    found["mixture out: one moments pass, x once"] = quantity(out);
    found["mixture du_i = <dout, BN3_i> + <dout, x>"] = quantity(du);
    found["mixture dlogits: <dout, x> cancels"] = quantity(dlogits);
    found["mixture dx: parts add up, one Q"] = quantity(dx);
    return found;
  };
  run.forward();
  run.backward(false);
  compare(results(run.out, run.du, run.dx, with_input), results(plain.out, plain.du, plain.dx, 0),
          results(exact.out, exact.du, exact.dx, 0));
  run.backward(true);
  Quantities ours, theirs, want;
  add_weight_gradients(ours, exact, run.dexpand, run.ddepthwise, LayerSizes(run.args).taps, run.dproject);
  add_weight_gradients(theirs, plain, plain.dexpand, plain.dfilter, 49, plain.dproject);
  add_weight_gradients(want, exact, exact.dexpand, exact.dfilter, 49, exact.dproject);
  add_se_gradients(ours, run), add_se_gradients(theirs, plain, run), add_se_gradients(want, exact, run);
  compare(ours, theirs, want);
}

// `acts`: relu's kink turns a rounding of tf32's or bf16's size into a whole gradient, in the textbook's
// block as well.
template <class T, Math M, class Product>
void sweep(const Precision& precision, std::initializer_list<int> acts) {
  unsigned seed = 100;
  errors.clear(), plain_errors.clear();
  for (int act : acts) {
    for (int kernel : {3, 5}) {
      for (bool se : {false, true}) {
        one<T, M, Product>({3, 10, 9, 6, 9, 1, act}, kernel, 17, se, false, seed++);
        one<T, M, Product>({3, 10, 9, 6, 6, 1, act}, kernel, 17, se, true, seed++);
        one<T, M, Product>({3, 10, 9, 6, 6, 1, act}, kernel, 17, se, true, seed++, 15);  // sums that cancel
        one<T, M, Product>({3, 10, 9, 6, 9, 2, act}, kernel, 17, se, false, seed++);
      }
    }
    one<T, M, Product>({1, 28, 28, 24, 24, 1, act}, 5, 144, true, true, seed++);  // long sums
    mixture<T, M, Product>(1, false, act, seed++);
    mixture<T, M, Product>(1, true, act, seed++);
    mixture<T, M, Product>(2, false, act, seed++);
  }
  std::printf("%s: %u cases, seeds 100 to %u\n", precision.name, seed - 100, seed - 1);
  failures += !report(precision);
}

}  // namespace

int main(int count, char** arguments) {
  const std::string only = count > 1 ? arguments[1] : "";
  const auto wanted = [&](const char* name) { return only.empty() || only == name; };
  const double half_unit = std::numeric_limits<float>::epsilon() / 2;  // in the last place
  if (wanted("fp64")) sweep<double, Math::kFma, Exact>({"fp64", 1e-10, false}, {kRelu, kSwish});
  if (wanted("fma")) sweep<float, Math::kFma, Exact>({"fp32, fma", half_unit, true}, {kRelu, kSwish});
  if (wanted("tf32x3"))
    sweep<float, Math::kTf32x3, Exact>({"fp32, 3xtf32", half_unit, true}, {kRelu, kSwish});
  if (wanted("bf16")) sweep<__nv_bfloat16, Math::kBf16, Bf16Tensors>({"bf16", half_unit, true}, {kSwish});
  if (wanted("tf32")) sweep<float, Math::kTf32, Tf32Operands>({"tf32", half_unit, true}, {kSwish});
  std::puts(failures ? "FAIL" : "PASS");
  return failures ? 1 : 0;
}
