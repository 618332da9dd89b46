// The two functions by which TensorRT asks a plugin library for what it holds.

#include <cstdio>

#include "tensorrt/attention_plugin.hpp"
#include "tensorrt/log.hpp"

#define EFFC_EXPORT extern "C" __attribute__((visibility("default")))

namespace effc::trt {
namespace {
nvinfer1::ILoggerFinder* g_finder = nullptr;
}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) {
  g_finder = finder;
}

void log(Severity severity, const std::string& message) {
  nvinfer1::ILogger* logger = g_finder == nullptr ? nullptr : g_finder->findLogger();
  if (logger != nullptr) {
    logger->log(severity, message.c_str());
  } else {
    std::fprintf(stderr, "%s\n", message.c_str());
  }
}

}  // namespace effc::trt

EFFC_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static effc::trt::AttentionCreator sparse(effc::trt::Operator::kSparseAttention);
  static effc::trt::AttentionCreator linear(effc::trt::Operator::kLinearAttention);
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&sparse, &linear};
  count = 2;
  return creators;
}

EFFC_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  effc::trt::set_logger_finder(finder);
}
