// The sum over a block of 256 threads, in a fixed order.
#pragma once

#include "compat.cuh"

namespace tfnas::cuda {

constexpr int kSumThreads = 256;

// `warps`: 8 words of shared memory. The sum is valid in thread 0 alone. Every thread of the block must call
// it.
__device__ inline double block_sum(double sum, double* warps) {
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  for (int i = 1; i < kSumThreads / 32; i++) sum += warps[i];
  return sum;
}

}  // namespace tfnas::cuda
