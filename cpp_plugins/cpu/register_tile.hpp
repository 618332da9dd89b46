// Register tiles: rows of elements times vectors, with the sums in registers.
#pragma once

#include "cpu/attention_common.hpp"

namespace effc::cpu {
namespace {

// How many of `rows` rows to take at a time, so that there are registers for the sums of `vectors` vectors.
constexpr int rows_at_once(int rows, int vectors) {
  return rows * vectors <= Simd::kTileSums ? rows : rows_at_once((rows + 1) / 2, vectors);
}

// sums[r][v] += element(r) * vector(v). The fewer of the two stay in registers while the others pass by.
template <class Arithmetic, int kRows, int kVectors, class Element, class Vector>
inline void add_products(Float (&sums)[kRows][kVectors], Element element, Vector vector) {
  if constexpr (kRows < kVectors) {
    Float elements[kRows];
    EFFC_UNROLL
    for (int r = 0; r < kRows; ++r) elements[r] = element(r);
    EFFC_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const Float passing = vector(v);
      EFFC_UNROLL
      for (int r = 0; r < kRows; ++r) sums[r][v] = Arithmetic::multiply_add(elements[r], passing, sums[r][v]);
    }
  } else {
    Float vectors[kVectors];
    EFFC_UNROLL
    for (int v = 0; v < kVectors; ++v) vectors[v] = vector(v);
    EFFC_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Float passing = element(r);
      EFFC_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[r][v] = Arithmetic::multiply_add(passing, vectors[v], sums[r][v]);
    }
  }
}

}  // namespace
}  // namespace effc::cpu
