#include "cuda/schedule.hpp"

#include <algorithm>
#include <vector>

namespace effc::cuda {
namespace {

// A split has at least so many tiles of keys: fewer would not repay the merge.
constexpr int64_t kTilesPerSplit = 2;
// Blocks of a split problem, on a device of any size: what bounds the workspace.
constexpr int64_t kMaxSplitBlocks = 384;
// Larger tiles of queries are never split.
constexpr int64_t kMaxSplitRows = 64;

// The keys that some query may see, as few ranges as possible.
std::vector<Range> runs_of_keys(const SparseAttention& problem) {
  const Position kv_len = static_cast<Position>(problem.kv_len);
  const Scope scope = {kv_len, problem.marks};
  const Range queries = {kv_len - static_cast<Position>(problem.q_len), kv_len};
  KeyTileIterator iterator = key_tiles(problem.pattern, queries, {0, kv_len}, kMaxLength);
  std::vector<Range> runs;
  for (KeyTile tile; next_tile(iterator, problem.pattern, scope, tile);) runs.push_back(tile.keys);
  return runs;
}

int64_t tiles_of(Range run, int keys_per_tile) {
  return (run.end - 1) / keys_per_tile - run.begin / keys_per_tile + 1;
}

// Cuts the keys where as many tiles lie before as behind.
void split_keys(const SparseAttention& problem, TileSize size, int64_t most_splits, Schedule& schedule) {
  const std::vector<Range> runs = runs_of_keys(problem);
  int64_t tiles = 0;
  for (const Range& run : runs) tiles += tiles_of(run, size.keys);
  schedule.splits = static_cast<int32_t>(std::clamp<int64_t>(tiles / kTilesPerSplit, 1, most_splits));

  int64_t tiles_before = 0;
  int32_t split = 1;
  for (const Range& run : runs) {
    const int64_t tiles_until = tiles_before + tiles_of(run, size.keys);
    for (; split < schedule.splits && tiles * split / schedule.splits < tiles_until; ++split) {
      const int64_t in_run = tiles * split / schedule.splits - tiles_before;
      const Position aligned = (run.begin / size.keys + static_cast<Position>(in_run)) * size.keys;
      schedule.split_begin[split] = larger(run.begin, aligned);
    }
    tiles_before = tiles_until;
  }
}

// Whether one tile of all queries would have several lists of blocks.
bool straddles_blocks(const SparseAttention& problem) {
  if (problem.key_block_count == 0) return false;
  return (problem.kv_len - problem.q_len) % problem.block_size + problem.q_len > problem.block_size;
}

}  // namespace

Schedule schedule_for(const SparseAttention& problem, TileSize size, int multiprocessors) {
  Schedule schedule{};
  const int64_t group = problem.num_heads / problem.kv_num_heads;
  schedule.group = static_cast<int32_t>(group);
  schedule.queries_per_tile = static_cast<int32_t>(std::min<int64_t>(problem.q_len, size.rows));
  schedule.heads_per_tile = static_cast<int32_t>(std::min(group, int64_t{size.rows} / schedule.queries_per_tile));
  schedule.head_tiles = static_cast<int32_t>(problem.kv_num_heads * divide_up(group, schedule.heads_per_tile));
  const bool straddles = straddles_blocks(problem);
  if (straddles) {
    // All queries of a tile see the same blocks of keys.
    schedule.queries_per_tile = size.rows;
    schedule.heads_per_tile = 1;
    schedule.head_tiles = static_cast<int32_t>(problem.num_heads);
  }
  if ((problem.q_len > size.rows || straddles) && problem.kv_len >= problem.q_len) {
    schedule.first_cut = static_cast<int32_t>((problem.kv_len - problem.q_len) % size.rows);
  }
  schedule.query_tiles = static_cast<int32_t>(divide_up(problem.q_len + schedule.first_cut, schedule.queries_per_tile));

  schedule.splits = 1;
  const int64_t blocks = problem.batch * schedule.head_tiles * schedule.query_tiles;
  if (size.rows <= kMaxSplitRows && blocks < multiprocessors) {
    const int64_t wanted = std::min<int64_t>(2 * int64_t{multiprocessors}, kMaxSplitBlocks) / blocks;
    if (wanted > 1) split_keys(problem, size, std::min<int64_t>(wanted, kMaxSplits), schedule);
  }
  schedule.split_begin[schedule.splits] = static_cast<Position>(problem.kv_len);
  return schedule;
}

int64_t block_count(const SparseAttention& problem, const Schedule& schedule) {
  return problem.batch * schedule.query_tiles * schedule.head_tiles * schedule.splits;
}

size_t most_workspace_bytes(const SparseAttention& problem) {
  const int64_t rows =
      std::min(kMaxSplitBlocks * kMaxSplitRows, kMaxSplits * problem.batch * problem.num_heads * problem.q_len);
  return static_cast<size_t>(rows) * static_cast<size_t>(problem.head_dim + 1) * sizeof(float);
}

}  // namespace effc::cuda
