// The Python module tfnas_ext._C. Importing it registers the operators of csrc/ops (torch.ops.tfnas).
// The only file with torch's Python headers: pybind.h passes tensors and costs a third of torch/extension.h.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>

#include "cpu/capability.h"

#if AT_PARALLEL_OPENMP && !defined(_OPENMP)
#error "at::parallel_for would run on one thread: compile with -fopenmp"
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of tfnas_ext";
  m.def(
      "cpu_capability", [] { return std::string(tfnas::capability_name(tfnas::cpu_capability())); },
      "Instruction set of the CPU kernels: generic, avx2, avx512 or avx512_bf16");
  m.def(
      "best_cpu_capability", [] { return std::string(tfnas::capability_name(tfnas::best_cpu_capability())); },
      "The widest instruction set that this processor can run");
}
