// What an operator on a device gets from the session: the stream, and memory to work in.
#pragma once

#include "cpu/op_support.hpp"
#include "onnxruntime_cuda/device_api.hpp"

namespace effc::cuda {

inline void* stream_of(const ort::Api& api, const ort::KernelContext* context) {
  void* stream = nullptr;
  cpu::check(api, ort::compute_stream(api, context, &stream));
  return stream;
}

// Memory where the first input lies, from the session's allocator. It goes back once the work is queued: whoever gets
// it next works on the same stream, behind.
class Workspace {
 public:
  Workspace(const ort::Api& api, const ort::KernelContext* context, size_t bytes) : api_(api) {
    if (bytes == 0) return;
    const ort::Value* query = nullptr;
    const ort::MemoryInfo* info = nullptr;
    cpu::check(api, api.KernelContext_GetInput(context, cpu::kQuery, &query));
    cpu::check(api, ort::memory_of(api, query, &info));
    cpu::check(api, ort::allocator_of(api, context, info, &allocator_));
    memory_ = allocator_->Alloc(allocator_, bytes);
    if (memory_ == nullptr) {
      ort::release(api_, allocator_);
      throw cpu::Failure(ort::kRuntimeException, "out of device memory.");
    }
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    if (allocator_ == nullptr) return;
    allocator_->Free(allocator_, memory_);
    ort::release(api_, allocator_);
  }
  void* memory() const { return memory_; }

 private:
  const ort::Api& api_;
  ort::Allocator* allocator_ = nullptr;
  void* memory_ = nullptr;
};

}  // namespace effc::cuda
