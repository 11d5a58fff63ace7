// Compiled once per instruction set: the tables of the MBInvRes kernels for bfloat16, computed in float.
#include "cpu/mbinvres_tables.h"

namespace tfnas::TFNAS_ISA {

extern const LayerKernels<BFloat16> layer_kernels_bf16;
const LayerKernels<BFloat16> layer_kernels_bf16 = layer_table<BFloat16>();
extern const VectorKernels<BFloat16> vector_kernels_bf16;
const VectorKernels<BFloat16> vector_kernels_bf16 = vector_table<BFloat16>();

}  // namespace tfnas::TFNAS_ISA
