#include "cuda/attention_launch.cuh"

namespace effc::cuda {

template TileKernel tile_kernel<32>(TileVariant);
template int launch_tiles<32>(TileVariant, const Call&, void*);

}  // namespace effc::cuda
