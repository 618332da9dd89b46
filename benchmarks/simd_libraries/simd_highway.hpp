// cpu/simd_avx512.hpp written with Highway, for benchmarks/simd_libraries.py.
#pragma once

#include <hwy/highway.h>
#include <immintrin.h>

#include <cstdint>

namespace effc::cpu {
namespace {

struct Simd {
  static constexpr const char* kName = "avx512";
  static constexpr int kWidth = 16;
  static constexpr int kTileVectors = 4;
  static constexpr int kTileSums = 24;

  using Floats = hwy::HWY_NAMESPACE::FixedTag<float, kWidth>;
  using Ints = hwy::HWY_NAMESPACE::FixedTag<int32_t, kWidth>;
  using Float = hwy::HWY_NAMESPACE::Vec<Floats>;
  using Mask = hwy::HWY_NAMESPACE::Mask<Floats>;

  static Float zero() { return Zero(Floats()); }
  static Float broadcast(float x) { return Set(Floats(), x); }
  static Float load(const float* p) { return LoadU(Floats(), p); }
  static Float load_first(const float* p, int count) {
    return MaskedLoad(FirstN(Floats(), static_cast<size_t>(count)), Floats(), p);
  }
  static constexpr bool kReadsHalf = false;
  static void store(float* p, Float x) { StoreU(x, Floats(), p); }
  static Float add(Float a, Float b) { return Add(a, b); }
  static Float sub(Float a, Float b) { return Sub(a, b); }
  static Float mul(Float a, Float b) { return Mul(a, b); }
  static Float max(Float a, Float b) { return Max(a, b); }
  static Float multiply_add(Float a, Float b, Float c) { return MulAdd(a, b, c); }
  static float sum(Float x) { return GetLane(SumOfLanes(Floats(), x)); }
  static float largest(Float x) { return GetLane(MaxOfLanes(Floats(), x)); }

  static Mask mask(uint64_t bits) {
    const uint16_t sixteen = static_cast<uint16_t>(bits);
    return LoadMaskBits(Floats(), reinterpret_cast<const uint8_t*>(&sixteen));
  }
  static Float select(Mask mask, Float chosen, Float other) { return IfThenElse(mask, chosen, other); }
  static Float select_or_zero(Mask mask, Float chosen) { return IfThenElseZero(mask, chosen); }

  static Float fraction(Float x) { return Sub(x, Floor(x)); }
  // The library has no such function: an exponent is put together from integers.
  static Float scale_by_power(Float x, Float n) {
    const Float whole = Floor(n);
    const auto exponent = hwy::HWY_NAMESPACE::ShiftLeft<23>(Add(ConvertTo(Ints(), whole), Set(Ints(), 127)));
    return IfThenElseZero(Ge(whole, Set(Floats(), -126.0f)), Mul(x, BitCast(Floats(), exponent)));
  }

#include "transpose_avx512.inc"
};

}  // namespace
}  // namespace effc::cpu
