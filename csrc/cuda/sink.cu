// The sink of a stage, for all types of activations.
#include "kernels/sink.cuh"

namespace tfnas::cuda {
template void sink(const SinkOutputs<float>&, const float*, float*, int64_t, cudaStream_t);
template void sink(const SinkOutputs<double>&, const double*, double*, int64_t, cudaStream_t);
template void sink(const SinkOutputs<__nv_bfloat16>&, const float*, __nv_bfloat16*, int64_t, cudaStream_t);
template void sink_dots(const SinkOutputs<float>&, const float*, float*, float*, int64_t, cudaStream_t);
template void sink_dots(const SinkOutputs<double>&, const double*, double*, double*, int64_t, cudaStream_t);
template void sink_dots(const SinkOutputs<__nv_bfloat16>&, const __nv_bfloat16*, float*, float*, int64_t,
                        cudaStream_t);
}  // namespace tfnas::cuda
