// effc::CachedAttention as an ONNX Runtime custom operator.
#pragma once

#include "cpu/ort_abi.hpp"

namespace effc::cpu {

// The description that the runtime keeps a pointer to. `api` must be the runtime's.
const ort::CustomOp* cached_attention_op(const ort::Api& api);

}  // namespace effc::cpu
