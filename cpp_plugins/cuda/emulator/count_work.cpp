// Counts the work of the tensor-core kernel without doing it, with the kernel's own walk over the pattern:
//
//   effc_cuda_count tiles
//   effc_cuda_count work PATTERN CAUSAL BATCH Q_LEN KV_LEN NUM_HEADS KV_NUM_HEADS HEAD_DIM [MULTIPROCESSORS]
//
// The first prints a line of JSON for every tile shape, the second one for the problem.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cuda/key_tile_walk.cuh"
#include "cuda/shared_tiles.cuh"
#include "pattern/parse.hpp"

namespace {

using namespace effc::cuda;

template <class Shape>
void print_shape(const char* variant) {
  std::printf(
      "{\"variant\": \"%s\", \"head_dim\": %d, \"rows\": %d, \"keys\": %d, \"slots\": %d, \"threads\": %d, "
      "\"shared_bytes\": %zu, \"blocks\": %d}\n",
      variant, Shape::kHeadDim, Shape::kRows, Shape::kKeys, Shape::kSlots, Shape::kThreads,
      sizeof(SharedTiles<Half, Shape>), Shape::kBlocksPerMultiprocessor);
}

template <int head_dim>
void print_shapes() {
  print_shape<UsualShape<head_dim>>("usual");
  print_shape<FewShape<head_dim>>("few");
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
    return 0;
  }
  if (count < 10 || std::strcmp(arguments[1], "work") != 0) {
    std::fprintf(stderr, "usage: effc_cuda_count tiles | work PATTERN CAUSAL BATCH Q_LEN KV_LEN HEADS KV_HEADS DIM\n");
    return 2;
  }
  SparseAttention problem{};
  const std::string wrong = effc::parse_pattern(arguments[2], std::atoi(arguments[3]) != 0, problem.pattern);
  if (!wrong.empty()) {
    std::fprintf(stderr, "%s\n", wrong.c_str());
    return 2;
  }
  problem.batch = std::atoll(arguments[4]);
  problem.q_len = std::atoll(arguments[5]);
  problem.kv_len = std::atoll(arguments[6]);
  problem.num_heads = std::atoll(arguments[7]);
  problem.kv_num_heads = std::atoll(arguments[8]);
  problem.head_dim = std::atoll(arguments[9]);
  problem.number = Number::kHalf;
  const int multiprocessors = count > 10 ? std::atoi(arguments[10]) : 1;
  for (const auto& [head_dim, print] :
       {std::pair{32, print_work<32>}, std::pair{64, print_work<64>}, std::pair{80, print_work<80>},
        std::pair{96, print_work<96>}, std::pair{128, print_work<128>}, std::pair{256, print_work<256>}}) {
    if (problem.head_dim > head_dim) continue;
    print(problem, multiprocessors);
    return 0;
  }
  std::fprintf(stderr, "tensor cores take heads of up to 256 numbers\n");
  return 2;
}
