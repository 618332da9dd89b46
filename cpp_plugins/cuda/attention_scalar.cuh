// The readable kernel, for numbers and sizes that tensor cores do not take: a warp computes one row, without tensor
// cores and in fp32 throughout. The other kernel does the same, 16 rows at a time.
#pragma once

#include "cuda/key_tile_walk.cuh"
#include "cuda/results.cuh"
#include "cuda/scores.cuh"

namespace effc::cuda {

constexpr int kScalarWarps = 4;
constexpr int kScalarKeys = 64;  // keys per round of the online softmax, two per lane
constexpr int kScalarThreads = kScalarWarps * kWarpSize;
constexpr TileSize kScalarTile = {kScalarWarps, kScalarKeys};

// Per warp: the query, and the weights of one round.
inline size_t scalar_shared_bytes(int64_t head_dim) {
  return kScalarWarps * static_cast<size_t>(head_dim + kScalarKeys) * sizeof(float);
}

template <class T>
EFFC_DEVICE float dot_product(const float* query, const T* key, int head_dim) {
  float sum = 0.0f;
  for (int d = 0; d < head_dim; ++d) sum += query[d] * to_float(key[d]);
  return sum;
}

template <class T>
EFFC_KERNEL(kScalarThreads, 1)
attend_rows(EFFC_CONSTANT Call call) {
  const SparseAttention& problem = call.problem;
  const QueryTile tile = query_tile(problem, call.schedule, blockIdx.x);
  const int warp = static_cast<int>(threadIdx.x / kWarpSize), lane = static_cast<int>(threadIdx.x % kWarpSize);
  if (warp >= tile.query_count * tile.head_count) return;

  const int head_dim = static_cast<int>(problem.head_dim);
  const Row row = row_of(problem, tile, warp);
  const int64_t key_stride = problem.kv_num_heads * problem.head_dim;
  const int64_t first_key = tile.batch_index * problem.kv_len * key_stride + tile.kv_head * problem.head_dim;
  const T* keys = static_cast<const T*>(problem.key) + first_key;
  const T* values = static_cast<const T*>(problem.value) + first_key;
  const int64_t first_of_batch = tile.batch_index * problem.kv_len;
  const uint8_t* key_mask = problem.key_mask == nullptr ? nullptr : problem.key_mask + first_of_batch;
  const uint8_t* marks = problem.marks == nullptr ? nullptr : problem.marks + first_of_batch;
  const Scope scope = {static_cast<Position>(problem.kv_len), marks};
  const DistanceBias bias = distance_bias_of(problem, row.head);

  float* query = reinterpret_cast<float*>(shared_memory()) + warp * (head_dim + kScalarKeys);
  float* weights = query + head_dim;
  const T* query_in_memory = static_cast<const T*>(problem.query) + row.offset;
  for (int d = lane; d < head_dim; d += kWarpSize) query[d] = to_float(query_in_memory[d]);
  __syncwarp();

  // Lane l sums up the outputs l, l + 32, ...
  constexpr int kOutputsPerLane = kMaxHeadDim / kWarpSize;
  float output[kOutputsPerLane] = {};
  float largest = -INFINITY, sum = 0.0f;

  KeyTileWalk walk =
      walk_key_tiles(problem, scope, tile, {row.position, row.position + 1}, keys_of_split(call.schedule, tile));
  for (;;) {
    const VisitedTile visited = next_tile<kScalarKeys>(walk, problem.pattern, scope, key_mask);
    if (is_empty(visited.keys)) break;

    float scores[2];
    EFFC_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int n = half * kWarpSize + lane;
      const Position j = visited.keys.begin + n;
      bool seen = (visited.attendable >> n & 1) != 0;
      if (seen && !visited.full) seen = visible(problem.pattern, scope, row.position, j);
      scores[half] = -INFINITY;
      if (!seen) continue;
      const float product = dot_product(query, keys + j * key_stride, head_dim);
      scores[half] = product * (problem.scale * kLog2E) + bias_at(bias, j - row.position);
    }

    // What was summed up so far refers to the old largest score and is scaled down to the new one.
    const float new_largest = fmaxf(largest, largest_of_lanes<kWarpSize>(fmaxf(scores[0], scores[1])));
    const float reference = new_largest == -INFINITY ? 0.0f : new_largest;
    const float kept = exp2_fast(largest - reference);
    const float first_weight = exp2_fast(scores[0] - reference), second_weight = exp2_fast(scores[1] - reference);
    sum = sum * kept + sum_of_lanes<kWarpSize>(first_weight + second_weight);
    largest = new_largest;

    weights[lane] = first_weight;
    weights[kWarpSize + lane] = second_weight;
    __syncwarp();
    EFFC_UNROLL
    for (int part = 0; part < kOutputsPerLane; ++part) {
      const int d = part * kWarpSize + lane;
      if (d >= head_dim) break;
      output[part] *= kept;
      for (Position j = visited.keys.begin; j < visited.keys.end; ++j) {
        const float weight = weights[j - visited.keys.begin];
        if (weight != 0.0f) output[part] += weight * to_float(values[j * key_stride + d]);
      }
    }
    __syncwarp();
  }

  const RowStatistics statistics = {largest, sum};
  if (lane == 0) write_log_sum_exp(call, tile, row, statistics);
  const float factor = output_factor(statistics);
  EFFC_UNROLL
  for (int part = 0; part < kOutputsPerLane; ++part) {
    const int d = part * kWarpSize + lane;
    if (d < head_dim) write_output<T>(call, tile, row, d, output[part] * factor);
  }
}

}  // namespace effc::cuda
