// The tile kernel with bfloat16 products on AMX, Intel's matrix unit.
//
// A tile register holds 16 x 16 cells of 32 bits: floats of a result, or pairs of bfloat16. One instruction adds the
// product of two tiles of pairs to a tile of floats. Scores are S^T = K Q^T and outputs O^T = V^T P, both with a vector
// of query rows per line, so that the softmax of the other kernels fits between them and no operand has to be turned
// round for a tile of queries: keys and values are rounded and turned once per block, when they are packed.
//
// Floor: the products take a sixteenth of the time that they take in float, which leaves the softmax (one exponential
// per computed pair) and the memory: 16 * head_dim bytes per token and head.
#pragma once

#include "cpu/attention_bf16.hpp"

namespace effc::cpu {
namespace {

constexpr int kMatrixSide = 16;

inline int64_t whole_tiles(int64_t count) {
  return (count + kMatrixSide - 1) / kMatrixSide * kMatrixSide;
}

struct AmxWorkspace {
  TileWorkspace base;  // query as [cells][kTileRows], output as [dims][kTileRows]
  int64_t cells;       // of head_dim, whole tiles
  int64_t dims;        // whole tiles
  float* rows;         // [kTileRows][dims]: outputs the way they are read and written
  float* turned;       // [kKeyTile / 2][dims], while a block is packed
};

inline AmxWorkspace carve_for_amx(float* memory, int64_t head_dim) {
  AmxWorkspace workspace;
  workspace.base = carve_workspace(memory, head_dim);
  workspace.cells = whole_tiles(cells_for<Bf16>(head_dim));
  workspace.dims = whole_tiles(head_dim);
  workspace.rows = workspace.base.listed + 4 * kKeyTile * head_dim;
  workspace.turned = workspace.rows;  // rows are needed before the first block and after the last
  return workspace;
}

// All eight tile registers are whole: 16 lines of 64 bytes.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_line = 0, reserved[14] = {};
  uint16_t bytes_per_line[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tile registers 0 to 3 hold the result [2][2], 4 and 5 the left operand, 6 and 7 the right one. `kLeft` and `kRight`
// say how many of two are used. Strides are in floats.
template <int kLeft, int kRight, bool kAdds>
inline void multiply_tiles(const float* left, int64_t left_stride, const float* right, int64_t right_stride, int steps,
                           float* result, int64_t result_stride) {
  constexpr int kBytes = sizeof(float);
  float* lower = result + kMatrixSide * result_stride;
  if constexpr (kAdds) {
    _tile_loadd(0, result, result_stride * kBytes);
    if constexpr (kRight > 1) _tile_loadd(1, result + kMatrixSide, result_stride * kBytes);
    if constexpr (kLeft > 1) _tile_loadd(2, lower, result_stride * kBytes);
    if constexpr (kLeft > 1 && kRight > 1) _tile_loadd(3, lower + kMatrixSide, result_stride * kBytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int step = 0; step < steps; ++step) {
    const float* a = left + step * kMatrixSide;
    const float* b = right + step * kMatrixSide * right_stride;
    _tile_loadd(4, a, left_stride * kBytes);
    _tile_loadd(6, b, right_stride * kBytes);
    if constexpr (kRight > 1) _tile_loadd(7, b + kMatrixSide, right_stride * kBytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kRight > 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kLeft > 1) {
      _tile_loadd(5, a + kMatrixSide * left_stride, left_stride * kBytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kRight > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, result, result_stride * kBytes);
  if constexpr (kRight > 1) _tile_stored(1, result + kMatrixSide, result_stride * kBytes);
  if constexpr (kLeft > 1) _tile_stored(2, lower, result_stride * kBytes);
  if constexpr (kLeft > 1 && kRight > 1) _tile_stored(3, lower + kMatrixSide, result_stride * kBytes);
}

template <bool kAdds>
inline void multiply(int left_tiles, int right_tiles, const float* left, int64_t left_stride, const float* right,
                     int64_t right_stride, int steps, float* result, int64_t result_stride) {
  const auto run = [&](auto tiles) { tiles(left, left_stride, right, right_stride, steps, result, result_stride); };
  if (left_tiles > 1) {
    right_tiles > 1 ? run(multiply_tiles<2, 2, kAdds>) : run(multiply_tiles<2, 1, kAdds>);
  } else {
    right_tiles > 1 ? run(multiply_tiles<1, 2, kAdds>) : run(multiply_tiles<1, 1, kAdds>);
  }
}

// Rows of head_dim as lines of cells, zero behind the last; `lines` of them, zero behind the last row.
inline void round_rows(const float* from, int64_t stride, int rows, int lines, int64_t head_dim, int64_t cells,
                       float* to) {
  for (int r = 0; r < lines; ++r) {
    for (int64_t cell = 0; cell < cells; cell += kWidth) {
      Float x = Simd::zero();
      if (r < rows) {
        const float* row = from + r * stride;
        x = Bf16::neighbours(load_some(row, 2 * cell, head_dim), load_some(row, 2 * cell + kWidth, head_dim));
      }
      Simd::store(to + r * cells + cell, x);
    }
  }
}

// Keys [kKeyTile][cells], then values [dims][kKeyTile / 2] in pairs of keys.
inline void pack_for_amx(const float* key, const float* value, int64_t stride, int keys, int64_t head_dim,
                         const AmxWorkspace& workspace, float* slot) {
  constexpr int kPairs = kKeyTile / 2;
  round_rows(key, stride, keys, kKeyTile, head_dim, workspace.cells, slot);
  float* values = slot + kKeyTile * workspace.cells;
  for (int pair = 0; pair < kPairs; ++pair) {
    const float* row = value + 2 * pair * stride;
    for (int64_t d = 0; d < workspace.dims; d += kWidth) {
      const Float first = 2 * pair < keys ? load_some(row, d, head_dim) : Simd::zero();
      const Float second = 2 * pair + 1 < keys ? load_some(row + stride, d, head_dim) : Simd::zero();
      Simd::store(workspace.turned + pair * workspace.dims + d, Bf16::pairs(first, second));
    }
  }
  for (int64_t d = 0; d < workspace.dims; d += kWidth) {
    for (int pair = 0; pair < kPairs; pair += kWidth) {
      Simd::transpose<false>(workspace.turned + pair * workspace.dims + d, workspace.dims, 1.0f,
                             values + d * kPairs + pair, kPairs);
    }
  }
}

// Queries as [cells][kTileRows], scaled.
inline void load_query_for_amx(const Problem& problem, const QueryTile& tile, const TileLayout& layout,
                               const AmxWorkspace& workspace) {
  float* rounded = workspace.base.output;  // not in use yet
  for (int row = 0; row < kTileRows; ++row) {
    const float* from = layout.query + (row < layout.rows ? row_offset(problem, tile, layout, row) : 0);
    const Float scale = Simd::broadcast(row < layout.rows ? problem.scale * kLog2E : 0.0f);
    for (int64_t cell = 0; cell < workspace.cells; cell += kWidth) {
      const Float low = Simd::mul(load_some(from, 2 * cell, problem.head_dim), scale);
      const Float high = Simd::mul(load_some(from, 2 * cell + kWidth, problem.head_dim), scale);
      // Rows behind the last are zero, whatever the first holds.
      const Float x = row < layout.rows ? Bf16::neighbours(low, high) : Simd::zero();
      Simd::store(rounded + row * workspace.cells + cell, x);
    }
  }
  for (int row = 0; row < kTileRows; row += kWidth) {
    for (int64_t cell = 0; cell < workspace.cells; cell += kWidth) {
      Simd::transpose<false>(rounded + row * workspace.cells + cell, workspace.cells, 1.0f,
                             workspace.base.query + cell * kTileRows + row, kTileRows);
    }
  }
}

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

// to[column][line] = from[line][column]; both counts are whole tiles.
inline void turn(const float* from, int64_t from_stride, int64_t lines, int64_t columns, float* to, int64_t to_stride) {
  for (int64_t line = 0; line < lines; line += kWidth) {
    for (int64_t column = 0; column < columns; column += kWidth) {
      Simd::transpose<false>(from + line * from_stride + column, from_stride, 1.0f, to + column * to_stride + line,
                             to_stride);
    }
  }
}

inline void pack_block(const Problem& problem, const QueryTile& tile, const TileLayout& layout,
                       const AmxWorkspace& workspace, KeyBlock& block, Workspace& thread) {
  const int64_t head_dim = problem.head_dim;
  const float* slot;
  if (block.listed != nullptr) {
    float* own = workspace.base.listed + 2 * kKeyTile * head_dim;
    pack_for_amx(block.key, block.value, block.stride, block.count, head_dim, workspace, own);
    slot = own;
  } else {
    slot =
        find_slot(problem, tile, layout, block, thread, [&](const float* key, const float* value, int keys, float* to) {
          pack_for_amx(key, value, layout.key_stride, keys, head_dim, workspace, to);
        });
  }
  block.key = slot;
  block.stride = workspace.cells;
  block.value = slot + kKeyTile * workspace.cells;
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
  constexpr TileShapes kShapes;
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
