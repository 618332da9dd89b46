// The kernels as the dispatch sees them. Each head size is compiled in a file of its own, attention_<head size>.cu.
#pragma once

#include "cuda/schedule.hpp"

namespace effc::cuda {

// Tiles of the tensor-core kernel, see tile_shapes.hpp.
enum class TileVariant : int32_t { kUsual, kFew };

// What a variant for heads of up to `head_dim` numbers is built with.
struct TileKernel {
  TileSize size;
  int threads;
  size_t shared_bytes;
};
template <int head_dim>
TileKernel tile_kernel(TileVariant variant);

// Queues it and returns a cudaError_t.
template <int head_dim>
int launch_tiles(TileVariant variant, const Call& call, void* stream);

// The same for E4M3, whose kernels are in attention_e4m3_{small,large}.cu.
template <int head_dim>
int launch_e4m3_tiles(TileVariant variant, const Call& call, void* stream);

}  // namespace effc::cuda
