// Checks patterns and kernels without ONNX Runtime, so that sanitizers see our code and nothing else.
//
//   effc_selftest [rounds] [seed]
//
// Patterns: every range function is compared with `visible`, pair by pair. Kernels: random problems, on every
// instruction set of this machine and on several threads, are compared with a plain double-precision loop. Tensors are
// allocated to the exact size, so that the address sanitizer notices a read behind any end.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/choose_blocks.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/schedule.hpp"
#include "cpu/selftest_cached.hpp"
#include "cpu/selftest_linear.hpp"
#include "cpu/selftest_slots.hpp"
#include "pattern/parse.hpp"

namespace {

using namespace effc;
using namespace effc::cpu;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "selftest: %s\n", what.c_str());
  std::exit(1);
}

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine_); }
  float normal() { return std::normal_distribution<float>()(engine_); }
  std::mt19937& engine() { return engine_; }

 private:
  std::mt19937 engine_;
};

std::string random_pattern(Random& random) {
  std::string text;
  for (int term = random.between(1, 3); term > 0; --term) {
    const auto number = [&](int low, int high) { return std::to_string(random.between(low, high)); };
    switch (random.between(0, 9)) {
      case 0:
        text += "local:" + number(1, 150);
        break;
      case 1:
        text += "local:" + number(0, 80) + ":" + number(0, 80);
        break;
      case 2:
        text += "dilated:" + number(1, 20) + ":" + number(1, 90);
        break;
      case 3:
        text += "block:" + number(1, 80) + ":" + number(0, 3);
        break;
      case 4:
        text += "strided:" + number(1, 100);
        break;
      case 5:
        text += "global:" + number(0, 80);
        break;
      case 6:
        text += "sinks:" + number(0, 80);
        break;
      case 7:
        text += "random:" + number(0, 4) + ":" + number(0, 1000);
        break;
      case 8:
        text += "global:cls+#102";
        break;
      default:
        text += "dense";
    }
    if (term > 1) text += "|";
  }
  return text;
}

// Queries and keys that are not neighbours, as passes in steps ask about them.
void check_progressions(const Pattern& pattern, const Scope& scope, const std::string& text, Random& random) {
  const auto progression = [&] {
    const Position first = random.between(0, scope.length - 1), step = random.between(1, 20);
    return Progression{first, step, smaller(64, (scope.length - 1 - first) / step + 1)};
  };
  const Progression queries = progression(), keys = progression();
  uint64_t seen[64];
  visible_queries(pattern, scope, queries, keys, seen);
  for (Position n = 0; n < keys.count; ++n) {
    for (Position r = 0; r < 64; ++r) {
      const bool expected =
          r < queries.count && visible(pattern, scope, queries.first + r * queries.step, keys.first + n * keys.step);
      if ((seen[n] >> r & 1) != expected) fail(text + ": visible_queries differs between steps");
    }
  }
}

void check_pattern(const Pattern& pattern, const std::string& text, Position length, Random& random) {
  std::vector<uint8_t> marks(length);
  for (uint8_t& mark : marks) mark = random.between(0, 9) == 0;
  const Scope scope = {length, random.between(0, 3) == 0 ? nullptr : marks.data()};
  const Range bounds = {random.between(0, length / 4), length - random.between(0, length / 4)};
  const Position first = random.between(0, length - 1);
  const Range queries = {first, smaller(length, first + random.between(1, kTileRows))};
  std::vector<bool> visited(length, false);
  KeyTileIterator iterator = key_tiles(pattern, queries, bounds, random.between(1, 64));
  KeyTile tile;
  while (next_tile(iterator, pattern, scope, tile)) {
    if (is_empty(tile.keys)) fail(text + ": an empty tile");
    uint64_t seen[64];
    const Position count = tile.keys.end - tile.keys.begin;
    visible_queries(pattern, scope, {queries.begin, 1, queries.end - queries.begin}, {tile.keys.begin, 1, count}, seen);
    for (Position j = tile.keys.begin; j < tile.keys.end; ++j) {
      if (j < bounds.begin || j >= bounds.end || visited[j]) fail(text + ": a key out of bounds or twice");
      visited[j] = true;
      const uint64_t bits = seen[j - tile.keys.begin];
      for (Position i = queries.begin; i < queries.end; ++i) {
        const bool expected = visible(pattern, scope, i, j);
        if ((bits >> (i - queries.begin) & 1) != expected) fail(text + ": visible_queries differs from visible");
        if (tile.full && !expected) fail(text + ": a tile is called full and is not");
      }
      if ((bits & ~low_bits(queries.end - queries.begin)) != 0) fail(text + ": a bit beyond the last query");
    }
  }
  for (Position i = queries.begin; i < queries.end; ++i) {
    for (Position j = bounds.begin; j < bounds.end; ++j) {
      if (visible(pattern, scope, i, j) && !visited[j]) fail(text + ": a visible key was never visited");
    }
  }
  check_progressions(pattern, scope, text, random);
}

// Exactly sized, so that one element further is somebody else's memory.
std::unique_ptr<float[]> random_tensor(size_t size, Random& random) {
  auto tensor = std::make_unique<float[]>(size);
  for (size_t x = 0; x < size; ++x) tensor[x] = random.normal();
  return tensor;
}

bool is_chosen(const Problem& problem, int64_t batch, int64_t kv_head, Position query, int64_t key) {
  const ChosenBlocks& chosen = problem.chosen;
  if (chosen.words == nullptr) return true;
  const int64_t row =
      (batch * problem.kv_num_heads + kv_head) * chosen.query_blocks + query / chosen.block - chosen.first_query_block;
  const int64_t key_block = key / chosen.block;
  return (chosen.words[row * chosen.words_per_row + key_block / 64] >> (key_block % 64) & 1) != 0;
}

// One output row and its log-sum-exp, the slow way.
void reference_row(const Problem& problem, const Pattern& pattern, int64_t batch, int64_t head, int64_t row,
                   std::vector<double>& output, double& log_sum_exp) {
  const int64_t dim = problem.head_dim;
  const int64_t kv_head = head / (problem.num_heads / problem.kv_num_heads);
  const float* query = problem.query + ((batch * problem.q_len + row) * problem.num_heads + head) * dim;
  const Position i = static_cast<Position>(row + problem.kv_len - problem.q_len);
  const Scope scope = {static_cast<Position>(problem.kv_len),
                       problem.marks == nullptr ? nullptr : problem.marks + batch * problem.kv_len};
  std::vector<double> scores(problem.kv_len, -INFINITY);
  double largest = -INFINITY, sum = 0;
  for (int64_t j = 0; j < problem.kv_len; ++j) {
    if (!visible(pattern, scope, i, static_cast<Position>(j)) || !is_chosen(problem, batch, kv_head, i, j)) continue;
    if (problem.key_mask != nullptr && problem.key_mask[batch * problem.kv_len + j] == 0) continue;
    const float* key = problem.key + ((batch * problem.kv_len + j) * problem.kv_num_heads + kv_head) * dim;
    scores[j] = 0;
    for (int64_t d = 0; d < dim; ++d) scores[j] += double(query[d]) * key[d] * problem.scale;
    if (problem.distance_bias != nullptr) {
      const Position reach = problem.bias_reach;
      const Position distance = larger(-reach, smaller(reach, static_cast<Position>(j) - i));
      scores[j] += problem.distance_bias[head * (2 * reach + 1) + distance + reach];
    }
    if (problem.distance_slope != nullptr) scores[j] += double(problem.distance_slope[head]) * (double(j) - i);
    largest = std::fmax(largest, scores[j]);
  }
  output.assign(dim, 0.0);
  for (int64_t j = 0; j < problem.kv_len; ++j) {
    if (std::isinf(scores[j])) continue;
    const float* value = problem.value + ((batch * problem.kv_len + j) * problem.kv_num_heads + kv_head) * dim;
    const double weight = std::exp(scores[j] - largest);
    sum += weight;
    for (int64_t d = 0; d < dim; ++d) output[d] += weight * value[d];
  }
  for (int64_t d = 0; d < dim && sum > 0; ++d) output[d] /= sum;
  log_sum_exp = largest + std::log(sum);
}

void check_output(const Problem& problem, const Pattern& pattern, double tolerance, const std::string& what) {
  std::vector<double> expected;
  for (int64_t b = 0; b < problem.batch; ++b) {
    for (int64_t head = 0; head < problem.num_heads; ++head) {
      for (int64_t row = 0; row < problem.q_len; ++row) {
        double log_sum_exp = 0;
        reference_row(problem, pattern, b, head, row, expected, log_sum_exp);
        const float* output =
            problem.output + ((b * problem.q_len + row) * problem.num_heads + head) * problem.head_dim;
        for (int64_t d = 0; d < problem.head_dim; ++d) {
          if (!(std::fabs(output[d] - expected[d]) < tolerance)) fail(what + ": wrong output");
        }
        const float actual = problem.log_sum_exp[(b * problem.num_heads + head) * problem.q_len + row];
        const bool same = std::isinf(log_sum_exp) ? actual == log_sum_exp : std::fabs(actual - log_sum_exp) < tolerance;
        if (!same) fail(what + ": wrong log-sum-exp");
      }
    }
  }
}

ParallelFor on_threads(int count) {
  return [count](int64_t tasks, const std::function<void(int64_t)>& task) {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
      for (int64_t n = next++; n < tasks; n = next++) task(n);
    };
    std::vector<std::thread> threads;
    for (int t = 0; t < count; ++t) threads.emplace_back(work);
    for (std::thread& thread : threads) thread.join();
  };
}

void run_on_threads(const Problem& problem, const SplitPattern& split, const Kernels& kernels, int count) {
  const Plan plan(problem, split);
  if (!run_plan(plan, kernels, on_threads(count))) fail("out of memory");
}

// With `chooses`, content chooses blocks of keys as well.
void check_kernels(const std::string& text, bool causal, bool chooses, const std::vector<const Kernels*>& all_kernels,
                   Random& random) {
  Problem problem{};
  Pattern pattern;
  parse_pattern(text, causal, pattern);
  const SplitPattern split = split_pattern(pattern);
  problem.batch = random.between(1, 2);
  problem.kv_len = random.between(1, 200);
  problem.q_len = random.between(0, 2) == 0 ? random.between(1, smaller(6, problem.kv_len))
                                            : random.between(1, static_cast<int>(problem.kv_len));
  problem.kv_num_heads = random.between(1, 3);
  problem.num_heads = problem.kv_num_heads * random.between(1, 5);
  problem.head_dim = random.between(0, 1) == 0 ? 8 * random.between(1, 32) : random.between(1, 70);
  problem.scale = 1.0f / std::sqrt(static_cast<float>(problem.head_dim));

  const size_t rows = problem.batch * problem.q_len * problem.num_heads;
  const size_t kv_size = problem.batch * problem.kv_len * problem.kv_num_heads * problem.head_dim;
  const auto query = random_tensor(rows * problem.head_dim, random);
  const auto key = random_tensor(kv_size, random);
  const auto value = random_tensor(kv_size, random);
  problem.query = query.get();
  problem.key = key.get();
  problem.value = value.get();

  const auto mask = std::make_unique<uint8_t[]>(problem.batch * problem.kv_len);
  const int masked_percent = random.between(0, 3) * 33;
  for (int64_t j = 0; j < problem.batch * problem.kv_len; ++j) mask[j] = random.between(0, 99) >= masked_percent;
  if (random.between(0, 1) == 0) problem.key_mask = mask.get();
  const auto marks = std::make_unique<uint8_t[]>(problem.batch * problem.kv_len);
  const int marked_percent = random.between(0, 3) * 10;
  for (int64_t j = 0; j < problem.batch * problem.kv_len; ++j) marks[j] = random.between(0, 99) < marked_percent;
  if (random.between(0, 3) != 0) problem.marks = marks.get();
  problem.bias_reach = random.between(0, 100);
  const auto bias = random_tensor(problem.num_heads * (2 * problem.bias_reach + 1), random);
  if (random.between(0, 2) == 0) problem.distance_bias = bias.get();
  const auto slope = random_tensor(problem.num_heads, random);
  for (int64_t head = 0; head < problem.num_heads; ++head) slope[head] *= 0.05f;
  if (random.between(0, 2) == 0) problem.distance_slope = slope.get();

  BlockChoice choice{};
  if (chooses) {
    const Position block = random.between(1, 90);
    choice = choose_blocks(problem, causal, random.between(2, 6), block, on_threads(random.between(1, 3)));
    problem.chosen = choice.view();
  }

  for (const Kernels* kernels : all_kernels) {
    const auto output = std::make_unique<float[]>(rows * problem.head_dim);
    const auto log_sum_exp = std::make_unique<float[]>(rows);
    problem.output = output.get();
    problem.log_sum_exp = log_sum_exp.get();
    run_on_threads(problem, split, *kernels, random.between(1, 3));
    const std::string name = kernels->name;
    const double tolerance = name == "avx512_bf16" || name == "avx512_amx" ? 0.05 : 1e-5;
    check_output(problem, pattern, tolerance, std::string(kernels->name) + " " + text + (causal ? " causal" : ""));
  }
}

std::vector<const Kernels*> kernels_of_this_machine() {
  std::vector<const Kernels*> result;
  for (const char* isa : {"portable", "avx2", "avx512"}) {
    setenv("EFFC_ISA", isa, 1);
    std::string problem;
    for (const char* amx : {"0", "1"}) {
      setenv("EFFC_AMX", amx, 1);
      for (const bool bf16 : {false, true}) {
        const Kernels* kernels = choose_kernels(problem, bf16);
        const bool known = std::find(result.begin(), result.end(), kernels) != result.end();
        if (kernels != nullptr && !known) result.push_back(kernels);
      }
    }
  }
  return result;
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 50;
  Random random(argc > 2 ? std::atoi(argv[2]) : 1);
  const std::vector<const Kernels*> all_kernels = kernels_of_this_machine();
  for (int round = 0; round < rounds; ++round) {
    const std::string text = random_pattern(random);
    const bool causal = random.between(0, 1) == 1;
    Pattern pattern;
    const std::string problem = parse_pattern(text, causal, pattern);
    if (!problem.empty()) fail(problem);
    for (int n = 0; n < 10; ++n) check_pattern(pattern, text, random.between(1, 300), random);
    check_kernels(text, causal, false, all_kernels, random);
    check_kernels("dense", causal, true, all_kernels, random);
    const std::string linear = selftest::check_linear(all_kernels, on_threads(random.between(1, 3)), random.engine());
    if (!linear.empty()) fail(linear);
    const std::string cached = selftest::check_cached(all_kernels, on_threads(random.between(1, 3)), random.engine());
    if (!cached.empty()) fail(cached);
  }
  for (const Position first_blocks : {0, 1, 2}) {
    const std::string slots = selftest::check_slots(first_blocks);
    if (!slots.empty()) fail(slots);
  }
  // Whatever is written as a pattern is read or refused, never more.
  const std::string alphabet = "local:sinkbde|0123456789 -+#";
  for (int round = 0; round < 20 * rounds; ++round) {
    std::string text = random_pattern(random);
    for (int n = random.between(0, 4); n > 0; --n) {
      text[random.between(0, static_cast<int>(text.size()) - 1)] =
          alphabet[random.between(0, static_cast<int>(alphabet.size()) - 1)];
    }
    Pattern pattern;
    if (parse_pattern(text, random.between(0, 1) == 1, pattern).empty()) check_pattern(pattern, text, 100, random);
  }
  std::printf("selftest: %d rounds on", rounds);
  for (const Kernels* kernels : all_kernels) std::printf(" %s", kernels->name);
  std::printf(": ok\n");
  return 0;
}
