// Everything that linear_{small,medium,large}.cu have to instantiate.
#pragma once

#include "cuda/linear_kernels.hpp"
#include "cuda/linear_tile.cuh"

namespace effc::cuda {

static_assert(sizeof(LinearCall) <= 4096, "kernels take at most 4 KB of arguments");

template <int head_dim>
int launch_linear(const LinearCall& call, void* stream) {
  using Shape = LinearShape<head_dim>;
  const int64_t blocks = linear_blocks(call.problem, call.schedule);
  if (call.problem.number == Number::kHalf) {
    return launch_kernel(attend_linear<Half, Shape>, blocks, Shape::kThreads, sizeof(SharedLinear<Half, Shape>), stream,
                         call);
  }
  return launch_kernel(attend_linear<BFloat16, Shape>, blocks, Shape::kThreads, sizeof(SharedLinear<BFloat16, Shape>),
                       stream, call);
}

}  // namespace effc::cuda
