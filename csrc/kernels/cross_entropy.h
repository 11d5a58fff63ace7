// Cross entropy of logits with whole-number labels: loss, right answers and gradient.
#pragma once

#include "compat.cuh"

namespace tfnas::cuda {

// loss [1]: mean over rows of log(sum exp logits) - logits[label]; dlogits [rows, classes]: its gradient;
// correct [1]: rows whose largest logit (the first of equal ones) is the label's. A label that is no class
// gives a NaN loss. row_losses [rows], row_correct [rows]: scratch.
template <class A>
void cross_entropy(const A* logits, const int64_t* labels, int rows, int classes, A* dlogits, A* loss,
                   int64_t* correct, double* row_losses, int* row_correct, cudaStream_t stream);

}  // namespace tfnas::cuda
