// Which kernels this machine runs.
#pragma once

#include <string>

#include "cpu/attention.hpp"

namespace effc::cpu {

// The fastest kernels that the CPU can run, or those that the environment variable EFFC_ISA names (avx512, avx2,
// portable). Returns null and says why in `problem` if the named ones are unknown or beyond this CPU.
const Kernels* choose_kernels(std::string& problem);

}  // namespace effc::cpu
