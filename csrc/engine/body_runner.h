// Runs the layers and sinks of a body, forward and backward, activations being float, double or BFloat16.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstring>
#include <vector>

#include "engine/tape.h"
#include "ops/threads.h"

namespace tfnas {

using Rows = std::vector<std::vector<double>>;

// Which candidates of a layer run and with what weights.
struct LayerChoice {
  std::vector<int64_t> candidates;
  std::vector<double> mix;
  double direct = 0;
};

template <class E>
class BodyRunner {
  using T = Compute<E>;  // weights, their gradients, mixing weights

 public:
  BodyRunner(const BodySpec& spec, const std::vector<at::Tensor>& weights)
      : spec_(spec), weights_(weights), threads_(torch_threads()) {}

  // About what `forward` leaves in a tape.
  template <class F>
  int64_t kept_bytes(int64_t batch, int64_t height, int64_t width, F&& choose) const {
    int64_t total = 0;
    for (size_t l = 0; l < spec_.layers.size(); ++l) {
      const LayerSpec& spec = spec_.layers[l];
      LayerTape entry;
      begin(entry, choose(l), height, width);
      height = (height + spec.stride - 1) / spec.stride, width = (width + spec.stride - 1) / spec.stride;
      const int64_t outputs = 2 + spec.gated;  // the layer's, at most one sink's, one behind a gate
      total += outputs * (batch * height * width * spec.out_channels * sizeof(E) + 64);
      if (entry.candidates.empty()) continue;
      std::vector<Candidate<T>> candidates;
      std::vector<T> mix;
      total += layer_kernels_of<E>().saved_bytes(layer_of(l, batch, entry, candidates, mix)) + 64;
    }
    return total;
  }

  // `choose(l)` gives layer l's choice. Writes the last stage's output to `out`; fills `tape` from `memory`.
  // Without `keep` only activations stay, what the kernels save is dropped after each layer.
  template <class F>
  void forward(const E* x, int64_t batch, int64_t height, int64_t width, F&& choose, const Rows& v, bool keep,
               MemoryStack& memory, BodyTape& tape, E* out) const {
    tape.layers.resize(spec_.layers.size());
    int64_t index = 0;
    const E* current = x;
    for (size_t s = 0; s < spec_.depths.size(); ++s) {
      const int64_t first = index;
      int64_t size = 0;
      for (; index < first + spec_.depths[s]; ++index) {
        const LayerSpec& layer = spec_.layers[index];
        LayerTape& entry = tape.layers[index];
        begin(entry, choose(index), height, width);
        entry.input = current;
        height = (height + layer.stride - 1) / layer.stride,
        width = (width + layer.stride - 1) / layer.stride;
        size = batch * height * width * layer.out_channels;
        forward_layer(index, batch, entry, size, keep, memory);
        entry.output = entry.mixed;
        if (layer.gated) {
          entry.output = take(memory, size);
          const E* inputs[2] = {current, static_cast<const E*>(entry.mixed)};
          const T gate[2] = {static_cast<T>(v[index][0]), static_cast<T>(v[index][1])};
          combine(inputs, gate, 2, size, static_cast<E*>(entry.output));
        }
        current = static_cast<const E*>(entry.output);
        entry.end = memory.mark();
      }
      if (spec_.sinks && (spec_.depths[s] > 1 || v[s][0] != 1)) {
        std::vector<const E*> inputs;
        std::vector<T> shares;
        for (int64_t d = 0; d < spec_.depths[s]; ++d) {
          inputs.push_back(static_cast<const E*>(tape.layers[first + d].output));
          shares.push_back(static_cast<T>(v[s][d]));
        }
        E* sum = take(memory, size);
        combine(inputs.data(), shares.data(), static_cast<int>(inputs.size()), size, sum);
        current = sum;
      }
      if (s + 1 == spec_.depths.size()) std::memcpy(out, current, size * sizeof(E));
    }
  }

  // Backward of one pass, the last one in the tape's `memory`: what a layer's backward has read becomes
  // scratch of the layers before it. `dx` (or null) is overwritten or, with `add_dx`, added to. `gradient(l)`
  // gives where layer l's weight gradients go (null in the mixture); `du` and `dv` (or null) get the
  // gradients of the mixing weights.
  template <class G>
  void backward(int64_t batch, const BodyTape& tape, MemoryStack& memory, const Rows& v, const E* dout, E* dx,
                bool add_dx, G&& gradient, Rows* du, Rows* dv) const {
    MemoryStack& gradients = gradient_stack_;
    const int64_t mark = gradients.mark();
    int64_t largest = batch * tape.layers[0].height * tape.layers[0].width * spec_.layers[0].in_channels;
    for (size_t l = 0; l < spec_.layers.size(); ++l) largest = std::max(largest, out_size(batch, tape, l));
    // of the stage's output, the layer's output, its operations' sum, its input
    E *stage = take(gradients, largest), *current = take(gradients, largest),
      *spare = take(gradients, largest), *operation = take(gradients, largest);
    int64_t index = static_cast<int64_t>(spec_.layers.size());
    std::memcpy(stage, dout, out_size(batch, tape, index - 1) * sizeof(E));
    for (int64_t s = static_cast<int64_t>(spec_.depths.size()) - 1; s >= 0; --s) {
      const int64_t depth = spec_.depths[s], first = index - depth;
      for (int64_t d = depth - 1; d >= 0; --d) {
        --index;
        const LayerSpec& layer = spec_.layers[index];
        const LayerTape& entry = tape.layers[index];
        const int64_t size = out_size(batch, tape, index);
        // of the layer's output: from the sink and from the next layer
        if (spec_.sinks) {
          if (dv) (*dv)[s][d] = inner(stage, static_cast<const E*>(entry.output), size);
          const E* inputs[2] = {stage, current};
          const T shares[2] = {static_cast<T>(v[s][d]), T(1)};
          combine(inputs, shares, d + 1 < depth ? 2 : 1, size, current);
        } else if (d + 1 == depth) {
          std::swap(stage, current);
        }
        const bool wanted = index > 0 || dx != nullptr;
        const int64_t in_size = batch * entry.height * entry.width * layer.in_channels;
        E* din = wanted ? spare : nullptr;
        E* dop = current;
        if (layer.gated) {
          if (dv) {
            (*dv)[index][0] = inner(current, static_cast<const E*>(entry.input), size);
            (*dv)[index][1] = inner(current, static_cast<const E*>(entry.mixed), size);
          }
          const T share = static_cast<T>(v[index][1]);
          combine(&current, &share, 1, size, operation);
          dop = operation;
        }
        memory.release(entry.end);
        backward_layer(index, batch, entry, dop, size, din, gradient(index), memory, du);
        if (layer.gated && wanted) {
          const E* inputs[2] = {current, din};
          const T shares[2] = {static_cast<T>(v[index][0]), T(1)};
          combine(inputs, shares, 2, in_size, din);
        }
        std::swap(current, spare);
        if (index == first) {
          std::swap(stage, current);
          if (index == 0 && dx) {
            const E* inputs[2] = {stage, dx};
            const T shares[2] = {T(1), T(1)};
            combine(inputs, shares, add_dx ? 2 : 1, in_size, dx);
          }
        }
      }
    }
    gradients.release(mark);
  }

 private:
  static E* take(MemoryStack& memory, int64_t count) {
    return static_cast<E*>(memory.take(count * static_cast<int64_t>(sizeof(E))));
  }
  int64_t out_size(int64_t batch, const BodyTape& tape, size_t l) const {
    const LayerSpec& layer = spec_.layers[l];
    const int64_t height = (tape.layers[l].height + layer.stride - 1) / layer.stride;
    const int64_t width = (tape.layers[l].width + layer.stride - 1) / layer.stride;
    return batch * height * width * layer.out_channels;
  }
  void combine(const E* const* inputs, const T* shares, int count, int64_t size, E* out) const {
    vector_kernels_of<E>().combine(inputs, shares, count, size, out, threads_);
  }
  double inner(const E* a, const E* b, int64_t size) const {
    return vector_kernels_of<E>().inner_product(a, b, size, threads_);
  }

  static void begin(LayerTape& entry, LayerChoice choice, int64_t height, int64_t width) {
    entry.height = height, entry.width = width;
    entry.candidates = std::move(choice.candidates);
    entry.mix = std::move(choice.mix);
    entry.direct = choice.direct;
  }

  Candidate<T> candidate_of(int64_t index, int64_t which) const {
    const LayerSpec& layer = spec_.layers[index];
    const CandidateSpec& spec = layer.candidates[which];
    auto at = [&](int role, int64_t offset) {
      return weights_[index * kRoles + role].template const_data_ptr<T>() + offset;
    };
    const int taps = spec.kernel_size * spec.kernel_size;
    Candidate<T> c;
    c.kernel_size = spec.kernel_size;
    c.width = spec.width;
    c.expand = {at(kExpand, spec.mid * layer.in_channels), layer.in_channels, 1};
    c.depthwise = {at(kDepthwise, spec.depthwise), taps, 1};
    c.project = {at(kProject, spec.mid * layer.out_channels), layer.out_channels, 1};
    if (spec.se_channels > 0) {
      c.se_channels = spec.se_channels;
      c.se_reduce = {at(kSeReduceWeight, spec.se_weight), spec.se_channels, 1};
      c.se_expand = {at(kSeExpandWeight, spec.se_weight), spec.se_channels, 1};
      c.se_reduce_bias = at(kSeReduceBias, spec.se_reduce_bias);
      c.se_expand_bias = at(kSeExpandBias, spec.se_expand_bias);
    }
    return c;
  }

  // The kernels' view of a layer; `candidates` and `mix` must outlive it.
  Layer<T> layer_of(int64_t index, int64_t batch, const LayerTape& entry,
                    std::vector<Candidate<T>>& candidates, std::vector<T>& mix) const {
    const LayerSpec& spec = spec_.layers[index];
    for (int64_t which : entry.candidates) candidates.push_back(candidate_of(index, which));
    mix.assign(entry.mix.begin(), entry.mix.end());
    return {batch,
            entry.height,
            entry.width,
            spec.in_channels,
            spec.out_channels,
            spec.stride,
            spec.act,
            spec.act,
            Gate::sigmoid,
            entry.direct,
            spec_.eps,
            Design::choose,
            static_cast<int>(candidates.size()),
            candidates.data(),
            mix.empty() ? nullptr : mix.data()};
  }

  void forward_layer(int64_t index, int64_t batch, LayerTape& entry, int64_t size, bool keep,
                     MemoryStack& memory) const {
    if (entry.candidates.empty()) {  // the identity alone
      if (entry.direct == 1) {
        entry.mixed = const_cast<void*>(entry.input);
        return;
      }
      entry.mixed = take(memory, size);
      const E* input = static_cast<const E*>(entry.input);
      const T share = static_cast<T>(entry.direct);
      return combine(&input, &share, 1, size, static_cast<E*>(entry.mixed));
    }
    std::vector<Candidate<T>> candidates;
    std::vector<T> mix;
    const Layer<T> layer = layer_of(index, batch, entry, candidates, mix);
    entry.mixed = take(memory, size);
    const int64_t mark = memory.mark();
    entry.saved = memory.take(layer_kernels_of<E>().saved_bytes(layer));
    const ScratchFrom scratch(memory);
    layer_kernels_of<E>().forward(layer, static_cast<const E*>(entry.input), static_cast<E*>(entry.mixed),
                                  entry.saved, BatchStatistics<T>{}, threads_);
    if (!keep) memory.release(mark);
  }

  void backward_layer(int64_t index, int64_t batch, const LayerTape& entry, const E* dout, int64_t size,
                      E* dx, const CandidateGradient<T>* gradient, MemoryStack& memory, Rows* du) const {
    const LayerSpec& spec = spec_.layers[index];
    if (du) {
      double along_input = 0;
      bool direct = spec.residual;
      for (const CandidateSpec& candidate : spec.candidates) direct = direct || candidate.skips();
      if (direct) along_input = inner(dout, static_cast<const E*>(entry.input), size);
      for (size_t i = 0; i < spec.candidates.size(); ++i)
        (*du)[index][i] = spec.residual || spec.candidates[i].skips() ? along_input : 0;
    }
    if (entry.candidates.empty()) {
      const T share = static_cast<T>(entry.direct);
      if (dx) combine(&dout, &share, 1, size, dx);
      return;
    }
    std::vector<Candidate<T>> candidates;
    std::vector<T> mix;
    const Layer<T> layer = layer_of(index, batch, entry, candidates, mix);
    std::vector<T> along(candidates.size());
    const ScratchFrom scratch(memory);
    layer_kernels_of<E>().backward(layer, static_cast<const E*>(entry.input), entry.saved, dout, dx,
                                   du ? along.data() : nullptr, gradient, threads_);
    if (!du) return;
    for (size_t i = 0; i < along.size(); ++i) (*du)[index][entry.candidates[i]] += along[i];
  }

  const BodySpec& spec_;
  const std::vector<at::Tensor>& weights_;
  const Threads threads_;
  static inline thread_local MemoryStack gradient_stack_;
};

}  // namespace tfnas
