#include "cpu/schedule.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <thread>

namespace effc::cpu {
namespace {

// One head's rows are far apart in memory, often a page each. All heads of a row lie in the same pages, so working
// through the heads before moving on keeps those pages in the translation buffer.
// Several query tiles of one head in a row share most of their keys, which then stay in the second-level cache.
constexpr int64_t kMaxTilesPerTask = 8;

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

// Memory for one tile, kept for the life of the thread: a tile is too short to allocate for.
float* thread_workspace() {
  static thread_local std::unique_ptr<float, Free> workspace;
  if (workspace == nullptr) {
    void* memory = nullptr;
    if (posix_memalign(&memory, kWorkspaceAlignment, kWorkspaceFloats * sizeof(float)) != 0) return nullptr;
    workspace.reset(static_cast<float*>(memory));
  }
  return workspace.get();
}

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

void run_tile(const Kernels& kernels, const Call& call, const Pass& pass, const QueryTile& tile, float* workspace) {
  const bool few = tile.head_count * tile.query_count <= kFewRows;
  (few ? kernels.attend_few : kernels.attend_tile)(call, pass, tile, workspace);
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
  // Short inputs are cut finer, so that every thread of a large machine gets something to do.
  const int64_t enough_tasks = 8 * std::max(1u, std::thread::hardware_concurrency());
  const int64_t tiles = problem.batch * schedule.subsequences * schedule.head_tiles * schedule.query_tiles;
  schedule.tiles_per_task = static_cast<int32_t>(std::clamp<int64_t>(tiles / enough_tasks, 1, kMaxTilesPerTask));
  schedule.query_tasks = divide_up(schedule.query_tiles, schedule.tiles_per_task);
  schedule.pattern_tasks = problem.batch * schedule.query_tasks * schedule.subsequences * schedule.head_tiles;
  if (!pass.continues) schedule.listed_tiles = listed_tiles(plan.call());
  return schedule;
}

bool run_task(const Plan& plan, const Schedule& schedule, const Kernels& kernels, int64_t task) {
  float* workspace = thread_workspace();
  if (workspace == nullptr) return false;
  // Listed rows see the most keys, so they come first: a long task at the end would keep the other threads waiting.
  const int64_t listed = static_cast<int64_t>(schedule.listed_tiles.size());
  if (task < listed) {
    run_tile(kernels, plan.call(), plan.whole_rows_pass(), schedule.listed_tiles[task], workspace);
    return true;
  }
  task -= listed;
  const Problem& problem = plan.call().problem;
  const int64_t head_tile = task % schedule.head_tiles;
  task /= schedule.head_tiles;
  const int64_t subsequence = task % schedule.subsequences;
  task /= schedule.subsequences;
  const int64_t first_query_tile = task % schedule.query_tasks * schedule.tiles_per_task;
  const int64_t last_query_tile = std::min(first_query_tile + schedule.tiles_per_task, schedule.query_tiles);

  QueryTile tile{};
  tile.subsequence = static_cast<Position>(subsequence);
  tile.batch_index = task / schedule.query_tasks;
  take_heads(problem, schedule.heads_per_tile, head_tile, tile);
  const int64_t queries = queries_of(problem, schedule, subsequence);
  for (int64_t query_tile = first_query_tile; query_tile < last_query_tile; ++query_tile) {
    const int64_t begin = query_tile * schedule.queries_per_tile - schedule.first_cut;
    const int64_t end = std::min<int64_t>(begin + schedule.queries_per_tile, queries);
    tile.first_query = static_cast<Position>(std::max<int64_t>(begin, 0));
    tile.query_count = static_cast<int32_t>(end - tile.first_query);
    if (tile.query_count <= 0) break;  // one query less than the first subsequence, and that one began a tile
    run_tile(kernels, plan.call(), *schedule.pass, tile, workspace);
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
