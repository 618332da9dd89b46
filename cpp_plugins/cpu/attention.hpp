// What the kernels compute and how the work is cut; no instruction set in sight.
//
// The same tile kernel is compiled once per instruction set (attention_avx512.cpp, ...). Those files share only the
// plain structures below with the rest, so that no function compiled for wide instructions is ever run elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pattern/pattern.hpp"

namespace effc::cpu {

// The keys of one batch entry that its padding mask leaves.
struct AttendableKeys {
  Range range;     // first to last attendable key
  bool has_holes;  // some key inside the range is masked
};

// Row-major tensors: query and output [batch, q_len, num_heads * head_dim], key and value
// [batch, kv_len, kv_num_heads * head_dim], key_mask [batch, kv_len], log_sum_exp [batch, num_heads, q_len].
// The queries are the last q_len of the kv_len positions.
struct Problem {
  const float* query;
  const float* key;
  const float* value;
  const uint8_t* key_mask;                // or null: every key may be attended
  const AttendableKeys* attendable_keys;  // one per batch entry
  float* output;
  float* log_sum_exp;  // or null: not wanted

  int64_t batch;
  int64_t q_len;
  int64_t kv_len;
  int64_t num_heads;
  int64_t kv_num_heads;
  int64_t head_dim;
  float scale;
  Pattern pattern;
};

// Attention in which query i sees key j only if j - i is a multiple of `step` (dilated, strided) is `step` independent
// problems, each on every step-th position, and in each of them the visible keys lie side by side again. All other
// patterns are one problem with step 1. Subsequence f holds the queries f, f + step, f + 2 step, ... of the tensor.
struct Subsequences {
  Position step;
  Position count;   // those that hold a query
  Pattern pattern;  // between the positions of one subsequence
};

constexpr int64_t kMaxHeadDim = 256;
constexpr int kTileRows = 64;  // one bit of a 64-bit word per row
constexpr int kFewRows = 4;

// The unit of parallel work: some queries of some heads that share one key/value head. Row r of the tile is query
// `first_query + r % query_count` of its subsequence, of head `first_head + r / query_count`. Long inputs fill a tile
// with queries of one head; a decode step fills it with the heads of a group, so that keys and values are read once for
// all of them.
struct QueryTile {
  int64_t batch_index;
  int64_t first_head;
  int32_t head_count;
  Position subsequence;
  Position first_query;  // of the subsequence
  int32_t query_count;
};

using AttendFunction = void (*)(const Problem& problem, const Subsequences& subsequences, const QueryTile& tile,
                                float* workspace);

// What one instruction set offers.
struct Kernels {
  const char* name;
  AttendFunction attend_tile;  // up to kTileRows rows
  AttendFunction attend_few;   // up to kFewRows rows
  // Runs `iterations` rounds of independent multiply-adds and returns how many floating point operations that was.
  double (*multiply_add_rounds)(int64_t iterations);
};

// Floats that one thread needs to run a kernel; the workspace must be aligned to kWorkspaceAlignment bytes.
constexpr size_t kWorkspaceAlignment = 64;
size_t workspace_floats();

const Kernels& portable_kernels();
#if defined(EFFC_HAVE_X86_KERNELS)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

}  // namespace effc::cpu
