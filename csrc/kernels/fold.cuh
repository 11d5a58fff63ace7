// Folds batch norm 1 into the expand convolution:  r1 = 1 / sqrt(w C w^T + eps),  shift = -r1 (w . mu), so
// that h1 = r1 (W x) + shift, before the wide tensor exists. For the chosen candidate or for all of them.
//
// A block owns 32 rows of W (one chunk), a warp four of them; a lane owns columns lane, lane + 32, ... of t =
// w C and adds t_j w_j over them. C streams through shared memory 16 rows at a time and is read once per
// block: 32 rows share it, which keeps its traffic (rows / 32 x channels^2) below that of one narrow pass.
#pragma once

#include "moments.cuh"

namespace tfnas::cuda {

constexpr int kFoldThreads = 256;
constexpr int kFoldRows = 4;      // of a warp
constexpr int kFoldSlice = 16;    // rows of C staged at once
constexpr int kFoldColumns = 10;  // of a lane: up to 320 input channels

// Shared memory: the chunk's rows of W, then a slice of C.
__host__ __device__ inline size_t fold_shared_elements(int channels) {
  return static_cast<size_t>(kChunk + kFoldSlice) * channels;
}

// t = w C for the rows of one chunk, four rows to a warp; leaves the rows themselves at the start of
// `shared`.
template <class A>
__device__ inline void rows_times_covariance(const A* expand, const A* covariance, const Chunk& chunk,
                                             int channels, A* shared, A (&t)[kFoldRows][kFoldColumns]) {
  A *weights = shared, *slice = shared + kChunk * channels;
  const A* rows = expand + int64_t{chunk.rows.first_row + chunk.first} * channels;
  for (int i = threadIdx.x; i < kChunk * channels; i += kFoldThreads) {
    weights[i] = chunk.has(i / channels) ? rows[i] : A(0);
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const A* mine = weights + warp * kFoldRows * channels;
  for (int k0 = 0; k0 < channels; k0 += kFoldSlice) {
    const int depth = channels - k0 < kFoldSlice ? channels - k0 : kFoldSlice;
    __syncthreads();
    for (int i = threadIdx.x; i < depth * channels; i += kFoldThreads)
      slice[i] = covariance[int64_t{k0} * channels + i];
    __syncthreads();
    for (int k = 0; k < depth; k++) {
#pragma unroll
      for (int c = 0; c < kFoldColumns; c++) {
        if (lane + 32 * c >= channels) break;
        const A value = slice[k * channels + lane + 32 * c];
#pragma unroll
        for (int r = 0; r < kFoldRows; r++) t[r][c] += mine[r * channels + k0 + k] * value;
      }
    }
  }
}

// expand [rows, channels]; rstd, shift: per-channel vectors. grid: chunks of the widest choice.
template <class A>
__global__ void __launch_bounds__(kFoldThreads)
    fold(const A* expand, const A* mean, const A* covariance, A* rstd, A* shift, const LayerTable* table,
         const int* choice, int channels, double eps) {
  TFNAS_DYN_SHARED(A, shared);
  Chunk chunk{};
  if (!find_chunk(*table, chosen(choice), blockIdx.x, chunk)) return;
  A t[kFoldRows][kFoldColumns] = {};
  rows_times_covariance(expand, covariance, chunk, channels, shared, t);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const A* mine = shared + warp * kFoldRows * channels;
#pragma unroll
  for (int r = 0; r < kFoldRows; r++) {
    A variance = 0, projected = 0;
#pragma unroll
    for (int c = 0; c < kFoldColumns; c++) {
      const int j = lane + 32 * c;
      if (j >= channels) break;
      variance += t[r][c] * mine[r * channels + j];
      projected += mean[j] * mine[r * channels + j];
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      variance += __shfl_xor_sync(~0u, variance, offset);
      projected += __shfl_xor_sync(~0u, projected, offset);
    }
    const int channel = warp * kFoldRows + r;
    if (lane == 0 && chunk.has(channel)) {
      const A scale = static_cast<A>(1.0 / sqrt((variance > 0 ? static_cast<double>(variance) : 0.0) + eps));
      rstd[chunk.vector_at + channel] = scale;
      shift[chunk.vector_at + channel] = -scale * projected;
    }
  }
}

}  // namespace tfnas::cuda
