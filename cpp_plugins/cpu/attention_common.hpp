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

constexpr int kWidth = Simd::kWidth;
constexpr int kKeyTile = 64;      // keys per round of the online softmax
constexpr int kRegisterRows = 6;  // rows of a register tile; its columns are Simd::kTileVectors

// Scores are kept in units of log2, so that the exponential is a power of two: no multiplication per score.
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
// Below any score: the running maximum before the first visible key.
constexpr float kNoScore = -1e30f;

// 2^x for x <= 0, relative error about 2e-7: a polynomial for the fraction, an exponent for the rest. Exact at 0, so
// that an unchanged maximum rescales by exactly 1. Everything below 2^-100 becomes 2^-100, which adds nothing to a sum
// that holds a 1 and keeps denormal numbers (slow) away. NaN stays NaN: see Simd::max.
inline Float exp2_nonpositive(Float x) {
  x = Simd::max(Simd::broadcast(-100.0f), x);
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

// Where a tile's rows lie in the tensors. Strides are between neighbours of the tile's subsequence.
struct TileLayout {
  int rows;
  int64_t query_stride;  // in query and output
  int64_t key_stride;    // in key and value
  int64_t mask_stride;   // in key_mask and log_sum_exp
  int64_t first_row;     // of the query tensor
  const float* query;    // that row
  const float* key;      // the subsequence's first key
  const float* value;
  const uint8_t* key_mask;  // of that key, or null
  AttendableKeys attendable;
  Range positions;  // of the queries, counted in keys of the subsequence
};

// How many numbers phase, phase + step, phase + 2 step, ... are smaller than `end`.
inline Position steps_below(Position end, Position phase, Position step) {
  return end <= phase ? 0 : (end - phase + step - 1) / step;
}

inline TileLayout layout_of(const Problem& problem, const Subsequences& subsequences, const QueryTile& tile) {
  const Position step = subsequences.step;
  const Position past = static_cast<Position>(problem.kv_len - problem.q_len);
  const Position phase = (past + tile.subsequence) % step;  // the subsequence's first key
  const int64_t query_width = problem.num_heads * problem.head_dim;
  const int64_t key_width = problem.kv_num_heads * problem.head_dim;
  TileLayout layout;
  layout.rows = tile.head_count * tile.query_count;
  layout.query_stride = step * query_width;
  layout.key_stride = step * key_width;
  layout.mask_stride = step;
  layout.first_row = tile.subsequence + int64_t{tile.first_query} * step;
  layout.query = problem.query + (tile.batch_index * problem.q_len + layout.first_row) * query_width +
                 tile.first_head * problem.head_dim;

  const int64_t kv_head = tile.first_head / (problem.num_heads / problem.kv_num_heads);
  const int64_t first_key = tile.batch_index * problem.kv_len + phase;
  layout.key = problem.key + first_key * key_width + kv_head * problem.head_dim;
  layout.value = problem.value + first_key * key_width + kv_head * problem.head_dim;
  layout.key_mask = problem.key_mask == nullptr ? nullptr : problem.key_mask + first_key;
  layout.attendable = problem.attendable_keys[tile.batch_index];
  layout.attendable.range = {steps_below(layout.attendable.range.begin, phase, step),
                             steps_below(layout.attendable.range.end, phase, step)};
  const Position first_position = (past + tile.subsequence) / step + tile.first_query;
  layout.positions = {first_position, first_position + tile.query_count};
  return layout;
}

// Distance of row `row` from the tile's first row, in the query tensor and in the output.
inline int64_t row_offset(const Problem& problem, const QueryTile& tile, const TileLayout& layout, int row) {
  return row % tile.query_count * layout.query_stride + row / tile.query_count * problem.head_dim;
}

// Which rows see which keys of one key tile.
struct TileVisibility {
  bool all;                 // every row sees every key; `rows` is not filled in
  uint64_t rows[kKeyTile];  // bit r of rows[j]: row r sees the tile's key j
};

// Returns false if no row sees any key.
inline bool find_visible(const Pattern& pattern, const QueryTile& tile, const TileLayout& layout, const KeyTile& keys,
                         TileVisibility& visibility) {
  const int count = keys.keys.end - keys.keys.begin;
  visibility.all = keys.full;
  if (visibility.all && layout.attendable.has_holes) {
    for (int j = 0; j < count; ++j) visibility.all &= layout.key_mask[(keys.keys.begin + j) * layout.mask_stride] != 0;
  }
  if (visibility.all) return true;
  uint64_t any = 0;
  for (int j = 0; j < count; ++j) {
    const Position key = keys.keys.begin + j;
    uint64_t rows = 0;
    if (!layout.attendable.has_holes || layout.key_mask[key * layout.mask_stride] != 0) {
      const uint64_t queries = visible_queries(pattern, layout.positions.begin, tile.query_count, key);
      for (int head = 0; head < tile.head_count; ++head) rows |= queries << (head * tile.query_count);
    }
    visibility.rows[j] = rows;
    any |= rows;
  }
  return any != 0;
}

// output[r] = output[r] * rescale[r] + sum over j of weight[j, r] * value[j], for kRows rows and kVectors vectors of
// head_dim. The accumulators stay in registers; the rescale of the online softmax costs one multiplication on the way
// in. weight[j, r] lies at weights[j * kKeyStep + r * kRowStep].
template <int kRows, int kVectors, bool kPartial, int kKeyStep, int kRowStep>
inline void accumulate_tile(const float* weights, const float* value, int64_t value_stride, int keys, int last_lanes,
                            const float* rescale, float* output, int64_t output_stride) {
  Float sums[kRows][kVectors];
  EFFC_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const Float factor = Simd::broadcast(rescale[r]);
    EFFC_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = Simd::mul(factor, Simd::load(output + r * output_stride + v * kWidth));
    }
  }
  EFFC_UNROLL
  for (int j = 0; j < keys; ++j) {
    Float row[kVectors];
    EFFC_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const float* from = value + j * value_stride + v * kWidth;
      row[v] = kPartial && v == kVectors - 1 ? Simd::load_first(from, last_lanes) : Simd::load(from);
    }
    EFFC_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Float weight = Simd::broadcast(weights[j * kKeyStep + r * kRowStep]);
      EFFC_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[r][v] = Simd::multiply_add(weight, row[v], sums[r][v]);
    }
  }
  EFFC_UNROLL
  for (int r = 0; r < kRows; ++r) {
    EFFC_UNROLL
    for (int v = 0; v < kVectors; ++v) Simd::store(output + r * output_stride + v * kWidth, sums[r][v]);
  }
}

// The same for all of head_dim, cut into register tiles of nearly equal width.
template <int kRows, int kKeyStep, int kRowStep>
inline void accumulate(const float* weights, const float* value, int64_t value_stride, int keys, int64_t head_dim,
                       const float* rescale, float* output, int64_t output_stride) {
  const int vectors = vectors_for(head_dim);
  const int last_lanes = static_cast<int>(head_dim - (vectors - 1) * kWidth);
  const int pieces = (vectors + Simd::kTileVectors - 1) / Simd::kTileVectors;
  for (int piece = 0; piece < pieces; ++piece) {
    const int begin = vectors * piece / pieces;
    const int count = vectors * (piece + 1) / pieces - begin;
    const bool partial = piece == pieces - 1 && last_lanes < kWidth;
    const float* from = value + begin * kWidth;
    float* to = output + begin * kWidth;
    const auto run = [&](auto tile_function) {
      tile_function(weights, from, value_stride, keys, last_lanes, rescale, to, output_stride);
    };
    static_assert(Simd::kTileVectors == 2 || Simd::kTileVectors == 4, "the cases below cover 1 to kTileVectors");
    if (count == 1) {
      partial ? run(accumulate_tile<kRows, 1, true, kKeyStep, kRowStep>)
              : run(accumulate_tile<kRows, 1, false, kKeyStep, kRowStep>);
    } else if (count == 2) {
      partial ? run(accumulate_tile<kRows, 2, true, kKeyStep, kRowStep>)
              : run(accumulate_tile<kRows, 2, false, kKeyStep, kRowStep>);
    } else if constexpr (Simd::kTileVectors > 2) {
      if (count == 3) {
        partial ? run(accumulate_tile<kRows, 3, true, kKeyStep, kRowStep>)
                : run(accumulate_tile<kRows, 3, false, kKeyStep, kRowStep>);
      } else {
        partial ? run(accumulate_tile<kRows, 4, true, kKeyStep, kRowStep>)
                : run(accumulate_tile<kRows, 4, false, kKeyStep, kRowStep>);
      }
    }
  }
}

// Divides the rows by their softmax sums and writes them, with the log-sum-exp if wanted. A row that saw nothing is
// zero.
inline void write_rows(const Problem& problem, const QueryTile& tile, const TileLayout& layout, const float* row_max,
                       const float* row_sum, const float* rows, int64_t rows_stride) {
  float* output = problem.output + (layout.query - problem.query);
  for (int r = 0; r < layout.rows; ++r) {
    const float sum = row_sum[r];
    const float inverse = sum > 0 ? 1.0f / sum : 0.0f;
    const float* from = rows + r * rows_stride;
    float* to = output + row_offset(problem, tile, layout, r);
    int64_t d = 0;
    for (; d + kWidth <= problem.head_dim; d += kWidth) {
      Simd::store(to + d, Simd::mul(Simd::load(from + d), Simd::broadcast(inverse)));
    }
    for (; d < problem.head_dim; ++d) to[d] = from[d] * inverse;
    if (problem.log_sum_exp != nullptr) {
      const int64_t head = tile.batch_index * problem.num_heads + tile.first_head + r / tile.query_count;
      const float value = sum > 0 ? row_max[r] * kLn2 + __builtin_logf(sum) : -__builtin_inff();
      problem.log_sum_exp[head * problem.q_len + layout.first_row + r % tile.query_count * layout.mask_stride] = value;
    }
  }
}

}  // namespace
}  // namespace effc::cpu
