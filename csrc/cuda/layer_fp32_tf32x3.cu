// A layer's kernels: fp32 activations, products in three tf32 parts. One file a precision, so that they
// compile side by side.
#include "kernels/layer_backward.cuh"

namespace tfnas::cuda {
template bool layer_fits<float, Math::kTf32x3>(const LayerArgs<float>&);
template int64_t layer_forward<float, Math::kTf32x3>(const LayerArgs<float>&, const float*, float*, void*,
                                                     void*);
template int64_t layer_backward<float, Math::kTf32x3>(const LayerArgs<float>&, const float*, const float*,
                                                      const LayerGrads<float>&, void*, void*);
}  // namespace tfnas::cuda
