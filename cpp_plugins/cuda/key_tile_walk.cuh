// The key tiles that a tile of queries has to visit. All threads of a warp walk together and hold the same state.
#pragma once

#include "cuda/schedule.hpp"
#include "cuda/target.cuh"

namespace effc::cuda {

struct VisitedTile {
  Range keys;           // empty: there is none
  bool full;            // every query sees every attendable key: no predicate needed
  uint64_t attendable;  // bit n: the key mask leaves key `keys.begin + n`
};

// Goes through the runs of neighbouring keys that the pattern's iterator yields and cuts them at multiples of the tile
// size: the costly question which keys are seen is asked once a run and not once a tile. The iterator takes marked
// tokens to be everywhere; the walk looks where they are.
struct KeyTileWalk {
  Scope scope;  // of the iterator: without marks, unless one of the queries is marked
  KeyTileIterator runs;
  Range run;       // what is left of the current one
  Range upcoming;  // the iterator's next one, if it is known already
  const uint8_t* marks;
  Position next_mark;  // no key before it is marked that is not in a run
  Position end;
  const int32_t* blocks;  // the rest of a list of blocks, which takes the iterator's place, or null
  int32_t blocks_left;
  Position block_size;
};

// The first marked key of `range`, or its end. A lane looks at eight keys at a time.
EFFC_DEVICE Position first_marked(const uint8_t* marks, Range range) {
  constexpr int kKeysPerLane = 8;
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  EFFC_ROLLED
  for (Position first = range.begin; first < range.end; first += kWarpSize * kKeysPerLane) {
    uint32_t mine = 0;
    EFFC_UNROLL
    for (int n = 0; n < kKeysPerLane; ++n) {
      const Position j = first + lane * kKeysPerLane + n;
      if (j < range.end && marks[j] != 0) mine |= 1u << n;
    }
    const uint32_t lanes = __ballot_sync(kWholeWarp, mine != 0);
    if (lanes == 0) continue;
    const int found = __ffs(static_cast<int>(lanes)) - 1;
    const uint32_t theirs = __shfl_sync(kWholeWarp, mine, found);
    return first + found * kKeysPerLane + __ffs(static_cast<int>(theirs)) - 1;
  }
  return range.end;
}

EFFC_DEVICE bool asks_for_marks(const Pattern& pattern) {
  EFFC_ROLLED
  for (int t = 0; t < pattern.term_count; ++t) {
    if (pattern.terms[t].kind == TermKind::kMarked) return true;
  }
  return false;
}

EFFC_DEVICE KeyTileWalk walk_key_tiles(const Pattern& pattern, const Scope& scope, Range queries, Range keys) {
  KeyTileWalk walk = {scope, key_tiles(pattern, queries, keys, kMaxLength), {0, 0}, {0, 0}, nullptr, 0, 0, nullptr, 0,
                      0};
  walk.end = walk.runs.left.end;
  walk.next_mark = walk.end;
  if (scope.marks == nullptr || !asks_for_marks(pattern)) return walk;
  if (first_marked(scope.marks, queries) < queries.end) return walk;  // a marked query sees everything
  walk.scope.marks = nullptr;
  walk.marks = scope.marks;
  walk.next_mark = first_marked(scope.marks, {keys.begin, walk.end});
  return walk;
}

// The same for queries at `position` and its neighbours, of a problem whose keys may be chosen by content.
EFFC_DEVICE KeyTileWalk walk_key_tiles(const SparseAttention& problem, const Scope& scope, const QueryTile& tile,
                                       Range queries, Range keys) {
  KeyTileWalk walk = walk_key_tiles(problem.pattern, scope, queries, keys);
  walk.blocks = key_blocks_of(problem, tile, queries.begin);
  if (walk.blocks == nullptr) return walk;
  walk.blocks_left = problem.key_block_count;
  walk.block_size = problem.block_size;
  walk.next_mark = walk.end;
  return walk;
}

// What is left of the next block of the list, or nothing.
EFFC_DEVICE Range next_block(KeyTileWalk& walk) {
  EFFC_ROLLED
  for (; walk.blocks_left > 0; --walk.blocks_left) {
    const int32_t number = *walk.blocks++;
    if (number < 0 || number > (walk.end - 1) / walk.block_size) {
      walk.blocks_left = 0;
      break;
    }
    const Range block = clip({number * walk.block_size, (number + 1) * walk.block_size}, walk.runs.left);
    if (is_empty(block)) continue;
    --walk.blocks_left;
    return block;
  }
  return {0, 0};
}

// One bit for each of up to 64 keys. `key_mask` is that of the batch entry, or null.
EFFC_DEVICE uint64_t attendable_keys(const uint8_t* key_mask, Range keys) {
  if (key_mask == nullptr) return low_bits(keys.end - keys.begin);
  const Position first = keys.begin + static_cast<Position>(threadIdx.x % kWarpSize);
  const Position second = first + kWarpSize;
  const uint32_t low = __ballot_sync(kWholeWarp, first < keys.end && key_mask[first] != 0);
  const uint32_t high = __ballot_sync(kWholeWarp, second < keys.end && key_mask[second] != 0);
  return uint64_t{high} << kWarpSize | low;
}

// Makes sure that walk.run holds keys, or returns false at the end.
template <int keys_per_tile>
EFFC_DEVICE bool find_run(KeyTileWalk& walk, const Pattern& pattern) {
  if (!is_empty(walk.run)) return true;
  if (walk.blocks != nullptr) {
    walk.run = next_block(walk);
    return !is_empty(walk.run);
  }
  if (is_empty(walk.upcoming)) {
    walk.upcoming = next_range(walk.runs, pattern, walk.scope);
    walk.runs.left.begin = walk.runs.seen_until = walk.upcoming.end;
  }
  const Position upcoming = is_empty(walk.upcoming) ? walk.end : walk.upcoming.begin;
  if (walk.next_mark < upcoming) {
    // Up to the end of the tile, which the marked key makes necessary anyway.
    const Position boundary = (walk.next_mark / keys_per_tile + 1) * keys_per_tile;
    walk.run = {walk.next_mark, smaller(boundary, upcoming)};
  } else {
    walk.run = walk.upcoming;
    walk.upcoming = {0, 0};
  }
  if (walk.next_mark < walk.run.end) walk.next_mark = first_marked(walk.marks, {walk.run.end, walk.end});
  return !is_empty(walk.run);
}

// The next tile of up to `keys_per_tile` (at most 64) keys, one of which can be attended at least. No two tiles lie
// between the same multiples of the tile size: what several runs see there is one partial tile.
template <int keys_per_tile>
EFFC_DEVICE VisitedTile next_tile(KeyTileWalk& walk, const Pattern& pattern, const Scope& scope,
                                  const uint8_t* key_mask) {
  static_assert(keys_per_tile <= 64, "one bit of a 64-bit word per key");
  VisitedTile tile = {{0, 0}, false, 0};
  Position boundary = 0;
  EFFC_ROLLED
  for (;;) {
    const bool more = find_run<keys_per_tile>(walk, pattern);
    if (!is_empty(tile.keys) && (!more || walk.run.begin >= boundary)) {
      tile.attendable = attendable_keys(key_mask, tile.keys);
      tile.full = tile.full && sees_all(pattern, scope, walk.runs.queries, tile.keys);
      if (tile.attendable != 0) return tile;
      tile.keys = {0, 0};
    }
    if (!more) return tile;
    const bool begins = is_empty(tile.keys);
    if (begins) {
      tile.keys.begin = walk.run.begin;
      boundary = (walk.run.begin / keys_per_tile + 1) * keys_per_tile;
    }
    tile.full = begins || (tile.full && tile.keys.end == walk.run.begin);
    tile.keys.end = smaller(walk.run.end, boundary);
    walk.run.begin = tile.keys.end;
  }
}

}  // namespace effc::cuda
