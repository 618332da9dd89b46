// What the hosts of the kernels, TensorRT's plugin and ONNX Runtime's operators, ask the device.
#pragma once

#include <cuda_runtime_api.h>

namespace effc::cuda {

// Sets `capability` to the compute capability of this thread's device as one number, 89 for 8.9, or to 0 where none
// answers. The error is returned and forgotten: the next to ask for one would take it for its own.
inline cudaError_t device_capability(int& capability) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  capability = error == cudaSuccess ? 10 * major + minor : 0;
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

}  // namespace effc::cuda
