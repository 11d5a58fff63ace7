// The sink of a stage (Eq. 5): the sum of its layers' outputs weighed by depth, and the gradient of the
// weights.
#pragma once

#include "layer.h"

namespace tfnas::cuda {

constexpr int kMaxDepth = 16, kDotBlocks = 128;

// The outputs of a stage's layers, `count` values each.
template <class T>
struct SinkOutputs {
  int depth;
  const T* out[kMaxDepth];
};

// sum = v[0] out[0] + v[1] out[1] + ...
template <class T>
void sink(const SinkOutputs<T>& outs, const Acc<T>* v, T* sum, int64_t count, cudaStream_t stream);

// dv[d] = <dout, out[d]>, in a fixed order. parts: kDotBlocks * depth values.
template <class T>
void sink_dots(const SinkOutputs<T>& outs, const T* dout, Acc<T>* parts, Acc<T>* dv, int64_t count,
               cudaStream_t stream);

}  // namespace tfnas::cuda
