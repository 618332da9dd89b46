// E4M3 numbers, as the hardware reads them and rounds to them.
#pragma once

#include <cmath>
#include <cstdint>

namespace effc::cuda::emulator {

constexpr uint8_t kE4M3NotANumber = 0x7f;
constexpr uint8_t kLargestE4M3 = 0x7e;  // 448
constexpr int kLeastE4M3Exponent = -6;  // of a number with all bits of its fraction
constexpr int kE4M3FractionBits = 3;

inline float float_of_e4m3(uint8_t bits) {
  const int magnitude = bits & 0x7f;
  if (magnitude == kE4M3NotANumber) return NAN;
  const int exponent = magnitude >> kE4M3FractionBits, fraction = magnitude & 7;
  const float number = exponent == 0 ? std::ldexp(static_cast<float>(fraction), kLeastE4M3Exponent - kE4M3FractionBits)
                                     : std::ldexp(static_cast<float>(8 + fraction), exponent - 7 - kE4M3FractionBits);
  return (bits & 0x80) != 0 ? -number : number;
}

// cvt.rn.satfinite: to nearest, ties to even, and to 448 at most.
inline uint8_t e4m3_of_float(float number) {
  if (std::isnan(number)) return kE4M3NotANumber;
  const auto sign = static_cast<uint8_t>(std::signbit(number) ? 0x80 : 0);
  const float magnitude = std::fabs(number);
  if (magnitude >= float_of_e4m3(kLargestE4M3)) return sign | kLargestE4M3;
  int exponent = kLeastE4M3Exponent;
  if (magnitude >= std::ldexp(1.0f, kLeastE4M3Exponent)) exponent = std::ilogb(magnitude);
  const float steps = std::nearbyint(std::ldexp(magnitude, kE4M3FractionBits - exponent));
  // What is rounded up to 16 steps is the next exponent's first number.
  return sign | static_cast<uint8_t>((exponent - kLeastE4M3Exponent) * 8 + static_cast<int>(steps));
}

}  // namespace effc::cuda::emulator
