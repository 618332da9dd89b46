// How a kernel is chosen, for sparse and for linear attention. Host code.
#pragma once

#include <cstddef>
#include <initializer_list>

#include "cuda/attention_tensors.hpp"
#include "cuda/target.cuh"

namespace effc::cuda {

// Of one launch.
constexpr int64_t kMaxBlocks = 2147483647;
constexpr const char* kTooManyBlocks = "the problem has too many rows for one launch. Use a smaller batch.";

// The first of `sizes`, which rise, whose kernels hold the heads, or null if tensor cores do not take the tensors.
template <class HeadSize, size_t count>
const HeadSize* tensor_cores_for(const AttentionTensors& tensors, const HeadSize (&sizes)[count]) {
  constexpr uintptr_t kCopyBytes = 16;
  const auto numbers_per_copy = static_cast<int64_t>(kCopyBytes / bytes_of(tensors.number));
  if (tensors.number == Number::kFloat || tensors.head_dim % numbers_per_copy != 0) return nullptr;
  for (const void* tensor : {tensors.query, tensors.key, tensors.value, static_cast<const void*>(tensors.output)}) {
    if (reinterpret_cast<uintptr_t>(tensor) % kCopyBytes != 0) return nullptr;
  }
  for (const HeadSize& size : sizes) {
    if (tensors.head_dim <= size.head_dim) return &size;
  }
  return nullptr;
}

// launch(T{}) with the type of the numbers, which queues work and returns a cudaError_t.
template <class Launch>
int launch_for(Number number, const Launch& launch) {
  switch (number) {
    case Number::kFloat:
      return launch(float{});
    case Number::kHalf:
      return launch(Half{});
    case Number::kBFloat16:
      return launch(BFloat16{});
    case Number::kE4M3:
      break;  // no input and output of this type have kernels
  }
  return 1;  // cudaErrorInvalidValue
}

}  // namespace effc::cuda
