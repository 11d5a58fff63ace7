// Wide to narrow, the forward project: out[p, n] = sum over channels c of f(y2[p, c]) W3[c, n], f being BN2,
// activation and SE gate.
//
// Block: BM pixels x one run of output columns, and a share of the channels. f is applied once, while 32
// channels are staged; W is staged transposed so that both operands run along the sum. A warp owns 16 pixels
// x 8 NT columns. Reads: wide once per column run, W once per block. Writes: out once. Where pixels are few,
// the channels are split over blocks: each writes its own part, and add_parts adds them in a fixed order.
// Column runs are as wide as registers allow (f is recomputed by every run).
#pragma once

#include "mma.cuh"

namespace tfnas::cuda {

// f of the forward project.
template <class T>
struct NormActivateGate {
  const T* wide;
  const Acc<T>*mean2, *rstd2, *gate;  // gate [batch][active], read where the candidate has SE
  int active, map, act;               // map: pixels of an image
  __device__ Acc<T> operator()(const CandidateRows& rows, int v, int64_t pixel, Acc<T> y2) const {
    const Acc<T> a2 = activate(act, (y2 - mean2[v]) * rstd2[v]);
    return rows.se_channels ? a2 * gate[pixel / map * active + v] : a2;
  }
};

template <class T, class F>
struct NarrowProductArgs {
  F f;
  const Acc<T>* weights;  // [rows, columns]
  Acc<T>* parts;    // [slots][splits][pixels][columns], or null: `out` is written at once (splits must be 1)
  T* out;           // [slots][pixels][columns]
  Acc<T>* partial;  // [slots][pixel blocks][2][columns]: sums and sums of squares of out, or null
  const LayerTable* table;
  const int* choice;
  int64_t pixels;
  int columns, splits;
};

template <class T, Math M, int WARPS_M, int WARPS_N, int NT>
struct NarrowProductTile {
  using Word = typename Operand<T, M>::Word;
  static constexpr int kPixels = 16 * WARPS_M, kColumns = 8 * NT * WARPS_N, kThreads = 32 * WARPS_M * WARPS_N;
  static constexpr int kPitch = row_pitch<T, M>(kChunk);
  static constexpr int kWeightsAt = kPixels * kPitch, kSumsAt = kWeightsAt + kColumns * kPitch;
  static constexpr size_t kSharedBytes = sizeof(Word) * (kSumsAt + 2 * WARPS_M * kColumns);
};

// grid (pixel blocks, column runs * splits, slots), block kThreads. A slot is an active candidate.
template <class T, Math M, int WARPS_M, int WARPS_N, int NT, class F>
__global__ void __launch_bounds__(32 * WARPS_M * WARPS_N) narrow_product(NarrowProductArgs<T, F> a) {
  using Tile = NarrowProductTile<T, M, WARPS_M, WARPS_N, NT>;
  using Word = typename Tile::Word;
  constexpr int kPerWord = Operand<T, M>::kPerWord;
  TFNAS_DYN_SHARED(Word, shared);
  Word *zs = shared, *ws = shared + Tile::kWeightsAt;
  Acc<T>* sums = reinterpret_cast<Acc<T>*>(shared + Tile::kSumsAt);
  CandidateRows rows{};
  int active_at;
  if (!find_active(*a.table, chosen(a.choice), blockIdx.z, rows, active_at)) return;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, wm = warp / WARPS_N, wn = warp % WARPS_N;
  const int split = blockIdx.y % a.splits, n0 = blockIdx.y / a.splits * Tile::kColumns;
  const int chunks = ceil_div(rows.width, kChunk), share = ceil_div(chunks, a.splits);
  const int q1 = (split + 1) * share < chunks ? (split + 1) * share : chunks;
  const int64_t p0 = int64_t{blockIdx.x} * Tile::kPixels;
  const int pitch = pitch_of(rows.width);
  const T* wide = a.f.wide + a.pixels * active_at;

  Acc<T> sum[1][NT][4] = {};
  for (int q = split * share; q < q1; q++) {
    for (int i = tid; i < Tile::kPixels * (kChunk / 4); i += Tile::kThreads) {
      const int m = i / (kChunk / 4), c = q * kChunk + i % (kChunk / 4) * 4;
      const int valid = p0 + m < a.pixels ? rows.width - c : 0;
      Four<T> four = load4(valid > 0 ? wide + (p0 + m) * pitch + c : wide, valid, valid >= 4);
#pragma unroll
      for (int e = 0; e < 4; e++)
        four.v[e] = e < valid ? a.f(rows, active_at + c + e, p0 + m, four.v[e]) : Acc<T>(0);
      put4<T, M>(zs + m * Tile::kPitch, c - q * kChunk, four.v);
    }
#pragma unroll 2
    for (int i = tid; i < Tile::kColumns * (kChunk / kPerWord); i += Tile::kThreads) {
      const int n = i % Tile::kColumns, k = i / Tile::kColumns * kPerWord, c = q * kChunk + k;
      Acc<T> w[kPerWord];
#pragma unroll
      for (int e = 0; e < kPerWord; e++) {
        const bool inside = c + e < rows.width && n0 + n < a.columns;
        w[e] = inside ? a.weights[int64_t{rows.first_row + c + e} * a.columns + n0 + n] : Acc<T>(0);
      }
      put_word<T, M>(ws + n * Tile::kPitch + k / kPerWord, w);
    }
    __syncthreads();
    warp_product<T, M, 1, NT>(sum, zs + wm * 16 * Tile::kPitch, Tile::kPitch, ws + wn * NT * 8 * Tile::kPitch,
                              Tile::kPitch, row_words<T, M>(kChunk));
    __syncthreads();
  }

  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < NT; j++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int column = wn * NT * 8 + 8 * j + 2 * t + e, n = n0 + column;
      Acc<T> s = 0, squares = 0;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int64_t p = p0 + wm * 16 + g + 8 * half;
        if (p >= a.pixels || n >= a.columns) continue;
        Acc<T> v = sum[0][j][2 * half + e];
        if (a.parts) {
          a.parts[((int64_t{blockIdx.z} * a.splits + split) * a.pixels + p) * a.columns + n] = v;
        } else {
          v = store(a.out + (int64_t{blockIdx.z} * a.pixels + p) * a.columns + n, v);
          s += v, squares += v * v;
        }
      }
      for (int offset = 4; offset < 32; offset *= 2) {  // over the pixels of the warp
        s += __shfl_xor_sync(~0u, s, offset);
        squares += __shfl_xor_sync(~0u, squares, offset);
      }
      if (g == 0) {
        sums[(2 * wm) * Tile::kColumns + column] = s;
        sums[(2 * wm + 1) * Tile::kColumns + column] = squares;
      }
    }
  }
  if (a.parts || !a.partial) return;
  __syncthreads();
  for (int i = tid; i < 2 * Tile::kColumns; i += Tile::kThreads) {
    const int which = i / Tile::kColumns, n = n0 + i % Tile::kColumns;
    if (n >= a.columns) continue;
    Acc<T> total = 0;
    for (int w = 0; w < WARPS_M; w++) total += sums[(2 * w + which) * Tile::kColumns + i % Tile::kColumns];
    a.partial[((int64_t{blockIdx.z} * gridDim.x + blockIdx.x) * 2 + which) * a.columns + n] = total;
  }
}

// out[slot] = sum of its parts, with sums for a batch norm as above if `partial`.
// Block: 32 columns x `run` pixels; thread: one column, every 8th pixel. grid (pixel runs, ceil(columns /
// 32), slots).
template <class T>
__global__ void __launch_bounds__(256) add_parts(const Acc<T>* parts, T* out, Acc<T>* partial, int64_t pixels,
                                                 int columns, int splits, int64_t run) {
  TFNAS_SHARED(Acc<T>, sums, [8][2][32]);
  const int n = blockIdx.y * 32 + threadIdx.x;
  const int64_t begin = blockIdx.x * run, end = begin + run < pixels ? begin + run : pixels;
  Acc<T> s = 0, squares = 0;
  if (n < columns) {
    for (int64_t p = begin + threadIdx.y; p < end; p += 8) {
      Acc<T> v = 0;
      for (int i = 0; i < splits; i++)
        v += parts[((int64_t{blockIdx.z} * splits + i) * pixels + p) * columns + n];
      v = store(out + (int64_t{blockIdx.z} * pixels + p) * columns + n, v);
      s += v, squares += v * v;
    }
  }
  sums[threadIdx.y][0][threadIdx.x] = s;
  sums[threadIdx.y][1][threadIdx.x] = squares;
  __syncthreads();
  if (threadIdx.y >= 2 || n >= columns || !partial) return;
  Acc<T> total = 0;
  for (int i = 0; i < 8; i++) total += sums[i][threadIdx.y][threadIdx.x];
  partial[((int64_t{blockIdx.z} * gridDim.x + blockIdx.x) * 2 + threadIdx.y) * columns + n] = total;
}

}  // namespace tfnas::cuda
