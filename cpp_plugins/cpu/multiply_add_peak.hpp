// What the arithmetic units can do at most, so that a benchmark can say which share of it a kernel reaches.
#pragma once

#include "cpu/attention_common.hpp"

namespace effc::cpu {
namespace {

double multiply_add_rounds(int64_t iterations) {
  constexpr int kChains = 12;  // enough independent sums to hide the latency; more would not be unrolled
  Float sums[kChains];
  for (int c = 0; c < kChains; ++c) sums[c] = Simd::broadcast(static_cast<float>(c));
  Float factor = Simd::broadcast(0.999f);
  for (int64_t n = 0; n < iterations; ++n) {
    for (int c = 0; c < kChains; ++c) sums[c] = Simd::multiply_add(sums[c], factor, factor);
  }
  Float total = Simd::zero();
  for (int c = 0; c < kChains; ++c) total = Simd::add(total, sums[c]);
  volatile float keep = Simd::sum(total);
  (void)keep;
  return 2.0 * kWidth * kChains * static_cast<double>(iterations);
}

}  // namespace
}  // namespace effc::cpu
