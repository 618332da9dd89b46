// Attention for a tile of up to 64 query rows: flash attention's online softmax over the pattern's key tiles.
//
// Scores are computed transposed, S^T = K Q^T, with a vector of query rows per register: a key element is broadcast
// straight from memory, the softmax runs down the columns without a horizontal operation, and neither keys nor values
// are ever copied. Only the small query tile is transposed.
#pragma once

#include "cpu/attention_common.hpp"
#include "cpu/key_blocks.hpp"

namespace effc::cpu {
namespace {

constexpr int kRowVectors = kTileRows / kWidth;

// One tile's memory. Around 150 KB for head_dim 256, all of it in the second-level cache.
struct TileWorkspace {
  float* query;   // [head_dim][kTileRows], scaled
  float* scores;  // [kKeyTile][kTileRows]: scores, then softmax weights
  float* output;  // [kTileRows][padded head_dim]
  float* row_max;
  float* row_sum;
  float* rescale;
  float* listed;  // [2][kKeyTile][head_dim]
};

inline TileWorkspace carve_workspace(float* memory, int64_t head_dim) {
  const int64_t padded = vectors_for(head_dim) * kWidth;
  TileWorkspace workspace;
  workspace.query = memory;
  workspace.scores = workspace.query + padded * kTileRows;
  workspace.output = workspace.scores + kKeyTile * kTileRows;
  workspace.row_max = workspace.output + kTileRows * padded;
  workspace.row_sum = workspace.row_max + kTileRows;
  workspace.rescale = workspace.row_sum + kTileRows;
  workspace.listed = workspace.rescale + kTileRows;
  return workspace;
}

// Rows beyond the tile's last are zero: harmless, and never written back.
inline void load_query(const Problem& problem, const QueryTile& tile, const TileLayout& layout, float* query) {
  const Float scale = Simd::broadcast(problem.scale * kLog2E);
  const int64_t head_dim = problem.head_dim;
  const int64_t whole = head_dim - head_dim % kWidth;
  for (int first = 0; first < layout.rows; first += kWidth) {
    // A block of rows of one head is strided regularly; a block across heads or beyond the end is not.
    const bool regular = layout.listed_rows == nullptr && first + kWidth <= tile.query_count;
    const int64_t transposed = regular ? whole : 0;
    for (int64_t d = 0; d < transposed; d += kWidth) {
      Simd::transpose(layout.query + first * layout.query_stride + d, layout.query_stride,
                      query + d * kTileRows + first, kTileRows);
    }
    for (int lane = 0; lane < kWidth; ++lane) {
      const int row = first + lane;
      const float* from = layout.query + (row < layout.rows ? row_offset(problem, tile, layout, row) : 0);
      for (int64_t d = transposed; d < head_dim; ++d) query[d * kTileRows + row] = row < layout.rows ? from[d] : 0.0f;
    }
    for (int64_t d = 0; d < head_dim; ++d) {
      float* lanes = query + d * kTileRows + first;
      Simd::store(lanes, Simd::mul(Simd::load(lanes), scale));
    }
  }
}

template <int kKeys, int kVectors>
inline void score_tile(const float* query, const float* key, int64_t key_stride, int64_t head_dim, float* scores) {
  Float sums[kKeys][kVectors];
  EFFC_UNROLL
  for (int j = 0; j < kKeys; ++j) {
    EFFC_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[j][v] = Simd::zero();
  }
  for (int64_t d = 0; d < head_dim; ++d) {
    Float rows[kVectors];
    EFFC_UNROLL
    for (int v = 0; v < kVectors; ++v) rows[v] = Simd::load(query + d * kTileRows + v * kWidth);
    EFFC_UNROLL
    for (int j = 0; j < kKeys; ++j) {
      const Float element = Simd::broadcast(key[j * key_stride + d]);
      EFFC_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[j][v] = Simd::multiply_add(element, rows[v], sums[j][v]);
    }
  }
  EFFC_UNROLL
  for (int j = 0; j < kKeys; ++j) {
    EFFC_UNROLL
    for (int v = 0; v < kVectors; ++v) Simd::store(scores + j * kTileRows + v * kWidth, sums[j][v]);
  }
}

// Scores of kKeys keys for the vectors of rows in [first, end).
template <int kKeys>
inline void score_keys(const float* query, const float* key, int64_t key_stride, int64_t head_dim, float* scores,
                       int first, int end) {
  while (first < end) {
    const int count = end - first < Simd::kTileVectors ? end - first : Simd::kTileVectors;
    const float* from = query + first * kWidth;
    float* to = scores + first * kWidth;
    if (count == 1) {
      score_tile<kKeys, 1>(from, key, key_stride, head_dim, to);
    } else if (count == 2) {
      score_tile<kKeys, 2>(from, key, key_stride, head_dim, to);
    } else if constexpr (Simd::kTileVectors > 2) {
      if (count == 3) {
        score_tile<kKeys, 3>(from, key, key_stride, head_dim, to);
      } else {
        score_tile<kKeys, 4>(from, key, key_stride, head_dim, to);
      }
    }
    first += count;
  }
}

// Starts loading keys that the next register tile needs. Their rows are too far apart for the hardware to guess.
inline void prefetch_keys(const float* key, int64_t key_stride, int64_t head_dim, int count) {
  constexpr int64_t kCacheLine = 64 / sizeof(float);
  for (int j = 0; j < count; ++j) {
    for (int64_t d = 0; d < head_dim; d += kCacheLine) __builtin_prefetch(key + j * key_stride + d);
  }
}

// Leaves the scores of (key, vector of rows) pairs that no row of the vector sees undefined.
inline void compute_scores(const TileWorkspace& workspace, const TileLayout& layout, int64_t head_dim,
                           const KeyBlock& block, const BlockVisibility& visibility) {
  const int count = block.count;
  const int vectors = vectors_for(layout.rows);
  for (int j = 0; j < count;) {
    const int left = count - j;
    const int taken = left >= 6 ? 6 : (left >= 4 ? 4 : (left >= 2 ? 2 : 1));
    int first = 0, end = vectors;
    if (!visibility.all) {
      uint64_t seeing = 0;
      for (int n = 0; n < taken; ++n) seeing |= visibility.rows[j + n];
      if (seeing == 0) {
        j += taken;
        continue;
      }
      first = __builtin_ctzll(seeing) / kWidth;
      end = (63 - __builtin_clzll(seeing)) / kWidth + 1;
    }
    const float* key = block.key + j * block.stride;
    prefetch_keys(key + taken * block.stride, block.stride, head_dim, left - taken < taken ? left - taken : taken);
    float* scores = workspace.scores + j * kTileRows;
    if (taken == 6) {
      score_keys<6>(workspace.query, key, block.stride, head_dim, scores, first, end);
    } else if (taken == 4) {
      score_keys<4>(workspace.query, key, block.stride, head_dim, scores, first, end);
    } else if (taken == 2) {
      score_keys<2>(workspace.query, key, block.stride, head_dim, scores, first, end);
    } else {
      score_keys<1>(workspace.query, key, block.stride, head_dim, scores, first, end);
    }
    j += taken;
  }
}

// One step of the online softmax for one vector of rows: scores become weights, and the running maximum, the running
// sum and the factor for what was accumulated before are brought up to date.
template <bool kAll>
inline void softmax_step(const TileWorkspace& workspace, int vector, int keys, const BlockVisibility& visibility) {
  float* column = workspace.scores + vector * kWidth;
  const auto bits = [&](int j) { return visibility.rows[j] >> (vector * kWidth) & low_bits(kWidth); };

  // Four maxima in turn, because each waits for its predecessor.
  const Float old_max = Simd::load(workspace.row_max + vector * kWidth);
  Float largest[4] = {old_max, old_max, old_max, old_max};
  const auto include = [&](int j, Float& so_far) {
    if (!kAll && bits(j) == 0) return;
    const Float score = Simd::load(column + j * kTileRows);
    so_far = Simd::max(so_far, kAll ? score : Simd::select(Simd::mask(bits(j)), score, Simd::broadcast(kNoScore)));
  };
  int next = 0;
  for (; next + 4 <= keys; next += 4) {
    EFFC_UNROLL
    for (int n = 0; n < 4; ++n) include(next + n, largest[n]);
  }
  for (; next < keys; ++next) include(next, largest[0]);
  const Float new_max = Simd::max(Simd::max(largest[0], largest[1]), Simd::max(largest[2], largest[3]));

  Float sum = Simd::zero();
  for (int j = 0; j < keys; ++j) {
    Float weight = Simd::zero();
    if (kAll || bits(j) != 0) {
      Float distance = Simd::sub(Simd::load(column + j * kTileRows), new_max);
      // A hidden score may be anything at all; the exponential wants a number.
      if (!kAll) distance = Simd::select_or_zero(Simd::mask(bits(j)), distance);
      weight = exp2_nonpositive(distance);
      if (!kAll) weight = Simd::select_or_zero(Simd::mask(bits(j)), weight);
      sum = Simd::add(sum, weight);
    }
    Simd::store(column + j * kTileRows, weight);
  }

  const Float rescale = exp2_nonpositive(Simd::sub(old_max, new_max));
  const Float old_sum = Simd::load(workspace.row_sum + vector * kWidth);
  Simd::store(workspace.row_max + vector * kWidth, new_max);
  Simd::store(workspace.row_sum + vector * kWidth, Simd::multiply_add(old_sum, rescale, sum));
  Simd::store(workspace.rescale + vector * kWidth, rescale);
}

inline void accumulate_values(const TileWorkspace& workspace, const TileLayout& layout, int64_t head_dim,
                              const KeyBlock& block, const BlockVisibility& visibility) {
  const int64_t output_stride = vectors_for(head_dim) * kWidth;
  for (int row = 0; row < layout.rows;) {
    const int left = layout.rows - row;
    const int taken = left >= 6 ? 6 : (left >= 4 ? 4 : (left >= 2 ? 2 : 1));
    // The keys that some of these rows see. Without any, the rows' maximum is unchanged and there is nothing to do.
    int first = 0, end = block.count;
    if (!visibility.all) {
      const uint64_t group = low_bits(taken) << row;
      while (first < end && (visibility.rows[first] & group) == 0) ++first;
      while (end > first && (visibility.rows[end - 1] & group) == 0) --end;
    }
    if (first < end) {
      const float* weights = workspace.scores + first * kTileRows + row;
      const float* value = block.value + first * block.stride;
      const float* rescale = workspace.rescale + row;
      float* output = workspace.output + row * output_stride;
      const auto run = [&](auto accumulate_rows) {
        accumulate_rows(weights, value, block.stride, end - first, head_dim, rescale, output, output_stride);
      };
      if (taken == 6) {
        run(accumulate<6, kTileRows, 1>);
      } else if (taken == 4) {
        run(accumulate<4, kTileRows, 1>);
      } else if (taken == 2) {
        run(accumulate<2, kTileRows, 1>);
      } else {
        run(accumulate<1, kTileRows, 1>);
      }
    }
    row += taken;
  }
}

// Adds what distance alone contributes to the scores.
inline void add_bias(const DistanceBias& bias, const QueryTile& tile, const TileLayout& layout, const KeyBlock& block,
                     float* scores) {
  const bool neighbours = layout.listed_rows == nullptr && layout.queries.step == 1;
  for (int j = 0; j < block.count; ++j) {
    const Position key = key_position(block, j);
    float* row = scores + j * kTileRows;
    if (neighbours && tile.head_count == 1) {
      // Numbers behind the last row are padding on both sides.
      if (bias.tables != nullptr) {
        const float* biases = neighbouring_biases(bias, tile.first_head, layout.queries.first, key);
        for (int r = 0; r < layout.rows; r += kWidth) {
          Simd::store(row + r, Simd::add(Simd::load(row + r), Simd::load(biases + r)));
        }
      }
      if (bias.slopes != nullptr) {
        const float slope = bias.slopes[tile.first_head];
        const float first = static_cast<float>(key - layout.queries.first);
        for (int r = 0; r < layout.rows; ++r) row[r] += slope * (first - static_cast<float>(r));
      }
      continue;
    }
    for (int r = 0; r < layout.rows; ++r) {
      const Position query = query_position(layout, r % tile.query_count);
      row[r] += bias_of(bias, tile.first_head + r / tile.query_count, query, key);
    }
  }
}

void attend_tile(const Call& call, const Pass& pass, const QueryTile& tile, float* memory) {
  const Problem& problem = call.problem;
  const TileLayout layout = layout_of(call, pass, tile);
  if (layout.elsewhere == low_bits(layout.rows)) return;
  const TileWorkspace workspace = carve_workspace(memory, problem.head_dim);
  const int vectors = vectors_for(layout.rows);
  const int64_t output_stride = vectors_for(problem.head_dim) * kWidth;

  load_query(problem, tile, layout, workspace.query);
  for (int r = layout.rows; r < kTileRows; ++r) {
    workspace.row_max[r] = kNoScore;
    workspace.row_sum[r] = 0.0f;
  }
  start_rows(call, pass, tile, layout, workspace.row_max, workspace.row_sum, workspace.output, output_stride);

  BlockVisibility visibility;
  KeyBlock block;
  KeyWalk walk = walk_keys(pass, layout);
  while (next_block(call, pass, tile, layout, workspace.listed, walk, block, visibility)) {
    compute_scores(workspace, layout, problem.head_dim, block, visibility);
    if (call.bias.tables != nullptr || call.bias.slopes != nullptr) {
      add_bias(call.bias, tile, layout, block, workspace.scores);
    }
    for (int vector = 0; vector < vectors; ++vector) {
      visibility.all ? softmax_step<true>(workspace, vector, block.count, visibility)
                     : softmax_step<false>(workspace, vector, block.count, visibility);
    }
    accumulate_values(workspace, layout, problem.head_dim, block, visibility);
  }
  write_rows(problem, tile, layout, workspace.row_max, workspace.row_sum, workspace.output, output_stride);
}

}  // namespace
}  // namespace effc::cpu
