// The kernels for callers without C++: benchmarks/cuda_device.py through ctypes.
#include <string>

#include "cuda/linear_attention.hpp"
#include "cuda/sparse_attention.hpp"
#include "pattern/parse.hpp"

#define EFFC_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using effc::AttentionSizes;
using effc::cuda::AttentionTensors;

// The build is for the device at hand, whatever that is; launch fails on an older one.
constexpr int kOldestCapability = 80, kOldestWithE4M3 = 89;

// Null if the work is queued, else what is wrong, valid until the next call.
template <class Problem>
const char* queue(const Problem& problem, void* workspace, int64_t workspace_bytes, void* stream) {
  static std::string message;
  const int capability = problem.number == effc::cuda::Number::kE4M3 ? kOldestWithE4M3 : kOldestCapability;
  if (const char* refusal = effc::cuda::refusal(problem, capability)) return refusal;
  if (effc::cuda::workspace_bytes(problem) > static_cast<size_t>(workspace_bytes)) return "the workspace is too small.";
  const int error = effc::cuda::launch(problem, workspace, stream);
  if (error == 0) return nullptr;
  message = "CUDA error " + std::to_string(error);
  return message.c_str();
}

}  // namespace

// Tensors without mask, marks and biases. Null if the work is queued, else what is wrong, valid until the next call.
EFFC_EXPORT const char* effc_cuda_sparse_attention(const void* query, const void* key, const void* value, void* output,
                                                   void* workspace, int64_t workspace_bytes, int64_t batch,
                                                   int64_t q_len, int64_t kv_len, int64_t num_heads,
                                                   int64_t kv_num_heads, int64_t head_dim, float scale, int number,
                                                   const char* pattern, int causal, void* stream) {
  static std::string message;
  const AttentionSizes sizes = {batch, q_len, kv_len, num_heads, kv_num_heads, head_dim};
  effc::cuda::SparseAttention problem{};
  message = effc::parse_pattern(pattern, causal != 0, problem.pattern);
  if (!message.empty()) return message.c_str();
  static_cast<AttentionTensors&>(problem) = {
      sizes, query, key, value, nullptr, output, static_cast<effc::cuda::Number>(number)};
  problem.scale = scale;
  return queue(problem, workspace, workspace_bytes, stream);
}

// The same of E4M3 numbers with a scale for each tensor; `output_number` says whether the output is fp16 or bf16.
EFFC_EXPORT const char* effc_cuda_sparse_attention_e4m3(const void* query, const void* key, const void* value,
                                                        void* output, void* workspace, int64_t workspace_bytes,
                                                        int64_t batch, int64_t q_len, int64_t kv_len, int64_t num_heads,
                                                        int64_t kv_num_heads, int64_t head_dim, float scale,
                                                        float query_scale, float key_scale, float value_scale,
                                                        int output_number, const char* pattern, int causal,
                                                        void* stream) {
  static std::string message;
  const AttentionSizes sizes = {batch, q_len, kv_len, num_heads, kv_num_heads, head_dim};
  effc::cuda::SparseAttention problem{};
  message = effc::parse_pattern(pattern, causal != 0, problem.pattern);
  if (!message.empty()) return message.c_str();
  static_cast<AttentionTensors&>(problem) = {sizes, query, key, value, nullptr, output, effc::cuda::Number::kE4M3};
  problem.scale = scale;
  problem.eight_bit = {query_scale, key_scale, value_scale, static_cast<effc::cuda::Number>(output_number)};
  return queue(problem, workspace, workspace_bytes, stream);
}

// Linear attention, `map` 0 for elu and 1 for relu. `past` and `present` hold a state and behind it its normaliser, or
// are null.
EFFC_EXPORT const char* effc_cuda_linear_attention(const void* query, const void* key, const void* value, void* output,
                                                   const float* past, float* present, void* workspace,
                                                   int64_t workspace_bytes, int64_t batch, int64_t q_len,
                                                   int64_t kv_len, int64_t num_heads, int64_t kv_num_heads,
                                                   int64_t head_dim, int number, int map, int causal, void* stream) {
  const int64_t state_size = batch * kv_num_heads * head_dim * head_dim;
  const AttentionSizes sizes = {batch, q_len, kv_len, num_heads, kv_num_heads, head_dim};
  effc::cuda::LinearAttention problem{};
  static_cast<AttentionTensors&>(problem) = {
      sizes, query, key, value, nullptr, output, static_cast<effc::cuda::Number>(number)};
  problem.past_state = past;
  problem.past_normaliser = past == nullptr ? nullptr : past + state_size;
  problem.present_state = present;
  problem.present_normaliser = present == nullptr ? nullptr : present + state_size;
  problem.map = static_cast<effc::cuda::FeatureMap>(map);
  problem.causal = causal != 0;
  return queue(problem, workspace, workspace_bytes, stream);
}
