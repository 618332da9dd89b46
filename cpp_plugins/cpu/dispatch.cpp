#include "cpu/dispatch.hpp"

#include <cstdlib>

namespace effc::cpu {
namespace {

#if defined(EFFC_HAVE_X86_KERNELS)
// The checks name exactly the instruction sets that CMakeLists.txt compiles each file for. They include the operating
// system's consent to save the wide registers.
bool cpu_has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
bool cpu_has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#endif

}  // namespace

const Kernels* choose_kernels(std::string& problem) {
  const char* variable = std::getenv("EFFC_ISA");
  const std::string wanted = variable == nullptr ? "" : variable;
  if (!wanted.empty() && wanted != "avx512" && wanted != "avx2" && wanted != "portable") {
    problem = "EFFC_ISA is '" + wanted + "'. Set it to avx512, avx2 or portable, or unset it for the fastest.";
    return nullptr;
  }
#if defined(EFFC_HAVE_X86_KERNELS)
  if (cpu_has_avx512() && (wanted.empty() || wanted == "avx512")) return &avx512_kernels();
  if (cpu_has_avx2() && (wanted.empty() || wanted == "avx2")) return &avx2_kernels();
#endif
  if (wanted.empty() || wanted == "portable") return &portable_kernels();
  problem = "EFFC_ISA asks for " + wanted + ", which this CPU cannot run. Unset it for the fastest that it can.";
  return nullptr;
}

}  // namespace effc::cpu
