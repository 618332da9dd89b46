#include "cuda/attention_launch.cuh"

namespace effc::cuda {

template TileKernel tile_kernel<96>(TileVariant);
template int launch_tiles<96>(TileVariant, const Call&, void*);

}  // namespace effc::cuda
