// Forward, first half of the block: x -> 1x1 expand -> BN1 (known scale and shift, see fold.cuh) ->
// activation -> depthwise k x k -> y2, with the per-channel sums of y2 for BN2. The wide y1, h1 and a1 live
// in shared memory only.
//
// Block: one spatial tile of outputs (of one or several images) and a run of 32-channel chunks. It stages the
// tile's pixels of x once, with the halo of k - 1, and for each chunk
//   products    warps own 16 MT pixels x 32 channels: W chunk from shared memory, epilogue BN1 + activation
//   in registers depthwise   a lane owns a channel, a warp RBH x RBW outputs at a time: filter and window in
//   registers
// Reads: x once per chunk run (plus halo), weights once per tile. Writes: y2 once, two sums per tile and
// channel. Tile: as large as shared memory allows, whole images on small maps, since the halo is recomputed
// by every tile.
#pragma once

#include "mma.cuh"

namespace tfnas::cuda {

constexpr int kWidePitch =
    kChunk + 8;  // of wide tiles: fragment stores and lane = channel reads hit 32 banks

template <class T>
struct ExpandDwArgs {
  const T* x;            // [batch, height, width, channels]
  const Acc<T>* expand;  // [rows, channels], or null: x itself is the wide tensor (no expansion)
  const Acc<T>* rstd1;   // per-channel vectors of BN1
  const Acc<T>* shift1;
  const Acc<T>* depthwise;
  T* y2;            // wide, at the outputs' resolution
  Acc<T>* partial;  // [tiles][2][active]: sum and sum of squares of y2
  const LayerTable* table;
  const int* choice;
  int batch, height, width, channels, stride, act;
  int active;                                // length of per-channel vectors
  int tile_height, tile_width, tile_images;  // of outputs; multiples of RBH and RBW
  int chunks_per_block;
  __host__ __device__ int out_height() const { return (height - 1) / stride + 1; }
  __host__ __device__ int out_width() const { return (width - 1) / stride + 1; }
  __host__ __device__ int tiles_x() const { return ceil_div(out_width(), tile_width); }
  __host__ __device__ int tiles_y() const { return ceil_div(out_height(), tile_height); }
  __host__ __device__ int tiles() const { return tiles_x() * tiles_y() * ceil_div(batch, tile_images); }
};

// Where things lie in shared memory, in words. K: kernel size.
template <class T, Math M, int MT, int WARPS>
struct ExpandDwTile {
  using Word = typename Operand<T, M>::Word;
  int in_height, in_width;  // of the padded tile
  int rows, pitch;          // of x: pixels inside the image, rounded up to whole products
  __host__ __device__ ExpandDwTile(const ExpandDwArgs<T>& a, int kernel_size) {
    in_height = (a.tile_height - 1) * a.stride + kernel_size;
    in_width = (a.tile_width - 1) * a.stride + kernel_size;
    const int h = in_height < a.height ? in_height : a.height, w = in_width < a.width ? in_width : a.width;
    rows = ceil_div(a.tile_images * h * w, 16 * MT) * 16 * MT;
    pitch = a.expand ? row_pitch<T, M>(a.channels) : 0;  // without expansion x is not staged
  }
  __host__ __device__ int weights_at() const { return rows * pitch; }
  __host__ __device__ int map_at() const { return weights_at() + kChunk * pitch; }
  __host__ __device__ int wide_at() const { return map_at() + rows; }
  __host__ __device__ int filter_at(int images) const {
    return wide_at() + images * in_height * in_width * kWidePitch;
  }
  __host__ __device__ int sums_at(int images, int kernel_size) const {
    return filter_at(images) + kChunk * kernel_size * kernel_size;
  }
  __host__ __device__ size_t shared_bytes(int images, int kernel_size) const {
    return sizeof(Word) * (sums_at(images, kernel_size) + WARPS * 2 * kChunk);
  }
};

// The pixels of one block.
template <class T>
struct TilePosition {
  int image, images, out_y, out_x, in_y, in_x;  // first ones; in_y and in_x may be negative (padding)
  __device__ TilePosition(const ExpandDwArgs<T>& a, int pad) {
    const int tx = blockIdx.x % a.tiles_x(), ty = blockIdx.x / a.tiles_x() % a.tiles_y();
    image = blockIdx.x / (a.tiles_x() * a.tiles_y()) * a.tile_images;
    images = a.batch - image < a.tile_images ? a.batch - image : a.tile_images;
    out_y = ty * a.tile_height, out_x = tx * a.tile_width;
    in_y = out_y * a.stride - pad, in_x = out_x * a.stride - pad;
  }
};

// One channel's filter: in registers up to 5 x 5; 49 values and a window would spill, so 7 x 7 stays in
// shared memory.
template <class A, int K>
struct DepthwiseFilter {
  static constexpr bool kInRegisters = K <= 5;
  A value[kInRegisters ? K * K : 1];
  const A* shared;
  __device__ explicit DepthwiseFilter(const A* filter) : shared(filter) {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < K * K; i++) value[i] = filter[i];
    }
  }
  __device__ A operator()(int i) const { return kInRegisters ? value[kInRegisters ? i : 0] : shared[i]; }
};

// All chunks q0..q1, which share the kernel size K.
template <class T, Math M, int K, int S, int MT, int WARPS, int RBH, int RBW>
__device__ inline void expand_dw_run(const ExpandDwArgs<T>& a, int choice, int q0, int q1,
                                     typename Operand<T, M>::Word* shared) {
  using Word = typename Operand<T, M>::Word;
  constexpr int kThreads = WARPS * 32, kPad = K / 2, kWindow = (RBW - 1) * S + K;
  const ExpandDwTile<T, M, MT, WARPS> tile(a, K);
  const TilePosition<T> at(a, kPad);
  const int iw = tile.in_width, plane = tile.in_height * iw, words = row_words<T, M>(a.channels);
  Word *xs = shared, *ws = shared + tile.weights_at();
  int* map = reinterpret_cast<int*>(shared + tile.map_at());
  Acc<T>* wide = reinterpret_cast<Acc<T>*>(shared + tile.wide_at());
  Acc<T>* filter = reinterpret_cast<Acc<T>*>(shared + tile.filter_at(a.tile_images));
  Acc<T>* sums = reinterpret_cast<Acc<T>*>(shared + tile.sums_at(a.tile_images, K));
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int y0 = at.in_y > 0 ? at.in_y : 0, x0 = at.in_x > 0 ? at.in_x : 0;
  const int y1 = at.in_y + tile.in_height < a.height ? at.in_y + tile.in_height : a.height;
  const int x1 = at.in_x + iw < a.width ? at.in_x + iw : a.width;
  const int inner_w = x1 - x0, inner = (y1 - y0) * inner_w, pixels = at.images * inner;
  const bool aligned = rows_aligned(a.x, a.channels), aligned_rows = rows_aligned(a.expand, a.channels);

  for (int i = tid; i < a.tile_images * plane * kWidePitch; i += kThreads)
    wide[i] = 0;                                     // padding is zero in a1
  for (int m = tid; m < tile.rows; m += kThreads) {  // row of the product -> pixel of the padded tile
    const int r = m % inner;
    map[m] =
        m < pixels ? m / inner * plane + (y0 - at.in_y + r / inner_w) * iw + x0 - at.in_x + r % inner_w : -1;
  }
  const int groups = words * Operand<T, M>::kPerWord / 4;  // of four channels
  if (a.expand) {
    for (int i = tid; i < tile.rows * groups; i += kThreads) {
      const int m = i / groups, c = i % groups * 4, r = m % inner;
      const int64_t pixel =
          (int64_t{at.image + m / inner} * a.height + y0 + r / inner_w) * a.width + x0 + r % inner_w;
      put4<T, M>(
          xs + m * tile.pitch, c,
          load4(a.x + (m < pixels ? pixel * a.channels + c : 0), m < pixels ? a.channels - c : 0, aligned).v);
    }
  }
  for (int q = q0; q < q1; q++) {
    Chunk chunk{};
    find_chunk(*a.table, choice, q, chunk);
    const Acc<T>* rows = a.expand + int64_t{chunk.rows.first_row + chunk.first} * a.channels;
    if (a.expand) {
#pragma unroll 1
      for (int i = tid; i < kChunk * groups; i += kThreads) {
        const int r = i / groups, c = i % groups * 4;
        const auto four = load4(rows + (chunk.has(r) ? int64_t{r} * a.channels + c : 0),
                                chunk.has(r) ? a.channels - c : 0, aligned_rows);
        put4<T, M>(ws + r * tile.pitch, c, four.v);
      }
    }
    for (int i = tid; i < kChunk * K * K; i += kThreads) {
      filter[i] =
          chunk.has(i / (K * K)) ? a.depthwise[chunk.rows.depthwise_at + chunk.first * K * K + i] : Acc<T>(0);
    }
    __syncthreads();
    if (a.expand) {
      for (int m0 = warp * 16 * MT; m0 < pixels; m0 += WARPS * 16 * MT) {
        Acc<T> h[MT][kChunk / 8][4] = {};
        warp_product<T, M, MT, kChunk / 8>(h, xs + m0 * tile.pitch, tile.pitch, ws, tile.pitch, words);
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int j = 0; j < kChunk / 8; j++) {
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int c = 8 * j + 2 * t + e;
            if (!chunk.has(c)) continue;
            const Acc<T> scale = a.rstd1[chunk.vector_at + c], shift = a.shift1[chunk.vector_at + c];
#pragma unroll
            for (int i = 0; i < 2 * MT; i++) {
              const int to = map[m0 + 16 * (i / 2) + g + i % 2 * 8];
              if (to >= 0) {
                wide[to * kWidePitch + c] = activate(a.act, h[i / 2][j][i % 2 * 2 + e] * scale + shift);
              }
            }
          }
        }
      }
    } else {
      for (int m = warp; m < pixels; m += WARPS) {
        const int r = m % inner;
        const int64_t pixel =
            (int64_t{at.image + m / inner} * a.height + y0 + r / inner_w) * a.width + x0 + r % inner_w;
        if (chunk.has(lane))
          wide[map[m] * kWidePitch + lane] = load(a.x + pixel * a.channels + chunk.first + lane);
      }
    }
    __syncthreads();

    const DepthwiseFilter<Acc<T>, K> w(filter + lane * K * K);
    Acc<T> sum = 0, squares = 0;
    const int ho = a.out_height(), wo = a.out_width(), pitch = pitch_of(chunk.rows.width);
    T* y2 = a.y2 + int64_t{a.batch} * ho * wo * chunk.active_at + chunk.first + lane;
    const int strips = a.tile_height / RBH, columns = a.tile_width / RBW;
#pragma unroll 1
    for (int job = warp; job < at.images * strips * columns; job += WARPS) {
      const int image = job / (strips * columns), oy = job / columns % strips * RBH, ox = job % columns * RBW;
      if (at.out_y + oy >= ho || at.out_x + ox >= wo) continue;
      const Acc<T>* in = wide + ((image * tile.in_height + oy * S) * iw + ox * S) * kWidePitch + lane;
      Acc<T> out[RBH][RBW] = {};
#pragma unroll
      for (int r = 0; r < (RBH - 1) * S + K; r++) {
        Acc<T> window[kWindow];
#pragma unroll
        for (int c = 0; c < kWindow; c++) window[c] = in[(r * iw + c) * kWidePitch];
#pragma unroll
        for (int y = 0; y < RBH; y++) {
          const int kr = r - y * S;
          if (kr < 0 || kr >= K) continue;
#pragma unroll
          for (int x = 0; x < RBW; x++) {
#pragma unroll
            for (int kc = 0; kc < K; kc++) out[y][x] += w(kr * K + kc) * window[x * S + kc];
          }
        }
      }
#pragma unroll
      for (int y = 0; y < RBH; y++) {
#pragma unroll
        for (int x = 0; x < RBW; x++) {
          if (!chunk.has(lane) || at.out_y + oy + y >= ho || at.out_x + ox + x >= wo) continue;
          const int64_t pixel = (int64_t{at.image + image} * ho + at.out_y + oy + y) * wo + at.out_x + ox + x;
          const Acc<T> v = store(y2 + pixel * pitch, out[y][x]);
          sum += v;
          squares += v * v;
        }
      }
    }
    sums[warp * 2 * kChunk + lane] = sum;
    sums[(warp * 2 + 1) * kChunk + lane] = squares;
    __syncthreads();
    if (tid < 2 * kChunk && chunk.has(tid % kChunk)) {
      Acc<T> total = 0;
      for (int i = 0; i < WARPS; i++) total += sums[i * 2 * kChunk + tid];
      a.partial[(int64_t{blockIdx.x} * 2 + tid / kChunk) * a.active + chunk.vector_at + tid % kChunk] = total;
    }
  }
}

// Blocks that share a multiprocessor: two fill each other's waits, but for stride 2 and without tensor cores
// they would have to spill.
template <Math M, int S>
inline constexpr int kExpandBlocks = S == 1 && M != Math::kFma ? 2 : 1;

// grid (tiles, chunk runs), block 32 * WARPS.
template <class T, Math M, int S, int MT, int WARPS, int RBH, int RBW>
__global__ void __launch_bounds__(WARPS * 32, kExpandBlocks<M, S> == 1 ? 0 : kExpandBlocks<M, S>)
    expand_dw(ExpandDwArgs<T> a) {
  using Word = typename Operand<T, M>::Word;
  TFNAS_DYN_SHARED(Word, shared);
  const int choice = chosen(a.choice);
  const int end = (blockIdx.y + 1) * a.chunks_per_block;
  int q = blockIdx.y * a.chunks_per_block;
  while (q < end) {
    Chunk first{}, next{};
    if (!find_chunk(*a.table, choice, q, first)) return;
    int stop = q + 1;  // candidates of one kernel size lie together: a run rarely has two
    while (stop < end && find_chunk(*a.table, choice, stop, next) &&
           next.rows.kernel_size == first.rows.kernel_size) {
      stop++;
    }
    if (first.rows.kernel_size == 3) {
      expand_dw_run<T, M, 3, S, MT, WARPS, RBH, RBW>(a, choice, q, stop, shared);
    } else if (first.rows.kernel_size == 5) {
      expand_dw_run<T, M, 5, S, MT, WARPS, RBH, RBW>(a, choice, q, stop, shared);
    } else {
      expand_dw_run<T, M, 7, S, MT, WARPS, RBH, RBW>(a, choice, q, stop, shared);
    }
    q = stop;
    __syncthreads();  // the next run lays shared memory out anew
  }
}

}  // namespace tfnas::cuda
