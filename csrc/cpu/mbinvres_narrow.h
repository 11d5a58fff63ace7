// Work on narrow tensors [pixels][channels padded to 8]: padding, moments, the third batch norm, sums of
// partial results.
#pragma once

#include "cpu/mbinvres_gemm.h"
#include "cpu/mbinvres_plan.h"

namespace tfnas::TFNAS_ISA {

constexpr int64_t kNarrowBlock = 256;  // pixels summed in T before the sums go on in double

// `x` with channels padded by zeros to a multiple of 8; `x` itself where there is nothing to pad.
template <class E>
inline const E* padded_narrow(const E* x, int64_t pixels, int64_t channels, int64_t padded, Scratch& scratch,
                              const Threads& threads) {
  if (channels == padded) return x;
  E* out = scratch.take<E>(pixels * padded);
  parallel(threads, [&](int thread) {
    const Range range = share(pixels, thread, threads.count);
    for (int64_t m = range.begin; m < range.end; ++m)
      for (int64_t c = 0; c < padded; ++c) out[m * padded + c] = c < channels ? x[m * channels + c] : E{};
  });
  return out;
}

// A narrow tensor as outer_tile reads it: groups of pixels that no block crosses, paired at depth 2.
template <class E>
struct PixelPairs {
  const E* data;
  int64_t group, channels;  // elements of a group; channels of a pixel

  // From pixel `m` of group `n` on; at depth 2 `m` is even.
  const E* at(int64_t n, int64_t m) const { return data + n * group + m * channels; }
};

template <class E>
inline PixelPairs<E> pair_narrow(const E* narrow, int64_t groups, int64_t pixels, int64_t channels,
                                 Scratch& scratch, const Threads& threads) {
  if constexpr (kDepth<E> == 1) {
    return {narrow, pixels * channels, channels};
  } else {
    const int64_t pairs = (pixels + 1) / 2, group = 2 * pairs * channels;
    E* out = scratch.take<E>(groups * group);
    parallel(threads, [&](int thread) {
      const Range range = share(groups * pairs, thread, threads.count);
      for (int64_t i = range.begin; i < range.end; ++i) {
        const int64_t n = i / pairs, m = 2 * (i % pairs);
        const E* first = narrow + (n * pixels + m) * channels;
        for (int64_t c = 0; c < channels; c += 8) {
          const auto low = load_half(first + c);
          const auto high = m + 1 < pixels ? load_half(first + channels + c) : splat_half(0.f);
          store_pairs(out + n * group + m * channels + 2 * c, low, high);
        }
      }
    });
    return {out, group, channels};
  }
}

// Sums over a pixel range of 8 channels: a += first, b += first * (second - shift).
template <class E, class T>
TFNAS_INLINE void paired_sums(const E* first, const T* second, const T* shift, int64_t stride, int64_t pixels,
                              double* a, double* b) {
  using H = typename Simd<T>::H;
  H sum[2] = {splat_half(T(0)), splat_half(T(0))}, product[2] = {sum[0], sum[0]};
  const H centre = load_half(shift);
  int64_t m = 0;
  for (; m + 2 <= pixels; m += 2) {
    for (int i = 0; i < 2; ++i) {
      const H value = load_half(first + (m + i) * stride);
      sum[i] = add(sum[i], value);
      product[i] = fma(value, sub(load_half(second + (m + i) * stride), centre), product[i]);
    }
  }
  if (m < pixels) {
    const H value = load_half(first + m * stride);
    sum[0] = add(sum[0], value);
    product[0] = fma(value, sub(load_half(second + m * stride), centre), product[0]);
  }
  T out[8];
  store(out, add(sum[0], sum[1]));
  for (int i = 0; i < 8; ++i) a[i] += out[i];
  store(out, add(product[0], product[1]));
  for (int i = 0; i < 8; ++i) b[i] += out[i];
}

// sum += value - shift and squares += (value - shift)^2 for value(0) .. value(pixels - 1), eight at a time:
// sums of sums round less than one long one.
template <class V, class F>
TFNAS_INLINE void add_centred(int64_t pixels, V shift, V& sum, V& squares, F&& value) {
  for (int64_t m0 = 0; m0 < pixels; m0 += 8) {
    V block_sum{}, block_squares{};
    for (int64_t m = m0; m < minimum(m0 + 8, pixels); ++m) {
      const V centred = sub(value(m), shift);
      block_sum = add(block_sum, centred);
      block_squares = fma(centred, centred, block_squares);
    }
    sum = add(sum, block_sum);
    squares = add(squares, block_squares);
  }
}

// Per-channel sums of `values` and of their squares. They are made about the mean of the `before` pixels
// summed so far, or of these, so that neither a large mean nor an odd pixel costs digits.
template <class E>
TFNAS_INLINE void add_moments(const E* values, int64_t stride, int64_t pixels, int64_t channels,
                              int64_t before, double* sum, double* sum_squares) {
  using T = Compute<E>;
  using H = typename Simd<T>::H;
  for (int64_t c = 0; c < channels; c += 8) {
    T shifts[8], ss[8], qq[8];
    if (before > 0) {
      for (int i = 0; i < 8; ++i) shifts[i] = static_cast<T>(sum[c + i] / before);
    } else {
      H total = splat_half(T(0));
      for (int64_t m = 0; m < pixels; ++m) total = add(total, load_half(values + m * stride + c));
      store(shifts, total);
      for (int i = 0; i < 8; ++i) shifts[i] /= static_cast<T>(pixels);
    }
    const H shift = load_half(shifts);
    H s = splat_half(T(0)), q = s;
    add_centred(pixels, shift, s, q, [&](int64_t m) { return load_half(values + m * stride + c); });
    store(ss, s);
    store(qq, q);
    for (int i = 0; i < 8; ++i) {
      const double k = shifts[i], total = ss[i];
      sum[c + i] += total + pixels * k;
      sum_squares[c + i] += qq[i] + k * (2 * total + pixels * k);
    }
  }
}

// Mean and 1 / sqrt(var + eps) of sums over `pixels`; the affine part or 1 and 0; zeros beyond `channels`.
template <class T>
inline void finish_norm(const double* sum, const double* sum_squares, int64_t pixels, int64_t channels,
                        int64_t padded, const NormView<T>& norm, double eps, T* mean, T* rstd, T* gain,
                        T* bias, T* mean_out, T* var_out) {
  for (int64_t c = 0; c < padded; ++c) {
    const double mu = sum[c] / pixels, raw = sum_squares[c] / pixels - mu * mu, var = raw > 0 ? raw : 0;
    const bool real = c < channels;
    mean[c] = static_cast<T>(mu);
    rstd[c] = static_cast<T>(1 / std::sqrt(var + eps));
    gain[c] = real ? (norm.weight ? norm.weight[c] : T(1)) : T(0);
    bias[c] = real && norm.bias ? norm.bias[c] : T(0);
    if (real && mean_out) mean_out[c] = static_cast<T>(mu), var_out[c] = static_cast<T>(var);
  }
}

// The same from given statistics.
template <class T>
inline void given_norm(const NormView<T>& norm, int64_t channels, int64_t padded, double eps, T* mean,
                       T* rstd, T* gain, T* bias) {
  for (int64_t c = 0; c < padded; ++c) {
    const bool real = c < channels;
    mean[c] = real ? norm.mean[c] : T(0);
    rstd[c] = real ? static_cast<T>(1 / std::sqrt(norm.var[c] + eps)) : T(0);
    gain[c] = real ? (norm.weight ? norm.weight[c] : T(1)) : T(0);
    bias[c] = real && norm.bias ? norm.bias[c] : T(0);
  }
}

// Mean [ci] and centred second moment [ci][ci] of x.
template <class E>
inline void moments(const Geometry& g, const E* x, Compute<E>* mean, Compute<E>* covariance,
                    const Threads& threads) {
  using T = Compute<E>;
  Scratch scratch;
  const int64_t ci = g.ci, planes = (ci + kLanes - 1) / kLanes, size = planes * kLanes * ci;
  double* sums = scratch.zeros<double>(threads.count * 2 * ci);
  parallel(threads, [&](int thread) {
    double* mine = sums + thread * 2 * ci;
    const Range range = share(g.m, thread, threads.count);
    for (int64_t m = range.begin; m < range.end; m += kNarrowBlock)
      add_moments(x + m * ci, ci, minimum(kNarrowBlock, range.end - m), ci, m - range.begin, mine, mine + ci);
  });
  for (int64_t c = 0; c < ci; ++c) {
    double total = 0;
    for (int t = 0; t < threads.count; ++t) total += sums[t * 2 * ci + c];
    mean[c] = static_cast<T>(total / g.m);
  }
  double* products = scratch.zeros<double>(threads.count * size);
  parallel(threads, [&](int thread) {
    Scratch local;
    T* rows = local.take<T>(kNarrowBlock * ci);
    T* wide = local.zeros<T>(planes * kNarrowBlock * kLanes);
    T* block = local.take<T>(size);
    double* mine = products + thread * size;
    const Range range = share(g.m, thread, threads.count);
    for (int64_t m0 = range.begin; m0 < range.end; m0 += kNarrowBlock) {
      const int64_t n = minimum(kNarrowBlock, range.end - m0);
      for (int64_t m = 0; m < n; ++m) {
        for (int64_t c = 0; c < ci; c += 8) {
          const auto centred = sub(load_half(x + (m0 + m) * ci + c), load_half(mean + c));
          store(rows + m * ci + c, centred);
          store(wide + (c / kLanes * kNarrowBlock + m) * kLanes + c % kLanes, centred);
        }
      }
      std::memset(block, 0, size * sizeof(T));
      for (int64_t m = 0; m < n; m += 64)  // sums of sums round less than one long one
        outer_tile<T>(minimum<int64_t>(64, n - m), ci, wide + m * kLanes, kNarrowBlock * kLanes,
                      static_cast<int>(planes), rows + m * ci, ci, block, ci);
      for (int64_t i = 0; i < size; ++i) mine[i] += block[i];
    }
  });
  for (int64_t i = 0; i < ci * ci; ++i) {
    double total = 0;
    for (int t = 0; t < threads.count; ++t) total += products[t * size + i];
    covariance[i] = static_cast<T>(total / g.m);
  }
}

// out [pixels][channels, not padded] = sum_i mix_i BN3_i(y3_i) + weight * residual: every term's mean removed
// before its scale.
template <class E>
inline void finish_output(const LayerPlan<E>& plan, const Compute<E>* mix, const E* residual,
                          Compute<E> weight, E* out, const Threads& threads) {
  const Geometry& g = plan.g;
  using T = Compute<E>;
  using H = typename Simd<T>::H;
  Scratch scratch;
  T* scale = scratch.take<T>(plan.count * g.co);
  T* offset = scratch.zeros<T>(g.co);
  for (int i = 0; i < plan.count; ++i) {
    const CandidatePlan<E>& c = plan.candidates[i];
    const T share = mix ? mix[i] : T(1);
    for (int64_t j = 0; j < g.co; ++j) {
      scale[i * g.co + j] = share * c.rstd3[j] * c.gain3[j];
      offset[j] += share * c.bias3[j];
    }
  }
  parallel(threads, [&](int thread) {
    const Range range = share(g.m2, thread, threads.count);
    for (int64_t m = range.begin; m < range.end; ++m) {
      for (int64_t j = 0; j < g.co; j += 8) {
        H value = load_half(offset + j);
        for (int i = 0; i < plan.count; ++i) {
          const CandidatePlan<E>& c = plan.candidates[i];
          const H centred = sub(load_half(c.y3 + m * g.co + j), load_half(c.mean3 + j));
          value = fma(centred, load_half(scale + i * g.co + j), value);
        }
        if (residual) value = fma(splat_half(weight), load_half(residual + m * g.co + j), value);
        if (j + 8 <= g.out_channels) {
          store(out + m * g.out_channels + j, value);
        } else {
          E tail[8];
          store(tail, value);
          for (int64_t c = j; c < g.out_channels; ++c) out[m * g.out_channels + c] = tail[c - j];
        }
      }
    }
  });
}

// Backward of candidate i's third batch norm: dy3 [m2][co] = mix gain rstd (dout - mean(dout) - h3 mean(dout
// h3)). `sums` [2][co] become sum(dout) and sum(dout h3), h3 being the normalised y3.
template <class E>
inline void backward_norm3(const Geometry& g, const CandidatePlan<E>& c, Compute<E> mix, const E* dout,
                           E* dy3, double* sums, const Threads& threads) {
  using T = Compute<E>;
  Scratch scratch;
  double* parts = scratch.zeros<double>(threads.count * 2 * g.co);
  parallel(threads, [&](int thread) {
    double* mine = parts + thread * 2 * g.co;
    const Range range = share(g.m2, thread, threads.count);
    for (int64_t m = range.begin; m < range.end; m += kNarrowBlock)
      for (int64_t j = 0; j < g.co; j += 8)
        paired_sums(dout + m * g.co + j, c.y3 + m * g.co + j, c.mean3 + j, g.co,
                    minimum(kNarrowBlock, range.end - m), mine + j, mine + g.co + j);
  });
  T* mean = scratch.take<T>(g.co);
  T* slope = scratch.take<T>(g.co);
  T* scale = scratch.take<T>(g.co);
  for (int64_t j = 0; j < g.co; ++j) {
    double total = 0, product = 0;
    for (int t = 0; t < threads.count; ++t)
      total += parts[t * 2 * g.co + j], product += parts[t * 2 * g.co + g.co + j];
    sums[j] = total, sums[g.co + j] = product * c.rstd3[j];
    mean[j] = static_cast<T>(total / g.m2);
    slope[j] = static_cast<T>(-product / g.m2 * c.rstd3[j] * c.rstd3[j]);
    scale[j] = mix * c.gain3[j] * c.rstd3[j];
  }
  parallel(threads, [&](int thread) {
    const Range range = share(g.m2, thread, threads.count);
    for (int64_t m = range.begin; m < range.end; ++m) {
      for (int64_t j = 0; j < g.co; j += 8) {
        const auto centred = sub(load_half(c.y3 + m * g.co + j), load_half(c.mean3 + j));
        const auto rest = sub(load_half(dout + m * g.co + j), load_half(mean + j));
        store(dy3 + m * g.co + j, mul(fma(centred, load_half(slope + j), rest), load_half(scale + j)));
      }
    }
  });
}

// dx [pixels][channels, not padded] = sum of `count` partial results + weight * residual.
template <class E, class T>
inline void sum_parts(const T* const* parts, int count, const E* residual, T weight, int64_t pixels,
                      int64_t channels, int64_t padded, E* dx, const Threads& threads) {
  parallel(threads, [&](int thread) {
    const Range range = share(pixels, thread, threads.count);
    for (int64_t m = range.begin; m < range.end; ++m) {
      for (int64_t j = 0; j < padded; j += 8) {
        auto value = load_half(parts[0] + m * padded + j);
        for (int i = 1; i < count; ++i) value = add(value, load_half(parts[i] + m * padded + j));
        if (residual) value = fma(splat_half(weight), load_half(residual + m * padded + j), value);
        if (j + 8 <= channels) {
          store(dx + m * channels + j, value);
        } else {
          E tail[8];
          store(tail, value);
          for (int64_t c = j; c < channels; ++c) dx[m * channels + c] = tail[c - j];
        }
      }
    }
  });
}

}  // namespace tfnas::TFNAS_ISA
