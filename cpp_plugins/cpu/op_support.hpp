// What every operator of this library needs from ONNX Runtime: failures as statuses, attributes and tensors.
#pragma once

#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "cpu/attention_call.hpp"
#include "cpu/ort_abi.hpp"

namespace effc::cpu {

// Problems that a user can cause travel as exceptions to the C boundary and leave it as a status.
struct Failure : std::exception {
  ort::ErrorCode code;
  std::string message;
  Failure(ort::ErrorCode code, std::string message) : code(code), message(std::move(message)) {}
  const char* what() const noexcept override { return message.c_str(); }
};

[[noreturn]] void refuse(const std::string& message);

// Runs `body`, turning whatever it throws into a status that begins with the operator's name.
ort::Status* guarded(const ort::Api& api, const char* op, const std::function<void()>& body) noexcept;

// Passes on a status of the runtime as a failure.
void check(const ort::Api& api, ort::Status* status);

// Releases the status; true if it was none.
bool succeeded(const ort::Api& api, ort::Status* status);

// The attributes that all attention operators have.
struct AttentionAttributes {
  std::string pattern;
  bool causal = false;
  int64_t num_heads = 0;
  int64_t kv_num_heads = 0;
  float scale = 0;        // 0: 1 / sqrt(head_dim)
  std::string precision;  // "" unless the node says
};
AttentionAttributes read_attributes(const ort::Api& api, const ort::KernelInfo* info);

struct Tensor {
  bool given = false;  // false: the optional input is absent
  ort::ElementType type = ort::kFloat;
  void* data = nullptr;  // null if the tensor has no elements
  std::vector<int64_t> shape;
};
std::string text_of(const std::vector<int64_t>& shape);
Tensor read_input(const ort::Api& api, const ort::KernelContext* context, size_t index);

// Null if nobody asked for this output.
float* allocate_output(const ort::Api& api, ort::KernelContext* context, size_t index,
                       const std::vector<int64_t>& shape);

// The first inputs of every attention operator.
enum AttentionInput : size_t { kQuery, kKey, kValue, kKeyMask, kAttentionInputCount };

// Reads them and allocates the first output. Refuses tensors that do not fit together or exceed the kernels. Operators
// without a key mask have something else in its place.
AttentionCall read_attention_call(const ort::Api& api, ort::KernelContext* context,
                                  const AttentionAttributes& attributes, int64_t max_head_dim,
                                  bool has_key_mask = true);

// Refuses a call with more queries than keys; `queries` are those that may not stand before the first key.
[[noreturn]] void refuse_queries_before_keys(const AttentionCall& call, const char* queries = "The queries");

// Calls task(n) for every n < count on the session's threads.
void parallel_for(const ort::Api& api, const ort::KernelContext* context, int64_t count,
                  const std::function<void(int64_t)>& task);

// Output `index` gets the type and shape of the query, symbolic dimensions included.
ort::Status* infer_output_like_query(const ort::Api& api, ort::ShapeInferContext* context);

// Registers the operators, as domain effc, with the session that `options` will create. A library has one such domain:
// the operators of the first call are those of all others.
ort::Status* register_domain(const ort::Api& api, ort::SessionOptions* options,
                             const std::vector<const ort::CustomOp*>& operators);

// An operator's description without its inputs, outputs and functions (see operator_glue.hpp).
ort::CustomOp describe_operator();

}  // namespace effc::cpu
