// What is different for E4M3: the products of weights and values. Queries and keys need nothing of their own, because
// load_matrices moves bytes in pairs, and multiply_add wants four bytes where 16-bit numbers have two.
#pragma once

#include "cuda/warp_tile.cuh"

namespace effc::cuda {

// Weights are at most 1, and E4M3 is coarse below 2^-6 and zero below 2^-10: they are multiplied with 256, the largest
// power of two that E4M3 holds, so that nothing above 2^-14 of the largest loses precision. A power of two, because
// then the largest weight is no rounded number. The sum of weights is multiplied with it too, and it cancels.
template <>
constexpr float kHeadroom<E4M3> = 8.0f;

// Weights of the step's 32 keys as first operand. A lane holds two neighbours of each eight keys, and the product wants
// four neighbours of 16: in which order keys are summed up is free, so slots 4t to 4t + 3 of the product are given to
// keys 2t, 2t + 1, 2t + 8 and 2t + 9. No lane needs what another holds.
template <class Shape>
EFFC_DEVICE void pack_weights(const WarpTile<E4M3, Shape>& warp, int block, int step, uint32_t (&weights)[4]) {
  const auto& scores = warp.scores[block].at;
  EFFC_UNROLL
  for (int n = 0; n < 4; ++n) {
    const float* keys = scores[4 * step + n / 2 * 2] + n % 2 * 2;
    const float* keys_behind = scores[4 * step + n / 2 * 2 + 1] + n % 2 * 2;
    weights[n] = pack_e4m3(keys[0], keys[1], keys_behind[0], keys_behind[1]);
  }
}

// outputs += weights * values
//
// Values are wanted by columns, and load_matrices_transposed moves pairs of bytes: a register gets numbers 2g and 2g +
// 1 of keys 2t and 2t + 1. Two registers, of eight keys each, hold the second operand for the even and for the odd
// numbers, in the order of pack_weights; picking bytes separates them. Column g of a product is then number 2g or
// 2g + 1 of 16, see WarpTile::dim_of.
//
// Tensor cores sum E4M3 products with fewer bits than fp32 has (Zhang et al., 2024, "SageAttention2: Efficient
// Attention with Thorough Outlier Smoothing and Per-thread INT4 Quantization"): a product goes over one tile of keys,
// and tiles are summed up outside. Heads of more than 128 numbers leave no registers for that. On sm_90, which makes
// such a product of fp16 ones, they do.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kMostSummedOutside = 256;
#else
constexpr int kMostSummedOutside = 128;
#endif

template <class Shape>
EFFC_DEVICE void multiply_values(const E4M3* values, WarpTile<E4M3, Shape>& warp) {
  using Rows = RowsOf<E4M3, Shape>;
  constexpr uint32_t kEvenBytes = 0x6420, kOddBytes = 0x7531;
  constexpr int kSteps = Shape::kKeys / 32;
  constexpr bool kSumsTilesOutside = Shape::kHeadDim <= kMostSummedOutside;
  uint32_t weights[Shape::kRowBlocks][kSteps][4];
  EFFC_UNROLL
  for (int block = 0; block < Shape::kRowBlocks; ++block) {
    EFFC_UNROLL
    for (int step = 0; step < kSteps; ++step) pack_weights(warp, block, step, weights[block][step]);
  }
  const typename Rows::Places places[2] = {Rows::places(warp.lane, 0), Rows::places(warp.lane, 1)};
  EFFC_UNROLL
  for (int chunk = 0; chunk < Rows::kChunks; ++chunk) {
    RowSums<2> sums[Shape::kRowBlocks] = {};  // even and odd numbers
    EFFC_UNROLL
    for (int n = 0; n < 8 * Shape::kRowBlocks && !kSumsTilesOutside; ++n) {
      sums[n / 8].at[n / 4 % 2][n % 4] = warp.outputs[n / 8].at[2 * chunk + n / 4 % 2][n % 4];
    }
    EFFC_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      uint32_t of_values[4];
      load_matrices_transposed(of_values, values + places[chunk % 2].at(32 * step, chunk / 2));
      const uint32_t even_first = __byte_perm(of_values[0], of_values[1], kEvenBytes);
      const uint32_t even_second = __byte_perm(of_values[2], of_values[3], kEvenBytes);
      const uint32_t odd_first = __byte_perm(of_values[0], of_values[1], kOddBytes);
      const uint32_t odd_second = __byte_perm(of_values[2], of_values[3], kOddBytes);
      EFFC_UNROLL
      for (int block = 0; block < Shape::kRowBlocks; ++block) {
        multiply_add<E4M3>(sums[block].at[0], weights[block][step], even_first, even_second);
        multiply_add<E4M3>(sums[block].at[1], weights[block][step], odd_first, odd_second);
      }
    }
    EFFC_UNROLL
    for (int n = 0; n < 8 * Shape::kRowBlocks; ++n) {
      float& output = warp.outputs[n / 8].at[2 * chunk + n / 4 % 2][n % 4];
      const float sum = sums[n / 8].at[n / 4 % 2][n % 4];
      output = kSumsTilesOutside ? output + sum : sum;
    }
  }
}

}  // namespace effc::cuda
