#include "cpu/cached_attention_op.hpp"

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/cached_plan.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/op_support.hpp"
#include "cpu/operator_glue.hpp"
#include "cpu/thread_workspace.hpp"

namespace effc::cpu {
namespace {

constexpr Port kCache = {ort::kAnyType, ort::kRequired};
constexpr Port kOptionalNumbers = {ort::kInt64, ort::kOptional};

class CachedAttentionKernel {
 public:
  static constexpr const char* kName = "CachedAttention";
  static constexpr Port kInputs[] = {kTensor,          kTensor,         kTensor,         kCache,
                                     kCache,           kTensor,         kOptionalTensor, kOptionalTensor,
                                     kOptionalNumbers, kOptionalTensor, kOptionalTensor};
  static constexpr Port kOutputs[] = {kTensor};

  CachedAttentionKernel(const ort::Api& api, const ort::KernelInfo* info)
      : api_(api), attributes_(read_attributes(api, info)) {
    std::string problem;
    kernels_ = choose_kernels(problem);
    if (kernels_ == nullptr) refuse(problem);
  }

  void compute(ort::KernelContext* context) const {
    CachedCall call{};
    static_cast<AttentionCall&>(call) = read_attention_call(api_, context, attributes_, kMaxHeadDim, false);
    if (call.q_len != 1 || call.kv_len != 1) {
      refuse("there are " + std::to_string(call.q_len) + " queries and " + std::to_string(call.kv_len) +
             " keys; a step has one new token.");
    }
    const int64_t query_numbers = call.num_heads / call.kv_num_heads * (call.head_dim + kPaddedTo);
    if (query_numbers > static_cast<int64_t>(kPackedFloats)) refuse("too many heads share one key/value head.");
    read_cache(context, call);
    const std::vector<float> head_bias = read_distances(context, call);
    call.head_bias = head_bias.empty() ? nullptr : head_bias.data();
    if (call.batch == 0) return;
    const bool done = run_cached(
        call, kernels_->attend_cache,
        [&](int64_t count, const std::function<void(int64_t)>& task) { parallel_for(api_, context, count, task); });
    if (!done) throw Failure(ort::kRuntimeException, "out of memory.");
  }

 private:
  enum Input : size_t {
    kPastKey = kValue + 1,
    kPastValue,
    kBias,
    kPastKeyScale,
    kPastValueScale,
    kDistance,
    kDistanceBias,
    kDistanceSlope
  };

  void read_cache(ort::KernelContext* context, CachedCall& call) const {
    const Tensor past_key = read_input(api_, context, kPastKey);
    const Tensor past_value = read_input(api_, context, kPastValue);
    const Tensor bias = read_input(api_, context, kBias);
    const Tensor key_scale = read_input(api_, context, kPastKeyScale);
    const Tensor value_scale = read_input(api_, context, kPastValueScale);
    if (past_key.shape.size() != 4) {
      refuse("past_key has shape " + text_of(past_key.shape) + "; give it as [batch, kv_num_heads, slots, head_dim].");
    }
    call.slots = past_key.shape[2];
    const std::vector<int64_t> shape = {call.batch, call.kv_num_heads, call.slots, call.head_dim};
    require_shape(past_key, shape, "past_key");
    require_shape(past_value, shape, "past_value");
    require_shape(bias, {call.batch, 1, 1, call.slots + 1}, "bias");
    if (call.slots >= kMaxLength) refuse("caches longer than " + std::to_string(kMaxLength) + " are not supported.");
    call.type = cache_type(past_key.type);
    if (past_value.type != past_key.type) refuse("past_key and past_value have different types; give both the same.");
    if (key_scale.given != (call.type == CacheType::kInt8) || value_scale.given != key_scale.given) {
      refuse("past_key_scale and past_value_scale belong to INT8 caches, which need both.");
    }
    if (key_scale.given) {
      require_shape(key_scale, {call.batch, call.kv_num_heads, call.slots, 1}, "past_key_scale");
      require_shape(value_scale, {call.batch, call.kv_num_heads, call.slots, 1}, "past_value_scale");
    }
    call.past_key = past_key.data;
    call.past_value = past_value.data;
    call.bias = static_cast<const float*>(bias.data);
    call.key_scale = static_cast<const float*>(key_scale.data);
    call.value_scale = static_cast<const float*>(value_scale.data);
  }

  static CacheType cache_type(ort::ElementType type) {
    switch (type) {
      case ort::kFloat:
        return CacheType::kFp32;
      case ort::kHalf:
        return CacheType::kFp16;
      case ort::kInt8:
        return CacheType::kInt8;
      default:
        refuse("past_key must be float, float16 or int8.");
    }
  }

  static void require_shape(const Tensor& tensor, const std::vector<int64_t>& shape, const char* name) {
    if (tensor.shape == shape) return;
    refuse(std::string(name) + " has shape " + text_of(tensor.shape) + "; it must be " + text_of(shape) + ".");
  }

  // What distance adds, [num_heads, slots + 1]; empty if nothing.
  std::vector<float> read_distances(ort::KernelContext* context, const CachedCall& call) const {
    const Tensor distance = read_input(api_, context, kDistance);
    const Tensor bias = read_input(api_, context, kDistanceBias);
    const Tensor slope = read_input(api_, context, kDistanceSlope);
    if (!bias.given && !slope.given) return {};
    const int64_t columns = call.slots + 1;
    if (!distance.given) refuse("distance_bias and distance_slope need the input distance.");
    require_shape(distance, {columns}, "distance");
    if (bias.given && (bias.shape.size() != 2 || bias.shape[0] != call.num_heads || bias.shape[1] % 2 != 1)) {
      refuse("distance_bias has shape " + text_of(bias.shape) + "; it must be [num_heads, 2 * reach + 1] with " +
             std::to_string(call.num_heads) + " heads.");
    }
    if (slope.given) require_shape(slope, {call.num_heads}, "distance_slope");

    const auto* distances = static_cast<const int64_t*>(distance.data);
    const auto* table = static_cast<const float*>(bias.data);
    const auto* slopes = static_cast<const float*>(slope.data);
    const int64_t reach = bias.given ? bias.shape[1] / 2 : 0;
    std::vector<float> added(call.num_heads * columns, 0.0f);
    for (int64_t head = 0; head < call.num_heads; ++head) {
      float* row = added.data() + head * columns;
      for (int64_t n = 0; n < columns; ++n) {
        if (bias.given) row[n] += table[head * (2 * reach + 1) + std::clamp(distances[n], -reach, reach) + reach];
        if (slope.given) row[n] += slopes[head] * static_cast<float>(distances[n]);
      }
    }
    return added;
  }

  const ort::Api& api_;
  const AttentionAttributes attributes_;
  const Kernels* kernels_ = nullptr;
};

}  // namespace

const ort::CustomOp* cached_attention_op(const ort::Api& api) {
  return OperatorGlue<CachedAttentionKernel>::describe(api);
}

}  // namespace effc::cpu
