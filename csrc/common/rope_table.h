// The rotary tables as the launchers see them: raw pointers only. common/rope.h applies them.
//
// A head of D channels has D/2 rotation pairs; pair j is channels (2j, 2j + 1) when interleaved, else (j, j + D/2):
//   y_a = x_a cos - x_b sin,  y_b = x_b cos + x_a sin
#pragma once

#include <cstdint>

namespace eva02 {

enum class RopeForm : int {
  none,         // nothing is rotated
  axis,         // (h + w, D/4): rows of the grid, then columns; a pair's angle comes from its patch's row or column
  dense,        // (P, D/2), shared
  dense_head,   // (H, P, D/2)
  dense_batch,  // (B, P, D/2)
};

struct RopeTable {
  RopeForm form = RopeForm::none;
  bool interleaved = true;
  bool swap = false;      // axis form: the first D/4 pairs follow the column instead of the row
  bool index_64 = false;  // keep_idx holds int64, else int32
  const float *cos = nullptr, *sin = nullptr;
  int64_t head_dim = 0;            // D
  int64_t rows = 0;                // dense: P
  int64_t h = 0, w = 0;            // axis: the grid (the largest one when each sequence has its own)
  int64_t table_stride = 0;        // floats between the tables of two heads, samples or sequences; 0: one table
  const int32_t* grids = nullptr;  // axis: (sequences, 2), each sequence's own (h, w)
  int64_t num_prefix = 0;          // leading tokens of every sequence that are not rotated
  const void* keep_idx = nullptr;  // (B, num_kept): token num_prefix + i is patch keep_idx[b][i]
  int64_t num_kept = 0;
};

}  // namespace eva02
