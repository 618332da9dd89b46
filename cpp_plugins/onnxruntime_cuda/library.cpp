// What the shared library exports: the entry point that ONNX Runtime calls.
#include "cpu/op_support.hpp"
#include "cpu/ort_abi.hpp"
#include "onnxruntime_cuda/operators.hpp"

// Registers effc's operators for the CUDA provider with the session that `options` will create. ONNX Runtime takes one
// library of domain effc a session, this one or that for the CPU, and a session without the CUDA provider finds no
// kernel here, function bodies or not.
extern "C" __attribute__((visibility("default"))) effc::ort::Status* RegisterCustomOps(
    effc::ort::SessionOptions* options, const effc::ort::ApiBase* base) {
  using namespace effc;
  const ort::Api* api = base->GetApi(ort::kApiVersion);
  if (api == nullptr) {
    const char* message = "effc's CUDA library needs ONNX Runtime 1.17 or newer. Upgrade onnxruntime-gpu.";
    return base->GetApi(1)->CreateStatus(ort::kNotImplemented, message);
  }
  return cpu::register_domain(*api, options, cuda::operators(*api));
}
