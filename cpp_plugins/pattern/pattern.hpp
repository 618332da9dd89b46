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

// Before a loop that a GPU runs rarely: unrolled, these loops would be most of a kernel's code.
#if defined(__CUDACC__)
#define EFFC_ROLLED _Pragma("unroll 1")
#else
#define EFFC_ROLLED
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

// `count` positions first, first + step, ...
struct Progression {
  Position first;
  Position step;
  Position count;
};

// Every form that a user can write is a union of these kinds.
enum class TermKind : int32_t {
  kBand,          // -left <= j - i <= right, and j - i is a multiple of step (local, dilated, strided, dense)
  kBlocks,        // |i / block - j / block| <= reach
  kRandom,        // j / kRandomBlock is one of `count` blocks drawn for i / kRandomBlock
  kFirstKeys,     // j < count (sinks; one half of global)
  kFirstQueries,  // i < count (the other half of global)
  kMarked,        // i or j is marked (tokens that are global wherever they stand)
};

struct Term {
  TermKind kind;
  Position left;   // kBand
  Position right;  // kBand
  Position step;   // kBand
  Position block;  // kBlocks
  Position reach;  // kBlocks
  Position count;  // kRandom, kFirstKeys, kFirstQueries
  int32_t seed;    // kRandom, below kRandomPrime
};

constexpr int kMaxTerms = 64;

// A union of terms, restricted by causality (j <= i). Positions run over [0, length).
struct Pattern {
  Term terms[kMaxTerms];
  int32_t term_count;
  bool causal;
};

// What a rule may look at besides the two positions.
struct Scope {
  Position length;       // number of keys, which kRandom draws from
  const uint8_t* marks;  // [length], nonzero where a token is marked; null: none is
};

EFFC_HD Position smaller(Position a, Position b) {
  return a < b ? a : b;
}
EFFC_HD Position larger(Position a, Position b) {
  return a > b ? a : b;
}
EFFC_HD int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
EFFC_HD bool is_empty(Range range) {
  return range.end <= range.begin;
}
EFFC_HD Range clip(Range range, Range bounds) {
  return {larger(range.begin, bounds.begin), smaller(range.end, bounds.end)};
}

// ---------------------------------------------------------------------------------------------------------------------
// The definition.

constexpr Position kRandomBlock = 64;
constexpr int64_t kRandomPrime = 2147483647;

// The `number`-th key block that a query block sees: a counter-based hash, the same on every machine. Causal patterns
// draw from what lies before.
EFFC_HD Position random_block(const Term& term, Position query_block, Position number, bool causal, Position length) {
  const int64_t among = causal ? int64_t{query_block} + 1 : (int64_t{length} + kRandomBlock - 1) / kRandomBlock;
  int64_t state =
      (int64_t{term.seed} * 7919 + int64_t{query_block} * 104729 + int64_t{number} * 1299709 + 1) % kRandomPrime;
  EFFC_ROLLED
  for (int round = 0; round < 3; ++round) state = (state * state + 48271) % kRandomPrime;
  // Both fit into 32 bits, where a GPU divides several times faster.
  return static_cast<Position>(static_cast<uint32_t>(state) % static_cast<uint32_t>(among));
}

EFFC_HD bool draws_block(const Term& term, Position query_block, Position key_block, bool causal, Position length) {
  EFFC_ROLLED
  for (Position number = 0; number < term.count; ++number) {
    if (random_block(term, query_block, number, causal, length) == key_block) return true;
  }
  return false;
}

EFFC_HD bool marked(const Scope& scope, Position position) {
  return scope.marks != nullptr && scope.marks[position] != 0;
}

EFFC_HD bool visible(const Term& term, const Scope& scope, bool causal, Position i, Position j) {
  switch (term.kind) {
    case TermKind::kBand:
      return j - i >= -term.left && j - i <= term.right && (j - i) % term.step == 0;
    case TermKind::kBlocks: {
      const Position distance = i / term.block - j / term.block;
      return distance >= -term.reach && distance <= term.reach;
    }
    case TermKind::kRandom:
      return draws_block(term, i / kRandomBlock, j / kRandomBlock, causal, scope.length);
    case TermKind::kFirstKeys:
      return j < term.count;
    case TermKind::kFirstQueries:
      return i < term.count;
    case TermKind::kMarked:
      return marked(scope, i) || marked(scope, j);
  }
  return false;
}

EFFC_HD bool visible(const Pattern& pattern, const Scope& scope, Position i, Position j) {
  if (pattern.causal && j > i) return false;
  EFFC_ROLLED
  for (int t = 0; t < pattern.term_count; ++t) {
    if (visible(pattern.terms[t], scope, pattern.causal, i, j)) return true;
  }
  return false;
}

// ---------------------------------------------------------------------------------------------------------------------
// The same rules for whole ranges, which is what makes a pattern cheap. All follow from `visible`; the self-test
// compares them with it exhaustively.

// The first range of keys at or after `from` that some query of `queries` sees. It holds nothing that no query sees,
// apart from the steps of a band and the causal half, and it may touch the range that comes after it.
// `bounds` are the keys that exist. Marked tokens are everywhere, so kMarked gives all keys.
EFFC_HD Range next_keys_seen(const Term& term, const Scope& scope, bool causal, Range queries, Position from,
                             Range bounds) {
  const Position last_query = queries.end - 1;
  bounds.begin = larger(bounds.begin, from);
  switch (term.kind) {
    case TermKind::kBand:
      return clip({queries.begin - term.left, last_query + term.right + 1}, bounds);
    case TermKind::kBlocks:
      return clip({(queries.begin / term.block - term.reach) * term.block,
                   (last_query / term.block + term.reach + 1) * term.block},
                  bounds);
    case TermKind::kRandom: {
      const Position first_block = bounds.begin / kRandomBlock;
      Position nearest = kMaxLength / kRandomBlock;
      EFFC_ROLLED
      for (Position block = queries.begin / kRandomBlock; block <= last_query / kRandomBlock; ++block) {
        EFFC_ROLLED
        for (Position number = 0; number < term.count; ++number) {
          const Position drawn = random_block(term, block, number, causal, scope.length);
          if (drawn >= first_block && drawn < nearest) nearest = drawn;
        }
      }
      return clip({nearest * kRandomBlock, (nearest + 1) * kRandomBlock}, bounds);
    }
    case TermKind::kFirstKeys:
      return clip({0, term.count}, bounds);
    case TermKind::kFirstQueries:
      if (queries.begin >= term.count) return {0, 0};
      return causal ? clip({0, term.count}, bounds) : bounds;
    case TermKind::kMarked:
      return scope.marks != nullptr ? bounds : Range{0, 0};
  }
  return {0, 0};
}

// True if every query of `queries` sees every key of `keys` through this term alone. May be false although it is so
// for kRandom and kMarked.
EFFC_HD bool sees_all(const Term& term, const Scope& scope, bool causal, Range queries, Range keys) {
  const Position last_query = queries.end - 1;
  const Position last_key = keys.end - 1;
  switch (term.kind) {
    case TermKind::kBand:
      return term.step == 1 && keys.begin - last_query >= -term.left && last_key - queries.begin <= term.right;
    case TermKind::kBlocks:
      return last_key / term.block - queries.begin / term.block <= term.reach &&
             last_query / term.block - keys.begin / term.block <= term.reach;
    case TermKind::kRandom:
      return queries.begin / kRandomBlock == last_query / kRandomBlock &&
             keys.begin / kRandomBlock == last_key / kRandomBlock &&
             draws_block(term, queries.begin / kRandomBlock, keys.begin / kRandomBlock, causal, scope.length);
    case TermKind::kFirstKeys:
      return keys.end <= term.count;
    case TermKind::kFirstQueries:
      return queries.end <= term.count;
    case TermKind::kMarked:
      return false;
  }
  return false;
}

// True only if the whole tile is visible. A tile that several terms cover together counts as partial, which is
// correct and merely slower.
EFFC_HD bool sees_all(const Pattern& pattern, const Scope& scope, Range queries, Range keys) {
  if (pattern.causal && keys.end - 1 > queries.begin) return false;
  EFFC_ROLLED
  for (int t = 0; t < pattern.term_count; ++t) {
    if (sees_all(pattern.terms[t], scope, pattern.causal, queries, keys)) return true;
  }
  return false;
}

// ---------------------------------------------------------------------------------------------------------------------
// The predicate for up to 64 queries at once.

EFFC_HD uint64_t low_bits(Position count) {
  return count <= 0 ? 0 : (count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1);
}

// How many of the progression's positions are below `end`; not clipped to its count.
EFFC_HD Position steps_below(const Progression& progression, Position end) {
  const Position distance = end - progression.first;
  if (progression.step == 1 || distance <= 0) return distance;
  return (distance + progression.step - 1) / progression.step;
}

// Bit r says whether the r-th query lies in `range`.
EFFC_HD uint64_t queries_in(const Progression& queries, Range range) {
  return low_bits(smaller(steps_below(queries, range.end), queries.count)) &
         ~low_bits(steps_below(queries, range.begin));
}

// Bit r says whether the r-th query sees key `j` through a band.
EFFC_HD uint64_t band_queries(const Term& term, const Progression& queries, Position j) {
  const Range range = {j - term.right, j + term.left + 1};
  if (term.step == 1) return queries_in(queries, range);
  if (queries.step % term.step == 0) {
    return (queries.first - j) % term.step == 0 ? queries_in(queries, range) : 0;
  }
  uint64_t bits = 0;
  EFFC_ROLLED
  for (Position r = larger(steps_below(queries, range.begin), 0); r < queries.count; ++r) {
    const Position i = queries.first + r * queries.step;
    if (i >= range.end) break;
    if ((i - j) % term.step == 0) bits |= uint64_t{1} << r;
  }
  return bits;
}

// Bit r says whether the block of the r-th query draws `key_block`.
EFFC_HD uint64_t drawing_queries(const Term& term, const Scope& scope, bool causal, const Progression& queries,
                                 Position key_block) {
  uint64_t bits = 0;
  EFFC_ROLLED
  for (Position r = 0; r < queries.count;) {
    const Position block = (queries.first + r * queries.step) / kRandomBlock;
    const Position end = smaller(steps_below(queries, (block + 1) * kRandomBlock), queries.count);
    if (draws_block(term, block, key_block, causal, scope.length)) bits |= low_bits(end) & ~low_bits(r);
    r = end;
  }
  return bits;
}

// Sets bit r of seen[n] where query r of `queries` sees key n of `keys` through `term`.
EFFC_HD void add_visible_queries(const Term& term, const Scope& scope, bool causal, const Progression& queries,
                                 const Progression& keys, uint64_t* seen) {
  switch (term.kind) {
    case TermKind::kBand:
      if (term.step == 1 && queries.step == 1 && keys.step == 1) {
        const Position first_distance = keys.first - queries.first;
        EFFC_ROLLED
        for (Position n = 0; n < keys.count; ++n) {
          const Position distance = first_distance + n;
          seen[n] |= low_bits(smaller(distance + term.left + 1, queries.count)) & ~low_bits(distance - term.right);
        }
        return;
      }
      EFFC_ROLLED
      for (Position n = 0; n < keys.count; ++n) seen[n] |= band_queries(term, queries, keys.first + n * keys.step);
      return;
    case TermKind::kBlocks: {
      Range begun = {-1, -1};  // the block of the last key
      uint64_t bits = 0;
      EFFC_ROLLED
      for (Position n = 0; n < keys.count; ++n) {
        const Position j = keys.first + n * keys.step;
        if (j < begun.begin || j >= begun.end) {
          const Position block = j / term.block;
          begun = {block * term.block, (block + 1) * term.block};
          bits = queries_in(queries, {(block - term.reach) * term.block, (block + term.reach + 1) * term.block});
        }
        seen[n] |= bits;
      }
      return;
    }
    case TermKind::kRandom: {
      Position drawn_for = -1;
      uint64_t bits = 0;
      EFFC_ROLLED
      for (Position n = 0; n < keys.count; ++n) {
        const Position block = (keys.first + n * keys.step) / kRandomBlock;
        if (block != drawn_for) bits = drawing_queries(term, scope, causal, queries, block);
        drawn_for = block;
        seen[n] |= bits;
      }
      return;
    }
    case TermKind::kFirstKeys: {
      const uint64_t every_query = low_bits(queries.count);
      const Position end = smaller(steps_below(keys, term.count), keys.count);
      EFFC_ROLLED
      for (Position n = 0; n < end; ++n) seen[n] |= every_query;
      return;
    }
    case TermKind::kFirstQueries: {
      const uint64_t bits = queries_in(queries, {0, term.count});
      EFFC_ROLLED
      for (Position n = 0; n < keys.count; ++n) seen[n] |= bits;
      return;
    }
    case TermKind::kMarked: {
      uint64_t bits = 0;
      EFFC_ROLLED
      for (Position r = 0; r < queries.count; ++r) {
        if (marked(scope, queries.first + r * queries.step)) bits |= uint64_t{1} << r;
      }
      const uint64_t every_query = low_bits(queries.count);
      EFFC_ROLLED
      for (Position n = 0; n < keys.count; ++n) {
        seen[n] |= marked(scope, keys.first + n * keys.step) ? every_query : bits;
      }
      return;
    }
  }
}

// Bit r of seen[n] becomes: query r of `queries` (at most 64) sees key n of `keys`.
EFFC_HD void visible_queries(const Pattern& pattern, const Scope& scope, const Progression& queries,
                             const Progression& keys, uint64_t* seen) {
  EFFC_ROLLED
  for (Position n = 0; n < keys.count; ++n) seen[n] = 0;
  EFFC_ROLLED
  for (int t = 0; t < pattern.term_count; ++t) {
    add_visible_queries(pattern.terms[t], scope, pattern.causal, queries, keys, seen);
  }
  if (!pattern.causal || keys.first + (keys.count - 1) * keys.step <= queries.first) return;
  EFFC_ROLLED
  for (Position n = 0; n < keys.count; ++n) seen[n] &= ~low_bits(steps_below(queries, keys.first + n * keys.step));
}

// ---------------------------------------------------------------------------------------------------------------------
// The iterator: for a tile of queries, the key tiles that are fully visible and those that need the predicate. No key
// tile spans a multiple of the tile size, so that tiles of neighbouring queries meet the same ones.

struct KeyTile {
  Range keys;
  bool full;  // every query of the tile sees every key of it: no predicate needed
};

struct KeyTileIterator {
  Range queries;
  Range left;  // keys that are still to be looked at
  Position tile_size;
  Position seen_until;  // keys before this are known to be seen
};

EFFC_HD KeyTileIterator key_tiles(const Pattern& pattern, Range queries, Range bounds, Position tile_size) {
  if (pattern.causal) bounds.end = smaller(bounds.end, queries.end);
  return {queries, bounds, tile_size, bounds.begin};
}

// The first range of keys that some query sees, as long as it needs to be for the next tile.
EFFC_HD Range next_range(const KeyTileIterator& iterator, const Pattern& pattern, const Scope& scope) {
  const Range left = iterator.left;
  Range found = {left.end, left.end};
  if (iterator.seen_until > left.begin) {
    found = {left.begin, iterator.seen_until};
  } else {
    EFFC_ROLLED
    for (int t = 0; t < pattern.term_count; ++t) {
      const Range seen = next_keys_seen(pattern.terms[t], scope, pattern.causal, iterator.queries, left.begin, left);
      if (!is_empty(seen) && seen.begin < found.begin) found = seen;
    }
  }
  EFFC_ROLLED
  for (bool grown = true; grown && !is_empty(found) && found.end - found.begin < iterator.tile_size;) {
    grown = false;
    EFFC_ROLLED
    for (int t = 0; t < pattern.term_count; ++t) {
      const Range seen = next_keys_seen(pattern.terms[t], scope, pattern.causal, iterator.queries, found.end, left);
      if (!is_empty(seen) && seen.begin == found.end) {
        found.end = seen.end;
        grown = true;
      }
    }
  }
  return found;
}

// Writes the next tile and returns true, or returns false at the end.
EFFC_HD bool next_tile(KeyTileIterator& iterator, const Pattern& pattern, const Scope& scope, KeyTile& tile) {
  const Range range = next_range(iterator, pattern, scope);
  if (is_empty(range)) return false;
  tile.keys = {range.begin, smaller(range.end, (range.begin / iterator.tile_size + 1) * iterator.tile_size)};
  tile.full = sees_all(pattern, scope, iterator.queries, tile.keys);
  iterator.left.begin = tile.keys.end;
  iterator.seen_until = range.end;
  return true;
}

}  // namespace effc
