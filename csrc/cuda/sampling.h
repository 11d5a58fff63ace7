// Path sampling on the device: pointers to device memory, nothing is read back.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/sampling.cuh"

namespace tfnas {

// As sample_paths_cpu, on `stream` of the current device.
void sample_paths_cuda(const double* log_alpha, const bool* valid, int64_t layers, int64_t candidates,
                       double tau, uint64_t seed, uint64_t step, SecondPath second, int64_t* choice,
                       cudaStream_t stream);

// As gumbel_noise_cpu, on `stream` of the current device.
void gumbel_noise_cuda(int64_t layers, int64_t candidates, uint64_t seed, uint64_t step, Stream numbers,
                       double* out, cudaStream_t stream);

}  // namespace tfnas
