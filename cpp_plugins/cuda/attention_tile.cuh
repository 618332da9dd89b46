// The kernel for fp16, bf16 and E4M3: a block computes a tile of queries on tensor cores. One warp brings tiles of keys
// and values (tile_supply.cuh), the others compute (warp_tile.cuh) and write (tile_results.cuh).
#pragma once

#include "cuda/e4m3_tile.cuh"
#include "cuda/tile_results.cuh"
#include "cuda/tile_supply.cuh"
#include "cuda/warp_tile.cuh"

namespace effc::cuda {

template <class T, class Shape>
EFFC_DEVICE void compute_tiles(const Call& call, SharedTiles<T, Shape>& shared) {
  const SparseAttention& problem = call.problem;
  // With biases, or a scale that would turn the largest product into the smallest score, products become scores before
  // the softmax looks at them; otherwise scaling is part of its multiply-add.
  const bool biased = has_distance_bias(problem) || !(problem.scale > 0.0f);
  const float factor = biased ? 1.0f : problem.scale * kLog2E;

  WarpTile<T, Shape> warp;
  synchronise_block();
  begin_warp_tile(shared.tile, warp);
  if (Shape::kQueriesInRegisters) load_all_queries(shared.queries, warp);
  for (int slot = 0; shared.slots[slot].facts.keys > 0; slot = slot + 1 == Shape::kSlots ? 0 : slot + 1) {
    const auto& current = shared.slots[slot];
    const TileFacts facts = current.facts;
    multiply_keys(shared.queries, current.keys, warp);
    if (biased) add_distance_bias(problem, shared.tile, facts.first_key, warp);
    if (!facts.whole) hide_unseen(current.seen, warp);
    do_softmax(factor, warp);
    multiply_values(current.values, warp);
    synchronise_block();
  }
  write_results(call, shared.tile, shared, warp);
}

template <class T, class Shape>
EFFC_KERNEL(Shape::kThreads, Shape::kBlocksPerMultiprocessor)
attend_tile(EFFC_CONSTANT Call call) {
  if constexpr (kMultiplies<T>) {  // or `launch` has refused
    auto& shared = *reinterpret_cast<SharedTiles<T, Shape>*>(shared_memory());
    if (static_cast<int>(threadIdx.x / kWarpSize) == Shape::kWarps) {
      supply_tiles(call, shared);
    } else {
      compute_tiles(call, shared);
    }
  }
}

}  // namespace effc::cuda
