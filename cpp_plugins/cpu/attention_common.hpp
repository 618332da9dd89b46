// Pieces that the tile kernel and the few-rows kernel share. Needs `Simd`; see attention_kernels.hpp.
#pragma once

#include <cstdint>

#include "cpu/attention.hpp"

namespace effc::cpu {
namespace {

using Float = Simd::Float;

// Loops over a register tile must be unrolled before the compiler decides what lives in registers.
#if defined(__clang__)
#define EFFC_UNROLL _Pragma("unroll")
#else
#define EFFC_UNROLL _Pragma("GCC unroll 8")
#endif
// Register tiles are functions of their own: inlined into the loops around them they lose registers to those.
#define EFFC_NOINLINE __attribute__((noinline))

constexpr int kWidth = Simd::kWidth;
constexpr int64_t kCacheLine = 64 / sizeof(float);
constexpr int kRegisterRows = 6;  // rows of a register tile; its columns are Simd::kTileVectors

// Scores are kept in units of log2, so that the exponential is a power of two: no multiplication per score.
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
// Below any score: the running maximum before the first visible key.
constexpr float kNoScore = -1e30f;
// So far below it that the weight is zero even if nothing else was seen.
constexpr float kHiddenScore = -2e30f;

// 2^x for x <= 0, relative error about 2e-7: a polynomial for the fraction, an exponent for the rest. Exact at 0, so
// that an unchanged maximum rescales by exactly 1; zero below 2^-126, so that what is hidden by its score weighs
// nothing; NaN stays NaN.
inline Float exp2_nonpositive(Float x) {
  const Float fraction = Simd::fraction(x);
  Float power = Simd::broadcast(1.867130082e-3f);
  power = Simd::multiply_add(power, fraction, Simd::broadcast(9.017030284e-3f));
  power = Simd::multiply_add(power, fraction, Simd::broadcast(5.579991315e-2f));
  power = Simd::multiply_add(power, fraction, Simd::broadcast(0.2401644501f));
  power = Simd::multiply_add(power, fraction, Simd::broadcast(0.6931513118f));
  power = Simd::multiply_add(power, fraction, Simd::broadcast(1.0f));
  return Simd::scale_by_power(power, x);
}

inline int vectors_for(int64_t floats) {
  return static_cast<int>((floats + kWidth - 1) / kWidth);
}

// Where a tile's rows and keys lie. Strides are between neighbours of the tile's subsequence.
struct TileLayout {
  int rows;
  int64_t query_stride;         // in query and output
  int64_t key_stride;           // in key and value
  Progression queries;          // positions, unless the rows are listed
  const Position* listed_rows;  // rows of the query tensor, or null
  Position past;
  int64_t first_row;   // of the query tensor; 0 if the rows are listed
  const float* query;  // that row
  const float* key;    // the subsequence's first key
  const float* value;
  const float* first_key;  // of the sequence
  const float* first_value;
  Position phase;             // position of the subsequence's first key
  const uint8_t* key_mask;    // [kv_len], or null
  Position keys;              // of the subsequence
  AttendableKeys attendable;  // counted in keys of the subsequence
  Range positions;            // of the queries, counted in keys of the subsequence
  List listed_keys;
  uint64_t elsewhere;  // bit r: row r is a listed row, which another tile computes
};

// How many numbers phase, phase + step, phase + 2 step, ... are smaller than `end`.
inline Position steps_before(Position end, Position phase, Position step) {
  return end <= phase ? 0 : (end - phase + step - 1) / step;
}

// Position of the tile's query number `query`.
inline Position query_position(const TileLayout& layout, int query) {
  return layout.listed_rows != nullptr ? layout.past + layout.listed_rows[query]
                                       : layout.queries.first + query * layout.queries.step;
}

// Bit r says that row r is a listed row.
inline uint64_t listed_rows_of(const Call& call, const QueryTile& tile, const TileLayout& layout) {
  const uint8_t* marks = call.marks_whole_rows ? call.problem.marks + tile.batch_index * call.problem.kv_len : nullptr;
  if (marks == nullptr && layout.queries.first >= call.whole_rows) return 0;
  uint64_t rows = 0;
  for (int query = 0; query < tile.query_count; ++query) {
    const Position position = query_position(layout, query);
    if (position >= call.whole_rows && (marks == nullptr || marks[position] == 0)) continue;
    for (int head = 0; head < tile.head_count; ++head) rows |= uint64_t{1} << (head * tile.query_count + query);
  }
  return rows;
}

inline TileLayout layout_of(const Call& call, const Pass& pass, const QueryTile& tile) {
  const Problem& problem = call.problem;
  const BatchEntry& entry = call.entries[tile.batch_index];
  const Position step = pass.step;
  const Position past = static_cast<Position>(problem.kv_len - problem.q_len);
  const int64_t query_width = problem.num_heads * problem.head_dim;
  const int64_t key_width = problem.kv_num_heads * problem.head_dim;
  TileLayout layout;
  layout.rows = tile.head_count * tile.query_count;
  layout.query_stride = step * query_width;
  layout.key_stride = step * key_width;
  layout.past = past;
  layout.phase = step == 1 ? 0 : (past + tile.subsequence) % step;
  layout.listed_rows = tile.listed ? entry.listed_rows.positions + tile.first_query : nullptr;
  layout.first_row = tile.listed ? 0 : tile.subsequence + int64_t{tile.first_query} * step;
  layout.query = problem.query + (tile.batch_index * problem.q_len + layout.first_row) * query_width +
                 tile.first_head * problem.head_dim;

  const int64_t kv_head = tile.first_head / (problem.num_heads / problem.kv_num_heads);
  const int64_t first_key = tile.batch_index * problem.kv_len * key_width + kv_head * problem.head_dim;
  layout.first_key = problem.key + first_key;
  layout.first_value = problem.value + first_key;
  layout.key = layout.first_key + layout.phase * key_width;
  layout.value = layout.first_value + layout.phase * key_width;
  layout.key_mask = tile.listed ? entry.all_mask : entry.main_mask;
  layout.attendable = tile.listed ? entry.all_keys : entry.main_keys;
  layout.keys = steps_before(static_cast<Position>(problem.kv_len), layout.phase, step);
  layout.attendable.range = {steps_before(layout.attendable.range.begin, layout.phase, step),
                             steps_before(layout.attendable.range.end, layout.phase, step)};
  layout.listed_keys = pass.takes_listed_keys ? entry.listed_keys : List{nullptr, 0};
  layout.elsewhere = 0;
  if (tile.listed) {
    layout.queries = {0, 0, 0};
    layout.positions = {query_position(layout, 0), query_position(layout, tile.query_count - 1) + 1};
  } else {
    layout.queries = {past + static_cast<Position>(layout.first_row), step, tile.query_count};
    // A negative position (more queries than keys) occurs with step 1 only.
    const Position first_position = step == 1 ? layout.queries.first : layout.queries.first / step;
    layout.positions = {first_position, first_position + tile.query_count};
    layout.elsewhere = listed_rows_of(call, tile, layout);
  }
  return layout;
}

// Distance of row `row` from the tile's first row, in the query tensor and in the output.
inline int64_t row_offset(const Problem& problem, const QueryTile& tile, const TileLayout& layout, int row) {
  // Without a division for every row of one head.
  const int head = row < tile.query_count ? 0 : row / tile.query_count;
  const int query = row - head * tile.query_count;
  const int64_t steps = layout.listed_rows != nullptr ? layout.listed_rows[query] : query;
  return steps * layout.query_stride + head * problem.head_dim;
}

// How products are computed. Queries, keys, values and weights are arrays of 32-bit cells: here one number each.
struct Fp32 {
  static constexpr int kPerCell = 1;
  static Float multiply_add(Float a, Float b, Float c) { return Simd::multiply_add(a, b, c); }
};

template <class Arithmetic>
inline int64_t cells_for(int64_t numbers) {
  return (numbers + Arithmetic::kPerCell - 1) / Arithmetic::kPerCell;
}

// Where a row's log-sum-exp is.
inline float* log_sum_exp_of(const Problem& problem, const QueryTile& tile, const TileLayout& layout, int row) {
  const int64_t head = tile.batch_index * problem.num_heads + tile.first_head + row / tile.query_count;
  const Position position = query_position(layout, row % tile.query_count);
  return problem.log_sum_exp + head * problem.q_len + (position - layout.past);
}

// What the online softmax starts from: nothing, or what an earlier pass has left.
inline void start_rows(const Call& call, const Pass& pass, const QueryTile& tile, const TileLayout& layout,
                       float* row_max, float* row_sum, float* rows, int64_t rows_stride) {
  for (int64_t x = 0; x < layout.rows * rows_stride; ++x) rows[x] = 0.0f;
  for (int r = 0; r < layout.rows; ++r) {
    row_max[r] = kNoScore;
    row_sum[r] = 0.0f;
    if (!pass.continues || (layout.elsewhere >> r & 1) != 0) continue;
    const float log_sum_exp = *log_sum_exp_of(call.problem, tile, layout, r);
    if (log_sum_exp == -__builtin_inff()) continue;
    // All that was seen so far counts like one key with this score and this value.
    row_max[r] = log_sum_exp * kLog2E;
    row_sum[r] = 1.0f;
    const float* from =
        call.problem.output + (layout.query - call.problem.query) + row_offset(call.problem, tile, layout, r);
    for (int64_t d = 0; d < call.problem.head_dim; ++d) rows[r * rows_stride + d] = from[d];
  }
}

constexpr int kRowsAhead = 4;

// Divides the rows by their softmax sums and writes them, with the log-sum-exp if wanted. A row that saw nothing is
// zero.
inline void write_rows(const Problem& problem, const QueryTile& tile, const TileLayout& layout, const float* row_max,
                       const float* row_sum, const float* rows, int64_t rows_stride) {
  float* output = problem.output + (layout.query - problem.query);
  for (int r = 0; r < layout.rows; ++r) {
    if ((layout.elsewhere >> r & 1) != 0) continue;
    const float sum = row_sum[r];
    const float inverse = sum > 0 ? 1.0f / sum : 0.0f;
    const float* from = rows + r * rows_stride;
    float* to = output + row_offset(problem, tile, layout, r);
    if (layout.listed_rows == nullptr && r + kRowsAhead < tile.query_count) {
      for (int64_t d = 0; d < problem.head_dim; d += kCacheLine) {
        __builtin_prefetch(to + kRowsAhead * layout.query_stride + d, 1, 3);
      }
    }
    int64_t d = 0;
    for (; d + kWidth <= problem.head_dim; d += kWidth) {
      Simd::store(to + d, Simd::mul(Simd::load(from + d), Simd::broadcast(inverse)));
    }
    for (; d < problem.head_dim; ++d) to[d] = from[d] * inverse;
    if (problem.log_sum_exp != nullptr) {
      const float value = sum > 0 ? row_max[r] * kLn2 + __builtin_logf(sum) : -__builtin_inff();
      *log_sum_exp_of(problem, tile, layout, r) = value;
    }
  }
}

}  // namespace
}  // namespace effc::cpu
