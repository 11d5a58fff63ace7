// Clipping, Adam and renormalisation of the architecture parameters: plain structures, and the function that
// runs them.
#pragma once

#include "compat.cuh"

namespace tfnas::cuda {

// Rows of log-probabilities with Adam's moments, all [rows, columns]. `mask` tells which entries exist; the
// rest is -inf.
template <class A>
struct LogProbabilities {
  A *values, *first_moment, *second_moment;
  const A* grad;
  const bool* mask;
  int rows, columns;
};

struct AdamOptions {
  double lr, beta1, beta2, weight_decay, eps, max_norm;
};

// One Adam step on `alpha` and `beta` together, gradients clipped by the norm of both, rows renormalised by
// log softmax. `steps` [1] counts the steps taken; norm [1] receives the norm before clipping.
template <class A>
void adam_step(const LogProbabilities<A>& alpha, const LogProbabilities<A>& beta, const AdamOptions& options,
               A* steps, A* norm, cudaStream_t stream);

}  // namespace tfnas::cuda
