// adam.cuh against the formulas of Adam and log softmax in float64: several steps, masked entries, rows
// longer than a warp.
#include "adam.cuh"
#include "emulator_check.h"

using namespace emulator_check;
using namespace tfnas::cuda;

namespace {

template <class A>
struct Parameter {
  int rows, columns;
  std::vector<A> values, first, second, grad;
  std::vector<char> mask;
  std::vector<double> want, want_first, want_second;

  Parameter(Random& random, int rows, int columns) : rows(rows), columns(columns) {
    values = random.normal<A>(rows * columns), first.resize(values.size()), second.resize(values.size());
    want_first.resize(values.size()), want_second.resize(values.size());
    for (int i = 0; i < rows * columns; i++) mask.push_back(i % columns == 0 || i % 5 != 2);
    for (int i = 0; i < rows * columns; i++) want.push_back(values[i] = mask[i] ? values[i] : A(-INFINITY));
  }
  LogProbabilities<A> view() {
    return {values.data(), first.data(), second.data(), grad.data(), reinterpret_cast<bool*>(mask.data()),
            rows,          columns};
  }
  double squares() const {
    double sum = 0;
    for (size_t i = 0; i < grad.size(); i++) sum += mask[i] ? double(grad[i]) * grad[i] : 0;
    return sum;
  }
  void update(const AdamOptions& o, double coefficient, int t) {
    for (int row = 0; row < rows; row++) {
      double sum = 0;
      for (int i = row * columns; i < (row + 1) * columns; i++) {
        if (!mask[i]) continue;
        const double g = coefficient * grad[i] + o.weight_decay * want[i];
        want_first[i] = o.beta1 * want_first[i] + (1 - o.beta1) * g;
        want_second[i] = o.beta2 * want_second[i] + (1 - o.beta2) * g * g;
        const double m = want_first[i] / (1 - std::pow(o.beta1, t)),
                     v = want_second[i] / (1 - std::pow(o.beta2, t));
        want[i] -= o.lr * m / (std::sqrt(v) + o.eps);
        sum += std::exp(want[i]);
      }
      for (int i = row * columns; i < (row + 1) * columns; i++) want[i] -= mask[i] ? std::log(sum) : 0;
    }
  }
  // Probabilities: what is masked must be exactly none.
  void compare(const char* name, double tolerance) const {
    std::vector<double> got, expected;
    for (size_t i = 0; i < want.size(); i++) got.push_back(std::exp(double(values[i])));
    for (size_t i = 0; i < want.size(); i++) expected.push_back(mask[i] ? std::exp(want[i]) : 0);
    expect_close(name, got, expected, tolerance);
    for (size_t i = 0; i < want.size(); i++) failures += !mask[i] && got[i] != 0;
  }
};

template <class A>
void check(const char* name, int layers, int candidates, int stages, int depths, double max_norm,
           double tolerance) {
  std::printf("%s: alpha %dx%d, beta %dx%d\n", name, layers, candidates, stages, depths);
  Random random(3);
  Parameter<A> alpha(random, layers, candidates), beta(random, stages, depths);
  const AdamOptions options{0.01, 0.5, 0.999, 5e-4, 1e-8, max_norm};
  A steps = 0, norm = 0;
  for (int t = 1; t <= 4; t++) {
    alpha.grad = random.normal<A>(layers * candidates), beta.grad = random.normal<A>(stages * depths);
    const double expected = std::sqrt(alpha.squares() + beta.squares());
    adam_step(alpha.view(), beta.view(), options, &steps, &norm, nullptr);
    alpha.update(options, std::fmin(1, max_norm / (expected + 1e-6)), t);
    beta.update(options, std::fmin(1, max_norm / (expected + 1e-6)), t);
    expect_close("norm", std::vector<A>{norm}, std::vector<double>{expected}, tolerance);
    expect_close("steps", std::vector<A>{steps}, std::vector<double>{double(t)}, 0);
    alpha.compare("alpha", tolerance), beta.compare("beta", tolerance);
  }
}

}  // namespace

int main() {
  return run_in_all_orders([] {
    check<double>("fp64, clipped", 18, 8, 6, 4, 0.5, 1e-12);
    check<double>("fp64, not clipped, long rows", 3, 70, 1, 1, INFINITY, 1e-12);
    check<float>("fp32", 18, 8, 6, 4, 5, 1e-5);
  });
}
