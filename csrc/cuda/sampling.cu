#include "cuda/sampling.h"

#include <c10/cuda/CUDAException.h>

#include "kernels/sample_paths.cuh"

namespace tfnas {
namespace {

constexpr int kThreads = 64;

unsigned int blocks_for(int64_t threads) {
  return static_cast<unsigned int>((threads + kThreads - 1) / kThreads);
}

}  // namespace

void sample_paths_cuda(const double* log_alpha, const bool* valid, int64_t layers, int64_t candidates,
                       const DrawKey& key, SecondPath second, int64_t* choice, cudaStream_t stream) {
  TFNAS_LAUNCH((sample_paths_kernel), blocks_for(layers), kThreads, 0, stream, log_alpha, valid, layers,
               static_cast<int>(candidates), key, second, choice);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void gumbel_noise_cuda(int64_t layers, int64_t candidates, const DrawKey& key, Stream numbers, double* out,
                       cudaStream_t stream) {
  TFNAS_LAUNCH((gumbel_noise_kernel), blocks_for(layers * candidates), kThreads, 0, stream,
               layers * candidates, static_cast<int>(candidates), key, numbers, out);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace tfnas
