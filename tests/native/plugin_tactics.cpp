// Asks a plugin for its tactics as TensorRT does while it builds, and runs it with one of them. Prints how many there
// are for long inputs, for a decode step, for fp32 and for linear attention, then what the plugin says of the run and
// of a tactic that there is not, on standard error.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "NvInfer.h"

using namespace nvinfer1;

namespace {

PluginTensorDesc tensor(DataType type, int64_t batch, int64_t length, int64_t width) {
  PluginTensorDesc description{};
  description.dims.nbDims = 3;
  description.dims.d[0] = batch;
  description.dims.d[1] = length;
  description.dims.d[2] = width;
  description.type = type;
  return description;
}

struct Tensors {
  std::vector<PluginTensorDesc> actual;
  std::vector<DynamicPluginTensorDesc> dynamic;

  Tensors(DataType type, int64_t queries, int64_t keys) {
    for (const int64_t length : {queries, keys, keys, queries}) {
      actual.push_back(tensor(type, 2, length, 64));
      const Dims& dims = actual.back().dims;
      dynamic.push_back({actual.back(), dims, dims, dims});
    }
  }
};

IPluginV3* make(IPluginCreatorInterface* creator, const std::string& pattern) {
  const std::string inputs;
  const int32_t causal = 1, heads = 2;
  const float scale = 0.125f;
  const std::vector<PluginField> fields = {
      {"pattern", pattern.data(), PluginFieldType::kCHAR, static_cast<int32_t>(pattern.size())},
      {"inputs", inputs.data(), PluginFieldType::kCHAR, 0},
      {"causal", &causal, PluginFieldType::kINT32, 1},
      {"num_heads", &heads, PluginFieldType::kINT32, 1},
      {"kv_num_heads", &heads, PluginFieldType::kINT32, 1},
      {"scale", &scale, PluginFieldType::kFLOAT32, 1}};
  const PluginFieldCollection given{static_cast<int32_t>(fields.size()), fields.data()};
  return static_cast<IPluginCreatorV3One*>(creator)->createPlugin("layer", &given, TensorRTPhase::kBUILD);
}

// -1 if the plugin refuses, else the number of its tactics, which are those from 1 on.
int32_t tactics(IPluginV3* plugin, const Tensors& tensors) {
  auto* build = static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
  if (build->configurePlugin(tensors.dynamic.data(), 3, tensors.dynamic.data() + 3, 1) != 0) return -1;
  const int32_t count = build->getNbTactics();
  std::vector<int32_t> numbers(count);
  if (build->getValidTactics(numbers.data(), count) != 0) return -1;
  for (int32_t index = 0; index < count; ++index) {
    if (numbers[index] != index + 1) return -1;
  }
  return count;
}

}  // namespace

int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (library == nullptr) return std::fprintf(stderr, "%s\n", dlerror()), 2;
  using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
  int32_t count = 0;
  auto* creators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"))(count);

  IPluginV3* sparse = make(creators[0], "local:16");
  IPluginV3* linear = make(creators[1], "linear:elu");
  const Tensors text(DataType::kHALF, 128, 128), step(DataType::kHALF, 1, 128), floats(DataType::kFLOAT, 128, 128);
  std::printf("%d %d %d %d\n", tactics(sparse, text), tactics(sparse, step), tactics(sparse, floats),
              tactics(linear, text));

  auto* runtime = static_cast<IPluginV3OneRuntime*>(sparse->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  if (runtime->setTactic(3) == 0 || runtime->setTactic(0) != 0 || runtime->setTactic(2) != 0) return 3;
  IPluginV3* attached = runtime->attachToContext(nullptr);
  auto* own = static_cast<IPluginV3OneRuntime*>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  alignas(256) static char memory[256];
  const void* const inputs[] = {memory, memory, memory};
  void* const outputs[] = {memory};
  own->enqueue(text.actual.data(), text.actual.data() + 3, inputs, outputs, memory, nullptr);
  delete attached;
  delete linear;
  delete sparse;
  return 0;
}
