// Sparse attention on CUDA devices, as its callers see it: the TensorRT plugin, ONNX Runtime's CUDA operator, the
// benchmark and the tests under emulation. Plain C++17: no CUDA header is needed to include this one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/attention_tensors.hpp"
#include "pattern/pattern.hpp"

namespace effc::cuda {

constexpr Position kBlockUnit = 64;

// What E4M3 tensors stand for, and what they become. One number for a whole tensor: it times that scale is meant.
struct EightBit {
  float query_scale;
  float key_scale;
  float value_scale;
  Number output;  // kHalf or kBFloat16
};

// The queries that one block of threads works on. What is computed is the same up to rounding.
enum class Tiling : int32_t {
  kByLength,  // 64 of a head, or up to 16 of a group of heads where those are all
  kSmall,     // 16: more blocks of threads, which read the same keys more often
};

// The queries are the last q_len of the kv_len positions. A row that sees no key gives zeros.
struct SparseAttention : AttentionTensors {
  const uint8_t* marks;         // [batch, kv_len] with 0 for false, or null: no token is marked
  const float* distance_bias;   // [num_heads, 2 * bias_reach + 1] by j - i, added to the scaled scores, or null
  const float* distance_slope;  // [num_heads], times j - i, or null
  // What content-based selection chose, or null: [batch, kv_num_heads, query blocks, key_block_count], numbers of
  // blocks of `block_size` keys, rising, with negative numbers behind the last. The queries of a block see those keys,
  // as far as the pattern lets them. Blocks are cut at multiples of block_size; the first is that of the first query.
  const int32_t* key_blocks;
  // [batch, num_heads, q_len], natural logarithm, -infinity where a row sees no key, or null: not wanted.
  float* log_sum_exp;

  Position bias_reach;
  int32_t key_block_count;  // 0 where there are no key_blocks
  Position block_size;      // of key_blocks, a multiple of kBlockUnit
  float scale;
  EightBit eight_bit;  // of kE4M3
  Tiling tiling;
  Pattern pattern;
};

// Null if the kernels take a problem of these sizes and this number type on a device of compute capability
// `capability` (80, 86, 89, 90, 120), else what stands against it, as a sentence for the user. Looks at no pointer.
const char* refusal(const SparseAttention& problem, int capability);

// Whether tilings differ for a problem of these sizes and this number type. Looks at no pointer.
bool has_tilings(const SparseAttention& problem);

// Bytes of device memory that `launch` needs besides the tensors; 0 where none. Never shrinks as batch, q_len or kv_len
// grow, so that the sizes of an optimization profile's maximum serve the whole profile. Looks at no pointer.
size_t workspace_bytes(const SparseAttention& problem);

// Queues the work on `stream` (a cudaStream_t) of the current device and returns a cudaError_t, 0 for success.
// `workspace` is aligned to 256 bytes.
int launch(const SparseAttention& problem, void* workspace, void* stream);

}  // namespace effc::cuda
