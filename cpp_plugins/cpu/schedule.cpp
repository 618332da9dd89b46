#include "cpu/schedule.hpp"

#include <algorithm>
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
    if (posix_memalign(&memory, kWorkspaceAlignment, workspace_floats() * sizeof(float)) != 0) return nullptr;
    workspace.reset(static_cast<float*>(memory));
  }
  return workspace.get();
}

}  // namespace

size_t workspace_floats() {
  constexpr size_t kKeyTile = 64;
  const size_t query_and_output = 2 * kMaxHeadDim * kTileRows;
  const size_t scores = kKeyTile * kTileRows;
  const size_t statistics = 3 * kTileRows;
  return query_and_output + scores + statistics;
}

namespace {

Subsequences subsequences_of(const Problem& problem) {
  Subsequences subsequences{1, 1, problem.pattern};
  Term& term = subsequences.pattern.terms[0];
  if (problem.pattern.term_count == 1 && term.kind == TermKind::kBand && term.step > 1) {
    subsequences.step = term.step;
    subsequences.count = static_cast<Position>(std::min<int64_t>(term.step, problem.q_len));
    term.left /= term.step;
    term.right /= term.step;
    term.step = 1;
  }
  return subsequences;
}

// How many queries a subsequence holds. The first one holds the most.
int64_t queries_of(const Problem& problem, const Subsequences& subsequences, int64_t subsequence) {
  return divide_up(problem.q_len - subsequence, subsequences.step);
}

}  // namespace

Schedule schedule_for(const Problem& problem) {
  Schedule schedule;
  schedule.subsequences = subsequences_of(problem);
  const int64_t queries = queries_of(problem, schedule.subsequences, 0);
  const int64_t group = problem.num_heads / problem.kv_num_heads;
  schedule.queries_per_tile = static_cast<int32_t>(std::min<int64_t>(queries, kTileRows));
  const int64_t heads_that_fit = kTileRows / schedule.queries_per_tile;
  schedule.heads_per_tile = static_cast<int32_t>(std::min(group, heads_that_fit));
  schedule.head_tiles = problem.kv_num_heads * divide_up(group, schedule.heads_per_tile);
  schedule.query_tiles = divide_up(queries, schedule.queries_per_tile);
  // Short inputs are cut finer, so that every thread of a large machine gets something to do.
  const int64_t enough_tasks = 8 * std::max(1u, std::thread::hardware_concurrency());
  const int64_t tiles = problem.batch * schedule.subsequences.count * schedule.head_tiles * schedule.query_tiles;
  schedule.tiles_per_task = static_cast<int32_t>(std::clamp<int64_t>(tiles / enough_tasks, 1, kMaxTilesPerTask));
  schedule.query_tasks = divide_up(schedule.query_tiles, schedule.tiles_per_task);
  schedule.tasks = problem.batch * schedule.query_tasks * schedule.subsequences.count * schedule.head_tiles;
  return schedule;
}

bool run_task(const Problem& problem, const Schedule& schedule, const Kernels& kernels, int64_t task) {
  float* workspace = thread_workspace();
  if (workspace == nullptr) return false;
  const int64_t group = problem.num_heads / problem.kv_num_heads;
  const int64_t tiles_per_group = schedule.head_tiles / problem.kv_num_heads;

  const int64_t head_tile = task % schedule.head_tiles;
  task /= schedule.head_tiles;
  const int64_t subsequence = task % schedule.subsequences.count;
  task /= schedule.subsequences.count;
  const int64_t first_query_tile = task % schedule.query_tasks * schedule.tiles_per_task;
  const int64_t last_query_tile = std::min(first_query_tile + schedule.tiles_per_task, schedule.query_tiles);

  QueryTile tile;
  tile.subsequence = static_cast<Position>(subsequence);
  tile.batch_index = task / schedule.query_tasks;
  const int64_t head_in_group = head_tile % tiles_per_group * schedule.heads_per_tile;
  tile.first_head = head_tile / tiles_per_group * group + head_in_group;
  tile.head_count = static_cast<int32_t>(std::min<int64_t>(schedule.heads_per_tile, group - head_in_group));
  const int64_t queries = queries_of(problem, schedule.subsequences, subsequence);
  for (int64_t query_tile = first_query_tile; query_tile < last_query_tile; ++query_tile) {
    tile.first_query = static_cast<Position>(query_tile * schedule.queries_per_tile);
    tile.query_count = static_cast<int32_t>(std::min<int64_t>(schedule.queries_per_tile, queries - tile.first_query));
    if (tile.query_count <= 0) break;  // one query less than the first subsequence, and that one began a tile
    const bool few = tile.head_count * tile.query_count <= kFewRows;
    (few ? kernels.attend_few : kernels.attend_tile)(problem, schedule.subsequences, tile, workspace);
  }
  return true;
}

AttendableKeys attendable_keys(const uint8_t* key_mask, Position kv_len) {
  AttendableKeys keys{{0, kv_len}, false};
  if (key_mask == nullptr) return keys;
  while (keys.range.begin < kv_len && key_mask[keys.range.begin] == 0) ++keys.range.begin;
  while (keys.range.end > keys.range.begin && key_mask[keys.range.end - 1] == 0) --keys.range.end;
  keys.has_holes =
      std::find(key_mask + keys.range.begin, key_mask + keys.range.end, uint8_t{0}) != key_mask + keys.range.end;
  return keys;
}

}  // namespace effc::cpu
