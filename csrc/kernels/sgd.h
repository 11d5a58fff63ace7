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

// Whole tensors, each with a gradient and a momentum of the same layout. Passed by value: their addresses
// need no table in device memory.
constexpr int kDenseTensors = 24;
template <class A>
struct DenseTensors {
  int count;
  A *weight[kDenseTensors], *momentum[kDenseTensors];
  const A* grad[kDenseTensors];
  int64_t size[kDenseTensors];
};

// norm [1]: 2-norm of the sampled gradients of `segments` and of those of `dense` (`groups` of them)
// together, in a fixed order; coefficient [1] = min(1, max_norm / (norm + 1e-6)), NaN where the norm is.
// partial: one value for each of kSegmentBlocks of every segment and every dense tensor.
constexpr int kSegmentBlocks = 16;
template <class A>
void gradient_norm(const Segment<A>* segments, int count, const DenseTensors<A>* dense, int groups,
                   double max_norm, A* partial, A* norm, A* coefficient, cudaStream_t stream);

// g = coefficient g + weight_decay w; momentum = m momentum + g; w -= lr momentum. `coefficient` and `lr` in
// device memory.
template <class A>
void clipped_sgd(const Segment<A>* segments, int count, const DenseTensors<A>* dense, int groups,
                 const A* coefficient, const A* lr, A m, A weight_decay, cudaStream_t stream);

}  // namespace tfnas::cuda
