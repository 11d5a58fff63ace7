// Philox's published vectors, the logarithm against the library's, and choices that stay inside what is
// allowed.
#include "cpu/sampling.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

void test_philox() {
  struct Vector {
    tfnas::PhiloxWords counter;
    uint32_t key0, key1;
    tfnas::PhiloxWords expected;
  };
  // Random123's known-answer file (kat_vectors), philox4x32 with 10 rounds.
  const Vector vectors[] = {
      {{{0, 0, 0, 0}}, 0, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
      {{{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}},
       0xffffffff,
       0xffffffff,
       {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
      {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
       0xa4093822,
       0x299f31d0,
       {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}},
  };
  for (const Vector& v : vectors) {
    const tfnas::PhiloxWords got = tfnas::philox4x32_10(v.counter, v.key0, v.key1);
    for (int i = 0; i < 4; ++i) check(got.w[i] == v.expected.w[i], "Philox gives the published words");
  }
}

void test_log() {
  for (double x : {0x1p-53, 1e-300, 0.1, 0.5, 0.70710678118654746, 0.70710678118654757, 1.0 - 0x1p-53, 1.0,
                   2.0, 36.7, 1e300}) {
    const double expected = std::log(x);
    check(std::abs(tfnas::portable_log(x) - expected) <= 5e-16 * std::abs(expected),
          "portable_log is accurate");
  }
}

void test_second_path() {
  const std::vector<double> log_alpha = {-1.0, -3.0, -0.5, -2.0};
  const bool valid[4] = {true, true, false, true};
  const bool one[4] = {false, true, false, false};
  for (uint64_t step = 0; step < 1000; ++step) {
    for (auto mode : {tfnas::SecondPath::random, tfnas::SecondPath::gumbel, tfnas::SecondPath::min,
                      tfnas::SecondPath::max}) {
      int64_t choice[2];
      tfnas::sample_paths_cpu(log_alpha.data(), valid, 1, 4, 1.0, 7, step, mode, choice);
      check(valid[choice[0]] && valid[choice[1]], "only valid candidates are taken");
      check(choice[0] != choice[1], "the second path differs from the first");
      tfnas::sample_paths_cpu(log_alpha.data(), one, 1, 4, 1.0, 7, step, mode, choice);
      check(choice[0] == 1 && choice[1] == 1, "a single candidate runs in both paths");
    }
  }
}

}  // namespace

int main() {
  test_philox();
  test_log();
  test_second_path();
  std::puts("3 passed, 0 failed");
  return 0;
}
