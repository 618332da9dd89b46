// A window that passes over first tokens: every block is copied once.
#pragma once

#include <memory>
#include <string>

#include "cpu/packed_slots.hpp"

namespace effc::cpu::selftest {

// Tiles of two heads look at the first blocks and at a window of five. Empty if all is well.
inline std::string check_slots(Position first_blocks) {
  constexpr int kHeads = 2, kWindow = 5, kTiles = 100;
  const auto workspace = std::make_unique<Workspace>();
  workspace->blocks_per_head = static_cast<int32_t>(first_blocks + kWindow);
  for (Position& packed : workspace->packed) packed = -1;
  int copies = 0;
  for (Position tile = 0; tile < kTiles; ++tile) {
    for (int n = 0; n < kHeads * (first_blocks + kWindow); ++n) {
      const int head = n / (first_blocks + kWindow);
      const Position nth = n % (first_blocks + kWindow);
      const Position number = nth < first_blocks ? nth : tile + nth - first_blocks;
      const int64_t slot = slot_of(*workspace, head, number);
      if (slot / workspace->blocks_per_head != head) return "a block lies in a slot of another head";
      copies += workspace->packed[slot] != number;
      workspace->packed[slot] = number;
    }
  }
  const int blocks = kHeads * (kTiles + kWindow - 1);
  if (copies == blocks) return "";
  return std::to_string(copies) + " copies of " + std::to_string(blocks) + " blocks beside " +
         std::to_string(first_blocks) + " first ones";
}

}  // namespace effc::cpu::selftest
