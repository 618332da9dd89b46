// Vectors of 4 floats in the vector extension of GCC and Clang: SSE2, NEON, or plain code, whatever the target has.
#pragma once

#include <cstdint>
#include <cstring>

namespace effc::cpu {
namespace {

struct Simd {
  static constexpr const char* kName = "portable";
  static constexpr int kWidth = 4;
  static constexpr int kTileVectors = 2;
  static constexpr int kTileSums = 12;

  typedef float Float __attribute__((vector_size(16)));
  typedef int32_t Mask __attribute__((vector_size(16)));  // all bits of a selected lane are set

  static Float zero() { return Float{0, 0, 0, 0}; }
  static Float broadcast(float x) { return Float{x, x, x, x}; }
  static Float load(const float* p) {
    Float x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  // The first `count` lanes from memory, the rest zero; touches nothing behind them.
  static Float load_first(const float* p, int count) {
    Float x = zero();
    for (int lane = 0; lane < count; ++lane) x[lane] = p[lane];
    return x;
  }
  static constexpr bool kReadsHalf = false;
  static void store(float* p, Float x) { std::memcpy(p, &x, sizeof x); }
  static Float add(Float a, Float b) { return a + b; }
  static Float sub(Float a, Float b) { return a - b; }
  static Float mul(Float a, Float b) { return a * b; }
  // b if either is NaN.
  static Float max(Float a, Float b) { return select(a > b, a, b); }
  static Float multiply_add(Float a, Float b, Float c) { return a * b + c; }
  static float sum(Float x) { return (x[0] + x[1]) + (x[2] + x[3]); }
  static float largest(Float x) {
    float result = x[0];
    for (int lane = 1; lane < 4; ++lane) result = x[lane] > result ? x[lane] : result;
    return result;
  }

  // Lane l is selected by bit l.
  static Mask mask(uint64_t bits) {
    const int32_t low = static_cast<int32_t>(bits & 0xf);
    return (Mask{low, low, low, low} & Mask{1, 2, 4, 8}) != 0;
  }
  static Float select(Mask mask, Float chosen, Float other) {
    return as_float((mask & as_bits(chosen)) | (~mask & as_bits(other)));
  }
  static Float select_or_zero(Mask mask, Float chosen) { return as_float(mask & as_bits(chosen)); }

  // x - floor(x), for |x| < 2^22. A whole number may also give 1, except that 0 gives 0.
  static Float fraction(Float x) { return x - floor(x); }
  // x * 2^floor(n) for 1 <= x <= 2, by adding floor(n) to the exponent of x; zero if n < -126.
  static Float scale_by_power(Float x, Float n) {
    typedef uint32_t Bits __attribute__((vector_size(16)));  // unsigned, because the sum may wrap
    const Float lowest = broadcast(-126.0f);
    const Bits exponent = (Bits) __builtin_convertvector(floor(max(lowest, n)), Mask) << 23;
    return select_or_zero(~(n < lowest), as_float((Mask)((Bits)as_bits(x) + exponent)));
  }

  // to[c][r] = from[r][c], times `factor` if kScales, for a 4 x 4 block.
  template <bool kScales>
  static void transpose(const float* from, int64_t from_stride, float factor, float* to, int64_t to_stride) {
    for (int c = 0; c < kWidth; ++c) {
      for (int r = 0; r < kWidth; ++r) {
        const float x = from[r * from_stride + c];
        to[c * to_stride + r] = kScales ? x * factor : x;
      }
    }
  }

 private:
  // Adding 1.5 * 2^23 leaves no room for a fraction. A whole number is a tie and goes to the even neighbour, so it may
  // come out one less; 0 does not.
  static Float floor(Float x) {
    const Float magic = broadcast(12582912.0f);
    return ((x - 0.5f) + magic) - magic;
  }
  static Mask as_bits(Float x) {
    Mask bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
  }
  static Float as_float(Mask bits) {
    Float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
};

}  // namespace
}  // namespace effc::cpu
