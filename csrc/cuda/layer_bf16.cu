// A layer's kernels: bf16 activations. One file a precision, so that they compile side by side.
#include "kernels/layer_backward.cuh"

namespace tfnas::cuda {
template int64_t layer_saved_bytes(const LayerArgs<__nv_bfloat16>&);
template bool layer_fits<__nv_bfloat16, Math::kBf16>(const LayerArgs<__nv_bfloat16>&);
template int64_t layer_forward<__nv_bfloat16, Math::kBf16>(const LayerArgs<__nv_bfloat16>&,
                                                           const __nv_bfloat16*, __nv_bfloat16*, void*,
                                                           void*);
template int64_t layer_backward<__nv_bfloat16, Math::kBf16>(const LayerArgs<__nv_bfloat16>&,
                                                            const __nv_bfloat16*, const __nv_bfloat16*,
                                                            const LayerGrads<__nv_bfloat16>&, void*, void*);
}  // namespace tfnas::cuda
