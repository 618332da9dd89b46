// The online softmax of a tile, down the columns of S^T: no operation goes across a register.
#pragma once

#include "cpu/key_blocks.hpp"
#include "cpu/tile_workspace.hpp"

namespace effc::cpu {
namespace {

// The keys of a block that some row of a vector sees, from the first to the last.
inline Range keys_seen(const BlockVisibility& visibility, int vector, int keys) {
  const auto hidden = [&](int j) { return (visibility.rows[j] >> (vector * kWidth) & low_bits(kWidth)) == 0; };
  Range seen = {0, keys};
  while (seen.begin < seen.end && hidden(seen.begin)) ++seen.begin;
  while (seen.begin < seen.end && hidden(seen.end - 1)) --seen.end;
  return seen;
}

// One step of the online softmax for one vector of rows: scores become weights, and the running maximum, the running
// sum and the factor for what was accumulated before are brought up to date.
template <bool kAll>
inline void softmax_step(const TileWorkspace& workspace, int vector, int keys, const BlockVisibility& visibility) {
  float* column = workspace.scores + vector * kWidth;
  const Range seen = kAll ? Range{0, keys} : keys_seen(visibility, vector, keys);

  // Four maxima in turn, because each waits for its predecessor.
  const Float old_max = Simd::load(workspace.row_max + vector * kWidth);
  Float largest[4] = {old_max, old_max, old_max, old_max};
  const auto include = [&](int j, Float& so_far) {
    Float score = Simd::load(column + j * kTileRows);
    if (!kAll) {
      // A hidden score may be anything at all, even no number.
      const auto mask = Simd::mask(visibility.rows[j] >> (vector * kWidth));
      score = Simd::select(mask, score, Simd::broadcast(kHiddenScore));
      Simd::store(column + j * kTileRows, score);
    }
    so_far = Simd::max(so_far, score);
  };
  const int whole = seen.end - (seen.end - seen.begin) % 4;
  for (int j = seen.begin; j < whole; j += 4) {
    EFFC_UNROLL
    for (int n = 0; n < 4; ++n) include(j + n, largest[n]);
  }
  for (int j = whole; j < seen.end; ++j) include(j, largest[0]);
  const Float new_max = Simd::max(Simd::max(largest[0], largest[1]), Simd::max(largest[2], largest[3]));

  for (int j = 0; !kAll && j < seen.begin; ++j) Simd::store(column + j * kTileRows, Simd::zero());
  Float sum = Simd::zero();
  for (int j = seen.begin; j < seen.end; ++j) {
    const Float weight = exp2_nonpositive(Simd::sub(Simd::load(column + j * kTileRows), new_max));
    sum = Simd::add(sum, weight);
    Simd::store(column + j * kTileRows, weight);
  }
  for (int j = seen.end; !kAll && j < keys; ++j) Simd::store(column + j * kTileRows, Simd::zero());

  const Float rescale = exp2_nonpositive(Simd::sub(old_max, new_max));
  const Float old_sum = Simd::load(workspace.row_sum + vector * kWidth);
  Simd::store(workspace.row_max + vector * kWidth, new_max);
  Simd::store(workspace.row_sum + vector * kWidth, Simd::multiply_add(old_sum, rescale, sum));
  Simd::store(workspace.rescale + vector * kWidth, rescale);
}

}  // namespace
}  // namespace effc::cpu
