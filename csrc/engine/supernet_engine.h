// The supernet's body on native kernels: sampled paths and the mixture through all layers in one call each
// way.
//
// Weights stay in the packed tensors of tfnas_ext.packed; they are passed at every call, seven a layer in the
// order of `Role`. Memory for tapes, gradients and scratch is kept between calls.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/mbinvres.h"
#include "cpu/memory_stack.h"

namespace tfnas {

enum Role {
  kExpand,
  kDepthwise,
  kProject,
  kSeReduceWeight,
  kSeReduceBias,
  kSeExpandWeight,
  kSeExpandBias,
  kRoles
};

// A candidate and where it starts in its layer's tensors; max_width 0 is the identity.
struct CandidateSpec {
  int kernel_size;
  int64_t max_width, se_channels;
  int64_t mid, depthwise, se_weight, se_reduce_bias, se_expand_bias;
  int64_t width = 0;
  bool skips() const { return max_width == 0; }
};

struct LayerSpec {
  int64_t in_channels, out_channels;
  int stride;
  Act act;
  bool residual, gated;
  std::vector<CandidateSpec> candidates;
};

struct BodySpec {
  std::vector<LayerSpec> layers;
  std::vector<int64_t> depths;  // layers of each stage
  int64_t max_depth;
  bool sinks;  // a stage gives the weighted sum of its layers, else the last one's output
  double eps;
};

// Memory of one forward, given back to the engine when it is dropped.
class Tape {
 public:
  Tape(std::shared_ptr<struct TapePool> pool);
  ~Tape();
  struct Impl;
  std::unique_ptr<Impl> impl;

 private:
  std::shared_ptr<struct TapePool> pool_;
};

// Gradient of one role of a sampled candidate, in the compact buffer of its path.
struct GradientEntry {
  int64_t layer, candidate;
  int role;
  int64_t offset, size;
  int64_t path;
};

struct SgdOptions {
  double lr, momentum, weight_decay, max_norm;
};

class SupernetEngine {
 public:
  using Weights = std::vector<at::Tensor>;  // [layers * kRoles]
  using Matrix = std::vector<std::vector<double>>;

  explicit SupernetEngine(BodySpec spec);

  void set_widths(const std::vector<std::vector<int64_t>>& widths);
  std::vector<std::vector<int64_t>> widths() const;

  // Outputs of the paths `choices` [P][L], with depth weights `v` (rows of BodySpec's v, or empty).
  std::pair<std::vector<at::Tensor>, std::shared_ptr<Tape>> forward_paths(
      const Weights& weights, const at::Tensor& x, const std::vector<std::vector<int64_t>>& choices,
      const Matrix& v, bool with_tape);
  std::optional<at::Tensor> backward_paths(const Weights& weights, Tape& tape,
                                           const std::vector<at::Tensor>& douts, bool need_dx);
  std::pair<at::Tensor, std::shared_ptr<Tape>> forward_mixture(const Weights& weights, const at::Tensor& x,
                                                               const Matrix& u, const Matrix& v,
                                                               bool with_tape);
  std::tuple<std::optional<at::Tensor>, Matrix, Matrix> backward_mixture(const Weights& weights, Tape& tape,
                                                                         const at::Tensor& dout,
                                                                         bool need_dx);

  // Of tapes that wait to be used again: the most that they held at once, scratch included.
  int64_t memory_bytes() const;

  // (layer, candidate, role, flat gradient) of all pending gradients, copied.
  std::vector<std::tuple<int64_t, int64_t, int64_t, at::Tensor>> read_gradients() const;
  // One range per path with all pending gradients in it, not copied; what lies between them may be anything.
  std::vector<at::Tensor> gradient_buffers() const;
  // Clips by the norm of all pending gradients and those of `dense` (parameter, gradient, momentum, ...;
  // contiguous alike), then SGD on the sampled widths and on `dense`. Returns the norm; consumes the
  // gradients.
  double clip_and_sgd(const Weights& weights, const Weights& momenta, const std::vector<at::Tensor>& dense,
                      const SgdOptions& options);

 private:
  at::Tensor output_like(const at::Tensor& x) const;
  void plan_gradients(const std::vector<std::vector<int64_t>>& choices, const at::TensorOptions& options);
  void merge_shared_gradients();
  template <class T>
  double clip_and_sgd_as(const Weights& weights, const Weights& momenta, const std::vector<at::Tensor>& dense,
                         const SgdOptions& options);

  BodySpec spec_;
  std::shared_ptr<struct TapePool> pool_;
  std::vector<GradientEntry> entries_;
  std::vector<at::Tensor> buffers_;  // one per path
  std::vector<int64_t> used_;        // elements of each in use
  bool pending_ = false;
};

}  // namespace tfnas
