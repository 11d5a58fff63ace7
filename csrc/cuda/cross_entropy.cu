// Cross entropy.
#include "kernels/cross_entropy.cuh"

namespace tfnas::cuda {
template void cross_entropy(const float*, const int64_t*, int, int, float*, float*, int64_t*, double*, int*,
                            cudaStream_t);
template void cross_entropy(const double*, const int64_t*, int, int, double*, double*, int64_t*, double*,
                            int*, cudaStream_t);
}  // namespace tfnas::cuda
