// The warp that supplies the others: it asks the pattern for the next tile of keys, starts the copies that bring it to
// shared memory, and finds out what is visible in it, while the others compute.
#pragma once

#include "cuda/shared_tiles.cuh"
#include "cuda/visibility.cuh"

namespace effc::cuda {

// Where the supply is.
struct Supply {
  const SparseAttention& problem;
  const QueryTile& queries;
  Scope scope;
  const uint8_t* key_mask;  // of the batch entry
  KeyTileWalk walk;
};

EFFC_DEVICE Supply begin_supply(const Call& call, const QueryTile& tile) {
  const SparseAttention& problem = call.problem;
  const int64_t first_of_batch = tile.batch_index * problem.kv_len;
  const uint8_t* key_mask = problem.key_mask == nullptr ? nullptr : problem.key_mask + first_of_batch;
  const uint8_t* marks = problem.marks == nullptr ? nullptr : problem.marks + first_of_batch;
  const Scope scope = {static_cast<Position>(problem.kv_len), marks};
  return {problem, tile, scope, key_mask,
          walk_key_tiles(problem, scope, tile, tile.positions, keys_of_split(call.schedule, tile))};
}

// Starts to bring the next tile to `slot`, as a group of copies that may be empty.
template <class T, class Shape>
EFFC_DEVICE void supply_next_tile(Supply& supply, typename SharedTiles<T, Shape>::Slot& slot, int lane) {
  const SparseAttention& problem = supply.problem;
  const VisitedTile tile = next_tile<Shape::kKeys>(supply.walk, problem.pattern, supply.scope, supply.key_mask);
  const int count = tile.keys.end - tile.keys.begin;
  const bool whole = tile.full && tile.attendable == low_bits(Shape::kKeys);
  if (lane == 0) slot.facts = {tile.keys.begin, count, whole};
  if (count > 0) {
    const int64_t row = supply.queries.batch_index * problem.kv_len + tile.keys.begin;
    const int64_t first = (row * problem.kv_num_heads + supply.queries.kv_head) * problem.head_dim;
    start_copying_keys<T, Shape>(problem, static_cast<const T*>(problem.key) + first, count, slot.keys, lane);
    start_copying_keys<T, Shape>(problem, static_cast<const T*>(problem.value) + first, count, slot.values, lane);
    if (!whole) find_visible<Shape>(problem.pattern, supply.scope, supply.queries, tile, slot.seen, lane);
  }
  end_copy_group();
}

// Brings the queries and all tiles of keys, kSlots - 1 tiles ahead of the warps that compute.
template <class T, class Shape>
EFFC_DEVICE void supply_tiles(const Call& call, SharedTiles<T, Shape>& shared) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const QueryTile tile = query_tile(call.problem, call.schedule, blockIdx.x);
  if (lane == 0) shared.tile = tile;
  Supply supply = begin_supply(call, tile);
  start_copying_queries(call.problem, tile, shared, lane);  // in the first tile's group
  EFFC_ROLLED
  for (int ahead = 1 - Shape::kSlots;; ++ahead) {
    if (ahead >= 0) {
      // Behind the barrier tile `ahead` has come, and nobody works any more on the one before, whose slot is next.
      wait_for_copies<Shape::kSlots - 2>();
      synchronise_block();
      if (shared.slots[ahead % Shape::kSlots].facts.keys == 0) break;
    }
    supply_next_tile<T, Shape>(supply, shared.slots[(ahead + Shape::kSlots - 1) % Shape::kSlots], lane);
  }
  wait_for_copies<0>();
}

}  // namespace effc::cuda
