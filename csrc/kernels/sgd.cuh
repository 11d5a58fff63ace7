// Gradient norm and SGD on the sampled widths only: what was not sampled is neither read nor written.
//
// Block: a share of one segment; thread: elements of the segment's gradient in turn. Each sampled gradient,
// weight and momentum is read once, weight and momentum written once; the choice is read on the device. Where
// both paths took the same candidate its gradient is the sum of both, and the second path has nothing left to
// do.
#pragma once

#include "block_sum.cuh"
#include "numbers.cuh"
#include "sgd.h"

namespace tfnas::cuda {

// Where element `i` of path `path` of a segment lies in the packed weight, and its gradient; -1: not sampled.
template <class A>
__device__ inline int64_t locate(const Segment<A>& s, int path, int64_t i, A& grad) {
  const bool both = s.grad[0] && s.grad[1];
  const int choice = *s.choice[path];
  const bool same = both && *s.choice[0] == *s.choice[1];
  if (path == 1 && same) return -1;
  const CandidateRows rows = s.table->candidate[choice];
  int64_t at = -1;
  switch (s.role) {
    case SegmentRole::kRows:
      if (i / s.columns < rows.width) at = int64_t{rows.first_row} * s.columns + i;
      break;
    case SegmentRole::kDepthwise: {
      const int taps = rows.kernel_size * rows.kernel_size;
      const int64_t row = i / s.columns, tap = i % s.columns;
      if (row < rows.width && tap < taps) at = rows.depthwise_at + row * taps + tap;
      break;
    }
    case SegmentRole::kSqueezeWeight: {
      const int64_t offset = i - rows.se_weight_at;
      if (offset >= 0 && offset < int64_t{rows.width} * rows.se_channels) at = i;
      break;
    }
    case SegmentRole::kSqueezeBias: {
      const int64_t offset = i - rows.se_reduce_bias_at;
      if (offset >= 0 && offset < rows.se_channels) at = i;
      break;
    }
    case SegmentRole::kExciteBias: {
      const int64_t offset = i - rows.se_expand_bias_at;
      if (rows.se_channels > 0 && offset >= 0 && offset < rows.width) at = i;
      break;
    }
  }
  if (at >= 0) grad = s.grad[path][i] + (same ? s.grad[1][i] : A(0));
  return at;
}

// grid (kSegmentBlocks, segments), block 256.
template <class A>
__global__ void __launch_bounds__(256) segment_squares(const Segment<A>* segments, A* partial) {
  TFNAS_SHARED(double, sums, [8]);
  const Segment<A> s = segments[blockIdx.y];
  double sum = 0;
  for (int path = 0; path < 2; path++) {
    if (!s.grad[path]) continue;
    for (int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x; i < s.size; i += int64_t{gridDim.x} * 256) {
      A grad = 0;
      if (locate(s, path, i, grad) >= 0) sum += static_cast<double>(grad) * grad;
    }
  }
  sum = block_sum(sum, sums);
  if (threadIdx.x == 0) partial[blockIdx.y * gridDim.x + blockIdx.x] = static_cast<A>(sum);
}

// grid (kSegmentBlocks, tensors), block 256.
template <class A>
__global__ void __launch_bounds__(256) dense_squares(DenseTensors<A> dense, A* partial) {
  TFNAS_SHARED(double, sums, [8]);
  const A* grad = dense.grad[blockIdx.y];
  const int64_t size = dense.size[blockIdx.y];
  double sum = 0;
  for (int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x; i < size; i += int64_t{gridDim.x} * 256)
    sum += static_cast<double>(grad[i]) * grad[i];
  sum = block_sum(sum, sums);
  if (threadIdx.x == 0) partial[blockIdx.y * gridDim.x + blockIdx.x] = static_cast<A>(sum);
}

// One block of 256: a thread adds every 256th partial sum, thread 0 adds the threads.
template <class A>
__global__ void __launch_bounds__(256)
    finish_norm(const A* partial, A* norm, A* coefficient, int count, double max_norm) {
  TFNAS_SHARED(double, sums, [256]);
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += 256) sum += partial[i];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < 256; i++) sum += sums[i];
  const double length = sqrt(sum), share = max_norm / (length + 1e-6);
  *norm = static_cast<A>(length);
  *coefficient = static_cast<A>(share > 1 ? 1 : share);  // a NaN stays one
}

template <class A>
__device__ inline void sgd_update(A& weight, A& momentum, A grad, A coefficient, A lr, A m, A weight_decay) {
  momentum = m * momentum + (coefficient * grad + weight_decay * weight);
  weight -= lr * momentum;
}

// grid (kSegmentBlocks, segments), block 256.
template <class A>
__global__ void __launch_bounds__(256)
    segment_sgd(const Segment<A>* segments, const A* coefficient, const A* lr, A m, A weight_decay) {
  const Segment<A> s = segments[blockIdx.y];
  for (int path = 0; path < 2; path++) {
    if (!s.grad[path]) continue;
    for (int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x; i < s.size; i += int64_t{gridDim.x} * 256) {
      A grad = 0;
      const int64_t at = locate(s, path, i, grad);
      if (at >= 0) sgd_update(s.weight[at], s.momentum[at], grad, *coefficient, *lr, m, weight_decay);
    }
  }
}

// grid (kSegmentBlocks, tensors), block 256.
template <class A>
__global__ void __launch_bounds__(256)
    dense_sgd(DenseTensors<A> dense, const A* coefficient, const A* lr, A m, A weight_decay) {
  const int t = blockIdx.y;
  for (int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x; i < dense.size[t]; i += int64_t{gridDim.x} * 256)
    sgd_update(dense.weight[t][i], dense.momentum[t][i], dense.grad[t][i], *coefficient, *lr, m,
               weight_decay);
}

template <class A>
void gradient_norm(const Segment<A>* segments, int count, const DenseTensors<A>* dense, int groups,
                   double max_norm, A* partial, A* norm, A* coefficient, cudaStream_t stream) {
  TFNAS_LAUNCH((segment_squares<A>), dim3(kSegmentBlocks, count), dim3(256), 0, stream, segments, partial);
  int partials = count * kSegmentBlocks;
  for (int g = 0; g < groups; g++) {
    const DenseTensors<A> group = dense[g];
    A* mine = partial + partials;
    TFNAS_LAUNCH((dense_squares<A>), dim3(kSegmentBlocks, group.count), dim3(256), 0, stream, group, mine);
    partials += group.count * kSegmentBlocks;
  }
  TFNAS_LAUNCH((finish_norm<A>), dim3(1), dim3(256), 0, stream, partial, norm, coefficient, partials,
               max_norm);
}

template <class A>
void clipped_sgd(const Segment<A>* segments, int count, const DenseTensors<A>* dense, int groups,
                 const A* coefficient, const A* lr, A m, A weight_decay, cudaStream_t stream) {
  TFNAS_LAUNCH((segment_sgd<A>), dim3(kSegmentBlocks, count), dim3(256), 0, stream, segments, coefficient, lr,
               m, weight_decay);
  for (int g = 0; g < groups; g++) {
    const DenseTensors<A> group = dense[g];
    TFNAS_LAUNCH((dense_sgd<A>), dim3(kSegmentBlocks, group.count), dim3(256), 0, stream, group, coefficient,
                 lr, m, weight_decay);
  }
}

}  // namespace tfnas::cuda
