#include "tensorrt/attention_plugin.hpp"

#include <cuda_runtime_api.h>

#include <new>
#include <utility>
#include <vector>

#include "tensorrt/log.hpp"
#include "tensorrt/problem.hpp"

namespace effc::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginV3;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginTensorDesc;

constexpr int32_t kDone = 0;
constexpr int32_t kFailed = -1;

// By their numbers as tactics, which begin at 1. The first is what is right without having been timed.
constexpr cuda::Tiling kTactics[] = {cuda::Tiling::kByLength, cuda::Tiling::kSmall};
constexpr int32_t kTacticCount = 2;

// The largest shapes of the profile. An unknown size means that there is no profile yet, so nothing can be said.
bool largest_shapes(const DynamicPluginTensorDesc* inputs, int32_t count, std::vector<Dims>& shapes) {
  for (int32_t index = 0; index < count; ++index) {
    shapes.push_back(inputs[index].max);
    for (int32_t axis = 0; axis < shapes.back().nbDims; ++axis) {
      if (shapes.back().d[axis] < 0) return false;
    }
  }
  return true;
}

}  // namespace

AttentionPlugin::AttentionPlugin(std::string layer, Attributes attributes)
    : layer_(std::move(layer)), attributes_(std::move(attributes)) {}

nvinfer1::IPluginCapability* AttentionPlugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
  switch (type) {
    case PluginCapabilityType::kCORE:
      return static_cast<IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD:
      return static_cast<IPluginV3OneBuild*>(this);
    case PluginCapabilityType::kRUNTIME:
      return static_cast<IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

IPluginV3* AttentionPlugin::clone() noexcept {
  try {
    auto* copy = new AttentionPlugin(layer_, attributes_);
    copy->tiling_ = tiling_;
    copy->tactic_count_ = tactic_count_;
    return copy;
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

int32_t AttentionPlugin::getOutputDataTypes(DataType* outputs, int32_t output_count, const DataType* inputs,
                                            int32_t) const noexcept {
  outputs[0] = output_type(attributes_, inputs[0]);
  // States.
  for (int32_t index = 1; index < output_count; ++index) outputs[index] = DataType::kFLOAT;
  return kDone;
}

int32_t AttentionPlugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count,
                                         const nvinfer1::DimsExprs*, int32_t, nvinfer1::DimsExprs* outputs,
                                         int32_t output_count, nvinfer1::IExprBuilder& builder) noexcept {
  if (input_count != attributes_.input_count) {
    complain("it has " + std::to_string(input_count) + " inputs, but its attributes speak of " +
             std::to_string(attributes_.input_count) + " (key_mask and so on are named in 'inputs').");
    return kFailed;
  }
  outputs[0] = inputs[0];
  if (output_count == 1) return kDone;
  const auto* head_dim = builder.operation(nvinfer1::DimensionOperation::kFLOOR_DIV, *inputs[0].d[2],
                                           *builder.constant(attributes_.num_heads));
  const auto* heads = builder.constant(attributes_.kv_num_heads);
  outputs[1].nbDims = 4;
  outputs[2].nbDims = 3;
  for (nvinfer1::DimsExprs* state : {&outputs[1], &outputs[2]}) {
    state->d[0] = inputs[0].d[0];
    state->d[1] = heads;
    state->d[2] = head_dim;
  }
  outputs[1].d[3] = head_dim;
  return kDone;
}

bool AttentionPlugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t,
                                                int32_t) noexcept {
  const PluginTensorDesc& tensor = tensors[position].desc;
  // Other layouts are offered in turn, which is no fault of the graph.
  if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
  return complain(check_tensor(attributes_, position, tensor, tensors[0].desc.type));
}

int32_t AttentionPlugin::configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                                         const DynamicPluginTensorDesc*, int32_t) noexcept {
  std::vector<Dims> shapes;
  tactic_count_ = 0;
  if (!largest_shapes(inputs, input_count, shapes)) return kDone;
  cuda::SparseAttention problem;
  std::string reason = read_problem(attributes_, shapes.data(), Shapes::kBounds, inputs[0].desc.type, problem);
  if (reason.empty()) reason = refused(attributes_, problem);
  if (!complain(reason)) return kFailed;
  const bool sparse = attributes_.op == Operator::kSparseAttention;
  tactic_count_ = sparse && cuda::has_tilings(problem) ? kTacticCount : 0;
  return kDone;
}

int32_t AttentionPlugin::getValidTactics(int32_t* tactics, int32_t count) noexcept {
  for (int32_t index = 0; index < count; ++index) tactics[index] = index + 1;
  return count == tactic_count_ ? kDone : kFailed;
}

int32_t AttentionPlugin::setTactic(int32_t tactic) noexcept {
  if (tactic < 0 || tactic > kTacticCount) {
    complain("it knows no tactic " + std::to_string(tactic) + ".");
    return kFailed;
  }
  // 0 where it was given no choice.
  tiling_ = kTactics[tactic == 0 ? 0 : tactic - 1];
  return kDone;
}

size_t AttentionPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                                         const DynamicPluginTensorDesc*, int32_t) const noexcept {
  std::vector<Dims> shapes;
  cuda::SparseAttention problem;
  if (!largest_shapes(inputs, input_count, shapes) ||
      !read_problem(attributes_, shapes.data(), Shapes::kBounds, inputs[0].desc.type, problem).empty()) {
    return 0;
  }
  return workspace_bytes(attributes_, problem);
}

int32_t AttentionPlugin::onShapeChange(const PluginTensorDesc* inputs, int32_t input_count, const PluginTensorDesc*,
                                       int32_t) noexcept {
  std::vector<Dims> shapes;
  for (int32_t index = 0; index < input_count; ++index) shapes.push_back(inputs[index].dims);
  cuda::SparseAttention problem;
  std::string reason = read_problem(attributes_, shapes.data(), Shapes::kActual, inputs[0].type, problem);
  if (reason.empty()) reason = refused(attributes_, problem);
  return complain(reason) ? kDone : kFailed;
}

int32_t AttentionPlugin::enqueue(const PluginTensorDesc* input_descriptions, const PluginTensorDesc*,
                                 const void* const* inputs, void* const* outputs, void* workspace,
                                 cudaStream_t stream) noexcept {
  Dims shapes[kRequired + kOptionalCount];
  for (int32_t index = 0; index < attributes_.input_count; ++index) shapes[index] = input_descriptions[index].dims;
  cuda::SparseAttention problem;
  if (!complain(read_problem(attributes_, shapes, Shapes::kActual, input_descriptions[0].type, problem)))
    return kFailed;
  if (problem.batch == 0 || problem.q_len == 0) return kDone;

  const auto input_of = [&](Optional which) -> const void* {
    return attributes_.places[which] == kAbsent ? nullptr : inputs[attributes_.places[which]];
  };
  problem.query = inputs[0];
  problem.key = inputs[1];
  problem.value = inputs[2];
  problem.key_mask = static_cast<const uint8_t*>(input_of(kKeyMask));
  problem.marks = static_cast<const uint8_t*>(input_of(kMarks));
  problem.distance_bias = static_cast<const float*>(input_of(kDistanceBias));
  problem.distance_slope = static_cast<const float*>(input_of(kDistanceSlope));
  problem.key_blocks = static_cast<const int32_t*>(input_of(kKeyBlocks));
  problem.tiling = tiling_;
  problem.output = outputs[0];
  States states;
  states.past_state = static_cast<const float*>(input_of(kPastState));
  states.past_normaliser = static_cast<const float*>(input_of(kPastNormaliser));
  if (attributes_.present_state != 0) {
    states.present_state = static_cast<float*>(outputs[1]);
    states.present_normaliser = static_cast<float*>(outputs[2]);
  }
  const int error = launch(attributes_, problem, states, workspace, stream);
  if (error == cudaSuccess) return kDone;
  complain(std::string("its kernel cannot be launched: ") + cudaGetErrorString(static_cast<cudaError_t>(error)) + ".");
  return kFailed;
}

const nvinfer1::PluginFieldCollection* AttentionPlugin::getFieldsToSerialize() noexcept {
  fields_ = fields_of(attributes_);
  collection_ = {kFieldCount, fields_.data()};
  return &collection_;
}

// Tells the logger what is wrong, if anything is; true if nothing.
bool AttentionPlugin::complain(const std::string& problem) const {
  if (problem.empty()) return true;
  log(Severity::kERROR, "effc::" + std::string(name_of(attributes_.op)) + " '" + layer_ + "': " + problem);
  return false;
}

// ---------------------------------------------------------------------------------------------------------------------

AttentionCreator::AttentionCreator(Operator op)
    : op_(op), fields_(field_names()), collection_{kFieldCount, fields_.data()} {}

IPluginV3* AttentionCreator::createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                          nvinfer1::TensorRTPhase) noexcept {
  try {
    const std::string layer = name == nullptr ? "" : name;
    Attributes attributes;
    attributes.op = op_;
    const std::string problem = fields == nullptr ? "it has no attributes." : read_attributes(*fields, attributes);
    if (!problem.empty()) {
      log(Severity::kERROR, "effc::" + std::string(name_of(op_)) + " '" + layer + "': " + problem);
      return nullptr;
    }
    return new AttentionPlugin(layer, std::move(attributes));
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

}  // namespace effc::trt
