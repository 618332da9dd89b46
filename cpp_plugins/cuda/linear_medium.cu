#include "cuda/linear_launch.cuh"

namespace effc::cuda {

template int launch_linear<80>(const LinearCall&, void*);
template int launch_linear<96>(const LinearCall&, void*);

}  // namespace effc::cuda
