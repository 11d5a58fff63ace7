// Compiled once per instruction set: the tables of the MBInvRes kernels for float and double.
#include "cpu/mbinvres_tables.h"

namespace tfnas::TFNAS_ISA {

extern const LayerKernels<float> layer_kernels;
const LayerKernels<float> layer_kernels = layer_table<float>();
extern const VectorKernels<float> vector_kernels;
const VectorKernels<float> vector_kernels = vector_table<float>();

#if defined(CPU_CAPABILITY_DEFAULT)  // float64 exists once, for gradient checks: plain loops
extern const LayerKernels<double> layer_kernels_double;
const LayerKernels<double> layer_kernels_double = layer_table<double>();
extern const VectorKernels<double> vector_kernels_double;
const VectorKernels<double> vector_kernels_double = vector_table<double>();
#endif

}  // namespace tfnas::TFNAS_ISA
