// The kernels for CPUs with AVX512_BF16. Only this file gets that instruction set's compiler flags.
#include "cpu/simd_avx512.hpp"
// Simd must be known first.
#include "cpu/attention_bf16.hpp"
#include "cpu/attention_kernels.hpp"

namespace effc::cpu {

const Kernels& avx512_bf16_kernels() {
  static constexpr Kernels kernels = {"avx512_bf16",       attend_tile_bf16, attend_few,
                                      multiply_add_rounds, &kLinearKernels,  attend_cache};
  return kernels;
}

}  // namespace effc::cpu
