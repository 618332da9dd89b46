// Attention for a handful of query rows, as in a decode step.
//
// With so few rows a vector of rows would be mostly empty, so here a vector runs along head_dim (scores, outputs) or
// along the keys (softmax), and the work is bound by reading keys and values once for all rows.
#pragma once

#include "cpu/accumulate.hpp"
#include "cpu/key_blocks.hpp"

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
    // A hidden score may be anything at all, even no number.
    const Float weight = exp2_nonpositive(Simd::sub(Simd::load(scores + j), Simd::broadcast(new_max)));
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
inline void attend_rows(const Call& call, const Pass& pass, const QueryTile& tile, Workspace& workspace) {
  const Problem& problem = call.problem;
  const TileLayout layout = layout_of(call, pass, tile);
  if (layout.elsewhere == low_bits(layout.rows)) return;
  const int64_t head_dim = problem.head_dim;
  const int64_t stride = vectors_for(head_dim) * kWidth;
  float* query = workspace.memory;            // [kRows][stride], scaled
  float* output = query + kRows * stride;     // [kRows][stride]
  float* scores = output + kRows * stride;    // [kRows][kKeyTile]
  float* listed = scores + kRows * kKeyTile;  // [2][kKeyTile][head_dim]
  float row_max[kRows], row_sum[kRows], rescale[kRows];
  start_rows(call, pass, tile, layout, row_max, row_sum, output, stride);
  for (int r = 0; r < kRows; ++r) {
    const float* from = layout.query + row_offset(problem, tile, layout, r);
    for (int64_t d = 0; d < stride; ++d) {
      query[r * stride + d] = d < head_dim ? from[d] * problem.scale * kLog2E : 0.0f;
    }
    // Lanes behind a short block's last key are computed and thrown away; they must hold numbers.
    for (int j = 0; j < kKeyTile; ++j) scores[r * kKeyTile + j] = 0.0f;
  }

  const bool biased = call.bias.tables != nullptr || call.bias.slopes != nullptr;
  BlockVisibility visibility;
  KeyBlock block;
  KeyWalk walk = walk_keys(pass, layout);
  while (next_block(call, pass, tile, layout, listed, walk, block, visibility)) {
    uint64_t visible_keys[kRows];
    for (int r = 0; r < kRows; ++r) visible_keys[r] = visibility.all ? low_bits(block.count) : 0;
    for (int j = 0; j < block.count; ++j) {
      if (!visibility.all) {
        for (int r = 0; r < kRows; ++r) visible_keys[r] |= (visibility.rows[j] >> r & 1) << j;
        if (visibility.rows[j] == 0) continue;
      }
      float key_scores[kRows];
      score_key<kRows>(query, stride, block.key + j * block.stride, head_dim, key_scores);
      for (int r = 0; r < kRows; ++r) scores[r * kKeyTile + j] = key_scores[r];
      if (!biased) continue;
      for (int r = 0; r < kRows; ++r) {
        const Position position = query_position(layout, r % tile.query_count);
        scores[r * kKeyTile + j] +=
            bias_of(call.bias, tile.first_head + r / tile.query_count, position, key_position(block, j));
      }
    }
    for (int r = 0; r < kRows; ++r) {
      softmax_row(scores + r * kKeyTile, block.count, visible_keys[r], row_max[r], row_sum[r], rescale[r]);
    }
    accumulate<Fp32, kRows, 1, kKeyTile>(scores, block.value, block.stride, block.count, head_dim, rescale, output,
                                         stride);
  }
  write_rows(problem, tile, layout, row_max, row_sum, output, stride);
}

void attend_few(const Call& call, const Pass& pass, const QueryTile& tile, Workspace& workspace) {
  static_assert(kFewRows == 4, "the cases below cover 1 to kFewRows");
  switch (tile.head_count * tile.query_count) {
    case 1:
      return attend_rows<1>(call, pass, tile, workspace);
    case 2:
      return attend_rows<2>(call, pass, tile, workspace);
    case 3:
      return attend_rows<3>(call, pass, tile, workspace);
    default:
      return attend_rows<4>(call, pass, tile, workspace);
  }
}

}  // namespace
}  // namespace effc::cpu
