// One layer, forward and backward, with all that its kernels left in the two allocations open to view.
#pragma once

#include "layer_backward.cuh"
#include "reference_layer.h"

namespace emulator_check {

constexpr double kUntouched =
    -7;  // what gradients of SE hold before the backward, which skips frozen channels

template <class T, tfnas::cuda::Math M>
struct LayerRun {
  using A = tfnas::cuda::Acc<T>;
  const ReferenceBlock<T>& block;
  tfnas::cuda::LayerArgs<T> args{};
  std::vector<A> u;
  std::vector<T> dout, out, dx;
  std::vector<A> du, dexpand, ddepthwise, dproject, reduce_weight, reduce_bias, expand_weight, expand_bias;
  std::vector<char> saved_bytes, forward_bytes, backward_bytes;

  // `block`, `table` and `choice` are pointed at, not copied.
  LayerRun(const ReferenceBlock<T>& block, const tfnas::cuda::LayerTable& table, const int& choice,
           bool residual, const std::vector<T>& dout)
      : block(block), u(block.u.begin(), block.u.end()), dout(dout) {
    const Shape& shape = block.shape;
    args = layer_args(block, table, choice, residual, u);
    const tfnas::cuda::LayerSizes size(args);
    out.resize(shape.out_pixels() * shape.out_channels), dx.resize(shape.in_pixels() * shape.in_channels);
    du.resize(size.slots), dexpand.resize(size.active * shape.in_channels);
    ddepthwise.resize(size.active * size.taps), dproject.resize(size.active * shape.out_channels);
    reduce_weight.assign(block.reduce_weight.size(), kUntouched), expand_weight = reduce_weight;
    reduce_bias.assign(block.reduce_bias.size(), kUntouched);
    expand_bias.assign(block.expand_bias.size(), kUntouched);
    saved_bytes.assign(tfnas::cuda::layer_saved_bytes(args), char(0xFF));
  }

  void forward() {
    forward_bytes.assign(
        tfnas::cuda::layer_forward<T, M>(args, nullptr, nullptr, saved_bytes.data(), nullptr), char(0xFF));
    tfnas::cuda::layer_forward<T, M>(args, block.x.data(), out.data(), saved_bytes.data(),
                                     forward_bytes.data());
  }

  void backward(bool weights) {
    const tfnas::cuda::LayerGrads<T> g = grads(weights);
    backward_bytes.assign(
        tfnas::cuda::layer_backward<T, M>(args, nullptr, nullptr, g, saved_bytes.data(), nullptr),
        char(0xFF));
    tfnas::cuda::layer_backward<T, M>(args, block.x.data(), dout.data(), g, saved_bytes.data(),
                                      backward_bytes.data());
  }

  tfnas::cuda::SavedLayer<T> saved() {
    tfnas::cuda::Arena arena(saved_bytes.data());
    return tfnas::cuda::SavedLayer<T>(args, arena);
  }

  // Of the last backward, which must have had the same `weights`.
  tfnas::cuda::BackwardScratch<T> scratch(bool weights) {
    size_t bytes;
    const tfnas::cuda::LayerSizes size(args);
    const auto depthwise = args.stride == 1
                               ? tfnas::cuda::depthwise_backward_args<T, M, 1>(args, size, bytes)
                               : tfnas::cuda::depthwise_backward_args<T, M, 2>(args, size, bytes);
    tfnas::cuda::Arena arena(backward_bytes.data());
    return tfnas::cuda::BackwardScratch<T>(args, grads(weights), depthwise, arena);
  }

 private:
  tfnas::cuda::LayerGrads<T> grads(bool weights) {
    tfnas::cuda::LayerGrads<T> g{};
    g.dx = dx.data(), g.du = du.data();
    if (weights) {
      g.expand = dexpand.data(), g.depthwise = ddepthwise.data(), g.project = dproject.data();
      g.se = {reduce_weight.data(), reduce_bias.data(), expand_weight.data(), expand_bias.data()};
    }
    return g;
  }
};

}  // namespace emulator_check
