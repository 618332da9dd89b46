// Runs one problem of linear attention under the emulator, for the tests:
//
//   effc_cuda_emulated_linear PROBLEM RESULT [OPTION...]
//
// as effc_cuda_emulated does. RESULT gets the output, then, if wanted, the present state and its normaliser.
#include "cuda/emulator/run_attention.hpp"
#include "cuda/linear_attention.hpp"

using namespace effc::cuda::emulator;
using effc::cuda::FeatureMap;
using effc::cuda::LinearAttention;

int main(int count, char** arguments) {
  if (count < 3) refuse("usage: effc_cuda_emulated_linear PROBLEM RESULT [OPTION...]");
  read_options(count, arguments);
  ProblemFile file(arguments[1]);

  LinearAttention problem{};
  const AttentionMemory tensors = read_tensors(file, problem);
  problem.map = file.text("map") == "relu" ? FeatureMap::kRelu : FeatureMap::kElu;
  problem.causal = file.integer("causal") != 0;

  const auto lines = static_cast<size_t>(problem.batch * problem.kv_num_heads * problem.head_dim);
  const size_t normaliser_bytes = lines * sizeof(float);
  const size_t state_bytes = normaliser_bytes * static_cast<size_t>(problem.head_dim);
  const Memory past_state = file.tensor_if_given("past", state_bytes);
  const Memory past_normaliser = file.tensor_if_given("past", normaliser_bytes);
  const bool present = file.integer("present") != 0;
  const Memory present_state = present ? allocate(state_bytes) : nullptr;
  const Memory present_normaliser = present ? allocate(normaliser_bytes) : nullptr;
  problem.past_state = reinterpret_cast<const float*>(past_state.get());
  problem.past_normaliser = reinterpret_cast<const float*>(past_normaliser.get());
  problem.present_state = reinterpret_cast<float*>(present_state.get());
  problem.present_normaliser = reinterpret_cast<float*>(present_normaliser.get());

  run(problem, arguments[2],
      {{tensors.output, tensors.output_bytes}, {present_state, state_bytes}, {present_normaliser, normaliser_bytes}});
  return 0;
}
