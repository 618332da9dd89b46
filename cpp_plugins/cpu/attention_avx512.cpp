// The kernels compiled for avx512. Only this file gets that instruction set's compiler flags.
#include "cpu/simd_avx512.hpp"
// Simd must be known first.
#include "cpu/attention_kernels.hpp"

namespace effc::cpu {

const Kernels& avx512_kernels() {
  static constexpr Kernels kernels = {Simd::kName,         attend_tile,     attend_few,
                                      multiply_add_rounds, &kLinearKernels, attend_cache};
  return kernels;
}

}  // namespace effc::cpu
