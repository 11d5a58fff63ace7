// The instruction set named by hand is taken, refused where the processor lacks it, and never mistaken.
#include "cpu/capability.h"

#include <cstdio>
#include <cstdlib>
#include <stdexcept>

namespace {

bool refused(const char* requested) {
  try {
    tfnas::parse_cpu_capability(requested);
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

}  // namespace

int main() {
  using tfnas::CpuCapability;
  const CpuCapability best = tfnas::best_cpu_capability();
  for (CpuCapability c :
       {CpuCapability::generic, CpuCapability::avx2, CpuCapability::avx512, CpuCapability::avx512_bf16}) {
    if (c <= best)
      check(tfnas::parse_cpu_capability(tfnas::capability_name(c)) == c, "a supported name is taken");
    else
      check(refused(tfnas::capability_name(c)), "an unsupported name is refused");
  }
  check(refused("AVX2"), "a wrong name is refused");
  check(refused(""), "an empty name is refused");
  setenv("TFNAS_CPU_CAPABILITY", "generic", 1);
  check(tfnas::cpu_capability() == CpuCapability::generic, "the environment variable decides");
  std::puts("1 passed, 0 failed");
  return 0;
}
