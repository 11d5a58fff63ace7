// Compact gradients of the sampled candidates, and the optimizer's step on them.
#include <ATen/Parallel.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

#include "engine/supernet_engine.h"
#include "ops/threads.h"

namespace tfnas {
namespace {

// Elements of a role for a candidate at its width.
int64_t role_size(const LayerSpec& layer, const CandidateSpec& c, int role) {
  switch (role) {
    case kExpand:
      return c.width * layer.in_channels;
    case kDepthwise:
      return c.width * c.kernel_size * c.kernel_size;
    case kProject:
      return c.width * layer.out_channels;
    case kSeReduceBias:
      return c.se_channels;
    case kSeExpandBias:
      return c.se_channels > 0 ? c.width : 0;
    default:
      return c.width * c.se_channels;
  }
}

// Where they start in the layer's packed tensor.
int64_t role_start(const LayerSpec& layer, const CandidateSpec& c, int role) {
  switch (role) {
    case kExpand:
      return c.mid * layer.in_channels;
    case kDepthwise:
      return c.depthwise;
    case kProject:
      return c.mid * layer.out_channels;
    case kSeReduceBias:
      return c.se_reduce_bias;
    case kSeExpandBias:
      return c.se_expand_bias;
    default:
      return c.se_weight;
  }
}

// One contiguous piece of a parameter, its momentum and its gradient.
template <class T>
struct Piece {
  T *weight, *momentum;
  const T* gradient;
  int64_t size;
};

constexpr int64_t kPieceSize = 1 << 14;

template <class T>
void add_pieces(T* weight, T* momentum, const T* gradient, int64_t size, std::vector<Piece<T>>& pieces) {
  for (int64_t at = 0; at < size; at += kPieceSize)
    pieces.push_back({weight + at, momentum + at, gradient + at, std::min(kPieceSize, size - at)});
}

}  // namespace

void SupernetEngine::plan_gradients(const std::vector<std::vector<int64_t>>& choices,
                                    const at::TensorOptions& options) {
  entries_.clear();
  used_.clear();
  buffers_.resize(std::max(buffers_.size(), choices.size()));
  for (size_t p = 0; p < choices.size(); ++p) {
    int64_t used = 0;
    for (size_t l = 0; l < choices[p].size(); ++l) {
      const LayerSpec& layer = spec_.layers[l];
      const CandidateSpec& candidate = layer.candidates[choices[p][l]];
      for (int role = 0; role < kRoles && !candidate.skips(); ++role) {
        const int64_t size = role_size(layer, candidate, role);
        if (size == 0) continue;
        entries_.push_back(
            {static_cast<int64_t>(l), choices[p][l], role, used, size, static_cast<int64_t>(p)});
        used += (size + 15) / 16 * 16;
      }
    }
    used_.push_back(used);
    at::Tensor& buffer = buffers_[p];
    if (!buffer.defined() || buffer.numel() < used ||
        buffer.scalar_type() != c10::typeMetaToScalarType(options.dtype()))
      buffer = at::empty({used + used / 4}, options.memory_format(std::nullopt));
  }
}

// Where both paths chose the same candidate of a layer, its gradient is the sum of both, kept in the first
// path's.
void SupernetEngine::merge_shared_gradients() {
  std::vector<GradientEntry> kept;
  for (const GradientEntry& entry : entries_) {
    const auto same = std::find_if(kept.begin(), kept.end(), [&](const GradientEntry& other) {
      return other.layer == entry.layer && other.candidate == entry.candidate && other.role == entry.role;
    });
    if (same == kept.end()) {
      kept.push_back(entry);
      continue;
    }
    at::Tensor sum = buffers_[same->path].narrow(0, same->offset, same->size);
    sum.add_(buffers_[entry.path].narrow(0, entry.offset, entry.size));
  }
  std::sort(kept.begin(), kept.end(), [](const GradientEntry& a, const GradientEntry& b) {
    return std::tie(a.layer, a.candidate, a.role) < std::tie(b.layer, b.candidate, b.role);
  });
  entries_ = std::move(kept);
}

std::vector<std::tuple<int64_t, int64_t, int64_t, at::Tensor>> SupernetEngine::read_gradients() const {
  std::vector<std::tuple<int64_t, int64_t, int64_t, at::Tensor>> result;
  if (!pending_) return result;
  for (const GradientEntry& entry : entries_)
    result.emplace_back(entry.layer, entry.candidate, entry.role,
                        buffers_[entry.path].narrow(0, entry.offset, entry.size).clone());
  return result;
}

std::vector<at::Tensor> SupernetEngine::gradient_buffers() const {
  std::vector<at::Tensor> result;
  for (size_t p = 0; pending_ && p < used_.size(); ++p) result.push_back(buffers_[p].narrow(0, 0, used_[p]));
  return result;
}

template <class T>
double SupernetEngine::clip_and_sgd_as(const Weights& weights, const Weights& momenta,
                                       const std::vector<at::Tensor>& dense, const SgdOptions& options) {
  std::vector<Piece<T>> pieces;
  for (size_t i = 0; i + 2 < dense.size(); i += 3)
    add_pieces(dense[i].mutable_data_ptr<T>(), dense[i + 2].mutable_data_ptr<T>(),
               dense[i + 1].const_data_ptr<T>(), dense[i].numel(), pieces);
  for (const GradientEntry& entry : entries_) {
    const LayerSpec& layer = spec_.layers[entry.layer];
    const int64_t start = role_start(layer, layer.candidates[entry.candidate], entry.role);
    const int64_t tensor = entry.layer * kRoles + entry.role;
    add_pieces(weights[tensor].mutable_data_ptr<T>() + start, momenta[tensor].mutable_data_ptr<T>() + start,
               buffers_[entry.path].const_data_ptr<T>() + entry.offset, entry.size, pieces);
  }
  // Sums per piece, then in order: the same norm at any number of threads.
  std::vector<double> squares(pieces.size());
  const int64_t count = static_cast<int64_t>(pieces.size());
  const Threads alone{1, nullptr};
  at::parallel_for(0, count, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      squares[i] =
          vector_kernels_of<T>().inner_product(pieces[i].gradient, pieces[i].gradient, pieces[i].size, alone);
  });
  double total = 0;
  for (double square : squares) total += square;
  const double norm = std::sqrt(total), ratio = options.max_norm / (norm + 1e-6);
  const T scale = static_cast<T>(ratio < 1 ? ratio : (std::isnan(ratio) ? ratio : 1.0));
  at::parallel_for(0, count, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      vector_kernels_of<T>().sgd(pieces[i].weight, pieces[i].momentum, pieces[i].gradient, pieces[i].size,
                                 scale, static_cast<T>(options.weight_decay),
                                 static_cast<T>(options.momentum), static_cast<T>(options.lr));
  });
  return norm;
}

double SupernetEngine::clip_and_sgd(const Weights& weights, const Weights& momenta,
                                    const std::vector<at::Tensor>& dense, const SgdOptions& options) {
  TORCH_CHECK(pending_, "clip_and_sgd_ needs the gradients of a backward_paths since the last call");
  pending_ = false;
  const bool wide = weights.front().scalar_type() == at::kDouble;
  return wide ? clip_and_sgd_as<double>(weights, momenta, dense, options)
              : clip_and_sgd_as<float>(weights, momenta, dense, options);
}

}  // namespace tfnas
