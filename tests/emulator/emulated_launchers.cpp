// The CUDA engine's operators for CPU tensors: the launchers of csrc/cuda and all their kernels, compiled for
// the emulator. Linked with torch by tests/test_engine_cuda.py, so CMake does not build it.
#include "cuda/layer.cpp"

#include "cuda/layer_bf16.cu"
#include "cuda/layer_fp32_fma.cu"
#include "cuda/layer_fp32_tf32.cu"
#include "cuda/layer_fp32_tf32x3.cu"
#include "cuda/layer_fp64.cu"
#include "cuda/sgd.cu"
#ifdef TFNAS_DEFINE_OPERATORS  // no native module that has defined them
#include "ops/layer.cpp"
#endif
