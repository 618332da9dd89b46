// Vectors of 8 floats: AVX2 with FMA and F16C. Included by attention_avx2.cpp only.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace effc::cpu {
namespace {

struct Simd {
  static constexpr const char* kName = "avx2";
  static constexpr int kWidth = 8;
  // Register tiles: 12 sums and their operands fill 16 registers. 3 rows of 4 vectors take 7 loads a step, 6 of 2 take
  // 8, and loads are what a neighbour on the same core leaves least of.
  static constexpr int kTileVectors = 4;
  static constexpr int kTileSums = 12;

  using Float = __m256;
  using Mask = __m256;  // all bits of a selected lane are set

  static Float zero() { return _mm256_setzero_ps(); }
  static Float broadcast(float x) { return _mm256_set1_ps(x); }
  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  // The first `count` lanes from memory, the rest zero; touches nothing behind them.
  static Float load_first(const float* p, int count) {
    return _mm256_maskload_ps(p, _mm256_castps_si256(mask((1u << count) - 1)));
  }
  static constexpr bool kReadsHalf = true;
  static Float load_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store(float* p, Float x) { _mm256_storeu_ps(p, x); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  // b if either is NaN.
  static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  static Float multiply_add(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(Float x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static float largest(Float x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }

  // Lane l is selected by bit l.
  static Mask mask(uint64_t bits) {
    const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits & 0xff)), lane_bit);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane_bit));
  }
  static Float select(Mask mask, Float chosen, Float other) { return _mm256_blendv_ps(other, chosen, mask); }
  static Float select_or_zero(Mask mask, Float chosen) { return _mm256_and_ps(mask, chosen); }

  // x - floor(x).
  static Float fraction(Float x) { return _mm256_sub_ps(x, _mm256_floor_ps(x)); }
  // x * 2^floor(n) for 1 <= x <= 2, by adding floor(n) to the exponent of x; zero if n < -126.
  static Float scale_by_power(Float x, Float n) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(_mm256_floor_ps(n)), 23);
    const Float scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), exponent));
    return _mm256_and_ps(scaled, _mm256_cmp_ps(n, broadcast(-126.0f), _CMP_NLT_UQ));
  }

  // to[c][r] = from[r][c], times `factor` if kScales, for an 8 x 8 block.
  template <bool kScales>
  static void transpose(const float* from, int64_t from_stride, float factor, float* to, int64_t to_stride) {
    __m256 row[8], quad[8];
    for (int r = 0; r < 8; ++r) row[r] = load(from + r * from_stride);
    for (int r = 0; kScales && r < 8; ++r) row[r] = mul(row[r], broadcast(factor));
    for (int g = 0; g < 8; g += 4) {
      const __m256 low_a = _mm256_unpacklo_ps(row[g], row[g + 1]), high_a = _mm256_unpackhi_ps(row[g], row[g + 1]);
      const __m256 low_b = _mm256_unpacklo_ps(row[g + 2], row[g + 3]);
      const __m256 high_b = _mm256_unpackhi_ps(row[g + 2], row[g + 3]);
      quad[g + 0] = _mm256_shuffle_ps(low_a, low_b, _MM_SHUFFLE(1, 0, 1, 0));
      quad[g + 1] = _mm256_shuffle_ps(low_a, low_b, _MM_SHUFFLE(3, 2, 3, 2));
      quad[g + 2] = _mm256_shuffle_ps(high_a, high_b, _MM_SHUFFLE(1, 0, 1, 0));
      quad[g + 3] = _mm256_shuffle_ps(high_a, high_b, _MM_SHUFFLE(3, 2, 3, 2));
    }
    for (int c = 0; c < 4; ++c) {
      _mm256_storeu_ps(to + c * to_stride, _mm256_permute2f128_ps(quad[c], quad[4 + c], 0x20));
      _mm256_storeu_ps(to + (c + 4) * to_stride, _mm256_permute2f128_ps(quad[c], quad[4 + c], 0x31));
    }
  }
};

}  // namespace
}  // namespace effc::cpu
