// What the tensor-core kernel keeps in shared memory, and how it gets there.
#pragma once

#include "cuda/results.cuh"
#include "cuda/tile_shapes.hpp"

namespace effc::cuda {

// Rows are cut into chunks of 16 bytes, which move as one.
constexpr int kChunkBytes = 16;
constexpr int kChunk = 8;  // 16-bit numbers

struct alignas(16) ChunkOfBytes {
  uint32_t words[4];
};

// A matrix of rows of `head_dim` numbers, `numbers` to a chunk. Eight rows of the same chunk, as load_matrices reads
// them, must lie in different banks: the chunks of each row change places, in a way that depends on the row.
template <int head_dim, int numbers = kChunk>
struct SwizzledRows {
  static constexpr int kNumbers = numbers;
  static constexpr int kChunks = head_dim / numbers;
  // The largest power of two, up to 8, that divides kChunks: chunks change places within groups of that size.
  static constexpr int kGroup = kChunks % 8 == 0 ? 8 : (kChunks % 4 == 0 ? 4 : (kChunks % 2 == 0 ? 2 : 1));

  // Where chunk `chunk` of row `row` begins, in numbers.
  EFFC_MEMBER static int at(int row, int chunk) { return row * head_dim + (chunk ^ turn(row)) * numbers; }

  // Places of chunks `odd`, 2 + odd, 4 + odd, ... in row `row` and in rows a multiple of eight further: what a lane
  // meets when it goes through a matrix. Most of the arithmetic depends on the lane alone and is done once.
  struct Places {
    int row_begin;
    int first_chunk;

    EFFC_MEMBER int at(int rows_further, int step) const {
      const int chunk = (first_chunk ^ 2 * step % kGroup) + 2 * step / kGroup * kGroup;
      return row_begin + rows_further * head_dim + chunk * numbers;
    }
  };
  EFFC_MEMBER static Places places(int row, int odd) { return {row * head_dim, odd ^ turn(row)}; }

 private:
  EFFC_MEMBER static int turn(int row) { return row / (8 / kGroup) % kGroup; }
};

template <class T, class Shape>
using RowsOf = SwizzledRows<Shape::kHeadDim, kChunkBytes / static_cast<int>(sizeof(T))>;

// What the whole block must know about a tile of keys.
struct TileFacts {
  Position first_key;
  int32_t keys;  // 0: there are no more tiles
  bool whole;    // every query sees every one of the slot's keys, so nobody has to look at `seen`
};

template <class T, class Shape>
struct SharedTiles {
  struct Slot {
    T keys[Shape::kKeys * Shape::kHeadDim];
    T values[Shape::kKeys * Shape::kHeadDim];
    // Bit q % 32 of seen[q / 32][n]: query q of the tile sees key n.
    uint32_t seen[Shape::kQueryWords][Shape::kKeys];
    alignas(16) TileFacts facts;
  };

  QueryTile tile;                                         // here, because registers are scarcer
  alignas(16) T queries[Shape::kRows * Shape::kHeadDim];  // in the end: outputs of the same type
  Slot slots[Shape::kSlots];
};

// `threads` threads start to copy `count` rows, the r-th from `row_address(r)`, and to fill what is left of the `rows`
// rows with zeros.
template <int rows, class Shape, int threads = kWarpSize, class T, class RowAddress>
EFFC_DEVICE void start_copying_rows(T* to, int count, int head_dim, int thread, const RowAddress& row_address) {
  using Rows = RowsOf<T, Shape>;
  static_assert(rows * Rows::kChunks % kWarpSize == 0, "every lane of a warp copies the same number of chunks");
  const T* somewhere_valid = row_address(0);
  EFFC_UNROLL_BY(8)
  for (int n = thread; n < rows * Rows::kChunks; n += threads) {
    const int row = n / Rows::kChunks, chunk = n % Rows::kChunks;
    const bool wanted = row < count && chunk * Rows::kNumbers < head_dim;
    start_copy(to + Rows::at(row, chunk), wanted ? row_address(row) + chunk * Rows::kNumbers : somewhere_valid, wanted);
  }
}

template <class T, class Shape>
EFFC_DEVICE void start_copying_queries(const SparseAttention& problem, const QueryTile& tile,
                                       SharedTiles<T, Shape>& shared, int lane) {
  start_copying_rows<Shape::kRows, Shape>(
      shared.queries, tile.query_count * tile.head_count, static_cast<int>(problem.head_dim), lane,
      [&](int r) { return static_cast<const T*>(problem.query) + row_of(problem, tile, r).offset; });
}

// Keys or values; `first` is the row of the first key of the tile.
template <class T, class Shape>
EFFC_DEVICE void start_copying_keys(const SparseAttention& problem, const T* first, int count, T* to, int lane) {
  const int64_t stride = problem.kv_num_heads * problem.head_dim;
  start_copying_rows<Shape::kKeys, Shape>(to, count, static_cast<int>(problem.head_dim), lane,
                                          [&](int r) { return first + r * stride; });
}

}  // namespace effc::cuda
