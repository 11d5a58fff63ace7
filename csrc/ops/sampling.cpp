// Operators tfnas::sample_paths, tfnas::uniforms and tfnas::gumbel_noise.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <string_view>

#include "cpu/sampling.h"

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

at::Tensor sample_paths(const at::Tensor& log_alpha, double tau, int64_t seed, int64_t step,
                        c10::string_view second, const std::optional<at::Tensor>& valid_mask) {
  TORCH_CHECK_VALUE(log_alpha.dim() == 2, "log_alpha must be [layers, candidates], got shape ",
                    log_alpha.sizes());
  TORCH_CHECK_TYPE(log_alpha.scalar_type() == at::kFloat || log_alpha.scalar_type() == at::kDouble,
                   "log_alpha must be float32 or float64, got ", log_alpha.scalar_type());
  const int64_t layers = log_alpha.size(0), candidates = log_alpha.size(1);
  check_size(layers, candidates);
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
  const at::Tensor scores = log_alpha.to(at::kDouble).contiguous();
  const double* score = scores.const_data_ptr<double>();
  const bool* usable = valid.defined() ? valid.const_data_ptr<bool>() : nullptr;
  for (int64_t l = 0; l < layers; ++l) {
    bool any = false;
    for (int64_t i = l * candidates; i < (l + 1) * candidates; ++i) {
      if (usable != nullptr && !usable[i]) continue;
      any = true;
      TORCH_CHECK_VALUE(std::isfinite(score[i]), "log_alpha[", l, ", ", i - l * candidates, "] is ", score[i],
                        "; every valid candidate needs a finite log-probability");
    }
    TORCH_CHECK_VALUE(any, "valid_mask leaves layer ", l, " without a candidate");
  }

  at::Tensor choice =
      at::empty({mode == SecondPath::none ? 1 : 2, layers}, log_alpha.options().dtype(at::kLong));
  sample_paths_cpu(score, usable, layers, candidates, tau, static_cast<uint64_t>(seed),
                   static_cast<uint64_t>(step), mode, choice.mutable_data_ptr<int64_t>());
  return choice;
}

using Fill = void (*)(int64_t, int64_t, uint64_t, uint64_t, Stream, double*);

template <Fill fill>
at::Tensor numbers(int64_t layers, int64_t candidates, int64_t seed, int64_t step, int64_t stream) {
  check_size(layers, candidates);
  check_counter(seed, step);
  TORCH_CHECK_VALUE(stream >= 0 && stream <= 2, "path must be 0 (first), 1 (second) or 2 (mixture), got ",
                    stream);
  at::Tensor out = at::empty({layers, candidates}, at::TensorOptions().dtype(at::kDouble));
  fill(layers, candidates, static_cast<uint64_t>(seed), static_cast<uint64_t>(step),
       static_cast<Stream>(stream), out.mutable_data_ptr<double>());
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tfnas, m) {
  m.def(
      "sample_paths(Tensor log_alpha, float tau, int seed, int step, str second, Tensor? valid_mask=None) -> "
      "Tensor");
  m.def("uniforms(int layers, int candidates, int seed, int step, int path) -> Tensor");
  m.def("gumbel_noise(int layers, int candidates, int seed, int step, int path) -> Tensor");
}

TORCH_LIBRARY_IMPL(tfnas, CPU, m) { m.impl("sample_paths", &sample_paths); }

TORCH_LIBRARY_IMPL(tfnas, CompositeExplicitAutograd, m) {
  m.impl("uniforms", &numbers<uniforms_cpu>);
  m.impl("gumbel_noise", &numbers<gumbel_noise_cpu>);
}

}  // namespace tfnas
