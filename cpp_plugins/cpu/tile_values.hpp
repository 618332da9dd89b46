// The values of a tile: the softmax weights of a block of keys times their values, a few rows at a time.
#pragma once

#include "cpu/accumulate.hpp"
#include "cpu/key_blocks.hpp"
#include "cpu/packed_keys.hpp"
#include "cpu/tile_workspace.hpp"

namespace effc::cpu {
namespace {

// For each group of kRegisterRows rows the keys that some of its rows see, from the first to the last.
struct GroupRanges {
  static constexpr int kGroups = (kTileRows + kRegisterRows - 1) / kRegisterRows;
  Range keys[kGroups];
};

inline GroupRanges find_group_ranges(const KeyBlock& block, const BlockVisibility& visibility) {
  GroupRanges ranges;
  const Range nothing = {0, 0};
  for (Range& keys : ranges.keys) keys = visibility.all ? Range{0, block.count} : nothing;
  if (visibility.all) return ranges;
  const auto each_new_group = [](uint64_t rows, uint64_t& met, auto meet) {
    for (uint64_t fresh = rows & ~met; fresh != 0; fresh &= ~met) {
      const int group = __builtin_ctzll(fresh) / kRegisterRows;
      met |= low_bits(kRegisterRows) << (group * kRegisterRows);
      meet(group);
    }
  };
  uint64_t begun = 0, ended = 0;
  for (int j = 0; j < block.count; ++j) {
    each_new_group(visibility.rows[j], begun, [&](int group) { ranges.keys[group].begin = j; });
  }
  for (int j = block.count - 1; j >= 0; --j) {
    each_new_group(visibility.rows[j], ended, [&](int group) { ranges.keys[group].end = j + 1; });
  }
  return ranges;
}

// A panel's values, from the block's cell number `cell`.
struct PanelValues {
  const float* first;
  int64_t stride;
};

inline PanelValues values_of(const KeyBlock& block, const Panel& panel, int cell) {
  if (block.row_in_panels < 0) return {block.value + cell * block.value_stride + panel.column, block.value_stride};
  const float* values = block.value + panel.column * kKeyTile;
  return {values + (block.row_in_panels + cell) * panel.columns, panel.columns};
}

// Multiplies the softmax weights with the values. `lead` is the place of the block's first key in its cell.
template <class Arithmetic>
inline void accumulate_values(const TileWorkspace& workspace, const TileLayout& layout, int64_t head_dim,
                              const KeyBlock& block, int lead, const BlockVisibility& visibility, Workspace& thread) {
  const int64_t output_stride = vectors_for(head_dim) * kWidth;
  const float* all_weights = Arithmetic::kPerCell == 1 ? workspace.scores : workspace.weights;
  const GroupRanges ranges = find_group_ranges(block, visibility);
  const int panels = panels_of(head_dim);
  int until_prefetch = 0;
  Panel panel;
  for (int64_t column = 0; column < head_dim; column += panel.columns) {
    panel = panel_from(column, head_dim);
    for (int row = 0; row < layout.rows;) {
      const int left = layout.rows - row;
      const int taken = left >= 6 ? 6 : (left >= 4 ? 4 : (left >= 2 ? 2 : 1));
      if (until_prefetch-- == 0) {
        prefetch_rows(thread);
        until_prefetch = panels - 1;
      }
      // Where no row sees a key, their maximum is unchanged and there is nothing to do.
      const Range keys = ranges.keys[row / kRegisterRows];
      if (!is_empty(keys)) {
        const int begin = (keys.begin + lead) / Arithmetic::kPerCell;
        const int count = static_cast<int>(cells_for<Arithmetic>(keys.end + lead)) - begin;
        const PanelValues values = values_of(block, panel, begin);
        const float* weights = all_weights + begin * kTileRows + row;
        float* output = workspace.output + row * output_stride + column;
        const auto run = [&](auto accumulate_rows) {
          accumulate_rows(panel, weights, values.first, values.stride, count, workspace.rescale + row, output,
                          output_stride);
        };
        if (taken == 6) {
          run(accumulate_panel<Arithmetic, 6, kTileRows, 1>);
        } else if (taken == 4) {
          run(accumulate_panel<Arithmetic, 4, kTileRows, 1>);
        } else if (taken == 2) {
          run(accumulate_panel<Arithmetic, 2, kTileRows, 1>);
        } else {
          run(accumulate_panel<Arithmetic, 1, kTileRows, 1>);
        }
      }
      row += taken;
    }
  }
}

// Weights are used as they are, where a cell is one number.
inline void pair_weights(Fp32, const TileWorkspace&, int, int, int) {}

}  // namespace
}  // namespace effc::cpu
