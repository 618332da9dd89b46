// Runs one problem under the emulator, for the tests:
//
//   effc_cuda_emulated PROBLEM RESULT [reverse | shuffled=SEED] [eager] [multiprocessors=N]
//       [forget_barriers] [forget_waits] [missing_shared_bytes=N]
//
// PROBLEM is lines "name value", a line "data", and the tensors one behind the other; RESULT gets the output, then the
// log-sum-exp. Prints the emulator's counters as JSON. Exit status 2 and a sentence on standard error: refused.
#include "cuda/emulator/problem_file.hpp"
#include "cuda/sparse_attention.hpp"
#include "pattern/parse.hpp"

using namespace effc::cuda::emulator;
using effc::cuda::Number;
using effc::cuda::SparseAttention;

int main(int count, char** arguments) {
  if (count < 3) refuse("usage: effc_cuda_emulated PROBLEM RESULT [OPTION...]");
  read_options(count, arguments);
  ProblemFile file(arguments[1]);

  SparseAttention problem{};
  problem.batch = file.integer("batch");
  problem.q_len = file.integer("q_len");
  problem.kv_len = file.integer("kv_len");
  problem.num_heads = file.integer("num_heads");
  problem.kv_num_heads = file.integer("kv_num_heads");
  problem.head_dim = file.integer("head_dim");
  problem.bias_reach = static_cast<effc::Position>(file.integer("bias_reach"));
  problem.scale = file.real("scale");
  problem.number = static_cast<Number>(file.integer("number"));
  const std::string wrong = effc::parse_pattern(file.text("pattern"), file.integer("causal") != 0, problem.pattern);
  if (!wrong.empty()) refuse(wrong);

  const size_t number_bytes = problem.number == Number::kFloat ? 4 : 2;
  const auto query_size = static_cast<size_t>(problem.batch * problem.q_len * problem.num_heads * problem.head_dim);
  const auto key_size = static_cast<size_t>(problem.batch * problem.kv_len * problem.kv_num_heads * problem.head_dim);
  const auto mask_size = static_cast<size_t>(problem.batch * problem.kv_len);
  const auto heads = static_cast<size_t>(problem.num_heads);
  const auto statistics_bytes = static_cast<size_t>(problem.batch * problem.num_heads * problem.q_len) * sizeof(float);
  const Memory query = file.tensor(query_size * number_bytes);
  const Memory key = file.tensor(key_size * number_bytes);
  const Memory value = file.tensor(key_size * number_bytes);
  const Memory key_mask = file.tensor_if_given("key_mask", mask_size);
  const Memory marks = file.tensor_if_given("marks", mask_size);
  const auto table_size = heads * static_cast<size_t>(2 * problem.bias_reach + 1);
  const Memory bias = file.tensor_if_given("distance_bias", table_size * sizeof(float));
  const Memory slope = file.tensor_if_given("distance_slope", heads * sizeof(float));
  problem.key_block_count = static_cast<int32_t>(file.integer("key_block_count"));
  problem.block_size = static_cast<effc::Position>(file.integer("block_size"));
  const auto lists = static_cast<size_t>(file.integer("block_lists"));
  const Memory blocks =
      file.tensor_if_given("key_block_count", lists * static_cast<size_t>(problem.key_block_count) * sizeof(int32_t));
  const Memory output = allocate(query_size * number_bytes);
  const Memory log_sum_exp = file.integer("log_sum_exp") != 0 ? allocate(statistics_bytes) : nullptr;
  problem.query = query.get();
  problem.key = key.get();
  problem.value = value.get();
  problem.key_mask = reinterpret_cast<const uint8_t*>(key_mask.get());
  problem.marks = reinterpret_cast<const uint8_t*>(marks.get());
  problem.distance_bias = reinterpret_cast<const float*>(bias.get());
  problem.distance_slope = reinterpret_cast<const float*>(slope.get());
  problem.key_blocks = reinterpret_cast<const int32_t*>(blocks.get());
  problem.output = output.get();
  problem.log_sum_exp = reinterpret_cast<float*>(log_sum_exp.get());

  if (const char* reason = effc::cuda::refusal(problem, 80)) refuse(reason);
  const Memory workspace = allocate(effc::cuda::workspace_bytes(problem));
  const int error = effc::cuda::launch(problem, workspace.get(), nullptr);
  if (error != 0) refuse("launch returned " + std::to_string(error));

  std::ofstream result(arguments[2], std::ios::binary);
  result.write(output.get(), static_cast<std::streamsize>(query_size * number_bytes));
  if (log_sum_exp != nullptr) result.write(log_sum_exp.get(), static_cast<std::streamsize>(statistics_bytes));
  if (!result.flush()) refuse(std::string("cannot write ") + arguments[2]);
  print_counters();
  return 0;
}
