#include "cpu/sparse_attention_op.hpp"

#include <array>
#include <atomic>
#include <cmath>
#include <exception>
#include <string>
#include <vector>

#include "cpu/dispatch.hpp"
#include "cpu/schedule.hpp"
#include "pattern/parse.hpp"

namespace effc::cpu {
namespace {

enum Input : size_t { kQuery, kKey, kValue, kKeyMask, kInputCount };
enum Output : size_t { kAttention, kLogSumExp, kOutputCount };

// Problems that a user can cause travel as exceptions to the C boundary and leave it as a status.
struct Failure : std::exception {
  ort::ErrorCode code;
  std::string message;
  Failure(ort::ErrorCode code, std::string message) : code(code), message(std::move(message)) {}
  const char* what() const noexcept override { return message.c_str(); }
};

[[noreturn]] void refuse(const std::string& message) {
  throw Failure(ort::kInvalidArgument, "effc::SparseAttention: " + message);
}

// Runs `body`, turning whatever it throws into a status.
template <class Body>
ort::Status* guarded(const ort::Api& api, Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return api.CreateStatus(failure.code, failure.what());
  } catch (const std::exception& error) {
    return api.CreateStatus(ort::kRuntimeException, error.what());
  } catch (...) {
    return api.CreateStatus(ort::kRuntimeException, "effc::SparseAttention: unknown error.");
  }
}

// Passes on a status of the runtime as a failure.
void check(const ort::Api& api, ort::Status* status) {
  if (status == nullptr) return;
  const std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  throw Failure(ort::kFail, "effc::SparseAttention: ONNX Runtime says: " + message);
}

// True if the attribute was there.
bool succeeded(const ort::Api& api, ort::Status* status) {
  if (status != nullptr) api.ReleaseStatus(status);
  return status == nullptr;
}

struct Attributes {
  Pattern pattern;
  int64_t num_heads = 0;
  int64_t kv_num_heads = 0;
  float scale = 0;  // 0: 1 / sqrt(head_dim)
};

std::string string_attribute(const ort::Api& api, const ort::KernelInfo* info, const char* name) {
  size_t size = 0;
  if (!succeeded(api, api.KernelInfoGetAttribute_string(info, name, nullptr, &size))) {
    refuse(std::string("the attribute '") + name + "' (a string) is missing. Set it, for example to local:256.");
  }
  std::string text(size, '\0');
  check(api, api.KernelInfoGetAttribute_string(info, name, text.data(), &size));
  while (!text.empty() && text.back() == '\0') text.pop_back();
  return text;
}

Attributes read_attributes(const ort::Api& api, const ort::KernelInfo* info) {
  Attributes attributes;
  int64_t causal = 0;
  succeeded(api, api.KernelInfoGetAttribute_int64(info, "causal", &causal));
  if (causal != 0 && causal != 1) refuse("the attribute 'causal' is " + std::to_string(causal) + ". Set it to 0 or 1.");

  const std::string problem = parse_pattern(string_attribute(api, info, "pattern"), causal == 1, attributes.pattern);
  if (!problem.empty()) refuse(problem);

  if (!succeeded(api, api.KernelInfoGetAttribute_int64(info, "num_heads", &attributes.num_heads)) ||
      attributes.num_heads < 1) {
    refuse("the attribute 'num_heads' must be a whole number of at least 1.");
  }
  attributes.kv_num_heads = attributes.num_heads;
  succeeded(api, api.KernelInfoGetAttribute_int64(info, "kv_num_heads", &attributes.kv_num_heads));
  if (attributes.kv_num_heads < 1 || attributes.num_heads % attributes.kv_num_heads != 0) {
    refuse("num_heads (" + std::to_string(attributes.num_heads) + ") must be a multiple of kv_num_heads (" +
           std::to_string(attributes.kv_num_heads) + ").");
  }
  succeeded(api, api.KernelInfoGetAttribute_float(info, "scale", &attributes.scale));
  if (!std::isfinite(attributes.scale)) refuse("the attribute 'scale' is not a finite number.");
  return attributes;
}

struct Tensor {
  void* data = nullptr;  // null: the optional input is absent
  std::vector<int64_t> shape;
};

std::string text_of(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t d = 0; d < shape.size(); ++d) text += (d == 0 ? "" : ", ") + std::to_string(shape[d]);
  return text + "]";
}

Tensor read_input(const ort::Api& api, const ort::KernelContext* context, size_t index) {
  Tensor tensor;
  size_t count = 0;
  check(api, api.KernelContext_GetInputCount(context, &count));
  if (index >= count) return tensor;
  const ort::Value* value = nullptr;
  check(api, api.KernelContext_GetInput(context, index, &value));
  if (value == nullptr) return tensor;

  ort::TensorTypeAndShapeInfo* info = nullptr;
  check(api, api.GetTensorTypeAndShape(value, &info));
  size_t rank = 0;
  ort::Status* status = api.GetDimensionsCount(info, &rank);
  tensor.shape.resize(rank);
  if (status == nullptr) status = api.GetDimensions(info, tensor.shape.data(), rank);
  api.ReleaseTensorTypeAndShapeInfo(info);
  check(api, status);
  // The C interface has one function for reading and writing; inputs are only read.
  check(api, api.GetTensorMutableData(const_cast<ort::Value*>(value), &tensor.data));
  return tensor;
}

// Null if nobody asked for this output.
float* allocate_output(const ort::Api& api, ort::KernelContext* context, size_t index,
                       const std::vector<int64_t>& shape) {
  size_t count = 0;
  check(api, api.KernelContext_GetOutputCount(context, &count));
  if (index >= count) return nullptr;
  ort::Value* value = nullptr;
  check(api, api.KernelContext_GetOutput(context, index, shape.data(), shape.size(), &value));
  if (value == nullptr) return nullptr;
  void* data = nullptr;
  check(api, api.GetTensorMutableData(value, &data));
  return static_cast<float*>(data);
}

void check_shapes(const Attributes& attributes, const Tensor& query, const Tensor& key, const Tensor& value,
                  const Tensor& key_mask) {
  const auto require_rank = [](const Tensor& tensor, size_t rank, const char* name, const char* layout) {
    if (tensor.shape.size() != rank) {
      refuse(std::string(name) + " has shape " + text_of(tensor.shape) + "; give it as " + layout + ".");
    }
  };
  require_rank(query, 3, "query", "[batch, q_len, num_heads * head_dim]");
  require_rank(key, 3, "key", "[batch, kv_len, kv_num_heads * head_dim]");
  require_rank(value, 3, "value", "[batch, kv_len, kv_num_heads * head_dim]");

  const int64_t width = query.shape[2];
  const int64_t head_dim = width / attributes.num_heads;
  if (width % attributes.num_heads != 0) {
    refuse("the last dimension of query (" + std::to_string(width) + ") must be a multiple of num_heads (" +
           std::to_string(attributes.num_heads) + ").");
  }
  if (head_dim < 8 || head_dim > kMaxHeadDim || head_dim % 8 != 0) {
    refuse("head_dim is " + std::to_string(head_dim) + "; the native kernels need a multiple of 8 from 8 to " +
           std::to_string(kMaxHeadDim) + ". Run the model without the native library (EFFC_NATIVE=0).");
  }
  if (key.shape[0] != query.shape[0]) {
    refuse("query has batch " + std::to_string(query.shape[0]) + " and key " + std::to_string(key.shape[0]) +
           ". Give both the same batch.");
  }
  if (key.shape[2] != attributes.kv_num_heads * head_dim) {
    refuse("the last dimension of key is " + std::to_string(key.shape[2]) + "; with kv_num_heads " +
           std::to_string(attributes.kv_num_heads) + " and head_dim " + std::to_string(head_dim) + " it must be " +
           std::to_string(attributes.kv_num_heads * head_dim) + ".");
  }
  if (value.shape != key.shape) {
    refuse("value has shape " + text_of(value.shape) + " and key " + text_of(key.shape) + "; they must be equal.");
  }
  if (key.shape[1] < query.shape[1]) {
    refuse("there are " + std::to_string(query.shape[1]) + " queries and " + std::to_string(key.shape[1]) +
           " keys. The queries are the last positions of the keys, so pass past and present keys together.");
  }
  if (key.shape[1] > kMaxLength) refuse("sequences longer than " + std::to_string(kMaxLength) + " are not supported.");
  if (key_mask.data != nullptr && key_mask.shape != std::vector<int64_t>{key.shape[0], key.shape[1]}) {
    refuse("key_mask has shape " + text_of(key_mask.shape) +
           "; it must be [batch, kv_len] = " + text_of({key.shape[0], key.shape[1]}) + ".");
  }
}

// What one parallel call works on.
struct Job {
  const Problem& problem;
  const Schedule& schedule;
  const Kernels& kernels;
  std::atomic<bool> out_of_memory{false};

  static void run(void* job_pointer, size_t index) noexcept {
    Job& job = *static_cast<Job*>(job_pointer);
    if (!run_task(job.problem, job.schedule, job.kernels, static_cast<int64_t>(index))) job.out_of_memory = true;
  }
};

class SparseAttentionKernel {
 public:
  SparseAttentionKernel(const ort::Api& api, const ort::KernelInfo* info)
      : api_(api), attributes_(read_attributes(api, info)) {
    std::string problem;
    kernels_ = choose_kernels(problem);
    if (kernels_ == nullptr) refuse(problem);
  }

  const ort::Api& api() const { return api_; }

  void compute(ort::KernelContext* context) const {
    const Tensor query = read_input(api_, context, kQuery);
    const Tensor key = read_input(api_, context, kKey);
    const Tensor value = read_input(api_, context, kValue);
    const Tensor key_mask = read_input(api_, context, kKeyMask);
    check_shapes(attributes_, query, key, value, key_mask);

    Problem problem{};
    problem.batch = query.shape[0];
    problem.q_len = query.shape[1];
    problem.kv_len = key.shape[1];
    problem.num_heads = attributes_.num_heads;
    problem.kv_num_heads = attributes_.kv_num_heads;
    problem.head_dim = query.shape[2] / attributes_.num_heads;
    problem.scale = attributes_.scale != 0 ? attributes_.scale : 1.0f / std::sqrt(static_cast<float>(problem.head_dim));
    problem.pattern = attributes_.pattern;
    problem.output = allocate_output(api_, context, kAttention, query.shape);
    problem.log_sum_exp = allocate_output(api_, context, kLogSumExp, {problem.batch, problem.num_heads, problem.q_len});
    if (problem.batch == 0 || problem.q_len == 0) return;

    problem.query = static_cast<const float*>(query.data);
    problem.key = static_cast<const float*>(key.data);
    problem.value = static_cast<const float*>(value.data);
    problem.key_mask = static_cast<const uint8_t*>(key_mask.data);
    std::vector<AttendableKeys> attendable(problem.batch);
    for (int64_t b = 0; b < problem.batch; ++b) {
      const uint8_t* mask = problem.key_mask == nullptr ? nullptr : problem.key_mask + b * problem.kv_len;
      attendable[b] = attendable_keys(mask, static_cast<Position>(problem.kv_len));
    }
    problem.attendable_keys = attendable.data();

    const Schedule schedule = schedule_for(problem);
    Job job{problem, schedule, *kernels_};
    check(api_, api_.KernelContext_ParallelFor(context, Job::run, static_cast<size_t>(schedule.tasks), 0, &job));
    if (job.out_of_memory) throw Failure(ort::kRuntimeException, "effc::SparseAttention: out of memory.");
  }

 private:
  const ort::Api& api_;
  const Attributes attributes_;
  const Kernels* kernels_ = nullptr;
};

// ---------------------------------------------------------------------------------------------------------------------
// The operator's description for the runtime.

ort::Status* create_kernel(const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info, void** kernel) {
  return guarded(*api, [&] { *kernel = new SparseAttentionKernel(*api, info); });
}

ort::Status* compute(void* kernel_pointer, ort::KernelContext* context) {
  const auto& kernel = *static_cast<const SparseAttentionKernel*>(kernel_pointer);
  return guarded(kernel.api(), [&] { kernel.compute(context); });
}

const ort::Api* g_inference_api = nullptr;

// The output has the type and shape of the query, symbolic dimensions included. An input of unknown shape is no error.
ort::Status* infer_output_shape(const ort::CustomOp*, ort::ShapeInferContext* context) {
  const ort::Api& api = *g_inference_api;
  ort::TensorTypeAndShapeInfo* query = nullptr;  // owned by the context
  if (!succeeded(api, api.ShapeInferContext_GetInputTypeShape(context, kQuery, &query)) || query == nullptr) {
    return nullptr;
  }
  return api.ShapeInferContext_SetOutputTypeShape(context, kAttention, query);
}

ort::CustomOp describe() {
  using ort::CustomOp;
  CustomOp op{};
  op.version = ort::kApiVersion;
  op.GetName = [](const CustomOp*) { return "SparseAttention"; };
  op.GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };
  op.GetInputType = [](const CustomOp*, size_t index) { return index == kKeyMask ? ort::kBool : ort::kFloat; };
  op.GetInputTypeCount = [](const CustomOp*) -> size_t { return kInputCount; };
  op.GetInputCharacteristic = [](const CustomOp*, size_t index) {
    return index == kKeyMask ? ort::kOptional : ort::kRequired;
  };
  op.GetInputMemoryType = [](const CustomOp*, size_t) { return ort::kDefaultMemory; };
  op.GetOutputType = [](const CustomOp*, size_t) { return ort::kFloat; };
  op.GetOutputTypeCount = [](const CustomOp*) -> size_t { return kOutputCount; };
  op.GetOutputCharacteristic = [](const CustomOp*, size_t index) {
    return index == kLogSumExp ? ort::kOptional : ort::kRequired;
  };
  const auto one = [](const CustomOp*) { return 1; };
  op.GetVariadicInputMinArity = one;
  op.GetVariadicInputHomogeneity = one;
  op.GetVariadicOutputMinArity = one;
  op.GetVariadicOutputHomogeneity = one;
  op.CreateKernelV2 = create_kernel;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = [](void* kernel) { delete static_cast<SparseAttentionKernel*>(kernel); };
  op.InferOutputShape = infer_output_shape;
  op.GetStartVersion = one;
  op.GetEndVersion = [](const CustomOp*) { return 0x7fffffff; };
  return op;
}

}  // namespace

const ort::CustomOp* sparse_attention_op(const ort::Api& api) {
  g_inference_api = &api;
  static const ort::CustomOp op = describe();
  return &op;
}

}  // namespace effc::cpu
