// Linear attention without tensor cores and in fp32 throughout, for numbers and sizes that they do not take: the first
// and the third kernel once more, in the plain words of the definition.
#pragma once

#include "cuda/linear_features.cuh"

namespace effc::cuda {

constexpr int kLinearWarps = 4;
constexpr int kLinearThreads = kLinearWarps * kWarpSize;
constexpr int kFeaturesOfWarp = 8;

inline int64_t scalar_sums_blocks(const LinearCall& call) {
  const LinearAttention& problem = call.problem;
  const int64_t lines = problem.batch * problem.kv_num_heads * call.schedule.segments;
  const int64_t parts = divide_up(problem.head_dim, kFeaturesOfWarp) * divide_up(problem.head_dim, kWarpSize);
  return divide_up(lines * parts, kLinearWarps);
}

// A warp sums up kFeaturesOfWarp features times 32 numbers of the values, over the keys of a segment.
template <class T>
EFFC_KERNEL(kLinearThreads, 1)
sum_keys_plainly(EFFC_CONSTANT LinearCall call) {
  const LinearAttention& problem = call.problem;
  const LinearSchedule& schedule = call.schedule;
  const int warp = static_cast<int>(threadIdx.x / kWarpSize), lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int64_t dim = problem.head_dim;
  const int64_t feature_parts = divide_up(dim, kFeaturesOfWarp), number_parts = divide_up(dim, kWarpSize);
  int64_t work = int64_t{blockIdx.x} * kLinearWarps + warp;
  const int64_t d = work % number_parts * kWarpSize + lane;
  work /= number_parts;
  const int64_t first_feature = work % feature_parts * kFeaturesOfWarp;
  const int64_t line = work / feature_parts;  // number of the segment in `sums`
  if (line >= problem.batch * problem.kv_num_heads * schedule.segments) return;
  const int64_t head = line / schedule.segments, batch_index = head / problem.kv_num_heads;
  const int64_t begin = line % schedule.segments * schedule.keys_per_segment;
  const int64_t end =
      begin + schedule.keys_per_segment < problem.kv_len ? begin + schedule.keys_per_segment : problem.kv_len;

  const int64_t stride = problem.kv_num_heads * dim;
  const int64_t first = batch_index * problem.kv_len * stride + head % problem.kv_num_heads * dim;
  float sums[kFeaturesOfWarp] = {}, normalisers[kFeaturesOfWarp] = {};
  for (int64_t j = begin; j < end; ++j) {
    if (problem.key_mask != nullptr && problem.key_mask[batch_index * problem.kv_len + j] == 0) continue;
    const T* key = static_cast<const T*>(problem.key) + first + j * stride;
    const float number = d < dim ? to_float(static_cast<const T*>(problem.value)[first + j * stride + d]) : 0.0f;
    EFFC_UNROLL
    for (int f = 0; f < kFeaturesOfWarp; ++f) {
      if (first_feature + f >= dim) break;
      const float feature = feature_of(to_float(key[first_feature + f]), problem.map);
      sums[f] += feature * number;
      normalisers[f] += feature;
    }
  }
  EFFC_UNROLL
  for (int f = 0; f < kFeaturesOfWarp; ++f) {
    const int64_t feature = line * dim + first_feature + f;
    if (first_feature + f >= dim || d >= dim) break;
    schedule.sums[feature * dim + d] = sums[f];
    if (d == 0) schedule.normalisers[feature] = normalisers[f];
  }
}

// Per warp: the features of its query.
inline size_t linear_shared_bytes(int64_t head_dim) {
  return kLinearWarps * static_cast<size_t>(head_dim) * sizeof(float);
}

inline int64_t linear_row_blocks(const LinearCall& call) {
  return linear_blocks(call.problem, call.schedule) * (kLinearRows / kLinearWarps);
}

// A warp computes one row: a share of the state, whose means are in fp32 here, and the pairs of its segment.
template <class T>
EFFC_KERNEL(kLinearThreads, 1)
attend_linear_rows(EFFC_CONSTANT LinearCall call) {
  const LinearAttention& problem = call.problem;
  const int warp = static_cast<int>(threadIdx.x / kWarpSize), lane = static_cast<int>(threadIdx.x % kWarpSize);
  constexpr unsigned kParts = kLinearRows / kLinearWarps;
  const LinearTile tile = linear_tile(problem, call.schedule, blockIdx.x / kParts);
  const int row = static_cast<int>(blockIdx.x % kParts) * kLinearWarps + warp;
  if (row >= tile.query_count) return;
  const int64_t dim = problem.head_dim, stride = problem.kv_num_heads * dim;
  const int64_t place =
      ((tile.batch_index * problem.q_len + tile.first_query + row) * problem.num_heads + tile.head) * dim;

  float* features = reinterpret_cast<float*>(shared_memory()) + warp * dim;
  const T* query = static_cast<const T*>(problem.query) + place;
  for (int64_t d = lane; d < dim; d += kWarpSize) features[d] = feature_of(to_float(query[d]), problem.map);
  __syncwarp();

  // Lane l sums up the outputs l, l + 32, ...
  constexpr int kOutputsPerLane = kMaxHeadDim / kWarpSize;
  float output[kOutputsPerLane] = {};
  float denominator = 0.0f;
  const auto add = [&](float weight, const auto* numbers) {
    denominator += weight;
    EFFC_UNROLL
    for (int part = 0; part < kOutputsPerLane; ++part) {
      const int64_t d = part * kWarpSize + lane;
      if (d >= dim) break;
      output[part] += weight * to_float(numbers[d]);
    }
  };
  if (tile.has_state) {
    const float* means = static_cast<const float*>(call.schedule.means) + tile.state * dim * dim;
    const float* totals = call.schedule.totals + tile.state * dim;
    for (int64_t f = 0; f < dim; ++f) add(features[f] * totals[f], means + f * dim);
  }
  const int64_t end = problem.causal ? problem.kv_len - problem.q_len + tile.first_query + row + 1 : 0;
  for (int64_t j = tile.keys.begin; j < end; ++j) {
    const int64_t key_place = tile.batch_index * problem.kv_len + j;
    if (problem.key_mask != nullptr && problem.key_mask[key_place] == 0) continue;
    const T* key = static_cast<const T*>(problem.key) + key_place * stride + tile.kv_head * dim;
    float product = 0.0f;
    for (int64_t d = lane; d < dim; d += kWarpSize) product += features[d] * feature_of(to_float(key[d]), problem.map);
    add(sum_of_lanes<kWarpSize>(product),
        static_cast<const T*>(problem.value) + key_place * stride + tile.kv_head * dim);
  }
  EFFC_UNROLL
  for (int part = 0; part < kOutputsPerLane; ++part) {
    const int64_t d = part * kWarpSize + lane;
    if (d >= dim) break;
    const float number = denominator == 0.0f ? 0.0f : output[part] / denominator;
    static_cast<T*>(problem.output)[place + d] = from_float<T>(number);
  }
}

}  // namespace effc::cuda
