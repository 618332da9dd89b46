// The blocks of keys that a tile of queries visits, with who sees what, and what is added to their scores.
#pragma once

#include "cpu/attention_common.hpp"
#include "cpu/chosen_blocks.hpp"

namespace effc::cpu {
namespace {

// Up to kKeyTile keys at equal distances in memory, counted in cells.
struct KeyBlock {
  const float* key;
  const float* value;
  int64_t stride;
  int64_t value_stride;
  int row_in_panels;  // where the values lie in panels that begin at `value`: the first key's row; else -1
  int count;
  Progression positions;
  const Position* listed;  // positions, if they follow no progression
  Position first;          // number of the first key in its subsequence, if they follow one
};

inline Position key_position(const KeyBlock& block, int key) {
  return block.listed != nullptr ? block.listed[key] : block.positions.first + key * block.positions.step;
}

// Which rows see which keys of one block.
struct BlockVisibility {
  bool all;                 // every row sees every key; `rows` is not filled in
  uint64_t rows[kKeyTile];  // bit r of rows[j]: row r sees the block's key j
};

// The same queries for each head of the tile.
inline uint64_t for_each_head(const QueryTile& tile, uint64_t queries) {
  uint64_t rows = 0;
  for (int head = 0; head < tile.head_count; ++head) rows |= queries << (head * tile.query_count);
  return rows;
}

// The queries that are not before the key.
inline uint64_t queries_from(const TileLayout& layout, const QueryTile& tile, Position key) {
  if (layout.listed_rows == nullptr) return low_bits(tile.query_count) & ~low_bits(steps_below(layout.queries, key));
  int before = 0;
  while (before < tile.query_count && query_position(layout, before) < key) ++before;
  return low_bits(tile.query_count) & ~low_bits(before);
}

inline bool touches_excluded(const Scope& scope, const Pass& pass, const TileLayout& layout, const QueryTile& tile,
                             const KeyBlock& block) {
  const Range queries = {layout.queries.first, layout.queries.first + (tile.query_count - 1) * pass.step + 1};
  const Range keys = {key_position(block, 0), key_position(block, block.count - 1) + 1};
  for (int t = 0; t < pass.excluded.term_count; ++t) {
    const Term& term = pass.excluded.terms[t];
    if (!is_empty(next_keys_seen(term, scope, pass.excluded.causal, queries, keys.begin, keys))) return true;
  }
  return false;
}

// Visibility of a block that the pattern yields. Returns false if no row sees any key.
inline bool find_visible(const Call& call, const Pass& pass, const QueryTile& tile, const TileLayout& layout,
                         const KeyTile& keys, const KeyBlock& block, BlockVisibility& visibility) {
  const Scope scope = {static_cast<Position>(call.problem.kv_len), nullptr};
  uint64_t chosen[kKeyTile];
  bool chosen_by_all = true;
  if (call.problem.chosen.words != nullptr && !find_chosen(call, tile, layout, keys.keys, chosen, chosen_by_all)) {
    return false;
  }
  const bool excludes = pass.excluded.term_count > 0 && touches_excluded(scope, pass, layout, tile, block);
  visibility.all = keys.full && !excludes && chosen_by_all;
  if (visibility.all && layout.attendable.has_holes) {
    for (int j = 0; j < block.count; ++j) visibility.all &= layout.key_mask[key_position(block, j)] != 0;
  }
  if (visibility.all) return true;
  if (tile.listed) {
    for (int j = 0; j < block.count; ++j) {
      visibility.rows[j] =
          pass.pattern.causal ? queries_from(layout, tile, key_position(block, j)) : low_bits(tile.query_count);
    }
  } else {
    visible_queries(pass.pattern, scope, {layout.positions.begin, 1, tile.query_count},
                    {keys.keys.begin, 1, block.count}, visibility.rows);
  }
  if (excludes) {
    uint64_t excluded[kKeyTile];
    visible_queries(pass.excluded, scope, layout.queries, block.positions, excluded);
    for (int j = 0; j < block.count; ++j) visibility.rows[j] &= ~excluded[j];
  }
  if (layout.attendable.has_holes) {
    for (int j = 0; j < block.count; ++j) {
      if (layout.key_mask[key_position(block, j)] == 0) visibility.rows[j] = 0;
    }
  }
  uint64_t any = 0;
  for (int j = 0; j < block.count; ++j) {
    if (!chosen_by_all) visibility.rows[j] &= chosen[j];
    if (tile.head_count > 1) visibility.rows[j] = for_each_head(tile, visibility.rows[j]);
    any |= visibility.rows[j];
  }
  return any != 0;
}

// Walks over the keys of one tile of queries: first those of the pattern, then the listed ones.
struct KeyWalk {
  KeyTileIterator iterator;
  int32_t next_listed;
};

inline KeyWalk walk_keys(const Pass& pass, const TileLayout& layout) {
  return {key_tiles(pass.pattern, layout.positions, layout.attendable.range, kKeyTile), 0};
}

// Copies listed keys and their values side by side.
inline void gather(const Problem& problem, const TileLayout& layout, KeyBlock& block, float* memory) {
  const int64_t key_width = problem.kv_num_heads * problem.head_dim;
  float* key = memory;
  float* value = memory + block.count * problem.head_dim;
  for (int j = 0; j < block.count; ++j) {
    for (int64_t d = 0; d < problem.head_dim; ++d) {
      key[j * problem.head_dim + d] = layout.first_key[block.listed[j] * key_width + d];
      value[j * problem.head_dim + d] = layout.first_value[block.listed[j] * key_width + d];
    }
  }
  block.key = key;
  block.value = value;
  block.stride = block.value_stride = problem.head_dim;
  block.row_in_panels = -1;
}

// Writes the next block and returns true, or returns false at the end. `memory` holds the listed keys of a block.
inline bool next_block(const Call& call, const Pass& pass, const QueryTile& tile, const TileLayout& layout,
                       float* memory, KeyWalk& walk, KeyBlock& block, BlockVisibility& visibility) {
  const Scope scope = {static_cast<Position>(call.problem.kv_len), nullptr};
  KeyTile keys;
  while (next_tile(walk.iterator, pass.pattern, scope, keys)) {
    block.key = layout.key + keys.keys.begin * layout.key_stride;
    block.value = layout.value + keys.keys.begin * layout.key_stride;
    block.stride = block.value_stride = layout.key_stride;
    block.row_in_panels = -1;
    block.count = keys.keys.end - keys.keys.begin;
    block.positions = {layout.phase + keys.keys.begin * pass.step, pass.step, block.count};
    block.listed = nullptr;
    block.first = keys.keys.begin;
    if (find_visible(call, pass, tile, layout, keys, block, visibility)) return true;
  }
  int left = layout.listed_keys.count - walk.next_listed;
  if (left <= 0) return false;
  block.listed = layout.listed_keys.positions + walk.next_listed;
  block.count = smaller(left, kKeyTile);
  walk.next_listed += block.count;
  visibility.all = !pass.pattern.causal;
  if (!visibility.all) {
    for (int j = 0; j < block.count; ++j) {
      visibility.rows[j] = for_each_head(tile, queries_from(layout, tile, block.listed[j]));
      if (visibility.rows[j] != 0) continue;
      // Behind every query, as are the rest.
      block.count = j;
      walk.next_listed = layout.listed_keys.count;
    }
    if (block.count == 0) return false;
  }
  gather(call.problem, layout, block, memory);
  return true;
}

// The bias of one head's neighbouring queries, beginning at `first_query`, for a key: kTilePadding readable numbers.
inline const float* neighbouring_biases(const DistanceBias& bias, int64_t head, Position first_query, Position key) {
  const Position lowest = -bias.reach - kTilePadding;
  const Position distance = first_query - key;
  const Position clamped = distance < lowest ? lowest : smaller(distance, bias.reach);
  return bias.tables + head * bias.row + (clamped - lowest);
}

inline float bias_of(const DistanceBias& bias, int64_t head, Position query, Position key) {
  float sum = bias.tables != nullptr ? *neighbouring_biases(bias, head, query, key) : 0.0f;
  if (bias.slopes != nullptr) sum += bias.slopes[head] * static_cast<float>(key - query);
  return sum;
}

}  // namespace
}  // namespace effc::cpu
