// Attention for a handful of query rows, as in a decode step.
//
// With so few rows a vector of rows would be mostly empty, so here a vector runs along head_dim (scores, outputs) or
// along the keys (softmax), and the work is bound by reading keys and values once for all rows.
#pragma once

#include "cpu/attention_common.hpp"

namespace effc::cpu {
namespace {

template <int kRows>
inline void score_key(const float* query, int64_t query_stride, const float* key, int64_t head_dim,
                      float (&scores)[kRows]) {
  Float sums[kRows];
  for (int r = 0; r < kRows; ++r) sums[r] = Simd::zero();
  int64_t d = 0;
  for (; d + kWidth <= head_dim; d += kWidth) {
    const Float elements = Simd::load(key + d);
    for (int r = 0; r < kRows; ++r) {
      sums[r] = Simd::multiply_add(elements, Simd::load(query + r * query_stride + d), sums[r]);
    }
  }
  if (d < head_dim) {  // the query rows are padded with zeros
    const Float elements = Simd::load_first(key + d, static_cast<int>(head_dim - d));
    for (int r = 0; r < kRows; ++r) {
      sums[r] = Simd::multiply_add(elements, Simd::load(query + r * query_stride + d), sums[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) scores[r] = Simd::sum(sums[r]);
}

// The online softmax step of one row, whose scores lie side by side; bit j of `visible` says whether it sees key j.
inline void softmax_row(float* scores, int keys, uint64_t visible, float& row_max, float& row_sum, float& rescale) {
  const auto lanes = [&](int j) { return Simd::mask(visible >> j & low_bits(kWidth)); };
  Float largest = Simd::broadcast(row_max);
  for (int j = 0; j < keys; j += kWidth) {
    largest = Simd::max(largest, Simd::select(lanes(j), Simd::load(scores + j), Simd::broadcast(kNoScore)));
  }
  const float new_max = Simd::largest(largest);
  Float sum = Simd::zero();
  for (int j = 0; j < keys; j += kWidth) {
    const Float distance = Simd::sub(Simd::load(scores + j), Simd::broadcast(new_max));
    // A hidden score may be anything at all; the exponential wants a number.
    const Float weight = exp2_nonpositive(Simd::select_or_zero(lanes(j), distance));
    const Float kept = Simd::select_or_zero(lanes(j), weight);
    sum = Simd::add(sum, kept);
    Simd::store(scores + j, kept);
  }
  // A vector, because that is what the exponential takes; only its first lane is used.
  float factor[kWidth];
  Simd::store(factor, exp2_nonpositive(Simd::broadcast(row_max - new_max)));
  rescale = factor[0];
  row_sum = row_sum * rescale + Simd::sum(sum);
  row_max = new_max;
}

template <int kRows>
inline void attend_rows(const Problem& problem, const Subsequences& subsequences, const QueryTile& tile,
                        float* memory) {
  const TileLayout layout = layout_of(problem, subsequences, tile);
  const int64_t head_dim = problem.head_dim;
  const int64_t stride = vectors_for(head_dim) * kWidth;
  float* query = memory;                    // [kRows][stride], scaled
  float* output = query + kRows * stride;   // [kRows][stride]
  float* scores = output + kRows * stride;  // [kRows][kKeyTile]
  float row_max[kRows], row_sum[kRows], rescale[kRows];
  for (int r = 0; r < kRows; ++r) {
    row_max[r] = kNoScore;
    row_sum[r] = 0.0f;
    const float* from = layout.query + row_offset(problem, tile, layout, r);
    for (int64_t d = 0; d < stride; ++d) {
      query[r * stride + d] = d < head_dim ? from[d] * problem.scale * kLog2E : 0.0f;
      output[r * stride + d] = 0.0f;
    }
    // Lanes behind a short tile's last key are computed and thrown away; they must hold numbers.
    for (int j = 0; j < kKeyTile; ++j) scores[r * kKeyTile + j] = 0.0f;
  }

  TileVisibility visibility;
  KeyTile tile_of_keys;
  KeyTileIterator iterator = key_tiles(subsequences.pattern, layout.positions, layout.attendable.range, kKeyTile);
  while (next_tile(iterator, subsequences.pattern, tile_of_keys)) {
    if (!find_visible(subsequences.pattern, tile, layout, tile_of_keys, visibility)) continue;
    const Position first_key = tile_of_keys.keys.begin;
    const int keys = tile_of_keys.keys.end - first_key;

    uint64_t visible_keys[kRows];
    for (int r = 0; r < kRows; ++r) visible_keys[r] = visibility.all ? low_bits(keys) : 0;
    for (int j = 0; j < keys; ++j) {
      if (!visibility.all) {
        for (int r = 0; r < kRows; ++r) visible_keys[r] |= (visibility.rows[j] >> r & 1) << j;
        if (visibility.rows[j] == 0) continue;
      }
      float key_scores[kRows];
      score_key<kRows>(query, stride, layout.key + (first_key + j) * layout.key_stride, head_dim, key_scores);
      for (int r = 0; r < kRows; ++r) scores[r * kKeyTile + j] = key_scores[r];
    }
    for (int r = 0; r < kRows; ++r) {
      softmax_row(scores + r * kKeyTile, keys, visible_keys[r], row_max[r], row_sum[r], rescale[r]);
    }
    accumulate<kRows, 1, kKeyTile>(scores, layout.value + first_key * layout.key_stride, layout.key_stride, keys,
                                   head_dim, rescale, output, stride);
  }
  write_rows(problem, tile, layout, row_max, row_sum, output, stride);
}

void attend_few(const Problem& problem, const Subsequences& subsequences, const QueryTile& tile, float* memory) {
  static_assert(kFewRows == 4, "the cases below cover 1 to kFewRows");
  switch (tile.head_count * tile.query_count) {
    case 1:
      return attend_rows<1>(problem, subsequences, tile, memory);
    case 2:
      return attend_rows<2>(problem, subsequences, tile, memory);
    case 3:
      return attend_rows<3>(problem, subsequences, tile, memory);
    default:
      return attend_rows<4>(problem, subsequences, tile, memory);
  }
}

}  // namespace
}  // namespace effc::cpu
