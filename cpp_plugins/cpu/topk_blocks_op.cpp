#include "cpu/topk_blocks_op.hpp"

#include <string>

#include "cpu/choose_blocks.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/op_support.hpp"
#include "cpu/operator_glue.hpp"
#include "cpu/schedule.hpp"
#include "pattern/parse.hpp"

namespace effc::cpu {
namespace {

struct BlockTopK {
  Position count;
  Position block;
};

// topk-blocks:COUNT:BLOCK
BlockTopK read_form(const std::string& pattern) {
  const std::string name = "topk-blocks:";
  const auto number = [](const std::string& text) -> Position {
    constexpr size_t kMostDigits = 7;
    if (text.empty() || text.size() > kMostDigits || text.find_first_not_of("0123456789") != std::string::npos)
      return 0;
    return static_cast<Position>(std::stoi(text));
  };
  const size_t colon = pattern.find(':', name.size());
  if (pattern.compare(0, name.size(), name) == 0 && colon != std::string::npos) {
    const BlockTopK form = {number(pattern.substr(name.size(), colon - name.size())),
                            number(pattern.substr(colon + 1))};
    if (form.count > 1 && form.block > 0) return form;
  }
  refuse("'" + pattern + "' is no topk-blocks:COUNT:BLOCK with at least 2 blocks, for example topk-blocks:8:64.");
}

Pattern everything(bool causal) {
  Pattern pattern;
  const std::string problem = parse_pattern("dense", causal, pattern);
  if (!problem.empty()) refuse(problem);
  return pattern;
}

class BlockTopKAttentionKernel {
 public:
  static constexpr const char* kName = "BlockTopKAttention";
  static constexpr Port kInputs[] = {kTensor, kTensor, kTensor, kOptionalMask};
  static constexpr Port kOutputs[] = {kTensor};

  BlockTopKAttentionKernel(const ort::Api& api, const ort::KernelInfo* info)
      : api_(api),
        attributes_(read_attributes(api, info)),
        form_(read_form(attributes_.pattern)),
        split_(split_pattern(everything(attributes_.causal))) {
    std::string problem;
    const bool bf16 = bf16_allowed(attributes_.precision, problem);
    if (problem.empty()) kernels_ = choose_kernels(problem, bf16);
    if (kernels_ == nullptr) refuse(problem);
  }

  void compute(ort::KernelContext* context) const {
    Problem problem{};
    static_cast<AttentionCall&>(problem) = read_attention_call(api_, context, attributes_, kMaxHeadDim);
    if (problem.kv_len < problem.q_len) refuse_queries_before_keys(problem);
    if (problem.batch == 0 || problem.q_len == 0) return;
    const ParallelFor run = [&](int64_t count, const std::function<void(int64_t)>& task) {
      parallel_for(api_, context, count, task);
    };
    const BlockChoice choice = choose_blocks(problem, attributes_.causal, form_.count, form_.block, run);
    problem.chosen = choice.view();
    const Plan plan(problem, split_);
    if (!run_plan(plan, *kernels_, run)) throw Failure(ort::kRuntimeException, "out of memory.");
  }

 private:
  const ort::Api& api_;
  const AttentionAttributes attributes_;
  const BlockTopK form_;
  const SplitPattern split_;
  const Kernels* kernels_ = nullptr;
};

}  // namespace

const ort::CustomOp* topk_blocks_op(const ort::Api& api) {
  return OperatorGlue<BlockTopKAttentionKernel>::describe(api);
}

}  // namespace effc::cpu
