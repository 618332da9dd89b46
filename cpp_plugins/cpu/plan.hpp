// Prepares a call: splits the pattern into passes, and finds the rows and columns that need no pattern at all.
#pragma once

#include <vector>

#include "cpu/attention.hpp"

namespace effc::cpu {

// A pattern as the kernels compute it. Depends on the pattern alone.
struct SplitPattern {
  std::vector<Pass> passes;  // at least one
  bool causal;
  bool uses_marks;
  Position whole_rows;         // queries before this see everything
  Position listed_first_keys;  // so many first keys are listed, because no pass finds them side by side with others
};

SplitPattern split_pattern(const Pattern& pattern);

// One call with the memory that it refers to.
class Plan {
 public:
  // `split` must outlive the plan, as must the tensors.
  Plan(const Problem& problem, const SplitPattern& split);
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  const Call& call() const { return call_; }
  const SplitPattern& split() const { return split_; }
  const Pass& whole_rows_pass() const { return whole_rows_pass_; }

 private:
  void list_positions();
  void find_attendable_keys();
  void prepare_bias();

  const SplitPattern& split_;
  Call call_;
  Pass whole_rows_pass_;
  std::vector<BatchEntry> entries_;
  std::vector<Position> positions_;
  std::vector<uint8_t> main_mask_;
  std::vector<float> bias_tables_;
  std::vector<float> bias_slopes_;
  std::vector<float> log_sum_exp_;
};

// The range of keys that one batch entry's mask leaves, and whether it has holes. `key_mask` may be null.
AttendableKeys attendable_keys(const uint8_t* key_mask, Position kv_len);

}  // namespace effc::cpu
