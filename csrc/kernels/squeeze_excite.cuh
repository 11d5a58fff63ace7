// Squeeze-and-excitation, forward: pooled = mean over the map of act(BN2(y2)); squeezed = W_r pooled + b_r;
// gate = sigmoid(W_e act(squeezed) + b_e). Candidates without SE are skipped and their gates never read.
//
// se_pool    block: one image x one chunk of 32 channels; thread: one channel, every 8th pixel. Reads y2
// once. se_reduce  block: 32 squeezed values of one candidate x 8 images; thread: one value of one image.
// Neighbouring
//            threads read neighbouring weights, and the eight images share them through L1.
// se_expand  block: one chunk x 8 images; thread: one gate. A 32 x 32 tile of weights goes through shared
// memory, since
//            its rows run along the sum.
#pragma once

#include "numbers.cuh"

namespace tfnas::cuda {

constexpr int kSeImages = 8;  // of a block of se_reduce and se_expand

// pooled [batch][active]. grid (batch, chunks), block (32, 8).
template <class T>
__global__ void __launch_bounds__(256)
    se_pool(const T* y2, const Acc<T>* mean2, const Acc<T>* rstd2, Acc<T>* pooled, const LayerTable* table,
            const int* choice, int batch, int map, int active, int act) {
  TFNAS_SHARED(Acc<T>, part, [8][32]);
  Chunk chunk{};
  if (!find_chunk(*table, chosen(choice), blockIdx.y, chunk) || chunk.rows.se_channels == 0) return;
  const int lane = threadIdx.x, v = chunk.vector_at + lane, pitch = pitch_of(chunk.rows.width);
  Acc<T> sum = 0;
  if (chunk.has(lane)) {
    const T* in = y2 + int64_t{batch} * map * chunk.active_at + chunk.first + lane;
    const Acc<T> mean = mean2[v], rstd = rstd2[v];
    for (int p = threadIdx.y; p < map; p += 8) {
      sum += activate(act, (load(in + (int64_t{blockIdx.x} * map + p) * pitch) - mean) * rstd);
    }
  }
  part[threadIdx.y][lane] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || !chunk.has(lane)) return;
  for (int i = 1; i < 8; i++) sum += part[i][lane];
  pooled[int64_t{blockIdx.x} * active + v] = sum / static_cast<Acc<T>>(map);
}

// squeezed [batch][squeezed_stride], before the activation. grid (images / 8, ceil(widest se / 32),
// candidates), block (32, 8).
template <class A>
__global__ void __launch_bounds__(256)
    se_reduce(const A* pooled, SqueezeExciteWeights<A> weights, A* squeezed, const LayerTable* table,
              const int* choice, int batch, int active, int squeezed_stride) {
  CandidateRows rows{};
  int active_at;
  if (!find_active(*table, chosen(choice), blockIdx.z, rows, active_at)) return;
  const int j = blockIdx.y * 32 + threadIdx.x, image = blockIdx.x * kSeImages + threadIdx.y;
  if (j >= rows.se_channels || image >= batch) return;
  const A *w = weights.reduce_weight + rows.se_weight_at + j,
          *p = pooled + int64_t{image} * active + active_at;
  A sum = weights.reduce_bias[rows.se_reduce_bias_at + j];
  for (int c = 0; c < rows.width; c++) sum += w[int64_t{c} * rows.se_channels] * p[c];
  squeezed[int64_t{image} * squeezed_stride + rows.se_reduce_bias_at + j] = sum;
}

// gate [batch][active]. grid (images / 8, chunks), block (32, 8).
template <class A>
__global__ void __launch_bounds__(256)
    se_expand(const A* squeezed, SqueezeExciteWeights<A> weights, A* gate, const LayerTable* table,
              const int* choice, int batch, int active, int squeezed_stride, int act) {
  TFNAS_SHARED(A, tile, [32][33]);
  TFNAS_SHARED(A, excited, [kSeImages][32]);
  Chunk chunk{};
  if (!find_chunk(*table, chosen(choice), blockIdx.y, chunk) || chunk.rows.se_channels == 0) return;
  const int lane = threadIdx.x, image = blockIdx.x * kSeImages + threadIdx.y, se = chunk.rows.se_channels;
  const A* w = weights.expand_weight + chunk.rows.se_weight_at + int64_t{chunk.first} * se;
  A sum = chunk.has(lane) ? weights.expand_bias[chunk.rows.se_expand_bias_at + chunk.first + lane] : A(0);
  for (int j0 = 0; j0 < se; j0 += 32) {
    const int j = j0 + lane;
    for (int c = threadIdx.y; c < 32; c += 8)
      tile[c][lane] = chunk.has(c) && j < se ? w[int64_t{c} * se + j] : A(0);
    excited[threadIdx.y][lane] =
        j < se && image < batch
            ? activate(act, squeezed[int64_t{image} * squeezed_stride + chunk.rows.se_reduce_bias_at + j])
            : A(0);
    __syncthreads();
    for (int i = 0; i < 32; i++) sum += tile[lane][i] * excited[threadIdx.y][i];
    __syncthreads();
  }
  if (image < batch && chunk.has(lane)) gate[int64_t{image} * active + chunk.vector_at + lane] = sigmoid(sum);
}

}  // namespace tfnas::cuda
