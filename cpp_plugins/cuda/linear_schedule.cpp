#include "cuda/linear_schedule.hpp"

#include <algorithm>

namespace effc::cuda {
namespace {

// More would not make the device busier, and each costs memory.
constexpr int64_t kMostSegments = 32;

int64_t rounded(int64_t bytes) {
  constexpr int64_t kAlignment = 256;
  return divide_up(bytes, kAlignment) * kAlignment;
}

// Hands out parts of the workspace, each aligned as device memory is.
class Parts {
 public:
  explicit Parts(void* begin) : begin_(static_cast<char*>(begin)) {}
  void* take(int64_t bytes) {
    void* part = begin_ == nullptr ? nullptr : begin_ + taken_;
    taken_ += rounded(bytes);
    return part;
  }
  int64_t taken() const { return taken_; }

 private:
  char* begin_;
  int64_t taken_ = 0;
};

int64_t place_parts(const LinearAttention& problem, int mean_bytes, int64_t segments, int64_t reads, void* workspace,
                    LinearSchedule& schedule) {
  const int64_t heads = problem.batch * problem.kv_num_heads, dim = problem.head_dim;
  Parts parts(workspace);
  schedule.sums = static_cast<float*>(parts.take(heads * segments * dim * dim * int64_t{sizeof(float)}));
  schedule.normalisers = static_cast<float*>(parts.take(heads * segments * dim * int64_t{sizeof(float)}));
  schedule.means = parts.take(heads * reads * dim * dim * mean_bytes);
  schedule.totals = static_cast<float*>(parts.take(heads * reads * dim * int64_t{sizeof(float)}));
  return parts.taken();
}

}  // namespace

LinearSchedule linear_schedule_for(const LinearAttention& problem, int mean_bytes, void* workspace) {
  LinearSchedule schedule{};
  schedule.slices = static_cast<int32_t>(divide_up(problem.head_dim, kFeatureSlice));
  if (problem.causal) {
    const int64_t past = problem.kv_len - problem.q_len;
    const bool whole = problem.present_state != nullptr;
    const int64_t last = problem.kv_len == 0 ? 0 : (problem.kv_len - 1) / kSegment;
    schedule.keys_per_segment = kSegment;
    // Nobody reads the last segment's sums, unless the state behind it is wanted.
    schedule.segments = static_cast<int32_t>(whole ? divide_up(problem.kv_len, kSegment) : last);
    schedule.first_read = static_cast<int32_t>(past / kSegment);
    schedule.reads = static_cast<int32_t>(last) - schedule.first_read + 1;
    schedule.first_cut = static_cast<int32_t>(past % kLinearRows);
  } else {
    const int64_t keys = std::max<int64_t>(kSegment, divide_up(divide_up(problem.kv_len, kMostSegments), 64) * 64);
    schedule.keys_per_segment = static_cast<Position>(keys);
    schedule.segments = static_cast<int32_t>(divide_up(problem.kv_len, keys));
    schedule.reads = 1;
  }
  schedule.query_tiles = static_cast<int32_t>(divide_up(problem.q_len + schedule.first_cut, kLinearRows));
  place_parts(problem, mean_bytes, schedule.segments, schedule.reads, workspace, schedule);
  return schedule;
}

size_t workspace_bytes(const LinearAttention& problem) {
  const int64_t segments = divide_up(problem.kv_len, kSegment);
  LinearSchedule unused{};
  return static_cast<size_t>(place_parts(problem, sizeof(float),
                                         problem.causal ? segments : std::min(segments, kMostSegments),
                                         problem.causal ? segments + 1 : 1, nullptr, unused));
}

}  // namespace effc::cuda
