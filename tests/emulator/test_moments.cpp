// moments.cuh and fold.cuh against float64: mean, covariance, and the batch norm folded into the expand
// weights.
#include "emulator_check.h"
#include "fold.cuh"
#include "moments.cuh"

using namespace emulator_check;

namespace {

template <class T, class Acc>
void check(const char* name, int64_t pixels, int channels, int64_t run, double offset, double tolerance) {
  std::printf("%s: %lld pixels, %d channels, runs of %lld\n", name, static_cast<long long>(pixels), channels,
              static_cast<long long>(run));
  Random random(3);
  const std::vector<T> x = random.normal<T>(pixels * channels, 1.7, offset);
  std::vector<double> mean(channels, 0), covariance(channels * channels, 0);
  for (int64_t p = 0; p < pixels; p++) {
    for (int c = 0; c < channels; c++) mean[c] += to_double(x[p * channels + c]) / pixels;
  }
  for (int64_t p = 0; p < pixels; p++) {
    for (int i = 0; i < channels; i++) {
      for (int j = 0; j < channels; j++) {
        covariance[i * channels + j] +=
            (to_double(x[p * channels + i]) - mean[i]) * (to_double(x[p * channels + j]) - mean[j]) / pixels;
      }
    }
  }

  const int runs = static_cast<int>((pixels + run - 1) / run);
  const tfnas::cuda::GramTiling tiling(channels);
  std::vector<Acc> sums(runs * channels), got_mean(channels),
      parts(runs * tiling.pairs() * tiling.tile * tiling.tile), got_covariance(channels * channels);
  const T* x_data = x.data();
  Acc *sums_data = sums.data(), *mean_data = got_mean.data(), *parts_data = parts.data(),
      *covariance_data = got_covariance.data();
  TFNAS_LAUNCH((tfnas::cuda::channel_sums<T, Acc>), dim3(runs, tfnas::cuda::ceil_div(channels, 32)),
               dim3(32, 8), 0, 0, x_data, sums_data, pixels, channels, run);
  TFNAS_LAUNCH((tfnas::cuda::finish_mean<Acc>), dim3(tfnas::cuda::ceil_div(channels, 64)), dim3(64), 0, 0,
               sums_data, mean_data, runs, channels, pixels);
  const tfnas::cuda::Centred<T> centred{x_data, mean_data, channels};
  TFNAS_LAUNCH((tfnas::cuda::gram<Acc, tfnas::cuda::Centred<T>>), dim3(runs, tiling.pairs()),
               dim3(tfnas::cuda::kGramThreads), tiling.shared_bytes<Acc>(), 0, centred, parts_data, pixels,
               channels, run);
  TFNAS_LAUNCH((tfnas::cuda::finish_gram<Acc>),
               dim3(tfnas::cuda::ceil_div(tiling.tile * tiling.tile, 256), tiling.pairs()), dim3(256), 0, 0,
               parts_data, covariance_data, runs, channels, pixels);
  expect_close("mean", got_mean, mean, tolerance);
  expect_close("covariance", got_covariance, covariance, tolerance);

  // Three candidates of odd widths; the mixture (all of them), then each alone through a choice in device
  // memory.
  const tfnas::cuda::LayerTable table{3, {{3, 0, 0, 33}, {5, 40, 360, 1}, {3, 41, 385, 70}}};
  const int rows = 41 + 75;
  const double eps = 1e-5;
  const std::vector<Acc> expand = random.normal<Acc>(rows * channels, 1 / std::sqrt(channels));
  for (int choice = -1; choice < table.count; choice++) {
    std::vector<double> rstd, shift;
    int active = 0;  // candidates start at multiples of 8
    for (int i = 0; i < table.count; i++) {
      if (choice >= 0 && i != choice) continue;
      rstd.resize(active, 0), shift.resize(active, 0);
      for (int c = 0; c < table.candidate[i].width; c++) {
        const Acc* w = expand.data() + (table.candidate[i].first_row + c) * channels;
        double variance = 0, projected = 0;
        for (int a = 0; a < channels; a++) {
          projected += to_double(w[a]) * mean[a];
          for (int b = 0; b < channels; b++) {
            variance += to_double(w[a]) * covariance[a * channels + b] * to_double(w[b]);
          }
        }
        rstd.push_back(1 / std::sqrt(variance + eps));
        shift.push_back(-projected / std::sqrt(variance + eps));
      }
      active += tfnas::cuda::pitch_of(table.candidate[i].width);
    }
    std::vector<Acc> got_rstd(rstd.size()), got_shift(rstd.size());
    const Acc* expand_data = expand.data();
    const tfnas::cuda::LayerTable* table_data = &table;
    const int* choice_data = choice < 0 ? nullptr : &choice;
    Acc *rstd_data = got_rstd.data(), *shift_data = got_shift.data();
    TFNAS_LAUNCH((tfnas::cuda::fold<Acc>), dim3(9), dim3(tfnas::cuda::kFoldThreads),
                 tfnas::cuda::fold_shared_elements(channels) * sizeof(Acc), 0, expand_data, mean_data,
                 covariance_data, rstd_data, shift_data, table_data, choice_data, channels, eps);
    expect_close(choice < 0 ? "fold, mixture: 1/std" : "fold, one candidate: 1/std", got_rstd, rstd,
                 tolerance);
    expect_close(choice < 0 ? "fold, mixture: shift" : "fold, one candidate: shift", got_shift, shift,
                 tolerance);
  }
}

}  // namespace

int main() {
  return run_in_all_orders([] {
    check<double, double>("fp64", 315, 7, 100, -1.5, 1e-12);
    check<float, float>("fp32", 315, 24, 128, 0.4, 2e-6);
    check<float, float>("fp32, large mean", 200, 16, 64, 40, 2e-5);
    check<float, float>("fp32, two tiles", 130, 80, 130, 0, 2e-6);
    check<float, float>("fp32, one channel", 1, 1, 1, 0, 2e-6);
    check<__nv_bfloat16, float>("bf16", 315, 40, 90, 0.2, 4e-6);
  });
}
