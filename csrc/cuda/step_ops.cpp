// Launchers of what surrounds the layers in a step: sinks, loss, gradient norm, SGD, Adam. Nothing here waits
// for the device.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "cuda/arguments.h"
#include "cuda/device.h"
#include "kernels/adam.h"
#include "kernels/cross_entropy.h"
#include "kernels/sgd.h"
#include "kernels/sink.h"

namespace tfnas::cuda {
namespace {

using at::Tensor;

// A row of `segments` is one Segment, field by field (null is 0; role and columns share one element, role
// low). The engine fills it once per epoch.
constexpr int64_t kSegmentFields = sizeof(Segment<float>) / 8;
static_assert(sizeof(Segment<float>) == 72 && sizeof(Segment<float>) == sizeof(Segment<double>));

void check_segments(const Tensor& segments) {
  TORCH_CHECK_VALUE(segments.dim() == 2 && segments.size(0) >= 1 && segments.size(1) == kSegmentFields &&
                        segments.is_contiguous() && segments.scalar_type() == at::kLong,
                    "segments must be a contiguous int64 [n, ", kSegmentFields, "], got ", segments.sizes());
}

// Whether two tensors have their elements in the same places of memory.
bool same_layout(const Tensor& a, const Tensor& b) {
  if (a.sizes() != b.sizes() || !a.is_non_overlapping_and_dense()) return false;
  for (int64_t d = 0; d < a.dim(); d++) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// `weights` and `momenta` may be empty, where only gradients are wanted.
template <class A>
std::vector<DenseTensors<A>> dense_groups(at::TensorList grads, at::TensorList weights,
                                          at::TensorList momenta, c10::Device device, at::ScalarType type) {
  std::vector<DenseTensors<A>> groups;
  for (size_t i = 0; i < grads.size(); i++) {
    if (i % kDenseTensors == 0) groups.emplace_back();
    DenseTensors<A>& group = groups.back();
    const int at = group.count++;
    TORCH_CHECK_VALUE(grads[i].device() == device, "grads[", i, "] must be on ", device, ", got ",
                      grads[i].device());
    TORCH_CHECK_TYPE(grads[i].scalar_type() == type, "grads[", i, "] must be ", type, ", got ",
                     grads[i].scalar_type());
    TORCH_CHECK_VALUE(grads[i].is_non_overlapping_and_dense(), "grads[", i,
                      "] must be dense in memory, got strides ", grads[i].strides());
    group.grad[at] = grads[i].const_data_ptr<A>();
    group.size[at] = grads[i].numel();
    if (weights.empty()) continue;
    for (const auto& [name, list] : {std::pair{"weights", weights}, std::pair{"momenta", momenta}}) {
      TORCH_CHECK_VALUE(list.size() == grads.size(), name, " must be ", grads.size(),
                        " tensors as grads, got ", list.size());
      TORCH_CHECK_TYPE(list[i].scalar_type() == type && list[i].device() == device, name, "[", i,
                       "] must be ", type, " on ", device, ", got ", list[i].scalar_type(), " on ",
                       list[i].device());
      TORCH_CHECK_VALUE(same_layout(list[i], grads[i]), name, "[", i, "] must lie in memory as grads[", i,
                        "]: sizes ", grads[i].sizes(), " strides ", grads[i].strides(), ", got ",
                        list[i].sizes(), " strides ", list[i].strides());
    }
    group.weight[at] = weights[i].mutable_data_ptr<A>();
    group.momentum[at] = momenta[i].mutable_data_ptr<A>();
  }
  return groups;
}

template <class A>
const Segment<A>* segment_data(const Tensor& segments) {
  return reinterpret_cast<const Segment<A>*>(segments.const_data_ptr());
}

std::tuple<Tensor, Tensor> gradient_norm_op(const Tensor& segments, at::TensorList grads, double max_norm,
                                            const Tensor& like) {
  check_segments(segments);
  TORCH_CHECK_VALUE(max_norm > 0, "max_norm must be positive, got ", max_norm);
  const DeviceScope device(segments.device());
  const int count = static_cast<int>(segments.size(0));
  return dispatch_weights(like, "like", [&]<class A>() {
    const auto groups = dense_groups<A>(grads, {}, {}, segments.device(), like.scalar_type());
    const int64_t partials = (count + static_cast<int64_t>(grads.size())) * kSegmentBlocks;
    Tensor partial = at::empty({partials}, like.options()), norm = at::empty({}, like.options()),
           coefficient = at::empty({}, like.options());
    gradient_norm(segment_data<A>(segments), count, groups.data(), static_cast<int>(groups.size()), max_norm,
                  partial.mutable_data_ptr<A>(), norm.mutable_data_ptr<A>(),
                  coefficient.mutable_data_ptr<A>(), device.stream());
    device.check_launches();
    return std::make_tuple(norm, coefficient);
  });
}

void clipped_sgd_op(const Tensor& segments, at::TensorList weights, at::TensorList grads,
                    at::TensorList momenta, const Tensor& coefficient, const Tensor& lr, double momentum,
                    double weight_decay) {
  check_segments(segments);
  const DeviceScope device(segments.device());
  const int count = static_cast<int>(segments.size(0));
  dispatch_weights(coefficient, "coefficient", [&]<class A>() {
    for (const auto& [name, t] : {std::pair{"coefficient", coefficient}, std::pair{"lr", lr}}) {
      check_tensor(t, name, segments.device(), coefficient.scalar_type());
      TORCH_CHECK_VALUE(t.numel() == 1, name, " must be one number, got ", t.sizes());
    }
    TORCH_CHECK_VALUE(weights.size() == grads.size(), "weights must be ", grads.size(),
                      " tensors as grads, got ", weights.size());
    const auto groups =
        dense_groups<A>(grads, weights, momenta, segments.device(), coefficient.scalar_type());
    clipped_sgd(segment_data<A>(segments), count, groups.data(), static_cast<int>(groups.size()),
                coefficient.const_data_ptr<A>(), lr.const_data_ptr<A>(), static_cast<A>(momentum),
                static_cast<A>(weight_decay), device.stream());
    device.check_launches();
  });
}

template <class A>
LogProbabilities<A> log_probabilities(const char* name, at::TensorList tensors, const Tensor& grad,
                                      const Tensor& mask) {
  TORCH_CHECK_VALUE(tensors.size() == 3, name, " must be three tensors (values and two moments), got ",
                    tensors.size());
  const Tensor& values = tensors[0];
  TORCH_CHECK_VALUE(values.dim() == 2 && values.numel() > 0, name,
                    " must be a non-empty [rows, columns], got ", values.sizes());
  check_tensor(mask, "mask", values.device(), at::kBool);
  TORCH_CHECK_VALUE(mask.sizes() == values.sizes(), name, ": mask must be ", values.sizes(), ", got ",
                    mask.sizes());
  const Tensor* all[4] = {&values, &tensors[1], &tensors[2], &grad};
  for (const Tensor* t : all) {
    check_tensor(*t, name, values.device(), values.scalar_type());
    TORCH_CHECK_VALUE(t->sizes() == values.sizes(), name, ": values, moments and gradient must be ",
                      values.sizes(), ", got ", t->sizes());
  }
  return {values.mutable_data_ptr<A>(),    tensors[1].mutable_data_ptr<A>(), tensors[2].mutable_data_ptr<A>(),
          grad.const_data_ptr<A>(),        mask.const_data_ptr<bool>(),      static_cast<int>(values.size(0)),
          static_cast<int>(values.size(1))};
}

Tensor adam_step_op(at::TensorList alpha, const Tensor& alpha_grad, const Tensor& alpha_mask,
                    at::TensorList beta, const Tensor& beta_grad, const Tensor& beta_mask,
                    const Tensor& steps, double lr, double beta1, double beta2, double weight_decay,
                    double eps, double max_norm) {
  TORCH_CHECK_VALUE(max_norm > 0, "max_norm must be positive, got ", max_norm);
  const DeviceScope device(steps.device());
  return dispatch_weights(steps, "steps", [&]<class A>() {
    TORCH_CHECK_VALUE(steps.numel() == 1, "steps must be one number, got ", steps.sizes());
    const auto a = log_probabilities<A>("alpha", alpha, alpha_grad, alpha_mask);
    const auto b = log_probabilities<A>("beta", beta, beta_grad, beta_mask);
    check_tensor(alpha[0], "alpha", steps.device(), steps.scalar_type());
    check_tensor(beta[0], "beta", steps.device(), steps.scalar_type());
    Tensor norm = at::empty({}, steps.options());
    const AdamOptions options{lr, beta1, beta2, weight_decay, eps, max_norm};
    adam_step(a, b, options, steps.mutable_data_ptr<A>(), norm.mutable_data_ptr<A>(), device.stream());
    device.check_launches();
    return norm;
  });
}

template <class F>
auto dispatch_activations(const Tensor& x, const char* name, F f) {
  if (x.scalar_type() == at::kDouble) return f.template operator()<double>();
  if (x.scalar_type() == at::kBFloat16) return f.template operator()<__nv_bfloat16>();
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, name, " must be float32, float64 or bfloat16, got ",
                   x.scalar_type());
  return f.template operator()<float>();
}

at::ScalarType accumulator_of(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

template <class T>
SinkOutputs<T> sink_outputs(at::TensorList outs) {
  SinkOutputs<T> view{static_cast<int>(outs.size()), {}};
  for (int d = 0; d < view.depth; d++) view.out[d] = static_cast<const T*>(outs[d].const_data_ptr());
  return view;
}

void check_outputs(at::TensorList outs) {
  TORCH_CHECK_VALUE(!outs.empty() && outs.size() <= kMaxDepth, "outs must be 1 to ", kMaxDepth,
                    " tensors, got ", outs.size());
  TORCH_CHECK_VALUE(outs[0].numel() > 0, "outs must not be empty, got ", outs[0].sizes());
  for (size_t d = 0; d < outs.size(); d++) {
    TORCH_CHECK_VALUE(outs[d].device() == outs[0].device() &&
                          outs[d].scalar_type() == outs[0].scalar_type() && same_layout(outs[d], outs[0]),
                      "outs must be alike and dense in memory, got ", outs[0].sizes(), " ", outs[0].strides(),
                      " and ", outs[d].sizes(), " ", outs[d].strides());
  }
}

Tensor sink_op(at::TensorList outs, const Tensor& v) {
  check_outputs(outs);
  const DeviceScope device(outs[0].device());
  return dispatch_activations(outs[0], "outs", [&]<class T>() {
    check_tensor(v, "v", outs[0].device(), accumulator_of(outs[0]));
    check_elements(v, "v", static_cast<int64_t>(outs.size()));
    Tensor sum = at::empty_like(outs[0]);
    sink<T>(sink_outputs<T>(outs), v.const_data_ptr<Acc<T>>(), static_cast<T*>(sum.mutable_data_ptr()),
            sum.numel(), device.stream());
    device.check_launches();
    return sum;
  });
}

Tensor sink_dots_op(at::TensorList outs, const Tensor& dout) {
  check_outputs(outs);
  TORCH_CHECK_VALUE(dout.device() == outs[0].device() && dout.scalar_type() == outs[0].scalar_type() &&
                        same_layout(dout, outs[0]),
                    "dout must be as outs: ", outs[0].sizes(), " ", outs[0].strides(), ", got ", dout.sizes(),
                    " ", dout.strides());
  const DeviceScope device(outs[0].device());
  return dispatch_activations(outs[0], "outs", [&]<class T>() {
    const auto depth = static_cast<int64_t>(outs.size());
    const auto options = dout.options().dtype(accumulator_of(dout));
    Tensor dv = at::empty({depth}, options), parts = at::empty({kDotBlocks * depth}, options);
    sink_dots<T>(sink_outputs<T>(outs), static_cast<const T*>(dout.const_data_ptr()),
                 parts.mutable_data_ptr<Acc<T>>(), dv.mutable_data_ptr<Acc<T>>(), dout.numel(),
                 device.stream());
    device.check_launches();
    return dv;
  });
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_op(const Tensor& logits, const Tensor& labels) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.numel() > 0, "logits must be a non-empty [N, classes], got ",
                    logits.sizes());
  check_tensor(labels, "labels", logits.device(), at::kLong);
  TORCH_CHECK_VALUE(labels.dim() == 1 && labels.size(0) == logits.size(0), "labels must be [", logits.size(0),
                    "], got ", labels.sizes());
  const DeviceScope device(logits.device());
  return dispatch_weights(logits, "logits", [&]<class A>() {
    check_tensor(logits, "logits", logits.device(), logits.scalar_type());
    const int rows = static_cast<int>(logits.size(0)), classes = static_cast<int>(logits.size(1));
    Tensor dlogits = at::empty_like(logits), loss = at::empty({}, logits.options()),
           correct = at::empty({}, labels.options());
    Tensor row_losses = at::empty({rows}, logits.options().dtype(at::kDouble)),
           row_correct = at::empty({rows}, logits.options().dtype(at::kInt));
    cross_entropy(logits.const_data_ptr<A>(), labels.const_data_ptr<int64_t>(), rows, classes,
                  dlogits.mutable_data_ptr<A>(), loss.mutable_data_ptr<A>(),
                  correct.mutable_data_ptr<int64_t>(), row_losses.mutable_data_ptr<double>(),
                  row_correct.mutable_data_ptr<int>(), device.stream());
    device.check_launches();
    return std::make_tuple(loss, correct, dlogits);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(tfnas, TFNAS_DEVICE_KEY, m) {
  m.impl("_gradient_norm", &gradient_norm_op);
  m.impl("_clipped_sgd", &clipped_sgd_op);
  m.impl("_adam_step", &adam_step_op);
  m.impl("_sink", &sink_op);
  m.impl("_sink_dots", &sink_dots_op);
  m.impl("_cross_entropy", &cross_entropy_op);
}

}  // namespace tfnas::cuda
