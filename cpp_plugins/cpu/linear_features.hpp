// Feature maps of linear attention, a chunk of rows at a time.
#pragma once

#include "cpu/linear_attention.hpp"
#include "cpu/matrix_tile.hpp"

namespace effc::cpu {
namespace {

static_assert(kLinePadding % kWidth == 0, "lines hold whole vectors");

// e^x for x <= 0.
inline Float exp_nonpositive(Float x) {
  return exp2_above(Simd::mul(x, Simd::broadcast(kLog2E)), -125.0f);
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
    const int lanes = static_cast<int>(count - n < kWidth ? count - n : kWidth);
    Simd::store(features + n, Simd::select_or_zero(Simd::mask(low_bits(lanes)), result));
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

// features [rows][padded features] of `rows` rows that lie `stride` apart. `exponents` [rows] of a stabilised map: null
// for queries, whose factors cancel.
inline void map_rows(const LinearProblem& problem, const float* from, int64_t stride, int rows, const float* matrix,
                     const LinearWorkspace& workspace, float* features, float* exponents) {
  const int64_t head_dim = problem.head_dim, line = padded_line(problem.features), dim_line = padded_line(head_dim);
  switch (problem.map) {
    case FeatureMap::kElu:
      for (int r = 0; r < rows; ++r) map_elements<true>(from + r * stride, head_dim, features + r * line);
      return;
    case FeatureMap::kRelu:
      for (int r = 0; r < rows; ++r) map_elements<false>(from + r * stride, head_dim, features + r * line);
      return;
    case FeatureMap::kPerformer:
      multiply<false>(rows, line, head_dim, from, stride, 1, matrix, line, features, line);
      for (int r = 0; r < rows; ++r) {
        const float largest = exponentiate(features + r * line, problem.features);
        if (exponents == nullptr) continue;
        float squares = 0;
        for (int64_t d = 0; d < head_dim; ++d) squares += from[r * stride + d] * from[r * stride + d];
        exponents[r] = largest - 0.5f * problem.scale * squares;
      }
      return;
    case FeatureMap::kHedgehog:
      multiply<false>(rows, dim_line, head_dim, from, stride, 1, matrix, dim_line, workspace.projected, dim_line);
      for (int r = 0; r < rows; ++r) {
        softmax_both_signs(workspace.projected + r * dim_line, head_dim, features + r * line);
      }
      return;
  }
}

}  // namespace
}  // namespace effc::cpu
