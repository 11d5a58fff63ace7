// Gradient norm and SGD on the sampled widths and on whole tensors.
#include "kernels/sgd.cuh"

namespace tfnas::cuda {
template void gradient_norm(const Segment<float>*, int, const DenseTensors<float>*, int, double, float*,
                            float*, float*, cudaStream_t);
template void gradient_norm(const Segment<double>*, int, const DenseTensors<double>*, int, double, double*,
                            double*, double*, cudaStream_t);
template void clipped_sgd(const Segment<float>*, int, const DenseTensors<float>*, int, const float*,
                          const float*, float, float, cudaStream_t);
template void clipped_sgd(const Segment<double>*, int, const DenseTensors<double>*, int, const double*,
                          const double*, double, double, cudaStream_t);
}  // namespace tfnas::cuda
