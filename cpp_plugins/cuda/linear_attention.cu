// Chooses kernels for a problem of linear attention and queues them.
#include <initializer_list>

#include "cuda/linear_attention.hpp"
#include "cuda/linear_kernels.hpp"
#include "cuda/linear_scalar.cuh"
#include "cuda/linear_states.cuh"
#include "cuda/linear_step.cuh"
#include "cuda/linear_sums.cuh"

namespace effc::cuda {
namespace {

constexpr int64_t kMaxBlocks = 2147483647;

struct HeadSize {
  int head_dim;
  int (*launch)(const LinearCall&, void*);
};
constexpr HeadSize kHeadSizes[] = {{32, launch_linear<32>}, {64, launch_linear<64>},   {80, launch_linear<80>},
                                   {96, launch_linear<96>}, {128, launch_linear<128>}, {256, launch_linear<256>}};

// The smallest that fits, or null if tensor cores do not take this problem.
const HeadSize* head_size_for(const LinearAttention& problem) {
  constexpr uintptr_t kCopyBytes = 16;
  constexpr int kNumbersPerCopy = 8;
  if (problem.number == Number::kFloat || problem.head_dim % kNumbersPerCopy != 0) return nullptr;
  for (const void* tensor : {problem.query, problem.key, problem.value, static_cast<const void*>(problem.output)}) {
    if (reinterpret_cast<uintptr_t>(tensor) % kCopyBytes != 0) return nullptr;
  }
  for (const HeadSize& size : kHeadSizes) {
    if (problem.head_dim <= size.head_dim) return &size;
  }
  return nullptr;
}

// float has no tensor cores here, and its head_size_for is null.
template <class T>
int launch_sums(const LinearCall& call, void* stream) {
  return launch_kernel(sum_keys<T>, sums_blocks(call), SumsShape::kThreads, sizeof(SharedSums<T>), stream, call);
}
template <>
int launch_sums<float>(const LinearCall&, void*) {
  return 1;  // cudaErrorInvalidValue
}

template <class T>
int launch_tensor_cores(LinearCall& call, const HeadSize& size, void* stream) {
  int error = call.schedule.segments == 0 ? 0 : launch_sums<T>(call, stream);
  if (error == 0) {
    error = launch_kernel(add_segments<T>, state_blocks(call), kStateThreads, 0, stream, call);
  }
  return error == 0 && call.problem.q_len > 0 ? size.launch(call, stream) : error;
}

template <class T>
int launch_plainly(LinearCall& call, void* stream) {
  int error = 0;
  if (call.schedule.segments > 0) {
    error = launch_kernel(sum_keys_plainly<T>, scalar_sums_blocks(call), kLinearThreads, 0, stream, call);
  }
  if (error == 0) {
    error = launch_kernel(add_segments<float>, state_blocks(call), kStateThreads, 0, stream, call);
  }
  if (error != 0 || call.problem.q_len == 0) return error;
  return launch_kernel(attend_linear_rows<T>, linear_row_blocks(call), kLinearThreads,
                       linear_shared_bytes(call.problem.head_dim), stream, call);
}

template <class T>
int launch_kernels(const LinearAttention& problem, void* workspace, void* stream) {
  LinearCall call{problem, {}};
  if (is_step(problem)) {
    return launch_kernel(step_linear<T>, step_blocks(problem), kStepThreads, sizeof(SharedStep), stream, call);
  }
  const HeadSize* size = head_size_for(problem);
  call.schedule = linear_schedule_for(problem, size == nullptr ? sizeof(float) : sizeof(T), workspace);
  return size == nullptr ? launch_plainly<T>(call, stream) : launch_tensor_cores<T>(call, *size, stream);
}

}  // namespace

const char* refusal(const LinearAttention& problem, int capability) {
  if (capability < 80) return "effc's CUDA kernels need a device of compute capability 8.0 or newer.";
  if (problem.batch < 0 || problem.q_len < 0 || problem.kv_len < 0) return "a dimension is negative.";
  if (problem.q_len > kMaxLength || problem.kv_len > kMaxLength) {
    return "sequences longer than 536870912 are not supported.";
  }
  if (problem.num_heads < 1 || problem.kv_num_heads < 1 || problem.num_heads % problem.kv_num_heads != 0) {
    return "num_heads must be a multiple of kv_num_heads, and both at least 1.";
  }
  if (problem.head_dim < 1 || problem.head_dim > kLinearMaxHeadDim) {
    return "head_dim must be 1 to 512. Leave this layer to the function body.";
  }
  if (problem.causal && problem.q_len > problem.kv_len) {
    return "there are more queries than keys. Causal queries are the last positions of the keys, so pass past and "
           "present keys together.";
  }
  if (!problem.causal && (problem.past_state != nullptr || problem.present_state != nullptr)) {
    return "only causal attention has a state to go on from.";
  }
  // Of the smallest tiles of each kernel.
  const int64_t row_blocks = problem.batch * problem.num_heads * (problem.q_len / kLinearWarps + kLinearRows);
  const int64_t parts = divide_up(problem.head_dim, kFeaturesOfWarp) * divide_up(problem.head_dim, kWarpSize);
  const int64_t sums = problem.batch * problem.kv_num_heads * (divide_up(problem.kv_len, kSegment) + 1) * parts;
  if (row_blocks > kMaxBlocks || sums > kMaxBlocks || state_blocks({problem, {}}) > kMaxBlocks) {
    return "the problem has too many rows for one launch. Use a smaller batch.";
  }
  return nullptr;
}

int launch(const LinearAttention& problem, void* workspace, void* stream) {
  // Without queries there may still be a state to write.
  if (problem.batch == 0 || (problem.q_len == 0 && problem.present_state == nullptr)) return 0;
  switch (problem.number) {
    case Number::kFloat:
      return launch_kernels<float>(problem, workspace, stream);
    case Number::kHalf:
      return launch_kernels<Half>(problem, workspace, stream);
    case Number::kBFloat16:
      return launch_kernels<BFloat16>(problem, workspace, stream);
  }
  return 1;  // cudaErrorInvalidValue
}

}  // namespace effc::cuda
