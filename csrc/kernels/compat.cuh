// The one header through which kernels see CUDA. With nvcc it is CUDA itself; with a host compiler and
// TFNAS_EMULATE it is tests/emulator, which runs the same kernels on the CPU to test them.
#pragma once

#define TFNAS_UNPAREN(...) __VA_ARGS__

#ifdef TFNAS_EMULATE
#include "emulator.h"

// Dynamic shared memory of the launch, seen as an array of T.
#define TFNAS_DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(emulator::dynamic_shared())
// Static shared memory: TFNAS_SHARED(float, tile, [32][33]); its content is poison at the start of every
// block.
#define TFNAS_SHARED(T, name, dims)                              \
  static T name dims;                                            \
  {                                                              \
    static unsigned long seen = 0;                               \
    emulator::poison_once_per_block(&name, sizeof(name), &seen); \
  }
// TFNAS_LAUNCH((kernel<T, 4>), grid, block, shared_bytes, stream, arguments...)
#define TFNAS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  emulator::launch(grid, block, shared_bytes, [=] { TFNAS_UNPAREN kernel(__VA_ARGS__); })

namespace tfnas::cuda {
template <class Kernel>
void allow_shared(Kernel, size_t) {}
}  // namespace tfnas::cuda

#else
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define TFNAS_DYN_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char tfnas_dyn_shared[]; \
  T* name = reinterpret_cast<T*>(tfnas_dyn_shared)
#define TFNAS_SHARED(T, name, dims) __shared__ T name dims
#define TFNAS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  TFNAS_UNPAREN kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)

namespace tfnas::cuda {
// More than 48 KiB of dynamic shared memory must be asked for. What goes wrong shows in the launch that
// follows.
template <class Kernel>
void allow_shared(Kernel kernel, size_t bytes) {
  if (bytes > 48 * 1024) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  }
}
}  // namespace tfnas::cuda
#endif
