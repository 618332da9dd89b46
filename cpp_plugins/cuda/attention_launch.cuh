// Everything that attention_<head size>.cu and attention_e4m3_*.cu have to instantiate.
#pragma once

#include "cuda/attention_tile.cuh"
#include "cuda/kernels.hpp"

namespace effc::cuda {

static_assert(sizeof(Call) <= 4096, "kernels take at most 4 KB of arguments");

template <class Shape>
int launch_shape(const Call& call, void* stream) {
  const int64_t blocks = block_count(call.problem, call.schedule);
  if (call.problem.number == Number::kHalf) {
    return launch_kernel(attend_tile<Half, Shape>, blocks, Shape::kThreads, sizeof(SharedTiles<Half, Shape>), stream,
                         call);
  }
  return launch_kernel(attend_tile<BFloat16, Shape>, blocks, Shape::kThreads, sizeof(SharedTiles<BFloat16, Shape>),
                       stream, call);
}

template <class Shape>
int launch_e4m3_shape(const Call& call, void* stream) {
  return launch_kernel(attend_tile<E4M3, Shape>, block_count(call.problem, call.schedule), Shape::kThreads,
                       sizeof(SharedTiles<E4M3, Shape>), stream, call);
}

template <class Shape>
TileKernel kernel_of_shape() {
  return {Shape::kSize, Shape::kThreads, sizeof(SharedTiles<Half, Shape>)};
}

template <int head_dim>
TileKernel tile_kernel(TileVariant variant) {
  return variant == TileVariant::kUsual ? kernel_of_shape<UsualShape<head_dim>>()
                                        : kernel_of_shape<FewShape<head_dim>>();
}

template <int head_dim>
int launch_tiles(TileVariant variant, const Call& call, void* stream) {
  return variant == TileVariant::kUsual ? launch_shape<UsualShape<head_dim>>(call, stream)
                                        : launch_shape<FewShape<head_dim>>(call, stream);
}

template <int head_dim>
int launch_e4m3_tiles(TileVariant variant, const Call& call, void* stream) {
  return variant == TileVariant::kUsual ? launch_e4m3_shape<UsualE4M3Shape<head_dim>>(call, stream)
                                        : launch_e4m3_shape<FewShape<head_dim>>(call, stream);
}

}  // namespace effc::cuda
