#include "cpu/schedule.hpp"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>

#include "cpu/denormals.hpp"
#include "cpu/thread_workspace.hpp"

namespace effc::cpu {
namespace {

// A task finds most keys of a query tile where the tile before has put them, so the first tile is the slowest.
constexpr int64_t kMaxQueryTilesPerTask = 32;
// One head's rows are far apart in memory, often a page each, and its neighbours' rows lie in the same pages.
constexpr int64_t kMaxHeadTilesPerTask = 4;
constexpr int64_t kTasksPerThread = 4;

// Floats of keys and values side by side that the second-level cache keeps: half of it.
size_t cached_floats() {
  static const size_t floats = [] {
    constexpr size_t kUsual = 1 << 20;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
    const size_t cache = found > 0 ? static_cast<size_t>(found) : kUsual;
#else
    const size_t cache = kUsual;
#endif
    return std::clamp<size_t>(cache / 2, 1 << 18, 1 << 20) / sizeof(float);
  }();
  return floats;
}
static_assert(2 * kKeyTile * kMaxHeadDim <= kPackedFloats, "one block always fits");

// How many queries a subsequence holds. The first one holds the most.
int64_t queries_of(const Problem& problem, const Schedule& schedule, int64_t subsequence) {
  return divide_up(problem.q_len - subsequence, schedule.pass->step);
}

// The heads of tile number `head_tile`, if a tile takes up to `heads_per_tile` heads of a group.
void take_heads(const Problem& problem, int64_t heads_per_tile, int64_t head_tile, QueryTile& tile) {
  const int64_t group = problem.num_heads / problem.kv_num_heads;
  const int64_t tiles_per_group = divide_up(group, heads_per_tile);
  const int64_t head_in_group = head_tile % tiles_per_group * heads_per_tile;
  tile.first_head = head_tile / tiles_per_group * group + head_in_group;
  tile.head_count = static_cast<int32_t>(std::min<int64_t>(heads_per_tile, group - head_in_group));
}

std::vector<QueryTile> listed_tiles(const Call& call) {
  const Problem& problem = call.problem;
  const int64_t group = problem.num_heads / problem.kv_num_heads;
  std::vector<QueryTile> tiles;
  for (int64_t b = 0; b < problem.batch; ++b) {
    const int32_t rows = call.entries[b].listed_rows.count;
    for (Position first = 0; first < rows; first += kTileRows) {
      QueryTile tile{};
      tile.batch_index = b;
      tile.first_query = first;
      tile.query_count = smaller(kTileRows, rows - first);
      tile.listed = true;
      const int64_t heads_per_tile = std::min<int64_t>(group, kTileRows / tile.query_count);
      const int64_t head_tiles = problem.kv_num_heads * divide_up(group, heads_per_tile);
      for (int64_t head_tile = 0; head_tile < head_tiles; ++head_tile) {
        take_heads(problem, heads_per_tile, head_tile, tile);
        tiles.push_back(tile);
      }
    }
  }
  return tiles;
}

void run_tile(const Kernels& kernels, const Call& call, const Pass& pass, const QueryTile& tile, Workspace& workspace) {
  const bool few = tile.head_count * tile.query_count <= kFewRows;
  (few ? kernels.attend_few : kernels.attend_tile)(call, pass, tile, workspace);
}

// Blocks of keys that a tile of queries somewhere in the middle looks at, up to `most`.
int64_t blocks_looked_at(const Plan& plan, const Schedule& schedule, int64_t queries, int64_t most) {
  const Problem& problem = plan.call().problem;
  const Pass& pass = *schedule.pass;
  const Position keys = static_cast<Position>(problem.kv_len / pass.step);
  const Position past = static_cast<Position>((problem.kv_len - problem.q_len) / pass.step);
  const Position first = larger(0, static_cast<Position>(past + queries / 2) / kTileRows * kTileRows);
  const Range tile_of_queries = {first, first + schedule.queries_per_tile};
  const Scope scope = {static_cast<Position>(problem.kv_len), nullptr};
  KeyTileIterator iterator = key_tiles(pass.pattern, tile_of_queries, {0, keys}, kKeyTile);
  KeyTile tile;
  int64_t count = 0;
  while (count < most && next_tile(iterator, pass.pattern, scope, tile)) ++count;
  return count;
}

}  // namespace

Schedule schedule_for(const Plan& plan, const Pass& pass) {
  const Problem& problem = plan.call().problem;
  Schedule schedule{};
  schedule.pass = &pass;
  schedule.subsequences = static_cast<Position>(std::min<int64_t>(pass.step, problem.q_len));
  const int64_t queries = queries_of(problem, schedule, 0);
  const int64_t group = problem.num_heads / problem.kv_num_heads;
  schedule.queries_per_tile = static_cast<int32_t>(std::min<int64_t>(queries, kTileRows));
  if (queries > kTileRows && pass.step == 1 && problem.kv_len >= problem.q_len) {
    schedule.first_cut = static_cast<Position>((problem.kv_len - problem.q_len) % kTileRows);
  }
  schedule.heads_per_tile = static_cast<int32_t>(std::min<int64_t>(group, kTileRows / schedule.queries_per_tile));
  schedule.head_tiles = problem.kv_num_heads * divide_up(group, schedule.heads_per_tile);
  schedule.query_tiles = divide_up(queries + schedule.first_cut, schedule.queries_per_tile);

  // As many as a tile looks at: the block that the next tile meets takes the place of the one that it leaves.
  const int64_t block_floats = 2 * kKeyTile * problem.head_dim;
  const int64_t slots = std::min<int64_t>(kMaxPackedBlocks, static_cast<int64_t>(kPackedFloats) / block_floats);
  schedule.blocks_per_head =
      static_cast<int32_t>(std::max<int64_t>(1, blocks_looked_at(plan, schedule, queries, slots)));
  // Short inputs are cut finer, so that every thread of a large machine gets something to do.
  const int64_t enough_tasks = kTasksPerThread * std::max(1u, std::thread::hardware_concurrency());
  const int64_t tiles = problem.batch * schedule.subsequences * schedule.head_tiles * schedule.query_tiles;
  const int64_t tiles_per_task = std::max<int64_t>(1, tiles / enough_tasks);
  // Many heads take a task of many tiles, or too few query tiles would be left.
  const int64_t wanted_heads = static_cast<int64_t>(std::sqrt(static_cast<double>(tiles_per_task) / 8));
  // One block of each head is on its way.
  const int64_t kept_heads = static_cast<int64_t>(cached_floats()) / block_floats / (schedule.blocks_per_head + 1);
  schedule.head_tiles_per_task = static_cast<int32_t>(
      std::clamp<int64_t>(std::min({wanted_heads, kept_heads, schedule.head_tiles}), 1, kMaxHeadTilesPerTask));
  const int64_t most_query_tiles =
      std::clamp<int64_t>(tiles_per_task / schedule.head_tiles_per_task, 1, kMaxQueryTilesPerTask);
  const int64_t query_tasks = divide_up(schedule.query_tiles, most_query_tiles);
  schedule.query_tiles_per_task = static_cast<int32_t>(divide_up(schedule.query_tiles, query_tasks));
  schedule.head_tasks = divide_up(schedule.head_tiles, schedule.head_tiles_per_task);
  schedule.query_tasks = divide_up(schedule.query_tiles, schedule.query_tiles_per_task);
  schedule.pattern_tasks = problem.batch * schedule.query_tasks * schedule.subsequences * schedule.head_tasks;
  if (!pass.continues) schedule.listed_tiles = listed_tiles(plan.call());
  return schedule;
}

bool run_task(const Plan& plan, const Schedule& schedule, const Kernels& kernels, int64_t task) {
  Workspace* workspace = thread_workspace();
  if (workspace == nullptr) return false;
  const FlushDenormals flush_denormals;
  // Listed rows see the most keys, so they come first: a long task at the end would keep the other threads waiting.
  const int64_t listed = static_cast<int64_t>(schedule.listed_tiles.size());
  const Problem& problem = plan.call().problem;
  const int64_t group = problem.num_heads / problem.kv_num_heads;
  if (task < listed) {
    const QueryTile& tile = schedule.listed_tiles[task];
    workspace->first_kv_head = tile.first_head / group;
    workspace->kv_heads = 1;
    run_tile(kernels, plan.call(), plan.whole_rows_pass(), tile, *workspace);
    return true;
  }
  task -= listed;
  const int64_t first_head_tile = task % schedule.head_tasks * schedule.head_tiles_per_task;
  const int64_t end_head_tile = std::min(first_head_tile + schedule.head_tiles_per_task, schedule.head_tiles);
  task /= schedule.head_tasks;
  const int64_t subsequence = task % schedule.subsequences;
  task /= schedule.subsequences;
  const int64_t first_query_tile = task % schedule.query_tasks * schedule.query_tiles_per_task;
  const int64_t end_query_tile = std::min(first_query_tile + schedule.query_tiles_per_task, schedule.query_tiles);

  QueryTile tile{};
  tile.subsequence = static_cast<Position>(subsequence);
  tile.batch_index = task / schedule.query_tasks;
  take_heads(problem, schedule.heads_per_tile, first_head_tile, tile);
  workspace->first_kv_head = tile.first_head / group;
  workspace->blocks_per_head = schedule.blocks_per_head;
  QueryTile last_head{};
  take_heads(problem, schedule.heads_per_tile, end_head_tile - 1, last_head);
  workspace->first_head = tile.first_head;
  workspace->heads = last_head.first_head + last_head.head_count - tile.first_head;
  workspace->kv_heads = last_head.first_head / group - workspace->first_kv_head + 1;

  const int64_t queries = queries_of(problem, schedule, subsequence);
  for (int64_t query_tile = first_query_tile; query_tile < end_query_tile; ++query_tile) {
    const int64_t begin = query_tile * schedule.queries_per_tile - schedule.first_cut;
    const int64_t end = std::min<int64_t>(begin + schedule.queries_per_tile, queries);
    tile.first_query = static_cast<Position>(std::max<int64_t>(begin, 0));
    tile.query_count = static_cast<int32_t>(end - tile.first_query);
    if (tile.query_count <= 0) break;  // one query less than the first subsequence, and that one began a tile
    for (int64_t head_tile = first_head_tile; head_tile < end_head_tile; ++head_tile) {
      take_heads(problem, schedule.heads_per_tile, head_tile, tile);
      run_tile(kernels, plan.call(), *schedule.pass, tile, *workspace);
    }
  }
  return true;
}

bool run_plan(const Plan& plan, const Kernels& kernels, const ParallelFor& parallel_for) {
  std::atomic<bool> enough_memory{true};
  for (const Pass& pass : plan.split().passes) {
    const Schedule schedule = schedule_for(plan, pass);
    parallel_for(schedule.tasks(), [&](int64_t task) {
      if (!run_task(plan, schedule, kernels, task)) enough_memory = false;
    });
  }
  return enough_memory;
}

}  // namespace effc::cpu
