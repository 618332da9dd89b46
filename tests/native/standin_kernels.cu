// In place of effc's CUDA kernels, which take minutes to compile: the plugin around them is what is tested with these.
#include <cuda_runtime_api.h>

#include "cuda/sparse_attention.hpp"

namespace effc::cuda {

const char* refusal(const SparseAttention& problem, int capability) {
  if (problem.head_dim > 256) return "head_dim is larger than 256.";
  if (capability < 80) return "the device is too old.";
  return nullptr;
}

size_t workspace_bytes(const SparseAttention& problem) { return 256 * static_cast<size_t>(problem.batch); }

int launch(const SparseAttention& problem, void*, void* stream) {
  const size_t number = problem.number == Number::kFloat ? 4 : 2;
  const size_t count = problem.batch * problem.q_len * problem.num_heads * problem.head_dim;
  return cudaMemsetAsync(problem.output, 0, count * number, static_cast<cudaStream_t>(stream));
}

}  // namespace effc::cuda
