#include "cpu/dispatch.hpp"

#include <cstdlib>

#if defined(EFFC_HAVE_X86_KERNELS)
#include <cpuid.h>
#endif
#if defined(EFFC_HAVE_X86_KERNELS) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace effc::cpu {
namespace {

#if defined(EFFC_HAVE_X86_KERNELS)
// The checks name exactly the instruction sets that CMakeLists.txt compiles each file for. They include the operating
// system's consent to save the wide registers.
bool cpu_has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
bool cpu_has_avx512_bf16() {
  return cpu_has_avx512() && __builtin_cpu_supports("avx512bf16");
}
// AMX with bfloat16, which a process has to ask the kernel for, because its registers are large to save.
bool cpu_has_amx() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!cpu_has_avx512_bf16() || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool permitted =
      (d & kTile) != 0 && (d & kBf16) != 0 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
#else
  return false;
#endif
}
bool amx_disabled() {
  const char* variable = std::getenv("EFFC_AMX");
  return variable != nullptr && variable == std::string("0");
}
// Not all compilers know the name "f16c"; its registers are those of AVX2.
bool cpu_has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
bool cpu_has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpu_has_f16c();
}
#endif

}  // namespace

bool bf16_allowed(const std::string& attribute, std::string& problem) {
  const char* variable = std::getenv("EFFC_PRECISION");
  const bool overridden = attribute.empty() && variable != nullptr && variable[0] != 0;
  const std::string precision = overridden ? variable : attribute;
  if (!precision.empty() && precision != "fp32" && precision != "bf16") {
    problem = (overridden ? "EFFC_PRECISION is '" : "the attribute 'precision' is '") + precision +
              "'. Set it to fp32 or bf16.";
  }
  return precision == "bf16";
}

const Kernels* choose_kernels(std::string& problem, bool bf16) {
  const char* variable = std::getenv("EFFC_ISA");
  const std::string wanted = variable == nullptr ? "" : variable;
  if (!wanted.empty() && wanted != "avx512" && wanted != "avx2" && wanted != "portable") {
    problem = "EFFC_ISA is '" + wanted + "'. Set it to avx512, avx2 or portable, or unset it for the fastest.";
    return nullptr;
  }
#if defined(EFFC_HAVE_X86_KERNELS)
  // Where there is AMX, the older instructions for bfloat16 run at half the rate of those for float.
  if (bf16 && !amx_disabled() && cpu_has_amx() && (wanted.empty() || wanted == "avx512")) return &avx512_amx_kernels();
  if (bf16 && cpu_has_avx512_bf16() && (wanted.empty() || wanted == "avx512")) return &avx512_bf16_kernels();
  if (cpu_has_avx512() && (wanted.empty() || wanted == "avx512")) return &avx512_kernels();
  if (cpu_has_avx2() && (wanted.empty() || wanted == "avx2")) return &avx2_kernels();
#endif
  if (wanted.empty() || wanted == "portable") return &portable_kernels();
  problem = "EFFC_ISA asks for " + wanted + ", which this CPU cannot run. Unset it for the fastest that it can.";
  return nullptr;
}

}  // namespace effc::cpu
