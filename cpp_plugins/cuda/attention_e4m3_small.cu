#include "cuda/attention_launch.cuh"

namespace effc::cuda {

template int launch_e4m3_tiles<32>(TileVariant, const Call&, void*);
template int launch_e4m3_tiles<64>(TileVariant, const Call&, void*);
template int launch_e4m3_tiles<96>(TileVariant, const Call&, void*);

}  // namespace effc::cuda
