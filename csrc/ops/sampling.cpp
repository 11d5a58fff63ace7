// Operators tfnas::sample_paths, tfnas::uniforms and tfnas::gumbel_noise.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <string_view>

#include "cpu/sampling.h"

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
  double tau;
  uint64_t seed, step;
  SecondPath second;

  int64_t layers() const { return log_alpha.size(0); }
  int64_t candidates() const { return log_alpha.size(1); }
  const double* log_alpha_data() const { return log_alpha.const_data_ptr<double>(); }
  const bool* valid_data() const { return valid.defined() ? valid.const_data_ptr<bool>() : nullptr; }
};

// Checks everything but values, which may lie on a device.
Request check_request(const at::Tensor& log_alpha, double tau, int64_t seed, int64_t step,
                      c10::string_view second, const std::optional<at::Tensor>& valid_mask) {
  TORCH_CHECK_VALUE(log_alpha.dim() == 2, "log_alpha must be [layers, candidates], got shape ",
                    log_alpha.sizes());
  TORCH_CHECK_TYPE(log_alpha.scalar_type() == at::kFloat || log_alpha.scalar_type() == at::kDouble,
                   "log_alpha must be float32 or float64, got ", log_alpha.scalar_type());
  check_size(log_alpha.size(0), log_alpha.size(1));
  check_counter(seed, step);
  TORCH_CHECK_VALUE(std::isfinite(tau) && tau > 0, "tau must be a positive, finite temperature, got ", tau);
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
  return {log_alpha.to(at::kDouble).contiguous(),
          valid,
          at::empty({paths, log_alpha.size(0)}, log_alpha.options().dtype(at::kLong)),
          tau,
          static_cast<uint64_t>(seed),
          static_cast<uint64_t>(step),
          mode};
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

at::Tensor sample_paths(const at::Tensor& log_alpha, double tau, int64_t seed, int64_t step,
                        c10::string_view second, const std::optional<at::Tensor>& valid_mask) {
  const Request r = check_request(log_alpha, tau, seed, step, second, valid_mask);
  check_values(r);
  sample_paths_cpu(r.log_alpha_data(), r.valid_data(), r.layers(), r.candidates(), r.tau, r.seed, r.step,
                   r.second, r.choice.mutable_data_ptr<int64_t>());
  return r.choice;
}

#if TFNAS_WITH_CUDA
at::Tensor sample_paths_on_device(const at::Tensor& log_alpha, double tau, int64_t seed, int64_t step,
                                  c10::string_view second, const std::optional<at::Tensor>& valid_mask) {
  const c10::cuda::CUDAGuard guard(log_alpha.device());
  const Request r = check_request(log_alpha, tau, seed, step, second, valid_mask);
  sample_paths_cuda(r.log_alpha_data(), r.valid_data(), r.layers(), r.candidates(), r.tau, r.seed, r.step,
                    r.second, r.choice.mutable_data_ptr<int64_t>(), c10::cuda::getCurrentCUDAStream());
  return r.choice;
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

at::Tensor gumbel_noise(int64_t layers, int64_t candidates, int64_t seed, int64_t step, int64_t path,
                        at::Device device) {
#if TFNAS_WITH_CUDA
  if (device.is_cuda()) {
    const c10::cuda::CUDAGuard guard(device);
    const at::Tensor out = empty_numbers(layers, candidates, seed, step, path, device);
    gumbel_noise_cuda(layers, candidates, static_cast<uint64_t>(seed), static_cast<uint64_t>(step),
                      static_cast<Stream>(path), out.mutable_data_ptr<double>(),
                      c10::cuda::getCurrentCUDAStream());
    return out;
  }
#endif
  TORCH_CHECK_VALUE(device.is_cpu(), "gumbel_noise has no kernel for device ", device, " in this build");
  const at::Tensor out = empty_numbers(layers, candidates, seed, step, path, device);
  gumbel_noise_cpu(layers, candidates, static_cast<uint64_t>(seed), static_cast<uint64_t>(step),
                   static_cast<Stream>(path), out.mutable_data_ptr<double>());
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tfnas, m) {
  m.def(
      "sample_paths(Tensor log_alpha, float tau, int seed, int step, str second, Tensor? valid_mask=None) -> "
      "Tensor");
  m.def("uniforms(int layers, int candidates, int seed, int step, int path) -> Tensor");
  m.def("gumbel_noise(int layers, int candidates, int seed, int step, int path, Device device) -> Tensor");
}

TORCH_LIBRARY_IMPL(tfnas, CPU, m) { m.impl("sample_paths", &sample_paths); }

#if TFNAS_WITH_CUDA
TORCH_LIBRARY_IMPL(tfnas, CUDA, m) { m.impl("sample_paths", &sample_paths_on_device); }
#endif

TORCH_LIBRARY_IMPL(tfnas, CompositeExplicitAutograd, m) {
  m.impl("uniforms", &uniforms);
  m.impl("gumbel_noise", &gumbel_noise);
}

}  // namespace tfnas
