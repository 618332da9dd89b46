#include "cuda/attention_launch.cuh"

namespace effc::cuda {

template TileKernel tile_kernel<128>(TileVariant);
template int launch_tiles<128>(TileVariant, const Call&, void*);

}  // namespace effc::cuda
