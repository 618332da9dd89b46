#include "tensorrt/attributes.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <sstream>

#include "pattern/parse.hpp"

namespace effc::trt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

// Parsers differ in the width that they give ONNX's 64-bit integers.
bool read(const PluginField& field, int32_t& value) {
  if (field.data == nullptr || field.length < 1) return false;
  switch (field.type) {
    case PluginFieldType::kINT32:
      std::memcpy(&value, field.data, sizeof value);
      return true;
    case PluginFieldType::kINT64: {
      int64_t wide = 0;
      std::memcpy(&wide, field.data, sizeof wide);
      value = static_cast<int32_t>(wide);
      return value == wide;
    }
    default:
      return false;
  }
}

bool read(const PluginField& field, float& value) {
  if (field.data == nullptr || field.length < 1 || field.type != PluginFieldType::kFLOAT32) return false;
  std::memcpy(&value, field.data, sizeof value);
  return true;
}

bool read(const PluginField& field, std::string& value) {
  if (field.length < 0 || field.type != PluginFieldType::kCHAR) return false;
  if (field.data == nullptr) return field.length == 0;
  const auto* text = static_cast<const char*>(field.data);
  // Some callers count the terminating zero, some do not.
  value.assign(text, strnlen(text, static_cast<size_t>(field.length)));
  return true;
}

std::string place_inputs(Attributes& attributes) {
  attributes.places.fill(kAbsent);
  attributes.input_count = kRequired;
  std::stringstream names(attributes.inputs);
  int32_t last = -1;
  for (std::string name; std::getline(names, name, ',');) {
    int32_t which = 0;
    while (which < kOptionalCount && name != kOptionalNames[which]) ++which;
    if (which == kOptionalCount || !has_input(attributes.op, static_cast<Optional>(which))) {
      return "it knows no input '" + name + "'.";
    }
    if (which <= last) return "its inputs '" + attributes.inputs + "' are not in the operator's order.";
    attributes.places[which] = attributes.input_count++;
    last = which;
  }
  return "";
}

std::string read_form(Attributes& attributes) {
  if (attributes.op == Operator::kSparseAttention) {
    return parse_pattern(attributes.pattern, attributes.causal != 0, attributes.parsed);
  }
  if (attributes.pattern == "linear" || attributes.pattern == "linear:elu") {
    attributes.map = cuda::FeatureMap::kElu;
  } else if (attributes.pattern == "linear:relu") {
    attributes.map = cuda::FeatureMap::kRelu;
  } else {
    return "it knows no linear attention '" + attributes.pattern + "', only linear:elu and linear:relu.";
  }
  return "";
}

// What inputs and outputs ask of the attributes.
std::string check_tensors(const Attributes& attributes) {
  const auto has = [&](Optional which) { return attributes.places[which] != kAbsent; };
  if (has(kKeyBlocks) != (attributes.block_size > 0)) {
    return "key_blocks and block_size, the number of keys of a block, come together.";
  }
  if (has(kPastState) != has(kPastNormaliser)) return "past_state and past_normaliser come together.";
  if (attributes.present_state == 0 && !has(kPastState)) return "";
  if (attributes.op != Operator::kLinearAttention || attributes.causal == 0) {
    return "only causal linear attention has a state.";
  }
  return "";
}

// What FP8 queries, keys and values ask of the attributes.
std::string check_eight_bit(const Attributes& attributes) {
  const auto given = {attributes.query_scale, attributes.key_scale, attributes.value_scale};
  const auto is_zero = [](float scale) { return scale == 0; };
  if (attributes.output_type == 0 && std::all_of(given.begin(), given.end(), is_zero)) return "";
  if (attributes.op == Operator::kLinearAttention) return "linear attention takes no FP8.";
  if (attributes.output_type != kOnnxFp16 && attributes.output_type != kOnnxBf16) {
    return "its output_type must be that of FP16 or BF16, which FP8 attention gives.";
  }
  const auto is_scale = [](float scale) { return scale > 0 && std::isfinite(scale); };
  if (std::all_of(given.begin(), given.end(), is_scale)) return "";
  return "its query_scale, key_scale and value_scale must be positive numbers.";
}

std::string check(Attributes& attributes) {
  const std::string problem = read_form(attributes);
  if (!problem.empty()) return problem;
  if (attributes.num_heads < 1 || attributes.kv_num_heads < 1 || attributes.num_heads % attributes.kv_num_heads != 0) {
    return "it has " + std::to_string(attributes.num_heads) + " heads and " + std::to_string(attributes.kv_num_heads) +
           " key/value heads; the first must be a multiple of the second.";
  }
  if (!std::isfinite(attributes.scale)) return "its scale is not finite.";
  const std::string misplaced = place_inputs(attributes);
  if (!misplaced.empty()) return misplaced;
  const std::string unfit = check_eight_bit(attributes);
  return unfit.empty() ? check_tensors(attributes) : unfit;
}

}  // namespace

const char* name_of(Operator op) {
  return op == Operator::kLinearAttention ? "LinearAttention" : "SparseAttention";
}

bool has_input(Operator op, Optional which) {
  if (which == kKeyMask) return true;
  const bool linear = which == kPastState || which == kPastNormaliser;
  return linear == (op == Operator::kLinearAttention);
}

std::string read_attributes(const nvinfer1::PluginFieldCollection& fields, Attributes& attributes) {
  for (int32_t index = 0; index < fields.nbFields; ++index) {
    const PluginField& field = fields.fields[index];
    const std::string name = field.name;
    bool fits = true;
    if (name == "pattern")
      fits = read(field, attributes.pattern);
    else if (name == "inputs")
      fits = read(field, attributes.inputs);
    else if (name == "causal")
      fits = read(field, attributes.causal);
    else if (name == "num_heads")
      fits = read(field, attributes.num_heads);
    else if (name == "kv_num_heads")
      fits = read(field, attributes.kv_num_heads);
    else if (name == "scale")
      fits = read(field, attributes.scale);
    else if (name == "block_size")
      fits = read(field, attributes.block_size);
    else if (name == "present_state")
      fits = read(field, attributes.present_state);
    else if (name == "query_scale")
      fits = read(field, attributes.query_scale);
    else if (name == "key_scale")
      fits = read(field, attributes.key_scale);
    else if (name == "value_scale")
      fits = read(field, attributes.value_scale);
    else if (name == "output_type")
      fits = read(field, attributes.output_type);
    if (!fits) return "its attribute '" + name + "' has another type than it should.";
  }
  return check(attributes);
}

std::array<PluginField, kFieldCount> field_names() {
  return {PluginField("pattern", nullptr, PluginFieldType::kCHAR, 0),
          PluginField("inputs", nullptr, PluginFieldType::kCHAR, 0),
          PluginField("causal", nullptr, PluginFieldType::kINT32, 1),
          PluginField("num_heads", nullptr, PluginFieldType::kINT32, 1),
          PluginField("kv_num_heads", nullptr, PluginFieldType::kINT32, 1),
          PluginField("scale", nullptr, PluginFieldType::kFLOAT32, 1),
          PluginField("block_size", nullptr, PluginFieldType::kINT32, 1),
          PluginField("present_state", nullptr, PluginFieldType::kINT32, 1),
          PluginField("query_scale", nullptr, PluginFieldType::kFLOAT32, 1),
          PluginField("key_scale", nullptr, PluginFieldType::kFLOAT32, 1),
          PluginField("value_scale", nullptr, PluginFieldType::kFLOAT32, 1),
          PluginField("output_type", nullptr, PluginFieldType::kINT32, 1)};
}

std::array<PluginField, kFieldCount> fields_of(const Attributes& attributes) {
  auto fields = field_names();
  fields[0].data = attributes.pattern.data();
  fields[0].length = static_cast<int32_t>(attributes.pattern.size());
  fields[1].data = attributes.inputs.data();
  fields[1].length = static_cast<int32_t>(attributes.inputs.size());
  fields[2].data = &attributes.causal;
  fields[3].data = &attributes.num_heads;
  fields[4].data = &attributes.kv_num_heads;
  fields[5].data = &attributes.scale;
  fields[6].data = &attributes.block_size;
  fields[7].data = &attributes.present_state;
  fields[8].data = &attributes.query_scale;
  fields[9].data = &attributes.key_scale;
  fields[10].data = &attributes.value_scale;
  fields[11].data = &attributes.output_type;
  return fields;
}

}  // namespace effc::trt
