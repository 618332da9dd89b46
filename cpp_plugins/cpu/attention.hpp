// What the kernels compute and how the work is cut; no instruction set in sight.
//
// The same tile kernel is compiled once per instruction set (attention_avx512.cpp, ...). Those files share only the
// plain structures below with the rest, so that no function compiled for wide instructions is ever run elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/attention_call.hpp"
#include "pattern/pattern.hpp"

namespace effc::cpu {

// Which blocks of `block` keys the queries of each block of queries see, chosen by content: bit n of a row of words is
// block n. Rows are [batch, kv_num_heads, query_blocks]; the first one is that of query block `first_query_block`.
struct ChosenBlocks {
  const uint64_t* words;  // or null: the pattern alone decides
  int64_t words_per_row;
  int64_t query_blocks;
  Position block;
  Position first_query_block;
};

// The queries are the last q_len of the kv_len positions.
struct Problem : AttentionCall {
  const uint8_t* marks;         // [batch, kv_len], or null: no token is marked
  const float* distance_bias;   // [num_heads, 2 * bias_reach + 1] by j - i, or null
  const float* distance_slope;  // [num_heads], times j - i, or null
  Position bias_reach;
  float* log_sum_exp;   // [batch, num_heads, q_len], or null: not wanted
  ChosenBlocks chosen;  // only with patterns of one pass and without listed keys and rows
};

// The keys of one batch entry that a mask leaves.
struct AttendableKeys {
  Range range;     // first to last attendable key
  bool has_holes;  // some key inside the range is masked
};

struct List {
  const Position* positions;  // ascending
  int32_t count;
};

// What a plan (plan.hpp) found out about one batch entry.
struct BatchEntry {
  AttendableKeys all_keys;   // by Problem::key_mask
  AttendableKeys main_keys;  // by main_mask: without the listed keys
  const uint8_t* all_mask;   // [kv_len], or null: every key
  const uint8_t* main_mask;
  List listed_keys;  // keys that every query sees and that stand anywhere; not masked
  List listed_rows;  // rows of the query tensor that see every key
};

// What is added to the scores by distance, in units of log2. One head's table holds, for i - j from
// -reach - kTilePadding to reach + kTilePadding, the bias of that distance, so that a tile of neighbouring queries
// reads its biases side by side and beyond the reach reads the outermost one.
constexpr Position kTilePadding = 64;
struct DistanceBias {
  const float* tables;  // [num_heads, row], or null
  int64_t row;
  Position reach;
  const float* slopes;  // [num_heads], or null
};

// Softmax over a union of terms can be computed in parts, each continuing where the last one stopped. All terms whose
// visible keys lie side by side form one pass. A term in which query i sees key j only if j - i is a multiple of `step`
// (dilated, strided) forms a pass of its own: `step` independent problems, each on every step-th position, and in each
// of them the visible keys lie side by side again. Subsequence f holds the queries f, f + step, ... of the tensor.
struct Pass {
  Pattern pattern;   // between the positions of one subsequence; neither kFirstQueries nor kMarked
  Pattern excluded;  // between positions: what earlier passes have done
  Position step;
  bool continues;  // start from what is in output and log_sum_exp
  bool takes_listed_keys;
};

// Before every query, even with more queries than keys, when the first ones stand at negative positions.
constexpr Position kNoQuery = -kMaxLength;

// Everything that a kernel needs to know about a call.
struct Call {
  Problem problem;
  const BatchEntry* entries;  // one per batch entry
  DistanceBias bias;
  Position whole_rows;    // queries before this are listed rows
  bool marks_whole_rows;  // and so are marked queries
};

constexpr int64_t kMaxHeadDim = 512;
constexpr int kTileRows = 64;  // one bit of a 64-bit word per row
constexpr int kKeyTile = 64;   // keys per round of the online softmax
constexpr int kFewRows = 4;

// The unit of parallel work: some queries of some heads that share one key/value head. Row r of the tile is query
// r % query_count of its queries, of head `first_head + r / query_count`. Long inputs fill a tile with queries of one
// head; a decode step fills it with the heads of a group, so that keys and values are read once for all of them.
struct QueryTile {
  int64_t batch_index;
  int64_t first_head;
  int32_t head_count;
  Position subsequence;
  Position first_query;  // of the subsequence, or of the listed rows
  int32_t query_count;
  bool listed;  // the queries are listed rows, which see everything
};

// Memory that will be needed soon, to be asked for a little at a time: too much at once would wait for itself. Rows are
// followed from end to end, because that is how they lie in memory.
struct Prefetch {
  const float* row;
  int64_t stride;
  int32_t rows;
  int64_t width;
  int64_t done;  // of the row
};

// What one thread works with. Keys and values of a head lie far apart in the tensors, often a page each, where no
// hardware looks ahead, and at distances that fill only a few sets of the cache. The tile kernel therefore copies them
// side by side, one slot per block of kKeyTile keys, finds them there again for the next tile of queries, and asks in
// time for the block after. A task takes a few neighbouring heads, because their rows share pages.
constexpr int kMaxPackedBlocks = 256;
struct Workspace {
  float* memory;            // kWorkspaceFloats, aligned to kWorkspaceAlignment bytes
  float* packed_memory;     // slots of 2 * kKeyTile * head_dim
  int32_t blocks_per_head;  // slots of one key/value head, at least 1; all of a task: at most kMaxPackedBlocks
  int64_t first_kv_head;    // of the task
  int64_t kv_heads;         // of the task, at least 1
  int64_t first_head;       // of the task's query heads
  int64_t heads;
  Position packed[kMaxPackedBlocks];    // the block of keys that each slot holds, or -1
  int64_t last_used[kMaxPackedBlocks];  // when each slot was last looked up, counted in `lookups`
  int64_t lookups;
  Prefetch keys, values, queries, outputs;
  int32_t pieces;  // of keys and of values to ask for at a time
};

using AttendFunction = void (*)(const Call& call, const Pass& pass, const QueryTile& tile, Workspace& workspace);

struct LinearKernels;  // linear_attention.hpp
struct CachedCall;     // cached_attention.hpp
struct CachePart;
struct PartialRows;
using AttendCacheFunction = void (*)(const CachedCall& call, const CachePart& part, const PartialRows& partial,
                                     Workspace& workspace);

// What one instruction set offers.
struct Kernels {
  const char* name;
  AttendFunction attend_tile;  // up to kTileRows rows
  AttendFunction attend_few;   // up to kFewRows rows
  // Runs `iterations` rounds of independent multiply-adds and returns how many floating point operations that was.
  double (*multiply_add_rounds)(int64_t iterations);
  const LinearKernels* linear;
  AttendCacheFunction attend_cache;
};

constexpr size_t kWorkspaceAlignment = 64;
constexpr size_t kWorkspaceFloats = 2 * kMaxHeadDim * kTileRows   // queries, outputs
                                    + 4 * kMaxHeadDim * kKeyTile  // listed keys and their values, twice
                                    + kKeyTile * kTileRows        // scores
                                    + kKeyTile / 2 * kTileRows    // weights in pairs
                                    + 3 * kTileRows;              // statistics

const Kernels& portable_kernels();
#if defined(EFFC_HAVE_X86_KERNELS)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();
const Kernels& avx512_amx_kernels();
#endif

}  // namespace effc::cpu
