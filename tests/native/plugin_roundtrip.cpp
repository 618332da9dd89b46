// Makes a plugin, makes another one from the fields that the first would put into a plan, and compares what both say.
// Prints the fields; fails if they differ.
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
  auto* creator = static_cast<IPluginCreatorV3One*>(creators[0]);

  // 64-bit integers, as some parsers hand them over.
  const std::string pattern = "global:4|local:16", inputs = "marks,distance_slope";
  const int64_t causal = 1, heads = 6, kv_heads = 2;
  const float scale = 0.125f;
  std::vector<PluginField> fields = {
      {"pattern", pattern.data(), PluginFieldType::kCHAR, static_cast<int32_t>(pattern.size())},
      {"inputs", inputs.data(), PluginFieldType::kCHAR, static_cast<int32_t>(inputs.size())},
      {"causal", &causal, PluginFieldType::kINT64, 1},
      {"num_heads", &heads, PluginFieldType::kINT64, 1},
      {"kv_num_heads", &kv_heads, PluginFieldType::kINT64, 1},
      {"scale", &scale, PluginFieldType::kFLOAT32, 1}};
  const PluginFieldCollection given{static_cast<int32_t>(fields.size()), fields.data()};
  IPluginV3* first = creator->createPlugin("layer", &given, TensorRTPhase::kBUILD);
  if (first == nullptr) return 3;
  IPluginV3* copy = first->clone();
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
