// Path sampling on the host: raw pointers and sizes, no torch.
#pragma once

#include <cstdint>

#include "kernels/sampling.cuh"

namespace tfnas {

// Draws every layer's candidate for one path (SecondPath::none) or two. `log_alpha` and `valid` (may be null)
// are [layers, candidates], row by row; `choice` gets [1 or 2, layers].
void sample_paths_cpu(const double* log_alpha, const bool* valid, int64_t layers, int64_t candidates,
                      double tau, uint64_t seed, uint64_t step, SecondPath second, int64_t* choice);

// The uniform numbers of one stream, or their Gumbel noise, [layers, candidates].
void uniforms_cpu(int64_t layers, int64_t candidates, uint64_t seed, uint64_t step, Stream stream,
                  double* out);
void gumbel_noise_cpu(int64_t layers, int64_t candidates, uint64_t seed, uint64_t step, Stream stream,
                      double* out);

}  // namespace tfnas
