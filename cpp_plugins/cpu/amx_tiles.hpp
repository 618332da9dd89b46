// Products of matrices in Intel's tile registers.
//
// A tile register holds 16 x 16 cells of 32 bits: floats of a result, or pairs of bfloat16. One instruction adds the
// product of two tiles of pairs to a tile of floats.
#pragma once

#include <immintrin.h>

#include "cpu/attention_common.hpp"

namespace effc::cpu {
namespace {

constexpr int kMatrixSide = 16;

// All eight tile registers are whole: 16 lines of 64 bytes.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_line = 0, reserved[14] = {};
  uint16_t bytes_per_line[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tile registers 0 to 3 hold the result [2][2], 4 and 5 the left operand, 6 and 7 the right one. `kLeft` and `kRight`
// say how many of two are used. Strides are in floats.
template <int kLeft, int kRight, bool kAdds>
inline void multiply_tiles(const float* left, int64_t left_stride, const float* right, int64_t right_stride, int steps,
                           float* result, int64_t result_stride) {
  // The compiler does not know that loading a tile reads memory: everything must have been written by now.
  asm volatile("" ::: "memory");
  constexpr int kBytes = sizeof(float);
  float* lower = result + kMatrixSide * result_stride;
  if constexpr (kAdds) {
    _tile_loadd(0, result, result_stride * kBytes);
    if constexpr (kRight > 1) _tile_loadd(1, result + kMatrixSide, result_stride * kBytes);
    if constexpr (kLeft > 1) _tile_loadd(2, lower, result_stride * kBytes);
    if constexpr (kLeft > 1 && kRight > 1) _tile_loadd(3, lower + kMatrixSide, result_stride * kBytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int step = 0; step < steps; ++step) {
    const float* a = left + step * kMatrixSide;
    const float* b = right + step * kMatrixSide * right_stride;
    _tile_loadd(4, a, left_stride * kBytes);
    _tile_loadd(6, b, right_stride * kBytes);
    if constexpr (kRight > 1) _tile_loadd(7, b + kMatrixSide, right_stride * kBytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kRight > 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kLeft > 1) {
      _tile_loadd(5, a + kMatrixSide * left_stride, left_stride * kBytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kRight > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, result, result_stride * kBytes);
  if constexpr (kRight > 1) _tile_stored(1, result + kMatrixSide, result_stride * kBytes);
  if constexpr (kLeft > 1) _tile_stored(2, lower, result_stride * kBytes);
  if constexpr (kLeft > 1 && kRight > 1) _tile_stored(3, lower + kMatrixSide, result_stride * kBytes);
}

template <bool kAdds>
inline void multiply(int left_tiles, int right_tiles, const float* left, int64_t left_stride, const float* right,
                     int64_t right_stride, int steps, float* result, int64_t result_stride) {
  const auto run = [&](auto tiles) { tiles(left, left_stride, right, right_stride, steps, result, result_stride); };
  if (left_tiles > 1) {
    right_tiles > 1 ? run(multiply_tiles<2, 2, kAdds>) : run(multiply_tiles<2, 1, kAdds>);
  } else {
    right_tiles > 1 ? run(multiply_tiles<1, 2, kAdds>) : run(multiply_tiles<1, 1, kAdds>);
  }
}

// to[column][line] = from[line][column]; both counts are whole tiles.
inline void turn(const float* from, int64_t from_stride, int64_t lines, int64_t columns, float* to, int64_t to_stride) {
  for (int64_t line = 0; line < lines; line += kWidth) {
    for (int64_t column = 0; column < columns; column += kWidth) {
      Simd::transpose<false>(from + line * from_stride + column, from_stride, 1.0f, to + column * to_stride + line,
                             to_stride);
    }
  }
}

}  // namespace
}  // namespace effc::cpu
