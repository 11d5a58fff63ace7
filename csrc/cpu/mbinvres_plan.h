// Sizes of a layer, the layout of what forward saves for backward, and scratch memory.
#pragma once

#include "cpu/mbinvres_bf16.h"

namespace tfnas::TFNAS_ISA {

// Scratch of the calling thread, given back at the end of the scope.
class Scratch {
 public:
  Scratch() : mark_(scratch_mark()) {}
  ~Scratch() { scratch_release(mark_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(scratch_take(count * static_cast<int64_t>(sizeof(T))));
  }
  template <class T>
  T* zeros(int64_t count) {
    T* data = take<T>(count);
    std::memset(data, 0, count * sizeof(T));
    return data;
  }

 private:
  int64_t mark_;
};

template <class F>
inline void parallel(const Threads& threads, F&& body) {
  if (threads.count == 1) return body(0);
  threads.run(
      threads.count, [](void* arg, int thread) { (*static_cast<F*>(arg))(thread); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

struct Range {
  int64_t begin, end;
};
TFNAS_INLINE Range share(int64_t total, int thread, int count) {
  return {total * thread / count, total * (thread + 1) / count};
}
// The same in whole pairs.
TFNAS_INLINE Range share_pairs(int64_t total, int thread, int count) {
  const Range pairs = share((total + 1) / 2, thread, count);
  return {2 * pairs.begin, 2 * pairs.end < total ? 2 * pairs.end : total};
}

struct Geometry {
  int64_t batch, height, width, out_height, out_width;
  int64_t in_channels, out_channels;  // as given
  int64_t ci, co;                     // padded to multiples of 8
  int64_t pixels, out_pixels;         // of one image
  int64_t m, m2;                      // of the batch
  int stride;
  Act act, se_act;
  Gate se_gate;
};

// A candidate's sizes and its part of the saved memory. Vectors have `padded` entries; channels beyond the
// width are zero throughout, so that they change nothing. h = (y - mean) rstd gain + bias in every norm.
template <class E>
struct CandidatePlan {
  using T = Compute<E>;
  const Candidate<T>* weights;
  int64_t width, planes, padded;
  int kernel, pad;
  bool expands;
  bool y2_again;                     // y2 is not saved: its memory is shared, backward makes it again
  E* y2;                             // [planes][m2][16]
  E* y1;                             // channels: [planes][m][16]; else null
  T *mean1, *rstd1, *gain1, *bias1;  // [padded]
  T *mean2, *rstd2, *gain2, *bias2;
  T* y3;                             // [m2][co]
  T *mean3, *rstd3, *gain3, *bias3;  // [co]
  T *pooled, *gate;                  // SE: [batch][padded]
  T *squeezed, *hidden;              // SE: before and after the activation, [batch][se padded]
  int64_t se_padded;
};

template <class E>
struct LayerPlan {
  Geometry g;
  Design design;
  int count;
  Compute<E>*mean_x, *covariance;  // strips: [ci], [ci][ci]
  CandidatePlan<E> candidates[kMaxCandidates];
  int64_t saved;  // bytes
};

inline Geometry geometry_of(int64_t batch, int64_t height, int64_t width, int64_t in_channels,
                            int64_t out_channels, int stride) {
  Geometry g;
  g.batch = batch, g.height = height, g.width = width;
  g.out_height = (height + stride - 1) / stride, g.out_width = (width + stride - 1) / stride;
  g.in_channels = in_channels, g.out_channels = out_channels;
  g.ci = round_up(in_channels, 8), g.co = round_up(out_channels, 8);
  g.pixels = height * width, g.out_pixels = g.out_height * g.out_width;
  g.m = batch * g.pixels, g.m2 = batch * g.out_pixels;
  g.stride = stride;
  return g;
}

// Multiplications for a number of a mixture's y2 up to which it is made again rather than kept: 7 % of the
// tape of the space `imagenet` at 224x224 for less than 1 % of the step's time; at 50, 20 % for 2 %.
constexpr int64_t kCheapProducts = 40;

// Lays the saved memory out from `base`; with a null base only the size is of use. `clear` zeroes what lies
// between its parts, so that equal inputs save equal bits. The size is also in tfnas_ext/operators.py.
template <class E>
inline void make_plan(const Layer<Compute<E>>& layer, void* base, LayerPlan<E>& plan, bool clear = false) {
  using T = Compute<E>;
  Geometry& g = plan.g = geometry_of(layer.batch, layer.height, layer.width, layer.in_channels,
                                     layer.out_channels, layer.stride);
  g.act = layer.act, g.se_act = layer.se_act, g.se_gate = layer.se_gate;
  int64_t used = 0;
  auto carve = [&](int64_t count, auto** tensor) {
    using Number = std::remove_reference_t<decltype(**tensor)>;
    *tensor = reinterpret_cast<Number*>(reinterpret_cast<uintptr_t>(base) + used);
    const int64_t bytes = count * static_cast<int64_t>(sizeof(Number)), gap = round_up(bytes, 64) - bytes;
    if (clear && gap > 0) std::memset(*tensor + count, 0, gap);
    used += bytes + gap;
  };
  plan.count = layer.count;
  plan.design = layer.design == Design::choose ? choose_design(g.m) : layer.design;
  bool expands = false;
  for (int i = 0; i < layer.count; ++i) expands = expands || layer.candidates[i].expand.data != nullptr;
  if (!expands) plan.design = Design::strips;  // no BN1: nothing that a channel group could keep to itself
  const bool channels = plan.design == Design::channels;
  plan.mean_x = plan.covariance = nullptr;
  if (!channels && expands) carve(g.ci, &plan.mean_x), carve(g.ci * g.ci, &plan.covariance);
  for (int i = 0; i < layer.count; ++i) {
    const Candidate<T>& weights = layer.candidates[i];
    CandidatePlan<E>& c = plan.candidates[i];
    c.weights = &weights;
    c.width = weights.width, c.planes = (c.width + kLanes - 1) / kLanes, c.padded = c.planes * kLanes;
    c.kernel = weights.kernel_size, c.pad = c.kernel / 2;
    c.expands = weights.expand.data != nullptr;
    c.y1 = c.y2 = nullptr;
    // Channels have y1 at hand; strips expand again, multiplications for every number of y2.
    const int64_t products = g.in_channels * g.m / g.m2 + c.kernel * c.kernel;
    c.y2_again = layer.count > 1 && (channels || (c.expands && products <= kCheapProducts));
    if (!c.y2_again) carve(c.planes * g.m2 * kLanes, &c.y2);
    if (channels && c.expands) carve(c.planes * g.m * kLanes, &c.y1);
    T** vectors[8] = {&c.mean1, &c.rstd1, &c.gain1, &c.bias1, &c.mean2, &c.rstd2, &c.gain2, &c.bias2};
    for (int v = 0; v < 8; ++v) {
      *vectors[v] = nullptr;
      if (v >= 4 || c.expands) carve(c.padded, vectors[v]);
    }
    carve(g.m2 * g.co, &c.y3);
    T** narrow[4] = {&c.mean3, &c.rstd3, &c.gain3, &c.bias3};
    for (T** vector : narrow) carve(g.co, vector);
    c.pooled = c.gate = c.squeezed = c.hidden = nullptr;
    c.se_padded = round_up(weights.se_channels, kLanes);
    if (weights.se_channels > 0) {
      carve(g.batch * c.padded, &c.pooled), carve(g.batch * c.padded, &c.gate);
      carve(g.batch * c.se_padded, &c.squeezed), carve(g.batch * c.se_padded, &c.hidden);
    }
  }
  plan.saved = used;
}

template <class E>
inline int64_t largest_padded(const LayerPlan<E>& plan) {
  int64_t largest = 0;
  for (int i = 0; i < plan.count; ++i) largest = maximum(largest, plan.candidates[i].padded);
  return largest;
}

// Gives the candidates whose y2 is not saved their common one.
template <class E>
inline void share_y2(LayerPlan<E>& plan, Scratch& scratch) {
  int64_t padded = 0;
  for (int i = 0; i < plan.count; ++i)
    if (plan.candidates[i].y2_again) padded = maximum(padded, plan.candidates[i].padded);
  if (padded == 0) return;
  E* y2 = scratch.take<E>(padded * plan.g.m2);
  for (int i = 0; i < plan.count; ++i)
    if (plan.candidates[i].y2_again) plan.candidates[i].y2 = y2;
}

// A group of up to Blocking::planes planes of one candidate.
struct Chunk {
  int64_t plane;
  int planes;
};

// Calls f(chunk) for chunks that cover planes [begin, end); four left over are taken as two and two.
template <class T, class F>
TFNAS_INLINE void for_chunks(int64_t begin, int64_t end, F&& f) {
  constexpr int most = Blocking<T>::planes;
  for (int64_t plane = begin; plane < end;) {
    const int64_t rest = end - plane;
    const int planes = static_cast<int>(most == 3 && rest == 4 ? 2 : minimum<int64_t>(most, rest));
    f(Chunk{plane, planes});
    plane += planes;
  }
}

// Plane `plane` of weight (mid, j), j < count, as [padded count][16]; zeros beyond the width and the count.
template <class T>
inline void pack_plane(Weight<const T> weight, int64_t width, int64_t plane, int64_t count,
                       int64_t padded_count, T* out) {
  const int64_t first = plane * kLanes, lanes = minimum<int64_t>(kLanes, width - first);
  if (lanes < kLanes || padded_count > count) std::memset(out, 0, padded_count * kLanes * sizeof(T));
  if (weight.mid_stride == 1) {
    for (int64_t j = 0; j < count; ++j)
      for (int64_t c = 0; c < lanes; ++c) out[j * kLanes + c] = weight.data[first + c + j * weight.stride];
    return;
  }
  const T* rows = weight.data + first * weight.mid_stride;
  int64_t done = 0;
  if (lanes == kLanes && weight.stride == 1)
    for (; done + kLanes <= count; done += kLanes)
      transpose_tile(rows + done, weight.mid_stride, out + done * kLanes);
  for (int64_t c = 0; c < lanes; ++c)
    for (int64_t j = done; j < count; ++j)
      out[j * kLanes + c] = rows[c * weight.mid_stride + j * weight.stride];
}

// Plane `plane` of a weight (mid, j) packed, [padded count][16], the right operand of expand_tile.
template <class E>
inline void pack_columns(Weight<const Compute<E>> weight, int64_t width, int64_t plane, int64_t count,
                         int64_t padded_count, Packed<E>* out) {
  if constexpr (kDepth<E> == 1) {
    pack_plane(weight, width, plane, count, padded_count, out);
  } else {
    Scratch scratch;
    Compute<E>* columns = scratch.take<Compute<E>>(padded_count * kLanes);
    pack_plane(weight, width, plane, count, padded_count, columns);
    for (int64_t j = 0; j < padded_count; j += kDepth<E>)
      store_packed<E>(out + j * kLanes, load(columns + j * kLanes), load(columns + (j + 1) * kLanes));
  }
}

// All planes packed, in parallel.
template <class E>
inline void pack_all_columns(const Weight<const Compute<E>>& weight, const CandidatePlan<E>& c, int64_t count,
                             int64_t padded_count, Packed<E>* out, const Threads& threads) {
  parallel(threads, [&](int thread) {
    const Range range = share(c.planes, thread, threads.count);
    for (int64_t plane = range.begin; plane < range.end; ++plane)
      pack_columns<E>(weight, c.width, plane, count, padded_count, out + plane * padded_count * kLanes);
  });
}

// Rows [begin, end) of a weight, each times scale[row] where there is a scale, packed as [padded width]
// [padded count], the right operand of project_tile. `begin` and `end` are even.
template <class E>
inline void pack_rows(Weight<const Compute<E>> weight, const Compute<E>* scale, int64_t width, int64_t begin,
                      int64_t end, int64_t count, int64_t padded_count, Packed<E>* out) {
  using T = Compute<E>;
  auto part = [&](int64_t c, int64_t j) {
    const T* row = weight.data + c * weight.mid_stride;
    const T factor = scale && c < width ? scale[c] : T(1);
    if (c < width && weight.stride == 1 && j + 8 <= count) return mul(load_half(row + j), splat_half(factor));
    T values[8] = {};
    for (int64_t i = 0; c < width && i < minimum<int64_t>(8, count - j); ++i)
      values[i] = row[(j + i) * weight.stride] * factor;
    return load_half(values);
  };
  // Where a column is contiguous, a cache line of it is used up at once: at widths that are multiples of 256
  // the lines of all columns fall into a few sets of the cache and would not last until the next row.
  const int64_t rows = weight.stride == 1 ? kDepth<E> : kLanes;
  for (int64_t first = begin; first < end; first += rows)
    for (int64_t j = 0; j < padded_count; j += 8)
      for (int64_t c = first; c < minimum(first + rows, end); c += kDepth<E>)
        store_packed<E>(out + c * padded_count + j * kDepth<E>, part(c, j), part(c + kDepth<E> - 1, j));
}

// Rows [begin, end) of a gradient [..][padded count] to where the caller wants it.
template <class T>
inline void unpack_rows(const T* in, int64_t padded_count, int64_t count, int64_t begin, int64_t end,
                        Weight<T> out) {
  for (int64_t c = begin; c < end; ++c)
    for (int64_t j = 0; j < count; ++j)
      out.data[c * out.mid_stride + j * out.stride] = in[c * padded_count + j];
}

}  // namespace tfnas::TFNAS_ISA
