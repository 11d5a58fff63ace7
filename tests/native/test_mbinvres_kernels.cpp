// The CPU kernels of a layer, both designs, against the textbook block in float64. Built with
// TFNAS_SANITIZE=ON this is the sanitizers' view of them: buffers are exactly as long as promised, and what
// is written must not be read before.
#include "cpu/mbinvres.h"

#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>
#include <thread>

#include "cpu/capability.h"
#include "reference_block.h"

using namespace emulator_check;
using tfnas::CandidateGradient;
using tfnas::Design;

namespace {

struct Case {
  Shape shape;
  std::vector<std::array<int, 3>> kernel_width_se;
  int choice;  // -1: the mixture
  bool residual;
};

// One thread of the operating system per call: the kernels must not rely on which one runs what.
tfnas::Threads system_threads(int count) {
  return {count, [](int calls, void (*body)(void*, int), void* arg) {
            std::vector<std::thread> threads;
            for (int i = 0; i < calls; ++i) threads.emplace_back(body, arg, i);
            for (std::thread& thread : threads) thread.join();
          }};
}

tfnas::Act cpu_act(int act) {
  switch (act) {
    case tfnas::cuda::kRelu:
      return tfnas::Act::relu;
    case tfnas::cuda::kRelu6:
      return tfnas::Act::relu6;
    case tfnas::cuda::kSwish:
      return tfnas::Act::swish;
    default:
      return tfnas::Act::hard_swish;
  }
}

// Element: as the kernels know it. R: the same as the reference does.
template <class Element, class R>
void check(const Case& test, Design design, int thread_count, double tolerance) {
  using T = tfnas::Compute<Element>;
  const Shape& shape = test.shape;
  std::printf("%s, %s, %d threads: %dx%dx%dx%d -> %d, stride %d\n",
              sizeof(R) == 2   ? "bfloat16"
              : sizeof(R) == 4 ? "float"
                               : "double",
              design == Design::strips ? "strips" : "channels", thread_count, shape.batch, shape.height,
              shape.width, shape.in_channels, shape.out_channels, shape.stride);
  const tfnas::cuda::LayerTable table = make_table(test.kernel_width_se);
  ReferenceBlock<R> block(shape, table, test.choice, 77);
  block.forward_to_y2();
  block.forward_from_y2();
  const int64_t out_count = shape.out_pixels() * shape.out_channels,
                in_count = shape.in_pixels() * shape.in_channels;
  const std::vector<R> dout = block.random.template normal<R>(out_count, 1, 0.3);
  block.backward(dout, test.residual);
  double direct = 0;
  for (double weight : block.u) direct += test.residual ? weight : 0;
  for (int64_t i = 0; direct != 0 && i < out_count; ++i) block.out[i] += direct * to_double(block.x[i]);

  const std::vector<T> mix = converted<T>(block.u);
  const int64_t ins = shape.in_channels, outs = shape.out_channels;
  std::vector<tfnas::Candidate<T>> candidates;
  std::vector<CandidateGradient<T>> gradients;
  // as long as the weights, so that rows beyond a width would show
  std::vector<T> expand(block.expand.size()), depthwise(block.depthwise.size()),
      project(block.project.size()), reduce(block.reduce_weight.size()), excite(block.expand_weight.size()),
      reduce_bias(block.reduce_bias.size()), excite_bias(block.expand_bias.size());
  for (int which : block.chosen) {
    const tfnas::cuda::CandidateRows& rows = table.candidate[which];
    const int64_t taps = rows.kernel_size * rows.kernel_size, se = rows.se_channels;
    tfnas::Candidate<T> c;
    CandidateGradient<T> g;
    c.kernel_size = rows.kernel_size, c.width = rows.width, c.se_channels = se;
    c.expand = {block.expand.data() + rows.first_row * ins, ins, 1};
    c.depthwise = {block.depthwise.data() + rows.depthwise_at, taps, 1};
    c.project = {block.project.data() + rows.first_row * outs, outs, 1};
    g.expand = {expand.data() + rows.first_row * ins, ins, 1};
    g.depthwise = {depthwise.data() + rows.depthwise_at, taps, 1};
    g.project = {project.data() + rows.first_row * outs, outs, 1};
    if (se > 0) {
      c.se_reduce = {block.reduce_weight.data() + rows.se_weight_at, se, 1};
      c.se_expand = {block.expand_weight.data() + rows.se_weight_at, se, 1};
      c.se_reduce_bias = block.reduce_bias.data() + rows.se_reduce_bias_at;
      c.se_expand_bias = block.expand_bias.data() + rows.se_expand_bias_at;
      g.se_reduce = {reduce.data() + rows.se_weight_at, se, 1};
      g.se_expand = {excite.data() + rows.se_weight_at, se, 1};
      g.se_reduce_bias = reduce_bias.data() + rows.se_reduce_bias_at;
      g.se_expand_bias = excite_bias.data() + rows.se_expand_bias_at;
    }
    candidates.push_back(c);
    gradients.push_back(g);
  }
  const tfnas::Layer<T> layer{shape.batch,
                              shape.height,
                              shape.width,
                              ins,
                              outs,
                              shape.stride,
                              cpu_act(shape.act),
                              cpu_act(shape.act),
                              tfnas::Gate::sigmoid,
                              direct,
                              block.eps,
                              design,
                              static_cast<int>(candidates.size()),
                              candidates.data(),
                              mix.data()};
  const tfnas::LayerKernels<Element>& kernels = tfnas::layer_kernels_of<Element>();
  const tfnas::Threads threads = system_threads(thread_count);
  const T nan = std::numeric_limits<T>::quiet_NaN();
  std::vector<char> saved(kernels.saved_bytes(layer),
                          char(0xFF));  // NaN: nothing may be read before it is written
  std::vector<R> out(out_count, from_double<R>(nan)), dx(in_count, from_double<R>(nan));
  std::vector<T> dmix(candidates.size(), nan);
  const auto elements = [](auto& tensor) { return reinterpret_cast<Element*>(tensor.data()); };
  const auto read = [](const auto& tensor) { return reinterpret_cast<const Element*>(tensor.data()); };
  kernels.forward(layer, read(block.x), elements(out), saved.data(), tfnas::BatchStatistics<T>{}, threads);
  kernels.backward(layer, read(block.x), saved.data(), read(dout), elements(dx), dmix.data(),
                   gradients.data(), threads);
  expect_close("out", out, block.out, tolerance);
  expect_close("dx", dx, block.dx, tolerance);
  double along_x = 0;
  for (int64_t i = 0; test.residual && i < out_count; ++i)
    along_x += to_double(dout[i]) * to_double(block.x[i]);
  std::vector<double> du = block.du;
  for (double& value : du) value -= along_x;
  expect_close("dmix", dmix, du, tolerance, std::sqrt(out_count));

  // The reference keeps filters 49 apart and channels by `active_at`; ours lie where the weights do.
  std::vector<T> got[3];
  std::vector<double> wanted[3];
  block.for_each_channel([&](int k, const tfnas::cuda::CandidateRows& rows, int c) {
    const int taps = rows.kernel_size * rows.kernel_size, v = block.active_at[k] + c;
    for (int i = 0; i < ins; ++i) {
      got[0].push_back(expand[(rows.first_row + c) * ins + i]);
      wanted[0].push_back(block.dexpand[v * ins + i]);
    }
    for (int i = 0; i < taps; ++i) {
      got[1].push_back(depthwise[rows.depthwise_at + c * taps + i]);
      wanted[1].push_back(block.dfilter[v * 49 + i]);
    }
    for (int i = 0; i < outs; ++i) {
      got[2].push_back(project[(rows.first_row + c) * outs + i]);
      wanted[2].push_back(block.dproject[v * outs + i]);
    }
  });
  expect_close("dW expand", got[0], wanted[0], tolerance);
  expect_close("dW depthwise", got[1], wanted[1], tolerance);
  expect_close("dW project", got[2], wanted[2], tolerance);
  expect_close("dW SE reduce", reduce, block.dreduce_weight, tolerance, 1e-3);
  expect_close("dW SE expand", excite, block.dexpand_weight, tolerance, 1e-3);
  expect_close("db SE reduce", reduce_bias, block.dreduce_bias, tolerance, 1e-3);
  expect_close("db SE expand", excite_bias, block.dexpand_bias, tolerance, 1e-3);

  // Without weight gradients: the architecture step's way.
  std::vector<R> dx_alone(in_count, from_double<R>(nan));
  kernels.backward(layer, read(block.x), saved.data(), read(dout), elements(dx_alone), nullptr, nullptr,
                   threads);
  expect_close("dx without weight gradients", dx_alone, block.dx, tolerance);
}

}  // namespace

// Argument: the instruction set. One that this processor lacks is passed over.
int main(int count, char** arguments) {
  using namespace tfnas::cuda;
  const std::string isa = count > 1 ? arguments[1] : "generic";
  setenv("TFNAS_CPU_CAPABILITY", isa.c_str(), 1);
  try {
    std::printf("instruction set: %s\n", tfnas::capability_name(tfnas::cpu_capability()));
  } catch (const std::exception& error) {
    std::printf("nothing tested: %s\n", error.what());
    return 0;
  }
  // Widths around 16 and 48, channels that are and are no multiples of 8, one-pixel maps, more threads than
  // images.
  const Case cases[] = {
      {{2, 9, 7, 8, 8, 1, kSwish}, {{3, 33, 0}, {5, 1, 3}, {5, 50, 17}, {3, 16, 0}}, -1, true},
      {{3, 6, 5, 5, 13, 2, kRelu}, {{3, 21, 4}, {7, 48, 0}}, -1, false},
      {{3, 5, 8, 24, 24, 1, kHardSwish}, {{5, 70, 0}, {3, 9, 2}}, 0, true},
      {{1, 11, 12, 13, 40, 2, kRelu6}, {{5, 64, 6}}, 0, false},
      {{5, 1, 1, 16, 16, 1, kSwish}, {{5, 17, 3}, {3, 32, 0}}, -1, true},
  };
  for (const Case& test : cases) {
    for (const Design design : {Design::strips, Design::channels}) {
      for (const int threads : {1, 3}) {
        check<float, float>(test, design, threads, 5e-5);
        check<double, double>(test, design, threads, 1e-11);
        // Few pixels, rounded on the way, and kinks: how accurate bfloat16 is, the Python tests tell.
        check<tfnas::BFloat16, __nv_bfloat16>(test, design, threads, 0.5);
      }
    }
  }
  std::puts(failures ? "FAIL" : "PASS");
  return failures ? 1 : 0;
}
