// The online softmax of 16 rows that a warp holds as multiply_add leaves them: of each block of eight columns a lane
// has two neighbouring ones in row lane / 4 and the same two in row lane / 4 + 8.
#pragma once

#include "cuda/results.cuh"

namespace effc::cuda {

// Sums [16][8 * blocks] of a warp, a lane's share.
template <int blocks>
struct RowSums {
  float at[blocks][4];

  // Number `n` of row lane / 4 + 8 * half; n runs over the lane's 2 * blocks columns.
  EFFC_MEMBER float& of(int half, int n) { return at[n / 2][2 * half + n % 2]; }
};

// The column of a row's number `n`.
EFFC_DEVICE int column_of(int n, int lane) {
  return n / 2 * 8 + lane % 4 * 2 + n % 2;
}

// Turns the scores of one row into weights: 2^(score * factor - largest). Returns what the outputs so far are to be
// multiplied with, since they refer to the largest score that was known before. `statistics.sum` is of this lane's
// columns. With `headroom`, statistics.largest is that much less than the largest score, and weights go up to
// 2^headroom; it cancels in the end.
template <int blocks>
EFFC_DEVICE float turn_into_weights(RowSums<blocks>& scores, int half, float factor, RowStatistics& statistics,
                                    float headroom = 0.0f) {
  float largest = -INFINITY;
  EFFC_UNROLL
  for (int n = 0; n < 2 * blocks; ++n) largest = fmaxf(largest, scores.of(half, n));
  largest = fmaxf(statistics.largest, largest_of_lanes<4>(largest) * factor - headroom);
  // A row that has seen no key: any number will do, so long as 2^(-infinity - number) is zero.
  const float reference = largest == -INFINITY ? 0.0f : largest;
  const float kept = exp2_fast(statistics.largest - reference);
  float sum = 0.0f;
  EFFC_UNROLL
  for (int n = 0; n < 2 * blocks; ++n) {
    float& score = scores.of(half, n);
    score = exp2_fast(fmaf(score, factor, -reference));
    sum += score;
  }
  statistics.largest = largest;
  statistics.sum = statistics.sum * kept + sum;
  return kept;
}

}  // namespace effc::cuda
