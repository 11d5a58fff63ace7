// Squeeze and excitation: the two small fully connected layers on pooled vectors [batch][padded width], both
// ways.
#pragma once

#include "cpu/mbinvres_activations.h"
#include "cpu/mbinvres_gemm.h"
#include "cpu/mbinvres_plan.h"

namespace tfnas::TFNAS_ISA {

// out[j] += factor * row[j]
template <class T>
TFNAS_INLINE void add_scaled(const T* row, T factor, int64_t count, T* out) {
  int64_t i = 0;
  const auto scale = splat(factor);
  for (; i + kLanes <= count; i += kLanes) store(out + i, fma(load(row + i), scale, load(out + i)));
  for (; i < count; ++i) out[i] += factor * row[i];
}

template <class T, class V>
TFNAS_INLINE V gate_of(Gate kind, V h) {
  if (kind == Gate::sigmoid) return sigmoid(h);
  return mul(min(splat(T(6)), max(splat(T(0)), add(h, splat(T(3))))), splat(T(1) / T(6)));
}

// The gate's derivative from its value. PyTorch's hard sigmoid has float32's sixth in float64 too: so have
// we.
template <class T, class V>
TFNAS_INLINE V gate_slope(Gate kind, V value) {
  if (kind == Gate::sigmoid) return mul(value, sub(splat(T(1)), value));
  return mul(mul(above(value, splat(T(0))), above(splat(T(1)), value)), splat(T(1.f / 6.f)));
}

// Vectors of planes of one chunk, [batch][padded], as a tile [planes][batch][16] for the matrix products.
template <class E>
inline void gather_tile(const Geometry& g, const CandidatePlan<E>& c, Chunk chunk, const Compute<E>* vectors,
                        Compute<E>* tile) {
  for (int v = 0; v < chunk.planes; ++v)
    for (int64_t n = 0; n < g.batch; ++n)
      store(tile + (v * g.batch + n) * kLanes, load(vectors + n * c.padded + (chunk.plane + v) * kLanes));
}

// out [batch][16 columns padded] of a thread += tile of the chunk times rows of `weight` [width][columns].
template <class E>
inline void add_rows(const Geometry& g, const CandidatePlan<E>& c, Chunk chunk, const Compute<E>* tile,
                     Weight<const Compute<E>> weight, Compute<E>* out) {
  using T = Compute<E>;
  const int64_t se = c.weights->se_channels, columns = round_up(se, 8), channel = chunk.plane * kLanes;
  const int64_t count = minimum(chunk.planes * kLanes, c.width - channel);
  Scratch scratch;
  const T* rows = weight.data + channel * weight.mid_stride;
  int64_t stride = weight.mid_stride;
  if (weight.stride != 1 || columns != se) {
    T* packed = scratch.take<T>(chunk.planes * kLanes * columns);
    weight.data = rows;
    pack_rows<T>(weight, nullptr, count, 0, count, se, columns, packed);
    rows = packed, stride = columns;
  }
  project_tile<T>(g.batch, columns, tile, g.batch * kLanes, count, rows, stride, out, c.se_padded, true);
}

// Tile of the chunk = `vectors` [batch][se padded] times the columns of `weight` [width][se].
template <class E>
inline void times_columns(const Geometry& g, const CandidatePlan<E>& c, Chunk chunk,
                          const Compute<E>* vectors, Weight<const Compute<E>> weight, Compute<E>* tile) {
  using T = Compute<E>;
  const int64_t se = c.weights->se_channels;
  Scratch scratch;
  T* packed = scratch.take<T>(chunk.planes * se * kLanes);
  for (int v = 0; v < chunk.planes; ++v)
    pack_plane(weight, c.width, chunk.plane + v, se, se, packed + v * se * kLanes);
  expand_tile<T>(chunk.planes, g.batch, vectors, c.se_padded, se, packed, se * kLanes, tile,
                 g.batch * kLanes);
}

// Gradient [width][se] of a weight for the channels of the chunk: its tile, transposed, times `vectors`.
template <class E>
inline void write_outer(const Geometry& g, const CandidatePlan<E>& c, Chunk chunk, const Compute<E>* tile,
                        const Compute<E>* vectors, Weight<Compute<E>> out) {
  using T = Compute<E>;
  Scratch scratch;
  const int64_t channel = chunk.plane * kLanes;
  T* sums = scratch.zeros<T>(chunk.planes * kLanes * c.se_padded);
  outer_tile<T>(g.batch, round_up(c.weights->se_channels, 8), tile, g.batch * kLanes, chunk.planes, vectors,
                c.se_padded, sums, c.se_padded);
  out.data += channel * out.mid_stride;
  unpack_rows(sums, c.se_padded, c.weights->se_channels, 0, minimum(chunk.planes * kLanes, c.width - channel),
              out);
}

// out [batch][se padded] = sum over threads of `parts` (+ bias).
template <class E>
inline void sum_squeezed(const Geometry& g, const CandidatePlan<E>& c, const Compute<E>* parts, int count,
                         const Compute<E>* bias, Compute<E>* out) {
  const int64_t size = g.batch * c.se_padded;
  for (int64_t i = 0; i < size; i += kLanes) {
    auto sum = load(parts + i);
    for (int t = 1; t < count; ++t) sum = add(sum, load(parts + t * size + i));
    store(out + i, sum);
  }
  for (int64_t n = 0; bias && n < g.batch; ++n)
    for (int64_t j = 0; j < c.weights->se_channels; ++j) out[n * c.se_padded + j] += bias[j];
}

// pooled -> squeezed, hidden, gate.
template <class E>
inline void forward_se(const Geometry& g, const CandidatePlan<E>& c, const Threads& threads) {
  using T = Compute<E>;
  Scratch scratch;
  const int64_t size = g.batch * c.se_padded;
  T* parts = scratch.zeros<T>(threads.count * size);
  parallel(threads, [&](int thread) {
    Scratch local;
    T* tile = local.take<T>(Blocking<T>::planes * g.batch * kLanes);
    const Range range = share(c.planes, thread, threads.count);
    for_chunks<T>(range.begin, range.end, [&](Chunk chunk) {
      gather_tile(g, c, chunk, c.pooled, tile);
      add_rows(g, c, chunk, tile, c.weights->se_reduce, parts + thread * size);
    });
  });
  sum_squeezed(g, c, parts, threads.count, c.weights->se_reduce_bias, c.squeezed);
  with_act(g.se_act, [&](auto act) {
    for (int64_t i = 0; i < size; i += kLanes)
      store(c.hidden + i, activate<T, decltype(act)::value>(load(c.squeezed + i)));
  });
  parallel(threads, [&](int thread) {
    Scratch local;
    T* tile = local.take<T>(Blocking<T>::planes * g.batch * kLanes);
    const Range range = share(c.planes, thread, threads.count);
    for_chunks<T>(range.begin, range.end, [&](Chunk chunk) {
      times_columns(g, c, chunk, c.hidden, c.weights->se_expand, tile);
      for (int v = 0; v < chunk.planes; ++v) {
        const int64_t channel = (chunk.plane + v) * kLanes;
        T bias[kLanes] = {};
        for (int64_t i = 0; i < minimum(kLanes, c.width - channel); ++i)
          bias[i] = c.weights->se_expand_bias[channel + i];
        for (int64_t n = 0; n < g.batch; ++n)
          store(c.gate + n * c.padded + channel,
                gate_of<T>(g.se_gate, add(load(tile + (v * g.batch + n) * kLanes), load(bias))));
      }
    });
  });
}

// dgate [batch][padded] -> dpooled / pixels of an image [batch][padded], and the weight gradients that are
// wanted.
template <class E>
inline void backward_se(const Geometry& g, const CandidatePlan<E>& c, const Compute<E>* dgate,
                        Compute<E>* dpooled, const CandidateGradient<Compute<E>>* gradient,
                        const Threads& threads) {
  using T = Compute<E>;
  Scratch scratch;
  const int64_t se = c.weights->se_channels, size = g.batch * c.se_padded;
  T* parts = scratch.zeros<T>(threads.count * size);
  T* dsqueezed = scratch.take<T>(size);
  parallel(threads, [&](int thread) {
    Scratch local;
    T* tile = local.take<T>(Blocking<T>::planes * g.batch * kLanes);  // of the gate before its function
    const Range range = share(c.planes, thread, threads.count);
    for_chunks<T>(range.begin, range.end, [&](Chunk chunk) {
      for (int v = 0; v < chunk.planes; ++v) {
        const int64_t channel = (chunk.plane + v) * kLanes;
        auto bias = splat(T(0));
        for (int64_t n = 0; n < g.batch; ++n) {
          const auto s = load(c.gate + n * c.padded + channel), d = load(dgate + n * c.padded + channel);
          const auto slope = mul(d, gate_slope<T>(g.se_gate, s));
          store(tile + (v * g.batch + n) * kLanes, slope);
          bias = add(bias, slope);
        }
        if (!gradient || !gradient->se_expand_bias) continue;
        T lanes[kLanes];
        store(lanes, bias);
        for (int64_t i = 0; i < minimum(kLanes, c.width - channel); ++i)
          gradient->se_expand_bias[channel + i] = lanes[i];
      }
      add_rows(g, c, chunk, tile, c.weights->se_expand, parts + thread * size);
      if (gradient && gradient->se_expand.data) write_outer(g, c, chunk, tile, c.hidden, gradient->se_expand);
    });
  });
  sum_squeezed(g, c, parts, threads.count, static_cast<const T*>(nullptr), dsqueezed);
  with_act(g.se_act, [&](auto act) {
    for (int64_t i = 0; i < size; i += kLanes) {
      auto a = splat(T(0)), d = splat(T(0));
      activate_with_derivative<T, decltype(act)::value>(load(c.squeezed + i), a, d);
      store(dsqueezed + i, mul(d, load(dsqueezed + i)));
    }
  });
  if (gradient && gradient->se_reduce_bias) {
    for (int64_t j = 0; j < se; ++j) {
      T total = 0;
      for (int64_t n = 0; n < g.batch; ++n) total += dsqueezed[n * c.se_padded + j];
      gradient->se_reduce_bias[j] = total;
    }
  }
  parallel(threads, [&](int thread) {
    Scratch local;
    T* tile = local.take<T>(Blocking<T>::planes * g.batch * kLanes);
    const Range range = share(c.planes, thread, threads.count);
    const auto per_pixel = splat(T(1) / static_cast<T>(g.out_pixels));
    for_chunks<T>(range.begin, range.end, [&](Chunk chunk) {
      times_columns(g, c, chunk, dsqueezed, c.weights->se_reduce, tile);
      for (int v = 0; v < chunk.planes; ++v)
        for (int64_t n = 0; n < g.batch; ++n)
          store(dpooled + n * c.padded + (chunk.plane + v) * kLanes,
                mul(load(tile + (v * g.batch + n) * kLanes), per_pixel));
      if (!gradient || !gradient->se_reduce.data) return;
      gather_tile(g, c, chunk, c.pooled, tile);
      write_outer(g, c, chunk, tile, dsqueezed, gradient->se_reduce);
    });
  });
}

}  // namespace tfnas::TFNAS_ISA
