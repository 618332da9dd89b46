#include "onnxruntime_cuda/operators.hpp"

#include <cmath>
#include <string>

#include "cpu/operator_glue.hpp"
#include "cuda/device_capability.hpp"
#include "cuda/linear_attention.hpp"
#include "cuda/sparse_attention.hpp"
#include "onnxruntime_cuda/device_memory.hpp"
#include "pattern/parse.hpp"

namespace effc::cuda {
namespace {

using cpu::allocate_output;
using cpu::AttentionAttributes;
using cpu::AttentionCall;
using cpu::Port;
using cpu::read_attention_call;
using cpu::read_attributes;
using cpu::read_input;
using cpu::refuse;
using cpu::Tensor;
using cpu::text_of;

enum Input : size_t { kMarks = cpu::kAttentionInputCount, kDistanceBias, kDistanceSlope };
enum Output : size_t { kAttention, kLogSumExp };

template <Number number>
constexpr Port kNumbers = {
    number == Number::kHalf ? ort::kHalf : (number == Number::kBFloat16 ? ort::kBFloat16 : ort::kFloat),
    ort::kRequired};

// What both kinds of problems have of the call.
AttentionTensors read_tensors(const ort::Api& api, ort::KernelContext* context, const AttentionAttributes& attributes,
                              Number number) {
  // The pointers are the device's, whatever the numbers are.
  const AttentionCall call = read_attention_call(api, context, attributes, kMaxHeadDim);
  return {call, call.query, call.key, call.value, call.key_mask, call.output, number};
}

int capability() {
  int capability = 0;
  const cudaError_t error = device_capability(capability);
  if (error != cudaSuccess) {
    refuse(std::string("this thread's device does not answer: ") + cudaGetErrorString(error) + ".");
  }
  return capability;
}

template <class Problem>
void queue(const ort::Api& api, const ort::KernelContext* context, const Problem& problem) {
  if (problem.batch == 0 || problem.q_len == 0) return;
  if (const char* reason = refusal(problem, capability())) refuse(reason);
  const Workspace workspace(api, context, workspace_bytes(problem));
  const int error = launch(problem, workspace.memory(), stream_of(api, context));
  if (error == cudaSuccess) return;
  const std::string reason = cudaGetErrorString(static_cast<cudaError_t>(error));
  throw cpu::Failure(ort::kRuntimeException, "its kernel cannot be launched: " + reason + ".");
}

template <Number number>
class SparseAttentionKernel {
 public:
  static constexpr const char* kName = "SparseAttention";
  static constexpr Port kInputs[] = {kNumbers<number>,   kNumbers<number>,     kNumbers<number>,    cpu::kOptionalMask,
                                     cpu::kOptionalMask, cpu::kOptionalTensor, cpu::kOptionalTensor};
  static constexpr Port kOutputs[] = {kNumbers<number>, cpu::kOptionalTensor};

  SparseAttentionKernel(const ort::Api& api, const ort::KernelInfo* info)
      : api_(api), attributes_(read_attributes(api, info)) {
    const std::string problem = parse_pattern(attributes_.pattern, attributes_.causal, pattern_);
    if (!problem.empty()) refuse(problem);
  }

  void compute(ort::KernelContext* context) const {
    SparseAttention problem{};
    static_cast<AttentionTensors&>(problem) = read_tensors(api_, context, attributes_, number);
    problem.pattern = pattern_;
    problem.scale = attributes_.scale != 0 ? attributes_.scale : default_scale(problem.head_dim);
    const Tensor marks = read_input(api_, context, kMarks);
    const Tensor bias = read_input(api_, context, kDistanceBias);
    const Tensor slope = read_input(api_, context, kDistanceSlope);
    if (marks.given && marks.shape != std::vector<int64_t>{problem.batch, problem.kv_len}) {
      refuse("marks has shape " + text_of(marks.shape) + "; it must be [batch, kv_len].");
    }
    if (bias.given && (bias.shape.size() != 2 || bias.shape[0] != problem.num_heads || bias.shape[1] % 2 != 1)) {
      refuse("distance_bias has shape " + text_of(bias.shape) + "; it must be [num_heads, 2 * reach + 1].");
    }
    if (slope.given && slope.shape != std::vector<int64_t>{problem.num_heads}) {
      refuse("distance_slope has shape " + text_of(slope.shape) + "; it must be [num_heads].");
    }
    problem.marks = static_cast<const uint8_t*>(marks.data);
    problem.distance_bias = static_cast<const float*>(bias.data);
    problem.bias_reach = bias.given ? static_cast<Position>(bias.shape[1] / 2) : 0;
    problem.distance_slope = static_cast<const float*>(slope.data);
    problem.log_sum_exp = allocate_output(api_, context, kLogSumExp, {problem.batch, problem.num_heads, problem.q_len});
    queue(api_, context, problem);
  }

 private:
  static float default_scale(int64_t head_dim) { return 1.0f / std::sqrt(static_cast<float>(head_dim)); }

  const ort::Api& api_;
  const AttentionAttributes attributes_;
  Pattern pattern_{};
};

template <Number number>
class LinearAttentionKernel {
 public:
  static constexpr const char* kName = "LinearAttention";
  // The last two are the maps of forms that these kernels do not know.
  static constexpr Port kInputs[] = {kNumbers<number>,   kNumbers<number>,     kNumbers<number>,
                                     cpu::kOptionalMask, cpu::kOptionalTensor, cpu::kOptionalTensor};
  static constexpr Port kOutputs[] = {kNumbers<number>};

  LinearAttentionKernel(const ort::Api& api, const ort::KernelInfo* info)
      : api_(api), attributes_(read_attributes(api, info)) {
    const std::string& form = attributes_.pattern;
    if (form == "linear:relu") {
      map_ = FeatureMap::kRelu;
    } else if (form != "linear" && form != "linear:elu") {
      refuse("'" + form +
             "' has no CUDA kernel; linear:elu and linear:relu have. Load the model without this library: "
             "effc.load(..., native=False).");
    }
  }

  void compute(ort::KernelContext* context) const {
    LinearAttention problem{};
    static_cast<AttentionTensors&>(problem) = read_tensors(api_, context, attributes_, number);
    problem.map = map_;
    problem.causal = attributes_.causal;
    queue(api_, context, problem);
  }

 private:
  const ort::Api& api_;
  const AttentionAttributes attributes_;
  FeatureMap map_ = FeatureMap::kElu;
};

template <class Kernel>
const ort::CustomOp* on_device(const ort::Api& api) {
  static const ort::CustomOp op = [&] {
    ort::CustomOp described = *cpu::OperatorGlue<Kernel>::describe(api);
    described.GetExecutionProviderType = [](const ort::CustomOp*) -> const char* { return "CUDAExecutionProvider"; };
    return described;
  }();
  return &op;
}

}  // namespace

std::vector<const ort::CustomOp*> operators(const ort::Api& api) {
  return {on_device<SparseAttentionKernel<Number::kFloat>>(api),
          on_device<SparseAttentionKernel<Number::kHalf>>(api),
          on_device<SparseAttentionKernel<Number::kBFloat16>>(api),
          on_device<LinearAttentionKernel<Number::kFloat>>(api),
          on_device<LinearAttentionKernel<Number::kHalf>>(api),
          on_device<LinearAttentionKernel<Number::kBFloat16>>(api)};
}

}  // namespace effc::cuda
