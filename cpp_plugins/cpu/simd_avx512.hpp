// Vectors of 16 floats: AVX-512 (F, BW, DQ, VL). Included by attention_avx512.cpp only.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace effc::cpu {
namespace {

struct Simd {
  static constexpr const char* kName = "avx512";
  static constexpr int kWidth = 16;
  // Register tiles: 6 x 4 sums and their operands fill 32 registers.
  static constexpr int kTileVectors = 4;
  static constexpr int kTileSums = 24;

  using Float = __m512;
  using Mask = __mmask16;

  static Float zero() { return _mm512_setzero_ps(); }
  static Float broadcast(float x) { return _mm512_set1_ps(x); }
  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  // The first `count` lanes from memory, the rest zero; touches nothing behind them.
  static Float load_first(const float* p, int count) {
    return _mm512_maskz_loadu_ps(static_cast<Mask>((1u << count) - 1), p);
  }
  // 16 numbers of half precision.
  static constexpr bool kReadsHalf = true;
  static Float load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store(float* p, Float x) { _mm512_storeu_ps(p, x); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  // b if either is NaN.
  static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  static Float multiply_add(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(Float x) { return _mm512_reduce_add_ps(x); }
  static float largest(Float x) { return _mm512_reduce_max_ps(x); }

  // Lane l is selected by bit l.
  static Mask mask(uint64_t bits) { return static_cast<Mask>(bits); }
  static Float select(Mask mask, Float chosen, Float other) { return _mm512_mask_mov_ps(other, mask, chosen); }
  static Float select_or_zero(Mask mask, Float chosen) { return _mm512_maskz_mov_ps(mask, chosen); }

  // x - floor(x).
  static Float fraction(Float x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  // x * 2^floor(n), rounded to zero below the smallest normal number (see denormals.hpp).
  static Float scale_by_power(Float x, Float n) { return _mm512_scalef_ps(x, n); }

  // to[c][r] = from[r][c], times `factor` if kScales, for a 16 x 16 block: pairs, quadruples, then 128-bit and 256-bit
  // halves change places.
  template <bool kScales>
  static void transpose(const float* from, int64_t from_stride, float factor, float* to, int64_t to_stride) {
    __m512 row[16], pair[16];
    for (int r = 0; r < 16; ++r) row[r] = _mm512_loadu_ps(from + r * from_stride);
    // Not by one: pairs of bfloat16 are not to be taken for numbers, of which the tiny would become zero.
    for (int r = 0; kScales && r < 16; ++r) row[r] = _mm512_mul_ps(row[r], _mm512_set1_ps(factor));
    for (int r = 0; r < 16; r += 2) {
      pair[r] = _mm512_unpacklo_ps(row[r], row[r + 1]);
      pair[r + 1] = _mm512_unpackhi_ps(row[r], row[r + 1]);
    }
    // row[4g + c] now holds columns c, c + 4, c + 8, c + 12 of rows 4g .. 4g + 3, one column per 128-bit lane.
    for (int g = 0; g < 16; g += 4) {
      row[g + 0] = _mm512_shuffle_ps(pair[g], pair[g + 2], _MM_SHUFFLE(1, 0, 1, 0));
      row[g + 1] = _mm512_shuffle_ps(pair[g], pair[g + 2], _MM_SHUFFLE(3, 2, 3, 2));
      row[g + 2] = _mm512_shuffle_ps(pair[g + 1], pair[g + 3], _MM_SHUFFLE(1, 0, 1, 0));
      row[g + 3] = _mm512_shuffle_ps(pair[g + 1], pair[g + 3], _MM_SHUFFLE(3, 2, 3, 2));
    }
    for (int c = 0; c < 4; ++c) {
      const __m512 low_even = _mm512_shuffle_f32x4(row[c], row[4 + c], _MM_SHUFFLE(2, 0, 2, 0));
      const __m512 low_odd = _mm512_shuffle_f32x4(row[c], row[4 + c], _MM_SHUFFLE(3, 1, 3, 1));
      const __m512 high_even = _mm512_shuffle_f32x4(row[8 + c], row[12 + c], _MM_SHUFFLE(2, 0, 2, 0));
      const __m512 high_odd = _mm512_shuffle_f32x4(row[8 + c], row[12 + c], _MM_SHUFFLE(3, 1, 3, 1));
      const auto column = [&](int index) { return to + index * to_stride; };
      _mm512_storeu_ps(column(c), _mm512_shuffle_f32x4(low_even, high_even, _MM_SHUFFLE(2, 0, 2, 0)));
      _mm512_storeu_ps(column(c + 4), _mm512_shuffle_f32x4(low_odd, high_odd, _MM_SHUFFLE(2, 0, 2, 0)));
      _mm512_storeu_ps(column(c + 8), _mm512_shuffle_f32x4(low_even, high_even, _MM_SHUFFLE(3, 1, 3, 1)));
      _mm512_storeu_ps(column(c + 12), _mm512_shuffle_f32x4(low_odd, high_odd, _MM_SHUFFLE(3, 1, 3, 1)));
    }
  }
};

}  // namespace
}  // namespace effc::cpu
