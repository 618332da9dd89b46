// What the lanes of a warp do together on registers. Compiled without sanitizers, like the scheduler, because the last
// lane reads and writes what lies on the other lanes' stacks.
#include "cuda/emulator/warp_work.hpp"

#include <cstring>

#include "cuda/emulator/e4m3.hpp"

namespace effc::cuda::emulator {
namespace {

float number_of(uint16_t bits, ProductOf type) {
  if (type == ProductOf::kHalf) {
    _Float16 half;
    std::memcpy(&half, &bits, sizeof half);
    return static_cast<float>(half);
  }
  const uint32_t wide = uint32_t{bits} << 16;
  float number;
  std::memcpy(&number, &wide, sizeof number);
  return number;
}

// Every lane's sums += a * b.
template <int inner>
void add_products(const float (&a)[16][inner], const float (&b)[inner][8], void* const (&operands)[32]) {
  float products[16][8] = {};
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < inner; ++k) {
      for (int column = 0; column < 8; ++column) products[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const ProductOperands*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    mine.sums[0] += products[g][2 * t];
    mine.sums[1] += products[g][2 * t + 1];
    mine.sums[2] += products[g + 8][2 * t];
    mine.sums[3] += products[g + 8][2 * t + 1];
  }
  ++counters.matrix_products;
}

}  // namespace

// Numbers are placed as emulator/cuda.hpp's multiply_add says.
template <ProductOf type>
void multiply_matrices(void* const (&operands)[32]) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const ProductOperands*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      const int shift = 16 * half, column = 2 * t + half;
      a[g][column] = number_of(static_cast<uint16_t>(mine.a[0] >> shift), type);
      a[g + 8][column] = number_of(static_cast<uint16_t>(mine.a[1] >> shift), type);
      a[g][column + 8] = number_of(static_cast<uint16_t>(mine.a[2] >> shift), type);
      a[g + 8][column + 8] = number_of(static_cast<uint16_t>(mine.a[3] >> shift), type);
      b[column][g] = number_of(static_cast<uint16_t>(mine.b0 >> shift), type);
      b[column + 8][g] = number_of(static_cast<uint16_t>(mine.b1 >> shift), type);
    }
  }
  add_products(a, b, operands);
}
template void multiply_matrices<ProductOf::kHalf>(void* const (&)[32]);
template void multiply_matrices<ProductOf::kBFloat16>(void* const (&)[32]);

void multiply_e4m3_matrices(void* const (&operands)[32]) {
  float a[16][32], b[32][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const ProductOperands*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    const auto number = [](uint32_t word, int n) { return float_of_e4m3(static_cast<uint8_t>(word >> 8 * n)); };
    for (int n = 0; n < 4; ++n) {
      const int k = 4 * t + n;
      a[g][k] = number(mine.a[0], n);
      a[g + 8][k] = number(mine.a[1], n);
      a[g][k + 16] = number(mine.a[2], n);
      a[g + 8][k + 16] = number(mine.a[3], n);
      b[k][g] = number(mine.b0, n);
      b[k + 16][g] = number(mine.b1, n);
    }
  }
  add_products(a, b, operands);
}

void exchange(void* const (&operands)[32]) {
  uint64_t given[32];
  for (int lane = 0; lane < 32; ++lane) given[lane] = static_cast<const ExchangeOperands*>(operands[lane])->number;
  for (int lane = 0; lane < 32; ++lane) {
    auto& mine = *static_cast<ExchangeOperands*>(operands[lane]);
    mine.number = given[mine.from_lane];
  }
}

void vote(void* const (&operands)[32]) {
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (*static_cast<const uint32_t*>(operands[lane]) != 0) votes |= 1u << lane;
  }
  for (int lane = 0; lane < 32; ++lane) *static_cast<uint32_t*>(operands[lane]) = votes;
}

// Shared memory has 32 banks of 4 bytes: eight rows of 16 bytes arrive in one pass if they lie in different groups of
// four banks.
void share_rows(void* const (&operands)[32]) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    int rows_of_group[8] = {};
    int passes = 0;
    for (int row = 0; row < 8; ++row) {
      const auto address =
          reinterpret_cast<uintptr_t>(static_cast<const RowOperands*>(operands[matrix * 8 + row])->row);
      const int rows = ++rows_of_group[address / 16 % 8];
      passes = rows > passes ? rows : passes;
    }
    ++counters.matrix_loads;
    counters.matrix_load_passes += static_cast<uint64_t>(passes);
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto& mine = *static_cast<RowOperands*>(operands[lane]);
    for (int other = 0; other < 32; ++other) {
      mine.rows[other] = static_cast<const uint16_t*>(static_cast<const RowOperands*>(operands[other])->row);
    }
  }
}

}  // namespace effc::cuda::emulator
