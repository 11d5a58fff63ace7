// Backward of the middle of the block, strips form, down to the narrow input. From wide dh2:
//   dy2 = r2 (dh2 - mean(dh2) - h2 mean(dh2 h2))        BN2, formed while it is staged, with the halo
//   dWdw = corr(a1, dy2),  da1 = dw^T(dy2),  dh1 = da1 act'(h1)   and the sums of dh1 and dh1 h1 that BN1
//   needs;  the product of dx, W1'^T dh1
// h1 is computed again from x: only dy2 needs a halo, so the recomputation has none.
//
// Block: one spatial tile of input pixels (of one or several images) and a run of 32-channel chunks; x is
// staged once. products: a warp owns 16 pixels x 32 channels of h1. depthwise: a lane owns a channel, a warp
// RBH x RBW inputs at a time, whose dy2 window serves both da1 and dWdw. dx: see input_grad_tile.cuh. Reads:
// x once per chunk run, y2 and dh2 once (plus halo). Writes: dWdw and the two sums once per tile and channel,
// dx once per chunk run; dh1 once, where weight gradients are wanted.
#pragma once

#include "input_grad_tile.cuh"

namespace tfnas::cuda {

template <class T>
struct DepthwiseBackwardArgs {
  const T* x;  // [batch, height, width, channels]
  const Acc<T>*
      expand;  // [rows, channels], or null: x itself is the wide tensor, without batch norm or activation
  const Acc<T>*rstd1, *shift1;
  const Acc<T>* depthwise;
  const T *y2, *dh2;  // wide
  const Acc<T>*mean2, *rstd2;
  const Acc<T>* means;  // [2][active]: of dh2 and of dh2 h2
  T* dh1;  // wide at the inputs' resolution, or null; without expansion it is dx, [pixels][channels]
  Acc<T>* dx_parts;      // [chunk runs][pixels][channels] of W1'^T dh1, or null
  Acc<T>* filter_parts;  // [tiles][active][taps], or null: no weight gradient
  Acc<T>* partial;       // [tiles][2][active]: sums of dh1 and dh1 h1
  const LayerTable* table;
  const int* choice;
  int batch, height, width, channels, stride, act;
  int active, taps;                          // taps: of the largest kernel
  int tile_height, tile_width, tile_images;  // of inputs; multiples of RBH and RBW, even for stride 2
  int chunks_per_block;
  __host__ __device__ int out_height() const { return (height - 1) / stride + 1; }
  __host__ __device__ int out_width() const { return (width - 1) / stride + 1; }
  __host__ __device__ int tiles_x() const { return ceil_div(width, tile_width); }
  __host__ __device__ int tiles_y() const { return ceil_div(height, tile_height); }
  __host__ __device__ int tiles() const { return tiles_x() * tiles_y() * ceil_div(batch, tile_images); }
  int chunk_runs(int chunks) const { return ceil_div(chunks, chunks_per_block); }
};

// The pixels of one block.
template <class T>
struct InputTile {
  const DepthwiseBackwardArgs<T>& a;
  int image0, y0, x0, plane;
  __device__ explicit InputTile(const DepthwiseBackwardArgs<T>& a) : a(a) {
    const int tx = blockIdx.x % a.tiles_x(), ty = blockIdx.x / a.tiles_x() % a.tiles_y();
    image0 = blockIdx.x / (a.tiles_x() * a.tiles_y()) * a.tile_images;
    y0 = ty * a.tile_height, x0 = tx * a.tile_width, plane = a.tile_height * a.tile_width;
  }
  // Row m of the tile -> its pixel of the input, or -1 outside the images.
  __device__ int64_t pixel_of(int m) const {
    const int image = image0 + m / plane, y = y0 + m % plane / a.tile_width, x = x0 + m % a.tile_width;
    if (m >= a.tile_images * plane || image >= a.batch || y >= a.height || x >= a.width) return -1;
    return (int64_t{image} * a.height + y) * a.width + x;
  }
};

// Outputs that inputs first .. first + n - 1 reach: from first / S + kFirst, n / S + kExtra of them.
template <int K, int S>
struct Reach {
  static constexpr int kFirst = S == 1 ? -(K / 2) : -(K / 2 / 2);
  static constexpr int kExtra = S == 1 ? K - 1 : K / 2;
};

template <class T, Math M, int WARPS>
struct DepthwiseBackwardTile {
  using Word = typename Operand<T, M>::Word;
  int rows, pitch, grad_pitch, out_pixels;  // without expansion neither x nor its gradient is staged
  __host__ __device__ DepthwiseBackwardTile(const DepthwiseBackwardArgs<T>& a, int kernel_size) {
    const int extra = a.stride == 1 ? kernel_size - 1 : kernel_size / 2;
    rows = ceil_div(a.tile_images * a.tile_height * a.tile_width, 16) * 16;
    pitch = a.expand ? row_pitch<T, M>(a.channels) : 0;
    grad_pitch = a.expand ? input_grad_pitch(a.channels) : 0;
    out_pixels = a.tile_images * (a.tile_height / a.stride + extra) * (a.tile_width / a.stride + extra);
  }
  __host__ __device__ int weights_at() const { return rows * pitch; }
  __host__ __device__ int hidden_at() const { return weights_at() + kChunk * pitch; }
  __host__ __device__ int input_grad_at() const { return hidden_at() + rows * kWidePitch; }
  __host__ __device__ int grad_at() const { return input_grad_at() + rows * grad_pitch; }
  __host__ __device__ int filter_at(int taps) const {  // the reduction over warps reuses the place of dy2
    const int staged = out_pixels * kChunk, reduced = WARPS * (taps + 2) * kChunk;
    return grad_at() + (staged > reduced ? staged : reduced);
  }
  __host__ __device__ size_t shared_bytes(int kernel_size) const {
    const int taps = kernel_size * kernel_size;
    return sizeof(Word) * (filter_at(taps) + kChunk * taps);
  }
};

template <class T, Math M, int K, int S, int WARPS, int RBH, int RBW>
__device__ inline void depthwise_backward_run(const DepthwiseBackwardArgs<T>& a, const InputTile<T>& at,
                                              const InputGradTile<T, M, WARPS>& dx, int choice, int q0,
                                              int q1, typename Operand<T, M>::Word* shared) {
  using Word = typename Operand<T, M>::Word;
  using R = Reach<K, S>;
  constexpr int kThreads = WARPS * 32, kPad = K / 2, kTaps = K * K;
  constexpr int kWindowH = RBH / S + R::kExtra, kWindowW = RBW / S + R::kExtra;
  static_assert(RBH % S == 0 && RBW % S == 0);
  const DepthwiseBackwardTile<T, M, WARPS> tile(a, K);
  Word *xs = shared, *ws = shared + tile.weights_at();
  Acc<T>* hidden = reinterpret_cast<Acc<T>*>(shared + tile.hidden_at());
  Acc<T>* grad = reinterpret_cast<Acc<T>*>(shared + tile.grad_at());
  Acc<T>* filter = reinterpret_cast<Acc<T>*>(shared + tile.filter_at(kTaps));
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int image0 = at.image0, y0 = at.y0, x0 = at.x0, plane = at.plane;
  const int oh = a.tile_height / S + R::kExtra, ow = a.tile_width / S + R::kExtra;
  const int ho = a.out_height(), wo = a.out_width();
  const int words = row_words<T, M>(a.channels), groups = words * Operand<T, M>::kPerWord / 4;
  const bool aligned = rows_aligned(a.x, a.channels), aligned_rows = rows_aligned(a.expand, a.channels);

  if (a.expand) {
    for (int i = tid; i < tile.rows * groups; i += kThreads) {
      const int m = i / groups, c = i % groups * 4;
      const int64_t p = at.pixel_of(m);
      put4<T, M>(xs + m * tile.pitch, c,
                 load4(a.x + (p >= 0 ? p * a.channels + c : 0), p >= 0 ? a.channels - c : 0, aligned).v);
    }
  }
  for (int q = q0; q < q1; q++) {
    Chunk chunk{};
    find_chunk(*a.table, choice, q, chunk);
    const int pitch = pitch_of(chunk.rows.width);
    const int64_t wide2 = int64_t{a.batch} * ho * wo * chunk.active_at + chunk.first;
    if (a.expand) {
#pragma unroll 1
      for (int i = tid; i < kChunk * groups; i += kThreads) {
        const int r = i / groups, c = i % groups * 4;
        const int64_t row = chunk.rows.first_row + chunk.first + r;
        put4<T, M>(ws + r * tile.pitch, c,
                   load4(a.expand + (chunk.has(r) ? row * a.channels + c : 0),
                         chunk.has(r) ? a.channels - c : 0, aligned_rows)
                       .v);
      }
    }
    for (int i = tid; i < kChunk * kTaps; i += kThreads) {
      filter[i] =
          chunk.has(i / kTaps) ? a.depthwise[chunk.rows.depthwise_at + chunk.first * kTaps + i] : Acc<T>(0);
    }
    for (int i = tid; i < tile.out_pixels * kChunk; i += kThreads) {  // dy2 with halo, zero outside the image
      const int c = i % kChunk, o = i / kChunk, v = chunk.vector_at + c;
      const int image = image0 + o / (oh * ow), y = y0 / S + R::kFirst + o / ow % oh,
                x = x0 / S + R::kFirst + o % ow;
      Acc<T> dy2 = 0;
      if (image < a.batch && y >= 0 && y < ho && x >= 0 && x < wo && chunk.has(c)) {
        const int64_t from = wide2 + ((int64_t{image} * ho + y) * wo + x) * pitch + c;
        const Acc<T> h2 = (load(a.y2 + from) - a.mean2[v]) * a.rstd2[v];
        dy2 = a.rstd2[v] * (load(a.dh2 + from) - a.means[v] - h2 * a.means[a.active + v]);
      }
      grad[i] = dy2;
    }
    __syncthreads();
    if (a.expand) {
      const int g = lane / 4, t = lane % 4;
      for (int m0 = warp * 16; m0 < tile.rows; m0 += WARPS * 16) {
        Acc<T> h[1][kChunk / 8][4] = {};
        warp_product<T, M, 1, kChunk / 8>(h, xs + m0 * tile.pitch, tile.pitch, ws, tile.pitch, words);
#pragma unroll
        for (int j = 0; j < kChunk / 8; j++) {
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const int c = 8 * j + 2 * t + e % 2, v = chunk.vector_at + c;
            const Acc<T> h1 = chunk.has(c) ? h[0][j][e] * a.rstd1[v] + a.shift1[v] : Acc<T>(0);
            hidden[(m0 + g + e / 2 * 8) * kWidePitch + c] = h1;
          }
        }
      }
    } else {
      for (int m = warp; m < tile.rows; m += WARPS) {
        const int64_t p = at.pixel_of(m);
        hidden[m * kWidePitch + lane] =
            p >= 0 && chunk.has(lane) ? load(a.x + p * a.channels + chunk.first + lane) : Acc<T>(0);
      }
    }
    __syncthreads();

    const DepthwiseFilter<Acc<T>, K> w(filter + lane * kTaps);
    const int act = a.expand ? a.act : static_cast<int>(kIdentity);
    const int pitch1 = a.expand ? pitch : a.channels;
    const int64_t first =
        (a.expand ? int64_t{a.batch} * a.height * a.width * chunk.active_at : 0) + chunk.first;
    const Acc<T> rstd1 = a.dx_parts && chunk.has(lane) ? a.rstd1[chunk.vector_at + lane] : Acc<T>(0);
    Acc<T> dw[kTaps] = {}, sum = 0, product = 0;
    const int strips = a.tile_height / RBH, columns = a.tile_width / RBW;
#pragma unroll 1
    for (int job = warp; job < a.tile_images * strips * columns; job += WARPS) {
      const int image = job / (strips * columns), by = job / columns % strips * RBH, bx = job % columns * RBW;
      if (image0 + image >= a.batch || y0 + by >= a.height || x0 + bx >= a.width) continue;
      Acc<T>* h = hidden + (image * plane + by * a.tile_width + bx) * kWidePitch + lane;
      Acc<T> a1[RBH][RBW], da1[RBH][RBW] = {};
#pragma unroll
      for (int y = 0; y < RBH; y++) {
#pragma unroll
        for (int x = 0; x < RBW; x++) {
          const bool inside = y0 + by + y < a.height && x0 + bx + x < a.width;
          a1[y][x] = inside ? activate(act, h[(y * a.tile_width + x) * kWidePitch]) : Acc<T>(0);
        }
      }
      const Acc<T>* window = grad + ((image * oh + by / S) * ow + bx / S) * kChunk + lane;
#pragma unroll
      for (int d = 0; d < kWindowH; d++) {
#pragma unroll
        for (int e = 0; e < kWindowW; e++) {
          const Acc<T> dy2 = window[(d * ow + e) * kChunk];
#pragma unroll
          for (int y = 0; y < RBH; y++) {
            const int kr = y + kPad - S * (d + R::kFirst);
            if (kr < 0 || kr >= K) continue;
#pragma unroll
            for (int x = 0; x < RBW; x++) {
              const int kc = x + kPad - S * (e + R::kFirst);
              if (kc < 0 || kc >= K) continue;
              da1[y][x] += w(kr * K + kc) * dy2;
              dw[kr * K + kc] += a1[y][x] * dy2;
            }
          }
        }
      }
#pragma unroll
      for (int y = 0; y < RBH; y++) {
#pragma unroll
        for (int x = 0; x < RBW; x++) {
          if (y0 + by + y >= a.height || x0 + bx + x >= a.width || !chunk.has(lane)) continue;
          Acc<T>& here = h[(y * a.tile_width + x) * kWidePitch];
          const Acc<T> h1 = here;
          Acc<T> value, slope;
          activate_with_slope(act, h1, value, slope);
          const int64_t p = (int64_t{image0 + image} * a.height + y0 + by + y) * a.width + x0 + bx + x;
          const Acc<T> d = as_stored<T>(da1[y][x] * slope);
          if (a.dh1) store(a.dh1 + first + p * pitch1 + lane, d);
          sum += d;
          product += d * h1;
          here = d * rstd1;  // h1 has been used: its place holds what dx adds up
        }
      }
    }
    __syncthreads();
    if (a.dx_parts) dx.add(hidden, ws, tile.pitch);
    Acc<T>* mine = grad + warp * (kTaps + 2) * kChunk + lane;
#pragma unroll
    for (int i = 0; i < kTaps; i++) mine[i * kChunk] = dw[i];
    mine[kTaps * kChunk] = sum;
    mine[(kTaps + 1) * kChunk] = product;
    __syncthreads();
    for (int i = warp; i < kTaps + 2; i += WARPS) {
      if (!chunk.has(lane)) continue;
      Acc<T> total = 0;
      for (int k = 0; k < WARPS; k++) total += grad[(k * (kTaps + 2) + i) * kChunk + lane];
      const int v = chunk.vector_at + lane;
      if (i >= kTaps) {
        a.partial[(int64_t{blockIdx.x} * 2 + i - kTaps) * a.active + v] = total;
      } else if (a.filter_parts) {
        a.filter_parts[(int64_t{blockIdx.x} * a.active + v) * a.taps + i] = total;
      }
    }
    __syncthreads();
  }
}

// grid (tiles, chunk runs), block 32 * WARPS.
template <class T, Math M, int S, int WARPS, int RBH, int RBW>
__global__ void __launch_bounds__(WARPS * 32, 1) depthwise_backward(DepthwiseBackwardArgs<T> a) {
  using Word = typename Operand<T, M>::Word;
  TFNAS_DYN_SHARED(Word, shared);
  const int choice = chosen(a.choice);
  const int end = (blockIdx.y + 1) * a.chunks_per_block;
  const InputTile<T> at(a);
  const DepthwiseBackwardTile<T, M, WARPS> tile(a, 1);  // rows and gradients lie alike for all kernel sizes
  const InputGradTile<T, M, WARPS> dx(reinterpret_cast<Acc<T>*>(shared + tile.input_grad_at()), tile.rows,
                                      a.channels);
  if (a.dx_parts) dx.clear();
  int q = blockIdx.y * a.chunks_per_block;
  while (q < end) {
    Chunk first{}, next{};
    if (!find_chunk(*a.table, choice, q, first)) break;
    int stop = q + 1;
    while (stop < end && find_chunk(*a.table, choice, stop, next) &&
           next.rows.kernel_size == first.rows.kernel_size) {
      stop++;
    }
    if (first.rows.kernel_size == 3) {
      depthwise_backward_run<T, M, 3, S, WARPS, RBH, RBW>(a, at, dx, choice, q, stop, shared);
    } else if (first.rows.kernel_size == 5) {
      depthwise_backward_run<T, M, 5, S, WARPS, RBH, RBW>(a, at, dx, choice, q, stop, shared);
    } else {
      depthwise_backward_run<T, M, 7, S, WARPS, RBH, RBW>(a, at, dx, choice, q, stop, shared);
    }
    q = stop;
  }
  if (a.dx_parts) {
    const int64_t count = int64_t{a.batch} * a.height * a.width * a.channels;
    dx.write(a.dx_parts + blockIdx.y * count, [&](int m) { return at.pixel_of(m); });
  }
}

}  // namespace tfnas::cuda
