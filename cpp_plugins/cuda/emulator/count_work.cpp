// Counts the work of the tensor-core kernel without doing it, with the kernel's own walk over the pattern:
//
//   effc_cuda_count tiles
//   effc_cuda_count work PATTERN CAUSAL BATCH Q_LEN KV_LEN NUM_HEADS KV_NUM_HEADS HEAD_DIM [MULTIPROCESSORS]
//
// The first prints a line of JSON for every tile shape, the second one for the problem. PATTERN may be linear.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cuda/key_tile_walk.cuh"
#include "cuda/linear_sums.cuh"
#include "cuda/linear_tile.cuh"
#include "cuda/shared_tiles.cuh"
#include "pattern/parse.hpp"

namespace {

using namespace effc::cuda;

void print_linear_shape(const char* variant, int head_dim, int keys, int threads, size_t shared_bytes) {
  std::printf(
      "{\"variant\": \"%s\", \"head_dim\": %d, \"rows\": %d, \"keys\": %d, \"slots\": 2, \"threads\": %d, "
      "\"shared_bytes\": %zu}\n",
      variant, head_dim, kLinearRows, keys, threads, shared_bytes);
}

template <class T, class Shape>
void print_shape(const char* variant) {
  std::printf(
      "{\"variant\": \"%s\", \"head_dim\": %d, \"rows\": %d, \"keys\": %d, \"slots\": %d, \"threads\": %d, "
      "\"shared_bytes\": %zu, \"blocks\": %d}\n",
      variant, Shape::kHeadDim, Shape::kRows, Shape::kKeys, Shape::kSlots, Shape::kThreads,
      sizeof(SharedTiles<T, Shape>), Shape::kBlocksPerMultiprocessor);
}

template <int head_dim>
void print_shapes() {
  print_shape<Half, UsualShape<head_dim>>("usual");
  print_shape<Half, FewShape<head_dim>>("few");
  if constexpr (head_dim % 32 == 0) {
    print_shape<E4M3, UsualE4M3Shape<head_dim>>("e4m3 usual");
    print_shape<E4M3, FewShape<head_dim>>("e4m3 few");
  }
  using Linear = LinearShape<head_dim>;
  print_linear_shape("linear", head_dim, Linear::kKeys, Linear::kThreads, sizeof(SharedLinear<Half, Linear>));
}

template <class Shape>
void print_work(const SparseAttention& problem, int multiprocessors) {
  const Schedule schedule = schedule_for(problem, Shape::kSize, multiprocessors);
  const effc::Scope scope = {static_cast<effc::Position>(problem.kv_len), nullptr};
  const int64_t blocks = block_count(problem, schedule);
  int64_t tiles = 0, partial_tiles = 0, keys = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const QueryTile tile = query_tile(problem, schedule, static_cast<uint32_t>(block));
    KeyTileWalk walk = walk_key_tiles(problem.pattern, scope, tile.positions, keys_of_split(schedule, tile));
    for (;;) {
      const VisitedTile visited = next_tile<Shape::kKeys>(walk, problem.pattern, scope, nullptr);
      if (effc::is_empty(visited.keys)) break;
      ++tiles;
      keys += visited.keys.end - visited.keys.begin;
      const bool whole = visited.full && visited.attendable == effc::low_bits(Shape::kKeys);
      partial_tiles += whole ? 0 : 1;
    }
  }
  const int64_t row_blocks = Shape::kRows / 16;
  const int64_t products = tiles * row_blocks * (Shape::kKeys / 8) * (Shape::kHeadDim / 16) * 2;
  const int64_t chunks = Shape::kHeadDim / kChunk;
  const int64_t rows = problem.batch * problem.q_len * problem.num_heads;
  const int64_t key_rows = 2 * problem.batch * problem.kv_len * problem.kv_num_heads;
  constexpr int64_t kNumberBytes = 2;
  std::printf(
      "{\"blocks\": %lld, \"splits\": %d, \"tiles\": %lld, \"partial_tiles\": %lld, \"matrix_products\": %lld, "
      "\"copies\": %lld, \"key_bytes_read\": %lld, \"key_bytes\": %lld, \"query_bytes\": %lld}\n",
      static_cast<long long>(blocks), schedule.splits, static_cast<long long>(tiles),
      static_cast<long long>(partial_tiles), static_cast<long long>(products),
      static_cast<long long>((blocks * Shape::kRows + 2 * tiles * Shape::kKeys) * chunks),
      static_cast<long long>(2 * keys * problem.head_dim * kNumberBytes),
      static_cast<long long>(key_rows * problem.head_dim * kNumberBytes),
      static_cast<long long>(2 * rows * problem.head_dim * kNumberBytes));
}

// As the kernels of linear attention cut it: products for sums, for what is read of states, and for pairs.
template <int head_dim>
void print_linear_work(const SparseAttention& sizes) {
  using Shape = LinearShape<head_dim>;
  LinearAttention problem{};
  static_cast<AttentionTensors&>(problem) = sizes;
  problem.causal = sizes.pattern.causal;
  const LinearSchedule schedule = linear_schedule_for(problem, 2, nullptr);
  const int64_t slices = int64_t{schedule.slices} * schedule.slices * problem.batch * problem.kv_num_heads;
  int64_t sum_tiles = 0;
  for (int64_t segment = 0; segment < schedule.segments; ++segment) {
    const int64_t begin = segment * schedule.keys_per_segment;
    const int64_t keys =
        problem.kv_len - begin < schedule.keys_per_segment ? problem.kv_len - begin : schedule.keys_per_segment;
    sum_tiles += effc::divide_up(keys, SumsShape::kKeys) * slices;
  }
  const int64_t blocks = linear_blocks(problem, schedule);
  int64_t state_tiles = 0, pair_tiles = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const LinearTile tile = linear_tile(problem, schedule, static_cast<uint32_t>(block));
    state_tiles += tile.has_state ? effc::divide_up(problem.head_dim, Shape::kKeys) : 0;
    pair_tiles += effc::divide_up(tile.keys.end - tile.keys.begin, Shape::kKeys);
  }
  const int64_t of_sums = sum_tiles * (kFeatureSlice / 16) * (SumsShape::kKeys / 16) * (kFeatureSlice / 8 + 1);
  const int64_t of_tile = int64_t{kLinearRows} / 16 * (Shape::kKeys / 16) * (Shape::kHeadDim / 8);
  std::printf(
      "{\"segments\": %d, \"states\": %d, \"blocks\": %lld, \"sum_tiles\": %lld, \"state_tiles\": %lld, "
      "\"pair_tiles\": %lld, \"matrix_products\": %lld, \"workspace_bytes\": %zu}\n",
      schedule.segments, schedule.reads, static_cast<long long>(blocks), static_cast<long long>(sum_tiles),
      static_cast<long long>(state_tiles), static_cast<long long>(pair_tiles),
      static_cast<long long>(of_sums + of_tile * (state_tiles + 2 * pair_tiles)), workspace_bytes(problem));
}

template <int head_dim>
void print_work(const SparseAttention& problem, int multiprocessors) {
  if (problem.q_len * (problem.num_heads / problem.kv_num_heads) <= FewShape<head_dim>::kRows) {
    print_work<FewShape<head_dim>>(problem, multiprocessors);
  } else {
    print_work<UsualShape<head_dim>>(problem, multiprocessors);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 2 && std::strcmp(arguments[1], "tiles") == 0) {
    print_shapes<32>();
    print_shapes<64>();
    print_shapes<80>();
    print_shapes<96>();
    print_shapes<128>();
    print_shapes<256>();
    print_linear_shape("sums", kFeatureSlice, SumsShape::kKeys, SumsShape::kThreads, sizeof(SharedSums<Half>));
    return 0;
  }
  if (count < 10 || std::strcmp(arguments[1], "work") != 0) {
    std::fprintf(stderr, "usage: effc_cuda_count tiles | work PATTERN CAUSAL BATCH Q_LEN KV_LEN HEADS KV_HEADS DIM\n");
    return 2;
  }
  SparseAttention problem{};
  const bool linear = std::strcmp(arguments[2], "linear") == 0;
  const std::string wrong =
      effc::parse_pattern(linear ? "dense" : arguments[2], std::atoi(arguments[3]) != 0, problem.pattern);
  if (!wrong.empty()) {
    std::fprintf(stderr, "%s\n", wrong.c_str());
    return 2;
  }
  const auto size = [&](int place) -> int64_t { return std::atoll(arguments[place]); };
  static_cast<effc::AttentionSizes&>(problem) = {size(4), size(5), size(6), size(7), size(8), size(9)};
  problem.number = Number::kHalf;
  const int multiprocessors = count > 10 ? std::atoi(arguments[10]) : 1;
  struct HeadSize {
    int head_dim;
    void (*print)(const SparseAttention&, int);
    void (*print_linear)(const SparseAttention&);
  };
  for (const auto& [head_dim, print, print_linear] :
       {HeadSize{32, print_work<32>, print_linear_work<32>}, HeadSize{64, print_work<64>, print_linear_work<64>},
        HeadSize{80, print_work<80>, print_linear_work<80>}, HeadSize{96, print_work<96>, print_linear_work<96>},
        HeadSize{128, print_work<128>, print_linear_work<128>},
        HeadSize{256, print_work<256>, print_linear_work<256>}}) {
    if (problem.head_dim > head_dim) continue;
    if (linear) {
      print_linear(problem);
    } else {
      print(problem, multiprocessors);
    }
    return 0;
  }
  std::fprintf(stderr, "tensor cores take heads of up to 256 numbers\n");
  return 2;
}
