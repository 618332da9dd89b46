// Lets a class be an ONNX Runtime operator.
//
// A kernel class has `kName`, `kInputs` and `kOutputs` (arrays of Port; the first input is the query, whose shape the
// first output has), a constructor from attributes, and `compute`. Both may throw: failures reach the runtime as
// statuses that begin with the operator's name.
#pragma once

#include <iterator>
#include <string>

#include "cpu/op_support.hpp"

namespace effc::cpu {

struct Port {
  ort::ElementType type;
  ort::Characteristic presence;
};
constexpr Port kTensor = {ort::kFloat, ort::kRequired};
constexpr Port kOptionalTensor = {ort::kFloat, ort::kOptional};
constexpr Port kOptionalMask = {ort::kBool, ort::kOptional};

template <class Kernel>
class OperatorGlue {
 public:
  // The description that the runtime keeps a pointer to. `api` must be the runtime's.
  static const ort::CustomOp* describe(const ort::Api& api) {
    inference_api_ = &api;
    static const ort::CustomOp op = description();
    return &op;
  }

 private:
  // What the runtime calls a kernel.
  struct Instance {
    const ort::Api& api;
    Kernel kernel;
  };

  static std::string full_name() { return std::string("effc::") + Kernel::kName; }

  static ort::Status* create(const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info, void** instance) {
    return guarded(*api, full_name().c_str(), [&] { *instance = new Instance{*api, Kernel(*api, info)}; });
  }

  static ort::Status* compute(void* pointer, ort::KernelContext* context) {
    const auto& instance = *static_cast<const Instance*>(pointer);
    return guarded(instance.api, full_name().c_str(), [&] { instance.kernel.compute(context); });
  }

  static ort::CustomOp description() {
    using ort::CustomOp;
    CustomOp op = describe_operator();
    op.GetName = [](const CustomOp*) -> const char* { return Kernel::kName; };
    op.GetInputType = [](const CustomOp*, size_t index) { return Kernel::kInputs[index].type; };
    op.GetInputTypeCount = [](const CustomOp*) -> size_t { return std::size(Kernel::kInputs); };
    op.GetInputCharacteristic = [](const CustomOp*, size_t index) { return Kernel::kInputs[index].presence; };
    op.GetOutputType = [](const CustomOp*, size_t index) { return Kernel::kOutputs[index].type; };
    op.GetOutputTypeCount = [](const CustomOp*) -> size_t { return std::size(Kernel::kOutputs); };
    op.GetOutputCharacteristic = [](const CustomOp*, size_t index) { return Kernel::kOutputs[index].presence; };
    op.CreateKernelV2 = create;
    op.KernelComputeV2 = compute;
    op.KernelDestroy = [](void* instance) { delete static_cast<Instance*>(instance); };
    op.InferOutputShape = [](const CustomOp*, ort::ShapeInferContext* context) {
      return infer_output_like_query(*inference_api_, context);
    };
    return op;
  }

  inline static const ort::Api* inference_api_ = nullptr;
};

}  // namespace effc::cpu
