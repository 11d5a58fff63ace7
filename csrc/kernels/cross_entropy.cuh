// Forward and gradient of cross entropy in one launch, and one small launch that adds the rows.
//
// A block owns a row, a thread every 256th class: two reads of the row for the largest logit and the sum of
// exponentials (the second from the cache), a third for the gradient, which is written once.
#pragma once

#include "block_sum.cuh"
#include "cross_entropy.h"

namespace tfnas::cuda {

// grid rows, block kSumThreads.
template <class A>
__global__ void __launch_bounds__(kSumThreads, 1)
    cross_entropy_rows(const A* logits, const int64_t* labels, A* dlogits, double* row_losses,
                       int* row_correct, int rows, int classes) {
  constexpr int kWarps = kSumThreads / 32;
  TFNAS_SHARED(A, values, [kWarps]);
  TFNAS_SHARED(int, indices, [kWarps]);
  TFNAS_SHARED(double, sums, [kWarps]);
  TFNAS_SHARED(double, total, [1]);
  const A* row = logits + int64_t{blockIdx.x} * classes;
  const int64_t label = labels[blockIdx.x];
  A largest = -INFINITY;
  int index = classes;
  for (int c = threadIdx.x; c < classes; c += kSumThreads) {
    if (row[c] > largest || index == classes) largest = row[c], index = c;
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    const A other = __shfl_xor_sync(~0u, largest, offset);
    const int at = __shfl_xor_sync(~0u, index, offset);
    if (at < classes && (index == classes || other > largest || (other == largest && at < index)))
      largest = other, index = at;
  }
  if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = largest, indices[threadIdx.x / 32] = index;
  __syncthreads();
  largest = values[0], index = indices[0];
  for (int w = 1; w < kWarps; w++) {
    if (indices[w] < classes && (values[w] > largest || (values[w] == largest && indices[w] < index)))
      largest = values[w], index = indices[w];
  }
  double sum = 0;
  for (int c = threadIdx.x; c < classes; c += kSumThreads) sum += exp(static_cast<double>(row[c] - largest));
  sum = block_sum(sum, sums);
  if (threadIdx.x == 0) {
    *total = sum;
    const bool known = label >= 0 && label < classes;
    row_losses[blockIdx.x] =
        known ? log(sum) - static_cast<double>(row[label] - largest) : static_cast<double>(NAN);
    row_correct[blockIdx.x] = index == label;
  }
  __syncthreads();
  A* gradient = dlogits + int64_t{blockIdx.x} * classes;
  for (int c = threadIdx.x; c < classes; c += kSumThreads) {
    const double p = exp(static_cast<double>(row[c] - largest)) / *total;
    gradient[c] = static_cast<A>((p - (c == label ? 1.0 : 0.0)) / rows);
  }
}

// grid 1, block kSumThreads.
template <class A>
__global__ void __launch_bounds__(kSumThreads)
    cross_entropy_total(const double* row_losses, const int* row_correct, A* loss, int64_t* correct,
                        int rows) {
  TFNAS_SHARED(double, losses, [kSumThreads / 32]);
  TFNAS_SHARED(double, counts, [kSumThreads / 32]);
  double sum = 0, right = 0;
  for (int i = threadIdx.x; i < rows; i += kSumThreads) sum += row_losses[i], right += row_correct[i];
  sum = block_sum(sum, losses);
  right = block_sum(right, counts);
  if (threadIdx.x == 0) *loss = static_cast<A>(sum / rows), *correct = static_cast<int64_t>(right);
}

template <class A>
void cross_entropy(const A* logits, const int64_t* labels, int rows, int classes, A* dlogits, A* loss,
                   int64_t* correct, double* row_losses, int* row_correct, cudaStream_t stream) {
  TFNAS_LAUNCH((cross_entropy_rows<A>), dim3(rows), dim3(kSumThreads), 0, stream, logits, labels, dlogits,
               row_losses, row_correct, rows, classes);
  TFNAS_LAUNCH((cross_entropy_total<A>), dim3(1), dim3(kSumThreads), 0, stream, row_losses, row_correct, loss,
               correct, rows);
}

}  // namespace tfnas::cuda
