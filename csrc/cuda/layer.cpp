// Launchers of the layer's kernels: tensors in, device guard and current stream, scratch from torch's
// allocator, and a check after the launches. Nothing here waits for the device.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "cuda/arguments.h"
#include "cuda/device.h"

namespace tfnas::cuda {
namespace {

using at::Tensor;

enum Role {
  kExpandRole,
  kDepthwiseRole,
  kProjectRole,
  kSeReduceWeight,
  kSeReduceBias,
  kSeExpandWeight,
  kSeExpandBias
};

int parse_act(std::string_view act) {
  if (act == "relu") return kRelu;
  if (act == "relu6") return kRelu6;
  if (act == "swish") return kSwish;
  if (act == "hard_swish") return kHardSwish;
  TORCH_CHECK_VALUE(false, "act must be one of relu, relu6, swish, hard_swish, got '", act, "'");
}

LayerTable read_table(const Tensor& table) {
  TORCH_CHECK_VALUE(table.dim() == 2 && table.size(1) == 8 && table.scalar_type() == at::kLong &&
                        table.is_cpu() && table.is_contiguous(),
                    "table must be a contiguous int64 [C, 8] on the CPU, got shape ", table.sizes());
  TORCH_CHECK_VALUE(table.size(0) >= 1 && table.size(0) <= kMaxCandidates, "table must have 1 to ",
                    kMaxCandidates, " candidates, got ", table.size(0));
  LayerTable out{};
  const int64_t* row = table.const_data_ptr<int64_t>();
  for (; out.count < table.size(0); row += 8) {
    TORCH_CHECK_VALUE(row[0] == 3 || row[0] == 5 || row[0] == 7, "table: kernel sizes are 3, 5 or 7, got ",
                      row[0]);
    TORCH_CHECK_VALUE(row[3] >= 1, "table: widths must be at least 1, got ", row[3]);
    CandidateRows& rows = out.candidate[out.count++];
    int* fields[8] = {
        &rows.kernel_size, &rows.first_row,    &rows.depthwise_at,      &rows.width,
        &rows.se_channels, &rows.se_weight_at, &rows.se_reduce_bias_at, &rows.se_expand_bias_at};
    for (int i = 0; i < 8; i++) {
      TORCH_CHECK_VALUE(row[i] >= 0 && row[i] < int64_t{1} << 31, "table: column ", i,
                        " must not be negative, got ", row[i]);
      *fields[i] = static_cast<int>(row[i]);
    }
  }
  return out;
}

// A copy of the table in device memory, as bytes. Between epochs only: the copy may wait.
Tensor layer_table(const Tensor& table, c10::Device device) {
  const LayerTable host = read_table(table);
  Tensor bytes = at::empty({static_cast<int64_t>(sizeof(host))}, at::TensorOptions().dtype(at::kByte));
  std::memcpy(bytes.mutable_data_ptr(), &host, sizeof(host));
  return bytes.to(device);
}

template <class T>
struct Scalar;
template <>
struct Scalar<float> {
  static constexpr auto type = at::kFloat, accumulator = at::kFloat;
};
template <>
struct Scalar<double> {
  static constexpr auto type = at::kDouble, accumulator = at::kDouble;
};
template <>
struct Scalar<__nv_bfloat16> {
  static constexpr auto type = at::kBFloat16, accumulator = at::kFloat;
};

// What both directions take, checked once.
struct Call {
  const Tensor& x;
  at::TensorList weights;
  const Tensor &table, &device_table;
  const std::optional<Tensor>&choice, &u;
  int64_t stride;
  std::string_view act;
  bool residual;
  double eps;
};

// The weights hold all rows that the table names.
void check_weights(const Call& c, const LayerTable& table) {
  const int64_t channels = c.x.size(1);
  const Tensor &expand = c.weights[kExpandRole], &project = c.weights[kProjectRole];
  TORCH_CHECK_VALUE(expand.numel() == 0 || (expand.dim() == 2 && expand.size(1) == channels),
                    "expand must be [rows, ", channels, "] as x has ", channels, " channels, got ",
                    expand.sizes());
  TORCH_CHECK_VALUE(project.dim() == 2 && project.size(1) >= 1, "project must be [rows, channels], got ",
                    project.sizes());
  const int64_t outs = project.size(1);
  TORCH_CHECK_VALUE(!c.residual || (c.stride == 1 && outs == channels),
                    "residual needs stride 1 and as many output as input channels, got stride ", c.stride,
                    ", ", channels, " and ", outs);
  for (int i = 0; i < table.count; i++) {
    const CandidateRows& rows = table.candidate[i];
    const int64_t end = int64_t{rows.first_row} + rows.width, taps = rows.kernel_size * rows.kernel_size;
    if (expand.numel() > 0) check_elements(expand, "expand", end * channels);
    check_elements(c.weights[kDepthwiseRole], "depthwise", rows.depthwise_at + rows.width * taps);
    check_elements(project, "project", end * outs);
    if (rows.se_channels == 0) continue;
    const int64_t weights = rows.se_weight_at + int64_t{rows.width} * rows.se_channels;
    check_elements(c.weights[kSeReduceWeight], "se_reduce_weight", weights);
    check_elements(c.weights[kSeReduceBias], "se_reduce_bias", rows.se_reduce_bias_at + rows.se_channels);
    check_elements(c.weights[kSeExpandWeight], "se_expand_weight", weights);
    check_elements(c.weights[kSeExpandBias], "se_expand_bias", rows.se_expand_bias_at + rows.width);
  }
}

template <class T>
LayerArgs<T> make_args(const Call& c, const DeviceScope& device) {
  using A = Acc<T>;
  constexpr auto accumulator = Scalar<T>::accumulator;
  const char* names[7] = {"expand",         "depthwise",        "project",       "se_reduce_weight",
                          "se_reduce_bias", "se_expand_weight", "se_expand_bias"};
  TORCH_CHECK_VALUE(c.x.dim() == 4 && c.x.numel() > 0, "x must be a non-empty [N, C, H, W], got ",
                    c.x.sizes());
  TORCH_CHECK_VALUE(c.x.is_contiguous(at::MemoryFormat::ChannelsLast), "x must be channels_last");
  TORCH_CHECK_VALUE(c.x.numel() < int64_t{1} << 31, "x has ", c.x.numel(),
                    " elements, at most 2^31 - 1 are supported");
  TORCH_CHECK_VALUE(c.weights.size() == 7, "weights must be seven tensors, got ", c.weights.size());
  for (int i = 0; i < 7; i++) check_tensor(c.weights[i], names[i], c.x.device(), accumulator);
  TORCH_CHECK_VALUE(c.stride == 1 || c.stride == 2, "stride must be 1 or 2, got ", c.stride);
  LayerArgs<T> a{};
  a.host_table = read_table(c.table);
  check_weights(c, a.host_table);
  TORCH_CHECK_VALUE(c.device_table.device() == c.x.device() && c.device_table.numel() == sizeof(LayerTable),
                    "device_table must be what _layer_table made for ", c.x.device(), ", got ",
                    c.device_table.numel(), " bytes on ", c.device_table.device());
  a.table = reinterpret_cast<const LayerTable*>(c.device_table.const_data_ptr());
  if (c.choice) {
    check_tensor(*c.choice, "choice", c.x.device(), at::kInt);
    TORCH_CHECK_VALUE(c.choice->numel() == 1, "choice must be one number, got ", c.choice->sizes());
    a.choice = c.choice->const_data_ptr<int>();
  }
  if (c.u) {
    check_tensor(*c.u, "u", c.x.device(), accumulator);
    check_elements(*c.u, "u", a.host_table.count);
    a.u = c.u->const_data_ptr<A>();
  }
  TORCH_CHECK_VALUE(c.choice.has_value() != c.u.has_value(),
                    "give choice (one candidate) or u (the mixture), not both");
  a.batch = static_cast<int>(c.x.size(0)), a.in_channels = static_cast<int>(c.x.size(1));
  a.height = static_cast<int>(c.x.size(2)), a.width = static_cast<int>(c.x.size(3));
  a.out_channels = static_cast<int>(c.weights[kProjectRole].size(1));
  a.stride = static_cast<int>(c.stride), a.act = parse_act(c.act), a.residual = c.residual, a.eps = c.eps;
  a.expand = c.weights[kExpandRole].const_data_ptr<A>();
  a.depthwise = c.weights[kDepthwiseRole].const_data_ptr<A>();
  a.project = c.weights[kProjectRole].const_data_ptr<A>();
  a.se = {c.weights[kSeReduceWeight].const_data_ptr<A>(), c.weights[kSeReduceBias].const_data_ptr<A>(),
          c.weights[kSeExpandWeight].const_data_ptr<A>(), c.weights[kSeExpandBias].const_data_ptr<A>()};
  if (!a.expand) {
    TORCH_CHECK_VALUE(a.host_table.count == 1 && a.host_table.candidate[0].width == a.in_channels,
                      "a layer without expand weights must have one candidate of x's ", a.in_channels,
                      " channels, got ", a.host_table.count, " candidates, the first of width ",
                      a.host_table.candidate[0].width);
  }
  a.device = device.limits();
  a.stream = device.stream();
  return a;
}

// Calls f with the activations' type and the way products run.
template <class F>
auto dispatch(const Tensor& x, std::string_view math, const DeviceScope& device, F f) {
  if (x.scalar_type() == at::kDouble) return f.template operator()<double, Math::kFma>();
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16,
                   "x must be float32, float64 or bfloat16, got ", x.scalar_type());
  if (x.scalar_type() == at::kBFloat16) {
    TORCH_CHECK_TYPE(device.has_tensor_cores(),
                     "x is bfloat16, which needs a card of compute capability 8.0 or newer");
    return f.template operator()<__nv_bfloat16, Math::kBf16>();
  }
  TORCH_CHECK_VALUE(math == "tf32" || math == "fp32", "math must be tf32 or fp32, got '", math, "'");
  if (!device.has_tensor_cores()) return f.template operator()<float, Math::kFma>();
  return math == "tf32" ? f.template operator()<float, Math::kTf32>()
                        : f.template operator()<float, Math::kTf32x3>();
}

Tensor bytes_like(const Tensor& x, int64_t bytes) { return at::empty({bytes}, x.options().dtype(at::kByte)); }

std::tuple<Tensor, Tensor> layer_forward_op(const Tensor& x, at::TensorList weights, const Tensor& table,
                                            const Tensor& device_table, const std::optional<Tensor>& choice,
                                            const std::optional<Tensor>& u, int64_t stride,
                                            std::string_view act, bool residual, double eps,
                                            std::string_view math) {
  const DeviceScope device(x.device());
  return dispatch(x, math, device, [&]<class T, Math M>() {
    const Call call{x, weights, table, device_table, choice, u, stride, act, residual, eps};
    const LayerArgs<T> args = make_args<T>(call, device);
    TORCH_CHECK_VALUE((layer_fits<T, M>(args)), "layer of ", args.in_channels, " channels at ", args.height,
                      "x", args.width, ": its smallest tile needs more shared memory than the ",
                      args.device.shared_bytes, " bytes a block may have here; choose the engine reference");
    const LayerSizes size(args);
    Tensor out = at::empty({x.size(0), args.out_channels, size.out_height, size.out_width},
                           x.options().memory_format(at::MemoryFormat::ChannelsLast));
    Tensor saved = bytes_like(x, layer_saved_bytes(args));
    Tensor scratch =
        bytes_like(x, layer_forward<T, M>(args, nullptr, nullptr, saved.mutable_data_ptr(), nullptr));
    layer_forward<T, M>(args, static_cast<const T*>(x.const_data_ptr()),
                        static_cast<T*>(out.mutable_data_ptr()), saved.mutable_data_ptr(),
                        scratch.mutable_data_ptr());
    device.check_launches();
    return std::make_tuple(out, saved);
  });
}

std::tuple<Tensor, Tensor> layer_backward_op(const Tensor& x, const Tensor& dout, const Tensor& saved,
                                             at::TensorList weights, const Tensor& table,
                                             const Tensor& device_table, const std::optional<Tensor>& choice,
                                             const std::optional<Tensor>& u, int64_t stride,
                                             std::string_view act, bool residual, double eps,
                                             std::string_view math, bool need_dx, at::TensorList grads) {
  const DeviceScope device(x.device());
  return dispatch(x, math, device, [&]<class T, Math M>() {
    using A = Acc<T>;
    const Call call{x, weights, table, device_table, choice, u, stride, act, residual, eps};
    const LayerArgs<T> args = make_args<T>(call, device);
    const LayerSizes size(args);
    TORCH_CHECK_TYPE(dout.scalar_type() == x.scalar_type(), "dout must be ", x.scalar_type(), ", got ",
                     dout.scalar_type());
    TORCH_CHECK_VALUE(dout.is_contiguous(at::MemoryFormat::ChannelsLast) &&
                          dout.numel() == size.out_pixels * args.out_channels,
                      "dout must be channels_last and as large as the output, got ", dout.sizes());
    check_tensor(saved, "saved", x.device(), at::kByte);
    check_elements(saved, "saved", layer_saved_bytes(args));
    Tensor dx = need_dx ? at::empty_like(x) : at::empty({0}, x.options());
    Tensor du = at::empty({u ? size.slots : 0}, x.options().dtype(Scalar<T>::accumulator));
    LayerGrads<T> out{};
    if (need_dx) out.dx = static_cast<T*>(dx.mutable_data_ptr());
    if (u) out.du = du.mutable_data_ptr<A>();
    if (!grads.empty()) {
      TORCH_CHECK_VALUE(grads.size() == 7, "grads must be seven tensors or none, got ", grads.size());
      const int64_t wanted[3] = {args.expand ? int64_t{size.active} * args.in_channels : 0,
                                 int64_t{size.active} * size.taps, int64_t{size.active} * args.out_channels};
      for (int i = 0; i < 7; i++) {
        check_tensor(grads[i], "grads", x.device(), Scalar<T>::accumulator);
        const int64_t least = i < 3 ? wanted[i] : weights[i].numel();
        TORCH_CHECK_VALUE(grads[i].numel() >= least, "grads[", i, "] must hold ", least, " elements, got ",
                          grads[i].numel());
      }
      A* data[7];
      for (int i = 0; i < 7; i++) data[i] = grads[i].mutable_data_ptr<A>();
      out.expand = data[kExpandRole], out.depthwise = data[kDepthwiseRole], out.project = data[kProjectRole];
      out.se = {data[kSeReduceWeight], data[kSeReduceBias], data[kSeExpandWeight], data[kSeExpandBias]};
    }
    void* saved_data = const_cast<void*>(saved.const_data_ptr());  // only read
    Tensor scratch = bytes_like(x, layer_backward<T, M>(args, nullptr, nullptr, out, saved_data, nullptr));
    layer_backward<T, M>(args, static_cast<const T*>(x.const_data_ptr()),
                         static_cast<const T*>(dout.const_data_ptr()), out, saved_data,
                         scratch.mutable_data_ptr());
    device.check_launches();
    return std::make_tuple(dx, du);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(tfnas, TFNAS_DEVICE_KEY, m) {
  m.impl("_layer_forward", &layer_forward_op);
  m.impl("_layer_backward", &layer_backward_op);
}

TORCH_LIBRARY_IMPL(tfnas, CompositeExplicitAutograd, m) { m.impl("_layer_table", &layer_table); }

}  // namespace tfnas::cuda
