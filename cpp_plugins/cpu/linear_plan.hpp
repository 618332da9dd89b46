// Cuts a call of linear attention into tasks and runs them.
#pragma once

#include "cpu/linear_attention.hpp"
#include "cpu/schedule.hpp"

namespace effc::cpu {

// Returns false if memory ran out. The sums do not depend on the number of threads.
bool run_linear(const LinearProblem& problem, const LinearKernels& kernels, const ParallelFor& parallel_for);

}  // namespace effc::cpu
