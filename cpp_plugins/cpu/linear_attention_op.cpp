#include "cpu/linear_attention_op.hpp"

#include <cmath>
#include <string>
#include <vector>

#include "cpu/attention.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/linear_plan.hpp"
#include "cpu/op_support.hpp"
#include "cpu/operator_glue.hpp"

namespace effc::cpu {
namespace {

// kFirstMap is the random features of performer, or the maps of hedgehog's queries; kSecondMap those of its keys.
enum Input : size_t { kFirstMap = kAttentionInputCount, kSecondMap };

// linear, linear:elu, linear:relu, performer, performer:FEATURES or hedgehog. The number of features is that of the
// tensor, so it is only read here.
FeatureMap read_map(const std::string& pattern) {
  if (pattern == "linear" || pattern == "linear:elu") return FeatureMap::kElu;
  if (pattern == "linear:relu") return FeatureMap::kRelu;
  if (pattern == "hedgehog") return FeatureMap::kHedgehog;
  const std::string performer = "performer";
  const bool named = pattern.compare(0, performer.size(), performer) == 0;
  const std::string rest = named ? pattern.substr(performer.size()) : "";
  if (named && (rest.empty() ||
                (rest.size() > 1 && rest[0] == ':' && rest.find_first_not_of("0123456789", 1) == std::string::npos))) {
    return FeatureMap::kPerformer;
  }
  refuse("'" + pattern +
         "' is not a form of linear attention that this library knows. Known forms: linear:elu, linear:relu, "
         "performer:FEATURES, hedgehog. Without the library the model runs through its function body.");
}

// matrices [count][columns][rows] as [count][rows][padded columns], or [count][rows][columns] if not `turned`.
std::vector<float> padded_lines(const float* matrices, int64_t count, int64_t rows, int64_t columns, bool turned,
                                float factor) {
  const int64_t line = padded_line(columns);
  std::vector<float> result(count * rows * line, 0.0f);
  for (int64_t n = 0; n < count; ++n) {
    const float* matrix = matrices + n * rows * columns;
    for (int64_t r = 0; r < rows; ++r) {
      float* to = result.data() + (n * rows + r) * line;
      for (int64_t c = 0; c < columns; ++c) to[c] = factor * matrix[turned ? c * rows + r : r * columns + c];
    }
  }
  return result;
}

class LinearAttentionKernel {
 public:
  static constexpr const char* kName = "LinearAttention";
  static constexpr Port kInputs[] = {kTensor, kTensor, kTensor, kOptionalMask, kOptionalTensor, kOptionalTensor};
  static constexpr Port kOutputs[] = {kTensor};

  LinearAttentionKernel(const ort::Api& api, const ort::KernelInfo* info)
      : api_(api), attributes_(read_attributes(api, info)), map_(read_map(attributes_.pattern)) {
    std::string problem;
    const Kernels* kernels = choose_kernels(problem);
    if (kernels == nullptr) refuse(problem);
    kernels_ = kernels->linear;
  }

  void compute(ort::KernelContext* context) const {
    const Tensor first_map = read_input(api_, context, kFirstMap);
    const Tensor second_map = read_input(api_, context, kSecondMap);
    LinearProblem problem{};
    static_cast<AttentionCall&>(problem) = read_attention_call(api_, context, attributes_, kMaxHeadDim);
    problem.map = map_;
    problem.causal = attributes_.causal;
    problem.features = check_maps(problem, first_map, second_map);
    if (problem.causal && problem.q_len > problem.kv_len) refuse_queries_before_keys(problem, "Causal queries");
    if (problem.batch == 0 || problem.q_len == 0) return;

    const std::vector<float> query_map = prepared_map(problem, first_map, problem.num_heads);
    const std::vector<float> key_map =
        map_ == FeatureMap::kHedgehog ? prepared_map(problem, second_map, problem.kv_num_heads) : std::vector<float>();
    problem.query_map = query_map.data();
    problem.key_map = map_ == FeatureMap::kHedgehog ? key_map.data() : query_map.data();
    const bool done = run_linear(problem, *kernels_, [&](int64_t count, const std::function<void(int64_t)>& task) {
      parallel_for(api_, context, count, task);
    });
    if (!done) throw Failure(ort::kRuntimeException, "out of memory.");
  }

 private:
  // Refuses maps that do not fit; returns the number of features.
  int64_t check_maps(const LinearProblem& problem, const Tensor& first, const Tensor& second) const {
    const int64_t dim = problem.head_dim;
    if (map_ == FeatureMap::kPerformer) {
      if (first.shape.size() != 2 || first.shape[0] < 1 || first.shape[0] > kMaxFeatures || first.shape[1] != dim) {
        refuse("features has shape " + text_of(first.shape) + "; it must be [features, head_dim] with head_dim " +
               std::to_string(dim) + " and at most " + std::to_string(kMaxFeatures) + " features.");
      }
      return first.shape[0];
    }
    if (map_ != FeatureMap::kHedgehog) return dim;
    const auto check = [&](const Tensor& map, const char* name, int64_t heads) {
      if (map.shape == std::vector<int64_t>{heads, dim, dim}) return;
      refuse(std::string(name) + " has shape " + text_of(map.shape) + "; it must be " + text_of({heads, dim, dim}) +
             ".");
    };
    check(first, "query_map", problem.num_heads);
    check(second, "key_map", problem.kv_num_heads);
    return 2 * dim;
  }

  std::vector<float> prepared_map(const LinearProblem& problem, const Tensor& map, int64_t heads) const {
    const float* data = static_cast<const float*>(map.data);
    const int64_t dim = problem.head_dim;
    if (map_ == FeatureMap::kPerformer) {
      return padded_lines(data, 1, dim, problem.features, true, std::sqrt(problem.scale));
    }
    if (map_ == FeatureMap::kHedgehog) return padded_lines(data, heads, dim, dim, false, 1.0f);
    return {};
  }

  const ort::Api& api_;
  const AttentionAttributes attributes_;
  const FeatureMap map_;
  const LinearKernels* kernels_ = nullptr;
};

}  // namespace

const ort::CustomOp* linear_attention_op(const ort::Api& api) {
  return OperatorGlue<LinearAttentionKernel>::describe(api);
}

}  // namespace effc::cpu
