#include "cpu/mbinvres.h"

#include <stdexcept>
#include <string>

#include "cpu/capability.h"
#include "cpu/memory_stack.h"

namespace tfnas {

namespace generic {
extern const LayerKernels<float> layer_kernels;
extern const VectorKernels<float> vector_kernels;
extern const LayerKernels<double> layer_kernels_double;
extern const VectorKernels<double> vector_kernels_double;
}  // namespace generic
namespace avx2 {
extern const LayerKernels<float> layer_kernels;
extern const VectorKernels<float> vector_kernels;
}  // namespace avx2
namespace avx512 {
extern const LayerKernels<float> layer_kernels;
extern const VectorKernels<float> vector_kernels;
}  // namespace avx512

const LayerKernels<float>& float_kernels() { return TFNAS_PICK_ISA(layer_kernels); }
const LayerKernels<double>& double_kernels() { return generic::layer_kernels_double; }
const VectorKernels<float>& float_vector_kernels() { return TFNAS_PICK_ISA(vector_kernels); }
const VectorKernels<double>& double_vector_kernels() { return generic::vector_kernels_double; }

Act parse_act(std::string_view name, std::string_view argument) {
  if (name == "relu") return Act::relu;
  if (name == "relu6") return Act::relu6;
  if (name == "swish") return Act::swish;
  if (name == "hard_swish") return Act::hard_swish;
  throw std::invalid_argument(std::string(argument) +
                              " must be one of relu, relu6, swish, hard_swish, got '" + std::string(name) +
                              "'");
}

Gate parse_gate(std::string_view name) {
  if (name == "sigmoid") return Gate::sigmoid;
  if (name == "hard_sigmoid") return Gate::hard_sigmoid;
  throw std::invalid_argument("se_gate must be one of sigmoid, hard_sigmoid, got '" + std::string(name) +
                              "'");
}

Design choose_design(int64_t pixels) {
  // Where a group of channels of the whole batch no longer fits a core's L2, strips win (measured).
  return pixels <= 4000 ? Design::channels : Design::strips;
}

namespace {

MemoryStack& scratch() {
  static thread_local MemoryStack stack;
  return stack;
}

}  // namespace

void* scratch_take(int64_t bytes) { return scratch().take(bytes); }
int64_t scratch_mark() { return scratch().mark(); }
void scratch_release(int64_t mark) { scratch().release(mark); }

}  // namespace tfnas
