#include "cpu/plan.hpp"

#include <algorithm>

namespace effc::cpu {
namespace {

constexpr float kLog2E = 1.4426950408889634f;

Pattern pattern_of(const std::vector<Term>& terms, bool causal) {
  Pattern pattern{};
  pattern.term_count = static_cast<int32_t>(terms.size());
  pattern.causal = causal;
  std::copy(terms.begin(), terms.end(), pattern.terms);
  return pattern;
}

Pass pass_of(const std::vector<Term>& terms, bool causal) {
  Pass pass{};
  pass.pattern = pattern_of(terms, causal);
  pass.excluded = pattern_of({}, causal);
  pass.step = 1;
  return pass;
}

Pass every_step_th(Term band, bool causal) {
  const Position step = band.step;
  band.left /= step;
  band.right /= step;
  band.step = 1;
  Pass pass = pass_of({band}, causal);
  pass.step = step;
  return pass;
}

}  // namespace

SplitPattern split_pattern(const Pattern& pattern) {
  SplitPattern split{};
  split.causal = pattern.causal;
  split.whole_rows = kNoQuery;
  std::vector<Term> side_by_side, steps;
  Position first_keys = 0;
  for (int t = 0; t < pattern.term_count; ++t) {
    const Term& term = pattern.terms[t];
    switch (term.kind) {
      case TermKind::kFirstQueries:
        split.whole_rows = larger(split.whole_rows, term.count);
        break;
      case TermKind::kMarked:
        split.uses_marks = true;
        break;
      case TermKind::kFirstKeys:
        first_keys = larger(first_keys, term.count);
        break;
      case TermKind::kBand:
        (term.step > 1 ? steps : side_by_side).push_back(term);
        break;
      case TermKind::kBlocks:
      case TermKind::kRandom:
        side_by_side.push_back(term);
        break;
    }
  }
  // A pass in steps meets the first keys one by one, so without another pass they are listed.
  if (side_by_side.empty() && !steps.empty()) {
    split.listed_first_keys = first_keys;
  } else if (first_keys > 0) {
    Term term{};
    term.kind = TermKind::kFirstKeys;
    term.count = first_keys;
    side_by_side.push_back(term);
  }
  std::vector<Term> done = side_by_side;
  if (!side_by_side.empty() || steps.empty()) split.passes.push_back(pass_of(side_by_side, pattern.causal));
  for (const Term& step : steps) {
    Pass pass = every_step_th(step, pattern.causal);
    pass.excluded = pattern_of(done, pattern.causal);
    pass.continues = !split.passes.empty();
    split.passes.push_back(pass);
    done.push_back(step);
  }
  split.passes[0].takes_listed_keys = true;
  return split;
}

AttendableKeys attendable_keys(const uint8_t* key_mask, Position kv_len) {
  AttendableKeys keys{{0, kv_len}, false};
  if (key_mask == nullptr) return keys;
  while (keys.range.begin < kv_len && key_mask[keys.range.begin] == 0) ++keys.range.begin;
  while (keys.range.end > keys.range.begin && key_mask[keys.range.end - 1] == 0) --keys.range.end;
  keys.has_holes =
      std::find(key_mask + keys.range.begin, key_mask + keys.range.end, uint8_t{0}) != key_mask + keys.range.end;
  return keys;
}

Plan::Plan(const Problem& problem, const SplitPattern& split) : split_(split), call_{} {
  call_.problem = problem;
  if (!split.uses_marks) call_.problem.marks = nullptr;
  call_.whole_rows = split.whole_rows;
  call_.marks_whole_rows = call_.problem.marks != nullptr;
  if (split.passes.size() > 1 && problem.log_sum_exp == nullptr) {
    log_sum_exp_.resize(problem.batch * problem.num_heads * problem.q_len);
    call_.problem.log_sum_exp = log_sum_exp_.data();
  }
  Term everything{};
  everything.kind = TermKind::kBand;
  everything.left = everything.right = kMaxLength;
  everything.step = 1;
  whole_rows_pass_ = pass_of({everything}, split.causal);

  entries_.resize(problem.batch);
  call_.entries = entries_.data();
  list_positions();
  find_attendable_keys();
  prepare_bias();
}

void Plan::list_positions() {
  const Problem& problem = call_.problem;
  const Position kv_len = static_cast<Position>(problem.kv_len);
  const Position past = static_cast<Position>(problem.kv_len - problem.q_len);
  struct Ends {
    size_t keys, rows;
  };
  std::vector<Ends> ends;
  for (int64_t b = 0; b < problem.batch; ++b) {
    const uint8_t* mask = problem.key_mask == nullptr ? nullptr : problem.key_mask + b * kv_len;
    const uint8_t* marks = problem.marks == nullptr ? nullptr : problem.marks + b * kv_len;
    const auto is_listed = [&](Position position, Position first) {
      return position < first || (marks != nullptr && marks[position] != 0);
    };
    const Position last_key = marks == nullptr ? smaller(split_.listed_first_keys, kv_len) : kv_len;
    for (Position j = 0; j < last_key; ++j) {
      if (is_listed(j, split_.listed_first_keys) && (mask == nullptr || mask[j] != 0)) positions_.push_back(j);
    }
    const size_t keys_end = positions_.size();
    const Position last_row = marks == nullptr ? smaller(split_.whole_rows, kv_len) : kv_len;
    for (Position i = past; i < last_row; ++i) {
      if (is_listed(i, split_.whole_rows)) positions_.push_back(i - past);
    }
    ends.push_back({keys_end, positions_.size()});
  }
  size_t begin = 0;
  for (int64_t b = 0; b < problem.batch; ++b) {
    const Position* from = positions_.data();
    entries_[b].listed_keys = {from + begin, static_cast<int32_t>(ends[b].keys - begin)};
    entries_[b].listed_rows = {from + ends[b].keys, static_cast<int32_t>(ends[b].rows - ends[b].keys)};
    begin = ends[b].rows;
  }
}

void Plan::find_attendable_keys() {
  const Problem& problem = call_.problem;
  const int64_t kv_len = problem.kv_len;
  const bool any_listed =
      std::any_of(entries_.begin(), entries_.end(), [](const BatchEntry& e) { return e.listed_keys.count > 0; });
  if (any_listed) main_mask_.resize(problem.batch * kv_len, 1);
  for (int64_t b = 0; b < problem.batch; ++b) {
    BatchEntry& entry = entries_[b];
    entry.all_mask = problem.key_mask == nullptr ? nullptr : problem.key_mask + b * kv_len;
    entry.all_keys = attendable_keys(entry.all_mask, static_cast<Position>(kv_len));
    entry.main_mask = entry.all_mask;
    entry.main_keys = entry.all_keys;
    if (entry.listed_keys.count == 0) continue;
    uint8_t* mask = main_mask_.data() + b * kv_len;
    if (entry.all_mask != nullptr) std::copy(entry.all_mask, entry.all_mask + kv_len, mask);
    for (int32_t n = 0; n < entry.listed_keys.count; ++n) mask[entry.listed_keys.positions[n]] = 0;
    entry.main_mask = mask;
    entry.main_keys = attendable_keys(mask, static_cast<Position>(kv_len));
  }
}

void Plan::prepare_bias() {
  const Problem& problem = call_.problem;
  if (problem.distance_bias != nullptr) {
    const Position reach = problem.bias_reach;
    const int64_t width = 2 * int64_t{reach} + 1;
    const int64_t row = width + 2 * kTilePadding;
    bias_tables_.resize(problem.num_heads * row);
    for (int64_t head = 0; head < problem.num_heads; ++head) {
      const float* by_distance = problem.distance_bias + head * width;
      for (int64_t n = 0; n < row; ++n) {
        // The given table runs over j - i, this one over i - j.
        const int64_t place = std::clamp<int64_t>(width - 1 - (n - kTilePadding), 0, width - 1);
        bias_tables_[head * row + n] = by_distance[place] * kLog2E;
      }
    }
    call_.bias.tables = bias_tables_.data();
    call_.bias.row = row;
    call_.bias.reach = reach;
  }
  if (problem.distance_slope != nullptr) {
    for (int64_t head = 0; head < problem.num_heads; ++head) {
      bias_slopes_.push_back(problem.distance_slope[head] * kLog2E);
    }
    call_.bias.slopes = bias_slopes_.data();
  }
}

}  // namespace effc::cpu
