// Attention patterns: which (query i, key j) pairs are visible, and which key tiles a tile of queries has to look at.
//
// One definition for host and device code. Everything here is plain data and free functions without allocation, so
// that a CPU kernel, a CUDA kernel and a test read the same rules. Text such as "local:256|global:16" becomes a
// `Pattern` in parse.hpp.
#pragma once

#include <cstdint>

// Internal linkage matters on the host: kernels for different instruction sets include this header, and the linker must
// never let one of them use a copy that was compiled for another one's instructions.
#if defined(__CUDACC__)
#define EFFC_HD static inline __host__ __device__
#else
#define EFFC_HD static inline
#endif

namespace effc {

// A position in the sequence. 32 bits keep device code small; kernels accept at most kMaxLength positions, so that
// position + distance cannot overflow.
using Position = int32_t;
constexpr Position kMaxLength = 1 << 29;

// A half-open range of positions; empty if end <= begin.
struct Range {
  Position begin;
  Position end;
};

// Every form that a user can write is a union of these four kinds.
enum class TermKind : int32_t {
  kBand,          // -left <= j - i <= right, and j - i is a multiple of step (local, dilated, strided, dense)
  kBlocks,        // |i / block - j / block| <= reach
  kFirstKeys,     // j < count (sinks; one half of global)
  kFirstQueries,  // i < count (the other half of global)
};

struct Term {
  TermKind kind;
  Position left;   // kBand
  Position right;  // kBand
  Position step;   // kBand
  Position block;  // kBlocks
  Position reach;  // kBlocks
  Position count;  // kFirstKeys, kFirstQueries
};

constexpr int kMaxTerms = 16;

// A union of terms, restricted by causality (j <= i). Positions run over [0, length).
struct Pattern {
  Term terms[kMaxTerms];
  int32_t term_count;
  bool causal;
};

EFFC_HD Position smaller(Position a, Position b) {
  return a < b ? a : b;
}
EFFC_HD Position larger(Position a, Position b) {
  return a > b ? a : b;
}
EFFC_HD bool is_empty(Range range) {
  return range.end <= range.begin;
}
EFFC_HD Range clip(Range range, Range bounds) {
  return {larger(range.begin, bounds.begin), smaller(range.end, bounds.end)};
}

// ---------------------------------------------------------------------------------------------------------------------
// The definition.

EFFC_HD bool visible(const Term& term, Position i, Position j) {
  switch (term.kind) {
    case TermKind::kBand:
      return j - i >= -term.left && j - i <= term.right && (j - i) % term.step == 0;
    case TermKind::kBlocks: {
      const Position distance = i / term.block - j / term.block;
      return distance >= -term.reach && distance <= term.reach;
    }
    case TermKind::kFirstKeys:
      return j < term.count;
    case TermKind::kFirstQueries:
      return i < term.count;
  }
  return false;
}

EFFC_HD bool visible(const Pattern& pattern, Position i, Position j) {
  if (pattern.causal && j > i) return false;
  for (int t = 0; t < pattern.term_count; ++t) {
    if (visible(pattern.terms[t], i, j)) return true;
  }
  return false;
}

// ---------------------------------------------------------------------------------------------------------------------
// The same rules for whole ranges, which is what makes a pattern cheap. All follow from `visible`; the self-test
// compares them with it exhaustively.

// The smallest range that holds every key some query of `queries` sees. `bounds` are the keys that exist.
EFFC_HD Range keys_seen(const Term& term, Range queries, Range bounds) {
  const Position last_query = queries.end - 1;
  switch (term.kind) {
    case TermKind::kBand:
      return clip({queries.begin - term.left, last_query + term.right + 1}, bounds);
    case TermKind::kBlocks:
      return clip({(queries.begin / term.block - term.reach) * term.block,
                   (last_query / term.block + term.reach + 1) * term.block},
                  bounds);
    case TermKind::kFirstKeys:
      return clip({0, term.count}, bounds);
    case TermKind::kFirstQueries:
      return queries.begin < term.count ? bounds : Range{0, 0};
  }
  return {0, 0};
}

// The queries that see key `j`, apart from the step of a band: always one range.
EFFC_HD Range queries_seeing(const Term& term, Position j) {
  switch (term.kind) {
    case TermKind::kBand:
      return {j - term.right, j + term.left + 1};
    case TermKind::kBlocks:
      return {(j / term.block - term.reach) * term.block, (j / term.block + term.reach + 1) * term.block};
    case TermKind::kFirstKeys:
      return j < term.count ? Range{0, kMaxLength} : Range{0, 0};
    case TermKind::kFirstQueries:
      return {0, term.count};
  }
  return {0, 0};
}

// True if every query of `queries` sees every key of `keys` through this term alone.
EFFC_HD bool sees_all(const Term& term, Range queries, Range keys) {
  const Position last_query = queries.end - 1;
  const Position last_key = keys.end - 1;
  switch (term.kind) {
    case TermKind::kBand:
      return term.step == 1 && keys.begin - last_query >= -term.left && last_key - queries.begin <= term.right;
    case TermKind::kBlocks:
      return last_key / term.block - queries.begin / term.block <= term.reach &&
             last_query / term.block - keys.begin / term.block <= term.reach;
    case TermKind::kFirstKeys:
      return keys.end <= term.count;
    case TermKind::kFirstQueries:
      return queries.end <= term.count;
  }
  return false;
}

// True only if the whole tile is visible. A tile that several terms cover together counts as partial, which is
// correct and merely slower.
EFFC_HD bool sees_all(const Pattern& pattern, Range queries, Range keys) {
  if (pattern.causal && keys.end - 1 > queries.begin) return false;
  for (int t = 0; t < pattern.term_count; ++t) {
    if (sees_all(pattern.terms[t], queries, keys)) return true;
  }
  return false;
}

// ---------------------------------------------------------------------------------------------------------------------
// The predicate for up to 64 queries at once: bit r says whether query first_query + r sees key j.

EFFC_HD uint64_t low_bits(Position count) {
  return count <= 0 ? 0 : (count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1);
}

EFFC_HD uint64_t visible_queries(const Pattern& pattern, Position first_query, Position query_count, Position j) {
  uint64_t bits = 0;
  for (int t = 0; t < pattern.term_count; ++t) {
    const Term& term = pattern.terms[t];
    const Range seeing = queries_seeing(term, j);
    const Position begin = larger(seeing.begin - first_query, 0);
    const Position end = smaller(seeing.end - first_query, query_count);
    if (end <= begin) continue;
    if (term.kind == TermKind::kBand && term.step > 1) {
      // The first query at or after `begin` whose distance to j is a multiple of the step.
      const Position distance = (first_query + begin - j) % term.step;
      const Position missing = distance == 0 ? 0 : (distance > 0 ? term.step - distance : -distance);
      for (Position r = begin + missing; r < end; r += term.step) bits |= uint64_t{1} << r;
    } else {
      bits |= low_bits(end) & ~low_bits(begin);
    }
  }
  if (pattern.causal) bits &= ~low_bits(j - first_query);
  return bits;
}

// ---------------------------------------------------------------------------------------------------------------------
// The iterator: for a tile of queries, the key tiles that are fully visible and those that need the predicate.

// The keys that a tile of queries sees, as sorted ranges that do not touch each other.
struct KeyRanges {
  Range ranges[kMaxTerms];
  int32_t count;
};

EFFC_HD KeyRanges key_ranges(const Pattern& pattern, Range queries, Range bounds) {
  if (pattern.causal) bounds.end = smaller(bounds.end, queries.end);
  KeyRanges result;
  result.count = 0;
  for (int t = 0; t < pattern.term_count; ++t) {
    Range added = keys_seen(pattern.terms[t], queries, bounds);
    if (is_empty(added)) continue;
    // Insert, swallowing every earlier range that overlaps or touches.
    int kept = 0;
    for (int r = 0; r < result.count; ++r) {
      const Range range = result.ranges[r];
      if (range.end < added.begin || added.end < range.begin) {
        result.ranges[kept++] = range;
      } else {
        added = {smaller(added.begin, range.begin), larger(added.end, range.end)};
      }
    }
    int place = kept;
    for (; place > 0 && result.ranges[place - 1].begin > added.begin; --place) {
      result.ranges[place] = result.ranges[place - 1];
    }
    result.ranges[place] = added;
    result.count = kept + 1;
  }
  return result;
}

struct KeyTile {
  Range keys;
  bool full;  // every query of the tile sees every key of it: no predicate needed
};

struct KeyTileIterator {
  KeyRanges ranges;
  Range queries;
  Position tile_size;
  int32_t range;      // the range that the next tile comes from
  Position next_key;  // where in it
};

EFFC_HD KeyTileIterator key_tiles(const Pattern& pattern, Range queries, Range bounds, Position tile_size) {
  KeyTileIterator iterator;
  iterator.ranges = key_ranges(pattern, queries, bounds);
  iterator.queries = queries;
  iterator.tile_size = tile_size;
  iterator.range = 0;
  iterator.next_key = iterator.ranges.count > 0 ? iterator.ranges.ranges[0].begin : 0;
  return iterator;
}

// Writes the next tile and returns true, or returns false at the end.
EFFC_HD bool next_tile(KeyTileIterator& iterator, const Pattern& pattern, KeyTile& tile) {
  if (iterator.range == iterator.ranges.count) return false;
  const Range range = iterator.ranges.ranges[iterator.range];
  tile.keys = {iterator.next_key, smaller(range.end, iterator.next_key + iterator.tile_size)};
  tile.full = sees_all(pattern, iterator.queries, tile.keys);
  if (tile.keys.end < range.end) {
    iterator.next_key = tile.keys.end;
  } else if (++iterator.range < iterator.ranges.count) {
    iterator.next_key = iterator.ranges.ranges[iterator.range].begin;
  }
  return true;
}

}  // namespace effc
