// What a warp of the tensor-core kernel does with one tile of keys and values in shared memory. A lane's share of every
// matrix is as multiply_add in device.cuh wants it.
#pragma once

#include "cuda/online_softmax.cuh"
#include "cuda/scores.cuh"
#include "cuda/shared_tiles.cuh"

namespace effc::cuda {

// Weights of the type go up to 2^headroom.
template <class T>
constexpr float kHeadroom = 0.0f;

// What a warp holds in registers.
template <class T, class Shape>
struct WarpTile {
  static constexpr int kSteps = Shape::kHeadDim * static_cast<int>(sizeof(T)) / 32;  // products along the head
  static constexpr int kKeyBlocks = Shape::kKeys / 8;                                // columns of scores
  static constexpr int kDimBlocks = Shape::kHeadDim / 8;                             // columns of outputs
  static constexpr int kKeptSteps = Shape::kQueriesInRegisters ? kSteps : 1;

  int lane;
  int first_row;  // of the tile
  uint32_t queries[Shape::kRowBlocks][kKeptSteps][4];
  RowSums<kKeyBlocks> scores[Shape::kRowBlocks];
  RowSums<kDimBlocks> outputs[Shape::kRowBlocks];
  RowStatistics statistics[Shape::kRowBlocks][2];
  int query[Shape::kRowBlocks][2];  // of the tile

  // The place in the head of the outputs' number `n`.
  EFFC_MEMBER static int dim_of(int n, int lane) {
    if constexpr (sizeof(T) == 1) return n / 4 * 16 + lane % 4 * 4 + n % 2 * 2 + n / 2 % 2;
    return column_of(n, lane);
  }

  // Row of the tile that belongs to half `half` of row block `block`.
  EFFC_MEMBER int row(int block, int half) const { return first_row + block * 16 + half * 8 + lane / 4; }
};

// Before the first tile of keys.
template <class T, class Shape>
EFFC_DEVICE void begin_warp_tile(const QueryTile& tile, WarpTile<T, Shape>& warp) {
  warp.lane = static_cast<int>(threadIdx.x % kWarpSize);
  warp.first_row = static_cast<int>(threadIdx.x / kWarpSize) * Shape::kRowBlocks * 16;
  EFFC_UNROLL
  for (int block = 0; block < Shape::kRowBlocks; ++block) {
    warp.outputs[block] = {};
    EFFC_UNROLL
    for (int half = 0; half < 2; ++half) {
      warp.statistics[block][half] = {-INFINITY, 0.0f};
      warp.query[block][half] = warp.row(block, half) % tile.query_count;
    }
  }
}

// Queries [16][16], or E4M3 [16][32], of row block `block`, at step `step` along the head. `rows` are all queries, in
// shared memory.
template <class T, class Shape>
EFFC_DEVICE void load_queries(const T* rows, const WarpTile<T, Shape>& warp, int block, int step,
                              uint32_t (&queries)[4]) {
  using Rows = RowsOf<T, Shape>;
  const auto places = Rows::places(warp.first_row + warp.lane % 16, warp.lane / 16);
  load_matrices(queries, rows + places.at(16 * block, step));
}

template <class T, class Shape>
EFFC_DEVICE void load_all_queries(const T* rows, WarpTile<T, Shape>& warp) {
  EFFC_UNROLL
  for (int block = 0; block < Shape::kRowBlocks; ++block) {
    EFFC_UNROLL
    for (int step = 0; step < WarpTile<T, Shape>::kKeptSteps; ++step) {
      load_queries(rows, warp, block, step, warp.queries[block][step]);
    }
  }
}

// scores = queries * keys^T
template <class T, class Shape>
EFFC_DEVICE void multiply_keys(const T* rows, const T* keys, WarpTile<T, Shape>& warp) {
  using Rows = RowsOf<T, Shape>;
  using Warp = WarpTile<T, Shape>;
  // Of 16 keys, matrices 0 and 1 are the two halves of a step for the first eight, 2 and 3 for the others.
  const auto places = Rows::places(warp.lane / 16 * 8 + warp.lane % 8, warp.lane / 8 % 2);
  EFFC_UNROLL
  for (int block = 0; block < Shape::kRowBlocks; ++block) warp.scores[block] = {};
  EFFC_UNROLL
  for (int step = 0; step < Warp::kSteps; ++step) {
    const int kept = Shape::kQueriesInRegisters ? step : 0;
    if (!Shape::kQueriesInRegisters) {
      EFFC_UNROLL
      for (int block = 0; block < Shape::kRowBlocks; ++block) {
        load_queries(rows, warp, block, step, warp.queries[block][0]);
      }
    }
    EFFC_UNROLL
    for (int pair = 0; pair < Warp::kKeyBlocks / 2; ++pair) {
      uint32_t of_keys[4];
      load_matrices(of_keys, keys + places.at(16 * pair, step));
      EFFC_UNROLL
      for (int block = 0; block < Shape::kRowBlocks; ++block) {
        auto& scores = warp.scores[block].at;
        multiply_add<T>(scores[2 * pair], warp.queries[block][kept], of_keys[0], of_keys[1]);
        multiply_add<T>(scores[2 * pair + 1], warp.queries[block][kept], of_keys[2], of_keys[3]);
      }
    }
  }
}

// Scales scores and adds the biases of the distances.
template <class T, class Shape>
EFFC_DEVICE void add_distance_bias(const SparseAttention& problem, const QueryTile& tile, Position first_key,
                                   WarpTile<T, Shape>& warp) {
  EFFC_UNROLL
  for (int block = 0; block < Shape::kRowBlocks; ++block) {
    EFFC_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int r = warp.row(block, half);
      if (r >= tile.query_count * tile.head_count) continue;
      const Row row = row_of(problem, tile, r);
      const DistanceBias bias = distance_bias_of(problem, row.head);
      EFFC_UNROLL
      for (int n = 0; n < 2 * WarpTile<T, Shape>::kKeyBlocks; ++n) {
        const Position distance = first_key + column_of(n, warp.lane) - row.position;
        float& score = warp.scores[block].of(half, n);
        score = score * (problem.scale * kLog2E) + bias_at(bias, distance);
      }
    }
  }
}

// Takes the keys that a query does not see out of its softmax.
template <class T, class Shape>
EFFC_DEVICE void hide_unseen(const uint32_t (&seen)[Shape::kQueryWords][Shape::kKeys], WarpTile<T, Shape>& warp) {
  EFFC_UNROLL
  for (int block = 0; block < Shape::kRowBlocks; ++block) {
    EFFC_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int query = warp.query[block][half];
      const uint32_t* words = seen[query / 32];
      EFFC_UNROLL
      for (int n = 0; n < 2 * WarpTile<T, Shape>::kKeyBlocks; ++n) {
        const bool sees = (words[column_of(n, warp.lane)] >> query % 32 & 1) != 0;
        if (!sees) warp.scores[block].of(half, n) = -INFINITY;
      }
    }
  }
}

// Scores become weights, and outputs refer to the largest score that is known now.
template <class T, class Shape>
EFFC_DEVICE void do_softmax(float factor, WarpTile<T, Shape>& warp) {
  EFFC_UNROLL
  for (int block = 0; block < Shape::kRowBlocks; ++block) {
    EFFC_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float kept =
          turn_into_weights(warp.scores[block], half, factor, warp.statistics[block][half], kHeadroom<T>);
      EFFC_UNROLL
      for (int n = 0; n < 2 * WarpTile<T, Shape>::kDimBlocks; ++n) warp.outputs[block].of(half, n) *= kept;
    }
  }
}

// outputs += weights * values
template <class T, class Shape>
EFFC_DEVICE void multiply_values(const T* values, WarpTile<T, Shape>& warp) {
  using Rows = SwizzledRows<Shape::kHeadDim>;
  using Warp = WarpTile<T, Shape>;
  const auto places = Rows::places(warp.lane % 16, warp.lane / 16);
  EFFC_UNROLL
  for (int step = 0; step < Warp::kKeyBlocks / 2; ++step) {
    // Weights lie as sums do and are wanted as first operand: the same lanes hold them, in pairs.
    uint32_t weights[Shape::kRowBlocks][4];
    EFFC_UNROLL
    for (int block = 0; block < Shape::kRowBlocks; ++block) {
      const auto& scores = warp.scores[block].at;
      weights[block][0] = pack<T>(scores[2 * step][0], scores[2 * step][1]);
      weights[block][1] = pack<T>(scores[2 * step][2], scores[2 * step][3]);
      weights[block][2] = pack<T>(scores[2 * step + 1][0], scores[2 * step + 1][1]);
      weights[block][3] = pack<T>(scores[2 * step + 1][2], scores[2 * step + 1][3]);
    }
    EFFC_UNROLL
    for (int pair = 0; pair < Warp::kDimBlocks / 2; ++pair) {
      uint32_t of_values[4];
      load_matrices_transposed(of_values, values + places.at(16 * step, pair));
      EFFC_UNROLL
      for (int block = 0; block < Shape::kRowBlocks; ++block) {
        auto& outputs = warp.outputs[block].at;
        multiply_add<T>(outputs[2 * pair], weights[block], of_values[0], of_values[1]);
        multiply_add<T>(outputs[2 * pair + 1], weights[block], of_values[2], of_values[3]);
      }
    }
  }
}

}  // namespace effc::cuda
