// Linear attention, a chunk of kChunk rows at a time, on top of matrix products in the second-level cache.
//
// Floor: 4 * features * head_dim floating point operations per token and head (state in, state out); causal adds
// 2 * kChunk * (features + head_dim) for the pairs within a chunk, half of which are hidden. Every query, key, value
// and output is moved once: 16 * head_dim bytes per token and head, at head_dim 64 about a byte per 16 operations, so
// both matter.
#pragma once

#include "cpu/linear_features.hpp"

namespace effc::cpu {
namespace {

constexpr float kSmallestDenominator = 1.1754944e-38f;

inline void scale_line(float* numbers, int64_t padded, float factor) {
  for (int64_t n = 0; n < padded; n += kWidth) {
    Simd::store(numbers + n, Simd::mul(Simd::load(numbers + n), Simd::broadcast(factor)));
  }
}

inline void copy_padded(const float* from, int64_t count, float* to) {
  for (int64_t n = 0; n < padded_line(count); n += kWidth) {
    Simd::store(to + n, n < count ? load_padded(from, n, count) : Simd::zero());
  }
}

// One head's part of a workspace.
inline LinearWorkspace of_head(const LinearProblem& problem, const LinearWorkspace& workspace, int64_t kv_head,
                               int64_t head) {
  const int64_t features = kChunk * padded_line(problem.features), dims = kChunk * padded_line(problem.head_dim);
  LinearWorkspace own = workspace;
  own.query_features += head * features;
  own.key_features += kv_head * features;
  own.values += kv_head * dims;
  own.output += head * dims;
  own.denominators += head * kChunk;
  own.exponents += kv_head * kChunk;
  return own;
}

inline int64_t group_of(const LinearProblem& problem) {
  return problem.num_heads / problem.kv_num_heads;
}

// Features, exponents and values of the keys [begin, begin + rows); hidden ones are zero.
inline void load_keys(const LinearProblem& problem, const LinearHeads& heads, int64_t begin, int rows,
                      const LinearWorkspace& workspace) {
  const int64_t head_dim = problem.head_dim, width = problem.kv_num_heads * head_dim;
  const int64_t first = (heads.batch * problem.kv_len + begin) * width + heads.first * head_dim;
  const int64_t line = padded_line(problem.features), dim_line = padded_line(head_dim);
  const float* matrices =
      problem.map == FeatureMap::kHedgehog ? problem.key_map + heads.first * head_dim * dim_line : problem.key_map;
  const int64_t count = heads.end - heads.first, ahead = problem.kv_len - begin - rows;
  map_rows(problem, {problem.key + first, width, count, rows, ahead}, matrices, workspace, workspace.key_features,
           workspace.exponents);
  const HeadRows values = {problem.value + first, width, count, rows, ahead};
  for (int r = 0; r < rows; ++r) {
    prefetch_ahead(values, head_dim, r);
    for (int64_t head = 0; head < count; ++head) {
      copy_padded(values.rows + r * width + head * head_dim, head_dim,
                  workspace.values + (head * kChunk + r) * dim_line);
    }
  }
  if (problem.key_mask == nullptr) return;
  for (int r = 0; r < rows; ++r) {
    if (problem.key_mask[heads.batch * problem.kv_len + begin + r] != 0) continue;
    for (int64_t head = 0; head < count; ++head) {
      const int64_t row = head * kChunk + r;
      for (int64_t n = 0; n < line; ++n) workspace.key_features[row * line + n] = 0.0f;
      for (int64_t d = 0; d < dim_line; ++d) workspace.values[row * dim_line + d] = 0.0f;
      workspace.exponents[row] = kEmptyStabiliser;
    }
  }
}

inline void load_queries(const LinearProblem& problem, const LinearHeads& heads, int64_t begin, int rows,
                         const LinearWorkspace& workspace) {
  const int64_t head_dim = problem.head_dim, width = problem.num_heads * head_dim, group = group_of(problem);
  const int64_t first_head = heads.first * group, count = (heads.end - heads.first) * group;
  const float* first = problem.query + (heads.batch * problem.q_len + begin) * width + first_head * head_dim;
  const float* matrices = problem.map == FeatureMap::kHedgehog
                              ? problem.query_map + first_head * head_dim * padded_line(head_dim)
                              : problem.query_map;
  map_rows(problem, {first, width, count, rows, problem.q_len - begin - rows}, matrices, workspace,
           workspace.query_features, nullptr);
}

// Divides the chunk's outputs by their denominators and writes them; a denominator of zero has zeros above it.
inline void write_chunk(const LinearProblem& problem, const LinearHeads& heads, int64_t begin, int rows,
                        const LinearWorkspace& workspace) {
  const int64_t head_dim = problem.head_dim, width = problem.num_heads * head_dim, dim_line = padded_line(head_dim);
  const int64_t group = group_of(problem), count = (heads.end - heads.first) * group;
  float* first = problem.output + (heads.batch * problem.q_len + begin) * width + heads.first * group * head_dim;
  for (int r = 0; r < rows; ++r) {
    for (int64_t head = 0; head < count; ++head) {
      const float denominator = workspace.denominators[head * kChunk + r];
      const float inverse = 1.0f / (denominator < kSmallestDenominator ? kSmallestDenominator : denominator);
      const float* from = workspace.output + (head * kChunk + r) * dim_line;
      float* to = first + r * width + head * head_dim;
      int64_t d = 0;
      for (; d + kWidth <= head_dim; d += kWidth) {
        Simd::store(to + d, Simd::mul(Simd::load(from + d), Simd::broadcast(inverse)));
      }
      for (; d < head_dim; ++d) to[d] = from[d] * inverse;
    }
  }
}

// Lets the state be relative to `stabiliser`, which is no smaller than its own.
inline void raise_stabiliser(const LinearProblem& problem, float stabiliser, const LinearState& state) {
  if (stabiliser == *state.stabiliser) return;
  const float kept = exp_nonpositive(*state.stabiliser - stabiliser);
  scale_line(state.sums, problem.features * padded_line(problem.head_dim), kept);
  scale_line(state.normaliser, padded_line(problem.features), kept);
  *state.stabiliser = stabiliser;
}

// Adds the loaded keys to the state. Their features are scaled in place.
inline void add_chunk(const LinearProblem& problem, int rows, const LinearState& state,
                      const LinearWorkspace& workspace) {
  const int64_t line = padded_line(problem.features), dim_line = padded_line(problem.head_dim);
  if (is_stabilised(problem)) {
    const float largest = largest_of(workspace.exponents, rows);
    raise_stabiliser(problem, largest > *state.stabiliser ? largest : *state.stabiliser, state);
    for (int r = 0; r < rows; ++r) {
      scale_line(workspace.key_features + r * line, line, exp_nonpositive(workspace.exponents[r] - *state.stabiliser));
    }
  }
  for (int64_t n = 0; n < line; n += kWidth) {
    Float sum = Simd::load(state.normaliser + n);
    for (int r = 0; r < rows; ++r) sum = Simd::add(sum, Simd::load(workspace.key_features + r * line + n));
    Simd::store(state.normaliser + n, sum);
  }
  multiply<true>(problem.features, dim_line, rows, workspace.key_features, 1, line, workspace.values, dim_line,
                 state.sums, dim_line);
}

void add_keys(const LinearProblem& problem, const LinearHeads& heads, int64_t begin, int64_t end,
              const LinearWorkspace& workspace) {
  for (; begin < end; begin += kChunk) {
    const int rows = static_cast<int>(end - begin < kChunk ? end - begin : kChunk);
    load_keys(problem, heads, begin, rows, workspace);
    for (int64_t kv_head = 0; kv_head < heads.end - heads.first; ++kv_head) {
      add_chunk(problem, rows, heads.states[kv_head], of_head(problem, workspace, kv_head, 0));
    }
  }
}

// What the loaded queries read from a state, not yet divided.
inline void read_state(const LinearProblem& problem, int rows, const LinearState& state,
                       const LinearWorkspace& workspace) {
  const int64_t line = padded_line(problem.features), dim_line = padded_line(problem.head_dim);
  multiply<false>(rows, dim_line, problem.features, workspace.query_features, line, 1, state.sums, dim_line,
                  workspace.output, dim_line);
  for (int r = 0; r < rows; ++r) {
    workspace.denominators[r] = sum_of_products(workspace.query_features + r * line, state.normaliser, line);
  }
}

void read_states(const LinearProblem& problem, const LinearHeads& heads, int64_t begin, int64_t end,
                 const LinearWorkspace& workspace) {
  const int64_t group = group_of(problem);
  for (; begin < end; begin += kChunk) {
    const int rows = static_cast<int>(end - begin < kChunk ? end - begin : kChunk);
    load_queries(problem, heads, begin, rows, workspace);
    for (int64_t head = 0; head < (heads.end - heads.first) * group; ++head) {
      read_state(problem, rows, heads.states[head / group], of_head(problem, workspace, head / group, head));
    }
    write_chunk(problem, heads, begin, rows, workspace);
  }
}

// keys_turned[f][j] = key_features[j][f], zero behind the last key.
inline void turn_keys(const LinearProblem& problem, int rows, const LinearWorkspace& workspace) {
  const int64_t line = padded_line(problem.features);
  for (int64_t x = rows * line; x < kChunk * line; ++x) workspace.key_features[x] = 0.0f;
  for (int j = 0; j < kChunk; j += kWidth) {
    for (int64_t f = 0; f < line; f += kWidth) {
      Simd::transpose<false>(workspace.key_features + j * line + f, line, 1.0f, workspace.keys_turned + f * kChunk + j,
                             kChunk);
    }
  }
}

// Hides the keys behind each row's own, gives the others their exponentials, relative to the largest that the row sees,
// and adds the rows' sums to the denominators, which hold the part of the keys before the chunk.
inline void weigh_pairs(const LinearProblem& problem, int rows, const LinearState& state,
                        const LinearWorkspace& workspace) {
  const int64_t dim_line = padded_line(problem.head_dim);
  float* denominators = workspace.denominators;
  float largest = is_stabilised(problem) ? *state.stabiliser : 0.0f;
  for (int r = 0; r < rows; ++r) {
    float* weights = workspace.weights + r * kChunk;
    if (is_stabilised(problem)) {
      largest = workspace.exponents[r] > largest ? workspace.exponents[r] : largest;
      for (int j = 0; j < kChunk; j += kWidth) {
        const Float distance = Simd::sub(Simd::load(workspace.exponents + j), Simd::broadcast(largest));
        const int lanes = r + 1 - j < 0 ? 0 : (r + 1 - j < kWidth ? r + 1 - j : kWidth);
        const Float seen = Simd::select_or_zero(Simd::mask(low_bits(lanes)), distance);
        Simd::store(weights + j, Simd::mul(Simd::load(weights + j), exp_nonpositive(seen)));
      }
      const float kept = exp_nonpositive(*state.stabiliser - largest);
      scale_line(workspace.output + r * dim_line, dim_line, kept);
      denominators[r] *= kept;
    }
    Float sum = Simd::zero();
    for (int j = 0; j < kChunk; j += kWidth) {
      const int lanes = r + 1 - j < 0 ? 0 : (r + 1 - j < kWidth ? r + 1 - j : kWidth);
      const Float seen = Simd::select_or_zero(Simd::mask(low_bits(lanes)), Simd::load(weights + j));
      sum = Simd::add(sum, seen);
      Simd::store(weights + j, seen);
    }
    denominators[r] += Simd::sum(sum);
  }
}

// One loaded chunk of the heads that share a key/value head, whose state holds the keys before the chunk.
inline void run_chunk(const LinearProblem& problem, int64_t kv_head, int rows, const LinearState& state,
                      const LinearWorkspace& workspace) {
  const int64_t line = padded_line(problem.features), dim_line = padded_line(problem.head_dim);
  const int64_t group = group_of(problem);
  turn_keys(problem, rows, of_head(problem, workspace, kv_head, 0));
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const LinearWorkspace own = of_head(problem, workspace, kv_head, head);
    multiply<false>(rows, kChunk, problem.features, own.query_features, line, 1, own.keys_turned, kChunk, own.weights,
                    kChunk);
    read_state(problem, rows, state, own);
    weigh_pairs(problem, rows, state, own);
    multiply<true>(rows, dim_line, rows, own.weights, kChunk, 1, own.values, dim_line, own.output, dim_line);
  }
  add_chunk(problem, rows, state, of_head(problem, workspace, kv_head, 0));
}

void run_causal(const LinearProblem& problem, const LinearHeads& heads, const LinearWorkspace& workspace) {
  const int64_t kv_heads = heads.end - heads.first, past = problem.kv_len - problem.q_len;
  for (int64_t row = 0; row < kv_heads * kChunk; ++row) workspace.exponents[row] = kEmptyStabiliser;
  for (int64_t begin = 0; begin < problem.q_len; begin += kChunk) {
    const int rows = static_cast<int>(problem.q_len - begin < kChunk ? problem.q_len - begin : kChunk);
    load_keys(problem, heads, past + begin, rows, workspace);
    load_queries(problem, heads, begin, rows, workspace);
    for (int64_t kv_head = 0; kv_head < kv_heads; ++kv_head) {
      run_chunk(problem, kv_head, rows, heads.states[kv_head], workspace);
    }
    write_chunk(problem, heads, begin, rows, workspace);
  }
}

void merge_states(const LinearProblem& problem, const LinearState& from, const LinearState& to) {
  if (is_stabilised(problem)) {
    const float largest = *from.stabiliser > *to.stabiliser ? *from.stabiliser : *to.stabiliser;
    raise_stabiliser(problem, largest, from);
    raise_stabiliser(problem, largest, to);
  }
  const auto add = [](const float* a, float* b, int64_t padded) {
    for (int64_t n = 0; n < padded; n += kWidth) Simd::store(b + n, Simd::add(Simd::load(a + n), Simd::load(b + n)));
  };
  add(from.sums, to.sums, problem.features * padded_line(problem.head_dim));
  add(from.normaliser, to.normaliser, padded_line(problem.features));
}

constexpr LinearKernels kLinearKernels = {add_keys, read_states, run_causal, merge_states};

}  // namespace
}  // namespace effc::cpu
