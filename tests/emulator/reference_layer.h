// The arguments of a layer's kernels for a block of the textbook.
#pragma once

#include <vector>

#include "layer.h"
#include "reference_block.h"

namespace emulator_check {

// `table`, `choice` (negative: the mixture by `u`) and `u` are pointed at, not copied.
template <class T>
tfnas::cuda::LayerArgs<T> layer_args(const ReferenceBlock<T>& block, const tfnas::cuda::LayerTable& table,
                                     const int& choice, bool residual,
                                     const std::vector<tfnas::cuda::Acc<T>>& u) {
  const Shape& shape = block.shape;
  tfnas::cuda::LayerArgs<T> args{};
  args.host_table = table, args.table = &table, args.choice = choice < 0 ? nullptr : &choice;
  args.batch = shape.batch, args.height = shape.height, args.width = shape.width;
  args.in_channels = shape.in_channels, args.out_channels = shape.out_channels, args.stride = shape.stride;
  args.act = shape.act, args.residual = residual, args.eps = block.eps;
  args.expand = block.expand.data(), args.depthwise = block.depthwise.data(),
  args.project = block.project.data();
  args.se = {block.reduce_weight.data(), block.reduce_bias.data(), block.expand_weight.data(),
             block.expand_bias.data()};
  args.u = choice < 0 ? u.data() : nullptr;
  args.device = {99 * 1024, 2};
  return args;
}

}  // namespace emulator_check
