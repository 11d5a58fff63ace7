// The sink of a stage: every layer's output is read once, forward and backward, in one launch each (and one
// small one).
//
// Thread: every gridDim-th element of all outputs. Sums over elements: a block's threads in a fixed order,
// then the blocks by finish_dots.
#pragma once

#include "block_sum.cuh"
#include "numbers.cuh"
#include "sink.h"

namespace tfnas::cuda {

// grid: any, block kSumThreads.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    sink_sum(SinkOutputs<T> outs, const Acc<T>* v, T* sum, int64_t count) {
  for (int64_t i = int64_t{blockIdx.x} * kSumThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kSumThreads) {
    Acc<T> total = 0;
    for (int d = 0; d < outs.depth; d++) total += v[d] * load(outs.out[d] + i);
    store(sum + i, total);
  }
}

// parts [kDotBlocks][depth]. grid kDotBlocks, block kSumThreads.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    sink_dot_parts(SinkOutputs<T> outs, const T* dout, Acc<T>* parts, int64_t count) {
  TFNAS_SHARED(double, sums, [kSumThreads / 32]);
  for (int d = 0; d < outs.depth;
       d++) {  // dout is read again by every layer: from the cache, as it is as small
    const T* out = outs.out[d];
    Acc<T> total = 0;
    for (int64_t i = int64_t{blockIdx.x} * kSumThreads + threadIdx.x; i < count;
         i += int64_t{kDotBlocks} * kSumThreads)
      total += load(dout + i) * load(out + i);
    const double sum = block_sum(total, sums);
    if (threadIdx.x == 0) parts[blockIdx.x * outs.depth + d] = static_cast<Acc<T>>(sum);
    __syncthreads();  // before the next layer's sums
  }
}

// grid 1, block 32: a thread adds the blocks of one layer.
template <class A>
__global__ void __launch_bounds__(32) finish_dots(const A* parts, A* dv, int depth) {
  const int d = threadIdx.x;
  if (d >= depth) return;
  double sum = 0;
  for (int i = 0; i < kDotBlocks; i++) sum += parts[i * depth + d];
  dv[d] = static_cast<A>(sum);
}

template <class T>
void sink(const SinkOutputs<T>& outs, const Acc<T>* v, T* sum, int64_t count, cudaStream_t stream) {
  const int64_t blocks = (count + kSumThreads - 1) / kSumThreads;
  TFNAS_LAUNCH((sink_sum<T>), dim3(static_cast<unsigned>(blocks < 4096 ? blocks : 4096)), dim3(kSumThreads),
               0, stream, outs, v, sum, count);
}

template <class T>
void sink_dots(const SinkOutputs<T>& outs, const T* dout, Acc<T>* parts, Acc<T>* dv, int64_t count,
               cudaStream_t stream) {
  using A = Acc<T>;
  TFNAS_LAUNCH((sink_dot_parts<T>), dim3(kDotBlocks), dim3(kSumThreads), 0, stream, outs, dout, parts, count);
  const int depth = outs.depth;
  TFNAS_LAUNCH((finish_dots<A>), dim3(1), dim3(32), 0, stream, parts, dv, depth);
}

}  // namespace tfnas::cuda
