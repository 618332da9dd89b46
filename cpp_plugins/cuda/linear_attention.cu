// Chooses kernels for a problem of linear attention and queues them.
#include "cuda/dispatch.cuh"
#include "cuda/linear_attention.hpp"
#include "cuda/linear_kernels.hpp"
#include "cuda/linear_scalar.cuh"
#include "cuda/linear_states.cuh"
#include "cuda/linear_step.cuh"
#include "cuda/linear_sums.cuh"

namespace effc::cuda {
namespace {

struct HeadSize {
  int head_dim;
  int (*launch)(const LinearCall&, void*);
};
constexpr HeadSize kHeadSizes[] = {{32, launch_linear<32>}, {64, launch_linear<64>},   {80, launch_linear<80>},
                                   {96, launch_linear<96>}, {128, launch_linear<128>}, {256, launch_linear<256>}};

// float has no tensor cores here.
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
  const HeadSize* size = tensor_cores_for(problem, kHeadSizes);
  call.schedule = linear_schedule_for(problem, size == nullptr ? sizeof(float) : sizeof(T), workspace);
  return size == nullptr ? launch_plainly<T>(call, stream) : launch_tensor_cores<T>(call, *size, stream);
}

}  // namespace

const char* refusal(const LinearAttention& problem, int capability) {
  if (const char* reason = size_refusal(problem, capability)) return reason;
  if (problem.number == Number::kE4M3) return "linear attention takes fp32, fp16 and bf16.";
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
    return kTooManyBlocks;
  }
  return nullptr;
}

int launch(const LinearAttention& problem, void* workspace, void* stream) {
  // Without queries there may still be a state to write.
  if (problem.batch == 0 || (problem.q_len == 0 && problem.present_state == nullptr)) return 0;
  return launch_for(problem.number,
                    [&](auto number) { return launch_kernels<decltype(number)>(problem, workspace, stream); });
}

}  // namespace effc::cuda
