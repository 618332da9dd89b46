// Attention for a tile of up to 64 query rows: flash attention's online softmax over the pattern's key tiles.
//
// Scores are computed transposed, S^T = K Q^T, with a vector of query rows per register: a key element is broadcast
// straight from memory and the softmax runs down the columns without a horizontal operation. Only the small query tile
// is transposed; keys and values are copied side by side once for all tiles that see them.
//
// Floor: 4 * head_dim floating point operations per visible pair, at the multiply-add rate; every query, key, value and
// output is moved once, 16 * head_dim bytes per token and head. Boundary tiles add what they compute for hidden pairs:
// 16 rows by 6 keys is the grain of scores, 6 rows that of values, about 5% together for local:256.
#pragma once

#include "cpu/tile_scores.hpp"
#include "cpu/tile_softmax.hpp"
#include "cpu/tile_values.hpp"

namespace effc::cpu {
namespace {

// Below this many rows, copying keys and values costs more than it brings.
constexpr int kRowsWorthPacking = 24;

template <class Arithmetic>
void attend_rows_of_tile(const Call& call, const Pass& pass, const QueryTile& tile, const TileLayout& layout,
                         Workspace& thread) {
  const Problem& problem = call.problem;
  const int64_t head_dim = problem.head_dim;
  const TileWorkspace workspace = carve_workspace(thread.memory, head_dim);
  const int vectors = vectors_for(layout.rows);
  const int64_t output_stride = vectors_for(head_dim) * kWidth;

  load_query(Arithmetic{}, problem, tile, layout, workspace);
  for (int r = layout.rows; r < kTileRows; ++r) {
    workspace.row_max[r] = kNoScore;
    workspace.row_sum[r] = 0.0f;
  }
  start_rows(call, pass, tile, layout, workspace.row_max, workspace.row_sum, workspace.output, output_stride);

  look_ahead(problem, pass, tile, layout, thread);
  constexpr bool kPairs = Arithmetic::kPerCell > 1;
  const bool packs = kPairs || layout.rows >= kRowsWorthPacking;
  const bool at_random = draws_at_random(pass.pattern);
  BlockVisibility visibility;
  KeyBlock block;
  KeyWalk walk = walk_keys(pass, layout);
  while (next_block(call, pass, tile, layout, workspace.listed, walk, block, visibility)) {
    int lead = 0;
    if (packs && block.listed == nullptr) {
      pack<Arithmetic>(problem, tile, layout, block, thread);
      if (at_random) look_ahead_in_walk(problem, pass, tile, layout, walk.iterator, thread);
      lead = block.first % Arithmetic::kPerCell;
    } else if (kPairs) {
      float* slot = workspace.listed + 2 * kKeyTile * head_dim;
      pack_rows(Arithmetic{}, block.key, block.value, block.stride, block.count, head_dim, slot);
      use_packed(Arithmetic{}, slot, 0, head_dim, block);
    }
    compute_scores<Arithmetic>(workspace, layout, cells_for<Arithmetic>(head_dim), block, visibility, thread);
    if (call.bias.tables != nullptr || call.bias.slopes != nullptr) {
      add_bias(call.bias, tile, layout, block, workspace.scores);
    }
    for (int vector = 0; vector < vectors; ++vector) {
      prefetch_keys(thread);
      visibility.all ? softmax_step<true>(workspace, vector, block.count, visibility)
                     : softmax_step<false>(workspace, vector, block.count, visibility);
    }
    pair_weights(Arithmetic{}, workspace, vectors, block.count, lead);
    accumulate_values<Arithmetic>(workspace, layout, head_dim, block, lead, visibility, thread);
  }
  write_rows(problem, tile, layout, workspace.row_max, workspace.row_sum, workspace.output, output_stride);
}

void attend_tile(const Call& call, const Pass& pass, const QueryTile& tile, Workspace& thread) {
  const TileLayout layout = layout_of(call, pass, tile);
  if (layout.elsewhere == low_bits(layout.rows)) return;
  attend_rows_of_tile<Fp32>(call, pass, tile, layout, thread);
}

}  // namespace
}  // namespace effc::cpu
