// One searchable layer as the host describes it to the kernels: plain structures and the two functions that
// run it. The host compiler, nvcc and the emulator all read this header.
#pragma once

#include "compat.cuh"

namespace tfnas::cuda {

constexpr int kMaxCandidates = 16;
constexpr int kChunk = 32;  // mid channels that a block works on at once: one per lane in the depthwise phase

// A candidate is a range of rows of the packed weights, its width a prefix of that range.
struct CandidateRows {
  int kernel_size;
  int first_row;     // of the mid-first packed weights (expand, project)
  int depthwise_at;  // first element of its depthwise filters, k * k per row
  int width;
  int se_channels;   // 0: no squeeze-and-excitation, and the offsets below mean nothing
  int se_weight_at;  // first element of its se_reduce_weight and se_expand_weight, [rows, se_channels] both
  int se_reduce_bias_at;  // first element of its se_reduce_bias; also its place among the squeezed values of
                          // an image
  int se_expand_bias_at;
};

// Lives in device memory; rebuilt by the host when widths change, which is between epochs only.
struct LayerTable {
  int count;
  CandidateRows candidate[kMaxCandidates];
};

__host__ __device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Wide activations hold active channels only, candidate after candidate, each [pixels, pitch]: a pitch is a
// multiple of 8, so that any width can be read in aligned groups. What lies between width and pitch is never
// written nor used.
__host__ __device__ inline int pitch_of(int width) { return (width + 7) / 8 * 8; }

// Storage type -> type in which statistics and sums are kept.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulator<T>::type;

enum Act : int { kIdentity = 0, kRelu = 1, kRelu6 = 2, kSwish = 3, kHardSwish = 4 };

enum class Math { kFma, kTf32, kTf32x3, kBf16 };

template <class A>
struct SqueezeExciteWeights {
  const A *reduce_weight, *reduce_bias, *expand_weight, *expand_bias;  // packed, see CandidateRows
};

template <class A>
struct SqueezeExciteGrads {
  A *reduce_weight, *reduce_bias, *expand_weight,
      *expand_bias;  // packed like the weights; only active rows written
};

// What the host knows of the card.
struct DeviceLimits {
  size_t shared_bytes;  // that one block may ask for
  int multiprocessors;
};

template <class T>
struct LayerArgs {
  LayerTable host_table;
  const LayerTable* table;  // the same, in device memory
  const int* choice;        // device memory: a sampled path; null: all candidates, the mixture
  int batch, height, width, in_channels, out_channels, stride, act;
  bool residual;
  double eps;
  const Acc<T>*expand, *depthwise, *project;  // packed; expand null: no expansion
  SqueezeExciteWeights<Acc<T>> se;
  const Acc<T>* u;  // device memory, weights of the mixture; null: one candidate
  DeviceLimits device;
  cudaStream_t stream;
};

// Sizes for the widest choice: which candidate runs is known on the device only.
struct LayerSizes {
  int slots = 0;      // active candidates
  int chunks = 0;     // of 32 channels
  int active = 0;     // length of per-channel vectors
  int widest_se = 0;  // 0: no candidate has squeeze-and-excitation
  int squeezed_stride = 0;
  int largest_kernel = 1, taps = 1;
  int out_height, out_width;
  int64_t in_pixels, out_pixels;

  template <class T>
  explicit LayerSizes(const LayerArgs<T>& a) {
    out_height = (a.height - 1) / a.stride + 1;
    out_width = (a.width - 1) / a.stride + 1;
    in_pixels = int64_t{a.batch} * a.height * a.width;
    out_pixels = int64_t{a.batch} * out_height * out_width;
    slots = a.choice ? 1 : a.host_table.count;
    for (int i = 0; i < a.host_table.count; i++) {
      const CandidateRows& rows = a.host_table.candidate[i];
      const int chunks_here = ceil_div(rows.width, kChunk), active_here = pitch_of(rows.width);
      chunks = a.choice ? (chunks_here > chunks ? chunks_here : chunks) : chunks + chunks_here;
      active = a.choice ? (active_here > active ? active_here : active) : active + active_here;
      widest_se = rows.se_channels > widest_se ? rows.se_channels : widest_se;
      const int squeezed_end = rows.se_reduce_bias_at + rows.se_channels;
      squeezed_stride = squeezed_end > squeezed_stride ? squeezed_end : squeezed_stride;
      largest_kernel = rows.kernel_size > largest_kernel ? rows.kernel_size : largest_kernel;
    }
    taps = largest_kernel * largest_kernel;
  }
};

// Where gradients go; a null pointer is not wanted. Weight gradients come all or none (the mixture wants
// none). Those of the convolutions hold active channels only, in the order of per-channel vectors; those of
// SE lie as the weights.
template <class T>
struct LayerGrads {
  T* dx;
  Acc<T>* du;         // [slots]
  Acc<T>* expand;     // [active][in_channels]
  Acc<T>* depthwise;  // [active][taps of the largest kernel]
  Acc<T>* project;    // [active][out_channels]
  SqueezeExciteGrads<Acc<T>> se;
  bool weights() const { return project != nullptr; }
};

// Bytes of what the forward leaves for the backward.
template <class T>
int64_t layer_saved_bytes(const LayerArgs<T>& args);

// Whether the kernels fit the card's shared memory at this layer's sizes.
template <class T, Math M>
bool layer_fits(const LayerArgs<T>& args);

// x [batch, height, width, in_channels] -> out. `saved` receives layer_saved_bytes. With a null `scratch`
// nothing runs. Returns the bytes of scratch that the call needs.
template <class T, Math M>
int64_t layer_forward(const LayerArgs<T>& args, const T* x, T* out, void* saved, void* scratch);

// From what layer_forward saved. With a null `scratch` nothing runs. Returns the bytes of scratch.
template <class T, Math M>
int64_t layer_backward(const LayerArgs<T>& args, const T* x, const T* dout, const LayerGrads<T>& grads,
                       void* saved, void* scratch);

}  // namespace tfnas::cuda
