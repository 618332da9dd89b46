// The kernels for CPUs with AMX, Intel's matrix unit. Only this file gets that instruction set's compiler flags.
#include "cpu/simd_avx512.hpp"
// Simd must be known first.
#include "cpu/attention_amx.hpp"
#include "cpu/attention_kernels.hpp"

namespace effc::cpu {

const Kernels& avx512_amx_kernels() {
  static constexpr Kernels kernels = {"avx512_amx",        attend_tile_amx, attend_few,
                                      multiply_add_rounds, &kLinearKernels, attend_cache};
  return kernels;
}

}  // namespace effc::cpu
