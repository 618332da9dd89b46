// The feature maps of linear attention.
#pragma once

#include "cuda/linear_schedule.hpp"
#include "cuda/scores.cuh"
#include "cuda/shared_tiles.cuh"

namespace effc::cuda {

EFFC_DEVICE float feature_of(float x, FeatureMap map) {
  // What is no number stays none: it is not above zero, and fmaxf would lose it.
  if (map == FeatureMap::kRelu) return x < 0.0f ? 0.0f : x;
  // elu(x) + 1 would lose the digits of exp(x) far below zero.
  return x > 0.0f ? x + 1.0f : exp2_fast(x * kLog2E);
}

// Two numbers that lie side by side in memory, the first in the lower half.
template <class T>
EFFC_DEVICE float first_of_pair(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair)});
}
template <class T>
EFFC_DEVICE float second_of_pair(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair >> 16)});
}

// Maps eight numbers, each feature times `factor`.
template <class T>
EFFC_DEVICE ChunkOfBytes features_of(const ChunkOfBytes& numbers, FeatureMap map, float factor) {
  ChunkOfBytes features;
  EFFC_UNROLL
  for (int n = 0; n < 4; ++n) {
    features.words[n] = pack<T>(feature_of(first_of_pair<T>(numbers.words[n]), map) * factor,
                                feature_of(second_of_pair<T>(numbers.words[n]), map) * factor);
  }
  return features;
}

template <class T>
EFFC_DEVICE float largest_feature_of(const ChunkOfBytes& numbers, FeatureMap map) {
  float largest = 0.0f;
  EFFC_UNROLL
  for (int n = 0; n < 4; ++n) {
    largest = fmaxf(largest, feature_of(first_of_pair<T>(numbers.words[n]), map));
    largest = fmaxf(largest, feature_of(second_of_pair<T>(numbers.words[n]), map));
  }
  return largest;
}

// All `threads` threads of a block map a tile of keys in shared memory in place. A key that is hidden, or behind the
// last, has no features; neither has a head any behind its last number.
template <int rows, class Rows, int threads, class T>
EFFC_DEVICE void map_keys(T* keys, Range positions, const uint8_t* key_mask, FeatureMap map, int numbers, int thread) {
  EFFC_UNROLL_BY(2)
  for (int n = thread; n < rows * Rows::kChunks; n += threads) {
    const int row = n / Rows::kChunks, chunk = n % Rows::kChunks;
    const Position j = positions.begin + row;
    const bool counts = j < positions.end && chunk * kChunk < numbers && (key_mask == nullptr || key_mask[j] != 0);
    auto& place = *reinterpret_cast<ChunkOfBytes*>(keys + Rows::at(row, chunk));
    place = counts ? features_of<T>(place, map, 1.0f) : ChunkOfBytes{{0, 0, 0, 0}};
  }
}

// A warp maps its own 16 queries in shared memory in place, two lanes a row. Each row is divided by its largest
// feature: a factor cancels, and small features of the 16-bit type would be lost without one.
template <class Rows, class T>
EFFC_DEVICE void map_queries(T* queries, int first_row, FeatureMap map, int numbers, int lane) {
  const int row = first_row + lane / 2, half = lane % 2;
  const int chunks = numbers / kChunk;
  float largest = 0.0f;
  EFFC_ROLLED
  for (int chunk = half; chunk < chunks; chunk += 2) {
    const auto& place = *reinterpret_cast<const ChunkOfBytes*>(queries + Rows::at(row, chunk));
    largest = fmaxf(largest, largest_feature_of<T>(place, map));
  }
  largest = largest_of_lanes<2>(largest);
  constexpr float kSmallestNormal = 1.17549435e-38f;
  const float factor = largest < kSmallestNormal ? 0.0f : 1.0f / largest;
  EFFC_ROLLED
  for (int chunk = half; chunk < Rows::kChunks; chunk += 2) {
    auto& place = *reinterpret_cast<ChunkOfBytes*>(queries + Rows::at(row, chunk));
    place = chunk < chunks ? features_of<T>(place, map, factor) : ChunkOfBytes{{0, 0, 0, 0}};
  }
  __syncwarp();
}

}  // namespace effc::cuda
