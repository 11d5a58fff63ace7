// Path sampling on the device: pointers to device memory, nothing is read back.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/draw_key.h"
#include "kernels/sampling.cuh"

namespace tfnas {

// As sample_paths_cpu, on `stream` of the current device.
void sample_paths_cuda(const double* log_alpha, const bool* valid, int64_t layers, int64_t candidates,
                       const DrawKey& key, SecondPath second, int64_t* choice, cudaStream_t stream);

// As gumbel_noise_cpu, on `stream` of the current device.
void gumbel_noise_cuda(int64_t layers, int64_t candidates, const DrawKey& key, Stream numbers, double* out,
                       cudaStream_t stream);

}  // namespace tfnas
