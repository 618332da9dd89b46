#include "cpu/thread_workspace.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>

namespace effc::cpu {
namespace {

constexpr size_t kHugePage = 2 << 20;
static_assert(kHugePage % kWorkspaceAlignment == 0, "the alignment that kernels rely on");

class ThreadWorkspace {
 public:
  ThreadWorkspace() : workspace_{} {}
  ThreadWorkspace(const ThreadWorkspace&) = delete;
  ThreadWorkspace& operator=(const ThreadWorkspace&) = delete;
  ~ThreadWorkspace() { std::free(workspace_.memory); }

  Workspace* get() {
    float* memory = workspace_.memory;
    if (memory == nullptr) {
      void* allocated = nullptr;
      const size_t floats = kWorkspaceFloats + kPackedFloats;
      if (posix_memalign(&allocated, kHugePage, floats * sizeof(float)) != 0) return nullptr;
#if defined(MADV_HUGEPAGE)
      // A hint. Rows of the inputs lie a page apart each and need all the address translations that there are.
      madvise(allocated, floats * sizeof(float), MADV_HUGEPAGE);
#endif
      memory = static_cast<float*>(allocated);
    }
    workspace_ = Workspace{};
    workspace_.memory = memory;
    workspace_.packed_memory = memory + kWorkspaceFloats;
    workspace_.blocks_per_head = 1;
    std::fill(workspace_.packed, workspace_.packed + kMaxPackedBlocks, -1);
    return &workspace_;
  }

 private:
  Workspace workspace_;
};

}  // namespace

Workspace* thread_workspace() {
  static thread_local ThreadWorkspace workspace;
  return workspace.get();
}

}  // namespace effc::cpu
