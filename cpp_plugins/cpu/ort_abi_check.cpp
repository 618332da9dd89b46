// Compares ort_abi.hpp with the official header. Compiled only where CMake finds that header.
#include <onnxruntime_c_api.h>

#include "cpu/ort_abi.hpp"

#define EFFC_COMPARE(NAME, PLACE) static_assert(offsetof(OrtApi, NAME) == (PLACE) * sizeof(void*), #NAME);
EFFC_ORT_API_ENTRIES(EFFC_COMPARE)

#define EFFC_COMPARE_OP(OURS, THEIRS) \
  static_assert(offsetof(effc::ort::CustomOp, OURS) == offsetof(OrtCustomOp, THEIRS), #OURS);
EFFC_COMPARE_OP(CreateKernel, CreateKernel)
EFFC_COMPARE_OP(GetName, GetName)
EFFC_COMPARE_OP(GetExecutionProviderType, GetExecutionProviderType)
EFFC_COMPARE_OP(GetInputType, GetInputType)
EFFC_COMPARE_OP(GetInputTypeCount, GetInputTypeCount)
EFFC_COMPARE_OP(GetOutputType, GetOutputType)
EFFC_COMPARE_OP(GetOutputTypeCount, GetOutputTypeCount)
EFFC_COMPARE_OP(KernelDestroy, KernelDestroy)
EFFC_COMPARE_OP(GetInputCharacteristic, GetInputCharacteristic)
EFFC_COMPARE_OP(GetOutputCharacteristic, GetOutputCharacteristic)
EFFC_COMPARE_OP(GetInputMemoryType, GetInputMemoryType)
EFFC_COMPARE_OP(CreateKernelV2, CreateKernelV2)
EFFC_COMPARE_OP(KernelComputeV2, KernelComputeV2)
EFFC_COMPARE_OP(InferOutputShape, InferOutputShapeFn)
EFFC_COMPARE_OP(GetStartVersion, GetStartVersion)
EFFC_COMPARE_OP(GetEndVersion, GetEndVersion)

static_assert(effc::ort::kInvalidArgument == static_cast<int>(ORT_INVALID_ARGUMENT));
static_assert(effc::ort::kNotImplemented == static_cast<int>(ORT_NOT_IMPLEMENTED));
static_assert(effc::ort::kRuntimeException == static_cast<int>(ORT_RUNTIME_EXCEPTION));
static_assert(effc::ort::kFloat == static_cast<int>(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT));
static_assert(effc::ort::kAnyType == static_cast<int>(ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED));
static_assert(effc::ort::kInt8 == static_cast<int>(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8));
static_assert(effc::ort::kInt64 == static_cast<int>(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64));
static_assert(effc::ort::kBool == static_cast<int>(ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL));
static_assert(effc::ort::kHalf == static_cast<int>(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16));
static_assert(effc::ort::kOptional == static_cast<int>(INPUT_OUTPUT_OPTIONAL));
