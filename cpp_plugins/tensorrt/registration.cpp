// For programs that open a plugin library and ask it for nothing, as Triton does: with EFFC_REGISTER_PLUGINS=1 in the
// environment the creators are added to the registry of the TensorRT that is loaded already. This calls a virtual
// function of the registry, whose table release 11 has changed, so it is for TensorRT 10.
//
// Not without being told: TensorRT's own ways of loading a library register what getCreators() says, and a second
// registration of the same name is an error there.
#include <dlfcn.h>
#include <link.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "NvInferRuntime.h"
#include "tensorrt/log.hpp"

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count);

namespace effc::trt {
namespace {

constexpr int32_t kSupportedMajor = 10;

// What a loaded libnvinfer.so or libnvinfer_lean.so exports; null if there is none.
struct Loaded {
  nvinfer1::IPluginRegistry* (*registry)() = nullptr;
  int32_t (*version)() = nullptr;  // 101503 is 10.15.3
};

Loaded find_tensorrt() {
  Loaded found;
  const auto look = [](dl_phdr_info* info, size_t, void* result) {
    const char* name = info->dlpi_name == nullptr ? nullptr : std::strrchr(info->dlpi_name, '/');
    if (name == nullptr) return 0;
    const std::string file = name + 1;
    if (file.rfind("libnvinfer.so", 0) != 0 && file.rfind("libnvinfer_lean.so", 0) != 0) {
      return 0;
    }
    void* library = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return 0;
    Loaded& loaded = *static_cast<Loaded*>(result);
    loaded.registry = reinterpret_cast<decltype(loaded.registry)>(dlsym(library, "getPluginRegistry"));
    loaded.version = reinterpret_cast<decltype(loaded.version)>(dlsym(library, "getInferLibVersion"));
    dlclose(library);
    return loaded.registry != nullptr && loaded.version != nullptr ? 1 : 0;
  };
  dl_iterate_phdr(look, &found);
  return found;
}

__attribute__((constructor)) void register_if_told() {
  const char* told = std::getenv("EFFC_REGISTER_PLUGINS");
  if (told == nullptr || std::strcmp(told, "1") != 0) return;
  const Loaded loaded = find_tensorrt();
  if (loaded.registry == nullptr || loaded.version == nullptr) {
    log(Severity::kERROR, "effc's plugins were to be registered, and no TensorRT is loaded.");
    return;
  }
  const int32_t version = loaded.version();
  if (version / 10000 != kSupportedMajor) {
    log(Severity::kERROR, "effc's plugins register themselves with TensorRT 10, and this is version " +
                              std::to_string(version) + ". Compile with --embed-plugin.");
    return;
  }
  int32_t count = 0;
  nvinfer1::IPluginCreatorInterface* const* creators = getCreators(count);
  for (int32_t n = 0; n < count; ++n) {
    if (!loaded.registry()->registerCreator(*creators[n], "effc")) {
      log(Severity::kERROR, "TensorRT did not take a plugin of effc's.");
    }
  }
}

}  // namespace
}  // namespace effc::trt
