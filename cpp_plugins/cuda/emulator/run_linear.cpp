// Runs one problem of linear attention under the emulator, for the tests:
//
//   effc_cuda_emulated_linear PROBLEM RESULT [OPTION...]
//
// as effc_cuda_emulated does. RESULT gets the output, then, if wanted, the present state and its normaliser.
#include "cuda/emulator/problem_file.hpp"
#include "cuda/linear_attention.hpp"

using namespace effc::cuda::emulator;
using effc::cuda::FeatureMap;
using effc::cuda::LinearAttention;
using effc::cuda::Number;

int main(int count, char** arguments) {
  if (count < 3) refuse("usage: effc_cuda_emulated_linear PROBLEM RESULT [OPTION...]");
  read_options(count, arguments);
  ProblemFile file(arguments[1]);

  LinearAttention problem{};
  problem.batch = file.integer("batch");
  problem.q_len = file.integer("q_len");
  problem.kv_len = file.integer("kv_len");
  problem.num_heads = file.integer("num_heads");
  problem.kv_num_heads = file.integer("kv_num_heads");
  problem.head_dim = file.integer("head_dim");
  problem.map = file.text("map") == "relu" ? FeatureMap::kRelu : FeatureMap::kElu;
  problem.causal = file.integer("causal") != 0;
  problem.number = static_cast<Number>(file.integer("number"));

  const size_t number_bytes = problem.number == Number::kFloat ? 4 : 2;
  const auto query_size = static_cast<size_t>(problem.batch * problem.q_len * problem.num_heads * problem.head_dim);
  const auto key_size = static_cast<size_t>(problem.batch * problem.kv_len * problem.kv_num_heads * problem.head_dim);
  const auto lines = static_cast<size_t>(problem.batch * problem.kv_num_heads * problem.head_dim);
  const size_t normaliser_bytes = lines * sizeof(float);
  const size_t state_bytes = normaliser_bytes * static_cast<size_t>(problem.head_dim);
  const Memory query = file.tensor(query_size * number_bytes);
  const Memory key = file.tensor(key_size * number_bytes);
  const Memory value = file.tensor(key_size * number_bytes);
  const Memory key_mask = file.tensor_if_given("key_mask", static_cast<size_t>(problem.batch * problem.kv_len));
  const Memory past_state = file.tensor_if_given("past", state_bytes);
  const Memory past_normaliser = file.tensor_if_given("past", normaliser_bytes);
  const bool present = file.integer("present") != 0;
  const Memory present_state = present ? allocate(state_bytes) : nullptr;
  const Memory present_normaliser = present ? allocate(normaliser_bytes) : nullptr;
  const Memory output = allocate(query_size * number_bytes);
  problem.query = query.get();
  problem.key = key.get();
  problem.value = value.get();
  problem.key_mask = reinterpret_cast<const uint8_t*>(key_mask.get());
  problem.past_state = reinterpret_cast<const float*>(past_state.get());
  problem.past_normaliser = reinterpret_cast<const float*>(past_normaliser.get());
  problem.present_state = reinterpret_cast<float*>(present_state.get());
  problem.present_normaliser = reinterpret_cast<float*>(present_normaliser.get());
  problem.output = output.get();

  if (const char* reason = effc::cuda::refusal(problem, 80)) refuse(reason);
  const Memory workspace = allocate(effc::cuda::workspace_bytes(problem));
  const int error = effc::cuda::launch(problem, workspace.get(), nullptr);
  if (error != 0) refuse("launch returned " + std::to_string(error));

  std::ofstream result(arguments[2], std::ios::binary);
  result.write(output.get(), static_cast<std::streamsize>(query_size * number_bytes));
  if (present) {
    result.write(present_state.get(), static_cast<std::streamsize>(state_bytes));
    result.write(present_normaliser.get(), static_cast<std::streamsize>(normaliser_bytes));
  }
  if (!result.flush()) refuse(std::string("cannot write ") + arguments[2]);
  print_counters();
  return 0;
}
