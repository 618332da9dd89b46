// Chooses blocks of keys by the product of mean queries and mean keys.
#pragma once

#include <vector>

#include "cpu/attention.hpp"
#include "cpu/schedule.hpp"

namespace effc::cpu {

// One bit for each block of keys, for each block of queries of each key/value head.
struct BlockChoice {
  std::vector<uint64_t> words;
  ChosenBlocks view() const { return {words.data(), words_per_row, query_blocks, block, first_query_block}; }

  int64_t words_per_row;
  int64_t query_blocks;
  Position block;
  Position first_query_block;
};

// `count` blocks of `block` keys for each block of queries, as effc/plugins/forms/content.py defines BlockTopK. The
// query heads of a group share one choice.
BlockChoice choose_blocks(const AttentionCall& call, bool causal, Position count, Position block,
                          const ParallelFor& parallel_for);

}  // namespace effc::cpu
