// One source for two targets: nvcc makes device code of it, g++ makes code for the emulator (emulator/cuda.hpp), where
// the tests execute it. Kernels include this file and nothing of CUDA itself.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace effc::cuda {

// 16-bit and 8-bit numbers as they lie in memory. How they are converted is each target's business.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
// Sign, four bits of exponent, three of fraction, no infinity: up to 448.
struct E4M3 {
  uint8_t bits;
};

}  // namespace effc::cuda

#if defined(__CUDACC__)
#include "cuda/device.cuh"
#else
#include "cuda/emulator/cuda.hpp"
#endif

namespace effc::cuda {

constexpr int kWarpSize = 32;
constexpr uint32_t kWholeWarp = 0xffffffffu;

// The largest or the sum of what `lanes` neighbouring lanes hold; `lanes` is a power of two, and all get the result.
template <int lanes>
EFFC_DEVICE float largest_of_lanes(float number) {
  EFFC_UNROLL
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    number = fmaxf(number, __shfl_xor_sync(kWholeWarp, number, distance));
  }
  return number;
}

template <int lanes>
EFFC_DEVICE float sum_of_lanes(float number) {
  EFFC_UNROLL
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    number += __shfl_xor_sync(kWholeWarp, number, distance);
  }
  return number;
}

}  // namespace effc::cuda
