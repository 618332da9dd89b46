#include "cuda/attention_launch.cuh"

namespace effc::cuda {

template int launch_e4m3_tiles<128>(TileVariant, const Call&, void*);
template int launch_e4m3_tiles<256>(TileVariant, const Call&, void*);

}  // namespace effc::cuda
