// What a call of any attention operator is given, sparse or linear.
#pragma once

#include <cstdint>

namespace effc::cpu {

// Row-major tensors: query and output [batch, q_len, num_heads * head_dim], key and value
// [batch, kv_len, kv_num_heads * head_dim], key_mask [batch, kv_len].
struct AttentionCall {
  const float* query;
  const float* key;
  const float* value;
  const uint8_t* key_mask;  // or null: every key may be attended
  float* output;

  int64_t batch;
  int64_t q_len;
  int64_t kv_len;
  int64_t num_heads;
  int64_t kv_num_heads;
  int64_t head_dim;
  float scale;
};

}  // namespace effc::cpu
