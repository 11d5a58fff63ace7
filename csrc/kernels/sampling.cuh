// Maths of path sampling, one layer at a time, for host and device. tfnas_ext/sampling.py repeats it in plain
// PyTorch.
//
// Choices must be the same bit for bit from C++, CUDA and PyTorch, and library logarithms differ in the last
// bit between them. So the logarithm is written out in additions, multiplications and divisions, each rounded
// once: no fused multiply-add (host files are compiled with -ffp-contract=off, the device uses the rounding
// intrinsics).
#pragma once

#include <cmath>
#include <cstdint>

#include "philox.cuh"

namespace tfnas {

// What a number is drawn for: part of Philox's counter, so that the uses of one step are independent.
enum class Stream : uint32_t { first_path = 0, second_path = 1, mixture = 2 };

enum class SecondPath : int { none = 0, random = 1, gumbel = 2, min = 3, max = 4 };

TFNAS_HD double add_rn(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

TFNAS_HD double mul_rn(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// Natural logarithm of a positive, finite, normal x, within 2 units in the last place.
// x = m 2^e with m in [1/2, 1), then [sqrt(1/2), sqrt(2)); log m = 2 artanh(f) with f = (m - 1) / (m + 1).
TFNAS_HD double portable_log(double x) {
  int exponent;
  double m = frexp(x, &exponent);
  if (m < 0.70710678118654757) {
    m = mul_rn(m, 2.0);
    exponent -= 1;
  }
  const double f = add_rn(m, -1.0) / add_rn(m, 1.0);
  const double f2 = mul_rn(f, f);
  double series = 0.0;
  for (int n = 21; n >= 3; n -= 2) series = mul_rn(f2, add_rn(series, 1.0 / n));
  const double log_m = add_rn(mul_rn(2.0, f), mul_rn(mul_rn(2.0, f), series));
  return add_rn(mul_rn(static_cast<double>(exponent), 0.69314718055994531), log_m);
}

// The number for `candidate` of `layer`, in (0, 1): (k + 1/2) 2^-52 with 52 random bits k.
TFNAS_HD double uniform(uint64_t seed, uint64_t step, uint32_t layer, uint32_t candidate, Stream stream) {
  const PhiloxWords counter = {{candidate / 2, layer | static_cast<uint32_t>(stream) << 24,
                                static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32)}};
  const PhiloxWords random =
      philox4x32_10(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  const uint32_t half = candidate % 2 * 2;
  const uint64_t bits = (static_cast<uint64_t>(random.w[half + 1]) << 32 | random.w[half]) >> 12;
  return mul_rn(add_rn(static_cast<double>(bits), 0.5), 1.0 / 4503599627370496.0);
}

// Standard Gumbel noise from a uniform number.
TFNAS_HD double gumbel(double u) { return -portable_log(-portable_log(u)); }

// One layer's candidates: log-probabilities and which of them exist (`valid` may be null: all do).
struct LayerCandidates {
  const double* log_alpha;
  const bool* valid;
  int count;

  TFNAS_HD bool usable(int candidate, int excluded) const {
    return candidate != excluded && (valid == nullptr || valid[candidate]);
  }
};

// Index of the largest (log alpha + Gumbel noise) / tau, `excluded` left out; ties go to the first. -1 if
// none is left.
TFNAS_HD int gumbel_choice(const LayerCandidates& layer, double tau, uint64_t seed, uint64_t step,
                           uint32_t index, Stream stream, int excluded) {
  int best = -1;
  double best_score = 0.0;
  for (int c = 0; c < layer.count; ++c) {
    if (!layer.usable(c, excluded)) continue;
    const double noise = gumbel(uniform(seed, step, index, static_cast<uint32_t>(c), stream));
    const double score = add_rn(layer.log_alpha[c], noise) / tau;
    if (best < 0 || score > best_score) {
      best = c;
      best_score = score;
    }
  }
  return best;
}

// Index of the smallest (sign = -1) or largest (+1) log alpha, `excluded` left out; ties go to the first.
TFNAS_HD int extreme_choice(const LayerCandidates& layer, double sign, int excluded) {
  int best = -1;
  for (int c = 0; c < layer.count; ++c) {
    if (!layer.usable(c, excluded)) continue;
    if (best < 0 || mul_rn(sign, layer.log_alpha[c]) > mul_rn(sign, layer.log_alpha[best])) best = c;
  }
  return best;
}

// One of the usable candidates, each as likely, `excluded` left out.
TFNAS_HD int random_choice(const LayerCandidates& layer, uint64_t seed, uint64_t step, uint32_t index,
                           int excluded) {
  int left = 0;
  for (int c = 0; c < layer.count; ++c) left += layer.usable(c, excluded);
  const double u = uniform(seed, step, index, 0, Stream::second_path);
  int skip = static_cast<int>(mul_rn(u, static_cast<double>(left)));
  if (skip > left - 1) skip = left - 1;  // u * left may round up to left
  for (int c = 0; c < layer.count; ++c) {
    if (layer.usable(c, excluded) && skip-- == 0) return c;
  }
  return -1;
}

// The second path's candidate, drawn from those that the first path did not take. Where that was the only
// one, it is taken again: the layer then runs the same operation in both paths.
TFNAS_HD int second_choice(const LayerCandidates& layer, SecondPath mode, double tau, uint64_t seed,
                           uint64_t step, uint32_t index, int first) {
  int choice = -1;
  if (mode == SecondPath::random) choice = random_choice(layer, seed, step, index, first);
  if (mode == SecondPath::gumbel)
    choice = gumbel_choice(layer, tau, seed, step, index, Stream::second_path, first);
  if (mode == SecondPath::min) choice = extreme_choice(layer, -1.0, first);
  if (mode == SecondPath::max) choice = extreme_choice(layer, 1.0, first);
  return choice < 0 ? first : choice;
}

}  // namespace tfnas
