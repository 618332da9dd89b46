#include "cpu/op_support.hpp"

#include <cmath>
#include <cstdio>
#include <mutex>

#include "pattern/pattern.hpp"

namespace effc::cpu {

void refuse(const std::string& message) {
  throw Failure(ort::kInvalidArgument, message);
}

ort::Status* guarded(const ort::Api& api, const char* op, const std::function<void()>& body) noexcept {
  const auto status = [&](ort::ErrorCode code, const char* what) {
    // A fixed buffer: there may be no memory left for a string.
    char message[1024];
    std::snprintf(message, sizeof message, "%s: %s", op, what);
    return api.CreateStatus(code, message);
  };
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return status(failure.code, failure.what());
  } catch (const std::exception& error) {
    return status(ort::kRuntimeException, error.what());
  } catch (...) {
    return status(ort::kRuntimeException, "unknown error.");
  }
}

void check(const ort::Api& api, ort::Status* status) {
  if (status == nullptr) return;
  const std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  throw Failure(ort::kFail, "ONNX Runtime says: " + message);
}

bool succeeded(const ort::Api& api, ort::Status* status) {
  if (status != nullptr) api.ReleaseStatus(status);
  return status == nullptr;
}

namespace {

std::string string_attribute(const ort::Api& api, const ort::KernelInfo* info, const char* name,
                             bool optional = false) {
  size_t size = 0;
  if (!succeeded(api, api.KernelInfoGetAttribute_string(info, name, nullptr, &size))) {
    if (optional) return "";
    refuse(std::string("the attribute '") + name + "' (a string) is missing. Set it, for example to local:256.");
  }
  std::string text(size, '\0');
  check(api, api.KernelInfoGetAttribute_string(info, name, text.data(), &size));
  while (!text.empty() && text.back() == '\0') text.pop_back();
  return text;
}

}  // namespace

AttentionAttributes read_attributes(const ort::Api& api, const ort::KernelInfo* info) {
  AttentionAttributes attributes;
  int64_t causal = 0;
  succeeded(api, api.KernelInfoGetAttribute_int64(info, "causal", &causal));
  if (causal != 0 && causal != 1) refuse("the attribute 'causal' is " + std::to_string(causal) + ". Set it to 0 or 1.");
  attributes.causal = causal == 1;
  attributes.pattern = string_attribute(api, info, "pattern");

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
  attributes.precision = string_attribute(api, info, "precision", true);
  return attributes;
}

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
  ort::Status* status = api.GetTensorElementType(info, &tensor.type);
  if (status == nullptr) status = api.GetDimensionsCount(info, &rank);
  tensor.shape.resize(rank);
  if (status == nullptr) status = api.GetDimensions(info, tensor.shape.data(), rank);
  api.ReleaseTensorTypeAndShapeInfo(info);
  check(api, status);
  // The C interface has one function for reading and writing; inputs are only read.
  check(api, api.GetTensorMutableData(const_cast<ort::Value*>(value), &tensor.data));
  tensor.given = true;
  return tensor;
}

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

namespace {

void check_attention_inputs(const AttentionAttributes& attributes, const Tensor& query, const Tensor& key,
                            const Tensor& value, const Tensor& key_mask, int64_t max_head_dim) {
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
  if (head_dim < 1 || head_dim > max_head_dim) {
    refuse("head_dim is " + std::to_string(head_dim) + "; the native kernels take 1 to " +
           std::to_string(max_head_dim) + ". Run the model without the native library (EFFC_NATIVE=0).");
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
  if (key.shape[1] > kMaxLength || query.shape[1] > kMaxLength) {
    refuse("sequences longer than " + std::to_string(kMaxLength) + " are not supported.");
  }
  if (key_mask.given && key_mask.shape != std::vector<int64_t>{key.shape[0], key.shape[1]}) {
    refuse("key_mask has shape " + text_of(key_mask.shape) +
           "; it must be [batch, kv_len] = " + text_of({key.shape[0], key.shape[1]}) + ".");
  }
}

}  // namespace

AttentionCall read_attention_call(const ort::Api& api, ort::KernelContext* context,
                                  const AttentionAttributes& attributes, int64_t max_head_dim, bool has_key_mask) {
  const Tensor query = read_input(api, context, kQuery);
  const Tensor key = read_input(api, context, kKey);
  const Tensor value = read_input(api, context, kValue);
  const Tensor key_mask = has_key_mask ? read_input(api, context, kKeyMask) : Tensor{};
  check_attention_inputs(attributes, query, key, value, key_mask, max_head_dim);

  AttentionCall call{};
  call.query = static_cast<const float*>(query.data);
  call.key = static_cast<const float*>(key.data);
  call.value = static_cast<const float*>(value.data);
  call.key_mask = static_cast<const uint8_t*>(key_mask.data);
  call.batch = query.shape[0];
  call.q_len = query.shape[1];
  call.kv_len = key.shape[1];
  call.num_heads = attributes.num_heads;
  call.kv_num_heads = attributes.kv_num_heads;
  call.head_dim = query.shape[2] / attributes.num_heads;
  call.scale = attributes.scale != 0 ? attributes.scale : 1.0f / std::sqrt(static_cast<float>(call.head_dim));
  call.output = allocate_output(api, context, 0, query.shape);
  return call;
}

void refuse_queries_before_keys(const AttentionCall& call, const char* queries) {
  refuse("there are " + std::to_string(call.q_len) + " queries and " + std::to_string(call.kv_len) + " keys. " +
         queries + " are the last positions of the keys, so pass past and present keys together.");
}

void parallel_for(const ort::Api& api, const ort::KernelContext* context, int64_t count,
                  const std::function<void(int64_t)>& task) {
  const auto call = [](void* task_pointer, size_t n) {
    (*static_cast<const std::function<void(int64_t)>*>(task_pointer))(static_cast<int64_t>(n));
  };
  void* task_pointer = const_cast<void*>(static_cast<const void*>(&task));
  check(api, api.KernelContext_ParallelFor(context, call, static_cast<size_t>(count), 0, task_pointer));
}

ort::Status* infer_output_like_query(const ort::Api& api, ort::ShapeInferContext* context) {
  ort::TensorTypeAndShapeInfo* query = nullptr;  // owned by the context
  // An input of unknown shape is no error.
  if (!succeeded(api, api.ShapeInferContext_GetInputTypeShape(context, 0, &query)) || query == nullptr) return nullptr;
  return api.ShapeInferContext_SetOutputTypeShape(context, 0, query);
}

ort::Status* register_domain(const ort::Api& api, ort::SessionOptions* options,
                             const std::vector<const ort::CustomOp*>& operators) {
  // ONNX Runtime keeps a pointer to the domain for as long as any session lives, so it is never released; one is
  // enough.
  static std::mutex mutex;
  static ort::CustomOpDomain* domain = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (domain == nullptr) {
    ort::CustomOpDomain* created = nullptr;
    if (ort::Status* status = api.CreateCustomOpDomain("effc", &created)) return status;
    for (const ort::CustomOp* op : operators) {
      if (ort::Status* status = api.CustomOpDomain_Add(created, op)) return status;
    }
    domain = created;
  }
  return api.AddCustomOpDomain(options, domain);
}

ort::CustomOp describe_operator() {
  using ort::CustomOp;
  CustomOp op{};
  op.version = ort::kApiVersion;
  op.GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };
  op.GetInputMemoryType = [](const CustomOp*, size_t) { return ort::kDefaultMemory; };
  const auto one = [](const CustomOp*) { return 1; };
  op.GetVariadicInputMinArity = one;
  op.GetVariadicInputHomogeneity = one;
  op.GetVariadicOutputMinArity = one;
  op.GetVariadicOutputHomogeneity = one;
  op.GetStartVersion = one;
  op.GetEndVersion = [](const CustomOp*) { return 0x7fffffff; };
  return op;
}

}  // namespace effc::cpu
