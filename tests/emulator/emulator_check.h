// What every emulator test shares: seeded data, the three thread orders, comparison with a float64 result.
#pragma once

#include <array>
#include <cstdio>
#include <random>
#include <vector>

#include "compat.cuh"

namespace emulator_check {

inline int failures = 0;

inline double to_double(float v) { return v; }
inline double to_double(double v) { return v; }
inline double to_double(__nv_bfloat16 v) { return __bfloat162float(v); }
template <class T>
T from_double(double v) {
  return static_cast<T>(v);
}
template <>
inline __nv_bfloat16 from_double<__nv_bfloat16>(double v) {
  return __float2bfloat16(static_cast<float>(v));
}

class Random {
 public:
  explicit Random(unsigned seed) : generator_(seed) {}
  template <class T>
  std::vector<T> normal(size_t count, double scale = 1, double offset = 0) {
    std::normal_distribution<double> distribution;
    std::vector<T> values(count);
    for (T& v : values) v = from_double<T>(offset + scale * distribution(generator_));
    return values;
  }

 private:
  std::mt19937 generator_;
};

// Largest error relative to the largest expected value, or to `least_scale` where what is expected cancels to
// less than the values it was made of. A NaN never passes.
template <class A, class B>
void expect_close(const char* what, const A& got, const B& expected, double tolerance,
                  double least_scale = 1e-30) {
  double error = 0, scale = least_scale;
  for (size_t i = 0; i < expected.size(); i++) {
    const double e = std::fabs(to_double(got[i]) - to_double(expected[i]));
    if (!(e <= error)) error = e;
    scale = std::fmax(scale, std::fabs(to_double(expected[i])));
  }
  const bool good = error / scale <= tolerance && got.size() == expected.size();
  failures += !good;
  std::printf("  %-44s %.2e (at most %.0e)%s\n", what, error / scale, tolerance, good ? "" : "  FAIL");
}

// Runs `test` with the threads of a block in forward, reverse and random order.
template <class Test>
int run_in_all_orders(Test test) {
  const emulator::Order orders[] = {emulator::Order::kForward, emulator::Order::kReverse,
                                    emulator::Order::kRandom};
  const char* names[] = {"forward", "reverse", "random, seed 11"};
  for (int i = 0; i < 3; i++) {
    emulator::set_order(orders[i], 11);
    std::printf("order: %s\n", names[i]);
    try {
      test();
    } catch (const std::exception& e) {
      std::printf("rejected: %s\n", e.what());
      failures++;
    }
  }
  std::puts(failures ? "FAIL" : "PASS");
  return failures ? 1 : 0;
}

}  // namespace emulator_check
