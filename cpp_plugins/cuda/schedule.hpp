// How a problem is cut into blocks of threads. Plain C++: host, kernels, tests and benchmarks read the same.
#pragma once

#include "cuda/sparse_attention.hpp"

namespace effc::cuda {

constexpr int kMaxSplits = 64;

// The work of one block: a tile of queries of one head, or a few queries of all heads that share a key/value head, and
// of the keys one split. Row r of a tile is query r % query_count of head first_head + r / query_count.
struct QueryTile {
  int32_t batch_index;
  int32_t first_head;
  int32_t head_count;
  int32_t kv_head;
  int32_t first_query;  // of the query tensor
  int32_t query_count;
  int32_t split;
  Range positions;  // of the queries, in the sequence
};

struct Schedule {
  int32_t group;  // heads that share a key/value head
  int32_t heads_per_tile;
  int32_t queries_per_tile;
  int32_t first_cut;    // queries that the first tile lacks, so that the others begin at multiples of their size
  int32_t query_tiles;  // tiles that the queries of a head are cut into
  int32_t head_tiles;   // tiles that the heads are cut into
  int32_t splits;       // parts that the keys are cut into
  Position split_begin[kMaxSplits + 1];

  // Of a split problem: output [splits, batch, q_len, num_heads * head_dim] and log-sum-exp
  // [splits, batch, num_heads, q_len] to the base 2, which a second kernel merges.
  float* partial_output;
  float* partial_log_sum_exp;
};

// What every kernel is given.
struct Call {
  SparseAttention problem;
  Schedule schedule;
};

// What a kernel wants its work to look like.
struct TileSize {
  int rows;  // of a tile of queries
  int keys;  // of a tile of keys
};

// `multiprocessors` of the device: a problem that would leave most of them idle is split.
Schedule schedule_for(const SparseAttention& problem, TileSize size, int multiprocessors);

int64_t block_count(const SparseAttention& problem, const Schedule& schedule);

// Bytes of workspace that a schedule of this problem may need at most, whatever the device. Grows with every size.
size_t most_workspace_bytes(const SparseAttention& problem);

// The tile of block number `block`. Splits run fastest, then heads, because they read the same keys; the last queries
// come first, since in a causal problem they see the most keys and would otherwise keep the device waiting at the end.
EFFC_HD QueryTile query_tile(const SparseAttention& problem, const Schedule& schedule, uint32_t block) {
  QueryTile tile;
  const uint32_t splits = static_cast<uint32_t>(schedule.splits);
  const uint32_t head_tiles = static_cast<uint32_t>(schedule.head_tiles);
  const uint32_t query_tiles = static_cast<uint32_t>(schedule.query_tiles);
  tile.split = static_cast<int32_t>(block % splits);
  block /= splits;
  const int32_t head_tile = static_cast<int32_t>(block % head_tiles);
  block /= head_tiles;
  const int32_t from_last = static_cast<int32_t>(block % query_tiles);
  tile.batch_index = static_cast<int32_t>(block / query_tiles);

  const int32_t group = schedule.group;
  const int32_t tiles_per_group = (group + schedule.heads_per_tile - 1) / schedule.heads_per_tile;
  const int32_t head_in_group = head_tile % tiles_per_group * schedule.heads_per_tile;
  tile.kv_head = head_tile / tiles_per_group;
  tile.first_head = tile.kv_head * group + head_in_group;
  tile.head_count = smaller(schedule.heads_per_tile, group - head_in_group);

  const int32_t begin = (schedule.query_tiles - 1 - from_last) * schedule.queries_per_tile - schedule.first_cut;
  tile.first_query = larger(begin, 0);
  const int32_t end = smaller(begin + schedule.queries_per_tile, static_cast<int32_t>(problem.q_len));
  tile.query_count = end - tile.first_query;
  const Position past = static_cast<Position>(problem.kv_len - problem.q_len);
  tile.positions = {past + tile.first_query, past + end};
  return tile;
}

// The blocks of keys that the tile's queries see, or null. `position`: of one of them.
EFFC_HD const int32_t* key_blocks_of(const SparseAttention& problem, const QueryTile& tile, Position position) {
  if (problem.key_block_count == 0) return nullptr;
  const int64_t first = (problem.kv_len - problem.q_len) / problem.block_size;
  const int64_t blocks = (problem.kv_len - 1) / problem.block_size - first + 1;
  const int64_t list =
      (tile.batch_index * problem.kv_num_heads + tile.kv_head) * blocks + position / problem.block_size;
  return problem.key_blocks + (list - first) * problem.key_block_count;
}

// The keys of the tile's split.
EFFC_HD Range keys_of_split(const Schedule& schedule, const QueryTile& tile) {
  return {schedule.split_begin[tile.split], schedule.split_begin[tile.split + 1]};
}

}  // namespace effc::cuda
