// The elastic MBInvRes layer on the CPU, free of torch: one candidate, or a weighted sum of several
// ("mixture").
//
//   y1 = W1 x      h1 = BN1(y1)    a1 = act(h1)     expand; left out without W1, then a1 = x
//   y2 = dw(a1)    h2 = BN2(y2)    a2 = act(h2)     depthwise k x k, stride s
//   z  = a2 * gate(E se_act(R mean_hw(a2) + bR) + bE)          squeeze and excitation, optional
//   y3 = W3 z      h3 = BN3(y3)    out = sum_i mix_i h3_i + residual * x
//
// Activations are channels last, [batch, height, width, channels]. Batch norms use the batch's statistics
// (forward, backward) or given ones (inference). Results do not depend on the instruction set or design
// beyond rounding; at a fixed number of threads they are the same bits every time.
//
// Activations and the wide tensors are stored as Element; weights, statistics, sums and gradients of weights
// are Compute<Element>: bfloat16 tensors are computed in float.
#pragma once

#include <cstdint>
#include <string_view>

namespace tfnas {

class MemoryStack;

// A number that is stored only: the upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

template <class Element>
struct ComputeOf {
  using Type = Element;
};
template <>
struct ComputeOf<BFloat16> {
  using Type = float;
};
template <class Element>
using Compute = typename ComputeOf<Element>::Type;

enum class Act : int { relu = 0, relu6 = 1, swish = 2, hard_swish = 3, identity = 4 };

// The last function of squeeze and excitation. hard_sigmoid: clamp(h / 6 + 1 / 2, 0, 1)
enum class Gate : int { sigmoid = 0, hard_sigmoid = 1 };

// How the wide tensor is walked; `choose` is the measured rule of `choose_design`.
//   strips, for large maps: BN1 folded into W1 from the moments of x; images in strips of rows, y1 never
//   stored.
//   channels, for small maps: a thread owns groups of mid channels for the whole batch, so BN1 and BN2 are
//   local to it.
enum class Design : int { choose = 0, strips = 1, channels = 2 };

// By the name in tfnas_ext.reference.ACTIVATIONS. Throws std::invalid_argument with the names allowed.
Act parse_act(std::string_view name, std::string_view argument = "act");
// "sigmoid" or "hard_sigmoid"; throws as parse_act does.
Gate parse_gate(std::string_view name);

// The caller's thread pool: `run` calls body(arg, i) for i in 0 .. count - 1, in parallel, and waits.
struct Threads {
  int count;
  void (*run)(int count, void (*body)(void*, int), void* arg);
};

// Element (mid channel c, j) of a weight at data[c * mid_stride + j * stride].
template <class T>
struct Weight {
  T* data = nullptr;
  int64_t mid_stride = 0;
  int64_t stride = 1;
};

// Null: no affine part; mean and var are read by inference only.
template <class T>
struct NormView {
  const T* weight = nullptr;
  const T* bias = nullptr;
  const T* mean = nullptr;
  const T* var = nullptr;
};

// The first `width` mid channels of one candidate operation.
template <class T>
struct Candidate {
  int kernel_size = 3;
  int64_t width = 0;
  int64_t se_channels = 0;    // 0: no squeeze and excitation
  Weight<const T> expand;     // [width, in_channels]; null: no expansion
  Weight<const T> depthwise;  // [width, kernel_size^2]
  Weight<const T> project;    // [width, out_channels]
  Weight<const T> se_reduce;  // [width, se_channels]
  Weight<const T> se_expand;  // [width, se_channels]
  const T* se_reduce_bias = nullptr;
  const T* se_expand_bias = nullptr;
  NormView<T> bn1, bn2, bn3;
};

// Where a candidate's gradients go (overwritten); null pointers are not wanted.
template <class T>
struct CandidateGradient {
  Weight<T> expand, depthwise, project, se_reduce, se_expand;
  T* se_reduce_bias = nullptr;
  T* se_expand_bias = nullptr;
  T* bn_weight[3] = {nullptr, nullptr, nullptr};
  T* bn_bias[3] = {nullptr, nullptr, nullptr};
};

constexpr int kMaxCandidates = 32;

template <class T>
struct Layer {
  int64_t batch, height, width, in_channels, out_channels;
  int stride;
  Act act;
  Act se_act;
  Gate se_gate;
  double residual;  // weight of x in the output; 0: none
  double eps;
  Design design;
  int count;  // candidates, 1 .. kMaxCandidates
  const Candidate<T>* candidates;
  const T* mix;  // [count]; null: every weight is 1
};

// Batch statistics of candidate 0: means and biased variances, [width], [width], [out_channels]; null: not
// wanted.
template <class T>
struct BatchStatistics {
  T *mean1 = nullptr, *var1 = nullptr, *mean2 = nullptr, *var2 = nullptr, *mean3 = nullptr, *var3 = nullptr;
};

template <class E>
struct LayerKernels {
  using T = Compute<E>;
  // Bytes that forward writes to `saved` (64-byte aligned) and backward reads: x is not among them.
  int64_t (*saved_bytes)(const Layer<T>& layer);
  // x [batch, height, width, in_channels] -> out [batch, ceil(height / stride), ceil(width / stride),
  // out_channels]
  void (*forward)(const Layer<T>& layer, const E* x, E* out, void* saved,
                  const BatchStatistics<T>& statistics, const Threads& threads);
  // dx and dmix [count] may be null; `gradients` [count] is null where no weight needs one.
  void (*backward)(const Layer<T>& layer, const E* x, const void* saved, const E* dout, E* dx, T* dmix,
                   const CandidateGradient<T>* gradients, const Threads& threads);
  // One candidate with the norms' given statistics.
  void (*inference)(const Layer<T>& layer, const E* x, E* out, const Threads& threads);
};

// Elementwise work of a supernet's body and of its optimizer, in the same instruction sets.
template <class E>
struct VectorKernels {
  using T = Compute<E>;
  // out = sum_i weights[i] * inputs[i]; `out` may be one of the inputs
  void (*combine)(const E* const* inputs, const T* weights, int count, int64_t size, E* out,
                  const Threads& threads);
  // sum of a[i] * b[i]
  double (*inner_product)(const E* a, const E* b, int64_t size, const Threads& threads);
  // One step of SGD: g = scale * gradient + decay * w; buffer = momentum * buffer + g; w -= rate * buffer
  void (*sgd)(T* w, T* buffer, const T* gradient, int64_t size, T scale, T decay, T momentum, T rate);
};

// One table per element and instruction set, chosen once (see capability.h): float, double, BFloat16.
template <class E>
const LayerKernels<E>& layer_kernels_of();
template <class E>
const VectorKernels<E>& vector_kernels_of();

// The rule which design a layer of `pixels` = batch * height * width input pixels takes.
Design choose_design(int64_t pixels);

// A stack of scratch memory per thread, 64-byte aligned. It grows and is kept between calls, since fresh
// pages cost more than the kernels' own traffic. `release` gives back everything taken since `mark`.
void* scratch_take(int64_t bytes);
int64_t scratch_mark();
void scratch_release(int64_t mark);

// While it lives, the calling thread takes its scratch from `stack`, above what is there.
class ScratchFrom {
 public:
  explicit ScratchFrom(MemoryStack& stack);
  ~ScratchFrom();
  ScratchFrom(const ScratchFrom&) = delete;
  ScratchFrom& operator=(const ScratchFrom&) = delete;

 private:
  MemoryStack* before_;
};

}  // namespace tfnas
