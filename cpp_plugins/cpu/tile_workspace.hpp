// The memory that a tile of up to 64 query rows is computed in, and its queries' way into it.
#pragma once

#include "cpu/attention_common.hpp"

namespace effc::cpu {
namespace {

// One tile's memory. Around 150 KB for head_dim 256, all of it in the second-level cache.
struct TileWorkspace {
  float* query;   // [cells of head_dim][kTileRows], scaled
  float* scores;  // [kKeyTile][kTileRows]: scores, then softmax weights
  float* output;  // [kTileRows][padded head_dim]
  float* row_max;
  float* row_sum;
  float* rescale;
  float* weights;  // [kKeyTile / 2][kTileRows]: the weights of pairs of keys, where a cell is a pair of numbers
  float* listed;   // [2][kKeyTile][head_dim], and as much again for a slot with the same in pairs
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
  workspace.weights = workspace.rescale + kTileRows;
  workspace.listed = workspace.weights + kKeyTile / 2 * kTileRows;
  return workspace;
}

// Rows beyond the tile's last are zero: harmless, and never written back.
inline void load_query(Fp32, const Problem& problem, const QueryTile& tile, const TileLayout& layout,
                       const TileWorkspace& workspace) {
  float* query = workspace.query;
  const float scale = problem.scale * kLog2E;
  const int64_t head_dim = problem.head_dim;
  const int64_t whole = head_dim - head_dim % kWidth;
  for (int first = 0; first < layout.rows; first += kWidth) {
    // A block of rows of one head is strided regularly; a block across heads or beyond the end is not.
    const bool regular = layout.listed_rows == nullptr && first + kWidth <= tile.query_count;
    const int64_t transposed = regular ? whole : 0;
    for (int64_t d = 0; d < transposed; d += kWidth) {
      Simd::transpose<true>(layout.query + first * layout.query_stride + d, layout.query_stride, scale,
                            query + d * kTileRows + first, kTileRows);
    }
    if (transposed == head_dim) continue;
    for (int row = first; row < first + kWidth; ++row) {
      const float* from = layout.query + (row < layout.rows ? row_offset(problem, tile, layout, row) : 0);
      for (int64_t d = transposed; d < head_dim; ++d) {
        query[d * kTileRows + row] = row < layout.rows ? from[d] * scale : 0.0f;
      }
    }
  }
}

}  // namespace
}  // namespace effc::cpu
