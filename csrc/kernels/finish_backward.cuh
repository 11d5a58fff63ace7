// Backward of a layer's end, all in narrow space. With h3 = BN3(y3):
//   mean(dout) and mean(dout h3_i) per channel -> du_i = <dout, h3_i> (+ <dout, x> with a residual)
//   dy3_i = u_i r3_i (dout - mean(dout) - h3_i mean(dout h3_i))
//
// output_sums  block: 32 channels x a run of pixels of one slot; thread: one channel, every 8th pixel.
// output_means thread: one (slot, channel); adds the runs in a fixed order, in double.
// mixture_grad one block; a warp adds one slot's channels.
// project_grad thread: elements of dy3 in turn. Formed once here: forming it on load in the wide product
// would repeat
//              some twenty instructions a narrow element for every 32 channels.
#pragma once

#include "numbers.cuh"

namespace tfnas::cuda {

// partial [slots][runs][2][channels]: sums of dout and of dout h3; [slots] more rows of <dout, x> follow if x
// is given: residual [runs][channels]. grid (runs, ceil(channels / 32), slots), block (32, 8).
template <class T>
__global__ void __launch_bounds__(256)
    output_sums(const T* dout, const T* y3, const Acc<T>* mean3, const Acc<T>* rstd3, const T* x,
                Acc<T>* partial, Acc<T>* residual, int64_t pixels, int channels, int64_t run) {
  TFNAS_SHARED(Acc<T>, sums, [8][3][32]);
  const int c = blockIdx.y * 32 + threadIdx.x, slot = blockIdx.z;
  const int64_t begin = blockIdx.x * run, end = begin + run < pixels ? begin + run : pixels;
  Acc<T> s[3] = {};
  if (c < channels) {
    const Acc<T> mean = mean3[slot * channels + c], rstd = rstd3[slot * channels + c];
    for (int64_t p = begin + threadIdx.y; p < end; p += 8) {
      const Acc<T> d = load(dout + p * channels + c);
      s[0] += d;
      s[1] += d * (load(y3 + (slot * pixels + p) * channels + c) - mean) * rstd;
      if (x && slot == 0) s[2] += d * load(x + p * channels + c);
    }
  }
  for (int i = 0; i < 3; i++) sums[threadIdx.y][i][threadIdx.x] = s[i];
  __syncthreads();
  if (threadIdx.y >= 3 || c >= channels || (threadIdx.y == 2 && (!x || slot != 0))) return;
  Acc<T> total = 0;
  for (int i = 0; i < 8; i++) total += sums[i][threadIdx.y][threadIdx.x];
  if (threadIdx.y == 2) {
    residual[int64_t{blockIdx.x} * channels + c] = total;
  } else {
    partial[((int64_t{slot} * gridDim.x + blockIdx.x) * 2 + threadIdx.y) * channels + c] = total;
  }
}

// means [slots][2][channels]; residual_sum [channels]. grid (ceil(channels / 128), slots), block 128.
template <class A>
__global__ void output_means(const A* partial, const A* residual, A* means, A* residual_sum, int runs,
                             int channels, int64_t pixels) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x, slot = blockIdx.y;
  if (c >= channels) return;
  for (int which = 0; which < 2; which++) {
    double sum = 0;
    for (int r = 0; r < runs; r++) sum += partial[((int64_t{slot} * runs + r) * 2 + which) * channels + c];
    means[(slot * 2 + which) * channels + c] = static_cast<A>(sum / static_cast<double>(pixels));
  }
  if (residual && slot == 0) {
    double sum = 0;
    for (int r = 0; r < runs; r++) sum += residual[int64_t{r} * channels + c];
    residual_sum[c] = static_cast<A>(sum);
  }
}

// du [slots]. grid 1, block 32 * slots (a warp each).
template <class A>
__global__ void mixture_grad(const A* means, const A* residual_sum, A* du, int channels, int64_t pixels) {
  const int slot = threadIdx.x / 32, lane = threadIdx.x % 32;
  double sum = 0;
  for (int c = lane; c < channels; c += 32) {
    sum += static_cast<double>(pixels) * means[(slot * 2 + 1) * channels + c];
    if (residual_sum) sum += residual_sum[c];
  }
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (lane == 0) du[slot] = static_cast<A>(sum);
}

// dy3 [slots][pixels][channels]. u: weights of the mixture or null. grid (any, slots), block: any.
template <class T>
__global__ void project_grad(const T* dout, const T* y3, const Acc<T>* mean3, const Acc<T>* rstd3,
                             const Acc<T>* means, const Acc<T>* u, T* dy3, int64_t pixels, int channels) {
  const int slot = blockIdx.y;
  const int64_t count = pixels * channels;
  const Acc<T> weight = u ? u[slot] : Acc<T>(1);
  for (int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; at < count;
       at += int64_t{gridDim.x} * blockDim.x) {
    const int c = static_cast<int>(at % channels), v = slot * channels + c;
    const Acc<T> h3 = (load(y3 + slot * count + at) - mean3[v]) * rstd3[v];
    const Acc<T> centred =
        load(dout + at) - means[slot * 2 * channels + c] - h3 * means[(slot * 2 + 1) * channels + c];
    store(dy3 + slot * count + at, weight * rstd3[v] * centred);
  }
}

}  // namespace tfnas::cuda
