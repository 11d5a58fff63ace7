// Elementwise work on long vectors: sums of a body's outputs, inner products, SGD.
#pragma once

#include "cpu/mbinvres_plan.h"

namespace tfnas::TFNAS_ISA {

template <class E>
inline void combine(const E* const* inputs, const Compute<E>* weights, int count, int64_t size, E* out,
                    const Threads& threads) {
  parallel(threads, [&](int thread) {
    const Range range = share(size, thread, threads.count);
    int64_t i = range.begin;
    for (; i + kLanes <= range.end; i += kLanes) {
      auto value = mul(splat(weights[0]), load(inputs[0] + i));
      for (int j = 1; j < count; ++j) value = fma(splat(weights[j]), load(inputs[j] + i), value);
      store(out + i, value);
    }
    for (; i < range.end; ++i) {
      Compute<E> value = weights[0] * to_compute(inputs[0][i]);
      for (int j = 1; j < count; ++j) value += weights[j] * to_compute(inputs[j][i]);
      out[i] = to_element<E>(value);
    }
  });
}

template <class E>
inline double inner_product(const E* a, const E* b, int64_t size, const Threads& threads) {
  using T = Compute<E>;
  Scratch scratch;
  constexpr int64_t block = 1024;  // summed in T, blocks in double: the same value at any number of threads
  const int64_t blocks = (size + block - 1) / block;
  double* parts = scratch.take<double>(blocks);
  parallel(threads, [&](int thread) {
    const Range range = share(blocks, thread, threads.count);
    for (int64_t k = range.begin; k < range.end; ++k) {
      const int64_t end = minimum(size, (k + 1) * block);
      auto sum = splat(T(0));
      int64_t i = k * block;
      for (; i + kLanes <= end; i += kLanes) sum = fma(load(a + i), load(b + i), sum);
      T lanes[kLanes];
      store(lanes, sum);
      double total = 0;
      for (T lane : lanes) total += lane;
      for (; i < end; ++i) total += static_cast<double>(to_compute(a[i])) * to_compute(b[i]);
      parts[k] = total;
    }
  });
  double total = 0;
  for (int64_t k = 0; k < blocks; ++k) total += parts[k];
  return total;
}

template <class T>
inline void sgd(T* w, T* buffer, const T* gradient, int64_t size, T scale, T decay, T momentum, T rate) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const auto weight = load(w + i);
    const auto g = fma(splat(decay), weight, mul(splat(scale), load(gradient + i)));
    const auto moved = fma(splat(momentum), load(buffer + i), g);
    store(buffer + i, moved);
    store(w + i, fma(splat(-rate), moved, weight));
  }
  for (; i < size; ++i) {
    buffer[i] = momentum * buffer[i] + (scale * gradient[i] + decay * w[i]);
    w[i] -= rate * buffer[i];
  }
}

}  // namespace tfnas::TFNAS_ISA
