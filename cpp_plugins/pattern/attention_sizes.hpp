// The sizes of a call of attention, whatever its form, device and numbers.
#pragma once

#include <cstdint>

namespace effc {

struct AttentionSizes {
  int64_t batch;
  int64_t q_len;
  int64_t kv_len;
  int64_t num_heads;
  int64_t kv_num_heads;
  int64_t head_dim;
};

}  // namespace effc
