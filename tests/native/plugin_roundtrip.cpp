// Makes a plugin, makes another one from the fields that the first would put into a plan, and compares what both say.
// Prints the fields; fails if they differ. Arguments: the library, and "sparse" or "linear".
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "NvInfer.h"

using namespace nvinfer1;

namespace {

std::string text_of(const PluginFieldCollection& fields) {
  std::string text;
  for (int32_t index = 0; index < fields.nbFields; ++index) {
    const PluginField& field = fields.fields[index];
    const size_t size = field.type == PluginFieldType::kCHAR ? 1 : 4;
    text += std::string(field.name) + "=";
    if (field.type == PluginFieldType::kCHAR) {
      text.append(static_cast<const char*>(field.data), field.length);
    } else if (field.type == PluginFieldType::kINT32) {
      text += std::to_string(*static_cast<const int32_t*>(field.data));
    } else {
      text += std::to_string(*static_cast<const float*>(field.data));
    }
    text += " (" + std::to_string(size * field.length) + " bytes)\n";
  }
  return text;
}

const PluginFieldCollection* kept(IPluginV3* plugin) {
  auto* runtime = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  return runtime->getFieldsToSerialize();
}

}  // namespace

int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (library == nullptr) return std::fprintf(stderr, "%s\n", dlerror()), 2;
  using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
  int32_t count = 0;
  auto* creators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"))(count);
  const bool linear = std::strcmp(arguments[2], "linear") == 0;
  auto* creator = static_cast<IPluginCreatorV3One*>(creators[linear ? 1 : 0]);

  // 64-bit integers, as some parsers hand them over.
  const std::string pattern = linear ? "linear:relu" : "global:4|local:16";
  const std::string inputs = linear ? "past_state,past_normaliser" : "marks,distance_slope,key_blocks";
  const int64_t causal = 1, heads = 6, kv_heads = 2, block_size = linear ? 0 : 128, present_state = linear ? 1 : 0;
  const float scale = 0.125f;
  std::vector<PluginField> fields = {
      {"pattern", pattern.data(), PluginFieldType::kCHAR, static_cast<int32_t>(pattern.size())},
      {"inputs", inputs.data(), PluginFieldType::kCHAR, static_cast<int32_t>(inputs.size())},
      {"causal", &causal, PluginFieldType::kINT64, 1},
      {"num_heads", &heads, PluginFieldType::kINT64, 1},
      {"kv_num_heads", &kv_heads, PluginFieldType::kINT64, 1},
      {"scale", &scale, PluginFieldType::kFLOAT32, 1},
      {"block_size", &block_size, PluginFieldType::kINT64, 1},
      {"present_state", &present_state, PluginFieldType::kINT64, 1}};
  const float query_scale = 0.5f, key_scale = 0.25f, value_scale = 2.0f;
  const int64_t output_type = 16;
  if (!linear) {
    fields.push_back({"query_scale", &query_scale, PluginFieldType::kFLOAT32, 1});
    fields.push_back({"key_scale", &key_scale, PluginFieldType::kFLOAT32, 1});
    fields.push_back({"value_scale", &value_scale, PluginFieldType::kFLOAT32, 1});
    fields.push_back({"output_type", &output_type, PluginFieldType::kINT64, 1});
  }
  const PluginFieldCollection given{static_cast<int32_t>(fields.size()), fields.data()};
  IPluginV3* first = creator->createPlugin("layer", &given, TensorRTPhase::kBUILD);
  if (first == nullptr) return 3;
  IPluginV3* copy = first->clone();
  auto* build = static_cast<IPluginV3OneBuild*>(first->getCapabilityInterface(PluginCapabilityType::kBUILD));
  if (build->getNbOutputs() != (linear ? 3 : 1)) return 6;
  const std::string before = text_of(*kept(first));
  if (text_of(*kept(copy)) != before) return 4;
  IPluginV3* second = creator->createPlugin("layer", kept(first), TensorRTPhase::kRUNTIME);
  if (second == nullptr || text_of(*kept(second)) != before) return 5;
  std::fputs(before.c_str(), stdout);
  delete first;
  delete copy;
  delete second;
  return 0;
}
