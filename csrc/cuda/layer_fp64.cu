// A layer's kernels: fp64. One file a precision, so that they compile side by side.
#include "kernels/layer_backward.cuh"

namespace tfnas::cuda {
template int64_t layer_saved_bytes(const LayerArgs<double>&);
template bool layer_fits<double, Math::kFma>(const LayerArgs<double>&);
template int64_t layer_forward<double, Math::kFma>(const LayerArgs<double>&, const double*, double*, void*,
                                                   void*);
template int64_t layer_backward<double, Math::kFma>(const LayerArgs<double>&, const double*, const double*,
                                                    const LayerGrads<double>&, void*, void*);
}  // namespace tfnas::cuda
