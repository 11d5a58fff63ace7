// One step of the architecture parameters in one launch: gradient norm over alpha and beta, clipping, Adam,
// and log softmax of every row.
//
// One block: the tensors are a few hundred numbers, and the norm is needed before the first update. A warp
// owns a row at a time, a lane every 32nd entry of it. Everything is read and written once.
#pragma once

#include "adam.h"
#include "block_sum.cuh"

namespace tfnas::cuda {

template <class A>
__device__ inline double masked_squares(const LogProbabilities<A>& p) {
  double sum = 0;
  for (int i = threadIdx.x; i < p.rows * p.columns; i += kSumThreads)
    sum += p.mask[i] ? static_cast<double>(p.grad[i]) * p.grad[i] : 0.0;
  return sum;
}

// Adam as PyTorch's, `weight_decay` as an L2 penalty; `step_size` = lr / (1 - beta1^t), `root` = sqrt(1 -
// beta2^t).
template <class A>
__device__ inline void update_rows(const LogProbabilities<A>& p, const AdamOptions& o, A coefficient,
                                   A step_size, A root) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const A b1 = static_cast<A>(o.beta1), b2 = static_cast<A>(o.beta2);
  for (int row = warp; row < p.rows; row += kSumThreads / 32) {
    const int begin = row * p.columns, end = begin + p.columns;
    A largest = -INFINITY;
    for (int i = begin + lane; i < end; i += 32) {
      if (!p.mask[i]) continue;
      const A grad = coefficient * p.grad[i] + static_cast<A>(o.weight_decay) * p.values[i];
      const A first = p.first_moment[i] += (1 - b1) * (grad - p.first_moment[i]);
      const A second = p.second_moment[i] = b2 * p.second_moment[i] + (1 - b2) * grad * grad;
      const A value = p.values[i] - step_size * first / (sqrt(second) / root + static_cast<A>(o.eps));
      p.values[i] = value;
      largest = value > largest || value != value ? value : largest;
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      const A other = __shfl_xor_sync(~0u, largest, offset);
      largest = other > largest || other != other ? other : largest;
    }
    double sum = 0;
    for (int i = begin + lane; i < end; i += 32)
      sum += p.mask[i] ? exp(static_cast<double>(p.values[i] - largest)) : 0;
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    const A shift = largest + static_cast<A>(log(sum));
    for (int i = begin + lane; i < end; i += 32) p.values[i] = p.mask[i] ? p.values[i] - shift : A(-INFINITY);
  }
}

// grid 1, block kSumThreads.
template <class A>
__global__ void __launch_bounds__(kSumThreads, 1)
    adam_rows(LogProbabilities<A> alpha, LogProbabilities<A> beta, AdamOptions options, A* steps, A* norm) {
  TFNAS_SHARED(double, sums, [kSumThreads / 32]);
  TFNAS_SHARED(double, factors, [3]);
  const double sum = block_sum(masked_squares(alpha) + masked_squares(beta), sums);
  if (threadIdx.x == 0) {
    const double length = sqrt(sum), share = options.max_norm / (length + 1e-6), t = *steps + 1;
    *norm = static_cast<A>(length);
    *steps = static_cast<A>(t);
    factors[0] = share > 1 ? 1 : share;  // a NaN stays one
    factors[1] = options.lr / (1 - pow(options.beta1, t));
    factors[2] = sqrt(1 - pow(options.beta2, t));
  }
  __syncthreads();
  const A coefficient = static_cast<A>(factors[0]), step_size = static_cast<A>(factors[1]),
          root = static_cast<A>(factors[2]);
  update_rows(alpha, options, coefficient, step_size, root);
  update_rows(beta, options, coefficient, step_size, root);
}

template <class A>
void adam_step(const LogProbabilities<A>& alpha, const LogProbabilities<A>& beta, const AdamOptions& options,
               A* steps, A* norm, cudaStream_t stream) {
  TFNAS_LAUNCH((adam_rows<A>), dim3(1), dim3(kSumThreads), 0, stream, alpha, beta, options, steps, norm);
}

}  // namespace tfnas::cuda
