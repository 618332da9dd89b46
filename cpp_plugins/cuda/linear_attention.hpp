// Linear attention on CUDA devices, as its callers see it. Plain C++17, like sparse_attention.hpp.
//
//   out_i = phi(q_i) S / (phi(q_i) . z),   S = sum_j phi(k_j) v_j^T,   z = sum_j phi(k_j)
//
// over the visible keys j, if causal j <= i; a row whose denominator is zero is zero (Katharopoulos et al., 2020).
#pragma once

#include "cuda/attention_tensors.hpp"

namespace effc::cuda {

enum class FeatureMap : int32_t {
  kElu,   // elu(x) + 1
  kRelu,  // max(x, 0)
};

// Causal queries are the last q_len of the kv_len positions. The states are in fp32, [batch, kv_num_heads, head_dim,
// head_dim] by feature and number of the value, the normalisers [batch, kv_num_heads, head_dim]; a past and a present
// one may not overlap.
struct LinearAttention : AttentionTensors {
  const float* past_state;       // S of what lies before the first key, or null: nothing does
  const float* past_normaliser;  // z of it; given if past_state is
  float* present_state;          // S behind the last key, or null: not wanted
  float* present_normaliser;     // given if present_state is
  FeatureMap map;
  bool causal;
};

// As those of SparseAttention: null or what stands against a problem; the bytes of workspace, which never shrink as
// sizes grow; and the launch, which returns a cudaError_t.
const char* refusal(const LinearAttention& problem, int capability);
size_t workspace_bytes(const LinearAttention& problem);
int launch(const LinearAttention& problem, void* workspace, void* stream);

}  // namespace effc::cuda
