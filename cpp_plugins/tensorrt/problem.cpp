#include "tensorrt/problem.hpp"

#include <cmath>
#include <cstdlib>

#include "cuda/device_capability.hpp"

namespace effc::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

constexpr int kCapabilities[] = {80, 86, 89, 90, 120};

std::string name_of(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
      return "FP32";
    case DataType::kHALF:
      return "FP16";
    case DataType::kBF16:
      return "BF16";
    case DataType::kBOOL:
      return "BOOL";
    case DataType::kINT8:
      return "INT8";
    case DataType::kINT32:
      return "INT32";
    case DataType::kINT64:
      return "INT64";
    case DataType::kFP8:
      return "FP8";
    default:
      return "type " + std::to_string(static_cast<int32_t>(type));
  }
}

std::string name_of(const Attributes& attributes, int32_t position) {
  constexpr const char* kNames[kRequired] = {"query", "key", "value"};
  if (position < kRequired) return kNames[position];
  for (int32_t which = 0; which < kOptionalCount; ++which) {
    if (attributes.places[which] == position) return kOptionalNames[which];
  }
  if (position == attributes.input_count + 1) return "present_state";
  if (position == attributes.input_count + 2) return "present_normaliser";
  return "output";
}

std::string text_of(const Dims& shape) {
  std::string text = "[";
  for (int32_t axis = 0; axis < shape.nbDims; ++axis) {
    text += (axis > 0 ? ", " : "") + std::to_string(shape.d[axis]);
  }
  return text + "]";
}

cuda::Number number_of(DataType type) {
  switch (type) {
    case DataType::kHALF:
      return cuda::Number::kHalf;
    case DataType::kBF16:
      return cuda::Number::kBFloat16;
    case DataType::kFP8:
      return cuda::Number::kE4M3;
    default:
      return cuda::Number::kFloat;
  }
}

constexpr int64_t kAny = -1;

bool is(const Dims& shape, std::initializer_list<int64_t> sizes) {
  if (shape.nbDims != static_cast<int32_t>(sizes.size())) return false;
  int32_t axis = 0;
  for (const int64_t size : sizes) {
    if (size != kAny && shape.d[axis] != size) return false;
    ++axis;
  }
  return true;
}

std::string wrong(const char* what, const Dims& shape, const std::string& expected) {
  return std::string(what) + " has shape " + text_of(shape) + "; it must be " + expected + ".";
}

std::string check_optional(const Attributes& attributes, const Dims* shapes, Shapes meaning,
                           cuda::SparseAttention& problem) {
  const auto shape_of = [&](Optional which) -> const Dims* {
    return attributes.places[which] == kAbsent ? nullptr : &shapes[attributes.places[which]];
  };
  for (const Optional which : {kKeyMask, kMarks}) {
    const Dims* shape = shape_of(which);
    const bool actual = meaning == Shapes::kActual;
    if (shape != nullptr && !is(*shape, {actual ? problem.batch : kAny, actual ? problem.kv_len : kAny})) {
      return wrong(kOptionalNames[which], *shape, "[batch, kv_len], like the keys");
    }
  }
  if (const Dims* shape = shape_of(kDistanceBias)) {
    if (shape->nbDims != 2 || shape->d[0] != problem.num_heads || shape->d[1] % 2 != 1 || shape->d[1] > kMaxLength) {
      return wrong("distance_bias", *shape, "[num_heads, 2 * reach + 1]");
    }
    problem.bias_reach = static_cast<Position>(shape->d[1] / 2);
  }
  if (const Dims* shape = shape_of(kDistanceSlope); shape != nullptr && !is(*shape, {problem.num_heads})) {
    return wrong("distance_slope", *shape, "[num_heads]");
  }
  if (const Dims* shape = shape_of(kKeyBlocks)) {
    const int64_t size = attributes.block_size;
    const bool actual = meaning == Shapes::kActual;
    const int64_t lists = (problem.kv_len - 1) / size - (problem.kv_len - problem.q_len) / size + 1;
    if (!is(*shape, {actual ? problem.batch : kAny, problem.kv_num_heads, actual ? lists : kAny, kAny})) {
      return wrong("key_blocks", *shape, "[batch, kv_num_heads, blocks of queries, count]");
    }
    problem.key_block_count = static_cast<int32_t>(shape->d[3]);
    problem.block_size = static_cast<Position>(size);
  }
  const int64_t batch = meaning == Shapes::kActual ? problem.batch : kAny, dim = problem.head_dim;
  if (const Dims* shape = shape_of(kPastState);
      shape != nullptr && !is(*shape, {batch, problem.kv_num_heads, dim, dim})) {
    return wrong("past_state", *shape, "[batch, kv_num_heads, head_dim, head_dim]");
  }
  if (const Dims* shape = shape_of(kPastNormaliser);
      shape != nullptr && !is(*shape, {batch, problem.kv_num_heads, dim})) {
    return wrong("past_normaliser", *shape, "[batch, kv_num_heads, head_dim]");
  }
  return "";
}

}  // namespace

DataType output_type(const Attributes& attributes, DataType number) {
  if (number != DataType::kFP8) return number;
  return attributes.output_type == kOnnxBf16 ? DataType::kBF16 : DataType::kHALF;
}

std::string check_tensor(const Attributes& attributes, int32_t position, const nvinfer1::PluginTensorDesc& tensor,
                         DataType number) {
  const auto place_is = [&](Optional which) { return attributes.places[which] == position; };
  bool fits = false;
  std::string expected;
  if (place_is(kKeyMask) || place_is(kMarks)) {
    fits = tensor.type == DataType::kBOOL;
    expected = "BOOL";
  } else if (place_is(kKeyBlocks)) {
    fits = tensor.type == DataType::kINT32;
    expected = "INT32";
  } else if (place_is(kDistanceBias) || place_is(kDistanceSlope) || place_is(kPastState) || place_is(kPastNormaliser) ||
             position > attributes.input_count) {
    fits = tensor.type == DataType::kFLOAT;
    expected = "FP32";
  } else if (position == 0 && attributes.output_type != 0) {
    fits = number == DataType::kFP8;
    expected = "FP8, whose scales it has";
  } else if (position == 0) {
    fits = number == DataType::kFLOAT || number == DataType::kHALF || number == DataType::kBF16;
    expected = "FP32, FP16 or BF16, or FP8 with query_scale and so on";
  } else if (position == attributes.input_count) {
    fits = tensor.type == output_type(attributes, number);
    expected = name_of(output_type(attributes, number));
  } else {
    fits = tensor.type == number;
    expected = name_of(number) + " as the query is";
  }
  if (fits) return "";
  return name_of(attributes, position) + " is " + name_of(tensor.type) + "; it must be " + expected + ".";
}

std::string read_problem(const Attributes& attributes, const Dims* shapes, Shapes meaning, DataType number,
                         cuda::SparseAttention& problem) {
  problem = {};
  const bool actual = meaning == Shapes::kActual;
  const Dims &query = shapes[0], &key = shapes[1], &value = shapes[2];
  const int64_t heads = attributes.num_heads, kv_heads = attributes.kv_num_heads;
  if (query.nbDims != 3 || query.d[2] < 1 || query.d[2] % heads != 0) {
    return wrong("query", query, "[batch, q_len, num_heads * head_dim] with " + std::to_string(heads) + " heads");
  }
  problem.batch = query.d[0];
  problem.q_len = query.d[1];
  problem.num_heads = heads;
  problem.kv_num_heads = kv_heads;
  problem.head_dim = query.d[2] / heads;
  const int64_t width = kv_heads * problem.head_dim;
  const int64_t batch = actual ? problem.batch : kAny;
  if (!is(key, {batch, kAny, width})) {
    return wrong("key", key, "[batch, kv_len, " + std::to_string(width) + "] with the query's batch");
  }
  problem.kv_len = key.d[1];
  if (!is(value, {batch, actual ? problem.kv_len : kAny, width})) return wrong("value", value, "of the key's shape");
  problem.scale = attributes.scale != 0 ? attributes.scale : 1.0f / std::sqrt(static_cast<float>(problem.head_dim));
  problem.number = number_of(number);
  problem.eight_bit = {attributes.query_scale, attributes.key_scale, attributes.value_scale,
                       number_of(output_type(attributes, number))};
  problem.pattern = attributes.parsed;
  return check_optional(attributes, shapes, meaning, problem);
}

cuda::LinearAttention linear_problem(const Attributes& attributes, const cuda::SparseAttention& problem) {
  cuda::LinearAttention linear{};
  static_cast<cuda::AttentionTensors&>(linear) = problem;
  linear.map = attributes.map;
  linear.causal = attributes.causal != 0;
  return linear;
}

std::string refused(const Attributes& attributes, const cuda::SparseAttention& problem) {
  const auto refusal_on = [&](int capability) {
    return attributes.op == Operator::kLinearAttention ? cuda::refusal(linear_problem(attributes, problem), capability)
                                                       : cuda::refusal(problem, capability);
  };
  int capability = 0;
  if (cuda::device_capability(capability) != cudaSuccess) {
    if (const char* target = std::getenv("EFFC_TARGET_SM")) capability = std::atoi(target);
  }
  if (capability != 0) {
    const char* reason = refusal_on(capability);
    return reason == nullptr ? "" : reason;
  }
  const char* reason = nullptr;
  for (const int other : kCapabilities) {
    reason = refusal_on(other);
    if (reason == nullptr) return "";
  }
  return reason;
}

size_t workspace_bytes(const Attributes& attributes, const cuda::SparseAttention& problem) {
  return attributes.op == Operator::kLinearAttention ? cuda::workspace_bytes(linear_problem(attributes, problem))
                                                     : cuda::workspace_bytes(problem);
}

int launch(const Attributes& attributes, const cuda::SparseAttention& problem, const States& states, void* workspace,
           cudaStream_t stream) {
  if (attributes.op == Operator::kSparseAttention) return cuda::launch(problem, workspace, stream);
  cuda::LinearAttention linear = linear_problem(attributes, problem);
  linear.past_state = states.past_state;
  linear.past_normaliser = states.past_normaliser;
  linear.present_state = states.present_state;
  linear.present_normaliser = states.present_normaliser;
  return cuda::launch(linear, workspace, stream);
}

}  // namespace effc::trt
