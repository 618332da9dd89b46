#include "cuda/linear_launch.cuh"

namespace effc::cuda {

template int launch_linear<32>(const LinearCall&, void*);
template int launch_linear<64>(const LinearCall&, void*);

}  // namespace effc::cuda
