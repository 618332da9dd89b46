// The memory of a tile that AMX computes, and the rounding of queries, keys and values on their way into it.
#pragma once

#include "cpu/amx_tiles.hpp"
#include "cpu/attention_bf16.hpp"

namespace effc::cpu {
namespace {

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

}  // namespace
}  // namespace effc::cpu
