// From a warp's registers to the tensors.
#pragma once

#include "cuda/warp_tile.cuh"

namespace effc::cuda {

// Rows of the warp, each times its `factor_of(block, half)`, go to `address_of(row)`, row being one of the tile's first
// `count`. They pass through shared memory, where the warp's own queries lay, so that lanes can write 16 neighbouring
// bytes each.
template <class T, class Shape, class FactorOf, class AddressOf>
EFFC_DEVICE void write_rows(T* queries, WarpTile<T, Shape>& warp, int count, int head_dim, const FactorOf& factor_of,
                            const AddressOf& address_of) {
  using Rows = SwizzledRows<Shape::kHeadDim>;
  using Warp = WarpTile<T, Shape>;
  __syncwarp();
  EFFC_UNROLL
  for (int block = 0; block < Shape::kRowBlocks; ++block) {
    EFFC_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float factor = factor_of(block, half);
      EFFC_UNROLL
      for (int n = 0; n < Warp::kDimBlocks; ++n) {
        T* place = queries + Rows::at(warp.row(block, half), n) + warp.lane % 4 * 2;
        const float* pair = warp.outputs[block].at[n] + 2 * half;
        *reinterpret_cast<uint32_t*>(place) = pack<T>(pair[0] * factor, pair[1] * factor);
      }
    }
  }
  __syncwarp();
  const int rows = smaller(count - warp.first_row, Shape::kRowBlocks * 16);
  const int chunks = head_dim / kChunk;
  for (int n = warp.lane; n < rows * chunks; n += kWarpSize) {
    const int r = warp.first_row + n / chunks, chunk = n % chunks;
    *reinterpret_cast<ChunkOfBytes*>(address_of(r) + chunk * kChunk) =
        *reinterpret_cast<const ChunkOfBytes*>(queries + Rows::at(r, chunk));
  }
}

template <class T, class Shape>
EFFC_DEVICE void write_final(const Call& call, const QueryTile& tile, SharedTiles<T, Shape>& shared,
                             WarpTile<T, Shape>& warp) {
  write_rows(
      shared.queries, warp, tile.query_count * tile.head_count, static_cast<int>(call.problem.head_dim),
      [&](int block, int half) { return output_factor(warp.statistics[block][half]); },
      [&](int r) { return static_cast<T*>(call.problem.output) + row_of(call.problem, tile, r).offset; });
}

// What the values are to be multiplied with.
template <class T>
EFFC_DEVICE float value_scale(const SparseAttention& problem) {
  return sizeof(T) == 1 ? problem.eight_bit.value_scale : 1.0f;
}

// Outputs of E4M3 values are wider than the queries were, so they take no way through shared memory. Four lanes write
// 32 neighbouring bytes, all that memory moves at a time.
template <class Output, class Shape>
EFFC_DEVICE void write_wider(const Call& call, const QueryTile& tile, WarpTile<E4M3, Shape>& warp) {
  struct alignas(8) FourNumbers {
    uint32_t words[2];
  };
  EFFC_UNROLL
  for (int block = 0; block < Shape::kRowBlocks; ++block) {
    EFFC_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int r = warp.row(block, half);
      if (r >= tile.query_count * tile.head_count) continue;
      const float factor = output_factor(warp.statistics[block][half]) * value_scale<E4M3>(call.problem);
      Output* to = static_cast<Output*>(call.problem.output) + row_of(call.problem, tile, r).offset;
      EFFC_UNROLL
      for (int chunk = 0; chunk < Shape::kHeadDim / 16; ++chunk) {
        const float* even = warp.outputs[block].at[2 * chunk] + 2 * half;
        const float* odd = warp.outputs[block].at[2 * chunk + 1] + 2 * half;
        const int d = 16 * chunk + warp.lane % 4 * 4;
        if (d >= call.problem.head_dim) continue;
        *reinterpret_cast<FourNumbers*>(to + d) = {pack<Output>(even[0] * factor, odd[0] * factor),
                                                   pack<Output>(even[1] * factor, odd[1] * factor)};
      }
    }
  }
}

template <class Shape>
EFFC_DEVICE void write_final(const Call& call, const QueryTile& tile, SharedTiles<E4M3, Shape>&,
                             WarpTile<E4M3, Shape>& warp) {
  if (call.problem.eight_bit.output == Number::kHalf) {
    write_wider<Half>(call, tile, warp);
  } else {
    write_wider<BFloat16>(call, tile, warp);
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
      const float factor = output_factor(warp.statistics[block][half]) * value_scale<T>(call.problem);
      float* to = partial_output_of(call, tile) + row_of(call.problem, tile, r).offset;
      EFFC_UNROLL
      for (int n = 0; n < 2 * WarpTile<T, Shape>::kDimBlocks; ++n) {
        const int d = WarpTile<T, Shape>::dim_of(n, warp.lane);
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
