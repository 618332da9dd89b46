// Which slot of a task holds which block of keys and values side by side.
#pragma once

#include "cpu/attention.hpp"

namespace effc::cpu {
namespace {

// The slot that holds block `number` of the task's key/value head `kv_head`, or -1.
inline int64_t find_packed(const Workspace& workspace, int64_t kv_head, Position number) {
  const int64_t begin = kv_head * workspace.blocks_per_head, end = begin + workspace.blocks_per_head;
  const int64_t likely = begin + number % workspace.blocks_per_head;
  if (workspace.packed[likely] == number) return likely;
  for (int64_t slot = begin; slot < end; ++slot) {
    if (workspace.packed[slot] == number) return slot;
  }
  return -1;
}

// The slot that holds the block or else is to take it: the one that was not used for longest. First tokens that every
// query sees thus stay while a window passes by, and the blocks of a window alone follow one another round.
inline int64_t slot_of(Workspace& workspace, int64_t kv_head, Position number) {
  int64_t place = find_packed(workspace, kv_head, number);
  if (place < 0) {
    const int64_t begin = kv_head * workspace.blocks_per_head, end = begin + workspace.blocks_per_head;
    place = begin + number % workspace.blocks_per_head;
    for (int64_t slot = begin; slot < end; ++slot) {
      if (workspace.last_used[slot] < workspace.last_used[place]) place = slot;
    }
  }
  workspace.last_used[place] = ++workspace.lookups;
  return place;
}

}  // namespace
}  // namespace effc::cpu
