// Moments of a narrow tensor x [pixels, channels]: mean and centred Gram matrix (covariance), from which the
// batch norm after a 1x1 convolution follows without ever forming its output:  mean(y) = W mu,  var(y)_c =
// w_c C w_c^T.
//
// channel_sums   thread: one channel of a run of pixels, in a block of 32 channels x 8 rows. Reads x once.
// finish_mean    thread: one channel. Adds the blocks' sums in a fixed order, in double.
// gram           block: one tile x tile part of C on or above the diagonal, over a run of pixels. A thread
// owns 4 x 4
//                elements; where the tile is small, several groups of threads ("streams") take pixels in turn
//                and are added in shared memory. Reads x once per tile column and row. x is centred while it
//                is staged, so that no cancellation is left to the end. 64 pixels at a time: 2 x 64 x 64
//                floats are 32 KiB, which leaves room for several blocks on every card.
// finish_gram    thread: one element of C. Adds the runs in a fixed order, in double, and writes both
// triangles.
#pragma once

#include "numbers.cuh"

namespace tfnas::cuda {

constexpr int kGramPixels = 64;  // staged at once
constexpr int kGramThreads = 256;

// sums [gridDim.x, channels]. grid (pixel runs, ceil(channels / 32)), block (32, 8).
template <class T, class A>
__global__ void __launch_bounds__(256)
    channel_sums(const T* x, A* sums, int64_t pixels, int channels, int64_t run) {
  TFNAS_SHARED(A, part, [8][32]);
  const int channel = blockIdx.y * 32 + threadIdx.x;
  const int64_t begin = blockIdx.x * run, end = begin + run < pixels ? begin + run : pixels;
  A sum = 0;
  if (channel < channels) {
    for (int64_t p = begin + threadIdx.y; p < end; p += 8) sum += load(x + p * channels + channel);
  }
  part[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && channel < channels) {
    for (int i = 1; i < 8; i++) sum += part[i][threadIdx.x];
    sums[int64_t{blockIdx.x} * channels + channel] = sum;
  }
}

template <class A>
__global__ void finish_mean(const A* sums, A* mean, int runs, int channels, int64_t pixels) {
  const int channel = blockIdx.x * blockDim.x + threadIdx.x;
  if (channel >= channels) return;
  double sum = 0;
  for (int i = 0; i < runs; i++) sum += sums[int64_t{i} * channels + channel];
  mean[channel] = static_cast<A>(sum / static_cast<double>(pixels));
}

// How `channels` are cut into square tiles of at most 64, a multiple of 4.
struct GramTiling {
  int tile, count;  // channels of a tile, tiles along one side
  __host__ __device__ explicit GramTiling(int channels) {
    count = ceil_div(channels, 64);
    tile = ceil_div(ceil_div(channels, count), 4) * 4;
  }
  __host__ __device__ int pairs() const { return count * (count + 1) / 2; }
  __host__ __device__ int threads_per_stream() const { return (tile / 4) * (tile / 4); }
  __host__ __device__ int streams() const { return kGramThreads / threads_per_stream(); }
  template <class A>
  __host__ __device__ size_t shared_bytes() const {
    const int staged = 2 * kGramPixels * tile, reduced = streams() * tile * tile;
    return sizeof(A) * (staged > reduced ? staged : reduced);
  }
};

// What the Gram matrix of moments multiplies: x less its mean.
template <class T>
struct Centred {
  const T* x;
  const Acc<T>* mean;
  int channels;
  __device__ Acc<T> left(int64_t pixel, int c) const { return load(x + pixel * channels + c) - mean[c]; }
  __device__ Acc<T> right(int64_t pixel, int c) const { return left(pixel, c); }
};

// parts [gridDim.x, pairs, tile, tile] of sum over items p of left(p, r) right(p, c), which must be symmetric
// in r and c. grid (runs of items, pairs), block kGramThreads.
template <class A, class Factors>
__global__ void __launch_bounds__(kGramThreads)
    gram(Factors factors, A* parts, int64_t items, int channels, int64_t run) {
  TFNAS_DYN_SHARED(A, shared);
  const GramTiling tiling(channels);
  const int tile = tiling.tile, side = tile / 4, per_stream = side * side, streams = tiling.streams();
  int row_tile = 0, pair = blockIdx.y;
  while (pair >= tiling.count - row_tile) pair -= tiling.count - row_tile++;
  const int row0 = row_tile * tile, col0 = (row_tile + pair) * tile;
  const int stream = threadIdx.x / per_stream, at = threadIdx.x % per_stream, i0 = at / side * 4,
            j0 = at % side * 4;
  A *rows = shared, *cols = shared + kGramPixels * tile;
  const int64_t begin = blockIdx.x * run, end = begin + run < items ? begin + run : items;
  A sum[4][4] = {};
  for (int64_t p0 = begin; p0 < end; p0 += kGramPixels) {
    for (int i = threadIdx.x; i < kGramPixels * tile; i += kGramThreads) {
      const int64_t p = p0 + i / tile;
      const int r = row0 + i % tile, c = col0 + i % tile;
      rows[i] = p < end && r < channels ? factors.left(p, r) : A(0);
      cols[i] = p < end && c < channels ? factors.right(p, c) : A(0);
    }
    __syncthreads();
    if (stream < streams) {
      for (int p = stream; p < kGramPixels; p += streams) {
        const A *a = rows + p * tile + i0, *b = cols + p * tile + j0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
          for (int j = 0; j < 4; j++) sum[i][j] += a[i] * b[j];
        }
      }
    }
    __syncthreads();
  }
  if (stream < streams) {
    for (int i = 0; i < 4; i++) {
      for (int j = 0; j < 4; j++) shared[(stream * tile + i0 + i) * tile + j0 + j] = sum[i][j];
    }
  }
  __syncthreads();
  A* out = parts + (int64_t{blockIdx.x} * gridDim.y + blockIdx.y) * tile * tile;
  for (int i = threadIdx.x; i < tile * tile; i += kGramThreads) {
    A total = 0;
    for (int s = 0; s < streams; s++) total += shared[s * tile * tile + i];
    out[i] = total;
  }
}

// matrix [channels, channels] = sum / count. grid (ceil(tile * tile / 256), pairs), block 256.
template <class A>
__global__ void __launch_bounds__(256)
    finish_gram(const A* parts, A* matrix, int runs, int channels, int64_t count) {
  const GramTiling tiling(channels);
  const int tile = tiling.tile, i = blockIdx.x * 256 + threadIdx.x;
  if (i >= tile * tile) return;
  int row_tile = 0, pair = blockIdx.y;
  while (pair >= tiling.count - row_tile) pair -= tiling.count - row_tile++;
  const int r = row_tile * tile + i / tile, c = (row_tile + pair) * tile + i % tile;
  if (r >= channels || c >= channels) return;
  double sum = 0;
  for (int k = 0; k < runs; k++) sum += parts[(int64_t{k} * gridDim.y + blockIdx.y) * tile * tile + i];
  const A value = static_cast<A>(sum / static_cast<double>(count));
  matrix[int64_t{r} * channels + c] = value;
  if (pair > 0)
    matrix[int64_t{c} * channels + r] = value;  // a tile on the diagonal holds both triangles itself
}

}  // namespace tfnas::cuda
