// What operators on a device need of ONNX Runtime's interface besides cpu/ort_abi.hpp, which says why entries may be
// counted. Behind the entries counted there.
#pragma once

#include "cpu/ort_abi.hpp"

namespace effc::ort {

struct MemoryInfo;

// The beginning of OrtAllocator.
struct Allocator {
  uint32_t version;
  void* (*Alloc)(Allocator* self, size_t bytes);
  void (*Free)(Allocator* self, void* memory);
};

constexpr ElementType kBFloat16 = static_cast<ElementType>(16);

constexpr size_t kReleaseAllocator = 132;
constexpr size_t kGetGpuComputeStream = 193;
constexpr size_t kGetTensorMemoryInfo = 194;
constexpr size_t kGetAllocator = 253;

template <class Function>
Function entry(const Api& api, size_t place) {
  return reinterpret_cast<Function>(reinterpret_cast<void* const*>(&api)[place]);
}

// The stream that the kernel is to be queued on, a cudaStream_t.
inline Status* compute_stream(const Api& api, const KernelContext* context, void** stream) {
  using Function = Status* (*)(const KernelContext*, void**);
  return entry<Function>(api, kGetGpuComputeStream)(context, stream);
}

// Where a tensor lies.
inline Status* memory_of(const Api& api, const Value* value, const MemoryInfo** info) {
  using Function = Status* (*)(const Value*, const MemoryInfo**);
  return entry<Function>(api, kGetTensorMemoryInfo)(value, info);
}

// What allocates there, to be released behind its last use.
inline Status* allocator_of(const Api& api, const KernelContext* context, const MemoryInfo* info,
                            Allocator** allocator) {
  using Function = Status* (*)(const KernelContext*, const MemoryInfo*, Allocator**);
  return entry<Function>(api, kGetAllocator)(context, info, allocator);
}

inline void release(const Api& api, Allocator* allocator) {
  entry<void (*)(Allocator*)>(api, kReleaseAllocator)(allocator);
}

}  // namespace effc::ort
