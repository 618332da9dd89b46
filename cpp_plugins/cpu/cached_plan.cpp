#include "cpu/cached_plan.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "cpu/denormals.hpp"
#include "cpu/thread_workspace.hpp"
#include "pattern/pattern.hpp"

namespace effc::cpu {
namespace {

// Enough that waking a thread pays, few enough that threads end together.
constexpr int64_t kSlotsPerTask = 512;
constexpr float kLog2OfE = 1.44269504f;

// What the token itself adds to a row, and the row's end: the partial sums of all parts, brought to one maximum.
void merge_row(const CachedCall& call, int64_t batch_index, int64_t head, const std::vector<PartialRows>& parts,
               int64_t row) {
  const int64_t dim = call.head_dim, kv_head = head / (call.num_heads / call.kv_num_heads);
  const float* query = call.query + (batch_index * call.num_heads + head) * dim;
  const int64_t own = (batch_index * call.kv_num_heads + kv_head) * dim;
  const float own_bias = call.bias[(batch_index + 1) * (call.slots + 1) - 1];
  const bool sees_itself = own_bias > kHidingBias;
  float own_score = 0.0f;
  for (int64_t d = 0; d < dim; ++d) own_score += query[d] * call.key[own + d];
  own_score = (own_score * call.scale + own_bias) * kLog2OfE;
  if (call.head_bias != nullptr) own_score += call.head_bias[(head + 1) * (call.slots + 1) - 1] * kLog2OfE;

  bool any = sees_itself;
  float largest = sees_itself ? own_score : -INFINITY;
  for (const PartialRows& part : parts) {
    if (part.row_sum[row] <= 0.0f) continue;
    largest = std::max(largest, part.row_max[row]);
    any = true;
  }
  float* output = call.output + (batch_index * call.num_heads + head) * dim;
  std::fill(output, output + dim, 0.0f);
  if (!any) return;
  const float own_weight = sees_itself ? std::exp2(own_score - largest) : 0.0f;
  float sum = own_weight;
  for (int64_t d = 0; d < dim && sees_itself; ++d) output[d] = own_weight * call.value[own + d];
  for (const PartialRows& part : parts) {
    if (part.row_sum[row] <= 0.0f) continue;
    const float weight = std::exp2(part.row_max[row] - largest);
    sum += weight * part.row_sum[row];
    const float* from = part.rows + row * part.padded_dim;
    for (int64_t d = 0; d < dim; ++d) output[d] += weight * from[d];
  }
  for (int64_t d = 0; d < dim; ++d) output[d] /= sum;
}

}  // namespace

bool run_cached(const CachedCall& call, AttendCacheFunction attend, const ParallelFor& parallel_for) {
  const int64_t group = call.num_heads / call.kv_num_heads;
  const int64_t padded_dim = divide_up(call.head_dim, kPaddedTo) * kPaddedTo;
  const int64_t parts = divide_up(call.slots, kSlotsPerTask);
  // Whole blocks of keys, but for the last.
  const int64_t slots_per_part = parts == 0 ? 0 : divide_up(divide_up(call.slots, parts), kKeyTile) * kKeyTile;
  const int64_t heads = call.batch * call.kv_num_heads;
  std::vector<float> memory(heads * parts * group * (padded_dim + 2));
  const auto partial = [&](int64_t task) {
    float* from = memory.data() + task * group * (padded_dim + 2);
    return PartialRows{from, from + group, from + 2 * group, padded_dim};
  };

  std::atomic<bool> enough_memory{true};
  parallel_for(heads * parts, [&](int64_t task) {
    Workspace* workspace = thread_workspace();
    if (workspace == nullptr) {
      enough_memory = false;
      return;
    }
    const FlushDenormals flush_denormals;
    const int64_t head = task / parts, first = task % parts * slots_per_part;
    const CachePart part = {head / call.kv_num_heads, head % call.kv_num_heads, first,
                            std::min(first + slots_per_part, call.slots)};
    attend(call, part, partial(task), *workspace);
  });
  if (!enough_memory) return false;

  std::vector<PartialRows> of_head(parts);
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t part = 0; part < parts; ++part) of_head[part] = partial(head * parts + part);
    for (int64_t row = 0; row < group; ++row) {
      merge_row(call, head / call.kv_num_heads, head % call.kv_num_heads * group + row, of_head, row);
    }
  }
  return true;
}

}  // namespace effc::cpu
