// End of a layer, forward: out = sum over slots of u_i BN3(y3_i), plus x where the block has a residual.
// Thread: elements of the narrow output in turn; every y3 is read once, out written once. All of it is
// bandwidth.
#pragma once

#include "numbers.cuh"

namespace tfnas::cuda {

// y3 [slots][pixels][channels]; mean, rstd [slots][channels]; u: weights of the mixture, or null (one slot,
// weight 1); x: the residual, or null. With u the residual counts sum of u times. grid: any, block: any.
template <class T>
__global__ void finish(const T* y3, const Acc<T>* mean, const Acc<T>* rstd, const Acc<T>* u, const T* x,
                       T* out, int slots, int64_t pixels, int channels) {
  const int64_t count = pixels * channels;
  Acc<T> total = 1;
  if (u) {
    total = 0;
    for (int i = 0; i < slots; i++) total += u[i];
  }
  for (int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; at < count;
       at += int64_t{gridDim.x} * blockDim.x) {
    const int c = static_cast<int>(at % channels);
    Acc<T> sum = x ? total * load(x + at) : Acc<T>(0);
    for (int i = 0; i < slots; i++) {
      const Acc<T> h3 = (load(y3 + i * count + at) - mean[i * channels + c]) * rstd[i * channels + c];
      sum += u ? u[i] * h3 : h3;
    }
    store(out + at, sum);
  }
}

}  // namespace tfnas::cuda
