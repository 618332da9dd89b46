// The first kernel of linear attention: sums of phi(k) v^T over segments of keys, on tensor cores.
#pragma once

#include "cuda/linear_features.cuh"
#include "cuda/online_softmax.cuh"

namespace effc::cuda {

// A block sums up kFeatureSlice features of keys times kFeatureSlice numbers of values, a warp 16 features of them.
struct SumsShape {
  static constexpr int kHeadDim = kFeatureSlice;
  static constexpr int kKeys = 64;
  static constexpr int kSlots = 2;
  static constexpr int kThreads = kFeatureSlice / 16 * kWarpSize;
};

template <class T>
struct SharedSums {
  struct Slot {
    T keys[SumsShape::kKeys * kFeatureSlice];
    T values[SumsShape::kKeys * kFeatureSlice];
  };
  alignas(16) Slot slots[SumsShape::kSlots];
};

// The work of one block.
struct SumsTile {
  int32_t batch_index;
  int32_t kv_head;
  int32_t first_feature;
  int32_t first_number;  // of the values
  Range keys;
  int64_t segment;  // number of the segment in `sums`
};

EFFC_DEVICE SumsTile sums_tile(const LinearCall& call, uint32_t block) {
  const LinearSchedule& schedule = call.schedule;
  const uint32_t slices = static_cast<uint32_t>(schedule.slices), segments = static_cast<uint32_t>(schedule.segments);
  SumsTile tile;
  tile.first_number = static_cast<int32_t>(block % slices) * kFeatureSlice;
  block /= slices;
  tile.first_feature = static_cast<int32_t>(block % slices) * kFeatureSlice;
  block /= slices;
  tile.segment = block;
  const Position first_key = static_cast<Position>(block % segments) * schedule.keys_per_segment;
  tile.keys = {first_key, smaller(first_key + schedule.keys_per_segment, static_cast<Position>(call.problem.kv_len))};
  block /= segments;
  tile.kv_head = static_cast<int32_t>(block % static_cast<uint32_t>(call.problem.kv_num_heads));
  tile.batch_index = static_cast<int32_t>(block / static_cast<uint32_t>(call.problem.kv_num_heads));
  return tile;
}

inline int64_t sums_blocks(const LinearCall& call) {
  const LinearSchedule& schedule = call.schedule;
  return call.problem.batch * call.problem.kv_num_heads * schedule.segments * schedule.slices * schedule.slices;
}

// Starts to bring the keys from `first` on and their values, as a group of copies that may be empty.
template <class T>
EFFC_DEVICE void start_copying_slices(const LinearAttention& problem, const SumsTile& tile, Position first,
                                      typename SharedSums<T>::Slot& slot) {
  const int count = smaller(tile.keys.end - first, SumsShape::kKeys);
  if (count > 0) {
    const int thread = static_cast<int>(threadIdx.x), dim = static_cast<int>(problem.head_dim);
    const int64_t stride = problem.kv_num_heads * problem.head_dim;
    const int64_t row = (tile.batch_index * problem.kv_len + first) * stride + tile.kv_head * problem.head_dim;
    const T* keys = static_cast<const T*>(problem.key) + row + tile.first_feature;
    const T* values = static_cast<const T*>(problem.value) + row + tile.first_number;
    start_copying_rows<SumsShape::kKeys, SumsShape, SumsShape::kThreads>(
        slot.keys, count, dim - tile.first_feature, thread, [&](int r) { return keys + r * stride; });
    start_copying_rows<SumsShape::kKeys, SumsShape, SumsShape::kThreads>(
        slot.values, count, dim - tile.first_number, thread, [&](int r) { return values + r * stride; });
  }
  end_copy_group();
}

// sums [16][kFeatureSlice] of the warp's features += features^T * values; normaliser += the features' own sums.
template <class T>
EFFC_DEVICE void add_tile(const typename SharedSums<T>::Slot& slot, int warp, int lane,
                          RowSums<kFeatureSlice / 8>& sums, float (&normaliser)[4]) {
  using Rows = SwizzledRows<kFeatureSlice>;
  const uint32_t ones = pack<T>(1.0f, 1.0f);
  // Transposed, matrices 0 and 1 are the two halves of 16 features for the first eight keys, 2 and 3 for the others.
  const auto key_places = Rows::places(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  const auto value_places = Rows::places(lane % 16, lane / 16);
  EFFC_UNROLL
  for (int step = 0; step < SumsShape::kKeys / 16; ++step) {
    uint32_t features[4];
    load_matrices_transposed(features, slot.keys + key_places.at(16 * step, warp));
    multiply_add<T>(normaliser, features, ones, ones);
    EFFC_UNROLL
    for (int pair = 0; pair < kFeatureSlice / 16; ++pair) {
      uint32_t values[4];
      load_matrices_transposed(values, slot.values + value_places.at(16 * step, pair));
      multiply_add<T>(sums.at[2 * pair], features, values[0], values[1]);
      multiply_add<T>(sums.at[2 * pair + 1], features, values[2], values[3]);
    }
  }
}

template <class T>
EFFC_KERNEL(SumsShape::kThreads, 4)
sum_keys(EFFC_CONSTANT LinearCall call) {
  const LinearAttention& problem = call.problem;
  auto& shared = *reinterpret_cast<SharedSums<T>*>(shared_memory());
  const int warp = static_cast<int>(threadIdx.x / kWarpSize), lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int dim = static_cast<int>(problem.head_dim);
  const SumsTile tile = sums_tile(call, blockIdx.x);
  const uint8_t* key_mask =
      problem.key_mask == nullptr ? nullptr : problem.key_mask + tile.batch_index * problem.kv_len;

  RowSums<kFeatureSlice / 8> sums = {};
  float normaliser[4] = {};
  start_copying_slices<T>(problem, tile, tile.keys.begin, shared.slots[0]);
  int number = 0;
  EFFC_ROLLED
  for (Position first = tile.keys.begin; first < tile.keys.end; first += SumsShape::kKeys) {
    auto& slot = shared.slots[number++ % SumsShape::kSlots];
    start_copying_slices<T>(problem, tile, first + SumsShape::kKeys, shared.slots[number % SumsShape::kSlots]);
    wait_for_copies<1>();
    synchronise_block();
    map_keys<SumsShape::kKeys, SwizzledRows<kFeatureSlice>, SumsShape::kThreads>(
        slot.keys, {first, tile.keys.end}, key_mask, problem.map, dim - tile.first_feature,
        static_cast<int>(threadIdx.x));
    synchronise_block();
    add_tile<T>(slot, warp, lane, sums, normaliser);
    synchronise_block();
  }
  wait_for_copies<0>();

  EFFC_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int feature = tile.first_feature + 16 * warp + 8 * half + lane / 4;
    if (feature >= dim) continue;
    const int64_t line = tile.segment * dim + feature;
    EFFC_UNROLL
    for (int n = 0; n < kFeatureSlice / 4; ++n) {
      const int d = tile.first_number + column_of(n, lane);
      if (d < dim) call.schedule.sums[line * dim + d] = sums.of(half, n);
    }
    if (tile.first_number == 0 && lane % 4 == 0) call.schedule.normalisers[line] = normaliser[2 * half];
  }
}

}  // namespace effc::cuda
