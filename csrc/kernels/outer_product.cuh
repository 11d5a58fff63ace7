// Weight gradients of the two 1x1 convolutions: parts[c, n] = sum over pixels of f(wide[p, c]) narrow[p, n].
//   project: f = BN2, activation, gate (that is z), narrow = dy3   ->  dW3
//   expand:  f = identity on dh1,                  narrow = x      ->  G = dh1^T x, from which dW1 follows
//
// Block: one chunk of 32 channels x a run of columns, over a run of pixels, 32 at a time; each of 4 warps
// owns 16 channels x half of the columns and reads both operands across, since the sum runs over pixels. Sums
// over pixel runs are added by finish_parts in a fixed order. Reads: wide once per column run, narrow once
// per chunk.
#pragma once

#include "narrow_product.cuh"

namespace tfnas::cuda {

constexpr int kOuterPixels = 32, kOuterColumns = 64, kOuterThreads = 128;

// f of the expand.
template <class T>
struct AsIs {
  const T* wide;
  __device__ Acc<T> operator()(const CandidateRows&, int, int64_t, Acc<T> value) const { return value; }
};

template <class T, class F>
struct OuterProductArgs {
  F f;
  const T* narrow;  // [slots or 1][pixels][columns]
  bool by_slot;     // each active candidate has a narrow tensor of its own
  Acc<T>* parts;    // [pixel runs][active][columns]
  const LayerTable* table;
  const int* choice;
  int64_t pixels, run;
  int columns, active;
};

// grid (pixel runs, column runs, chunks), block kOuterThreads. M is kFma, kTf32 or kTf32x3 (bf16 is exact in
// tf32).
template <class T, Math M, class F>
__global__ void __launch_bounds__(kOuterThreads, 1) outer_product(OuterProductArgs<T, F> a) {
  TFNAS_SHARED(Acc<T>, zs, [kOuterPixels][kChunk + 8]);
  TFNAS_SHARED(Acc<T>, ns, [kOuterPixels][kOuterColumns + 8]);
  Chunk chunk{};
  if (!find_chunk(*a.table, chosen(a.choice), blockIdx.z, chunk)) return;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int n0 = blockIdx.y * kOuterColumns, c0 = warp % 2 * 16, half = warp / 2 * (kOuterColumns / 2);
  const int pitch = pitch_of(chunk.rows.width), slot = a.by_slot && !a.choice ? chunk.candidate : 0;
  const int64_t begin = blockIdx.x * a.run, end = begin + a.run < a.pixels ? begin + a.run : a.pixels;
  const T* wide = a.f.wide + a.pixels * chunk.active_at + chunk.first;
  const T* narrow = a.narrow + slot * a.pixels * a.columns;
  Acc<T> sum[1][kOuterColumns / 16][4] = {};
  for (int64_t p0 = begin; p0 < end; p0 += kOuterPixels) {
    for (int i = tid; i < kOuterPixels * kChunk; i += kOuterThreads) {
      const int m = i / kChunk, c = i % kChunk;
      const bool inside = p0 + m < end && chunk.has(c);
      zs[m][c] = inside ? a.f(chunk.rows, chunk.vector_at + c, p0 + m, load(wide + (p0 + m) * pitch + c))
                        : Acc<T>(0);
    }
    for (int i = tid; i < kOuterPixels * kOuterColumns; i += kOuterThreads) {
      const int m = i / kOuterColumns, n = i % kOuterColumns;
      const bool inside = p0 + m < end && n0 + n < a.columns;
      ns[m][n] = inside ? load(narrow + (p0 + m) * a.columns + n0 + n) : Acc<T>(0);
    }
    __syncthreads();
    auto channel = [&](int c, int p) { return zs[p][c0 + c]; };
    auto column = [&](int n, int p) { return ns[p][half + n]; };
    warp_product_across<Acc<T>, M, 1, kOuterColumns / 16>(sum, channel, column, kOuterPixels);
    __syncthreads();
  }
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < kOuterColumns / 16; j++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int c = c0 + g + e / 2 * 8, n = n0 + half + 8 * j + 2 * t + e % 2;
      if (!chunk.has(c) || n >= a.columns) continue;
      a.parts[(int64_t{blockIdx.x} * a.active + chunk.vector_at + c) * a.columns + n] = sum[0][j][e];
    }
  }
}

// The sum of `runs` parts of `count` values, in double and in a fixed order. grid, block: any.
template <class A>
__global__ void finish_parts(const A* parts, A* out, int runs, int64_t count) {
  for (int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; at < count;
       at += int64_t{gridDim.x} * blockDim.x) {
    double sum = 0;
    for (int r = 0; r < runs; r++) sum += parts[r * count + at];
    out[at] = static_cast<A>(sum);
  }
}

}  // namespace tfnas::cuda
