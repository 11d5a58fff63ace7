// Squeeze and excitation: the two small fully connected layers on pooled vectors [batch][padded width], both
// ways.
#pragma once

#include "cpu/mbinvres_activations.h"
#include "cpu/mbinvres_plan.h"

namespace tfnas::TFNAS_ISA {

template <class T>
TFNAS_INLINE T dot(const T* a, const T* b, int64_t count) {
  auto acc = splat(T(0));
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) acc = fma(load(a + i), load(b + i), acc);
  T lanes[kLanes], total = 0;
  store(lanes, acc);
  for (int64_t j = 0; j < kLanes; ++j) total += lanes[j];
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

// out[j] += factor * row[j]
template <class T>
TFNAS_INLINE void add_scaled(const T* row, T factor, int64_t count, T* out) {
  int64_t i = 0;
  const auto scale = splat(factor);
  for (; i + kLanes <= count; i += kLanes) store(out + i, fma(load(row + i), scale, load(out + i)));
  for (; i < count; ++i) out[i] += factor * row[i];
}

// Row c of a weight as `count` consecutive numbers, copied to `buffer` only where they are not.
template <class T>
TFNAS_INLINE const T* weight_row(const Weight<const T>& weight, int64_t c, int64_t count, T* buffer) {
  const T* row = weight.data + c * weight.mid_stride;
  if (weight.stride == 1) return row;
  for (int64_t j = 0; j < count; ++j) buffer[j] = row[j * weight.stride];
  return buffer;
}

template <class T, class V>
TFNAS_INLINE V gate_of(Gate kind, V h) {
  if (kind == Gate::sigmoid) return sigmoid(h);
  return mul(min(splat(T(6)), max(splat(T(0)), add(h, splat(T(3))))), splat(T(1) / T(6)));
}

// The gate's derivative from its value. PyTorch's hard sigmoid has float32's sixth in float64 too: so have
// we.
template <class T>
TFNAS_INLINE T gate_slope(Gate kind, T value) {
  if (kind == Gate::sigmoid) return value * (1 - value);
  return value > 0 && value < 1 ? T(1.f / 6.f) : T(0);
}

// pooled -> squeezed, hidden, gate.
template <class T>
inline void forward_se(const Geometry& g, const CandidatePlan<T>& c, const Threads& threads) {
  Scratch scratch;
  const int64_t se = c.weights->se_channels, size = g.batch * c.se_padded;
  T* parts = scratch.zeros<T>(threads.count * size);
  parallel(threads, [&](int thread) {
    Scratch local;
    T* buffer = local.take<T>(se);
    T* mine = parts + thread * size;
    const Range range = share(c.width, thread, threads.count);
    for (int64_t i = range.begin; i < range.end; ++i) {
      const T* row = weight_row(c.weights->se_reduce, i, se, buffer);
      for (int64_t n = 0; n < g.batch; ++n)
        add_scaled(row, c.pooled[n * c.padded + i], se, mine + n * c.se_padded);
    }
  });
  std::memset(c.squeezed, 0, size * sizeof(T));
  for (int64_t n = 0; n < g.batch; ++n) {
    for (int64_t j = 0; j < se; ++j) {
      T total = c.weights->se_reduce_bias[j];
      for (int t = 0; t < threads.count; ++t) total += parts[t * size + n * c.se_padded + j];
      c.squeezed[n * c.se_padded + j] = total;
    }
  }
  with_act(g.se_act, [&](auto act) {
    for (int64_t i = 0; i < size; i += kLanes)
      store(c.hidden + i, activate<T, decltype(act)::value>(load(c.squeezed + i)));
  });
  parallel(threads, [&](int thread) {
    Scratch local;
    T* buffer = local.take<T>(se);
    const Range range = share(c.planes, thread, threads.count);
    for (int64_t i = range.begin * kLanes; i < range.end * kLanes; ++i) {
      const T* row = i < c.width ? weight_row(c.weights->se_expand, i, se, buffer) : nullptr;
      const T bias = i < c.width ? c.weights->se_expand_bias[i] : T(0);
      for (int64_t n = 0; n < g.batch; ++n)
        c.gate[n * c.padded + i] = row ? bias + dot(row, c.hidden + n * c.se_padded, se) : T(0);
    }
    for (int64_t n = 0; n < g.batch; ++n)
      for (int64_t i = range.begin * kLanes; i < range.end * kLanes; i += kLanes)
        store(c.gate + n * c.padded + i, gate_of<T>(g.se_gate, load(c.gate + n * c.padded + i)));
  });
}

// dgate [batch][padded] -> dpooled / pixels of an image [batch][padded], and the weight gradients that are
// wanted.
template <class T>
inline void backward_se(const Geometry& g, const CandidatePlan<T>& c, const T* dgate, T* dpooled,
                        const CandidateGradient<T>* gradient, const Threads& threads) {
  Scratch scratch;
  const int64_t se = c.weights->se_channels, size = g.batch * c.se_padded;
  T* dlogit = scratch.zeros<T>(g.batch * c.padded);  // of the second layer, before the gate's function
  T* parts = scratch.zeros<T>(threads.count * size);
  T* dsqueezed = scratch.zeros<T>(size);
  parallel(threads, [&](int thread) {
    Scratch local;
    T* buffer = local.take<T>(se);
    T* weight = local.take<T>(se);
    T* mine = parts + thread * size;
    const Range range = share(c.width, thread, threads.count);
    for (int64_t i = range.begin; i < range.end; ++i) {
      const T* row = weight_row(c.weights->se_expand, i, se, buffer);
      T bias = 0;
      std::memset(weight, 0, se * sizeof(T));
      for (int64_t n = 0; n < g.batch; ++n) {
        const T d = dgate[n * c.padded + i] * gate_slope(g.se_gate, c.gate[n * c.padded + i]);
        dlogit[n * c.padded + i] = d;
        bias += d;
        add_scaled(row, d, se, mine + n * c.se_padded);
        if (gradient && gradient->se_expand.data) add_scaled(c.hidden + n * c.se_padded, d, se, weight);
      }
      if (gradient && gradient->se_expand.data) {
        const Weight<T>& out = gradient->se_expand;
        for (int64_t j = 0; j < se; ++j) out.data[i * out.mid_stride + j * out.stride] = weight[j];
      }
      if (gradient && gradient->se_expand_bias) gradient->se_expand_bias[i] = bias;
    }
  });
  for (int t = 0; t < threads.count; ++t)
    for (int64_t i = 0; i < size; ++i) dsqueezed[i] += parts[t * size + i];
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
    T* buffer = local.take<T>(se);
    T* weight = local.take<T>(se);
    const Range range = share(c.padded, thread, threads.count);
    for (int64_t i = range.begin; i < range.end; ++i) {
      const bool real = i < c.width;
      const T* row = real ? weight_row(c.weights->se_reduce, i, se, buffer) : nullptr;
      for (int64_t n = 0; n < g.batch; ++n)
        dpooled[n * c.padded + i] =
            real ? dot(row, dsqueezed + n * c.se_padded, se) / static_cast<T>(g.out_pixels) : T(0);
      if (!real || !gradient || !gradient->se_reduce.data) continue;
      std::memset(weight, 0, se * sizeof(T));
      for (int64_t n = 0; n < g.batch; ++n)
        add_scaled(dsqueezed + n * c.se_padded, c.pooled[n * c.padded + i], se, weight);
      const Weight<T>& out = gradient->se_reduce;
      for (int64_t j = 0; j < se; ++j) out.data[i * out.mid_stride + j * out.stride] = weight[j];
    }
  });
}

}  // namespace tfnas::TFNAS_ISA
