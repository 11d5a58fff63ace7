// Squeeze-and-excitation, backward. From dgate (project_backward in its kGate mode):
//   dv = dgate gate (1 - gate),  dsqueezed = (W_e^T dv) act'(squeezed),  dpooled = W_r dsqueezed / HW
//   dW_e = dv act(squeezed)^T, db_e = sum dv,  dW_r = pooled dsqueezed^T, db_r = sum dsqueezed   (sums over
//   images)
//
// se_expand_backward  block: 32 squeezed values of one candidate x 8 images; thread: one value of one image.
// se_reduce_backward  block: one chunk x 8 images; thread: one channel of one image; weights through shared
// memory. se_weight_grad      block: one chunk x 32 squeezed values; thread: four weights; loops over the
// images.
#pragma once

#include "squeeze_excite.cuh"

namespace tfnas::cuda {

template <class A>
struct SqueezeExciteState {
  const A *pooled, *squeezed, *gate, *dgate;  // [batch][active], squeezed [batch][squeezed_stride]
  const LayerTable* table;
  const int* choice;
  int batch, active, squeezed_stride, act;
  __device__ A gate_grad(int image, int v) const {
    const int64_t at = int64_t{image} * active + v;
    return dgate[at] * gate[at] * (A(1) - gate[at]);
  }
};

// dsqueezed [batch][squeezed_stride]. grid (images / 8, ceil(widest se / 32), candidates), block (32, 8).
template <class A>
__global__ void __launch_bounds__(256)
    se_expand_backward(SqueezeExciteState<A> s, SqueezeExciteWeights<A> weights, A* dsqueezed) {
  CandidateRows rows{};
  int active_at;
  if (!find_active(*s.table, chosen(s.choice), blockIdx.z, rows, active_at)) return;
  const int j = blockIdx.y * 32 + threadIdx.x, image = blockIdx.x * kSeImages + threadIdx.y;
  if (j >= rows.se_channels || image >= s.batch) return;
  const A* w = weights.expand_weight + rows.se_weight_at + j;
  A sum = 0, value, slope;
  for (int c = 0; c < rows.width; c++)
    sum += w[int64_t{c} * rows.se_channels] * s.gate_grad(image, active_at + c);
  const int64_t at = int64_t{image} * s.squeezed_stride + rows.se_reduce_bias_at + j;
  activate_with_slope(s.act, s.squeezed[at], value, slope);
  dsqueezed[at] = sum * slope;
}

// dpooled [batch][active], divided by the pixels of a map. grid (images / 8, chunks), block (32, 8).
template <class A>
__global__ void __launch_bounds__(256)
    se_reduce_backward(SqueezeExciteState<A> s, SqueezeExciteWeights<A> weights, const A* dsqueezed,
                       A* dpooled, int map) {
  TFNAS_SHARED(A, tile, [32][33]);
  TFNAS_SHARED(A, grad, [kSeImages][32]);
  Chunk chunk{};
  if (!find_chunk(*s.table, chosen(s.choice), blockIdx.y, chunk) || chunk.rows.se_channels == 0) return;
  const int lane = threadIdx.x, image = blockIdx.x * kSeImages + threadIdx.y, se = chunk.rows.se_channels;
  const A* w = weights.reduce_weight + chunk.rows.se_weight_at + int64_t{chunk.first} * se;
  A sum = 0;
  for (int j0 = 0; j0 < se; j0 += 32) {
    const int j = j0 + lane;
    for (int c = threadIdx.y; c < 32; c += 8)
      tile[c][lane] = chunk.has(c) && j < se ? w[int64_t{c} * se + j] : A(0);
    grad[threadIdx.y][lane] =
        j < se && image < s.batch
            ? dsqueezed[int64_t{image} * s.squeezed_stride + chunk.rows.se_reduce_bias_at + j]
            : A(0);
    __syncthreads();
    for (int i = 0; i < 32; i++) sum += tile[lane][i] * grad[threadIdx.y][i];
    __syncthreads();
  }
  if (image < s.batch && chunk.has(lane)) {
    dpooled[int64_t{image} * s.active + chunk.vector_at + lane] = sum / static_cast<A>(map);
  }
}

// grid (chunks, ceil(widest se / 32)), block (32, 8).
template <class A>
__global__ void __launch_bounds__(256)
    se_weight_grad(SqueezeExciteState<A> s, const A* dsqueezed, SqueezeExciteGrads<A> grads) {
  Chunk chunk{};
  if (!find_chunk(*s.table, chosen(s.choice), blockIdx.x, chunk)) return;
  const int se = chunk.rows.se_channels, j = blockIdx.y * 32 + threadIdx.x;
  if (j >= se) return;
  A reduce_bias = 0;
  for (int image = 0; image < s.batch; image++) {
    reduce_bias += dsqueezed[int64_t{image} * s.squeezed_stride + chunk.rows.se_reduce_bias_at + j];
  }
  if (chunk.first == 0 && threadIdx.y == 0) grads.reduce_bias[chunk.rows.se_reduce_bias_at + j] = reduce_bias;
  for (int c = threadIdx.y; c < chunk.valid(); c += 8) {
    A reduce = 0, expand = 0, expand_bias = 0;
    for (int image = 0; image < s.batch; image++) {
      const int64_t at = int64_t{image} * s.squeezed_stride + chunk.rows.se_reduce_bias_at + j;
      const A dv = s.gate_grad(image, chunk.vector_at + c);
      reduce += s.pooled[int64_t{image} * s.active + chunk.vector_at + c] * dsqueezed[at];
      expand += dv * activate(s.act, s.squeezed[at]);
      expand_bias += dv;
    }
    const int64_t weight = chunk.rows.se_weight_at + int64_t{chunk.first + c} * se + j;
    grads.reduce_weight[weight] = reduce;
    grads.expand_weight[weight] = expand;
    if (j == 0) grads.expand_bias[chunk.rows.se_expand_bias_at + chunk.first + c] = expand_bias;
  }
}

}  // namespace tfnas::cuda
