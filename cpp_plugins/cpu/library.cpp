// What the shared library exports: the entry point that ONNX Runtime calls, and two functions for Python and
// benchmarks.
#include <cstdlib>
#include <string>

#include "cpu/cached_attention_op.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/linear_attention_op.hpp"
#include "cpu/op_support.hpp"
#include "cpu/ort_abi.hpp"
#include "cpu/sparse_attention_op.hpp"
#include "cpu/topk_blocks_op.hpp"

#define EFFC_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace effc;

// "1.31.1" is at least 1.17.
bool recent_enough(const std::string& version) {
  const long major = std::strtol(version.c_str(), nullptr, 10);
  const size_t dot = version.find('.');
  const long minor = dot == std::string::npos ? 0 : std::strtol(version.c_str() + dot + 1, nullptr, 10);
  return major > 1 || (major == 1 && minor >= 17);
}

}  // namespace

// Registers effc's operators with the session that `options` will create.
EFFC_EXPORT ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  const ort::Api* api = base->GetApi(ort::kApiVersion);
  const std::string version = base->GetVersionString();
  if (api == nullptr || !recent_enough(version)) {
    // The first entry of the very first table is all that is needed to say so.
    const std::string message = "effc's native library needs ONNX Runtime " + std::string(ort::kMinimumVersion) +
                                " or newer and this is " + version +
                                ". Upgrade onnxruntime, or run without the library (EFFC_NATIVE=0).";
    return base->GetApi(1)->CreateStatus(ort::kNotImplemented, message.c_str());
  }
  return cpu::register_domain(*api, options,
                              {cpu::sparse_attention_op(*api), cpu::linear_attention_op(*api),
                               cpu::topk_blocks_op(*api), cpu::cached_attention_op(*api)});
}

// The instruction set that would run here: "avx512", "avx2" or "portable"; "" if EFFC_ISA cannot be met.
EFFC_EXPORT const char* effc_isa() {
  std::string problem;
  const cpu::Kernels* kernels = cpu::choose_kernels(problem);
  return kernels == nullptr ? "" : kernels->name;
}

// Runs multiply-adds from registers and returns the number of floating point operations: timed, the machine's peak.
EFFC_EXPORT double effc_multiply_add_rounds(int64_t iterations) {
  std::string problem;
  const cpu::Kernels* kernels = cpu::choose_kernels(problem);
  return kernels == nullptr ? 0.0 : kernels->multiply_add_rounds(iterations);
}
