// sink.cuh and cross_entropy.cuh against their definitions in float64.
#include "cross_entropy.cuh"
#include "emulator_check.h"
#include "sink.cuh"

using namespace emulator_check;
using namespace tfnas::cuda;

namespace {

template <class T>
void check_sink(const char* name, int depth, int64_t count, double tolerance) {
  std::printf("sink, %s: depth %d, %lld values\n", name, depth, static_cast<long long>(count));
  using A = Acc<T>;
  Random random(4);
  std::vector<std::vector<T>> outs;
  SinkOutputs<T> view{depth, {}};
  for (int d = 0; d < depth; d++) outs.push_back(random.normal<T>(count, 1, 0.2));
  for (int d = 0; d < depth; d++) view.out[d] = outs[d].data();
  const std::vector<A> v = random.normal<A>(depth);
  const std::vector<T> dout = random.normal<T>(count);
  std::vector<T> sum(count);
  std::vector<A> parts(kDotBlocks * depth), dv(depth);
  std::vector<double> want(count), want_dv(depth);
  for (int d = 0; d < depth; d++) {
    for (int64_t i = 0; i < count; i++) {
      want[i] += v[d] * to_double(outs[d][i]);
      want_dv[d] += to_double(dout[i]) * to_double(outs[d][i]);
    }
  }
  sink(view, v.data(), sum.data(), count, nullptr);
  sink_dots(view, dout.data(), parts.data(), dv.data(), count, nullptr);
  expect_close("sum", sum, want, tolerance);
  expect_close("dv", dv, want_dv, sizeof(A) == 8 ? 1e-12 : 1e-5, std::sqrt(count));
}

template <class A>
void check_cross_entropy(const char* name, int rows, int classes, double tolerance) {
  std::printf("cross entropy, %s: %d rows, %d classes\n", name, rows, classes);
  Random random(8);
  std::vector<A> logits = random.normal<A>(rows * classes, 4);
  std::vector<int64_t> labels(rows);
  for (int i = 0; i < rows; i++) labels[i] = i * 7 % classes;
  if (classes > 2) logits[1] = logits[2] = 50;  // two largest: the first counts
  std::vector<A> dlogits(logits.size()), loss(1);
  std::vector<int64_t> correct(1);
  std::vector<double> row_losses(rows), want_gradient(logits.size()), want(1);
  std::vector<int> row_correct(rows);
  int64_t right = 0;
  for (int i = 0; i < rows; i++) {
    double sum = 0;
    int best = 0;
    for (int c = 0; c < classes; c++) {
      sum += std::exp(double(logits[i * classes + c]));
      if (logits[i * classes + c] > logits[i * classes + best]) best = c;
    }
    right += best == labels[i];
    want[0] += (std::log(sum) - logits[i * classes + labels[i]]) / rows;
    for (int c = 0; c < classes; c++)
      want_gradient[i * classes + c] =
          (std::exp(double(logits[i * classes + c])) / sum - (c == labels[i])) / rows;
  }
  cross_entropy(logits.data(), labels.data(), rows, classes, dlogits.data(), loss.data(), correct.data(),
                row_losses.data(), row_correct.data(), nullptr);
  expect_close("loss", loss, want, tolerance);
  expect_close("gradient", dlogits, want_gradient, tolerance);
  expect_close("right answers", std::vector<double>{double(correct[0])}, std::vector<double>{double(right)},
               0);
  labels[0] = classes;
  cross_entropy(logits.data(), labels.data(), rows, classes, dlogits.data(), loss.data(), correct.data(),
                row_losses.data(), row_correct.data(), nullptr);
  failures += !std::isnan(loss[0]);
}

}  // namespace

int main() {
  return run_in_all_orders([] {
    check_sink<double>("fp64", 4, 1237, 1e-14);
    check_sink<float>("fp32", 1, 1, 1e-6);
    check_sink<float>("fp32", 16, 300, 1e-6);
    check_sink<__nv_bfloat16>("bf16", 3, 515, 1e-2);
    check_cross_entropy<double>("fp64", 5, 3, 1e-13);
    check_cross_entropy<double>("fp64", 3, 1000, 1e-13);
    check_cross_entropy<float>("fp32", 300, 2, 1e-6);
    check_cross_entropy<float>("fp32", 2, 257, 1e-6);
    check_cross_entropy<float>("fp32", 1, 1, 1e-6);
  });
}
