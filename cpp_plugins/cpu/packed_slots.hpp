// Which slot of a task holds which block of keys and values side by side.
#pragma once

#include "cpu/attention.hpp"

namespace effc::cpu {
namespace {

// The slot of block `number` of the task's key/value head `kv_head`: where it is already, or else what was not used for
// longest. First tokens that every query sees thus stay while a window passes by, and the blocks of a window alone
// follow one another round.
inline int64_t slot_of(Workspace& workspace, int64_t kv_head, Position number) {
  const int64_t begin = kv_head * workspace.blocks_per_head, end = begin + workspace.blocks_per_head;
  int64_t place = begin + number % workspace.blocks_per_head;
  if (workspace.packed[place] != number) {
    int64_t oldest = place;
    bool found = false;
    for (int64_t slot = begin; slot < end && !found; ++slot) {
      found = workspace.packed[slot] == number;
      if (found) place = slot;
      if (workspace.last_used[slot] < workspace.last_used[oldest]) oldest = slot;
    }
    if (!found) place = oldest;
  }
  workspace.last_used[place] = ++workspace.lookups;
  return place;
}

inline bool is_packed(const Workspace& workspace, int64_t kv_head, Position number) {
  const int64_t begin = kv_head * workspace.blocks_per_head, end = begin + workspace.blocks_per_head;
  for (int64_t slot = begin; slot < end; ++slot) {
    if (workspace.packed[slot] == number) return true;
  }
  return false;
}

}  // namespace
}  // namespace effc::cpu
