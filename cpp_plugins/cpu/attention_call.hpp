// What a call of any attention operator is given, sparse or linear.
#pragma once

#include <cstdint>

#include "pattern/attention_sizes.hpp"

namespace effc::cpu {

// Row-major tensors: query and output [batch, q_len, num_heads * head_dim], key and value
// [batch, kv_len, kv_num_heads * head_dim], key_mask [batch, kv_len].
struct AttentionCall : AttentionSizes {
  const float* query;
  const float* key;
  const float* value;
  const uint8_t* key_mask;  // or null: every key may be attended
  float* output;
  float scale;  // of the products of queries and keys
};

}  // namespace effc::cpu
