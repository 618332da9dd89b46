// Feature maps of linear attention, a chunk of rows at a time.
#pragma once

#include "cpu/linear_attention.hpp"
#include "cpu/matrix_tile.hpp"

namespace effc::cpu {
namespace {

static_assert(kLinePadding % kWidth == 0, "lines hold whole vectors");

// e^x for x <= 0.
inline Float exp_nonpositive(Float x) {
  return exp2_nonpositive(Simd::max(Simd::broadcast(-125.0f), Simd::mul(x, Simd::broadcast(kLog2E))));
}
inline float exp_nonpositive(float x) {
  float lanes[kWidth];
  Simd::store(lanes, exp_nonpositive(Simd::broadcast(x)));
  return lanes[0];
}

inline float sum_of_products(const float* a, const float* b, int64_t padded) {
  Float sum = Simd::zero();
  for (int64_t n = 0; n < padded; n += kWidth) sum = Simd::multiply_add(Simd::load(a + n), Simd::load(b + n), sum);
  return Simd::sum(sum);
}

inline Float load_padded(const float* row, int64_t first, int64_t count) {
  return first + kWidth <= count ? Simd::load(row + first)
                                 : Simd::load_first(row + first, static_cast<int>(count - first));
}

// elu(x) + 1 or max(x, 0); zero behind the last number.
template <bool kElu>
inline void map_elements(const float* from, int64_t count, float* features) {
  const int64_t padded = padded_line(count);
  for (int64_t n = 0; n < padded; n += kWidth) {
    if (n >= count) {
      Simd::store(features + n, Simd::zero());
      continue;
    }
    const Float x = load_padded(from, n, count);
    // The operand behind the comma comes through if x is no number.
    const Float positive = Simd::max(Simd::zero(), x);
    Float result = positive;
    if (kElu) result = Simd::add(positive, exp_nonpositive(Simd::sub(x, positive)));
    const int64_t left = count - n;
    if (left < kWidth) result = Simd::select_or_zero(Simd::mask(low_bits(static_cast<Position>(left))), result);
    Simd::store(features + n, result);
  }
}

inline float largest_of(const float* numbers, int64_t count) {
  float largest = numbers[0];
  for (int64_t n = 1; n < count; ++n) largest = numbers[n] > largest ? numbers[n] : largest;
  return largest;
}

// features = exp(projected - its largest), in place; returns the largest.
inline float exponentiate(float* features, int64_t count) {
  const float largest = largest_of(features, count);
  const int64_t padded = padded_line(count);
  for (int64_t n = 0; n < padded; n += kWidth) {
    const Float weight = exp_nonpositive(Simd::sub(Simd::load(features + n), Simd::broadcast(largest)));
    const int64_t left = count - n;
    const int lanes = static_cast<int>(left < 0 ? 0 : (left < kWidth ? left : kWidth));
    Simd::store(features + n, Simd::select_or_zero(Simd::mask(low_bits(lanes)), weight));
  }
  return largest;
}

// softmax([p, -p])
inline void softmax_both_signs(const float* projected, int64_t head_dim, float* features) {
  float largest = 0;
  for (int64_t d = 0; d < head_dim; ++d) {
    const float size = projected[d] < 0 ? -projected[d] : projected[d];
    largest = size > largest || size != size ? size : largest;
  }
  float sum = 0;
  for (int64_t d = 0; d < head_dim; d += kWidth) {
    float positive[kWidth], negative[kWidth];
    const Float p = Simd::load(projected + d);
    Simd::store(positive, exp_nonpositive(Simd::sub(p, Simd::broadcast(largest))));
    Simd::store(negative, exp_nonpositive(Simd::sub(Simd::sub(Simd::zero(), p), Simd::broadcast(largest))));
    for (int lane = 0; lane < kWidth && d + lane < head_dim; ++lane) {
      features[d + lane] = positive[lane];
      features[head_dim + d + lane] = negative[lane];
      sum += positive[lane] + negative[lane];
    }
  }
  for (int64_t n = 0; n < 2 * head_dim; ++n) features[n] /= sum;
  for (int64_t n = 2 * head_dim; n < padded_line(2 * head_dim); ++n) features[n] = 0;
}

// Rows of `heads` neighbouring heads. Row r of head h begins at rows + r * stride + h * head_dim.
struct HeadRows {
  const float* rows;
  int64_t stride;
  int64_t heads;
  int count;      // of rows
  int64_t ahead;  // rows behind the last that will be wanted next
};

// Asks for a row of all heads some rows before it is read: as far as the memory is away, and no further than fits the
// first-level cache.
inline void prefetch_ahead(const HeadRows& from, int64_t head_dim, int row) {
  constexpr int kRowsBefore = 4;
  if (row + kRowsBefore >= from.count + from.ahead) return;
  const float* begin = from.rows + (row + kRowsBefore) * from.stride;
  for (int64_t d = 0; d < from.heads * head_dim; d += kCacheLine) __builtin_prefetch(begin + d);
}

template <bool kElu>
inline void map_rows_by_element(const HeadRows& from, int64_t head_dim, float* features) {
  const int64_t line = padded_line(head_dim);
  for (int r = 0; r < from.count; ++r) {
    prefetch_ahead(from, head_dim, r);
    const float* row = from.rows + r * from.stride;
    for (int64_t head = 0; head < from.heads; ++head) {
      map_elements<kElu>(row + head * head_dim, head_dim, features + (head * kChunk + r) * line);
    }
  }
}

// features [heads][kChunk][padded features]. `matrices` are the map's, one per head if it has one per head; `exponents`
// [heads][kChunk] those of a stabilised map: null for queries, whose factors cancel.
inline void map_rows(const LinearProblem& problem, const HeadRows& from, const float* matrices,
                     const LinearWorkspace& workspace, float* features, float* exponents) {
  const int64_t head_dim = problem.head_dim, line = padded_line(problem.features), dim_line = padded_line(head_dim);
  switch (problem.map) {
    case FeatureMap::kElu:
      return map_rows_by_element<true>(from, head_dim, features);
    case FeatureMap::kRelu:
      return map_rows_by_element<false>(from, head_dim, features);
    case FeatureMap::kPerformer:
      for (int64_t head = 0; head < from.heads; ++head) {
        const float* rows = from.rows + head * head_dim;
        float* own = features + head * kChunk * line;
        multiply<false>(from.count, line, head_dim, rows, from.stride, 1, matrices, line, own, line);
        for (int r = 0; r < from.count; ++r) {
          const float largest = exponentiate(own + r * line, problem.features);
          if (exponents == nullptr) continue;
          float squares = 0;
          for (int64_t d = 0; d < head_dim; ++d) squares += rows[r * from.stride + d] * rows[r * from.stride + d];
          exponents[head * kChunk + r] = largest - 0.5f * problem.scale * squares;
        }
      }
      return;
    case FeatureMap::kHedgehog:
      for (int64_t head = 0; head < from.heads; ++head) {
        multiply<false>(from.count, dim_line, head_dim, from.rows + head * head_dim, from.stride, 1,
                        matrices + head * head_dim * dim_line, dim_line, workspace.projected, dim_line);
        for (int r = 0; r < from.count; ++r) {
          softmax_both_signs(workspace.projected + r * dim_line, head_dim, features + (head * kChunk + r) * line);
        }
      }
      return;
  }
}

}  // namespace
}  // namespace effc::cpu
