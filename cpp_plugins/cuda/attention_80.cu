#include "cuda/attention_launch.cuh"

namespace effc::cuda {

template TileKernel tile_kernel<80>(TileVariant);
template int launch_tiles<80>(TileVariant, const Call&, void*);

}  // namespace effc::cuda
