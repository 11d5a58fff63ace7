// The CUDA engine's operators for CPU tensors: the launchers of csrc/cuda, compiled for the emulator. Linked
// with torch by tests/emulated_engine.py, which compiles the kernels beside it, so CMake does not build it.
#include "cuda/layer.cpp"
#include "cuda/step_ops.cpp"
#ifdef TFNAS_DEFINE_OPERATORS  // no native module that has defined them
#include "ops/layer.cpp"
#endif
