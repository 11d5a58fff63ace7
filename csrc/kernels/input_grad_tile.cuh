// The expand's share of dx for one spatial tile, in shared memory: dx[m, n] = sum over channels c of
// (r1 dh1)[m, c] W1[c, n]. depthwise_backward adds to it chunk after chunk, where dh1 is made, so that dh1 is
// not written and read again for it.
//
// A warp owns 16 pixels and all columns at a time, a lane the same elements throughout: no barrier is needed.
// The gradients of a chunk stay in registers while the columns pass; W1 is read across.
#pragma once

#include "expand_dw.cuh"

namespace tfnas::cuda {

// Distance of pixels in words: whole tiles of 8 columns, an odd number, so that rows fall into different
// banks.
__host__ __device__ constexpr int input_grad_pitch(int channels) { return ((channels + 7) / 8 | 1) * 8; }

template <class T, Math M, int WARPS>
class InputGradTile {
 public:
  using A = Acc<T>;
  using Word = typename Operand<T, M>::Word;

  __device__ InputGradTile(A* sums, int rows, int channels)
      : sums_(sums), rows_(rows), channels_(channels), pitch_(input_grad_pitch(channels)) {}

  __device__ void clear() const {
    for_each_tile([&](int m0, int n0) {
#pragma unroll
      for (int e = 0; e < 4; e++) *at(m0, n0, e) = 0;
    });
  }

  // `grads` [rows][kWidePitch]: of one chunk, already times r1; `weights` [kChunk] rows of W1 as put4 left
  // them.
  __device__ void add(const A* grads, const Word* weights, int weight_pitch) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const auto weight = [&](int k, int n) {
      if constexpr (M == Math::kBf16) {
        const unsigned pair = weights[k * weight_pitch + n / 2];
        return __uint_as_float(n % 2 ? pair & 0xffff0000u : pair << 16);
      } else {
        return word_value(weights[k * weight_pitch + n]);
      }
    };
    for (int m0 = threadIdx.x / 32 * 16; m0 < rows_; m0 += WARPS * 16) {
      const A* mine = grads + (m0 + g) * kWidePitch;
      if constexpr (M == Math::kFma) {
        for (int n0 = 0; n0 < channels_; n0 += 8) {
          A sum[4] = {};
          for (int k = 0; k < kChunk; k++) {
#pragma unroll
            for (int e = 0; e < 4; e++)
              sum[e] += mine[e / 2 * 8 * kWidePitch + k] * weight(k, n0 + 2 * t + e % 2);
          }
#pragma unroll
          for (int e = 0; e < 4; e++) *at(m0, n0, e) += sum[e];
        }
      } else {
        Fragment<kAcross<M>, 4> a[kChunk / 8];
#pragma unroll
        for (int s = 0; s < kChunk / 8; s++) {
#pragma unroll
          for (int e = 0; e < 4; e++)
            a[s].set(e, across_word<M>(mine[e % 2 * 8 * kWidePitch + 8 * s + t + e / 2 * 4]));
        }
#pragma unroll 1
        for (int n0 = 0; n0 < channels_; n0 += 8) {
          float sum[4];
#pragma unroll
          for (int e = 0; e < 4; e++) sum[e] = *at(m0, n0, e);
#pragma unroll
          for (int s = 0; s < kChunk / 8; s++) {
            Fragment<kAcross<M>, 2> b;
#pragma unroll
            for (int e = 0; e < 2; e++) b.set(e, across_word<M>(weight(8 * s + t + e * 4, n0 + g)));
            multiply<kAcross<M>>(sum, a[s], b);
          }
#pragma unroll
          for (int e = 0; e < 4; e++) *at(m0, n0, e) = sum[e];
        }
      }
    }
  }

  // out [pixels][channels]; pixel_of(m): the pixel of row m, or -1.
  template <class PixelOf>
  __device__ void write(A* out, PixelOf pixel_of) const {
    for_each_tile([&](int m0, int n0) {
      const int lane = threadIdx.x % 32;
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int64_t p = pixel_of(m0 + lane / 4 + e / 2 * 8);
        const int n = n0 + lane % 4 * 2 + e % 2;
        if (p >= 0 && n < channels_) out[p * channels_ + n] = *at(m0, n0, e);
      }
    });
  }

 private:
  template <class F>
  __device__ void for_each_tile(F f) const {
    for (int m0 = threadIdx.x / 32 * 16; m0 < rows_; m0 += WARPS * 16) {
      for (int n0 = 0; n0 < channels_; n0 += 8) f(m0, n0);
    }
  }
  // Element e of this lane in the tile of 16 x 8 at (m0, n0), as in mma.cuh.
  __device__ A* at(int m0, int n0, int e) const {
    const int lane = threadIdx.x % 32;
    return sums_ + (m0 + lane / 4 + e / 2 * 8) * pitch_ + n0 + lane % 4 * 2 + e % 2;
  }

  A* sums_;
  int rows_, channels_, pitch_;
};

}  // namespace tfnas::cuda
