// sample_paths.cuh, every candidate and number as the host draws it, at layer counts around the block size.
#include "emulator_check.h"
#include "sample_paths.cuh"

using namespace emulator_check;

namespace {

void check(int64_t layers, int candidates, bool masked) {
  std::printf("%lld layers, %d candidates, %s\n", static_cast<long long>(layers), candidates,
              masked ? "masked" : "all valid");
  Random random(5);
  const std::vector<double> log_alpha = random.normal<double>(layers * candidates);
  std::vector<char> valid(layers * candidates);
  for (int64_t i = 0; i < layers * candidates; ++i)
    valid[i] = log_alpha[i] > 0 || i % candidates == i / candidates % candidates;
  const double* alpha = log_alpha.data();
  const bool* mask = masked ? reinterpret_cast<const bool*>(valid.data()) : nullptr;
  const uint64_t seed = (uint64_t{1} << 40) + 3, step = (uint64_t{1} << 33) + 1;

  const int64_t clock[2] = {static_cast<int64_t>(seed), static_cast<int64_t>(step)};
  const double tau = 0.7;
  const tfnas::DrawKey given{seed, step, tau, nullptr, nullptr}, stored{1, 2, 3.0, clock, &tau};

  for (int mode = 0; mode <= 4; ++mode) {
    const auto second = static_cast<tfnas::SecondPath>(mode);
    std::vector<int64_t> got(2 * layers, -1), expected(2 * layers, -1);
    for (int64_t l = 0; l < layers; ++l) {
      const tfnas::LayerCandidates layer{alpha + l * candidates, mask ? mask + l * candidates : nullptr,
                                         candidates};
      const auto index = static_cast<uint32_t>(l);
      expected[l] = tfnas::gumbel_choice(layer, 0.7, seed, step, index, tfnas::Stream::first_path, -1);
      if (mode != 0)
        expected[layers + l] =
            tfnas::second_choice(layer, second, 0.7, seed, step, index, static_cast<int>(expected[l]));
    }
    int64_t* choice = got.data();
    for (const tfnas::DrawKey& key : {given, stored}) {
      std::fill(got.begin(), got.end(), -1);
      TFNAS_LAUNCH((tfnas::sample_paths_kernel), dim3((layers + 63) / 64), dim3(64), 0, 0, alpha, mask,
                   layers, candidates, key, second, choice);
      expect_close(key.clock ? "choice, key in device memory" : "choice",
                   std::vector<double>(got.begin(), got.end()),
                   std::vector<double>(expected.begin(), expected.end()), 0);
    }
  }

  const int64_t total = layers * candidates;
  std::vector<double> got(total), expected;
  for (uint32_t l = 0; l < layers; ++l) {
    for (uint32_t c = 0; c < static_cast<uint32_t>(candidates); ++c)
      expected.push_back(tfnas::gumbel(tfnas::uniform(seed, step, l, c, tfnas::Stream::mixture)));
  }
  double* out = got.data();
  TFNAS_LAUNCH((tfnas::gumbel_noise_kernel), dim3((total + 63) / 64), dim3(64), 0, 0, total, candidates,
               stored, tfnas::Stream::mixture, out);
  expect_close("noise", got, expected, 0);
}

}  // namespace

int main() {
  return run_in_all_orders([] {
    check(1, 1, false);
    check(18, 8, false);
    check(18, 9, true);
    check(64, 3, true);
    check(130, 5, true);
  });
}
