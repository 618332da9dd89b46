#include "cuda/attention_launch.cuh"

namespace effc::cuda {

template TileKernel tile_kernel<64>(TileVariant);
template int launch_tiles<64>(TileVariant, const Call&, void*);

}  // namespace effc::cuda
