// Merges the parts of a split problem: the softmax over all keys from the softmaxes over each split's keys.
#pragma once

#include "cuda/results.cuh"

namespace effc::cuda {

constexpr int kMergeWarps = 4;
constexpr int kMergeThreads = kMergeWarps * kWarpSize;

inline int64_t merge_blocks(const SparseAttention& problem) {
  return divide_up(problem.batch * problem.num_heads * problem.q_len, kMergeWarps);
}

// A warp merges one row of one head. Lane l holds the log-sum-exps of splits l and l + 32.
template <class T>
EFFC_KERNEL(kMergeThreads, 1)
merge_splits(EFFC_CONSTANT Call call) {
  static_assert(kMaxSplits <= 2 * kWarpSize, "two splits per lane");
  const SparseAttention& problem = call.problem;
  const int splits = call.schedule.splits;
  const int warp = static_cast<int>(threadIdx.x / kWarpSize), lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int64_t rows = problem.batch * problem.num_heads * problem.q_len;
  const int64_t row = int64_t{blockIdx.x} * kMergeWarps + warp;
  if (row >= rows) return;
  const int64_t query = row % problem.q_len, head = row / problem.q_len % problem.num_heads;
  const int64_t batch_index = row / problem.q_len / problem.num_heads;

  const float* parts = call.schedule.partial_log_sum_exp + row;
  const float first = lane < splits ? parts[lane * rows] : -INFINITY;
  const float second = lane + kWarpSize < splits ? parts[(lane + kWarpSize) * rows] : -INFINITY;
  // A part that is no number must not be lost, and fmaxf would lose it: it comes back in through the sum.
  const float largest = largest_of_lanes<kWarpSize>(fmaxf(first, second));
  const float reference = largest == -INFINITY ? 0.0f : largest;
  const float first_weight = exp2_fast(first - reference), second_weight = exp2_fast(second - reference);
  const float sum = sum_of_lanes<kWarpSize>(first_weight + second_weight);
  const RowStatistics statistics = {largest, sum};
  const float factor = output_factor(statistics);
  if (lane == 0 && problem.log_sum_exp != nullptr) problem.log_sum_exp[row] = log2_sum_exp(statistics) * kLn2;

  const int64_t offset = ((batch_index * problem.q_len + query) * problem.num_heads + head) * problem.head_dim;
  const int64_t part_size = problem.batch * problem.q_len * problem.num_heads * problem.head_dim;
  for (int64_t first_dim = 0; first_dim < problem.head_dim; first_dim += kWarpSize) {
    const int64_t d = first_dim + lane;
    float output = 0.0f;
    for (int split = 0; split < splits; ++split) {
      const float of_split = split < kWarpSize ? first_weight : second_weight;
      const float weight = __shfl_sync(kWholeWarp, of_split, split % kWarpSize);
      if (d < problem.head_dim) output += weight * call.schedule.partial_output[split * part_size + offset + d];
    }
    if (d < problem.head_dim) static_cast<T*>(problem.output)[offset + d] = from_float<T>(output * factor);
  }
}

}  // namespace effc::cuda
