// Gradient norm and SGD on the sampled widths: plain structures, and the two functions that run them.
#pragma once

#include "layer.h"

namespace tfnas::cuda {

enum class SegmentRole : int { kRows, kDepthwise, kSqueezeWeight, kSqueezeBias, kExciteBias };

// One weight of one layer, with the gradients of the one or two sampled paths. In device memory.
template <class A>
struct Segment {
  A *weight, *momentum;
  const A* grad[2];  // null: no such path
  const int* choice[2];
  const LayerTable* table;
  SegmentRole role;
  int columns;   // of a row (kRows), taps of the largest kernel (kDepthwise), else 1
  int64_t size;  // elements of `grad`
};

// partial [count * kSegmentBlocks], norm_squared [1]: sum of the squared sampled gradients, in a fixed order.
constexpr int kSegmentBlocks = 16;
template <class A>
void segments_norm(const Segment<A>* segments, int count, A* partial, A* norm_squared, cudaStream_t stream);

// g = scale g + weight_decay w; momentum = m momentum + g; w -= lr momentum. `scale` in device memory.
template <class A>
void segments_sgd(const Segment<A>* segments, int count, const A* scale, A lr, A m, A weight_decay,
                  cudaStream_t stream);

}  // namespace tfnas::cuda
