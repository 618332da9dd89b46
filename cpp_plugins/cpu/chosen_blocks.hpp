// Blocks of keys that content has chosen for blocks of queries: a filter over what a pattern lets see.
#pragma once

#include "cpu/attention_common.hpp"

namespace effc::cpu {
namespace {

// The rows of a tile's head that have chosen the block of keys `key_block`.
inline uint64_t rows_choosing(const ChosenBlocks& chosen, const uint64_t* head_words, Range queries,
                              Position key_block) {
  uint64_t rows = 0;
  for (Position first = queries.begin; first < queries.end;) {
    const Position query_block = first / chosen.block;
    const Position end = smaller((query_block + 1) * chosen.block, queries.end);
    const uint64_t* words = head_words + (query_block - chosen.first_query_block) * chosen.words_per_row;
    if ((words[key_block / 64] >> (key_block % 64) & 1) != 0) {
      rows |= low_bits(end - queries.begin) & ~low_bits(first - queries.begin);
    }
    first = end;
  }
  return rows;
}

// For each of the keys the rows of one head that have chosen its block. Returns false if there are none, and sets `all`
// if every row has chosen every key.
inline bool find_chosen(const Call& call, const QueryTile& tile, const TileLayout& layout, Range keys, uint64_t* rows,
                        bool& all) {
  const Problem& problem = call.problem;
  const ChosenBlocks& chosen = problem.chosen;
  const int64_t kv_head = tile.first_head / (problem.num_heads / problem.kv_num_heads);
  const uint64_t* words =
      chosen.words + (tile.batch_index * problem.kv_num_heads + kv_head) * chosen.query_blocks * chosen.words_per_row;
  uint64_t any = 0, every = low_bits(tile.query_count);
  for (Position key = keys.begin; key < keys.end;) {
    const Position key_block = key / chosen.block;
    const Position end = smaller((key_block + 1) * chosen.block, keys.end);
    const uint64_t choosing = rows_choosing(chosen, words, layout.positions, key_block);
    any |= choosing;
    every &= choosing;
    for (; key < end; ++key) rows[key - keys.begin] = choosing;
  }
  all = every == low_bits(tile.query_count);
  return any != 0;
}

}  // namespace
}  // namespace effc::cpu
