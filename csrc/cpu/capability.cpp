#include "cpu/capability.h"

#include <cstdlib>
#include <stdexcept>

namespace tfnas {
namespace {

constexpr CpuCapability kAll[] = {CpuCapability::generic, CpuCapability::avx2, CpuCapability::avx512,
                                  CpuCapability::avx512_bf16};

CpuCapability detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // f16c has no name here in older compilers; every processor with avx2 has it.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return CpuCapability::avx512_bf16;
  if (avx512) return CpuCapability::avx512;
  if (avx2) return CpuCapability::avx2;
#endif
  return CpuCapability::generic;
}

}  // namespace

const char* capability_name(CpuCapability capability) {
  switch (capability) {
    case CpuCapability::avx2:
      return "avx2";
    case CpuCapability::avx512:
      return "avx512";
    case CpuCapability::avx512_bf16:
      return "avx512_bf16";
    default:
      return "generic";
  }
}

CpuCapability best_cpu_capability() {
  static const CpuCapability best = detect();
  return best;
}

CpuCapability parse_cpu_capability(const std::string& requested) {
  for (CpuCapability capability : kAll) {
    if (requested != capability_name(capability)) continue;
    if (capability > best_cpu_capability()) {
      throw std::invalid_argument("TFNAS_CPU_CAPABILITY=" + requested + ", but this processor has at most " +
                                  capability_name(best_cpu_capability()) + ". Unset it or ask for less.");
    }
    return capability;
  }
  throw std::invalid_argument("TFNAS_CPU_CAPABILITY must be generic, avx2, avx512 or avx512_bf16, got '" +
                              requested + "'");
}

CpuCapability cpu_capability() {
  static const CpuCapability chosen = [] {
    const char* requested = std::getenv("TFNAS_CPU_CAPABILITY");
    return requested && *requested ? parse_cpu_capability(requested) : best_cpu_capability();
  }();
  return chosen;
}

}  // namespace tfnas
