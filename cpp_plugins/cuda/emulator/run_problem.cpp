// Runs one problem under the emulator, for the tests:
//
//   effc_cuda_emulated PROBLEM RESULT [reverse | shuffled=SEED] [eager] [multiprocessors=N]
//       [forget_barriers] [forget_waits] [missing_shared_bytes=N]
//
// PROBLEM is lines "name value", a line "data", and the tensors one behind the other; RESULT gets the output, then the
// log-sum-exp. Prints the emulator's counters as JSON. Exit status 2 and a sentence on standard error: refused.
#include "cuda/emulator/run_attention.hpp"
#include "cuda/sparse_attention.hpp"
#include "pattern/parse.hpp"

using namespace effc::cuda::emulator;
using effc::cuda::SparseAttention;

int main(int count, char** arguments) {
  if (count < 3) refuse("usage: effc_cuda_emulated PROBLEM RESULT [OPTION...]");
  read_options(count, arguments);
  ProblemFile file(arguments[1]);

  SparseAttention problem{};
  const std::string wrong = effc::parse_pattern(file.text("pattern"), file.integer("causal") != 0, problem.pattern);
  if (!wrong.empty()) refuse(wrong);
  const AttentionMemory tensors = read_tensors(file, problem);
  problem.scale = file.real("scale");
  problem.eight_bit = {file.real("query_scale"), file.real("key_scale"), file.real("value_scale"),
                       static_cast<effc::cuda::Number>(file.integer("output_number"))};
  problem.tiling = static_cast<effc::cuda::Tiling>(file.integer("tiling"));
  problem.bias_reach = static_cast<effc::Position>(file.integer("bias_reach"));
  problem.key_block_count = static_cast<int32_t>(file.integer("key_block_count"));
  problem.block_size = static_cast<effc::Position>(file.integer("block_size"));

  const auto heads = static_cast<size_t>(problem.num_heads);
  const auto table_size = heads * static_cast<size_t>(2 * problem.bias_reach + 1);
  const auto lists = static_cast<size_t>(file.integer("block_lists"));
  const auto statistics_bytes = static_cast<size_t>(problem.batch * problem.num_heads * problem.q_len) * sizeof(float);
  const Memory marks = file.tensor_if_given("marks", static_cast<size_t>(problem.batch * problem.kv_len));
  const Memory bias = file.tensor_if_given("distance_bias", table_size * sizeof(float));
  const Memory slope = file.tensor_if_given("distance_slope", heads * sizeof(float));
  const Memory blocks =
      file.tensor_if_given("key_block_count", lists * static_cast<size_t>(problem.key_block_count) * sizeof(int32_t));
  const Memory log_sum_exp = file.integer("log_sum_exp") != 0 ? allocate(statistics_bytes) : nullptr;
  problem.marks = reinterpret_cast<const uint8_t*>(marks.get());
  problem.distance_bias = reinterpret_cast<const float*>(bias.get());
  problem.distance_slope = reinterpret_cast<const float*>(slope.get());
  problem.key_blocks = reinterpret_cast<const int32_t*>(blocks.get());
  problem.log_sum_exp = reinterpret_cast<float*>(log_sum_exp.get());

  run(problem, arguments[2], {{tensors.output, tensors.output_bytes}, {log_sum_exp, statistics_bytes}});
  return 0;
}
