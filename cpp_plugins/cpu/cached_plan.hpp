// Cuts attention to a cache into parts and brings their results together.
#pragma once

#include "cpu/cached_attention.hpp"
#include "cpu/schedule.hpp"

namespace effc::cpu {

// Computes the call's output. Returns false if there is no memory.
bool run_cached(const CachedCall& call, AttendCacheFunction attend, const ParallelFor& parallel_for);

}  // namespace effc::cpu
