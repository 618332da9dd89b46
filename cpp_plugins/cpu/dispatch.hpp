// Which kernels this machine runs.
#pragma once

#include <string>

#include "cpu/attention.hpp"

namespace effc::cpu {

// The fastest kernels that the CPU can run, or those that the environment variable EFFC_ISA names (avx512, avx2,
// portable). Returns null and says why in `problem` if the named ones are unknown or beyond this CPU.
// `bf16` allows products of bfloat16 numbers, which are used where the CPU has AVX512_BF16.
const Kernels* choose_kernels(std::string& problem, bool bf16 = false);

// Whether a node's attribute `precision` ("fp32", "bf16" or "", which leaves it to the environment variable
// EFFC_PRECISION) allows bfloat16. Says so in `problem` if it is none of these.
bool bf16_allowed(const std::string& attribute, std::string& problem);

}  // namespace effc::cpu
