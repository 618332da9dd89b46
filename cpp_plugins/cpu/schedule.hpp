// Cuts a call into query tiles and runs them, in any order and on any thread.
#pragma once

#include <functional>
#include <vector>

#include "cpu/plan.hpp"

namespace effc::cpu {

// The work of one pass. A task is a few neighbouring query tiles of a few neighbouring heads; within it the heads run
// fastest. Behind the listed rows, each tile of which is a task of its own, come the tasks of the pattern.
struct Schedule {
  const Pass* pass;
  Position subsequences;  // those that hold a query
  Position first_cut;     // queries that the first tile lacks, so that the others begin at multiples of their size
  int32_t heads_per_tile;
  int32_t queries_per_tile;
  int64_t head_tiles;   // tiles that all heads are cut into
  int64_t query_tiles;  // tiles that the queries of a subsequence are cut into
  int32_t head_tiles_per_task;
  int32_t query_tiles_per_task;
  int64_t head_tasks;   // tasks that head_tiles are dealt out to
  int64_t query_tasks;  // and query_tiles
  int64_t pattern_tasks;
  int32_t blocks_per_head;  // of keys and values to keep side by side
  std::vector<QueryTile> listed_tiles;

  int64_t tasks() const { return static_cast<int64_t>(listed_tiles.size()) + pattern_tasks; }
};

Schedule schedule_for(const Plan& plan, const Pass& pass);

// Runs one task. Thread safe; each thread keeps its workspace. Returns false if there is no memory for that.
bool run_task(const Plan& plan, const Schedule& schedule, const Kernels& kernels, int64_t task);

// Calls task(n) for every n < count, on any threads, and returns when all are done.
using ParallelFor = std::function<void(int64_t count, const std::function<void(int64_t)>& task)>;

// Runs the passes one after the other. Returns false if memory ran out.
bool run_plan(const Plan& plan, const Kernels& kernels, const ParallelFor& parallel_for);

}  // namespace effc::cpu
