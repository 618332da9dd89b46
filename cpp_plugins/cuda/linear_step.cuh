// A decode step of linear attention: one new token goes into the state, which its query then reads. The state is read
// and written once; there is nothing else that would take time.
#pragma once

#include "cuda/linear_features.cuh"

namespace effc::cuda {

constexpr int kStepWarps = 4;
constexpr int kStepThreads = kStepWarps * kWarpSize;
constexpr int kStepHeads = 8;  // query heads that read together; more read the new state again

inline bool is_step(const LinearAttention& problem) {
  return problem.causal && problem.q_len == 1 && problem.kv_len == 1 && problem.present_state != nullptr;
}

inline int64_t step_blocks(const LinearAttention& problem) {
  return problem.batch * problem.kv_num_heads * divide_up(problem.head_dim, kWarpSize);
}

// Per warp: what its features contribute to 32 numbers of each head's output, and to its denominator.
struct SharedStep {
  float outputs[kStepWarps][kStepHeads][kWarpSize];
  float denominators[kStepWarps][kStepHeads];
};

// A block works on 32 columns of a state, a warp on every fourth feature of them, a lane on one column.
template <class T>
EFFC_KERNEL(kStepThreads, 1)
step_linear(EFFC_CONSTANT LinearCall call) {
  const LinearAttention& problem = call.problem;
  auto& shared = *reinterpret_cast<SharedStep*>(shared_memory());
  const int warp = static_cast<int>(threadIdx.x / kWarpSize), lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int64_t dim = problem.head_dim, slices = divide_up(dim, kWarpSize);
  const int64_t head = blockIdx.x / slices, slice = blockIdx.x % slices;  // head counts those of all batch entries
  const int64_t d = slice * kWarpSize + lane;
  const int64_t batch_index = head / problem.kv_num_heads, kv_head = head % problem.kv_num_heads;
  const int group = static_cast<int>(problem.num_heads / problem.kv_num_heads);
  const bool seen = problem.key_mask == nullptr || problem.key_mask[batch_index] != 0;
  const T* key = static_cast<const T*>(problem.key) + head * dim;
  const float number = d < dim ? to_float(static_cast<const T*>(problem.value)[head * dim + d]) : 0.0f;
  const int64_t first_query = (batch_index * problem.num_heads + kv_head * group) * dim;
  const T* queries = static_cast<const T*>(problem.query) + first_query;
  T* outputs = static_cast<T*>(problem.output) + first_query;

  for (int first = 0; first < group; first += kStepHeads) {
    float sums[kStepHeads] = {}, weights[kStepHeads] = {};
    for (int64_t f = warp; f < dim; f += kStepWarps) {
      const float feature = seen ? feature_of(to_float(key[f]), problem.map) : 0.0f;
      const int64_t place = (head * dim + f) * dim + d;
      const bool has_past = problem.past_state != nullptr;
      float state = seen ? feature * number : 0.0f;
      if (d < dim && has_past) state += problem.past_state[place];
      const float normaliser = feature + (has_past ? problem.past_normaliser[head * dim + f] : 0.0f);
      if (first == 0 && d < dim) problem.present_state[place] = state;
      if (first == 0 && d == 0) problem.present_normaliser[head * dim + f] = normaliser;
      EFFC_UNROLL
      for (int h = 0; h < kStepHeads; ++h) {
        if (first + h >= group) break;
        const float of_query = feature_of(to_float(queries[(first + h) * dim + f]), problem.map);
        sums[h] += of_query * state;
        weights[h] += of_query * normaliser;
      }
    }
    EFFC_UNROLL
    for (int h = 0; h < kStepHeads; ++h) {
      shared.outputs[warp][h][lane] = sums[h];
      if (lane == 0) shared.denominators[warp][h] = weights[h];
    }
    synchronise_block();
    for (int h = warp; h < kStepHeads && first + h < group; h += kStepWarps) {
      float sum = 0.0f, denominator = 0.0f;
      for (int w = 0; w < kStepWarps; ++w) {
        sum += shared.outputs[w][h][lane];
        denominator += shared.denominators[w][h];
      }
      const float output = denominator == 0.0f ? 0.0f : sum / denominator;
      if (d < dim) outputs[(first + h) * dim + d] = from_float<T>(output);
    }
    synchronise_block();
  }
}

}  // namespace effc::cuda
