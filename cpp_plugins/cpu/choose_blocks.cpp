#include "cpu/choose_blocks.hpp"

#include <algorithm>
#include <limits>

namespace effc::cpu {
namespace {

// What the choice of one key/value head of one batch entry looks at.
class Head {
 public:
  Head(const AttentionCall& call, bool causal, Position count, Position block, int64_t batch_index, int64_t kv_head)
      : call_(call),
        causal_(causal),
        count_(count),
        block_(block),
        past_(call.kv_len - call.q_len),
        group_(call.num_heads / call.kv_num_heads),
        query_(call.query + batch_index * call.q_len * call.num_heads * call.head_dim +
               kv_head * group_ * call.head_dim),
        mask_(call.key_mask == nullptr ? nullptr : call.key_mask + batch_index * call.kv_len) {
    sum_keys(call.key + (batch_index * call.kv_len * call.kv_num_heads + kv_head) * call.head_dim);
  }

  // Sets the bits of the blocks that query block `own` sees.
  void choose(int64_t own, uint64_t* words) {
    pool_queries(own);
    const int64_t end = causal_ ? std::min<int64_t>(own + 1, blocks()) : blocks();
    ranked_.clear();
    bool sink_found = false;
    for (int64_t b = 0; b < end; ++b) {
      if (counts_[b] == 0) continue;
      const bool sink = !sink_found;
      sink_found = true;
      if (b == own) continue;
      ranked_.push_back({sink ? std::numeric_limits<float>::infinity() : score(b), b});
    }
    const auto others = std::min<size_t>(ranked_.size(), count_ - 1);
    std::partial_sort(ranked_.begin(), ranked_.begin() + others, ranked_.end(), [](const Ranked& a, const Ranked& b) {
      return a.score != b.score ? a.score > b.score : a.block < b.block;
    });
    const auto set = [words](int64_t b) { words[b / 64] |= uint64_t{1} << (b % 64); };
    set(own);
    for (size_t n = 0; n < others; ++n) set(ranked_[n].block);
  }

 private:
  struct Ranked {
    float score;
    int64_t block;
  };

  int64_t blocks() const { return static_cast<int64_t>(counts_.size()); }
  bool is_key(int64_t position) const { return mask_ == nullptr || mask_[position] != 0; }

  void sum_keys(const float* key) {
    const int64_t dim = call_.head_dim, stride = call_.kv_num_heads * dim;
    counts_.assign(divide_up(call_.kv_len, block_), 0);
    sums_.assign(counts_.size() * dim, 0.0f);
    for (int64_t j = 0; j < call_.kv_len; ++j) {
      if (!is_key(j)) continue;
      ++counts_[j / block_];
      float* sum = sums_.data() + j / block_ * dim;
      for (int64_t d = 0; d < dim; ++d) sum[d] += key[j * stride + d];
    }
  }

  // The sum of the pool's queries; their mean would order the blocks alike.
  void pool_queries(int64_t own) {
    const int64_t dim = call_.head_dim, stride = call_.num_heads * dim;
    int64_t begin = own * block_, end = std::min<int64_t>(begin + block_, call_.kv_len);
    if (causal_) {
      end = std::max<int64_t>(begin, past_) + 1;
      begin = end - block_;
    }
    pool_.assign(dim, 0.0f);
    for (int64_t i = std::max<int64_t>(begin, past_); i < end; ++i) {
      if (!is_key(i)) continue;
      for (int64_t x = 0; x < group_ * dim; x += dim) {
        const float* row = query_ + (i - past_) * stride + x;
        for (int64_t d = 0; d < dim; ++d) pool_[d] += row[d];
      }
    }
  }

  float score(int64_t b) const {
    const float* sum = sums_.data() + b * call_.head_dim;
    double total = 0;
    for (int64_t d = 0; d < call_.head_dim; ++d) total += static_cast<double>(pool_[d]) * sum[d];
    return static_cast<float>(total / static_cast<double>(counts_[b]));
  }

  const AttentionCall& call_;
  const bool causal_;
  const Position count_, block_;
  const int64_t past_, group_;
  const float* query_;
  const uint8_t* mask_;
  std::vector<int64_t> counts_;  // unpadded keys of each block
  std::vector<float> sums_;      // [blocks][head_dim]
  std::vector<float> pool_;
  std::vector<Ranked> ranked_;
};

}  // namespace

BlockChoice choose_blocks(const AttentionCall& call, bool causal, Position count, Position block,
                          const ParallelFor& parallel_for) {
  BlockChoice choice{};
  const int64_t key_blocks = divide_up(call.kv_len, block);
  choice.block = block;
  choice.first_query_block = static_cast<Position>((call.kv_len - call.q_len) / block);
  choice.query_blocks = key_blocks - choice.first_query_block;
  choice.words_per_row = divide_up(key_blocks, 64);
  const int64_t words_per_head = choice.query_blocks * choice.words_per_row;
  choice.words.assign(call.batch * call.kv_num_heads * words_per_head, 0);
  parallel_for(call.batch * call.kv_num_heads, [&](int64_t n) {
    Head head(call, causal, count, block, n / call.kv_num_heads, n % call.kv_num_heads);
    for (int64_t b = 0; b < choice.query_blocks; ++b) {
      head.choose(choice.first_query_block + b, choice.words.data() + n * words_per_head + b * choice.words_per_row);
    }
  });
  return choice;
}

}  // namespace effc::cpu
