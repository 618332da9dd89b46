// The third kernel of linear attention: a block computes a tile of queries on tensor cores. A state is read as keys
// are: its features are weighed by phi(q) z, and instead of values they have means of values.
#pragma once

#include "cuda/linear_features.cuh"
#include "cuda/tile_results.cuh"

namespace effc::cuda {

// As TileShape, without a warp that supplies the others: mapping keys is work for all of them.
template <int head_dim>
struct LinearShape {
  static constexpr int kHeadDim = head_dim;
  static constexpr int kWarps = 4;
  static constexpr int kRowBlocks = 1;
  static constexpr int kKeys = keys_for(head_dim);
  static constexpr int kSlots = 2;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRows = kLinearRows;
  static constexpr bool kQueriesInRegisters = false;
  static constexpr int kBlocksPerMultiprocessor = head_dim <= 64 ? 3 : (head_dim <= 128 ? 2 : 1);
  static_assert(kRows == kWarps * kRowBlocks * 16);
};

template <class T, class Shape>
struct SharedLinear {
  struct Slot {
    T keys[Shape::kKeys * Shape::kHeadDim];
    T values[Shape::kKeys * Shape::kHeadDim];
  };
  alignas(16) T queries[Shape::kRows * Shape::kHeadDim];  // in the end: outputs
  alignas(16) Slot slots[Shape::kSlots];
};

// Starts to bring features [first, first + kKeys) of the tile's state.
template <class T, class Shape>
EFFC_DEVICE void start_copying_state(const LinearCall& call, const LinearTile& tile, int first,
                                     typename SharedLinear<T, Shape>::Slot& slot) {
  const int dim = static_cast<int>(call.problem.head_dim);
  const T* lines = static_cast<const T*>(call.schedule.means) + (tile.state * dim + first) * dim;
  start_copying_rows<Shape::kKeys, Shape, Shape::kThreads>(slot.values, smaller(dim - first, Shape::kKeys), dim,
                                                           static_cast<int>(threadIdx.x),
                                                           [&](int r) { return lines + r * dim; });
}

// Starts to bring keys [first, first + kKeys) and their values.
template <class T, class Shape>
EFFC_DEVICE void start_copying_pairs(const LinearAttention& problem, const LinearTile& tile, Position first,
                                     typename SharedLinear<T, Shape>::Slot& slot) {
  const int dim = static_cast<int>(problem.head_dim), count = smaller(tile.keys.end - first, Shape::kKeys);
  const int64_t stride = problem.kv_num_heads * problem.head_dim;
  const int64_t row = (tile.batch_index * problem.kv_len + first) * stride + tile.kv_head * problem.head_dim;
  const T* keys = static_cast<const T*>(problem.key) + row;
  const T* values = static_cast<const T*>(problem.value) + row;
  const int thread = static_cast<int>(threadIdx.x);
  start_copying_rows<Shape::kKeys, Shape, Shape::kThreads>(slot.keys, count, dim, thread,
                                                           [&](int r) { return keys + r * stride; });
  start_copying_rows<Shape::kKeys, Shape, Shape::kThreads>(slot.values, count, dim, thread,
                                                           [&](int r) { return values + r * stride; });
}

// The weights of features [first, first + kKeys) of the state: the queries' features times the state's normaliser.
template <class T, class Shape>
EFFC_DEVICE void weigh_features(const T* queries, const float* totals, int first, int dim, WarpTile<T, Shape>& warp) {
  using Rows = SwizzledRows<Shape::kHeadDim>;
  EFFC_UNROLL
  for (int block = 0; block < WarpTile<T, Shape>::kKeyBlocks; ++block) {
    const int feature = first + column_of(2 * block, warp.lane);
    const bool is_one = feature < dim;  // and so is the next: heads have an even number of features
    const float total = is_one ? totals[feature] : 0.0f, next_total = is_one ? totals[feature + 1] : 0.0f;
    EFFC_UNROLL
    for (int half = 0; half < 2; ++half) {
      uint32_t pair = 0;
      if (is_one) {
        const T* place = queries + Rows::at(warp.row(0, half), feature / kChunk) + feature % kChunk;
        pair = *reinterpret_cast<const uint32_t*>(place);
      }
      warp.scores[0].of(half, 2 * block) = first_of_pair<T>(pair) * total;
      warp.scores[0].of(half, 2 * block + 1) = second_of_pair<T>(pair) * next_total;
    }
  }
}

// Takes the weights of keys behind a query away.
template <class T, class Shape>
EFFC_DEVICE void hide_later(Position first_key, Position first_position, WarpTile<T, Shape>& warp) {
  EFFC_UNROLL
  for (int half = 0; half < 2; ++half) {
    const Position position = first_position + warp.row(0, half);
    EFFC_UNROLL
    for (int n = 0; n < 2 * WarpTile<T, Shape>::kKeyBlocks; ++n) {
      if (first_key + column_of(n, warp.lane) > position) warp.scores[0].of(half, n) = 0.0f;
    }
  }
}

// Weights become shares of all weights so far, `denominator`, and the outputs so far shrink by what has been added:
// they are means at any time, so that no sum grows beyond what the 16-bit type holds.
template <class T, class Shape>
EFFC_DEVICE void turn_into_shares(float (&denominator)[2], WarpTile<T, Shape>& warp) {
  constexpr float kSmallestNormal = 1.17549435e-38f;
  EFFC_UNROLL
  for (int half = 0; half < 2; ++half) {
    float sum = 0.0f;
    EFFC_UNROLL
    for (int n = 0; n < 2 * WarpTile<T, Shape>::kKeyBlocks; ++n) sum += warp.scores[0].of(half, n);
    const float total = denominator[half] + sum_of_lanes<4>(sum);
    const float factor = total < kSmallestNormal ? 0.0f : 1.0f / total;
    const float kept = denominator[half] * factor;
    denominator[half] = total;
    EFFC_UNROLL
    for (int n = 0; n < 2 * WarpTile<T, Shape>::kKeyBlocks; ++n) warp.scores[0].of(half, n) *= factor;
    EFFC_UNROLL
    for (int n = 0; n < 2 * WarpTile<T, Shape>::kDimBlocks; ++n) warp.outputs[0].of(half, n) *= kept;
  }
}

template <class T, class Shape>
EFFC_KERNEL(Shape::kThreads, Shape::kBlocksPerMultiprocessor)
attend_linear(EFFC_CONSTANT LinearCall call) {
  using Rows = SwizzledRows<Shape::kHeadDim>;
  const LinearAttention& problem = call.problem;
  auto& shared = *reinterpret_cast<SharedLinear<T, Shape>*>(shared_memory());
  const LinearTile tile = linear_tile(problem, call.schedule, blockIdx.x);
  const int dim = static_cast<int>(problem.head_dim), thread = static_cast<int>(threadIdx.x);
  const int64_t line = problem.num_heads * problem.head_dim;
  const int64_t first_row = (tile.batch_index * problem.q_len + tile.first_query) * line + tile.head * problem.head_dim;
  const Position first_position = tile.first_query + static_cast<Position>(problem.kv_len - problem.q_len);
  const uint8_t* key_mask =
      problem.key_mask == nullptr ? nullptr : problem.key_mask + tile.batch_index * problem.kv_len;

  WarpTile<T, Shape> warp;
  warp.lane = thread % kWarpSize;
  warp.first_row = thread / kWarpSize * 16;
  warp.outputs[0] = {};
  float denominator[2] = {};

  // Tiles of the state come first, then tiles of keys.
  const int state_tiles = tile.has_state ? (dim + Shape::kKeys - 1) / Shape::kKeys : 0;
  const int tiles = state_tiles + (tile.keys.end - tile.keys.begin + Shape::kKeys - 1) / Shape::kKeys;
  const auto supply = [&](int number) {
    auto& slot = shared.slots[number % Shape::kSlots];
    if (number < state_tiles) {
      start_copying_state<T, Shape>(call, tile, number * Shape::kKeys, slot);
    } else if (number < tiles) {
      start_copying_pairs<T, Shape>(problem, tile, tile.keys.begin + (number - state_tiles) * Shape::kKeys, slot);
    }
    end_copy_group();
  };
  const T* rows = static_cast<const T*>(problem.query) + first_row;
  start_copying_rows<Shape::kRows, Shape, Shape::kThreads>(shared.queries, tile.query_count, dim, thread,
                                                           [&](int r) { return rows + r * line; });
  supply(0);
  EFFC_ROLLED
  for (int number = 0; number < tiles; ++number) {
    auto& slot = shared.slots[number % Shape::kSlots];
    supply(number + 1);
    wait_for_copies<1>();
    synchronise_block();
    if (number == 0) map_queries<Rows>(shared.queries, warp.first_row, problem.map, dim, warp.lane);
    if (number < state_tiles) {
      weigh_features(shared.queries, call.schedule.totals + tile.state * dim, number * Shape::kKeys, dim, warp);
    } else {
      const Position first_key = tile.keys.begin + (number - state_tiles) * Shape::kKeys;
      map_keys<Shape::kKeys, Rows, Shape::kThreads>(slot.keys, {first_key, tile.keys.end}, key_mask, problem.map, dim,
                                                    thread);
      synchronise_block();
      multiply_keys(shared.queries, slot.keys, warp);
      if (first_key + Shape::kKeys > first_position) hide_later(first_key, first_position, warp);
    }
    turn_into_shares(denominator, warp);
    multiply_values(slot.values, warp);
    synchronise_block();
  }
  wait_for_copies<0>();
  write_rows(
      shared.queries, warp, tile.query_count, dim, [](int, int) { return 1.0f; },
      [&](int r) { return static_cast<T*>(problem.output) + first_row + r * line; });
}

}  // namespace effc::cuda
