// Linear attention: what its kernels compute and the pieces that a call is cut into; no instruction set in sight.
//
//   out_i = phi(q_i) S / (phi(q_i) . z),   S = sum_j phi(k_j) v_j^T,   z = sum_j phi(k_j)
//
// over the visible keys j, if causal j <= i; a row whose denominator is zero is zero (Katharopoulos et al., 2020).
#pragma once

#include <cstdint>

#include "cpu/attention_call.hpp"

namespace effc::cpu {

enum class FeatureMap {
  kElu,        // elu(x) + 1
  kRelu,       // max(x, 0)
  kPerformer,  // exp(W x' - |x'|^2 / 2) with x' = sqrt(scale) x (Choromanski et al., 2021)
  kHedgehog,   // softmax([x A, -x A]) (Zhang et al., 2024)
};

// The queries are the last q_len of the kv_len positions if causal.
struct LinearProblem : AttentionCall {
  // Matrices that rows are multiplied with, their lines padded to whole vectors: [head_dim][padded features] for
  // kPerformer, times sqrt(scale); [heads][head_dim][padded head_dim] for kHedgehog; else null.
  const float* query_map;
  const float* key_map;
  FeatureMap map;
  int64_t features;  // of the map: head_dim, the number of random features, or 2 * head_dim
  bool causal;
};

// Keys' features carry an exponent of their own, relative to the largest of which the state is kept.
// Internal linkage, as in pattern.hpp.
static inline bool is_stabilised(const LinearProblem& problem) {
  return problem.map == FeatureMap::kPerformer;
}

// Lines of scratch matrices are padded to this many floats, a whole number of vectors on every instruction set.
constexpr int64_t kLinePadding = 16;
static inline constexpr int64_t padded_line(int64_t count) {
  return (count + kLinePadding - 1) / kLinePadding * kLinePadding;
}

constexpr int kChunk = 64;  // rows that are mapped and multiplied at a time
constexpr int64_t kMaxFeatures = 4096;
constexpr float kEmptyStabiliser = -1e30f;  // the largest exponent among no keys

// The sums over some keys of one key/value head. `sums` [features][padded head_dim], `normaliser` [padded features];
// both are to be multiplied by exp(*stabiliser) if the map is stabilised.
struct LinearState {
  float* sums;
  float* normaliser;
  float* stabiliser;
};

// What one thread works with, for chunks of kChunk rows of all heads of a task.
struct LinearWorkspace {
  float* query_features;  // [query heads][kChunk][padded features]
  float* key_features;    // [key heads][kChunk][padded features]
  float* values;          // [key heads][kChunk][padded head_dim]
  float* output;          // [query heads][kChunk][padded head_dim]
  float* denominators;    // [query heads][kChunk]
  float* exponents;       // [key heads][kChunk]
  // Of one head at a time:
  float* keys_turned;  // [padded features][kChunk]
  float* weights;      // [kChunk][kChunk]
  float* projected;    // [kChunk][padded head_dim]
};

// Key/value heads [first, end) of one batch entry, with a state for each. They are worked through together, chunk by
// chunk, because their rows lie side by side in memory: a row of all heads is read and written from end to end.
struct LinearHeads {
  int64_t batch;
  int64_t first;
  int64_t end;
  const LinearState* states;
};

struct LinearKernels {
  // Adds the keys [begin, end) to the states.
  void (*add_keys)(const LinearProblem&, const LinearHeads&, int64_t begin, int64_t end, const LinearWorkspace&);
  // Writes the outputs of the queries [begin, end), which all see the keys in the states.
  void (*read_states)(const LinearProblem&, const LinearHeads&, int64_t begin, int64_t end, const LinearWorkspace&);
  // Causal: the outputs of all queries. The states hold the keys before the first query, and afterwards all keys.
  void (*run_causal)(const LinearProblem&, const LinearHeads&, const LinearWorkspace&);
  // to += from.
  void (*merge)(const LinearProblem&, const LinearState& from, const LinearState& to);
};

}  // namespace effc::cpu
