// One part of a cache for the query heads of a group: the decode kernel's steps over rows that lie side by side.
//
// Floor: every number of the cache is read once, at the memory's rate. INT8 and fp16 rows are widened block by block in
// the first-level cache, so that a smaller cache is read in less time.
#pragma once

#include "cpu/attention_few.hpp"
#include "cpu/cached_attention.hpp"

namespace effc::cpu {
namespace {

// Loops over single numbers that compilers turn into vectors.
inline void widen(const int8_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// As many numbers of half precision as the instruction set reads by itself; returns how many.
template <class Vectors>
inline int64_t widen_vectors(const uint16_t* from, int64_t count, float* to) {
  int64_t done = 0;
  if constexpr (Vectors::kReadsHalf) {
    for (; done + kWidth <= count; done += kWidth) Vectors::store(to + done, Vectors::load_half(from + done));
  }
  return done;
}

// IEEE 754 half precision, subnormal numbers and infinities included. Masks, because GCC turns no choice that begins
// with a conversion into vectors.
inline void widen(const uint16_t* from, int64_t count, float* to) {
  constexpr int32_t kRebias = (127 - 15) << 23, kSmallestNormal = 0x0400, kLargest = 0x7bff;
  for (int64_t i = widen_vectors<Simd>(from, count, to); i < count; ++i) {
    const int32_t half = static_cast<int16_t>(from[i]);
    const int32_t magnitude = half & 0x7fff;
    const int32_t is_subnormal = (magnitude - kSmallestNormal) >> 31;
    const int32_t is_infinite = (kLargest - magnitude) >> 31;
    const int32_t normal = (magnitude << 13) + kRebias + (is_infinite & kRebias);
    const float small = static_cast<float>(magnitude) * 0x1p-24f;
    int32_t bits;
    __builtin_memcpy(&bits, &small, sizeof bits);
    bits = (bits & is_subnormal) | (normal & ~is_subnormal) | (half & INT32_MIN);
    __builtin_memcpy(to + i, &bits, sizeof bits);
  }
}

inline int64_t bytes_per_number(CacheType type) {
  return type == CacheType::kFp32 ? 4 : (type == CacheType::kFp16 ? 2 : 1);
}

// Rows of the cache from number `first` on, widened to `memory` where they are not floats.
inline const float* cache_rows(const CachedCall& call, const void* cache, int64_t first, int64_t count, float* memory) {
  const int64_t offset = first * call.head_dim, numbers = count * call.head_dim;
  switch (call.type) {
    case CacheType::kFp16:
      widen(static_cast<const uint16_t*>(cache) + offset, numbers, memory);
      return memory;
    case CacheType::kInt8:
      widen(static_cast<const int8_t*>(cache) + offset, numbers, memory);
      return memory;
    default:
      return static_cast<const float*>(cache) + offset;
  }
}

// Up to kKeyTile slots.
struct CacheBlock {
  const float* key;
  const float* value;
  const float* key_scale;    // or null
  const float* value_scale;  // or null
  const float* bias;
  const float* head_bias;  // of the first row, or null
  int64_t head_bias_stride;
  int count;
  uint64_t visible;
  // The rows kKeyTile slots further on as they are stored, which the next block will need.
  const char* next_key;
  const char* next_value;
  int64_t row_bytes;
};

template <int kRows>
inline void attend_block(const CacheBlock& block, int64_t head_dim, const float* query, int64_t stride, float* scores,
                         float* row_max, float* row_sum, float* rows) {
  for (uint64_t left = block.visible; left != 0; left &= left - 1) {
    const int j = __builtin_ctzll(left);
    for (int64_t byte = 0; byte < block.row_bytes; byte += kCacheLine * sizeof(float)) {
      __builtin_prefetch(block.next_key + j * block.row_bytes + byte);
      __builtin_prefetch(block.next_value + j * block.row_bytes + byte);
    }
    float products[kRows];
    score_key<kRows>(query, stride, block.key + j * head_dim, head_dim, products);
    for (int r = 0; r < kRows; ++r) {
      float score = block.key_scale != nullptr ? products[r] * block.key_scale[j] : products[r];
      score += block.bias[j] * kLog2E;
      if (block.head_bias != nullptr) score += block.head_bias[r * block.head_bias_stride + j] * kLog2E;
      scores[r * kKeyTile + j] = score;
    }
  }
  float rescale[kRows];
  for (int r = 0; r < kRows; ++r) {
    float* own = scores + r * kKeyTile;
    softmax_row(own, block.count, block.visible, row_max[r], row_sum[r], rescale[r]);
    for (int j = 0; block.value_scale != nullptr && j < block.count; ++j) own[j] *= block.value_scale[j];
  }
  accumulate<Fp32, kRows, 1, kKeyTile>(scores, block.value, head_dim, block.count, head_dim, rescale, rows, stride);
}

void attend_cache(const CachedCall& call, const CachePart& part, const PartialRows& partial, Workspace& workspace) {
  static_assert(kFewRows == 4, "the cases below cover 1 to kFewRows");
  const int64_t head_dim = call.head_dim, stride = partial.padded_dim;
  const int64_t group = call.num_heads / call.kv_num_heads;
  const int64_t first_head = part.kv_head * group;
  float* query = workspace.packed_memory;           // [group][stride], scaled
  float* scores = workspace.memory;                 // [kFewRows][kKeyTile]
  float* wide_keys = scores + kFewRows * kKeyTile;  // [kKeyTile][head_dim]
  float* wide_values = wide_keys + kKeyTile * head_dim;
  for (int64_t row = 0; row < group; ++row) {
    const float* from = call.query + (part.batch_index * call.num_heads + first_head + row) * head_dim;
    for (int64_t d = 0; d < stride; ++d) {
      query[row * stride + d] = d < head_dim ? from[d] * call.scale * kLog2E : 0.0f;
      partial.rows[row * stride + d] = 0.0f;
    }
    partial.row_max[row] = kNoScore;
    partial.row_sum[row] = 0.0f;
  }
  // Lanes of hidden and missing keys are computed and thrown away; they must hold numbers.
  for (int n = 0; n < kFewRows * kKeyTile; ++n) scores[n] = 0.0f;

  const float* bias = call.bias + part.batch_index * (call.slots + 1);
  const int64_t first_row = (part.batch_index * call.kv_num_heads + part.kv_head) * call.slots;
  for (int64_t slot = part.first_slot; slot < part.end_slot; slot += kKeyTile) {
    const int64_t left = part.end_slot - slot;
    CacheBlock block{};
    block.count = static_cast<int>(left < kKeyTile ? left : kKeyTile);
    for (int j = 0; j < block.count; ++j) block.visible |= uint64_t{bias[slot + j] > kHidingBias} << j;
    if (block.visible == 0) continue;
    block.key = cache_rows(call, call.past_key, first_row + slot, block.count, wide_keys);
    block.value = cache_rows(call, call.past_value, first_row + slot, block.count, wide_values);
    block.key_scale = call.key_scale != nullptr ? call.key_scale + first_row + slot : nullptr;
    block.value_scale = call.value_scale != nullptr ? call.value_scale + first_row + slot : nullptr;
    block.bias = bias + slot;
    block.head_bias_stride = call.slots + 1;
    block.row_bytes = head_dim * bytes_per_number(call.type);
    const int64_t next = (first_row + slot + kKeyTile) * block.row_bytes;
    block.next_key = static_cast<const char*>(call.past_key) + next;
    block.next_value = static_cast<const char*>(call.past_value) + next;
    for (int64_t row = 0; row < group; row += kFewRows) {
      const int64_t rows = group - row;
      if (call.head_bias != nullptr) block.head_bias = call.head_bias + (first_head + row) * (call.slots + 1) + slot;
      const auto run = [&](auto attend) {
        attend(block, head_dim, query + row * stride, stride, scores, partial.row_max + row, partial.row_sum + row,
               partial.rows + row * stride);
      };
      if (rows >= 4) {
        run(attend_block<4>);
      } else if (rows == 3) {
        run(attend_block<3>);
      } else if (rows == 2) {
        run(attend_block<2>);
      } else {
        run(attend_block<1>);
      }
    }
  }
}

}  // namespace
}  // namespace effc::cpu
