// Products of small matrices that lie in the second-level cache, for the linear kernels.
#pragma once

#include "cpu/register_tile.hpp"

namespace effc::cpu {
namespace {

// c[r][v] = (kAdds ? c[r][v] : 0) + sum over k < steps of a[r, k] * b[k][v], where a[r, k] lies at
// a[r * a_row + k * a_step] and may thus be read turned round. The sums stay in registers.
template <int kRows, int kVectors, bool kAdds>
EFFC_NOINLINE void multiply_tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_line,
                                 int64_t steps, float* c, int64_t c_line) {
  Float sums[kRows][kVectors];
  EFFC_UNROLL
  for (int r = 0; r < kRows; ++r) {
    EFFC_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[r][v] = kAdds ? Simd::load(c + r * c_line + v * kWidth) : Simd::zero();
  }
  for (int64_t k = 0; k < steps; ++k) {
    add_products<Fp32>(
        sums, [&](int r) { return Simd::broadcast(a[r * a_row + k * a_step]); },
        [&](int v) { return Simd::load(b + k * b_line + v * kWidth); });
  }
  EFFC_UNROLL
  for (int r = 0; r < kRows; ++r) {
    EFFC_UNROLL
    for (int v = 0; v < kVectors; ++v) Simd::store(c + r * c_line + v * kWidth, sums[r][v]);
  }
}

// Always inlined, so that register tiles are compiled for the strides that callers know.
template <int kVectors, bool kAdds>
__attribute__((always_inline)) inline void multiply_rows(int64_t rows, const float* a, int64_t a_row, int64_t a_step,
                                                         const float* b, int64_t b_line, int64_t steps, float* c,
                                                         int64_t c_line) {
  constexpr int kMostRows = rows_at_once(6, kVectors);
  for (int64_t row = 0; row < rows;) {
    const int64_t left = rows - row;
    const float* from = a + row * a_row;
    float* to = c + row * c_line;
    if (left >= kMostRows) {
      multiply_tile<kMostRows, kVectors, kAdds>(from, a_row, a_step, b, b_line, steps, to, c_line);
      row += kMostRows;
    } else if (left >= 2) {
      multiply_tile<2, kVectors, kAdds>(from, a_row, a_step, b, b_line, steps, to, c_line);
      row += 2;
    } else {
      multiply_tile<1, kVectors, kAdds>(from, a_row, a_step, b, b_line, steps, to, c_line);
      row += 1;
    }
  }
}

// The same for whole matrices; `columns` is a whole number of vectors.
template <bool kAdds>
inline void multiply(int64_t rows, int64_t columns, int64_t steps, const float* a, int64_t a_row, int64_t a_step,
                     const float* b, int64_t b_line, float* c, int64_t c_line) {
  for (int64_t column = 0; column < columns;) {
    const int64_t vectors = (columns - column) / kWidth;
    if (vectors >= Simd::kTileVectors) {
      multiply_rows<Simd::kTileVectors, kAdds>(rows, a, a_row, a_step, b + column, b_line, steps, c + column, c_line);
      column += Simd::kTileVectors * kWidth;
    } else if (vectors >= 2) {
      multiply_rows<2, kAdds>(rows, a, a_row, a_step, b + column, b_line, steps, c + column, c_line);
      column += 2 * kWidth;
    } else {
      multiply_rows<1, kAdds>(rows, a, a_row, a_step, b + column, b_line, steps, c + column, c_line);
      column += kWidth;
    }
  }
}

}  // namespace
}  // namespace effc::cpu
