// Compares device_api.hpp with the official header. Compiled only where CMake finds that header.
#include <onnxruntime_c_api.h>

#include "onnxruntime_cuda/device_api.hpp"

#define EFFC_COMPARE(NAME, PLACE) static_assert(offsetof(OrtApi, NAME) == effc::ort::PLACE * sizeof(void*), #NAME);
EFFC_COMPARE(KernelContext_GetGPUComputeStream, kGetGpuComputeStream)
EFFC_COMPARE(GetTensorMemoryInfo, kGetTensorMemoryInfo)
EFFC_COMPARE(KernelContext_GetAllocator, kGetAllocator)
EFFC_COMPARE(ReleaseAllocator, kReleaseAllocator)

static_assert(offsetof(OrtAllocator, Alloc) == offsetof(effc::ort::Allocator, Alloc));
static_assert(offsetof(OrtAllocator, Free) == offsetof(effc::ort::Allocator, Free));
static_assert(effc::ort::kBFloat16 == static_cast<int>(ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16));
