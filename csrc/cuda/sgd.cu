// Gradient norm and SGD on the sampled widths.
#include "kernels/sgd.cuh"

namespace tfnas::cuda {
template void segments_norm(const Segment<float>*, int, float*, float*, cudaStream_t);
template void segments_norm(const Segment<double>*, int, double*, double*, cudaStream_t);
template void segments_sgd(const Segment<float>*, int, const float*, float, float, float, cudaStream_t);
template void segments_sgd(const Segment<double>*, int, const double*, double, double, double, cudaStream_t);
}  // namespace tfnas::cuda
