// Weighted sums of values, which every kernel for softmax attention ends with.
#pragma once

#include "cpu/register_tile.hpp"

namespace effc::cpu {
namespace {

// output[r] = output[r] * rescale[r] + sum over j of weight[j, r] * value[j], for kRows rows and kVectors vectors of
// head_dim. The accumulators stay in registers; the rescale of the online softmax costs one multiplication on the way
// in. weight[j, r] lies at weights[j * kKeyStep + r * kRowStep]. Where a cell is a pair of numbers, j counts pairs.
template <class Arithmetic, int kRows, int kVectors, bool kPartial, int kKeyStep, int kRowStep>
EFFC_NOINLINE void accumulate_tile(const float* weights, const float* value, int64_t value_stride, int keys,
                                   int last_lanes, const float* rescale, float* output, int64_t output_stride) {
  Float sums[kRows][kVectors];
  EFFC_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const Float factor = Simd::broadcast(rescale[r]);
    EFFC_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = Simd::mul(factor, Simd::load(output + r * output_stride + v * kWidth));
    }
  }
  EFFC_UNROLL
  for (int j = 0; j < keys; ++j) {
    const float* row = value + j * value_stride;
    add_products<Arithmetic>(
        sums, [&](int r) { return Simd::broadcast(weights[j * kKeyStep + r * kRowStep]); },
        [&](int v) {
          return kPartial && v == kVectors - 1 ? Simd::load_first(row + v * kWidth, last_lanes)
                                               : Simd::load(row + v * kWidth);
        });
  }
  EFFC_UNROLL
  for (int r = 0; r < kRows; ++r) {
    EFFC_UNROLL
    for (int v = 0; v < kVectors; ++v) Simd::store(output + r * output_stride + v * kWidth, sums[r][v]);
  }
}

constexpr int64_t kWidestPanel = Simd::kTileVectors * kWidth;  // in columns

// head_dim is cut into panels of columns, each as wide as a register tile; the last two are of nearly equal width.
struct Panel {
  int64_t column;   // the first
  int64_t columns;  // of head_dim
  int vectors;      // that hold them
};

inline Panel panel_from(int64_t column, int64_t head_dim) {
  const int left = vectors_for(head_dim - column);
  const bool last_two = Simd::kTileVectors < left && left < 2 * Simd::kTileVectors;
  const int vectors = last_two ? (left + 1) / 2 : (left < Simd::kTileVectors ? left : Simd::kTileVectors);
  const int64_t columns = head_dim - column < vectors * kWidth ? head_dim - column : vectors * kWidth;
  return {column, columns, vectors};
}

inline int panels_of(int64_t head_dim) {
  return (vectors_for(head_dim) + Simd::kTileVectors - 1) / Simd::kTileVectors;
}

template <class Arithmetic, int kRows, int kVectors, bool kPartial, int kKeyStep, int kRowStep>
inline void accumulate_vectors(const float* weights, const float* value, int64_t value_stride, int keys, int last_lanes,
                               const float* rescale, float* output, int64_t output_stride) {
  constexpr int kAtOnce = rows_at_once(kRows, kVectors);
  static_assert(kRows % kAtOnce == 0, "rows are taken in equal parts");
  for (int r = 0; r < kRows; r += kAtOnce) {
    accumulate_tile<Arithmetic, kAtOnce, kVectors, kPartial, kKeyStep, kRowStep>(
        weights + r * kRowStep, value, value_stride, keys, last_lanes, rescale + r, output + r * output_stride,
        output_stride);
  }
}

// The same for one panel: `value` and `output` point to its first column.
template <class Arithmetic, int kRows, int kKeyStep, int kRowStep>
inline void accumulate_panel(const Panel& panel, const float* weights, const float* value, int64_t value_stride,
                             int keys, const float* rescale, float* output, int64_t output_stride) {
  const int last_lanes = static_cast<int>(panel.columns - (panel.vectors - 1) * kWidth);
  const bool partial = last_lanes < kWidth;
  const auto run = [&](auto accumulate_some) {
    accumulate_some(weights, value, value_stride, keys, last_lanes, rescale, output, output_stride);
  };
  static_assert(Simd::kTileVectors == 2 || Simd::kTileVectors == 4, "the cases below cover 1 to kTileVectors");
  if (panel.vectors == 1) {
    partial ? run(accumulate_vectors<Arithmetic, kRows, 1, true, kKeyStep, kRowStep>)
            : run(accumulate_vectors<Arithmetic, kRows, 1, false, kKeyStep, kRowStep>);
  } else if (panel.vectors == 2) {
    partial ? run(accumulate_vectors<Arithmetic, kRows, 2, true, kKeyStep, kRowStep>)
            : run(accumulate_vectors<Arithmetic, kRows, 2, false, kKeyStep, kRowStep>);
  } else if constexpr (Simd::kTileVectors > 2) {
    if (panel.vectors == 3) {
      partial ? run(accumulate_vectors<Arithmetic, kRows, 3, true, kKeyStep, kRowStep>)
              : run(accumulate_vectors<Arithmetic, kRows, 3, false, kKeyStep, kRowStep>);
    } else {
      partial ? run(accumulate_vectors<Arithmetic, kRows, 4, true, kKeyStep, kRowStep>)
              : run(accumulate_vectors<Arithmetic, kRows, 4, false, kKeyStep, kRowStep>);
    }
  }
}

// The same for all of head_dim.
template <class Arithmetic, int kRows, int kKeyStep, int kRowStep>
inline void accumulate(const float* weights, const float* value, int64_t value_stride, int keys, int64_t head_dim,
                       const float* rescale, float* output, int64_t output_stride) {
  Panel panel;
  for (int64_t column = 0; column < head_dim; column += panel.columns) {
    panel = panel_from(column, head_dim);
    accumulate_panel<Arithmetic, kRows, kKeyStep, kRowStep>(panel, weights, value + column, value_stride, keys, rescale,
                                                            output + column, output_stride);
  }
}

}  // namespace
}  // namespace effc::cpu
