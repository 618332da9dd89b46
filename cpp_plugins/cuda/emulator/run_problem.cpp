// Runs one problem under the emulator, for the tests:
//
//   effc_cuda_emulated PROBLEM RESULT [reverse | shuffled=SEED] [eager] [multiprocessors=N]
//       [forget_barriers] [forget_waits] [missing_shared_bytes=N]
//
// PROBLEM is lines "name value", a line "data", and the tensors one behind the other; RESULT gets the output, then the
// log-sum-exp. Prints the emulator's counters as JSON. Exit status 2 and a sentence on standard error: refused.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <string>

#include "cuda/emulator/block.hpp"
#include "cuda/sparse_attention.hpp"
#include "pattern/parse.hpp"

namespace {

using effc::cuda::Number;
using effc::cuda::SparseAttention;

[[noreturn]] void refuse(const std::string& reason) {
  std::fprintf(stderr, "%s\n", reason.c_str());
  std::exit(2);
}

// Device memory as cudaMalloc gives it: aligned to 256 bytes. Its end is where the tensor ends.
struct Release {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Release>;

Memory allocate(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, bytes == 0 ? 1 : bytes) != 0) refuse("no memory");
  std::memset(memory, 0xff, bytes);  // no number in any type, so that what is not written shows
  return Memory(static_cast<char*>(memory));
}

class ProblemFile {
 public:
  explicit ProblemFile(const char* path) : file_(path, std::ios::binary) {
    for (std::string line; std::getline(file_, line) && line != "data";) {
      const size_t space = line.find(' ');
      values_[line.substr(0, space)] = line.substr(space + 1);
    }
    if (!file_) refuse(std::string("cannot read ") + path);
  }

  std::string text(const char* name) const { return values_.at(name); }
  int64_t integer(const char* name) const { return std::stoll(values_.at(name)); }
  float real(const char* name) const { return std::stof(values_.at(name)); }

  Memory tensor(size_t bytes) {
    Memory memory = allocate(bytes);
    file_.read(memory.get(), static_cast<std::streamsize>(bytes));
    if (!file_) refuse("the problem file is too short");
    return memory;
  }
  Memory tensor_if_given(const char* name, size_t bytes) { return integer(name) != 0 ? tensor(bytes) : nullptr; }

 private:
  std::ifstream file_;
  std::map<std::string, std::string> values_;
};

void read_options(int count, char** arguments) {
  auto& options = effc::cuda::emulator::options;
  using Order = effc::cuda::emulator::Options::Order;
#if defined(__SANITIZE_ADDRESS__)
  options.guard_bytes = 0;
#endif
  for (int n = 3; n < count; ++n) {
    const std::string option = arguments[n];
    const size_t equals = option.find('=');
    const std::string name = option.substr(0, equals);
    const int value = equals == std::string::npos ? 0 : std::stoi(option.substr(equals + 1));
    if (name == "reverse") {
      options.order = Order::kReverse;
    } else if (name == "shuffled") {
      options.order = Order::kShuffled;
      options.seed = static_cast<uint32_t>(value);
    } else if (name == "eager") {
      options.eager_copies = true;
    } else if (name == "forget_barriers") {
      options.forget_barriers = true;
    } else if (name == "forget_waits") {
      options.forget_waits = true;
    } else if (name == "missing_shared_bytes") {
      options.missing_shared_bytes = static_cast<size_t>(value);
    } else if (name == "multiprocessors") {
      options.multiprocessors = value;
    } else {
      refuse("there is no option " + option);
    }
  }
}

void print_counters() {
  const auto& counters = effc::cuda::emulator::counters;
  std::printf(
      "{\"matrix_products\": %llu, \"matrix_loads\": %llu, \"matrix_load_passes\": %llu, \"copies\": %llu, "
      "\"barriers\": %llu, \"blocks\": %llu}\n",
      static_cast<unsigned long long>(counters.matrix_products), static_cast<unsigned long long>(counters.matrix_loads),
      static_cast<unsigned long long>(counters.matrix_load_passes), static_cast<unsigned long long>(counters.copies),
      static_cast<unsigned long long>(counters.barriers), static_cast<unsigned long long>(counters.blocks));
}

}  // namespace

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
  const Memory output = allocate(query_size * number_bytes);
  const Memory log_sum_exp = file.integer("log_sum_exp") != 0 ? allocate(statistics_bytes) : nullptr;
  problem.query = query.get();
  problem.key = key.get();
  problem.value = value.get();
  problem.key_mask = reinterpret_cast<const uint8_t*>(key_mask.get());
  problem.marks = reinterpret_cast<const uint8_t*>(marks.get());
  problem.distance_bias = reinterpret_cast<const float*>(bias.get());
  problem.distance_slope = reinterpret_cast<const float*>(slope.get());
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
