// Schemas of the operators under the CUDA engine: one layer of the supernet on packed weights. Private: the
// engine is their only caller, and checks widths and choices once per epoch rather than in every step.
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(tfnas, m) {
  // `table` int64 [C, 8] on the CPU, `device_table` what _layer_table made of it; `weights` the seven packed
  // tensors in the order of packed.ROLES; `choice` int32 [1] or None (the mixture, with `u` [C]); `math` as
  // float32 products run.
  m.def("_layer_table(Tensor table, Device device) -> Tensor");
  m.def(
      "_layer_forward(Tensor x, Tensor[] weights, Tensor table, Tensor device_table, Tensor? choice, Tensor? "
      "u, "
      "int stride, str act, bool residual, float eps, str math) -> (Tensor out, Tensor saved)");
  m.def(
      "_layer_backward(Tensor x, Tensor dout, Tensor saved, Tensor[] weights, Tensor table, Tensor "
      "device_table, "
      "Tensor? choice, Tensor? u, int stride, str act, bool residual, float eps, str math, bool need_dx, "
      "Tensor(a!)[] grads) -> (Tensor dx, Tensor du)");
  // `segments`: int64 [n, 9] on the device, one Segment a row (csrc/kernels/sgd.h).
  m.def("_segments_norm(Tensor segments, Tensor like) -> Tensor");
  m.def("_segments_sgd(Tensor segments, Tensor scale, float lr, float momentum, float weight_decay) -> ()");
}
