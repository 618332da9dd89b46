// What the lanes of a warp do together, in the form that meet_warp takes.
#pragma once

#include "cuda/emulator/block.hpp"

namespace effc::cuda::emulator {

enum class ProductOf { kHalf, kBFloat16 };

struct ProductOperands {
  float* sums;
  const uint32_t* a;
  uint32_t b0, b1;
};
template <ProductOf type>
void multiply_matrices(void* const (&operands)[32]);
void multiply_e4m3_matrices(void* const (&operands)[32]);

// Every lane gives a number and takes that of another lane.
struct ExchangeOperands {
  uint64_t number;
  int from_lane;
};
void exchange(void* const (&operands)[32]);

// Every lane gives 0 or not and takes the votes of all.
void vote(void* const (&operands)[32]);

// Every lane gives the address of a row of 16 bytes in shared memory and takes those of all.
struct RowOperands {
  const void* row;
  const uint16_t* rows[32];
};
void share_rows(void* const (&operands)[32]);

}  // namespace effc::cuda::emulator
