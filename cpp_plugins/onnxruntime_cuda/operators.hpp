// effc's attention operators for ONNX Runtime's CUDA provider.
#pragma once

#include <vector>

#include "cpu/ort_abi.hpp"

namespace effc::cuda {

// One description per operator and type of numbers. `api` must be the runtime's.
std::vector<const ort::CustomOp*> operators(const ort::Api& api);

}  // namespace effc::cuda
