// Operators tfnas::mbinvres, tfnas::mbinvres_backward and tfnas::mbinvres_inference: one elastic MBInvRes
// block. Here: schemas, the checks of every argument, and the CPU implementation.
#include "cpu/mbinvres.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <string_view>
#include <tuple>
#include <utility>

#include "ops/threads.h"

namespace tfnas {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalText = std::optional<c10::string_view>;

// Weights as the operators take them: shaped like those of Conv2d and BatchNorm2d, at maximum width.
struct Weights {
  Tensor conv_pw, conv_dw, conv_pwl, se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias;
  Tensor bn_weight[3], bn_bias[3];

  std::array<Tensor*, 13> in_order() {  // of the operators' arguments
    return {&conv_pw,          &conv_dw,        &conv_pwl,     &se_reduce_weight, &se_reduce_bias,
            &se_expand_weight, &se_expand_bias, &bn_weight[0], &bn_bias[0],       &bn_weight[1],
            &bn_bias[1],       &bn_weight[2],   &bn_bias[2]};
  }
};

struct Options {
  int64_t stride;
  std::string_view act;
  bool residual;
  int64_t width;
  double eps;
  std::string_view design, se_act, se_gate;
};

Tensor value(const OptionalTensor& tensor) { return tensor.has_value() ? *tensor : Tensor(); }

Design parse_design(std::string_view design) {
  if (design == "auto") return Design::choose;
  if (design == "strips") return Design::strips;
  if (design == "channels") return Design::channels;
  TORCH_CHECK_VALUE(false, "design must be one of auto, strips, channels, got '", design, "'");
}

// A weight or a statistic: of the type of x, or float beside bfloat16.
void check_tensor(const Tensor& tensor, const char* name, at::IntArrayRef shape, const Tensor& x) {
  if (!tensor.defined()) return;
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must have shape ", shape, ", got ", tensor.sizes());
  const bool mixed = x.scalar_type() == at::kBFloat16 && tensor.scalar_type() == at::kFloat;
  TORCH_CHECK_TYPE(tensor.scalar_type() == x.scalar_type() || mixed, name, " must be ", x.scalar_type(),
                   " as x is, got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == x.device(), name, " must be on ", x.device(), " as x is, got ",
                    tensor.device());
}

void check(const Tensor& x, const Weights& w, const Options& options) {
  TORCH_CHECK_VALUE(x.dim() == 4, "x must be [N, Cin, H, W], got shape ", x.sizes());
  TORCH_CHECK_TYPE(
      x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble || x.scalar_type() == at::kBFloat16,
      "x must be float32, float64 or bfloat16, got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.numel() > 0, "x must not be empty, got shape ", x.sizes());
  TORCH_CHECK_VALUE(w.conv_dw.dim() == 4 && w.conv_dw.size(1) == 1 &&
                        w.conv_dw.size(2) == w.conv_dw.size(3) &&
                        (w.conv_dw.size(2) == 3 || w.conv_dw.size(2) == 5 || w.conv_dw.size(2) == 7),
                    "conv_dw must be [E, 1, k, k] with k = 3, 5 or 7, got shape ", w.conv_dw.sizes());
  const int64_t mid = w.conv_dw.size(0), kernel = w.conv_dw.size(2), in = x.size(1);
  check_tensor(w.conv_dw, "conv_dw", {mid, 1, kernel, kernel}, x);
  check_tensor(w.conv_pw, "conv_pw", {mid, in, 1, 1}, x);
  TORCH_CHECK_VALUE(w.conv_pw.defined() || mid == in, "conv_dw has ", mid, " channels, x has ", in,
                    ": without conv_pw they must be equal");
  TORCH_CHECK_VALUE(w.conv_pwl.dim() == 4, "conv_pwl must be [Cout, E, 1, 1], got shape ",
                    w.conv_pwl.sizes());
  const int64_t out = w.conv_pwl.size(0);
  TORCH_CHECK_VALUE(out > 0, "conv_pwl must have output channels, got shape ", w.conv_pwl.sizes());
  check_tensor(w.conv_pwl, "conv_pwl", {out, mid, 1, 1}, x);
  const bool se = w.se_reduce_weight.defined();
  TORCH_CHECK_VALUE(
      se == w.se_reduce_bias.defined() && se == w.se_expand_weight.defined() &&
          se == w.se_expand_bias.defined(),
      "se_reduce_weight, se_reduce_bias, se_expand_weight and se_expand_bias must come together");
  if (se) {
    TORCH_CHECK_VALUE(w.se_reduce_weight.dim() == 4 && w.se_reduce_weight.size(0) > 0,
                      "se_reduce_weight must be [se, E, 1, 1], got shape ", w.se_reduce_weight.sizes());
    const int64_t hidden = w.se_reduce_weight.size(0);
    check_tensor(w.se_reduce_weight, "se_reduce_weight", {hidden, mid, 1, 1}, x);
    check_tensor(w.se_reduce_bias, "se_reduce_bias", {hidden}, x);
    check_tensor(w.se_expand_weight, "se_expand_weight", {mid, hidden, 1, 1}, x);
    check_tensor(w.se_expand_bias, "se_expand_bias", {mid}, x);
  }
  const char* names[3][2] = {
      {"bn1_weight", "bn1_bias"}, {"bn2_weight", "bn2_bias"}, {"bn3_weight", "bn3_bias"}};
  for (int i = 0; i < 3; ++i) {
    check_tensor(w.bn_weight[i], names[i][0], {i < 2 ? mid : out}, x);
    check_tensor(w.bn_bias[i], names[i][1], {i < 2 ? mid : out}, x);
  }
  parse_act(options.act);
  parse_act(options.se_act, "se_act");
  parse_gate(options.se_gate);
  parse_design(options.design);
  TORCH_CHECK_VALUE(options.stride == 1 || options.stride == 2, "stride must be 1 or 2, got ",
                    options.stride);
  TORCH_CHECK_VALUE(!options.residual || (options.stride == 1 && in == out),
                    "residual needs stride 1 and Cout = Cin, got stride ", options.stride, " and ", in,
                    " -> ", out);
  TORCH_CHECK_VALUE(options.width >= 1 && options.width <= mid, "width must be in 1..", mid, ", got ",
                    options.width);
  TORCH_CHECK_VALUE(w.conv_pw.defined() || options.width == mid, "width must be ", mid,
                    " without conv_pw, got ", options.width);
  TORCH_CHECK_VALUE(options.eps > 0 && std::isfinite(options.eps), "eps must be positive and finite, got ",
                    options.eps);
}

int64_t halved(int64_t size, int64_t stride) { return (size + stride - 1) / stride; }

void check_training(const Tensor& x, const Options& options) {
  const int64_t values = x.size(0) * halved(x.size(2), options.stride) * halved(x.size(3), options.stride);
  TORCH_CHECK_VALUE(values > 1, "x: batch statistics need more than 1 value per channel, got ", values,
                    " after the depthwise convolution of x of shape ", x.sizes());
}

Weights collect(const OptionalTensor& conv_pw, const Tensor& conv_dw, const Tensor& conv_pwl,
                const OptionalTensor& se_reduce_weight, const OptionalTensor& se_reduce_bias,
                const OptionalTensor& se_expand_weight, const OptionalTensor& se_expand_bias,
                const OptionalTensor& bn1_weight, const OptionalTensor& bn1_bias,
                const OptionalTensor& bn2_weight, const OptionalTensor& bn2_bias,
                const OptionalTensor& bn3_weight, const OptionalTensor& bn3_bias) {
  return {value(conv_pw),
          conv_dw,
          conv_pwl,
          value(se_reduce_weight),
          value(se_reduce_bias),
          value(se_expand_weight),
          value(se_expand_bias),
          {value(bn1_weight), value(bn2_weight), value(bn3_weight)},
          {value(bn1_bias), value(bn2_bias), value(bn3_bias)}};
}

// Weights as the kernels read them: contiguous, in the type of the computation.
void make_contiguous(Weights& w, at::ScalarType type) {
  for (Tensor* tensor : w.in_order())
    if (tensor->defined()) *tensor = tensor->to(type).contiguous();
}

template <class T>
const T* data_of(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

template <class T>
Candidate<T> candidate_of(const Weights& w, int64_t width) {
  Candidate<T> c;
  const int64_t mid = w.conv_dw.size(0);
  c.kernel_size = static_cast<int>(w.conv_dw.size(2));
  c.width = width;
  if (w.conv_pw.defined()) c.expand = {data_of<T>(w.conv_pw), w.conv_pw.size(1), 1};
  c.depthwise = {data_of<T>(w.conv_dw), c.kernel_size * c.kernel_size, 1};
  c.project = {data_of<T>(w.conv_pwl), 1, mid};
  if (w.se_reduce_weight.defined()) {
    c.se_channels = w.se_reduce_weight.size(0);
    c.se_reduce = {data_of<T>(w.se_reduce_weight), 1, mid};
    c.se_expand = {data_of<T>(w.se_expand_weight), c.se_channels, 1};
    c.se_reduce_bias = data_of<T>(w.se_reduce_bias);
    c.se_expand_bias = data_of<T>(w.se_expand_bias);
  }
  NormView<T>* norms[3] = {&c.bn1, &c.bn2, &c.bn3};
  for (int i = 0; i < 3; ++i)
    norms[i]->weight = data_of<T>(w.bn_weight[i]), norms[i]->bias = data_of<T>(w.bn_bias[i]);
  return c;
}

template <class T>
Layer<T> layer_of(const Tensor& x, const Weights& w, const Options& options, const Candidate<T>& candidate) {
  return {x.size(0),
          x.size(2),
          x.size(3),
          x.size(1),
          w.conv_pwl.size(0),
          static_cast<int>(options.stride),
          parse_act(options.act),
          parse_act(options.se_act, "se_act"),
          parse_gate(options.se_gate),
          options.residual ? 1.0 : 0.0,
          options.eps,
          parse_design(options.design),
          1,
          &candidate,
          nullptr};
}

Tensor output_of(const Tensor& x, const Weights& w, const Options& options) {
  return at::empty(
      {x.size(0), w.conv_pwl.size(0), halved(x.size(2), options.stride), halved(x.size(3), options.stride)},
      x.options().memory_format(at::MemoryFormat::ChannelsLast));
}

// mean1, var1 (with conv_pw), mean2, var2: [width]; mean3, var3: [Cout]; one after the other
int64_t statistics_size(const Weights& w, const Options& options) {
  return (w.conv_pw.defined() ? 4 : 2) * options.width + 2 * w.conv_pwl.size(0);
}

template <class E>
const E* elements_of(const Tensor& tensor) {
  return static_cast<const E*>(tensor.const_data_ptr());
}
template <class E>
E* mutable_elements_of(const Tensor& tensor) {
  return tensor.defined() ? static_cast<E*>(tensor.mutable_data_ptr()) : nullptr;
}

template <class E>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const Weights& w, const Options& options) {
  using T = Compute<E>;
  const Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
  const Candidate<T> candidate = candidate_of<T>(w, options.width);
  const Layer<T> layer = layer_of(x, w, options, candidate);
  Tensor out = output_of(x, w, options);
  const at::TensorOptions plain = x.options().memory_format(std::nullopt);
  Tensor statistics =
      at::empty({statistics_size(w, options)}, plain.dtype(c10::CppTypeToScalarType<T>::value));
  Tensor saved = at::empty({layer_kernels_of<E>().saved_bytes(layer)}, plain.dtype(at::kByte));
  BatchStatistics<T> views;
  T* at = statistics.mutable_data_ptr<T>();
  auto next = [&](int64_t count) { return std::exchange(at, at + count); };
  if (w.conv_pw.defined()) views.mean1 = next(options.width), views.var1 = next(options.width);
  views.mean2 = next(options.width), views.var2 = next(options.width);
  views.mean3 = next(w.conv_pwl.size(0)), views.var3 = next(w.conv_pwl.size(0));
  layer_kernels_of<E>().forward(layer, elements_of<E>(x), mutable_elements_of<E>(out),
                                saved.mutable_data_ptr(), views, torch_threads());
  return {out, statistics, saved};
}

// Gradients of x and of the thirteen weights, at maximum width; undefined where the mask does not want them.
using Gradients = std::array<Tensor, 14>;

template <class E>
Gradients backward(const Tensor& dout_any, const Tensor& input, const Tensor& saved, Weights& w,
                   const Options& options, const std::array<bool, 14>& mask) {
  using T = Compute<E>;
  const Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor dout = dout_any.contiguous(at::MemoryFormat::ChannelsLast);
  const Candidate<T> candidate = candidate_of<T>(w, options.width);
  const Layer<T> layer = layer_of(x, w, options, candidate);
  TORCH_CHECK_VALUE(saved.dim() == 1 && saved.size(0) == layer_kernels_of<E>().saved_bytes(layer) &&
                        saved.scalar_type() == at::kByte && saved.is_contiguous(),
                    "saved must be what mbinvres returned for the same arguments");
  const bool narrowed = options.width < w.conv_dw.size(0);
  const std::array<Tensor*, 13> order = w.in_order();
  Gradients grads;
  if (mask[0]) grads[0] = at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::ChannelsLast));
  bool any = false;
  for (int i = 0; i < 13; ++i) {
    if (!mask[i + 1]) continue;
    TORCH_CHECK_VALUE(order[i]->defined(), "output_mask asks for the gradient of an argument that is None (",
                      i + 1, ")");
    // Channels beyond the width have gradient zero.
    grads[i + 1] = narrowed ? at::zeros_like(*order[i]) : at::empty_like(*order[i]);
    any = true;
  }
  auto at = [&](int i) { return grads[i + 1].defined() ? grads[i + 1].mutable_data_ptr<T>() : nullptr; };
  CandidateGradient<T> gradient;
  gradient.expand = {at(0), candidate.expand.mid_stride, 1};
  gradient.depthwise = {at(1), candidate.depthwise.mid_stride, 1};
  gradient.project = {at(2), 1, candidate.project.stride};
  gradient.se_reduce = {at(3), 1, candidate.se_reduce.stride};
  gradient.se_reduce_bias = at(4);
  gradient.se_expand = {at(5), candidate.se_expand.mid_stride, 1};
  gradient.se_expand_bias = at(6);
  for (int i = 0; i < 3; ++i) gradient.bn_weight[i] = at(7 + 2 * i), gradient.bn_bias[i] = at(8 + 2 * i);
  layer_kernels_of<E>().backward(layer, elements_of<E>(x), saved.const_data_ptr(), elements_of<E>(dout),
                                 mutable_elements_of<E>(grads[0]), nullptr, any ? &gradient : nullptr,
                                 torch_threads());
  return grads;
}

template <class E>
Tensor inference(const Tensor& input, const Weights& w, const Tensor* means, const Tensor* vars,
                 const Options& options) {
  using T = Compute<E>;
  const Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
  Candidate<T> candidate = candidate_of<T>(w, options.width);
  NormView<T>* norms[3] = {&candidate.bn1, &candidate.bn2, &candidate.bn3};
  for (int i = 0; i < 3; ++i) norms[i]->mean = data_of<T>(means[i]), norms[i]->var = data_of<T>(vars[i]);
  const Layer<T> layer = layer_of(x, w, options, candidate);
  Tensor out = output_of(x, w, options);
  layer_kernels_of<E>().inference(layer, elements_of<E>(x), mutable_elements_of<E>(out), torch_threads());
  return out;
}

// f(an element) for the element that x is made of.
template <class F>
auto with_element(const Tensor& x, F&& f) {
  if (x.scalar_type() == at::kDouble) return f(double{});
  if (x.scalar_type() == at::kBFloat16) return f(BFloat16{});
  return f(float{});
}
at::ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

#define TFNAS_WEIGHTS                                                                                     \
  const OptionalTensor &conv_pw, const Tensor &conv_dw, const Tensor &conv_pwl,                           \
      const OptionalTensor &se_reduce_weight, const OptionalTensor &se_reduce_bias,                       \
      const OptionalTensor &se_expand_weight, const OptionalTensor &se_expand_bias,                       \
      const OptionalTensor &bn1_weight, const OptionalTensor &bn1_bias, const OptionalTensor &bn2_weight, \
      const OptionalTensor &bn2_bias, const OptionalTensor &bn3_weight, const OptionalTensor &bn3_bias
#define TFNAS_COLLECTED                                                                                   \
  collect(conv_pw, conv_dw, conv_pwl, se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias, \
          bn1_weight, bn1_bias, bn2_weight, bn2_bias, bn3_weight, bn3_bias)

std::string_view view(c10::string_view text) { return {text.data(), text.size()}; }

std::tuple<Tensor, Tensor, Tensor> mbinvres(const Tensor& x, TFNAS_WEIGHTS, int64_t stride,
                                            c10::string_view act, bool residual, int64_t width, double eps,
                                            c10::string_view design, OptionalText se_act,
                                            c10::string_view se_gate) {
  Weights w = TFNAS_COLLECTED;
  const Options options{
      stride, view(act), residual, width, eps, view(design), view(se_act.value_or(act)), view(se_gate)};
  check(x, w, options);
  check_training(x, options);
  make_contiguous(w, compute_type(x));
  return with_element(x, [&](auto element) { return forward<decltype(element)>(x, w, options); });
}

using FourteenTensors = decltype(std::tuple_cat(Gradients{}));

FourteenTensors mbinvres_backward(const Tensor& dout, const Tensor& x, const Tensor& saved, TFNAS_WEIGHTS,
                                  int64_t stride, c10::string_view act, bool residual, int64_t width,
                                  double eps, c10::string_view design, OptionalText se_act,
                                  c10::string_view se_gate, std::array<bool, 14> output_mask) {
  Weights w = TFNAS_COLLECTED;
  const Options options{
      stride, view(act), residual, width, eps, view(design), view(se_act.value_or(act)), view(se_gate)};
  check(x, w, options);
  check_training(x, options);
  check_tensor(dout, "dout",
               {x.size(0), w.conv_pwl.size(0), halved(x.size(2), stride), halved(x.size(3), stride)}, x);
  TORCH_CHECK_TYPE(dout.scalar_type() == x.scalar_type(), "dout must be ", x.scalar_type(), " as x is, got ",
                   dout.scalar_type());
  Weights given = w;
  make_contiguous(w, compute_type(x));
  Gradients grads = with_element(
      x, [&](auto element) { return backward<decltype(element)>(dout, x, saved, w, options, output_mask); });
  for (size_t i = 1; i < grads.size(); ++i)
    if (grads[i].defined()) grads[i] = grads[i].to(given.in_order()[i - 1]->scalar_type());
  return std::tuple_cat(grads);
}

Tensor mbinvres_inference(const Tensor& x, TFNAS_WEIGHTS, const OptionalTensor& mean1,
                          const OptionalTensor& var1, const Tensor& mean2, const Tensor& var2,
                          const Tensor& mean3, const Tensor& var3, int64_t stride, c10::string_view act,
                          bool residual, int64_t width, double eps, OptionalText se_act,
                          c10::string_view se_gate) {
  Weights w = TFNAS_COLLECTED;
  const Options options{stride,       view(act), residual, width, eps, "auto", view(se_act.value_or(act)),
                        view(se_gate)};
  check(x, w, options);
  const int64_t mid = conv_dw.size(0), out = conv_pwl.size(0);
  TORCH_CHECK_VALUE(!w.conv_pw.defined() || (mean1 && var1), "mean1 and var1 must be given with conv_pw");
  const Tensor means[3] = {value(mean1), mean2, mean3}, vars[3] = {value(var1), var2, var3};
  const char* names[3][2] = {{"mean1", "var1"}, {"mean2", "var2"}, {"mean3", "var3"}};
  Tensor mean_views[3], var_views[3];
  for (int i = 0; i < 3; ++i) {
    check_tensor(means[i], names[i][0], {i < 2 ? mid : out}, x);
    check_tensor(vars[i], names[i][1], {i < 2 ? mid : out}, x);
    if (!means[i].defined()) continue;
    mean_views[i] = means[i].to(compute_type(x)).contiguous();
    var_views[i] = vars[i].to(compute_type(x)).contiguous();
  }
  make_contiguous(w, compute_type(x));
  return with_element(
      x, [&](auto element) { return inference<decltype(element)>(x, w, mean_views, var_views, options); });
}

constexpr char kWeights[] =
    "Tensor? conv_pw, Tensor conv_dw, Tensor conv_pwl, Tensor? se_reduce_weight, Tensor? se_reduce_bias, "
    "Tensor? se_expand_weight, Tensor? se_expand_bias, Tensor? bn1_weight, Tensor? bn1_bias, Tensor? "
    "bn2_weight, "
    "Tensor? bn2_bias, Tensor? bn3_weight, Tensor? bn3_bias, ";
constexpr char kGradients[] =
    "(Tensor dx, Tensor dconv_pw, Tensor dconv_dw, Tensor dconv_pwl, Tensor dse_reduce_weight, Tensor "
    "dse_reduce_bias, Tensor dse_expand_weight, Tensor dse_expand_bias, Tensor dbn1_weight, Tensor "
    "dbn1_bias, "
    "Tensor dbn2_weight, Tensor dbn2_bias, Tensor dbn3_weight, Tensor dbn3_bias)";
constexpr char kOptions[] = "int stride, str act, bool residual, SymInt width, float eps";

}  // namespace

TORCH_LIBRARY_FRAGMENT(tfnas, m) {
  const std::string weights = kWeights, options = kOptions,
                    squeeze = ", str? se_act=None, str se_gate='sigmoid'";
  const std::string training = "mbinvres(Tensor x, " + weights + options + ", str design='auto'" + squeeze +
                               ") -> (Tensor out, Tensor statistics, Tensor saved)";
  const std::string backward = "mbinvres_backward(Tensor dout, Tensor x, Tensor saved, " + weights + options +
                               ", str design, str? se_act, str se_gate, bool[14] output_mask) -> " +
                               kGradients;
  const std::string inference =
      "mbinvres_inference(Tensor x, " + weights +
      "Tensor? mean1, Tensor? var1, Tensor mean2, Tensor var2, Tensor mean3, Tensor var3, " + options +
      squeeze + ") -> Tensor";
  m.def(training.c_str());
  m.def(backward.c_str());
  m.def(inference.c_str());
}

TORCH_LIBRARY_IMPL(tfnas, CPU, m) {
  m.impl("mbinvres", mbinvres);
  m.impl("mbinvres_backward", mbinvres_backward);
  m.impl("mbinvres_inference", mbinvres_inference);
}

}  // namespace tfnas
