// The part of ONNX Runtime's C interface that a custom operator needs, declared by hand because the Python wheel ships
// no headers.
//
// That is safe for one reason: ONNX Runtime only ever appends to these tables, so an entry's place never changes.
// Unused entries are skipped by count, and the assertions pin every entry that is used. Where CMake finds the official
// header, ort_abi_check.cpp compares the two. Version 17 (ONNX Runtime 1.17) is the first with everything used here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace effc::ort {

constexpr uint32_t kApiVersion = 17;
constexpr const char* kMinimumVersion = "1.17";

// Opaque objects of the runtime.
struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct ShapeInferContext;
struct TensorTypeAndShapeInfo;
struct Value;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2, kNotImplemented = 9, kRuntimeException = 6 };
enum ElementType : int { kAnyType = 0, kFloat = 1, kInt8 = 3, kInt64 = 7, kBool = 9, kHalf = 10 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };
enum MemoryType : int { kDefaultMemory = 0 };

// A returned status of null means success; any other must be returned on or released.
struct Api {
  Status* (*CreateStatus)(ErrorCode code, const char* message);
  void* skipped_1[1];
  const char* (*GetErrorMessage)(const Status* status);
  void* skipped_3[23];
  Status* (*CreateCustomOpDomain)(const char* domain, CustomOpDomain** out);
  Status* (*CustomOpDomain_Add)(CustomOpDomain* domain, const struct CustomOp* op);
  Status* (*AddCustomOpDomain)(SessionOptions* options, CustomOpDomain* domain);
  void* skipped_29[22];
  Status* (*GetTensorMutableData)(Value* value, void** out);
  void* skipped_52[8];
  Status* (*GetTensorElementType)(const TensorTypeAndShapeInfo* info, ElementType* out);
  Status* (*GetDimensionsCount)(const TensorTypeAndShapeInfo* info, size_t* out);
  Status* (*GetDimensions)(const TensorTypeAndShapeInfo* info, int64_t* dimensions, size_t count);
  void* skipped_63[2];
  Status* (*GetTensorTypeAndShape)(const Value* value, TensorTypeAndShapeInfo** out);
  void* skipped_66[19];
  Status* (*KernelInfoGetAttribute_float)(const KernelInfo* info, const char* name, float* out);
  Status* (*KernelInfoGetAttribute_int64)(const KernelInfo* info, const char* name, int64_t* out);
  Status* (*KernelInfoGetAttribute_string)(const KernelInfo* info, const char* name, char* out, size_t* size);
  Status* (*KernelContext_GetInputCount)(const KernelContext* context, size_t* out);
  Status* (*KernelContext_GetOutputCount)(const KernelContext* context, size_t* out);
  Status* (*KernelContext_GetInput)(const KernelContext* context, size_t index, const Value** out);
  Status* (*KernelContext_GetOutput)(KernelContext* context, size_t index, const int64_t* dimensions, size_t count,
                                     Value** out);
  void* skipped_92[1];
  void (*ReleaseStatus)(Status* status);
  void* skipped_94[5];
  void (*ReleaseTensorTypeAndShapeInfo)(TensorTypeAndShapeInfo* info);
  void* skipped_100[168];
  Status* (*ShapeInferContext_GetInputTypeShape)(const ShapeInferContext* context, size_t index,
                                                 TensorTypeAndShapeInfo** out);
  void* skipped_269[1];
  Status* (*ShapeInferContext_SetOutputTypeShape)(const ShapeInferContext* context, size_t index,
                                                  const TensorTypeAndShapeInfo* info);
  void* skipped_271[3];
  // Runs function(user_data, n) for every n < total on the session's own threads.
  Status* (*KernelContext_ParallelFor)(const KernelContext* context, void (*function)(void* user_data, size_t n),
                                       size_t total, size_t batches, void* user_data);
};

struct ApiBase {
  const Api* (*GetApi)(uint32_t version);  // null if the runtime is older
  const char* (*GetVersionString)();
};

// What the library hands to the runtime. `version` says how far the runtime may read.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp* op, const Api* api, const KernelInfo* info);
  const char* (*GetName)(const CustomOp* op);
  const char* (*GetExecutionProviderType)(const CustomOp* op);  // null: CPU
  ElementType (*GetInputType)(const CustomOp* op, size_t index);
  size_t (*GetInputTypeCount)(const CustomOp* op);
  ElementType (*GetOutputType)(const CustomOp* op, size_t index);
  size_t (*GetOutputTypeCount)(const CustomOp* op);
  void (*KernelCompute)(void* kernel, KernelContext* context);
  void (*KernelDestroy)(void* kernel);
  Characteristic (*GetInputCharacteristic)(const CustomOp* op, size_t index);
  Characteristic (*GetOutputCharacteristic)(const CustomOp* op, size_t index);
  MemoryType (*GetInputMemoryType)(const CustomOp* op, size_t index);
  int (*GetVariadicInputMinArity)(const CustomOp* op);
  int (*GetVariadicInputHomogeneity)(const CustomOp* op);
  int (*GetVariadicOutputMinArity)(const CustomOp* op);
  int (*GetVariadicOutputHomogeneity)(const CustomOp* op);
  // Since version 16; used instead of CreateKernel and KernelCompute, because they can fail with a status.
  Status* (*CreateKernelV2)(const CustomOp* op, const Api* api, const KernelInfo* info, void** kernel);
  Status* (*KernelComputeV2)(void* kernel, KernelContext* context);
  // Since version 17.
  Status* (*InferOutputShape)(const CustomOp* op, ShapeInferContext* context);
  int (*GetStartVersion)(const CustomOp* op);
  int (*GetEndVersion)(const CustomOp* op);
  // Since version 18: never read from an operator of version 17.
  void* unread[4];
};

// Every used entry with its place in the runtime's tables: the API counts entries, the operator counts bytes.
#define EFFC_ORT_API_ENTRIES(ENTRY)                \
  ENTRY(CreateStatus, 0)                           \
  ENTRY(GetErrorMessage, 2)                        \
  ENTRY(CreateCustomOpDomain, 26)                  \
  ENTRY(CustomOpDomain_Add, 27)                    \
  ENTRY(AddCustomOpDomain, 28)                     \
  ENTRY(GetTensorMutableData, 51)                  \
  ENTRY(GetTensorElementType, 60)                  \
  ENTRY(GetDimensionsCount, 61)                    \
  ENTRY(GetDimensions, 62)                         \
  ENTRY(GetTensorTypeAndShape, 65)                 \
  ENTRY(KernelInfoGetAttribute_float, 85)          \
  ENTRY(KernelInfoGetAttribute_int64, 86)          \
  ENTRY(KernelInfoGetAttribute_string, 87)         \
  ENTRY(KernelContext_GetInputCount, 88)           \
  ENTRY(KernelContext_GetOutputCount, 89)          \
  ENTRY(KernelContext_GetInput, 90)                \
  ENTRY(KernelContext_GetOutput, 91)               \
  ENTRY(ReleaseStatus, 93)                         \
  ENTRY(ReleaseTensorTypeAndShapeInfo, 99)         \
  ENTRY(ShapeInferContext_GetInputTypeShape, 268)  \
  ENTRY(ShapeInferContext_SetOutputTypeShape, 270) \
  ENTRY(KernelContext_ParallelFor, 274)

#define EFFC_ASSERT_ENTRY(NAME, PLACE) static_assert(offsetof(Api, NAME) == (PLACE) * sizeof(void*), #NAME);
EFFC_ORT_API_ENTRIES(EFFC_ASSERT_ENTRY)
#undef EFFC_ASSERT_ENTRY

static_assert(sizeof(void*) == 8, "effc's kernels are built for 64-bit systems");
static_assert(offsetof(CustomOp, CreateKernel) == 8);
static_assert(offsetof(CustomOp, GetInputType) == 32);
static_assert(offsetof(CustomOp, KernelCompute) == 64);
static_assert(offsetof(CustomOp, GetInputMemoryType) == 96);
static_assert(offsetof(CustomOp, CreateKernelV2) == 136);
static_assert(offsetof(CustomOp, InferOutputShape) == 152);
static_assert(offsetof(CustomOp, GetEndVersion) == 168);
static_assert(sizeof(CustomOp) == 208);

}  // namespace effc::ort
