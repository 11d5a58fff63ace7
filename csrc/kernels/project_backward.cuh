// Backward of the project, from narrow dy3 to wide: dz = W3^T dy3, and what is formed from dz on the spot.
//
// kGate: the gradient of the SE gates, sum over the map of dz a2 (candidates with SE only; nothing wide is
// written). kWide: dh2 = (dz gate + dpooled / HW) act'(h2), with the sums that BN2's backward needs, S1 = sum
// dh2 and
//        S2 = sum dh2 h2. Computing dz a second time is cheaper than keeping it: the narrow operand is small.
//
// Block: one chunk of 32 channels (its rows of W3 stay in shared memory) and every gridDim.x-th tile of BM =
// 16 WARPS pixels; a warp owns 16 pixels x 32 channels and keeps its sums in registers over all its tiles. In
// kGate a block takes the tiles of one image, so that its sums are that image's. Reads: dy3 once per chunk
// (narrow), y2 once. Writes: dh2 once, two sums per block and channel.
#pragma once

#include "mma.cuh"

namespace tfnas::cuda {

enum class DzMode { kGate, kWide };

template <class T>
struct ProjectBackwardArgs {
  const T* dy3;           // [slots][pixels][columns]
  const Acc<T>* weights;  // W3 [rows][columns]
  const T* y2;            // wide
  const Acc<T>*mean2, *rstd2;
  const Acc<T>*gate,
      *dpooled;     // [batch][active]; dpooled already divided by the pixels of a map. Read with SE only
  T* dh2;           // wide (kWide)
  Acc<T>* partial;  // [gridDim.x][2][active] (kWide), [batch][active] (kGate)
  const LayerTable* table;
  const int* choice;
  int64_t pixels;
  int batch, columns, active, act;
};

template <class T, Math M, int WARPS>
struct ProjectBackwardTile {
  using Word = typename Operand<T, M>::Word;
  static constexpr int kPixels = 16 * WARPS;
  int pitch;
  __host__ __device__ explicit ProjectBackwardTile(int columns) : pitch(row_pitch<T, M>(columns)) {}
  __host__ __device__ int weights_at() const { return kPixels * pitch; }
  __host__ __device__ int sums_at() const { return weights_at() + kChunk * pitch; }
  __host__ __device__ size_t shared_bytes() const {
    return sizeof(Word) * (size_t{kPixels + kChunk} * pitch + WARPS * 2 * kChunk);
  }
};

// grid (tile groups, chunks) for kWide, (batch, chunks) for kGate; block 32 * WARPS.
template <class T, Math M, int WARPS, DzMode MODE>
__global__ void __launch_bounds__(WARPS * 32) project_backward(ProjectBackwardArgs<T> a) {
  using Tile = ProjectBackwardTile<T, M, WARPS>;
  using Word = typename Tile::Word;
  constexpr int kThreads = WARPS * 32, NT = kChunk / 8;
  TFNAS_DYN_SHARED(Word, shared);
  const Tile tile(a.columns);
  Word *ds = shared, *ws = shared + tile.weights_at();
  Acc<T>* sums = reinterpret_cast<Acc<T>*>(shared + tile.sums_at());
  Chunk chunk{};
  if (!find_chunk(*a.table, chosen(a.choice), blockIdx.y, chunk)) return;
  const bool has_se = chunk.rows.se_channels > 0;
  if (MODE == DzMode::kGate && !has_se) return;
  int slot = 0;  // place of the candidate among the active ones
  if (!a.choice) slot = chunk.candidate;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int words = row_words<T, M>(a.columns), groups = words * Operand<T, M>::kPerWord / 4;
  const int pitch = pitch_of(chunk.rows.width);
  const int64_t map = a.pixels / a.batch;
  const bool aligned = rows_aligned(a.dy3, a.columns), aligned_rows = rows_aligned(a.weights, a.columns);

#pragma unroll 1
  for (int i = tid; i < kChunk * groups; i += kThreads) {
    const int r = i / groups, c = i % groups * 4;
    const int64_t row = chunk.rows.first_row + chunk.first + r;
    put4<T, M>(ws + r * tile.pitch, c,
               load4(a.weights + (chunk.has(r) ? row * a.columns + c : 0), chunk.has(r) ? a.columns - c : 0,
                     aligned_rows)
                   .v);
  }
  const int64_t first = MODE == DzMode::kGate ? blockIdx.x * map : int64_t{blockIdx.x} * Tile::kPixels;
  const int64_t end = MODE == DzMode::kGate ? first + map : a.pixels;
  const int64_t step = MODE == DzMode::kGate ? Tile::kPixels : int64_t{gridDim.x} * Tile::kPixels;
  Acc<T> s1[NT][2] = {}, s2[NT][2] = {};
  for (int64_t p0 = first; p0 < end; p0 += step) {
#pragma unroll 1
    for (int i = tid; i < Tile::kPixels * groups; i += kThreads) {
      const int m = i / groups, c = i % groups * 4;
      const bool inside = p0 + m < end;
      const int64_t from = (slot * a.pixels + p0 + m) * a.columns + c;
      put4<T, M>(ds + m * tile.pitch, c,
                 load4(a.dy3 + (inside ? from : 0), inside ? a.columns - c : 0, aligned).v);
    }
    __syncthreads();
    Acc<T> dz[1][NT][4] = {};
    warp_product<T, M, 1, NT>(dz, ds + warp * 16 * tile.pitch, tile.pitch, ws, tile.pitch, words);
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t p = p0 + warp * 16 + g + 8 * half;
      if (p >= end) continue;
#pragma unroll
      for (int j = 0; j < NT; j++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int c = 8 * j + 2 * t + e, v = chunk.vector_at + c;
          if (!chunk.has(c)) continue;
          const int64_t at = a.pixels * chunk.active_at + p * pitch + chunk.first + c;
          const Acc<T> h2 = (load(a.y2 + at) - a.mean2[v]) * a.rstd2[v];
          Acc<T> a2, slope;
          activate_with_slope(a.act, h2, a2, slope);
          Acc<T> d = dz[0][j][2 * half + e];
          if constexpr (MODE == DzMode::kGate) {
            s1[j][e] += d * a2;
          } else {
            if (has_se) d = d * a.gate[p / map * a.active + v] + a.dpooled[p / map * a.active + v];
            d = store(a.dh2 + at, d * slope);
            s1[j][e] += d;
            s2[j][e] += d * h2;
          }
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < NT; j++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      for (int offset = 4; offset < 32; offset *= 2) {
        s1[j][e] += __shfl_xor_sync(~0u, s1[j][e], offset);
        s2[j][e] += __shfl_xor_sync(~0u, s2[j][e], offset);
      }
      if (g == 0) {
        sums[warp * 2 * kChunk + 8 * j + 2 * t + e] = s1[j][e];
        sums[(warp * 2 + 1) * kChunk + 8 * j + 2 * t + e] = s2[j][e];
      }
    }
  }
  __syncthreads();
  const int which = tid / kChunk, c = tid % kChunk;
  if (which >= (MODE == DzMode::kGate ? 1 : 2) || !chunk.has(c)) return;
  Acc<T> total = 0;
  for (int w = 0; w < WARPS; w++) total += sums[(2 * w + which) * kChunk + c];
  if constexpr (MODE == DzMode::kGate) {
    a.partial[int64_t{blockIdx.x} * a.active + chunk.vector_at + c] = total;
  } else {
    a.partial[(int64_t{blockIdx.x} * 2 + which) * a.active + chunk.vector_at + c] = total;
  }
}

// means [2][active] = partial sums / count, in double and in a fixed order. grid ceil(active / 32), block
// (32, 8).
template <class A>
__global__ void __launch_bounds__(256)
    finish_means(const A* partial, A* means, int rows, int active, int64_t count) {
  TFNAS_SHARED(double, part, [8][2][32]);
  const int c = blockIdx.x * 32 + threadIdx.x;
  double sum[2] = {};
  if (c < active) {
    for (int r = threadIdx.y; r < rows; r += 8) {
      for (int i = 0; i < 2; i++) sum[i] += partial[(int64_t{2} * r + i) * active + c];
    }
  }
  for (int i = 0; i < 2; i++) part[threadIdx.y][i][threadIdx.x] = sum[i];
  __syncthreads();
  if (threadIdx.y >= 2 || c >= active) return;
  double total = 0;
  for (int i = 0; i < 8; i++) total += part[i][threadIdx.y][threadIdx.x];
  means[threadIdx.y * active + c] = static_cast<A>(total / static_cast<double>(count));
}

}  // namespace tfnas::cuda
