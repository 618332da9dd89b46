// Cuts a problem into query tiles and runs them, in any order and on any thread.
#pragma once

#include "cpu/attention.hpp"

namespace effc::cpu {

// A task is a few neighbouring query tiles of the same heads. Tasks are numbered with the heads running fastest.
struct Schedule {
  Subsequences subsequences;
  int32_t heads_per_tile;
  int32_t queries_per_tile;
  int32_t tiles_per_task;
  int64_t head_tiles;   // tiles that all heads are cut into
  int64_t query_tiles;  // tiles that the queries of a subsequence are cut into
  int64_t query_tasks;  // tasks that those are dealt out to
  int64_t tasks;        // in all
};

Schedule schedule_for(const Problem& problem);

// Runs one task. Thread safe; each thread keeps its workspace. Returns false if there is no memory for that.
bool run_task(const Problem& problem, const Schedule& schedule, const Kernels& kernels, int64_t task);

// The range of keys that one batch entry's mask leaves, and whether it has holes. `key_mask` may be null.
AttendableKeys attendable_keys(const uint8_t* key_mask, Position kv_len);

}  // namespace effc::cpu
