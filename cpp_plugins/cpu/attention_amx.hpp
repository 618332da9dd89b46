// The tile kernel with bfloat16 products on AMX, Intel's matrix unit.
//
// Scores are S^T = K Q^T and outputs O^T = V^T P, both with a vector of query rows per line, so that the softmax of the
// other kernels fits between them and no operand has to be turned round for a tile of queries: keys and values are
// rounded and turned once per block, when they are packed.
//
// Floor: the products take a sixteenth of the time that they take in float, which leaves the softmax (one exponential
// per computed pair) and the memory: 16 * head_dim bytes per token and head.
#pragma once

#include "cpu/amx_packing.hpp"

namespace effc::cpu {
namespace {

// A whole slot in place of the block: keys that are not of the block are seen by nobody.
inline void widen_to_slot(KeyBlock& block, BlockVisibility& visibility, int rows) {
  const int before = block.listed != nullptr ? 0 : block.first % kKeyTile;
  const int count = block.count;
  if (count == kKeyTile) return;
  for (int j = count - 1; j >= 0; --j)
    visibility.rows[before + j] = visibility.all ? low_bits(rows) : visibility.rows[j];
  for (int j = 0; j < before; ++j) visibility.rows[j] = 0;
  for (int j = before + count; j < kKeyTile; ++j) visibility.rows[j] = 0;
  visibility.all = false;
  if (block.listed != nullptr) return;  // add_bias looks at listed positions of the keys that there are
  block.count = kKeyTile;
  block.first -= before;
  block.positions.first -= before * block.positions.step;
  block.positions.count = kKeyTile;
}

// Both tiles of keys and both of rows.
constexpr uint32_t kTwoByTwo = 0x33;

// Which 16 rows see some of which 16 keys: bit 4 * (tile of keys) + (tile of rows).
inline uint32_t visible_tiles(const BlockVisibility& visibility, int rows) {
  const uint32_t row_tiles = (1u << ((rows + kMatrixSide - 1) / kMatrixSide)) - 1;
  uint32_t tiles = 0;
  for (int key_tile = 0; key_tile < kKeyTile / kMatrixSide; ++key_tile) {
    uint64_t seen = visibility.all ? ~uint64_t{0} : 0;
    for (int j = 0; j < kMatrixSide && !visibility.all; ++j) seen |= visibility.rows[key_tile * kMatrixSide + j];
    for (int row_tile = 0; row_tile < kTileRows / kMatrixSide; ++row_tile) {
      if ((seen >> (row_tile * kMatrixSide) & 0xffff) != 0 && (row_tiles >> row_tile & 1) != 0) {
        tiles |= 1u << (4 * key_tile + row_tile);
      }
    }
  }
  return tiles;
}

inline void score_block(const AmxWorkspace& workspace, const KeyBlock& block, uint32_t seen, Workspace& thread) {
  for (int key_tile = 0; key_tile < 4; key_tile += 2) {
    for (int row_tile = 0; row_tile < 4; row_tile += 2) {
      prefetch_keys(thread);
      prefetch_keys(thread);
      if ((seen >> (4 * key_tile + row_tile) & kTwoByTwo) == 0) continue;
      multiply<false>(2, 2, block.key + key_tile * kMatrixSide * block.stride, block.stride,
                      workspace.base.query + row_tile * kMatrixSide, kTileRows,
                      static_cast<int>(workspace.cells / kMatrixSide),
                      workspace.base.scores + key_tile * kMatrixSide * kTileRows + row_tile * kMatrixSide, kTileRows);
    }
  }
}

inline void rescale_output(const AmxWorkspace& workspace, int vectors) {
  for (int v = 0; v < vectors; ++v) {
    const Float factor = Simd::load(workspace.base.rescale + v * kWidth);
    if (_mm512_cmpneq_ps_mask(factor, Simd::broadcast(1.0f)) == 0) continue;
    float* column = workspace.base.output + v * kWidth;
    for (int64_t d = 0; d < workspace.dims; ++d) {
      Simd::store(column + d * kTileRows, Simd::mul(Simd::load(column + d * kTileRows), factor));
    }
  }
}

inline void accumulate_block(const AmxWorkspace& workspace, const KeyBlock& block, uint32_t seen, Workspace& thread) {
  constexpr int kPairs = kKeyTile / 2;
  for (int row_tile = 0; row_tile < 4; row_tile += 2) {
    // Two tiles of keys make one tile of pairs.
    const bool first_half = (seen >> row_tile & kTwoByTwo) != 0,
               second_half = (seen >> (row_tile + 8) & kTwoByTwo) != 0;
    if (!first_half && !second_half) continue;
    const int begin = first_half ? 0 : 1, end = second_half ? 2 : 1;
    for (int64_t d = 0; d < workspace.dims; d += 2 * kMatrixSide) {
      prefetch_rows(thread);
      prefetch_rows(thread);
      prefetch_rows(thread);
      multiply<true>(d + kMatrixSide < workspace.dims ? 2 : 1, 2, block.value + d * kPairs + begin * kMatrixSide,
                     kPairs, workspace.base.weights + begin * kMatrixSide * kTileRows + row_tile * kMatrixSide,
                     kTileRows, end - begin, workspace.base.output + d * kTileRows + row_tile * kMatrixSide, kTileRows);
    }
  }
}

// Narrower heads would not fit their slot, wider ones their scratch memory.
constexpr int64_t kNarrowestAmx = 16, kWidestAmx = 256;
static_assert(4 * kKeyTile * kWidestAmx + kTileRows * kWidestAmx <= 4 * kKeyTile * kMaxHeadDim,
              "rows fit behind slots");

void attend_tile_amx(const Call& call, const Pass& pass, const QueryTile& tile, Workspace& thread) {
  const Problem& problem = call.problem;
  const int64_t head_dim = problem.head_dim;
  if (tile.head_count * tile.query_count < kRowsWorthPacking || head_dim < kNarrowestAmx || head_dim > kWidestAmx) {
    return attend_tile(call, pass, tile, thread);
  }
  const TileLayout layout = layout_of(call, pass, tile);
  if (layout.elsewhere == low_bits(layout.rows)) return;
  const AmxWorkspace workspace = carve_for_amx(thread.memory, head_dim);
  const TileWorkspace& base = workspace.base;
  const int vectors = vectors_for(layout.rows);
  // Static: the compiler does not know how much of it loading the configuration reads.
  static constexpr TileShapes kShapes;
  _tile_loadconfig(&kShapes);

  load_query_for_amx(problem, tile, layout, workspace);
  for (int r = layout.rows; r < kTileRows; ++r) {
    base.row_max[r] = kNoScore;
    base.row_sum[r] = 0.0f;
  }
  start_rows(call, pass, tile, layout, base.row_max, base.row_sum, workspace.rows, workspace.dims);
  if (pass.continues) {
    turn(workspace.rows, workspace.dims, kTileRows, workspace.dims, base.output, kTileRows);
  } else {
    for (int64_t x = 0; x < workspace.dims * kTileRows; x += kWidth) Simd::store(base.output + x, Simd::zero());
  }

  look_ahead(problem, pass, tile, layout, thread);
  BlockVisibility visibility;
  KeyBlock block;
  KeyWalk walk = walk_keys(pass, layout);
  while (next_block(call, pass, tile, layout, base.listed, walk, block, visibility)) {
    pack_block(problem, tile, layout, workspace, block, thread);
    widen_to_slot(block, visibility, layout.rows);
    const uint32_t seen = visible_tiles(visibility, layout.rows);
    score_block(workspace, block, seen, thread);
    if (call.bias.tables != nullptr || call.bias.slopes != nullptr) {
      add_bias(call.bias, tile, layout, block, base.scores);
    }
    for (int vector = 0; vector < vectors; ++vector) {
      prefetch_keys(thread);
      visibility.all ? softmax_step<true>(base, vector, kKeyTile, visibility)
                     : softmax_step<false>(base, vector, kKeyTile, visibility);
    }
    pair_weights(Bf16{}, base, vectors, kKeyTile, 0);
    rescale_output(workspace, vectors);
    accumulate_block(workspace, block, seen, thread);
  }
  turn(base.output, kTileRows, workspace.dims, kTileRows, workspace.rows, workspace.dims);
  write_rows(problem, tile, layout, base.row_max, base.row_sum, workspace.rows, workspace.dims);
  _tile_release();
}

}  // namespace
}  // namespace effc::cpu
