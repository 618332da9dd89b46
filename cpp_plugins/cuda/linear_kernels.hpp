// The reading kernels of linear attention as the dispatch sees them: linear_{small,medium,large}.cu compile them.
#pragma once

#include "cuda/linear_schedule.hpp"

namespace effc::cuda {

// For heads of up to `head_dim` numbers; queues it and returns a cudaError_t.
template <int head_dim>
int launch_linear(const LinearCall& call, void* stream);

}  // namespace effc::cuda
