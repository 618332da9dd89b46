// Reading, running and answering a problem of attention under the emulator, whatever the form.
#pragma once

#include <initializer_list>

#include "cuda/attention_tensors.hpp"
#include "cuda/emulator/problem_file.hpp"

namespace effc::cuda::emulator {

// The memory of what all forms have.
struct AttentionMemory {
  Memory query, key, value, key_mask, output;
  size_t output_bytes;
};

// Reads sizes, number type, query, key, value and key_mask into `tensors` and allocates the output.
inline AttentionMemory read_tensors(ProblemFile& file, AttentionTensors& tensors) {
  tensors.batch = file.integer("batch");
  tensors.q_len = file.integer("q_len");
  tensors.kv_len = file.integer("kv_len");
  tensors.num_heads = file.integer("num_heads");
  tensors.kv_num_heads = file.integer("kv_num_heads");
  tensors.head_dim = file.integer("head_dim");
  tensors.number = static_cast<Number>(file.integer("number"));

  const auto bytes = [&](int64_t length, int64_t heads) {
    return static_cast<size_t>(tensors.batch * length * heads * tensors.head_dim) * bytes_of(tensors.number);
  };
  const size_t query_bytes = bytes(tensors.q_len, tensors.num_heads);
  const size_t output_bytes = query_bytes / bytes_of(tensors.number) * output_bytes_of(tensors.number);
  const size_t key_bytes = bytes(tensors.kv_len, tensors.kv_num_heads);
  AttentionMemory memory{};
  memory.query = file.tensor(query_bytes);
  memory.key = file.tensor(key_bytes);
  memory.value = file.tensor(key_bytes);
  memory.key_mask = file.tensor_if_given("key_mask", static_cast<size_t>(tensors.batch * tensors.kv_len));
  memory.output = allocate(output_bytes);
  memory.output_bytes = output_bytes;
  tensors.query = memory.query.get();
  tensors.key = memory.key.get();
  tensors.value = memory.value.get();
  tensors.key_mask = reinterpret_cast<const uint8_t*>(memory.key_mask.get());
  tensors.output = memory.output.get();
  return memory;
}

// A part of the answer; null: not wanted.
struct Part {
  const Memory& memory;
  size_t bytes;
};

// Runs the problem, writes the parts to a file one behind the other and prints the emulator's counters.
template <class Problem>
void run(const Problem& problem, const char* result_path, std::initializer_list<Part> parts) {
  if (const char* reason = refusal(problem, options.compute_capability)) refuse(reason);
  const Memory workspace = allocate(workspace_bytes(problem));
  const int error = launch(problem, workspace.get(), nullptr);
  if (error != 0) refuse("launch returned " + std::to_string(error));

  std::ofstream result(result_path, std::ios::binary);
  for (const Part& part : parts) {
    if (part.memory != nullptr) result.write(part.memory.get(), static_cast<std::streamsize>(part.bytes));
  }
  if (!result.flush()) refuse(std::string("cannot write ") + result_path);
  print_counters();
}

}  // namespace effc::cuda::emulator
