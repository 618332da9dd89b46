// effc::SparseAttention and effc::LinearAttention as TensorRT plugins (IPluginV3), and the creator that makes them from
// a node or from a plan.
//
// Nothing here refers to TensorRT's own library: what a plugin needs it is handed through interfaces. That lets one
// library be loaded by TensorRT 10, 11 and TensorRT-RTX. For the same reason nothing registers itself: releases differ
// in the registry's virtual functions, and the process that loads the library asks for the creators instead.
#pragma once

#include <string>

#include "NvInfer.h"
#include "tensorrt/attributes.hpp"

namespace effc::trt {

constexpr const char* kPluginVersion = "1";
constexpr const char* kPluginNamespace = "effc";

class AttentionPlugin final : public nvinfer1::IPluginV3,
                              public nvinfer1::IPluginV3OneCore,
                              public nvinfer1::IPluginV3OneBuild,
                              public nvinfer1::IPluginV3OneRuntime {
 public:
  AttentionPlugin(std::string layer, Attributes attributes);

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  // IPluginV3OneCore
  const char* getPluginName() const noexcept override { return name_of(attributes_.op); }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

  // IPluginV3OneBuild
  int32_t getNbOutputs() const noexcept override { return attributes_.present_state != 0 ? 3 : 1; }
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count, const nvinfer1::DataType* inputs,
                             int32_t input_count) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count, const nvinfer1::DimsExprs*, int32_t,
                          nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 int32_t input_count, int32_t output_count) noexcept override;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc* outputs, int32_t output_count) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc* outputs,
                          int32_t output_count) const noexcept override;
  // The tilings of the kernels, see cuda/sparse_attention.hpp; TensorRT times each and keeps one.
  int32_t getNbTactics() noexcept override { return tactic_count_; }
  int32_t getValidTactics(int32_t* tactics, int32_t count) noexcept override;

  // IPluginV3OneRuntime
  int32_t setTactic(int32_t tactic) noexcept override;
  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t input_count,
                        const nvinfer1::PluginTensorDesc* outputs, int32_t output_count) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descriptions,
                  const nvinfer1::PluginTensorDesc* output_descriptions, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

 private:
  bool complain(const std::string& problem) const;

  std::string layer_;
  Attributes attributes_;
  cuda::Tiling tiling_ = cuda::Tiling::kByLength;
  int32_t tactic_count_ = 0;  // of the shapes and types that it was configured for; 0 where there is no choice
  std::array<nvinfer1::PluginField, kFieldCount> fields_{};
  nvinfer1::PluginFieldCollection collection_{};
};

class AttentionCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit AttentionCreator(Operator op);
  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return name_of(op_); }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

 private:
  const Operator op_;
  std::array<nvinfer1::PluginField, kFieldCount> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

}  // namespace effc::trt
