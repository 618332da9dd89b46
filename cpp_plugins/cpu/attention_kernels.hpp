// The kernels, written once in terms of `Simd`. Each attention_*.cpp includes one simd_*.hpp and then this file.
//
// Everything here has internal linkage and nothing here uses the standard library's templates: the linker keeps one
// copy of a shared inline function, and that copy must not be the one compiled for AVX-512.
#pragma once

#include "cpu/attention_common.hpp"
#include "cpu/attention_few.hpp"
#include "cpu/attention_tile.hpp"
#include "cpu/cached_kernel.hpp"
#include "cpu/linear_kernel.hpp"
#include "cpu/multiply_add_peak.hpp"
