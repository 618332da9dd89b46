#include "cpu/sparse_attention_op.hpp"

#include <string>
#include <vector>

#include "cpu/dispatch.hpp"
#include "cpu/op_support.hpp"
#include "cpu/operator_glue.hpp"
#include "cpu/schedule.hpp"
#include "pattern/parse.hpp"

namespace effc::cpu {
namespace {

enum Input : size_t { kMarks = kAttentionInputCount, kDistanceBias, kDistanceSlope };
enum Output : size_t { kAttention, kLogSumExp };

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
  static constexpr const char* kName = "SparseAttention";
  static constexpr Port kInputs[] = {kTensor,       kTensor,         kTensor,        kOptionalMask,
                                     kOptionalMask, kOptionalTensor, kOptionalTensor};
  static constexpr Port kOutputs[] = {kTensor, kOptionalTensor};

  SparseAttentionKernel(const ort::Api& api, const ort::KernelInfo* info)
      : api_(api), attributes_(read_attributes(api, info)), split_(split_pattern(read_pattern(attributes_))) {
    std::string problem;
    const bool bf16 = bf16_allowed(attributes_.precision, problem);
    if (problem.empty()) kernels_ = choose_kernels(problem, bf16);
    if (kernels_ == nullptr) refuse(problem);
  }

  void compute(ort::KernelContext* context) const {
    const Tensor marks = read_input(api_, context, kMarks);
    const Tensor bias = read_input(api_, context, kDistanceBias);
    const Tensor slope = read_input(api_, context, kDistanceSlope);
    Problem problem{};
    static_cast<AttentionCall&>(problem) = read_attention_call(api_, context, attributes_, kMaxHeadDim);
    check_extra_inputs(problem, marks, bias, slope);
    problem.log_sum_exp = allocate_output(api_, context, kLogSumExp, {problem.batch, problem.num_heads, problem.q_len});
    if (problem.batch == 0 || problem.q_len == 0) return;

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
  void check_extra_inputs(const AttentionCall& call, const Tensor& marks, const Tensor& bias,
                          const Tensor& slope) const {
    if (call.kv_len < call.q_len && !knows_negative_positions(split_)) refuse_queries_before_keys(call);
    if (marks.given && marks.shape != std::vector<int64_t>{call.batch, call.kv_len}) {
      refuse("marks has shape " + text_of(marks.shape) +
             "; it must be [batch, kv_len] = " + text_of({call.batch, call.kv_len}) + ".");
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

}  // namespace

const ort::CustomOp* sparse_attention_op(const ort::Api& api) {
  return OperatorGlue<SparseAttentionKernel>::describe(api);
}

}  // namespace effc::cpu
