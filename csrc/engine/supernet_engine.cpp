#include "engine/supernet_engine.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>

#include "engine/body_runner.h"
#include "engine/tape.h"

namespace tfnas {
namespace {

// f(an element) for the element that activations are made of.
template <class F>
auto with_element(const at::Tensor& tensor, F&& f) {
  if (tensor.scalar_type() == at::kDouble) return f(double{});
  if (tensor.scalar_type() == at::kBFloat16) return f(BFloat16{});
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, "x must be float32, float64 or bfloat16, got ",
                   tensor.scalar_type());
  return f(float{});
}

template <class E>
const E* elements_of(const at::Tensor& tensor) {
  return static_cast<const E*>(tensor.const_data_ptr());
}
template <class E>
E* mutable_elements_of(const std::optional<at::Tensor>& tensor) {
  return tensor ? static_cast<E*>(tensor->mutable_data_ptr()) : nullptr;
}

at::Tensor channels_last(const at::Tensor& tensor) {
  return tensor.contiguous(at::MemoryFormat::ChannelsLast);
}

void check_use(Tape& tape, size_t bodies, size_t douts) {
  TORCH_CHECK(!tape.impl->used, "a tape can be used once; run the forward again");
  TORCH_CHECK_VALUE(bodies == douts, "expected ", bodies, " output gradients, got ", douts);
  tape.impl->used = true;
}

}  // namespace

Tape::Tape(std::shared_ptr<TapePool> pool) : impl(std::make_unique<Impl>()), pool_(std::move(pool)) {
  impl->memory = pool_->get();
}
Tape::~Tape() { pool_->put(std::move(impl->memory)); }

SupernetEngine::SupernetEngine(BodySpec spec) : spec_(std::move(spec)), pool_(std::make_shared<TapePool>()) {
  for (LayerSpec& layer : spec_.layers) {
    TORCH_CHECK_VALUE(layer.candidates.size() <= kMaxCandidates, "a layer has at most ", kMaxCandidates,
                      " candidates, got ", layer.candidates.size());
    for (CandidateSpec& candidate : layer.candidates) candidate.width = candidate.max_width;
  }
}

void SupernetEngine::set_widths(const std::vector<std::vector<int64_t>>& widths) {
  TORCH_CHECK_VALUE(widths.size() == spec_.layers.size(), "widths must have ", spec_.layers.size(),
                    " rows, got ", widths.size());
  for (size_t l = 0; l < widths.size(); ++l) {
    std::vector<CandidateSpec>& candidates = spec_.layers[l].candidates;
    TORCH_CHECK_VALUE(widths[l].size() == candidates.size(), "widths[", l, "] must have ", candidates.size(),
                      " entries, got ", widths[l].size());
    for (size_t i = 0; i < candidates.size(); ++i) {
      const int64_t low = candidates[i].skips() ? 0 : 1;
      TORCH_CHECK_VALUE(widths[l][i] >= low && widths[l][i] <= candidates[i].max_width, "widths[", l, "][", i,
                        "] must be in ", low, "..", candidates[i].max_width, ", got ", widths[l][i]);
      candidates[i].width = widths[l][i];
    }
  }
}

std::vector<std::vector<int64_t>> SupernetEngine::widths() const {
  std::vector<std::vector<int64_t>> result;
  for (const LayerSpec& layer : spec_.layers) {
    result.emplace_back();
    for (const CandidateSpec& candidate : layer.candidates) result.back().push_back(candidate.width);
  }
  return result;
}

std::pair<std::vector<at::Tensor>, std::shared_ptr<Tape>> SupernetEngine::forward_paths(
    const Weights& weights, const at::Tensor& input, const std::vector<std::vector<int64_t>>& choices,
    const Matrix& v, bool with_tape) {
  auto tape = std::make_shared<Tape>(pool_);
  Tape::Impl& impl = *tape->impl;
  impl.x = channels_last(input);
  impl.choices = choices, impl.v = v;
  impl.bodies.resize(choices.size());
  std::vector<at::Tensor> outs;
  const int64_t batch = impl.x.size(0), height = impl.x.size(2), width = impl.x.size(3);
  with_element(impl.x, [&](auto element) {
    using E = decltype(element);
    const BodyRunner<E> runner(spec_, weights);
    const auto chooser = [&](size_t p) {
      return [this, &path = choices[p]](int64_t l) {
        const LayerSpec& layer = spec_.layers[l];
        if (layer.candidates[path[l]].skips()) return LayerChoice{{}, {}, 1};
        return LayerChoice{{path[l]}, {}, layer.residual ? 1.0 : 0.0};
      };
    };
    int64_t bytes = 0;
    for (size_t p = 0; p < choices.size(); ++p) bytes += runner.kept_bytes(batch, height, width, chooser(p));
    if (with_tape) impl.memory->reserve(bytes);
    for (size_t p = 0; p < choices.size(); ++p) {
      outs.push_back(output_like(impl.x));
      runner.forward(elements_of<E>(impl.x), batch, height, width, chooser(p), v, with_tape, *impl.memory,
                     impl.bodies[p], mutable_elements_of<E>(outs.back()));
      if (!with_tape) impl.memory->release(0);
    }
  });
  return {outs, with_tape ? tape : nullptr};
}

std::optional<at::Tensor> SupernetEngine::backward_paths(const Weights& weights, Tape& tape,
                                                         const std::vector<at::Tensor>& douts, bool need_dx) {
  Tape::Impl& impl = *tape.impl;
  check_use(tape, impl.bodies.size(), douts.size());
  plan_gradients(impl.choices, weights.front().options());
  std::optional<at::Tensor> dx;
  if (need_dx) dx = at::empty_like(impl.x);
  for (size_t p = impl.bodies.size(); p-- > 0;) {  // the last one lies on top of the tape's memory
    const at::Tensor dout = channels_last(douts[p]);
    with_element(impl.x, [&](auto element) {
      using E = decltype(element);
      using T = Compute<E>;
      // entries_ are in order of path, layer and role
      T* buffer = buffers_[p].mutable_data_ptr<T>();
      std::vector<CandidateGradient<T>> gradients(spec_.layers.size());
      std::vector<bool> wanted(spec_.layers.size(), false);
      for (const GradientEntry& entry : entries_) {
        if (entry.path != static_cast<int64_t>(p)) continue;
        const LayerSpec& layer = spec_.layers[entry.layer];
        const CandidateSpec& candidate = layer.candidates[entry.candidate];
        CandidateGradient<T>& gradient = gradients[entry.layer];
        T* at = buffer + entry.offset;
        wanted[entry.layer] = true;
        switch (entry.role) {
          case kExpand:
            gradient.expand = {at, layer.in_channels, 1};
            break;
          case kDepthwise:
            gradient.depthwise = {at, candidate.kernel_size * candidate.kernel_size, 1};
            break;
          case kProject:
            gradient.project = {at, layer.out_channels, 1};
            break;
          case kSeReduceWeight:
            gradient.se_reduce = {at, candidate.se_channels, 1};
            break;
          case kSeReduceBias:
            gradient.se_reduce_bias = at;
            break;
          case kSeExpandWeight:
            gradient.se_expand = {at, candidate.se_channels, 1};
            break;
          default:
            gradient.se_expand_bias = at;
            break;
        }
      }
      BodyRunner<E>(spec_, weights)
          .backward(
              impl.x.size(0), impl.bodies[p], *impl.memory, impl.v, elements_of<E>(dout),
              mutable_elements_of<E>(dx), p + 1 < impl.bodies.size(),
              [&](int64_t l) { return wanted[l] ? &gradients[l] : nullptr; }, nullptr, nullptr);
    });
  }
  merge_shared_gradients();
  pending_ = true;
  return dx;
}

std::pair<at::Tensor, std::shared_ptr<Tape>> SupernetEngine::forward_mixture(const Weights& weights,
                                                                             const at::Tensor& input,
                                                                             const Matrix& u, const Matrix& v,
                                                                             bool with_tape) {
  auto tape = std::make_shared<Tape>(pool_);
  Tape::Impl& impl = *tape->impl;
  impl.x = channels_last(input);
  impl.u = u, impl.v = v;
  impl.bodies.resize(1);
  at::Tensor out = output_like(impl.x);
  with_element(impl.x, [&](auto element) {
    using E = decltype(element);
    const auto choose = [&](int64_t l) {
      LayerChoice choice;
      const LayerSpec& layer = spec_.layers[l];
      for (size_t i = 0; i < layer.candidates.size(); ++i) {
        const bool skips = layer.candidates[i].skips();
        if (skips || layer.residual) choice.direct += u[l][i];
        if (skips) continue;
        choice.candidates.push_back(static_cast<int64_t>(i));
        choice.mix.push_back(u[l][i]);
      }
      return choice;
    };
    const BodyRunner<E> runner(spec_, weights);
    const int64_t batch = impl.x.size(0), height = impl.x.size(2), width = impl.x.size(3);
    if (with_tape) impl.memory->reserve(runner.kept_bytes(batch, height, width, choose));
    runner.forward(elements_of<E>(impl.x), batch, height, width, choose, v, with_tape, *impl.memory,
                   impl.bodies[0], mutable_elements_of<E>(out));
  });
  return {out, with_tape ? tape : nullptr};
}

std::tuple<std::optional<at::Tensor>, SupernetEngine::Matrix, SupernetEngine::Matrix>
SupernetEngine::backward_mixture(const Weights& weights, Tape& tape, const at::Tensor& dout_any,
                                 bool need_dx) {
  Tape::Impl& impl = *tape.impl;
  check_use(tape, impl.bodies.size(), 1);
  std::optional<at::Tensor> dx;
  if (need_dx) dx = at::empty_like(impl.x);
  Matrix du, dv;
  for (const auto& row : impl.u) du.emplace_back(row.size(), 0.0);
  for (const auto& row : impl.v) dv.emplace_back(row.size(), 0.0);
  const at::Tensor dout = channels_last(dout_any);
  with_element(impl.x, [&](auto element) {
    using E = decltype(element);
    BodyRunner<E>(spec_, weights)
        .backward(
            impl.x.size(0), impl.bodies[0], *impl.memory, impl.v, elements_of<E>(dout),
            mutable_elements_of<E>(dx), false,
            [](int64_t) { return static_cast<const CandidateGradient<Compute<E>>*>(nullptr); }, &du, &dv);
  });
  return {dx, du, dv};
}

int64_t SupernetEngine::memory_bytes() const { return pool_->bytes(); }

at::Tensor SupernetEngine::output_like(const at::Tensor& x) const {
  int64_t height = x.size(2), width = x.size(3);
  for (const LayerSpec& layer : spec_.layers)
    height = (height + layer.stride - 1) / layer.stride, width = (width + layer.stride - 1) / layer.stride;
  return at::empty({x.size(0), spec_.layers.back().out_channels, height, width},
                   x.options().memory_format(at::MemoryFormat::ChannelsLast));
}

}  // namespace tfnas
