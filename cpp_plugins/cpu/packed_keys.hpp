// Keys and values side by side, copied once for all the tiles of a task that see them, and what is fetched ahead.
//
// A head's rows lie pages apart in [batch, length, heads * head_dim].
#pragma once

#include "cpu/accumulate.hpp"
#include "cpu/key_blocks.hpp"
#include "cpu/packed_slots.hpp"

namespace effc::cpu {
namespace {

// Floats to ask for at a time.
constexpr int64_t kPieceAhead = 4 * kCacheLine;
// Into the second-level cache: what the next tile needs would push out of the first what this one works with.
constexpr int kSecondLevel = 2;

template <bool kForWriting>
inline void advance(Prefetch& prefetch) {
  if (prefetch.rows == 0) return;
  const float* from = prefetch.row + prefetch.done;
  const int64_t left = prefetch.width - prefetch.done;
  for (int64_t d = 0; d < (left < kPieceAhead ? left : kPieceAhead); d += kCacheLine) {
    __builtin_prefetch(from + d, kForWriting, kSecondLevel);
  }
  prefetch.done += kPieceAhead;
  if (prefetch.done < prefetch.width) return;
  prefetch.done = 0;
  --prefetch.rows;
  prefetch.row += prefetch.stride;
}

// A piece at a time, between register tiles: a burst would keep the arithmetic from what it needs now.
inline void prefetch_keys(Workspace& workspace) {
  for (int n = 0; n < workspace.pieces; ++n) {
    advance<false>(workspace.keys);
    advance<false>(workspace.values);
  }
}
inline void prefetch_rows(Workspace& workspace) {
  advance<false>(workspace.queries);
  advance<true>(workspace.outputs);
}

// The next queries and their outputs, of all heads of the task.
inline void look_ahead(const Problem& problem, const Pass& pass, const QueryTile& tile, const TileLayout& layout,
                       Workspace& workspace) {
  if (layout.listed_rows != nullptr || tile.first_head != workspace.first_head) return;
  const int64_t stride = layout.query_stride, width = workspace.heads * problem.head_dim;
  const int64_t first = layout.first_row + int64_t{tile.query_count} * pass.step;
  const int64_t left = (problem.q_len - first + pass.step - 1) / pass.step;
  const int next = static_cast<int>(left < 0 ? 0 : (left < tile.query_count ? left : tile.query_count));
  const float* query = layout.query + tile.query_count * stride;
  workspace.queries = {query, stride, next, width, 0};
  workspace.outputs = {problem.output + (query - problem.query), stride, next, width, 0};
}

// Copies `columns` columns, a multiple of kWidestPanel, into panels `panel_step` apart. Little but loads and stores, so
// that as many rows as possible are on their way from memory at a time.
inline void copy_panels(const float* from, int64_t stride, int rows, int64_t columns, float* to, int64_t row_step,
                        int64_t panel_step) {
  for (int r = 0; r < rows; ++r) {
    float* place = to + r * row_step;
    for (int64_t d = 0; d < columns; d += kWidestPanel, place += panel_step) {
      EFFC_UNROLL
      for (int v = 0; v < Simd::kTileVectors; ++v) {
        Simd::store(place + v * kWidth, Simd::load(from + r * stride + d + v * kWidth));
      }
    }
  }
}

inline void copy_rows(const float* from, int64_t stride, int rows, int64_t columns, float* to, int64_t row_step) {
  for (int r = 0; r < rows; ++r) {
    int64_t d = 0;
    for (; d + kWidth <= columns; d += kWidth) Simd::store(to + r * row_step + d, Simd::load(from + r * stride + d));
    for (; d < columns; ++d) to[r * row_step + d] = from[r * stride + d];
  }
}

// Keys of one block side by side, then its values, panel by panel: what one panel's register tiles read stays in the
// first-level cache and fills all of its sets.
inline void pack_rows(Fp32, const float* key, const float* value, int64_t stride, int keys, int64_t head_dim,
                      float* slot) {
  const int64_t wide = head_dim - head_dim % kWidestPanel;
  copy_panels(key, stride, keys, wide, slot, head_dim, kWidestPanel);
  if (wide < head_dim) copy_rows(key + wide, stride, keys, head_dim - wide, slot + wide, head_dim);

  float* values = slot + kKeyTile * head_dim;
  int64_t column = 0;
  while (column < head_dim && panel_from(column, head_dim).columns == kWidestPanel) column += kWidestPanel;
  copy_panels(value, stride, keys, column, values, kWidestPanel, kWidestPanel * kKeyTile);
  while (column < head_dim) {
    const int64_t columns = panel_from(column, head_dim).columns;
    copy_rows(value + column, stride, keys, columns, values + column * kKeyTile, columns);
    column += columns;
  }
}

// Lets `block` point to packed rows, of which its first key is number `first`.
inline void use_packed(Fp32, const float* slot, int first, int64_t head_dim, KeyBlock& block) {
  block.key = slot + first * head_dim;
  block.stride = head_dim;
  block.value = slot + kKeyTile * head_dim;
  block.row_in_panels = first;
}

// Asks for `width` numbers of each row of a block of keys and values, which may lie behind the last.
inline void ask_for_block(const TileLayout& layout, Position number, int64_t width, int32_t pieces,
                          Workspace& workspace) {
  const Position first = number * kKeyTile;
  const int rows = larger(smaller(layout.keys - first, kKeyTile), 0);
  const int64_t stride = layout.key_stride;
  workspace.keys = {layout.key + first * stride, stride, rows, width, 0};
  workspace.values = {layout.value + first * stride, stride, rows, width, 0};
  workspace.pieces = pieces;
}

inline int64_t kv_head_in_task(const Problem& problem, const QueryTile& tile, const Workspace& workspace) {
  return tile.first_head / (problem.num_heads / problem.kv_num_heads) - workspace.first_kv_head;
}

// The slot of a block's keys and values side by side, filled by pack(key, value, keys, slot) unless an earlier tile
// has.
template <class Pack>
inline const float* find_slot(const Problem& problem, const QueryTile& tile, const TileLayout& layout,
                              const KeyBlock& block, Workspace& workspace, Pack pack) {
  const int64_t head_dim = problem.head_dim;
  const Position number = block.first / kKeyTile;
  const int64_t kv_head = kv_head_in_task(problem, tile, workspace);
  const int64_t slot = slot_of(workspace, kv_head, number);
  float* packed = workspace.packed_memory + slot * 2 * kKeyTile * head_dim;
  if (workspace.packed[slot] == number) return packed;
  workspace.packed[slot] = number;
  const Position first = number * kKeyTile;
  const Position keys = layout.keys - first;
  const int64_t stride = layout.key_stride;
  pack(layout.key + first * stride, layout.value + first * stride, smaller(keys, kKeyTile), packed);
  // The next queries are likely to need the block behind this one.
  if (kv_head == 0) ask_for_block(layout, number + 1, workspace.kv_heads * head_dim, 1, workspace);
  return packed;
}

// Whether a tile looks at blocks that do not lie behind those of the tile before.
inline bool draws_at_random(const Pattern& pattern) {
  for (int t = 0; t < pattern.term_count; ++t) {
    if (pattern.terms[t].kind == TermKind::kRandom) return true;
  }
  return false;
}

// Asks for the block that the walk comes to next while this one is computed: at four times the pace of what the next
// tile needs.
inline void look_ahead_in_walk(const Problem& problem, const Pass& pass, const QueryTile& tile,
                               const TileLayout& layout, KeyTileIterator iterator, Workspace& workspace) {
  KeyTile keys;
  const Scope scope = {static_cast<Position>(problem.kv_len), nullptr};
  if (!next_tile(iterator, pass.pattern, scope, keys)) return;
  const Position number = keys.keys.begin / kKeyTile;
  if (find_packed(workspace, kv_head_in_task(problem, tile, workspace), number) >= 0) return;
  ask_for_block(layout, number, problem.head_dim, 4, workspace);
}

// Lets the block's keys and values lie side by side.
template <class Arithmetic>
inline void pack(const Problem& problem, const QueryTile& tile, const TileLayout& layout, KeyBlock& block,
                 Workspace& workspace) {
  const int64_t head_dim = problem.head_dim, stride = layout.key_stride;
  const float* slot = find_slot(problem, tile, layout, block, workspace,
                                [&](const float* key, const float* value, int keys, float* to) {
                                  pack_rows(Arithmetic{}, key, value, stride, keys, head_dim, to);
                                });
  use_packed(Arithmetic{}, slot, block.first % kKeyTile, head_dim, block);
}

}  // namespace
}  // namespace effc::cpu
