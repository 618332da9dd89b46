// The second kernel of linear attention: from the sums of segments to the states that are read.
#pragma once

#include "cuda/linear_features.cuh"

namespace effc::cuda {

constexpr int kStateThreads = 128;

inline int64_t state_blocks(const LinearCall& call) {
  const int64_t dim = call.problem.head_dim;
  return divide_up(call.problem.batch * call.problem.kv_num_heads * dim * dim, kStateThreads);
}

// A thread adds up one number of the state, over all segments. Mean is the type of `means`.
template <class Mean>
EFFC_KERNEL(kStateThreads, 1)
add_segments(EFFC_CONSTANT LinearCall call) {
  const LinearAttention& problem = call.problem;
  const LinearSchedule& schedule = call.schedule;
  const int64_t dim = problem.head_dim, state_size = dim * dim;
  const int64_t n = int64_t{blockIdx.x} * kStateThreads + threadIdx.x;
  if (n >= problem.batch * problem.kv_num_heads * state_size) return;
  const int64_t head = n / state_size, place = n % state_size, feature = place / dim;
  const bool first_of_line = place % dim == 0;

  float state = 0.0f, normaliser = 0.0f;
  if (problem.past_state != nullptr) {
    state = problem.past_state[n];
    normaliser = problem.past_normaliser[head * dim + feature];
  }
  const auto hand_out = [&](int read) {
    if (read < 0 || read >= schedule.reads) return;
    const int64_t number = head * schedule.reads + read;
    // Features are no less than zero: without a normaliser there is no sum.
    const float mean = normaliser == 0.0f ? 0.0f : state / normaliser;
    static_cast<Mean*>(schedule.means)[number * state_size + place] = from_float<Mean>(mean);
    if (first_of_line) schedule.totals[number * dim + feature] = normaliser;
  };
  EFFC_UNROLL_BY(4)
  for (int segment = 0; segment < schedule.segments; ++segment) {
    if (problem.causal) hand_out(segment - schedule.first_read);
    const int64_t number = head * schedule.segments + segment;
    state += schedule.sums[number * state_size + place];
    normaliser += schedule.normalisers[number * dim + feature];
  }
  hand_out(problem.causal ? schedule.segments - schedule.first_read : 0);
  if (problem.present_state == nullptr) return;
  problem.present_state[n] = state;
  if (first_of_line) problem.present_normaliser[head * dim + feature] = normaliser;
}

}  // namespace effc::cuda
