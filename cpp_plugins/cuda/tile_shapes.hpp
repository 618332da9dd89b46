// The sizes of the tensor-core kernel's tiles. Plain C++, so that tests and benchmarks read what the kernel is built
// with.
#pragma once

#include <cstddef>

#include "cuda/schedule.hpp"

namespace effc::cuda {

// A warp works on row_blocks * 16 queries; every warp of a block meets every tile of keys. `slots` tiles of keys and
// values are in shared memory: one is worked on while the others are on their way. `head_dim` is the largest that fits;
// what a smaller head lacks is zeros.
template <int head_dim, int warps, int row_blocks, int keys, int slots, int blocks_per_multiprocessor>
struct TileShape {
  static_assert(head_dim % 16 == 0 && keys % 16 == 0 && keys <= 64 && slots >= 2);

  static constexpr int kHeadDim = head_dim;
  static constexpr int kWarps = warps;
  static constexpr int kRowBlocks = row_blocks;
  static constexpr int kKeys = keys;
  static constexpr int kSlots = slots;
  static constexpr int kThreads = (warps + 1) * 32;  // one warp supplies the others
  static constexpr int kRows = warps * row_blocks * 16;
  // Blocks that registers are to be left for; bounds what a thread may take. Some architectures' code takes more
  // registers than three blocks leave, and would spill; if it does with two as well, one has to do.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  static constexpr bool kWouldSpill = head_dim == 64;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
  static constexpr bool kWouldSpill =
      head_dim == 80 || head_dim == 96 || (head_dim == 128 && blocks_per_multiprocessor == 2);
#else
  static constexpr bool kWouldSpill = false;
#endif
  static constexpr int kBlocksPerMultiprocessor = kWouldSpill ? (head_dim <= 80 ? 2 : 1) : blocks_per_multiprocessor;
  // 32 queries share a word that says which of them see a key.
  static constexpr int kQueryWords = (kRows + 31) / 32;
  // Queries stay in registers where those suffice, and are loaded again for every tile of keys where not.
  static constexpr bool kQueriesInRegisters = head_dim <= 96;

  static constexpr TileSize kSize = {kRows, kKeys};
};

// So many keys that a tile is about as much work whatever the head, and that slots fit into the 99 KiB of the smallest
// devices.
constexpr int keys_for(int head_dim) {
  return head_dim <= 64 ? 64 : 32;
}

// Long inputs. Five warps and 128 registers let three blocks fill a multiprocessor's four schedulers.
template <int head_dim>
using UsualShape = TileShape<head_dim, 4, 1, keys_for(head_dim), 2, head_dim <= 128 ? 3 : 1>;

// The same for E4M3, whose tiles take half the memory and, from heads of 96 on, more registers than three blocks leave.
template <int head_dim>
using UsualE4M3Shape = TileShape<head_dim, 4, 1, keys_for(head_dim), 2, head_dim <= 64 ? 3 : (head_dim <= 128 ? 2 : 1)>;

// Decode steps: up to 16 queries of a group of heads. One warp that computes, so that keys can be split finely.
template <int head_dim>
using FewShape = TileShape<head_dim, 1, 1, keys_for(head_dim), 2, head_dim <= 128 ? 6 : 3>;

}  // namespace effc::cuda
