// Adam on the architecture parameters.
#include "kernels/adam.cuh"

namespace tfnas::cuda {
template void adam_step(const LogProbabilities<float>&, const LogProbabilities<float>&, const AdamOptions&,
                        float*, float*, cudaStream_t);
template void adam_step(const LogProbabilities<double>&, const LogProbabilities<double>&, const AdamOptions&,
                        double*, double*, cudaStream_t);
}  // namespace tfnas::cuda
