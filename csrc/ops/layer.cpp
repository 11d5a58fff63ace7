// Schemas of the operators under the CUDA engine: one layer of the supernet on packed weights, and what
// surrounds the layers in a step. Private: the engine and the search's steps are their only callers, and
// check widths and choices once per epoch rather than in every step.
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
  // `grads`: of whole tensors beside the segments. `like`: any weight.
  m.def(
      "_gradient_norm(Tensor segments, Tensor[] grads, float max_norm, Tensor like) -> (Tensor norm, Tensor "
      "coefficient)");
  m.def(
      "_clipped_sgd(Tensor segments, Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momenta, Tensor "
      "coefficient, Tensor lr, float momentum, float weight_decay) -> ()");
  // alpha and beta: (log-probabilities, first and second moment) each, all [rows, columns].
  m.def(
      "_adam_step(Tensor(a!)[] alpha, Tensor alpha_grad, Tensor alpha_mask, Tensor(b!)[] beta, Tensor "
      "beta_grad, "
      "Tensor beta_mask, Tensor(c!) steps, float lr, float beta1, float beta2, float weight_decay, float "
      "eps, float "
      "max_norm) -> Tensor norm");
  // The sink of a stage: the sum of `outs` weighed by v [at least as many], and <dout, out> of each.
  m.def("_sink(Tensor[] outs, Tensor v) -> Tensor");
  m.def("_sink_dots(Tensor[] outs, Tensor dout) -> Tensor");
  m.def("_cross_entropy(Tensor logits, Tensor labels) -> (Tensor loss, Tensor correct, Tensor dlogits)");
}
