// The memory that a thread computes in.
#pragma once

#include "cpu/attention.hpp"

namespace effc::cpu {

// Floats for keys and values that lie side by side: 16 thousand keys of 64. What does not fit into the second-level
// cache is still read faster side by side than a page apart, and memory that is not used is never touched.
constexpr size_t kPackedFloats = (8 << 20) / sizeof(float);

// This thread's workspace with nothing in it, or null if there is no memory. It is kept for the life of the thread: a
// task is too short to allocate for.
Workspace* thread_workspace();

}  // namespace effc::cpu
