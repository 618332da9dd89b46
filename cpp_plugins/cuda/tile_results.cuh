// From a warp's registers to the tensors.
#pragma once

#include "cuda/warp_tile.cuh"

namespace effc::cuda {

// Outputs go through shared memory, where the warp's own queries lay, so that lanes can write 16 neighbouring bytes
// each.
template <class T, class Shape>
EFFC_DEVICE void write_final(const Call& call, const QueryTile& tile, SharedTiles<T, Shape>& shared,
                             WarpTile<T, Shape>& warp) {
  using Rows = SwizzledRows<Shape::kHeadDim>;
  using Warp = WarpTile<T, Shape>;
  __syncwarp();
  EFFC_UNROLL
  for (int block = 0; block < Shape::kRowBlocks; ++block) {
    EFFC_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float factor = output_factor(warp.statistics[block][half]);
      EFFC_UNROLL
      for (int n = 0; n < Warp::kDimBlocks; ++n) {
        T* place = shared.queries + Rows::at(warp.row(block, half), n) + warp.lane % 4 * 2;
        const float* pair = warp.outputs[block].at[n] + 2 * half;
        *reinterpret_cast<uint32_t*>(place) = pack<T>(pair[0] * factor, pair[1] * factor);
      }
    }
  }
  __syncwarp();
  const int rows = smaller(tile.query_count * tile.head_count - warp.first_row, Shape::kRowBlocks * 16);
  const int chunks = static_cast<int>(call.problem.head_dim) / kChunk;
  for (int n = warp.lane; n < rows * chunks; n += kWarpSize) {
    const int r = warp.first_row + n / chunks, chunk = n % chunks;
    T* place = static_cast<T*>(call.problem.output) + row_of(call.problem, tile, r).offset + chunk * kChunk;
    *reinterpret_cast<ChunkOfBytes*>(place) =
        *reinterpret_cast<const ChunkOfBytes*>(shared.queries + Rows::at(r, chunk));
  }
}

// The outputs of one split, in fp32 for the merge.
template <class T, class Shape>
EFFC_DEVICE void write_partial(const Call& call, const QueryTile& tile, WarpTile<T, Shape>& warp) {
  EFFC_UNROLL
  for (int block = 0; block < Shape::kRowBlocks; ++block) {
    EFFC_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int r = warp.row(block, half);
      if (r >= tile.query_count * tile.head_count) continue;
      const float factor = output_factor(warp.statistics[block][half]);
      float* to = partial_output_of(call, tile) + row_of(call.problem, tile, r).offset;
      EFFC_UNROLL
      for (int n = 0; n < 2 * WarpTile<T, Shape>::kDimBlocks; ++n) {
        const int d = column_of(n, warp.lane);
        if (d < call.problem.head_dim) to[d] = warp.outputs[block].of(half, n) * factor;
      }
    }
  }
}

template <class T, class Shape>
EFFC_DEVICE void write_results(const Call& call, const QueryTile& tile, SharedTiles<T, Shape>& shared,
                               WarpTile<T, Shape>& warp) {
  EFFC_UNROLL
  for (int block = 0; block < Shape::kRowBlocks; ++block) {
    EFFC_UNROLL
    for (int half = 0; half < 2; ++half) {
      RowStatistics& statistics = warp.statistics[block][half];
      statistics.sum = sum_of_lanes<4>(statistics.sum);
      const int r = warp.row(block, half);
      if (warp.lane % 4 != 0 || r >= tile.query_count * tile.head_count) continue;
      write_log_sum_exp(call, tile, row_of(call.problem, tile, r), statistics);
    }
  }
  if (call.schedule.splits > 1) {
    write_partial(call, tile, warp);
  } else {
    write_final(call, tile, shared, warp);
  }
}

}  // namespace effc::cuda
