// The tile kernel with products of bfloat16 numbers and sums of floats, which AVX512_BF16 computes at twice the rate.
//
// A cell is a pair of numbers: neighbours of head_dim in queries and keys, neighbouring keys in values and weights.
// Each product and sum of two pairs is one instruction. Scores, softmax and outputs stay in float, so that the error is
// that of rounding queries, keys, values and weights to 8 significant bits each.
#pragma once

#include <immintrin.h>

#include "cpu/attention_tile.hpp"

namespace effc::cpu {
namespace {

struct Bf16 {
  static constexpr int kPerCell = 2;

  static Float multiply_add(Float a, Float b, Float c) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }
  // Cells (low[0], low[1]), ..., (high[14], high[15]).
  static Float neighbours(Float low, Float high) {
    return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
  // Cells (first[0], second[0]), ..., (first[15], second[15]).
  static Float pairs(Float first, Float second) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(second, first)));
  }
};

// Lanes [first, first + kWidth) of `count` numbers, zero behind the last.
inline Float load_some(const float* numbers, int64_t first, int64_t count) {
  if (first + kWidth <= count) return Simd::load(numbers + first);
  return first < count ? Simd::load_first(numbers + first, static_cast<int>(count - first)) : Simd::zero();
}

inline void store_some(float* cells, int64_t first, int64_t count, Float x) {
  const int64_t left = count - first;
  _mm512_mask_storeu_ps(cells + first, static_cast<__mmask16>(left >= kWidth ? 0xffff : (1u << left) - 1), x);
}

// One row as cells of neighbours; the number behind an odd last one is zero.
inline void round_row(const float* from, int64_t head_dim, float factor, float* cells) {
  const int64_t count = cells_for<Bf16>(head_dim);
  const Float scale = Simd::broadcast(factor);
  for (int64_t cell = 0; cell < count; cell += kWidth) {
    const Float low = load_some(from, 2 * cell, head_dim), high = load_some(from, 2 * cell + kWidth, head_dim);
    store_some(cells, cell, count, Bf16::neighbours(Simd::mul(low, scale), Simd::mul(high, scale)));
  }
}

inline void load_query(Bf16, const Problem& problem, const QueryTile& tile, const TileLayout& layout,
                       const TileWorkspace& workspace) {
  const int64_t cells = cells_for<Bf16>(problem.head_dim);
  float* rounded = workspace.output;  // not in use yet
  for (int row = 0; row < layout.rows; ++row) {
    const float* from = layout.query + row_offset(problem, tile, layout, row);
    round_row(from, problem.head_dim, problem.scale * kLog2E, rounded + row * cells);
  }
  for (int64_t x = layout.rows * cells; x < kTileRows * cells; ++x) rounded[x] = 0.0f;
  const int64_t whole = cells - cells % kWidth;
  for (int first = 0; first < layout.rows; first += kWidth) {
    for (int64_t cell = 0; cell < whole; cell += kWidth) {
      Simd::transpose<false>(rounded + first * cells + cell, cells, 1.0f, workspace.query + cell * kTileRows + first,
                             kTileRows);
    }
    for (int row = first; row < first + kWidth; ++row) {
      for (int64_t cell = whole; cell < cells; ++cell) {
        workspace.query[cell * kTileRows + row] = rounded[row * cells + cell];
      }
    }
  }
}

// Keys [kKeyTile][cells of head_dim], then values [kKeyTile / 2][whole vectors of head_dim].
inline void pack_rows(Bf16, const float* key, const float* value, int64_t stride, int keys, int64_t head_dim,
                      float* slot) {
  const int64_t cells = cells_for<Bf16>(head_dim);
  for (int j = 0; j < keys; ++j) round_row(key + j * stride, head_dim, 1.0f, slot + j * cells);
  float* values = slot + kKeyTile * cells;
  const int64_t padded = vectors_for(head_dim) * kWidth;
  for (int j = 0; j < keys; j += 2) {
    for (int64_t d = 0; d < padded; d += kWidth) {
      const Float first = load_some(value + j * stride, d, head_dim);
      const Float second = j + 1 < keys ? load_some(value + (j + 1) * stride, d, head_dim) : Simd::zero();
      Simd::store(values + j / 2 * padded + d, Bf16::pairs(first, second));
    }
  }
}

// Values begin with the pair that the first key belongs to.
inline void use_packed(Bf16, const float* slot, int first, int64_t head_dim, KeyBlock& block) {
  const int64_t cells = cells_for<Bf16>(head_dim);
  block.key = slot + first * cells;
  block.stride = cells;
  block.value_stride = vectors_for(head_dim) * kWidth;
  block.value = slot + kKeyTile * cells + first / 2 * block.value_stride;
  block.row_in_panels = -1;
}

// Rounds the weights of the block's `count` keys. The pairs are those of the values: if `lead` is 1, the first pair
// holds a key before the block's first, whose weight is zero.
inline void pair_weights(Bf16, const TileWorkspace& workspace, int vectors, int count, int lead) {
  for (int pair = 0; 2 * pair < count + lead; ++pair) {
    const int j = 2 * pair - lead;
    for (int v = 0; v < vectors; ++v) {
      const float* column = workspace.scores + v * kWidth;
      const Float first = j >= 0 ? Simd::load(column + j * kTileRows) : Simd::zero();
      const Float second = j + 1 < count ? Simd::load(column + (j + 1) * kTileRows) : Simd::zero();
      Simd::store(workspace.weights + pair * kTileRows + v * kWidth, Bf16::pairs(first, second));
    }
  }
}

// A slot of narrower heads would be too small for whole vectors.
constexpr int64_t kNarrowestBf16 = 16;

inline void attend_tile_bf16(const Call& call, const Pass& pass, const QueryTile& tile, Workspace& thread) {
  if (tile.head_count * tile.query_count < kRowsWorthPacking || call.problem.head_dim < kNarrowestBf16) {
    return attend_tile(call, pass, tile, thread);
  }
  const TileLayout layout = layout_of(call, pass, tile);
  if (layout.elsewhere == low_bits(layout.rows)) return;
  attend_rows_of_tile<Bf16>(call, pass, tile, layout, thread);
}

}  // namespace
}  // namespace effc::cpu
