// Checks of tensor arguments that the launchers share: an exception names the argument, what was expected and
// what came.
#pragma once

#include <ATen/core/Tensor.h>

namespace tfnas::cuda {

inline void check_tensor(const at::Tensor& t, const char* name, c10::Device device, at::ScalarType type) {
  TORCH_CHECK_VALUE(t.device() == device, name, " must be on ", device, ", got ", t.device());
  TORCH_CHECK_TYPE(t.scalar_type() == type, name, " must be ", type, ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.is_contiguous(), name, " must be contiguous, got strides ", t.strides());
}

inline void check_elements(const at::Tensor& t, const char* name, int64_t least) {
  TORCH_CHECK_VALUE(t.numel() >= least, name, " must hold at least ", least, " elements, got ", t.numel());
}

// A float32 or float64 tensor of weights decides in which type a step computes.
template <class F>
auto dispatch_weights(const at::Tensor& like, const char* name, F f) {
  if (like.scalar_type() == at::kDouble) return f.template operator()<double>();
  TORCH_CHECK_TYPE(like.scalar_type() == at::kFloat, name, " must be float32 or float64, got ",
                   like.scalar_type());
  return f.template operator()<float>();
}

}  // namespace tfnas::cuda
