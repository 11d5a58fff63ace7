// Operators tfnas::sample_paths, tfnas::uniforms and tfnas::gumbel_noise.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <string_view>

#include "cpu/sampling.h"
#include "kernels/draw_key.h"

#if TFNAS_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/sampling.h"
#endif

namespace tfnas {
namespace {

constexpr int64_t kMaxLayers = int64_t{1} << 24;  // the layer's share of Philox's counter

SecondPath parse_second(std::string_view second) {
  if (second == "none") return SecondPath::none;
  if (second == "random") return SecondPath::random;
  if (second == "gumbel") return SecondPath::gumbel;
  if (second == "min") return SecondPath::min;
  if (second == "max") return SecondPath::max;
  TORCH_CHECK_VALUE(false, "second must be one of none, random, gumbel, min, max, got '", second, "'");
}

void check_counter(int64_t seed, int64_t step) {
  TORCH_CHECK_VALUE(seed >= 0, "seed must be in [0, 2**63), got ", seed);
  TORCH_CHECK_VALUE(step >= 0, "step must be in [0, 2**63), got ", step);
}

void check_size(int64_t layers, int64_t candidates) {
  TORCH_CHECK_VALUE(layers >= 1 && layers <= kMaxLayers, "the number of layers must be in [1, 2**24], got ",
                    layers);
  TORCH_CHECK_VALUE(candidates >= 1 && candidates <= kMaxLayers,
                    "the number of candidates must be in [1, 2**24], got ", candidates);
}

// The arguments of sample_paths once checked, log_alpha as float64.
struct Request {
  at::Tensor log_alpha, valid, choice;
  DrawKey key;
  SecondPath second;

  int64_t layers() const { return log_alpha.size(0); }
  int64_t candidates() const { return log_alpha.size(1); }
  const double* log_alpha_data() const { return log_alpha.const_data_ptr<double>(); }
  const bool* valid_data() const { return valid.defined() ? valid.const_data_ptr<bool>() : nullptr; }
};

// Checks everything but values, which may lie on a device.
Request check_request(const at::Tensor& log_alpha, const DrawKey& key, c10::string_view second,
                      const std::optional<at::Tensor>& valid_mask) {
  TORCH_CHECK_VALUE(log_alpha.dim() == 2, "log_alpha must be [layers, candidates], got shape ",
                    log_alpha.sizes());
  TORCH_CHECK_TYPE(log_alpha.scalar_type() == at::kFloat || log_alpha.scalar_type() == at::kDouble,
                   "log_alpha must be float32 or float64, got ", log_alpha.scalar_type());
  check_size(log_alpha.size(0), log_alpha.size(1));
  const SecondPath mode = parse_second(std::string_view(second.data(), second.size()));
  at::Tensor valid;
  if (valid_mask) {
    TORCH_CHECK_TYPE(valid_mask->scalar_type() == at::kBool, "valid_mask must be bool, got ",
                     valid_mask->scalar_type());
    TORCH_CHECK_VALUE(valid_mask->sizes() == log_alpha.sizes(), "valid_mask must have log_alpha's shape ",
                      log_alpha.sizes(), ", got ", valid_mask->sizes());
    TORCH_CHECK_VALUE(valid_mask->device() == log_alpha.device(), "valid_mask must be on ",
                      log_alpha.device(), " as log_alpha is, got ", valid_mask->device());
    valid = valid_mask->contiguous();
  }
  const int64_t paths = mode == SecondPath::none ? 1 : 2;
  return {log_alpha.to(at::kDouble).contiguous(), valid,
          at::empty({paths, log_alpha.size(0)}, log_alpha.options().dtype(at::kLong)), key, mode};
}

void check_values(const Request& request) {
  const double* log_alpha = request.log_alpha_data();
  const bool* usable = request.valid_data();
  for (int64_t l = 0; l < request.layers(); ++l) {
    bool any = false;
    for (int64_t c = 0; c < request.candidates(); ++c) {
      const int64_t i = l * request.candidates() + c;
      if (usable != nullptr && !usable[i]) continue;
      any = true;
      TORCH_CHECK_VALUE(std::isfinite(log_alpha[i]), "log_alpha[", l, ", ", c, "] is ", log_alpha[i],
                        "; every valid candidate needs a finite log-probability");
    }
    TORCH_CHECK_VALUE(any, "valid_mask leaves layer ", l, " without a candidate");
  }
}

DrawKey given_key(double tau, int64_t seed, int64_t step) {
  check_counter(seed, step);
  TORCH_CHECK_VALUE(std::isfinite(tau) && tau > 0, "tau must be a positive, finite temperature, got ", tau);
  return {static_cast<uint64_t>(seed), static_cast<uint64_t>(step), tau, nullptr, nullptr};
}

// A key that lies in the memory of `device`, as the tensors `clock` and `tau` (may be undefined).
DrawKey stored_key(const at::Tensor& clock, const at::Tensor& tau, at::Device device) {
  TORCH_CHECK_VALUE(clock.dim() == 1 && clock.size(0) == 2 && clock.scalar_type() == at::kLong &&
                        clock.is_contiguous() && clock.device() == device,
                    "clock must be int64 [2] (seed, step) on ", device, ", got ", clock.scalar_type(), " ",
                    clock.sizes(), " on ", clock.device());
  DrawKey key{0, 0, 1.0, clock.const_data_ptr<int64_t>(), nullptr};
  if (tau.defined()) {
    TORCH_CHECK_VALUE(tau.dim() == 0 && tau.scalar_type() == at::kDouble && tau.device() == device,
                      "tau must be a float64 0-d tensor on ", device, ", got ", tau.scalar_type(), " ",
                      tau.sizes(), " on ", tau.device());
    key.tau_at = tau.const_data_ptr<double>();
  }
  return key;
}

at::Tensor sample_on_host(const Request& r) {
  check_values(r);
  sample_paths_cpu(r.log_alpha_data(), r.valid_data(), r.layers(), r.candidates(), r.key.tau, r.key.seed,
                   r.key.step, r.second, r.choice.mutable_data_ptr<int64_t>());
  return r.choice;
}

at::Tensor sample_paths(const at::Tensor& log_alpha, double tau, int64_t seed, int64_t step,
                        c10::string_view second, const std::optional<at::Tensor>& valid_mask) {
  return sample_on_host(check_request(log_alpha, given_key(tau, seed, step), second, valid_mask));
}

at::Tensor sample_paths_at(const at::Tensor& log_alpha, const at::Tensor& tau, const at::Tensor& clock,
                           c10::string_view second, const std::optional<at::Tensor>& valid_mask) {
  const DrawKey key = stored_key(clock, tau, log_alpha.device()).resolved();
  const auto seed = static_cast<int64_t>(key.seed), step = static_cast<int64_t>(key.step);
  return sample_on_host(check_request(log_alpha, given_key(key.tau, seed, step), second, valid_mask));
}

#if TFNAS_WITH_CUDA
at::Tensor sample_on_device(const Request& r) {
  sample_paths_cuda(r.log_alpha_data(), r.valid_data(), r.layers(), r.candidates(), r.key, r.second,
                    r.choice.mutable_data_ptr<int64_t>(), c10::cuda::getCurrentCUDAStream());
  return r.choice;
}

at::Tensor sample_paths_on_device(const at::Tensor& log_alpha, double tau, int64_t seed, int64_t step,
                                  c10::string_view second, const std::optional<at::Tensor>& valid_mask) {
  const c10::cuda::CUDAGuard guard(log_alpha.device());
  return sample_on_device(check_request(log_alpha, given_key(tau, seed, step), second, valid_mask));
}

at::Tensor sample_paths_at_on_device(const at::Tensor& log_alpha, const at::Tensor& tau,
                                     const at::Tensor& clock, c10::string_view second,
                                     const std::optional<at::Tensor>& valid_mask) {
  const c10::cuda::CUDAGuard guard(log_alpha.device());
  return sample_on_device(
      check_request(log_alpha, stored_key(clock, tau, log_alpha.device()), second, valid_mask));
}
#endif

// Numbers of one stream, float64 [layers, candidates] on `device`.
at::Tensor empty_numbers(int64_t layers, int64_t candidates, int64_t seed, int64_t step, int64_t path,
                         at::Device device) {
  check_size(layers, candidates);
  check_counter(seed, step);
  TORCH_CHECK_VALUE(path >= 0 && path <= 2, "path must be 0 (first), 1 (second) or 2 (mixture), got ", path);
  return at::empty({layers, candidates}, at::TensorOptions().dtype(at::kDouble).device(device));
}

at::Tensor uniforms(int64_t layers, int64_t candidates, int64_t seed, int64_t step, int64_t path) {
  const at::Tensor out = empty_numbers(layers, candidates, seed, step, path, at::kCPU);
  uniforms_cpu(layers, candidates, static_cast<uint64_t>(seed), static_cast<uint64_t>(step),
               static_cast<Stream>(path), out.mutable_data_ptr<double>());
  return out;
}

at::Tensor noise_on(at::Device device, int64_t layers, int64_t candidates, const DrawKey& key, int64_t path) {
#if TFNAS_WITH_CUDA
  if (device.is_cuda()) {
    const c10::cuda::CUDAGuard guard(device);
    const at::Tensor out = empty_numbers(layers, candidates, 0, 0, path, device);
    gumbel_noise_cuda(layers, candidates, key, static_cast<Stream>(path), out.mutable_data_ptr<double>(),
                      c10::cuda::getCurrentCUDAStream());
    return out;
  }
#endif
  TORCH_CHECK_VALUE(device.is_cpu(), "gumbel_noise has no kernel for device ", device, " in this build");
  const DrawKey now = key.resolved();
  const at::Tensor out = empty_numbers(layers, candidates, static_cast<int64_t>(now.seed),
                                       static_cast<int64_t>(now.step), path, device);
  gumbel_noise_cpu(layers, candidates, now.seed, now.step, static_cast<Stream>(path),
                   out.mutable_data_ptr<double>());
  return out;
}

at::Tensor gumbel_noise(int64_t layers, int64_t candidates, int64_t seed, int64_t step, int64_t path,
                        at::Device device) {
  return noise_on(device, layers, candidates, given_key(1.0, seed, step), path);
}

at::Tensor gumbel_noise_at(int64_t layers, int64_t candidates, const at::Tensor& clock, int64_t path) {
  return noise_on(clock.device(), layers, candidates, stored_key(clock, {}, clock.device()), path);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tfnas, m) {
  m.def(
      "sample_paths(Tensor log_alpha, float tau, int seed, int step, str second, Tensor? valid_mask=None) -> "
      "Tensor");
  m.def("uniforms(int layers, int candidates, int seed, int step, int path) -> Tensor");
  m.def("gumbel_noise(int layers, int candidates, int seed, int step, int path, Device device) -> Tensor");
  // The same with (seed, step) as int64 [2] and tau as float64 [] in the memory of the device.
  m.def(
      "sample_paths_at(Tensor log_alpha, Tensor tau, Tensor clock, str second, Tensor? valid_mask=None) -> "
      "Tensor");
  m.def("gumbel_noise_at(int layers, int candidates, Tensor clock, int path) -> Tensor");
}

TORCH_LIBRARY_IMPL(tfnas, CPU, m) {
  m.impl("sample_paths", &sample_paths);
  m.impl("sample_paths_at", &sample_paths_at);
}

#if TFNAS_WITH_CUDA
TORCH_LIBRARY_IMPL(tfnas, CUDA, m) {
  m.impl("sample_paths", &sample_paths_on_device);
  m.impl("sample_paths_at", &sample_paths_at_on_device);
}
#endif

TORCH_LIBRARY_IMPL(tfnas, CompositeExplicitAutograd, m) {
  m.impl("uniforms", &uniforms);
  m.impl("gumbel_noise", &gumbel_noise);
  m.impl("gumbel_noise_at", &gumbel_noise_at);
}

}  // namespace tfnas
