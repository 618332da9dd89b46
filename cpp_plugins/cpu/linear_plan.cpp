#include "cpu/linear_plan.hpp"

#include <algorithm>
#include <atomic>
#include <new>
#include <thread>
#include <vector>

namespace effc::cpu {
namespace {

// Keys of one state, so that a long sequence of few heads keeps several threads busy. More states cost memory.
constexpr int64_t kKeysPerState = 1024;
constexpr int64_t kMostStates = 16;
// Queries of one task: enough that reading the state costs nothing.
constexpr int64_t kQueriesPerTask = 512;
constexpr int64_t kStateBytesPerTask = 1 << 19;

// States of every key/value head, `count` for each.
class States {
 public:
  States(const LinearProblem& problem, int64_t count)
      : count_(count),
        sums_(problem.features * padded_line(problem.head_dim)),
        size_(sums_ + padded_line(problem.features) + kLinePadding),
        memory_(problem.batch * problem.kv_num_heads * count * size_, 0.0f) {
    for (size_t end = size_; end <= memory_.size(); end += size_) memory_[end - kLinePadding] = kEmptyStabiliser;
  }

  // Number `number` of the heads from `first` on.
  std::vector<LinearState> of(int64_t first, int64_t heads, int64_t number) {
    std::vector<LinearState> states;
    for (int64_t head = first; head < first + heads; ++head) states.push_back(at(head, number));
    return states;
  }
  LinearState at(int64_t head, int64_t number) {
    float* sums = memory_.data() + (head * count_ + number) * size_;
    return {sums, sums + sums_, sums + size_ - kLinePadding};
  }
  int64_t bytes_each() const { return size_ * sizeof(float); }

 private:
  int64_t count_, sums_, size_;
  std::vector<float> memory_;
};

LinearWorkspace carve(const LinearProblem& problem, int64_t kv_heads, std::vector<float>& memory) {
  const int64_t features = kChunk * padded_line(problem.features), dims = kChunk * padded_line(problem.head_dim);
  const int64_t heads = kv_heads * (problem.num_heads / problem.kv_num_heads);
  memory.resize((heads + kv_heads + 1) * (features + dims + kChunk) + kChunk * kChunk);
  float* next = memory.data();
  const auto take = [&](int64_t size) {
    float* taken = next;
    next += size;
    return taken;
  };
  LinearWorkspace workspace;
  workspace.query_features = take(heads * features);
  workspace.key_features = take(kv_heads * features);
  workspace.values = take(kv_heads * dims);
  workspace.output = take(heads * dims);
  workspace.denominators = take(heads * kChunk);
  workspace.exponents = take(kv_heads * kChunk);
  workspace.keys_turned = take(features);
  workspace.projected = take(dims);
  workspace.weights = take(kChunk * kChunk);
  return workspace;
}

// Runs tasks on their threads' workspaces, which live as long as the threads.
bool run_tasks(const LinearProblem& problem, int64_t kv_heads, const ParallelFor& parallel_for, int64_t count,
               const std::function<void(int64_t task, const LinearWorkspace&)>& task) {
  std::atomic<bool> enough_memory{true};
  parallel_for(count, [&](int64_t n) {
    static thread_local std::vector<float> memory;
    try {
      task(n, carve(problem, kv_heads, memory));
    } catch (const std::bad_alloc&) {
      enough_memory = false;
    }
  });
  return enough_memory;
}

}  // namespace

bool run_linear(const LinearProblem& problem, const LinearKernels& kernels, const ParallelFor& parallel_for) {
  const int64_t kv_heads = problem.kv_num_heads;
  // Causal: the keys before the first query; the rest are added chunk by chunk, a head's chunks one after the other.
  const int64_t gathered = problem.causal ? problem.kv_len - problem.q_len : problem.kv_len;
  const int64_t parts = std::clamp<int64_t>(gathered / kKeysPerState, 1, kMostStates);
  const int64_t keys_per_part = divide_up(divide_up(gathered, parts), kChunk) * kChunk;
  States states(problem, parts);
  // Runs work(heads, place) for every place below `places` and all heads, a group of heads at a time: many, because
  // their rows are neighbours, but few enough for their states to stay in the cache and for all threads to be busy.
  const auto for_all_heads = [&](int64_t places, const auto& state_number, const auto& work) {
    const int64_t enough_tasks = 2 * std::max(1u, std::thread::hardware_concurrency());
    const int64_t most = std::max<int64_t>(1, kStateBytesPerTask / states.bytes_each());
    const int64_t wanted = problem.batch * places * kv_heads / enough_tasks;
    const int64_t groups = divide_up(kv_heads, std::clamp<int64_t>(wanted, 1, std::min(most, kv_heads)));
    const int64_t heads_per_group = divide_up(kv_heads, groups);
    return run_tasks(problem, heads_per_group, parallel_for, problem.batch * places * groups,
                     [&](int64_t task, const LinearWorkspace& workspace) {
                       const int64_t first = task % groups * heads_per_group, place = task / groups % places;
                       const int64_t end = std::min(first + heads_per_group, kv_heads);
                       if (first >= end) return;
                       const int64_t batch = task / groups / places;
                       const std::vector<LinearState> own =
                           states.of(batch * kv_heads + first, end - first, state_number(place));
                       work(LinearHeads{batch, first, end, own.data()}, place, workspace);
                     });
  };
  const auto first_state = [](int64_t) -> int64_t { return 0; };

  const bool done = gathered == 0 ||
                    for_all_heads(
                        parts, [](int64_t part) { return part; },
                        [&](const LinearHeads& heads, int64_t part, const LinearWorkspace& workspace) {
                          const int64_t begin = part * keys_per_part;
                          kernels.add_keys(problem, heads, begin, std::min(begin + keys_per_part, gathered), workspace);
                        });
  if (!done) return false;
  for (int64_t head = 0; head < problem.batch * kv_heads; ++head) {
    for (int64_t part = 1; part < parts; ++part) kernels.merge(problem, states.at(head, part), states.at(head, 0));
  }
  if (problem.causal) {
    return for_all_heads(1, first_state, [&](const LinearHeads& heads, int64_t, const LinearWorkspace& workspace) {
      kernels.run_causal(problem, heads, workspace);
    });
  }
  return for_all_heads(divide_up(problem.q_len, kQueriesPerTask), first_state,
                       [&](const LinearHeads& heads, int64_t place, const LinearWorkspace& workspace) {
                         const int64_t begin = place * kQueriesPerTask;
                         kernels.read_states(problem, heads, begin, std::min(begin + kQueriesPerTask, problem.q_len),
                                             workspace);
                       });
}

}  // namespace effc::cpu
