#include "cuda/linear_launch.cuh"

namespace effc::cuda {

template int launch_linear<128>(const LinearCall&, void*);
template int launch_linear<256>(const LinearCall&, void*);

}  // namespace effc::cuda
