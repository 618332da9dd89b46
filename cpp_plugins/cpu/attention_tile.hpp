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

#include "cpu/attention_common.hpp"
#include "cpu/key_blocks.hpp"

namespace effc::cpu {
namespace {

constexpr int kRowVectors = kTileRows / kWidth;

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

template <class Arithmetic, int kKeys, int kVectors>
EFFC_NOINLINE void score_tile(const float* query, const float* key, int64_t key_stride, int64_t cells, float* scores) {
  Float sums[kKeys][kVectors];
  EFFC_UNROLL
  for (int j = 0; j < kKeys; ++j) {
    EFFC_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[j][v] = Simd::zero();
  }
  for (int64_t d = 0; d < cells; ++d) {
    Float rows[kVectors];
    EFFC_UNROLL
    for (int v = 0; v < kVectors; ++v) rows[v] = Simd::load(query + d * kTileRows + v * kWidth);
    EFFC_UNROLL
    for (int j = 0; j < kKeys; ++j) {
      const Float element = Simd::broadcast(key[j * key_stride + d]);
      EFFC_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[j][v] = Arithmetic::multiply_add(element, rows[v], sums[j][v]);
    }
  }
  EFFC_UNROLL
  for (int j = 0; j < kKeys; ++j) {
    EFFC_UNROLL
    for (int v = 0; v < kVectors; ++v) Simd::store(scores + j * kTileRows + v * kWidth, sums[j][v]);
  }
}

// Scores of kKeys keys for the vectors of rows in [first, end).
template <class Arithmetic, int kKeys>
inline void score_keys(const float* query, const float* key, int64_t key_stride, int64_t cells, float* scores,
                       int first, int end) {
  while (first < end) {
    const int count = end - first < Simd::kTileVectors ? end - first : Simd::kTileVectors;
    const float* from = query + first * kWidth;
    float* to = scores + first * kWidth;
    if (count == 1) {
      score_tile<Arithmetic, kKeys, 1>(from, key, key_stride, cells, to);
    } else if (count == 2) {
      score_tile<Arithmetic, kKeys, 2>(from, key, key_stride, cells, to);
    } else if constexpr (Simd::kTileVectors > 2) {
      if (count == 3) {
        score_tile<Arithmetic, kKeys, 3>(from, key, key_stride, cells, to);
      } else {
        score_tile<Arithmetic, kKeys, 4>(from, key, key_stride, cells, to);
      }
    }
    first += count;
  }
}

template <bool kForWriting>
inline void advance(Prefetch& prefetch) {
  if (prefetch.rows == 0) return;
  for (int64_t d = 0; d < prefetch.width; d += kCacheLine) __builtin_prefetch(prefetch.row + d, kForWriting);
  --prefetch.rows;
  prefetch.row += prefetch.stride;
}

// One row at a time, between register tiles: a burst would keep the arithmetic from what it needs now.
inline void prefetch_keys(Workspace& workspace) {
  advance<false>(workspace.keys);
  advance<false>(workspace.values);
}
inline void prefetch_rows(Workspace& workspace) {
  advance<false>(workspace.queries);
  advance<true>(workspace.outputs);
}

// What the tile will write, and the next queries of its heads.
inline void look_ahead(const Problem& problem, const Pass& pass, const QueryTile& tile, const TileLayout& layout,
                       Workspace& workspace) {
  if (layout.listed_rows != nullptr) return;
  const int64_t stride = layout.query_stride, width = tile.head_count * problem.head_dim;
  const int64_t next_row = layout.first_row + int64_t{tile.query_count} * pass.step;
  const int next = next_row < problem.q_len ? tile.query_count : 0;
  workspace.queries = {layout.query + tile.query_count * stride, stride, next, width};
  workspace.outputs = {problem.output + (layout.query - problem.query), stride, tile.query_count, width};
}

// Leaves the scores of (key, vector of rows) pairs that no row of the vector sees undefined.
template <class Arithmetic>
inline void compute_scores(const TileWorkspace& workspace, const TileLayout& layout, int64_t cells,
                           const KeyBlock& block, const BlockVisibility& visibility, Workspace& thread) {
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
    prefetch_keys(thread);
    float* scores = workspace.scores + j * kTileRows;
    if (taken == 6) {
      score_keys<Arithmetic, 6>(workspace.query, key, block.stride, cells, scores, first, end);
    } else if (taken == 4) {
      score_keys<Arithmetic, 4>(workspace.query, key, block.stride, cells, scores, first, end);
    } else if (taken == 2) {
      score_keys<Arithmetic, 2>(workspace.query, key, block.stride, cells, scores, first, end);
    } else {
      score_keys<Arithmetic, 1>(workspace.query, key, block.stride, cells, scores, first, end);
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
  const int whole = keys - keys % 4;
  for (int j = 0; j < whole; j += 4) {
    EFFC_UNROLL
    for (int n = 0; n < 4; ++n) include(j + n, largest[n]);
  }
  for (int j = whole; j < keys; ++j) include(j, largest[0]);
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

// For each group of kRegisterRows rows the keys that some of its rows see, from the first to the last.
struct GroupRanges {
  static constexpr int kGroups = (kTileRows + kRegisterRows - 1) / kRegisterRows;
  Range keys[kGroups];
};

inline GroupRanges find_group_ranges(const KeyBlock& block, const BlockVisibility& visibility) {
  GroupRanges ranges;
  const Range nothing = {0, 0};
  for (Range& keys : ranges.keys) keys = visibility.all ? Range{0, block.count} : nothing;
  if (visibility.all) return ranges;
  const auto each_new_group = [](uint64_t rows, uint64_t& met, auto meet) {
    for (uint64_t fresh = rows & ~met; fresh != 0; fresh &= ~met) {
      const int group = __builtin_ctzll(fresh) / kRegisterRows;
      met |= low_bits(kRegisterRows) << (group * kRegisterRows);
      meet(group);
    }
  };
  uint64_t begun = 0, ended = 0;
  for (int j = 0; j < block.count; ++j) {
    each_new_group(visibility.rows[j], begun, [&](int group) { ranges.keys[group].begin = j; });
  }
  for (int j = block.count - 1; j >= 0; --j) {
    each_new_group(visibility.rows[j], ended, [&](int group) { ranges.keys[group].end = j + 1; });
  }
  return ranges;
}

// Multiplies the softmax weights with the values. `lead` is the place of the block's first key in its cell.
template <class Arithmetic>
inline void accumulate_values(const TileWorkspace& workspace, const TileLayout& layout, int64_t head_dim,
                              const KeyBlock& block, int lead, const BlockVisibility& visibility, Workspace& thread) {
  const int64_t output_stride = vectors_for(head_dim) * kWidth;
  const float* all_weights = Arithmetic::kPerCell == 1 ? workspace.scores : workspace.weights;
  const GroupRanges ranges = find_group_ranges(block, visibility);
  for (int row = 0; row < layout.rows;) {
    const int left = layout.rows - row;
    const int taken = left >= 6 ? 6 : (left >= 4 ? 4 : (left >= 2 ? 2 : 1));
    prefetch_rows(thread);
    // Where no row sees a key, their maximum is unchanged and there is nothing to do.
    const Range keys = ranges.keys[row / kRegisterRows];
    if (!is_empty(keys)) {
      const int begin = (keys.begin + lead) / Arithmetic::kPerCell;
      const int count = static_cast<int>(cells_for<Arithmetic>(keys.end + lead)) - begin;
      const float* weights = all_weights + begin * kTileRows + row;
      const float* value = block.value + begin * block.value_stride;
      const float* rescale = workspace.rescale + row;
      float* output = workspace.output + row * output_stride;
      const auto run = [&](auto accumulate_rows) {
        accumulate_rows(weights, value, block.value_stride, count, head_dim, rescale, output, output_stride);
      };
      if (taken == 6) {
        run(accumulate<Arithmetic, 6, kTileRows, 1>);
      } else if (taken == 4) {
        run(accumulate<Arithmetic, 4, kTileRows, 1>);
      } else if (taken == 2) {
        run(accumulate<Arithmetic, 2, kTileRows, 1>);
      } else {
        run(accumulate<Arithmetic, 1, kTileRows, 1>);
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

inline void copy_rows(const float* from, int64_t stride, int rows, int64_t width, float* to) {
  for (int r = 0; r < rows; ++r) {
    int64_t d = 0;
    for (; d + kWidth <= width; d += kWidth) Simd::store(to + r * width + d, Simd::load(from + r * stride + d));
    for (; d < width; ++d) to[r * width + d] = from[r * stride + d];
  }
}

// Keys and values of one block side by side.
inline void pack_rows(Fp32, const float* key, const float* value, int64_t stride, int keys, int64_t head_dim,
                      float* slot) {
  copy_rows(key, stride, keys, head_dim, slot);
  copy_rows(value, stride, keys, head_dim, slot + kKeyTile * head_dim);
}

// Lets `block` point to packed rows, of which its first key is number `first`.
inline void use_packed(Fp32, const float* slot, int first, int64_t head_dim, KeyBlock& block) {
  block.key = slot + first * head_dim;
  block.value = slot + (kKeyTile + first) * head_dim;
  block.stride = block.value_stride = head_dim;
}

// The slot of a block's keys and values side by side, filled by pack(key, value, keys, slot) unless an earlier tile
// has.
template <class Pack>
inline const float* find_slot(const Problem& problem, const QueryTile& tile, const TileLayout& layout,
                              const KeyBlock& block, Workspace& workspace, Pack pack) {
  const int64_t head_dim = problem.head_dim;
  const Position number = block.first / kKeyTile;
  const int64_t kv_head = tile.first_head / (problem.num_heads / problem.kv_num_heads) - workspace.first_kv_head;
  const int64_t slot = kv_head * workspace.blocks_per_head + number % workspace.blocks_per_head;
  float* packed = workspace.packed_memory + slot * 2 * kKeyTile * head_dim;
  if (workspace.packed[slot] == number) return packed;
  workspace.packed[slot] = number;
  const Position first = number * kKeyTile;
  const Position keys = layout.keys - first;
  const int64_t stride = layout.key_stride;
  pack(layout.key + first * stride, layout.value + first * stride, smaller(keys, kKeyTile), packed);
  // The next queries are likely to need the block behind this one.
  const int next = larger(smaller(keys - kKeyTile, kKeyTile), 0);
  const int64_t begin = (first + kKeyTile) * stride;
  workspace.keys = {layout.key + begin, stride, next, head_dim};
  workspace.values = {layout.value + begin, stride, next, head_dim};
  return packed;
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

// Below this many rows, copying keys and values costs more than it brings.
constexpr int kRowsWorthPacking = 24;

inline void pair_weights(Fp32, const TileWorkspace&, int, int, int) {}

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
  const bool packs = kPairs || (layout.rows >= kRowsWorthPacking && layout.key_stride != head_dim);
  BlockVisibility visibility;
  KeyBlock block;
  KeyWalk walk = walk_keys(pass, layout);
  while (next_block(call, pass, tile, layout, workspace.listed, walk, block, visibility)) {
    int lead = 0;
    if (packs && block.listed == nullptr) {
      pack<Arithmetic>(problem, tile, layout, block, thread);
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
