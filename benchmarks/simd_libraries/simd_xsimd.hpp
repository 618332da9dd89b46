// cpu/simd_avx512.hpp written with xsimd, for benchmarks/simd_libraries.py.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <xsimd/xsimd.hpp>

namespace effc::cpu {
namespace {

struct Simd {
  static constexpr const char* kName = "avx512";
  static constexpr int kWidth = 16;
  static constexpr int kTileVectors = 4;
  static constexpr int kTileSums = 24;

  using Float = xsimd::batch<float, xsimd::avx512bw>;
  using Int = xsimd::batch<int32_t, xsimd::avx512bw>;
  using Mask = xsimd::batch_bool<float, xsimd::avx512bw>;

  static Float zero() { return Float(0.0f); }
  static Float broadcast(float x) { return Float(x); }
  static Float load(const float* p) { return Float::load_unaligned(p); }
  // Older releases have no masked load.
  static Float load_first(const float* p, int count) {
    return Float(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p));
  }
  static constexpr bool kReadsHalf = false;
  static void store(float* p, Float x) { x.store_unaligned(p); }
  static Float add(Float a, Float b) { return a + b; }
  static Float sub(Float a, Float b) { return a - b; }
  static Float mul(Float a, Float b) { return a * b; }
  static Float max(Float a, Float b) { return xsimd::max(a, b); }
  static Float multiply_add(Float a, Float b, Float c) { return xsimd::fma(a, b, c); }
  static float sum(Float x) { return xsimd::reduce_add(x); }
  static float largest(Float x) { return xsimd::reduce_max(x); }

  static Mask mask(uint64_t bits) { return Mask::from_mask(bits & 0xffff); }
  static Float select(Mask mask, Float chosen, Float other) { return xsimd::select(mask, chosen, other); }
  static Float select_or_zero(Mask mask, Float chosen) { return xsimd::select(mask, chosen, zero()); }

  static Float fraction(Float x) { return x - xsimd::floor(x); }
  // Its ldexp puts an exponent together from integers, and is undefined below the smallest normal number.
  static Float scale_by_power(Float x, Float n) {
    const Float whole = xsimd::floor(n);
    const Float scaled = xsimd::ldexp(x, xsimd::to_int(xsimd::max(whole, Float(-126.0f))));
    return xsimd::select(whole >= Float(-126.0f), scaled, zero());
  }

#include "transpose_avx512.inc"
};

}  // namespace
}  // namespace effc::cpu
