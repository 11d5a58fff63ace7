#include "cpu/mbinvres.h"

#include <stdexcept>
#include <string>

#include "cpu/capability.h"
#include "cpu/memory_stack.h"

namespace tfnas {

#define TFNAS_TABLES(isa)                                   \
  namespace isa {                                           \
  extern const LayerKernels<float> layer_kernels;           \
  extern const VectorKernels<float> vector_kernels;         \
  extern const LayerKernels<BFloat16> layer_kernels_bf16;   \
  extern const VectorKernels<BFloat16> vector_kernels_bf16; \
  }
TFNAS_TABLES(generic)
TFNAS_TABLES(avx2)
TFNAS_TABLES(avx512)
TFNAS_TABLES(avx512_bf16)
namespace generic {
extern const LayerKernels<double> layer_kernels_double;
extern const VectorKernels<double> vector_kernels_double;
}  // namespace generic

template <>
const LayerKernels<float>& layer_kernels_of<float>() {
  return TFNAS_PICK_ISA(layer_kernels);
}
template <>
const LayerKernels<double>& layer_kernels_of<double>() {
  return generic::layer_kernels_double;
}
template <>
const LayerKernels<BFloat16>& layer_kernels_of<BFloat16>() {
  return TFNAS_PICK_ISA_WITH_BF16(layer_kernels_bf16);
}
template <>
const VectorKernels<float>& vector_kernels_of<float>() {
  return TFNAS_PICK_ISA(vector_kernels);
}
template <>
const VectorKernels<double>& vector_kernels_of<double>() {
  return generic::vector_kernels_double;
}
template <>
const VectorKernels<BFloat16>& vector_kernels_of<BFloat16>() {
  return TFNAS_PICK_ISA_WITH_BF16(vector_kernels_bf16);
}

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

thread_local MemoryStack* borrowed = nullptr;

MemoryStack& scratch() {
  static thread_local MemoryStack own;
  return borrowed ? *borrowed : own;
}

}  // namespace

void* scratch_take(int64_t bytes) { return scratch().take(bytes); }
int64_t scratch_mark() { return scratch().mark(); }
void scratch_release(int64_t mark) { scratch().release(mark); }

ScratchFrom::ScratchFrom(MemoryStack& stack) : before_(borrowed) { borrowed = &stack; }
ScratchFrom::~ScratchFrom() { borrowed = before_; }

}  // namespace tfnas
