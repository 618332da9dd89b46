// What calls of sparse and of linear attention have in common. Plain C++17: no CUDA header is needed to include this
// one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pattern/attention_sizes.hpp"
#include "pattern/pattern.hpp"

namespace effc::cuda {

constexpr int kMaxHeadDim = 512;

enum class Number : int32_t { kFloat, kHalf, kBFloat16, kE4M3 };

constexpr size_t bytes_of(Number number) {
  return number == Number::kFloat ? 4 : (number == Number::kE4M3 ? 1 : 2);
}

// Of the output, which is never E4M3: outputs have no scale.
constexpr size_t output_bytes_of(Number number) {
  return number == Number::kE4M3 ? 2 : bytes_of(number);
}

// Row-major device tensors: query and output [batch, q_len, num_heads * head_dim], key and value
// [batch, kv_len, kv_num_heads * head_dim], all of one number type (but see SparseAttention::eight_bit); key_mask
// [batch, kv_len] with 0 for false.
struct AttentionTensors : AttentionSizes {
  const void* query;
  const void* key;
  const void* value;
  const uint8_t* key_mask;  // or null: every key may be attended
  void* output;
  Number number;
};

// Null, or what stands against these sizes on a device of compute capability `capability`, whatever the form.
inline const char* size_refusal(const AttentionSizes& sizes, int capability) {
  if (capability < 80) return "effc's CUDA kernels need a device of compute capability 8.0 or newer.";
  if (sizes.batch < 0 || sizes.q_len < 0 || sizes.kv_len < 0) return "a dimension is negative.";
  if (sizes.q_len > kMaxLength || sizes.kv_len > kMaxLength) {
    return "sequences longer than 536870912 are not supported.";
  }
  if (sizes.num_heads < 1 || sizes.kv_num_heads < 1 || sizes.num_heads % sizes.kv_num_heads != 0) {
    return "num_heads must be a multiple of kv_num_heads, and both at least 1.";
  }
  if (sizes.head_dim < 1 || sizes.head_dim > kMaxHeadDim) {
    return "head_dim must be 1 to 512. Leave this layer to the function body.";
  }
  return nullptr;
}

}  // namespace effc::cuda
