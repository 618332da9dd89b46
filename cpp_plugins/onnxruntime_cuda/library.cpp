// What the shared library exports: the entry point that ONNX Runtime calls.
#include <mutex>

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
  // Never released, because ONNX Runtime keeps a pointer to it for as long as any session lives.
  static std::mutex mutex;
  static ort::CustomOpDomain* domain = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (domain == nullptr) {
    ort::CustomOpDomain* created = nullptr;
    if (ort::Status* status = api->CreateCustomOpDomain("effc", &created)) return status;
    for (const ort::CustomOp* op : cuda::operators(*api)) {
      if (ort::Status* status = api->CustomOpDomain_Add(created, op)) return status;
    }
    domain = created;
  }
  return api->AddCustomOpDomain(options, domain);
}
