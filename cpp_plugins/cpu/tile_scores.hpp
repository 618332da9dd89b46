// The scores of a tile: S^T = K Q^T, with a vector of query rows per register, and what distance adds to them.
#pragma once

#include "cpu/key_blocks.hpp"
#include "cpu/packed_keys.hpp"
#include "cpu/register_tile.hpp"
#include "cpu/tile_workspace.hpp"

namespace effc::cpu {
namespace {

template <class Arithmetic, int kKeys, int kVectors>
EFFC_NOINLINE void score_tile(const float* query, const float* key, int64_t key_stride, int64_t cells, float* scores) {
  Float sums[kKeys][kVectors];
  EFFC_UNROLL
  for (int j = 0; j < kKeys; ++j) {
    EFFC_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[j][v] = Simd::zero();
  }
  EFFC_UNROLL
  for (int64_t d = 0; d < cells; ++d) {
    add_products<Arithmetic>(
        sums, [&](int j) { return Simd::broadcast(key[j * key_stride + d]); },
        [&](int v) { return Simd::load(query + d * kTileRows + v * kWidth); });
  }
  EFFC_UNROLL
  for (int j = 0; j < kKeys; ++j) {
    EFFC_UNROLL
    for (int v = 0; v < kVectors; ++v) Simd::store(scores + j * kTileRows + v * kWidth, sums[j][v]);
  }
}

template <class Arithmetic, int kKeys, int kVectors>
inline void score_vectors(const float* query, const float* key, int64_t key_stride, int64_t cells, float* scores) {
  constexpr int kAtOnce = rows_at_once(kKeys, kVectors);
  static_assert(kKeys % kAtOnce == 0, "keys are taken in equal parts");
  for (int j = 0; j < kKeys; j += kAtOnce) {
    score_tile<Arithmetic, kAtOnce, kVectors>(query, key + j * key_stride, key_stride, cells, scores + j * kTileRows);
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
      score_vectors<Arithmetic, kKeys, 1>(from, key, key_stride, cells, to);
    } else if (count == 2) {
      score_vectors<Arithmetic, kKeys, 2>(from, key, key_stride, cells, to);
    } else if constexpr (Simd::kTileVectors > 2) {
      if (count == 3) {
        score_vectors<Arithmetic, kKeys, 3>(from, key, key_stride, cells, to);
      } else {
        score_vectors<Arithmetic, kKeys, 4>(from, key, key_stride, cells, to);
      }
    }
    first += count;
  }
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

}  // namespace
}  // namespace effc::cpu
