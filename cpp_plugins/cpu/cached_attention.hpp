// Attention of one new token to a cache of keys and values and to itself; no instruction set in sight.
#pragma once

#include <cstdint>

#include "cpu/attention.hpp"
#include "cpu/attention_call.hpp"

namespace effc::cpu {

enum class CacheType { kFp32, kFp16, kInt8 };

// A bias below this hides its slot: the caller gives -1e30.
constexpr float kHidingBias = -5e29f;

// The new token's query, key and value, q_len 1 and kv_len 1, and what came before. The cache's rows are
// [batch, kv_num_heads, slots, head_dim], in any order.
struct CachedCall : AttentionCall {
  const void* past_key;
  const void* past_value;
  CacheType type;
  const float* key_scale;    // [batch, kv_num_heads, slots]: a slot's numbers count so much; null: 1
  const float* value_scale;  // the same
  const float* bias;         // [batch, slots + 1], the last one for the token itself; hides or is added to the scores
  const float* head_bias;    // [num_heads, slots + 1], added too, or null
  int64_t slots;
};

// The slots that one task attends to, of one key/value head.
struct CachePart {
  int64_t batch_index;
  int64_t kv_head;
  int64_t first_slot;
  int64_t end_slot;
};

// Softmax over a part of the slots for every query head of a group, not divided by its sum yet.
struct PartialRows {
  float* row_max;  // [heads of the group], in powers of two
  float* row_sum;
  float* rows;  // [heads of the group][padded_dim]
  int64_t padded_dim;
};
// Whole vectors of every instruction set.
constexpr int64_t kPaddedTo = 16;

}  // namespace effc::cpu
