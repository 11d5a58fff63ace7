// Path sampling on the device: every layer's candidates, both paths, one launch.
#pragma once

#include "compat.cuh"
#include "draw_key.h"
#include "sampling.cuh"

namespace tfnas {

// One thread a layer: a few dozen candidates each, and layers are few.
__global__ void sample_paths_kernel(const double* log_alpha, const bool* valid, int64_t layers,
                                    int candidates, DrawKey given, SecondPath second, int64_t* choice) {
  const DrawKey key = given.resolved();
  const double tau = key.tau;
  const uint64_t seed = key.seed, step = key.step;
  const int64_t l = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (l >= layers) return;
  const LayerCandidates layer = {log_alpha + l * candidates,
                                 valid == nullptr ? nullptr : valid + l * candidates, candidates};
  const auto index = static_cast<uint32_t>(l);
  const int first = gumbel_choice(layer, tau, seed, step, index, Stream::first_path, /*excluded=*/-1);
  choice[l] = first;
  if (second != SecondPath::none)
    choice[layers + l] = second_choice(layer, second, tau, seed, step, index, first);
}

__global__ void gumbel_noise_kernel(int64_t total, int candidates, DrawKey given, Stream numbers,
                                    double* out) {
  const DrawKey key = given.resolved();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= total) return;
  out[i] = gumbel(uniform(key.seed, key.step, static_cast<uint32_t>(i / candidates),
                          static_cast<uint32_t>(i % candidates), numbers));
}

}  // namespace tfnas
