// Partial sums of a wide or narrow tensor -> mean and 1 / std of every channel, added in double and in a
// fixed order. Thread: one channel and every 32nd row of the partial sums; the 32 row groups of a block meet
// in shared memory. With a thousand rows fewer groups would walk a long chain of dependent loads: this kernel
// is all latency.
#pragma once

#include "numbers.cuh"

namespace tfnas::cuda {

constexpr int kStatsGroups = 32;

// partial [rows][2][channels]: sums and sums of squares over `count` values. grid ceil(channels / 32), block
// 32 x 32.
template <class A>
__global__ void __launch_bounds__(32 * kStatsGroups)
    finish_stats(const A* partial, A* mean, A* rstd, int rows, int channels, int64_t count, double eps) {
  TFNAS_SHARED(double, part, [kStatsGroups][2][32]);
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32, channel = blockIdx.x * 32 + lane;
  partial += int64_t{2} * blockIdx.y * rows * channels;
  mean += int64_t{blockIdx.y} * channels;
  rstd += int64_t{blockIdx.y} * channels;
  double sum = 0, squares = 0;
  if (channel < channels) {
#pragma unroll 8
    for (int r = group; r < rows; r += kStatsGroups) {
      sum += partial[int64_t{2} * r * channels + channel];
      squares += partial[(int64_t{2} * r + 1) * channels + channel];
    }
  }
  part[group][0][lane] = sum;
  part[group][1][lane] = squares;
  __syncthreads();
  if (group != 0 || channel >= channels) return;
  sum = squares = 0;
  for (int i = 0; i < kStatsGroups; i++) {
    sum += part[i][0][lane];
    squares += part[i][1][lane];
  }
  const double m = sum / static_cast<double>(count), variance = squares / static_cast<double>(count) - m * m;
  mean[channel] = static_cast<A>(m);
  rstd[channel] = static_cast<A>(1.0 / sqrt((variance > 0 ? variance : 0) + eps));
}

}  // namespace tfnas::cuda
