#include "cpu/sparse_attention_op.hpp"

#include <cmath>
#include <string>
#include <vector>

#include "cpu/dispatch.hpp"
#include "cpu/op_support.hpp"
#include "cpu/schedule.hpp"
#include "pattern/parse.hpp"

namespace effc::cpu {
namespace {

enum Input : size_t { kQuery, kKey, kValue, kKeyMask, kMarks, kDistanceBias, kDistanceSlope, kInputCount };
enum Output : size_t { kAttention, kLogSumExp, kOutputCount };

constexpr const char* kName = "effc::SparseAttention";

Pattern read_pattern(const AttentionAttributes& attributes) {
  Pattern pattern;
  const std::string problem = parse_pattern(attributes.pattern, attributes.causal, pattern);
  if (!problem.empty()) refuse(problem);
  return pattern;
}

// With more queries than keys the first queries stand at negative positions, which only some rules know.
bool knows_negative_positions(const SplitPattern& split) {
  if (split.uses_marks || split.passes.size() > 1 || split.passes[0].step > 1) return false;
  const Pattern& pattern = split.passes[0].pattern;
  for (int t = 0; t < pattern.term_count; ++t) {
    const TermKind kind = pattern.terms[t].kind;
    if (kind == TermKind::kBlocks || kind == TermKind::kRandom) return false;
  }
  return true;
}

class SparseAttentionKernel {
 public:
  SparseAttentionKernel(const ort::Api& api, const ort::KernelInfo* info)
      : api_(api), attributes_(read_attributes(api, info)), split_(split_pattern(read_pattern(attributes_))) {
    std::string problem;
    const bool bf16 = bf16_allowed(attributes_.precision, problem);
    if (problem.empty()) kernels_ = choose_kernels(problem, bf16);
    if (kernels_ == nullptr) refuse(problem);
  }

  const ort::Api& api() const { return api_; }

  void compute(ort::KernelContext* context) const {
    const Tensor query = read_input(api_, context, kQuery);
    const Tensor key = read_input(api_, context, kKey);
    const Tensor value = read_input(api_, context, kValue);
    const Tensor key_mask = read_input(api_, context, kKeyMask);
    const Tensor marks = read_input(api_, context, kMarks);
    const Tensor bias = read_input(api_, context, kDistanceBias);
    const Tensor slope = read_input(api_, context, kDistanceSlope);
    check_attention_inputs(attributes_, query, key, value, key_mask, kMaxHeadDim);
    check_extra_inputs(query, key, marks, bias, slope);

    Problem problem{};
    problem.batch = query.shape[0];
    problem.q_len = query.shape[1];
    problem.kv_len = key.shape[1];
    problem.num_heads = attributes_.num_heads;
    problem.kv_num_heads = attributes_.kv_num_heads;
    problem.head_dim = query.shape[2] / attributes_.num_heads;
    problem.scale = attributes_.scale != 0 ? attributes_.scale : 1.0f / std::sqrt(static_cast<float>(problem.head_dim));
    problem.output = allocate_output(api_, context, kAttention, query.shape);
    problem.log_sum_exp = allocate_output(api_, context, kLogSumExp, {problem.batch, problem.num_heads, problem.q_len});
    if (problem.batch == 0 || problem.q_len == 0) return;

    problem.query = static_cast<const float*>(query.data);
    problem.key = static_cast<const float*>(key.data);
    problem.value = static_cast<const float*>(value.data);
    problem.key_mask = static_cast<const uint8_t*>(key_mask.data);
    problem.marks = static_cast<const uint8_t*>(marks.data);
    problem.distance_bias = static_cast<const float*>(bias.data);
    problem.bias_reach = bias.given ? static_cast<Position>(bias.shape[1] / 2) : 0;
    problem.distance_slope = static_cast<const float*>(slope.data);

    const Plan plan(problem, split_);
    const bool enough_memory = run_plan(plan, *kernels_, [&](int64_t count, const std::function<void(int64_t)>& task) {
      parallel_for(api_, context, count, task);
    });
    if (!enough_memory) throw Failure(ort::kRuntimeException, "out of memory.");
  }

 private:
  void check_extra_inputs(const Tensor& query, const Tensor& key, const Tensor& marks, const Tensor& bias,
                          const Tensor& slope) const {
    if (key.shape[1] < query.shape[1] && !knows_negative_positions(split_)) {
      refuse("there are " + std::to_string(query.shape[1]) + " queries and " + std::to_string(key.shape[1]) +
             " keys. The queries are the last positions of the keys, so pass past and present keys together.");
    }
    if (marks.given && marks.shape != std::vector<int64_t>{key.shape[0], key.shape[1]}) {
      refuse("marks has shape " + text_of(marks.shape) +
             "; it must be [batch, kv_len] = " + text_of({key.shape[0], key.shape[1]}) + ".");
    }
    if (bias.given && (bias.shape.size() != 2 || bias.shape[0] != attributes_.num_heads || bias.shape[1] % 2 != 1 ||
                       bias.shape[1] > kMaxLength)) {
      refuse("distance_bias has shape " + text_of(bias.shape) + "; it must be [num_heads, 2 * reach + 1] with " +
             std::to_string(attributes_.num_heads) + " heads.");
    }
    if (slope.given && slope.shape != std::vector<int64_t>{attributes_.num_heads}) {
      refuse("distance_slope has shape " + text_of(slope.shape) +
             "; it must be [num_heads] = " + text_of({attributes_.num_heads}) + ".");
    }
  }

  const ort::Api& api_;
  const AttentionAttributes attributes_;
  const SplitPattern split_;
  const Kernels* kernels_ = nullptr;
};

// ---------------------------------------------------------------------------------------------------------------------
// The operator's description for the runtime.

ort::Status* create_kernel(const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info, void** kernel) {
  return guarded(*api, kName, [&] { *kernel = new SparseAttentionKernel(*api, info); });
}

ort::Status* compute(void* kernel_pointer, ort::KernelContext* context) {
  const auto& kernel = *static_cast<const SparseAttentionKernel*>(kernel_pointer);
  return guarded(kernel.api(), kName, [&] { kernel.compute(context); });
}

const ort::Api* g_inference_api = nullptr;

ort::CustomOp describe() {
  using ort::CustomOp;
  CustomOp op = describe_operator();
  op.GetName = [](const CustomOp*) { return "SparseAttention"; };
  op.GetInputType = [](const CustomOp*, size_t index) {
    return index == kKeyMask || index == kMarks ? ort::kBool : ort::kFloat;
  };
  op.GetInputTypeCount = [](const CustomOp*) -> size_t { return kInputCount; };
  op.GetInputCharacteristic = [](const CustomOp*, size_t index) {
    return index >= kKeyMask ? ort::kOptional : ort::kRequired;
  };
  op.GetOutputTypeCount = [](const CustomOp*) -> size_t { return kOutputCount; };
  op.GetOutputCharacteristic = [](const CustomOp*, size_t index) {
    return index == kLogSumExp ? ort::kOptional : ort::kRequired;
  };
  op.CreateKernelV2 = create_kernel;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = [](void* kernel) { delete static_cast<SparseAttentionKernel*>(kernel); };
  op.InferOutputShape = [](const CustomOp*, ort::ShapeInferContext* context) {
    return infer_output_like_query(*g_inference_api, context);
  };
  return op;
}

}  // namespace

const ort::CustomOp* sparse_attention_op(const ort::Api& api) {
  g_inference_api = &api;
  static const ort::CustomOp op = describe();
  return &op;
}

}  // namespace effc::cpu
