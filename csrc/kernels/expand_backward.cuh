// Backward of the expand convolution and BN1. Their correction acts in narrow space (see docs/kernels.md):
//   dx  = W1'^T dh1 - W1'^T m1 - Q (x - mu),   W1' = r1 W1,  Q = W1'^T diag(m2) W1'     (channels x channels)
//   dW1 = r1 (G - M m1 mu^T - M diag(m2) W1' C),   G = dh1^T x
// with m1 = mean(dh1), m2 = mean(dh1 h1). W1'^T dh1 comes from depthwise_backward in parts, G is
// outer_product, Q is `gram` over the rows of W1; what is left is here, and reads nothing wide.
//
// input_shift        block: 32 input channels; thread: one channel, every 8th active row.
// input_grad         block: 32 pixels; x - mu staged once; a warp owns four pixels, a lane every 32nd
// channel. expand_weight_grad as fold: a block owns 32 rows, a warp four of them.
#pragma once

#include "fold.cuh"

namespace tfnas::cuda {

// The row of the packed weights behind element v of per-channel vectors, or -1 (padding).
__device__ inline int row_of_active(const LayerTable& layer, int choice, int v) {
  for (int i = 0; i < layer.count; i++) {
    if (choice >= 0 && i != choice) continue;
    const CandidateRows rows = layer.candidate[i];
    if (v < pitch_of(rows.width)) return v < rows.width ? rows.first_row + v : -1;
    v -= pitch_of(rows.width);
  }
  return -1;
}

// The factors of Q, for `gram` over items v = 0 .. active - 1.
template <class A>
struct CorrectionFactors {
  const A *expand, *rstd1, *means;  // means [2][active]: m1, m2
  const LayerTable* table;
  const int* choice;
  int channels, active;
  __device__ A left(int64_t v, int c) const {
    const int row = row_of_active(*table, chosen(choice), static_cast<int>(v));
    return row < 0 ? A(0) : rstd1[v] * expand[int64_t{row} * channels + c];
  }
  __device__ A right(int64_t v, int c) const {
    const int row = row_of_active(*table, chosen(choice), static_cast<int>(v));
    return row < 0 ? A(0) : means[active + v] * rstd1[v] * expand[int64_t{row} * channels + c];
  }
};

// shift [channels] = W1'^T m1. grid ceil(channels / 32), block (32, 8).
template <class A>
__global__ void __launch_bounds__(256) input_shift(CorrectionFactors<A> f, A* shift) {
  TFNAS_SHARED(A, part, [8][32]);
  const int c = blockIdx.x * 32 + threadIdx.x;
  A sum = 0;
  if (c < f.channels) {
    for (int v = threadIdx.y; v < f.active; v += 8) {
      const int row = row_of_active(*f.table, chosen(f.choice), v);
      if (row >= 0) sum += f.means[v] * f.rstd1[v] * f.expand[int64_t{row} * f.channels + c];
    }
  }
  part[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || c >= f.channels) return;
  for (int i = 1; i < 8; i++) sum += part[i][threadIdx.x];
  shift[c] = sum;
}

constexpr int kInputGradPixels = 32;

// dx = sum of parts - shift - Q (x - mu) + residual * dout. parts [part_count][pixels][channels];
// `residual` points to the factor of dout (sum of the mixture's weights, or 1), or is null. grid ceil(pixels
// / 32), block 256, shared memory 32 * channels.
template <class T>
__global__ void __launch_bounds__(256, 1)
    input_grad(const Acc<T>* parts, const Acc<T>* shift, const Acc<T>* correction, const T* x,
               const Acc<T>* mean, const T* dout, const Acc<T>* residual, T* dx, int part_count,
               int64_t pixels, int channels) {
  TFNAS_DYN_SHARED(Acc<T>, centred);
  const int64_t p0 = int64_t{blockIdx.x} * kInputGradPixels;
  for (int i = threadIdx.x; i < kInputGradPixels * channels; i += 256) {
    const int64_t p = p0 + i / channels;
    centred[i] = p < pixels ? load(x + p * channels + i % channels) - mean[i % channels] : Acc<T>(0);
  }
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int c = lane; c < channels; c += 32) {
    Acc<T> product[4] = {};
    for (int j = 0; j < channels; j++) {
      const Acc<T> q =
          correction[int64_t{j} * channels + c];  // symmetric: neighbouring lanes read neighbours
#pragma unroll
      for (int i = 0; i < 4; i++) product[i] += q * centred[(warp * 4 + i) * channels + j];
    }
    for (int i = 0; i < 4; i++) {
      const int64_t p = p0 + warp * 4 + i, at = p * channels + c;
      if (p >= pixels) continue;
      Acc<T> sum = -shift[c] - product[i];
      for (int k = 0; k < part_count; k++) sum += parts[k * pixels * channels + at];
      if (residual) sum += *residual * load(dout + at);
      store(dx + at, sum);
    }
  }
}

// weight_grad [active][channels], in place of G. grid: chunks, block and shared memory as fold.
template <class A>
__global__ void __launch_bounds__(kFoldThreads)
    expand_weight_grad(CorrectionFactors<A> f, const A* mean, const A* covariance, A* weight_grad,
                       int64_t pixels) {
  TFNAS_DYN_SHARED(A, shared);
  Chunk chunk{};
  if (!find_chunk(*f.table, chosen(f.choice), blockIdx.x, chunk)) return;
  A t[kFoldRows][kFoldColumns] = {};
  rows_times_covariance(f.expand, covariance, chunk, f.channels, shared, t);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const A count = static_cast<A>(pixels);
#pragma unroll
  for (int r = 0; r < kFoldRows; r++) {
    const int channel = warp * kFoldRows + r, v = chunk.vector_at + channel;
    if (!chunk.has(channel)) continue;
    const A rstd = f.rstd1[v], m1 = f.means[v], m2 = f.means[f.active + v];
#pragma unroll
    for (int c = 0; c < kFoldColumns; c++) {
      const int j = lane + 32 * c;
      if (j >= f.channels) break;
      A* g = weight_grad + int64_t{v} * f.channels + j;
      *g = rstd * (*g - count * (m1 * mean[j] + m2 * rstd * t[r][c]));
    }
  }
}

}  // namespace tfnas::cuda
