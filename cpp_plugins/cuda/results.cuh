// Where the rows of a tile stand in the tensors, and how results get there.
#pragma once

#include "cuda/scores.cuh"

namespace effc::cuda {

struct Row {
  int32_t head;
  int32_t query;      // of the query tensor
  Position position;  // in the sequence
  int64_t offset;     // of its first number in query and output
};

// Row `r` of the tile; r may be any number below query_count * head_count.
EFFC_DEVICE Row row_of(const SparseAttention& problem, const QueryTile& tile, int r) {
  Row row;
  const int32_t query_in_tile = r % tile.query_count;
  row.head = tile.first_head + r / tile.query_count;
  row.query = tile.first_query + query_in_tile;
  row.position = tile.positions.begin + query_in_tile;
  row.offset = ((tile.batch_index * problem.q_len + row.query) * problem.num_heads + row.head) * problem.head_dim;
  return row;
}

// The online softmax of one row: the largest score so far, in units of log2, and the sum of 2^(score - largest). Any
// number will do for `largest` if the sum refers to it.
struct RowStatistics {
  float largest;
  float sum;
};

// A row that sees no key gives zeros; one with a score that is no number gives no number.
EFFC_DEVICE float output_factor(const RowStatistics& statistics) {
  return statistics.sum == 0.0f ? 0.0f : 1.0f / statistics.sum;
}

EFFC_DEVICE float log2_sum_exp(const RowStatistics& statistics) {
  return statistics.sum == 0.0f ? -INFINITY : statistics.largest + log2f(statistics.sum);
}

EFFC_DEVICE int64_t statistics_index(const SparseAttention& problem, int32_t batch_index, const Row& row) {
  return (batch_index * problem.num_heads + row.head) * problem.q_len + row.query;
}

// The results of a split problem go to the workspace, one copy per split.
EFFC_DEVICE float* partial_output_of(const Call& call, const QueryTile& tile) {
  const SparseAttention& problem = call.problem;
  return call.schedule.partial_output +
         tile.split * problem.batch * problem.q_len * problem.num_heads * problem.head_dim;
}

EFFC_DEVICE void write_log_sum_exp(const Call& call, const QueryTile& tile, const Row& row,
                                   const RowStatistics& statistics) {
  const SparseAttention& problem = call.problem;
  const int64_t index = statistics_index(problem, tile.batch_index, row);
  if (call.schedule.splits > 1) {
    const int64_t first = tile.split * problem.batch * problem.num_heads * problem.q_len;
    call.schedule.partial_log_sum_exp[first + index] = log2_sum_exp(statistics);
  } else if (problem.log_sum_exp != nullptr) {
    problem.log_sum_exp[index] = log2_sum_exp(statistics) * kLn2;
  }
}

// Number `d` of the row's output.
template <class T>
EFFC_DEVICE void write_output(const Call& call, const QueryTile& tile, const Row& row, int d, float number) {
  if (call.schedule.splits > 1) {
    partial_output_of(call, tile)[row.offset + d] = number;
  } else {
    static_cast<T*>(call.problem.output)[row.offset + d] = from_float<T>(number);
  }
}

}  // namespace effc::cuda
