#include "cpu/sampling.h"

namespace tfnas {

void sample_paths_cpu(const double* log_alpha, const bool* valid, int64_t layers, int64_t candidates,
                      double tau, uint64_t seed, uint64_t step, SecondPath second, int64_t* choice) {
  for (int64_t l = 0; l < layers; ++l) {
    const LayerCandidates layer = {log_alpha + l * candidates,
                                   valid == nullptr ? nullptr : valid + l * candidates,
                                   static_cast<int>(candidates)};
    const auto index = static_cast<uint32_t>(l);
    const int first = gumbel_choice(layer, tau, seed, step, index, Stream::first_path, /*excluded=*/-1);
    choice[l] = first;
    if (second != SecondPath::none)
      choice[layers + l] = second_choice(layer, second, tau, seed, step, index, first);
  }
}

void uniforms_cpu(int64_t layers, int64_t candidates, uint64_t seed, uint64_t step, Stream stream,
                  double* out) {
  for (int64_t l = 0; l < layers; ++l)
    for (int64_t c = 0; c < candidates; ++c)
      *out++ = uniform(seed, step, static_cast<uint32_t>(l), static_cast<uint32_t>(c), stream);
}

void gumbel_noise_cpu(int64_t layers, int64_t candidates, uint64_t seed, uint64_t step, Stream stream,
                      double* out) {
  uniforms_cpu(layers, candidates, seed, step, stream, out);
  for (int64_t i = 0; i < layers * candidates; ++i) out[i] = gumbel(out[i]);
}

}  // namespace tfnas
