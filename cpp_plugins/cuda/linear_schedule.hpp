// How linear attention is cut into blocks of threads. Plain C++: host, kernels, tests and benchmarks read the same.
//
// Three kernels run one behind the other. The first sums up phi(k) v^T over segments of keys, all of them at a time;
// the second adds up segments, which gives the state before every segment or, if not causal, behind the last; the third
// reads: a tile of queries sees the keys before its segment through the state, and those of its segment in pairs.
#pragma once

#include "cuda/linear_attention.hpp"
#include "cuda/schedule.hpp"

namespace effc::cuda {

constexpr int kLinearRows = 64;     // queries of a tile
constexpr int kFeatureSlice = 64;   // features and numbers of a value whose sums one block keeps
constexpr Position kSegment = 256;  // keys of a causal segment, and at least so many of another

struct LinearSchedule {
  Position keys_per_segment;
  int32_t segments;    // that are summed up
  int32_t first_read;  // the first segment before which the state is wanted; 0 if not causal
  int32_t reads;       // states that are read
  int32_t slices;      // of features, and of the numbers of a value
  int32_t first_cut;   // queries that the first tile lacks, so that the others begin at multiples of their size
  int32_t query_tiles;

  // [batch * kv_num_heads, segments, features, head_dim] and, without head_dim, their normalisers.
  float* sums;
  float* normalisers;
  // [batch * kv_num_heads, reads, features, head_dim], the states divided by their normalisers: weighted means of
  // values, which every type of number can hold. In the problem's type, fp32 for the scalar kernel.
  void* means;
  float* totals;  // [batch * kv_num_heads, reads, features], the states' normalisers
};

// What every kernel is given.
struct LinearCall {
  LinearAttention problem;
  LinearSchedule schedule;
};

// With its memory in `workspace`, which may be null if only sizes are wanted. `mean_bytes`: of a number of `means`.
LinearSchedule linear_schedule_for(const LinearAttention& problem, int mean_bytes, void* workspace);

// The work of one block of the reading kernel.
struct LinearTile {
  int32_t batch_index;
  int32_t head;
  int32_t kv_head;
  int32_t first_query;  // of the query tensor
  int32_t query_count;
  Range keys;      // that are seen in pairs, those of them that are not behind the query
  bool has_state;  // something lies before them
  int64_t state;   // number of the state in `means`
};

// Heads run fastest, because those of a group read the same; the last queries come first, as in query_tile.
EFFC_HD LinearTile linear_tile(const LinearAttention& problem, const LinearSchedule& schedule, uint32_t block) {
  LinearTile tile;
  const uint32_t heads = static_cast<uint32_t>(problem.num_heads);
  const uint32_t query_tiles = static_cast<uint32_t>(schedule.query_tiles);
  tile.head = static_cast<int32_t>(block % heads);
  block /= heads;
  const int32_t begin = static_cast<int32_t>(query_tiles - 1 - block % query_tiles) * kLinearRows - schedule.first_cut;
  tile.batch_index = static_cast<int32_t>(block / query_tiles);
  tile.kv_head = tile.head / static_cast<int32_t>(problem.num_heads / problem.kv_num_heads);
  tile.first_query = larger(begin, 0);
  const int32_t end = smaller(begin + kLinearRows, static_cast<int32_t>(problem.q_len));
  tile.query_count = end - tile.first_query;

  int32_t read = 0;
  tile.keys = {0, 0};
  tile.has_state = true;
  if (problem.causal) {
    const Position past = static_cast<Position>(problem.kv_len - problem.q_len);
    const int32_t segment = (past + tile.first_query) / kSegment;
    tile.keys = {segment * kSegment, past + end};
    tile.has_state = segment > 0 || problem.past_state != nullptr;
    read = segment - schedule.first_read;
  }
  tile.state = (tile.batch_index * problem.kv_num_heads + tile.kv_head) * int64_t{schedule.reads} + read;
  return tile;
}

EFFC_HD int64_t linear_blocks(const LinearAttention& problem, const LinearSchedule& schedule) {
  return problem.batch * schedule.query_tiles * problem.num_heads;
}

}  // namespace effc::cuda
