#include "cuda/attention_launch.cuh"

namespace effc::cuda {

template TileKernel tile_kernel<256>(TileVariant);
template int launch_tiles<256>(TileVariant, const Call&, void*);

}  // namespace effc::cuda
