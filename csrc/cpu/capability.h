// Which instruction set the CPU kernels use: found once, at the first question. No torch header.
//
// A kernel file listed under "cpu_per_isa" in csrc/sources.json is compiled once per instruction set, with
// that set's flags and with TFNAS_ISA defined as its name. It puts everything it defines in `namespace
// tfnas::TFNAS_ISA` and exports one table of function pointers; the caller, compiled once, picks:
//
//   namespace tfnas {
//   namespace generic { extern const Table table; }
//   namespace avx2 { extern const Table table; }
//   namespace avx512 { extern const Table table; }
//   const Table& kernels() { return TFNAS_PICK_ISA(table); }
//   }
//
// Such a file must not define or instantiate inline functions shared with common code (containers,
// std::function): the linker may keep the copy with the widest instructions for everybody.
#pragma once

#include <string>

namespace tfnas {

// In order: every one includes those before it.
enum class CpuCapability { generic = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

const char* capability_name(CpuCapability capability);

// The most that this processor, and this build, can run.
CpuCapability best_cpu_capability();

// `requested` as a capability. Throws std::invalid_argument where it is no name, or more than the processor
// has.
CpuCapability parse_cpu_capability(const std::string& requested);

// What the kernels run on: the environment variable TFNAS_CPU_CAPABILITY where it is set, else the best one.
CpuCapability cpu_capability();

}  // namespace tfnas

#if defined(__x86_64__)
#define TFNAS_PICK_ISA(table)                                                           \
  (::tfnas::cpu_capability() >= ::tfnas::CpuCapability::avx512 ? ::tfnas::avx512::table \
   : ::tfnas::cpu_capability() == ::tfnas::CpuCapability::avx2 ? ::tfnas::avx2::table   \
                                                               : ::tfnas::generic::table)
// For a file that is compiled for avx512_bf16 too.
#define TFNAS_PICK_ISA_WITH_BF16(table)                                                           \
  (::tfnas::cpu_capability() == ::tfnas::CpuCapability::avx512_bf16 ? ::tfnas::avx512_bf16::table \
                                                                    : TFNAS_PICK_ISA(table))
#else
#define TFNAS_PICK_ISA(table) (::tfnas::generic::table)
#define TFNAS_PICK_ISA_WITH_BF16(table) (::tfnas::generic::table)
#endif
