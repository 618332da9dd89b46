// What becomes of a product of a query and a key before the softmax.
#pragma once

#include "cuda/schedule.hpp"
#include "cuda/target.cuh"

namespace effc::cuda {

// Softmax is computed to the base 2, which the hardware has an instruction for: all scores are in units of log2.
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// What one head adds to its scores by distance.
struct DistanceBias {
  const float* at_zero;  // the entry of distance 0, or null
  Position reach;
  float slope;  // in units of log2
};

EFFC_DEVICE bool has_distance_bias(const SparseAttention& problem) {
  return problem.distance_bias != nullptr || problem.distance_slope != nullptr;
}

EFFC_DEVICE DistanceBias distance_bias_of(const SparseAttention& problem, int32_t head) {
  DistanceBias bias{nullptr, problem.bias_reach, 0.0f};
  if (problem.distance_bias != nullptr) {
    const int64_t width = 2 * int64_t{problem.bias_reach} + 1;
    bias.at_zero = problem.distance_bias + head * width + problem.bias_reach;
  }
  if (problem.distance_slope != nullptr) bias.slope = problem.distance_slope[head] * kLog2E;
  return bias;
}

// To be added to the score of key j for query i, `distance` being j - i.
EFFC_DEVICE float bias_at(const DistanceBias& bias, Position distance) {
  float sum = bias.slope * static_cast<float>(distance);
  if (bias.at_zero != nullptr) sum += bias.at_zero[larger(-bias.reach, smaller(distance, bias.reach))] * kLog2E;
  return sum;
}

}  // namespace effc::cuda
