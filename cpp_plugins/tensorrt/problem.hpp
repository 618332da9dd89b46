// From the tensors that TensorRT describes to the problem that the kernels take.
#pragma once

#include <string>

#include "NvInfer.h"
#include "tensorrt/attributes.hpp"

namespace effc::trt {

// The type of the output, the query's unless that is FP8.
nvinfer1::DataType output_type(const Attributes& attributes, nvinfer1::DataType number);

// Whether the kernels take an input or output of this place, type and layout, and "" or why not.
std::string check_tensor(const Attributes& attributes, int32_t position, const nvinfer1::PluginTensorDesc& tensor,
                         nvinfer1::DataType number);

// Bounds are the largest sizes of a profile, each found on its own: a key and its mask need not agree there.
enum class Shapes { kActual, kBounds };

// The problem with these shapes, its pointers null; that of a LinearAttention node is `linear_problem` of it. Returns
// "" or what is wrong with the shapes.
std::string read_problem(const Attributes& attributes, const nvinfer1::Dims* shapes, Shapes meaning,
                         nvinfer1::DataType number, cuda::SparseAttention& problem);

// The same sizes and pointers for the kernels of linear attention.
cuda::LinearAttention linear_problem(const Attributes& attributes, const cuda::SparseAttention& problem);

// "" if the kernels take the problem on the device in question, else why not. That is the device of this thread; where
// there is none, an engine is being built for another machine: EFFC_TARGET_SM (89, say) names its compute capability,
// and without it the problem is taken if any device would.
std::string refused(const Attributes& attributes, const cuda::SparseAttention& problem);

size_t workspace_bytes(const Attributes& attributes, const cuda::SparseAttention& problem);

// What a node of LinearAttention goes on from and hands out; null where it does not.
struct States {
  const float* past_state = nullptr;
  const float* past_normaliser = nullptr;
  float* present_state = nullptr;
  float* present_normaliser = nullptr;
};
int launch(const Attributes& attributes, const cuda::SparseAttention& problem, const States& states, void* workspace,
           cudaStream_t stream);

}  // namespace effc::trt
