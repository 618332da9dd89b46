// Chooses a kernel for a problem and queues it.
#include <cmath>

#include "cuda/attention_merge.cuh"
#include "cuda/attention_scalar.cuh"
#include "cuda/dispatch.cuh"
#include "cuda/kernels.hpp"
#include "cuda/sparse_attention.hpp"
#include "cuda/tile_shapes.hpp"

namespace effc::cuda {
namespace {

// The kernels for heads of up to so many numbers.
struct HeadSize {
  int head_dim;
  TileKernel (*kernel)(TileVariant);
  int (*launch)(TileVariant, const Call&, void*);
};
constexpr HeadSize kHeadSizes[] = {
    {32, tile_kernel<32>, launch_tiles<32>},    {64, tile_kernel<64>, launch_tiles<64>},
    {80, tile_kernel<80>, launch_tiles<80>},    {96, tile_kernel<96>, launch_tiles<96>},
    {128, tile_kernel<128>, launch_tiles<128>}, {256, tile_kernel<256>, launch_tiles<256>},
};

constexpr HeadSize kE4M3HeadSizes[] = {
    {32, tile_kernel<32>, launch_e4m3_tiles<32>},    {64, tile_kernel<64>, launch_e4m3_tiles<64>},
    {96, tile_kernel<96>, launch_e4m3_tiles<96>},    {128, tile_kernel<128>, launch_e4m3_tiles<128>},
    {256, tile_kernel<256>, launch_e4m3_tiles<256>},
};
constexpr int kE4M3Capability = 89;
constexpr int kE4M3HeadUnit = 16;
constexpr int kMaxE4M3HeadDim = 256;

// Whether all queries of a group of heads fit into the smaller tile.
bool is_few(const SparseAttention& problem) {
  constexpr int64_t kFewRows = FewShape<64>::kRows;
  return problem.q_len * (problem.num_heads / problem.kv_num_heads) <= kFewRows;
}

TileVariant variant_for(const SparseAttention& problem) {
  return is_few(problem) || problem.tiling == Tiling::kSmall ? TileVariant::kFew : TileVariant::kUsual;
}

template <class T>
int launch_scalar(const Call& call, void* stream) {
  return launch_kernel(attend_rows<T>, block_count(call.problem, call.schedule), kScalarThreads,
                       scalar_shared_bytes(call.problem.head_dim), stream, call);
}

template <class T>
int launch_merge(const Call& call, void* stream) {
  return launch_kernel(merge_splits<T>, merge_blocks(call.problem), kMergeThreads, 0, stream, call);
}

void plan(Call& call, TileSize tile_size, void* workspace) {
  const SparseAttention& problem = call.problem;
  call.schedule = schedule_for(problem, tile_size, multiprocessors());
  Schedule& schedule = call.schedule;
  schedule.partial_output = static_cast<float*>(workspace);
  schedule.partial_log_sum_exp =
      schedule.partial_output + schedule.splits * problem.batch * problem.q_len * problem.num_heads * problem.head_dim;
}

// E4M3 in, `Output` out.
template <class Output>
int launch_e4m3_kernels(Call& call, void* workspace, void* stream) {
  constexpr int kInvalidValue = 1, kNotSupported = 801;  // cudaErrorInvalidValue, cudaErrorNotSupported
  const HeadSize* head_size = tensor_cores_for(call.problem, kE4M3HeadSizes);
  if (head_size == nullptr) return kInvalidValue;
  if (compute_capability() < kE4M3Capability) return kNotSupported;
  call.problem.scale *= call.problem.eight_bit.query_scale * call.problem.eight_bit.key_scale;
  const TileVariant variant = variant_for(call.problem);
  plan(call, head_size->kernel(variant).size, workspace);
  const int error = head_size->launch(variant, call, stream);
  if (error != 0 || call.schedule.splits == 1) return error;
  return launch_merge<Output>(call, stream);
}

template <class T>
int launch_kernels(Call& call, void* workspace, void* stream) {
  const SparseAttention& problem = call.problem;
  const HeadSize* head_size = tensor_cores_for(problem, kHeadSizes);
  const TileVariant variant = variant_for(problem);
  plan(call, head_size == nullptr ? kScalarTile : head_size->kernel(variant).size, workspace);
  const int error = head_size == nullptr ? launch_scalar<T>(call, stream) : head_size->launch(variant, call, stream);
  if (error != 0 || call.schedule.splits == 1) return error;
  return launch_merge<T>(call, stream);
}

const char* e4m3_refusal(const SparseAttention& problem, int capability) {
  if (capability < kE4M3Capability) {
    return "FP8 attention needs a device of compute capability 8.9 or newer.";
  }
  if (problem.head_dim % kE4M3HeadUnit != 0 || problem.head_dim > kMaxE4M3HeadDim) {
    return "FP8 attention takes heads of a multiple of 16 numbers, up to 256.";
  }
  const EightBit& eight_bit = problem.eight_bit;
  for (const float scale : {eight_bit.query_scale, eight_bit.key_scale, eight_bit.value_scale}) {
    if (!(scale > 0.0f) || !std::isfinite(scale)) return "the scales of FP8 queries, keys and values must be positive.";
  }
  if (eight_bit.output != Number::kHalf && eight_bit.output != Number::kBFloat16) {
    return "FP8 attention gives fp16 or bf16.";
  }
  return nullptr;
}

bool knows_negative_positions(const Pattern& pattern) {
  for (int t = 0; t < pattern.term_count; ++t) {
    const Term& term = pattern.terms[t];
    if (term.kind == TermKind::kBlocks || term.kind == TermKind::kRandom || term.kind == TermKind::kMarked)
      return false;
    if (term.kind == TermKind::kBand && term.step > 1) return false;
  }
  return true;
}

}  // namespace

const char* refusal(const SparseAttention& problem, int capability) {
  if (const char* reason = size_refusal(problem, capability)) return reason;
  if (problem.pattern.term_count < 0 || problem.pattern.term_count > kMaxTerms) {
    return "the pattern has more than 64 terms.";
  }
  if (problem.number == Number::kE4M3) {
    if (const char* reason = e4m3_refusal(problem, capability)) return reason;
  }
  if (problem.bias_reach < 0 || problem.bias_reach > kMaxLength) return "the reach of distance_bias is out of range.";
  if (problem.key_block_count > 0) {
    if (problem.block_size < kBlockUnit || problem.block_size % kBlockUnit != 0) {
      return "blocks of keys that are chosen by content must hold a multiple of 64 keys.";
    }
    if (problem.kv_len < problem.q_len) return "there are more queries than keys, and keys are chosen by content.";
  }
  if (problem.kv_len < problem.q_len && !knows_negative_positions(problem.pattern)) {
    return "there are more queries than keys. The queries are the last positions of the keys, so pass past and present "
           "keys together.";
  }
  // Of the smallest tiles. Only problems of few blocks are split.
  if (problem.batch * problem.num_heads * divide_up(problem.q_len, kScalarWarps) > kMaxBlocks) {
    return kTooManyBlocks;
  }
  return nullptr;
}

bool has_tilings(const SparseAttention& problem) {
  if (is_few(problem)) return false;
  AttentionTensors sizes = problem;
  sizes.query = sizes.key = sizes.value = sizes.output = nullptr;
  return tensor_cores_for(sizes, kHeadSizes) != nullptr;
}

size_t workspace_bytes(const SparseAttention& problem) {
  return most_workspace_bytes(problem);
}

int launch(const SparseAttention& problem, void* workspace, void* stream) {
  if (problem.batch == 0 || problem.q_len == 0) return 0;
  Call call{};
  call.problem = problem;
  if (problem.number == Number::kE4M3) {
    return problem.eight_bit.output == Number::kHalf ? launch_e4m3_kernels<Half>(call, workspace, stream)
                                                     : launch_e4m3_kernels<BFloat16>(call, workspace, stream);
  }
  return launch_for(problem.number,
                    [&](auto number) { return launch_kernels<decltype(number)>(call, workspace, stream); });
}

}  // namespace effc::cuda
