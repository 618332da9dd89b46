// Which queries of a tile see which keys of another: the pattern's predicate, for 64 queries at a time.
#pragma once

#include "cuda/key_tile_walk.cuh"
#include "cuda/tile_shapes.hpp"

namespace effc::cuda {

// Writes seen[q / 32][n] for all queries and keys. A lane asks for one key at a time.
template <class Shape>
EFFC_DEVICE void find_visible(const Pattern& pattern, const Scope& scope, const QueryTile& queries,
                              const VisitedTile& keys, uint32_t (&seen)[Shape::kQueryWords][Shape::kKeys], int lane) {
  constexpr int kQueriesAtATime = 64;
  constexpr int kParts = (Shape::kRows + kQueriesAtATime - 1) / kQueriesAtATime;
  EFFC_ROLLED
  for (int n = lane; n < kParts * Shape::kKeys; n += kWarpSize) {
    const int key = n % Shape::kKeys, part = n / Shape::kKeys;
    const int first_query = part * kQueriesAtATime;
    const int count = smaller(queries.query_count - first_query, kQueriesAtATime);
    uint64_t bits = 0;
    if ((keys.attendable >> key & 1) != 0 && count > 0) {
      if (keys.full) {
        bits = ~uint64_t{0};
      } else {
        const Progression these_queries = {queries.positions.begin + first_query, 1, count};
        const Progression this_key = {keys.keys.begin + key, 1, 1};
        visible_queries(pattern, scope, these_queries, this_key, &bits);
      }
    }
    seen[2 * part][key] = static_cast<uint32_t>(bits);
    if (2 * part + 1 < Shape::kQueryWords) seen[2 * part + 1][key] = static_cast<uint32_t>(bits >> 32);
  }
}

}  // namespace effc::cuda
