// The rotary tables as the launchers see them: raw pointers only. common/rope.h applies them.
//
// A head of D channels has D/2 rotation pairs; pair j is channels (2j, 2j + 1) when interleaved, else (j, j + D/2):
//   y_a = x_a cos - x_b sin,  y_b = x_b cos + x_a sin
#pragma once

#include "common/dtype.h"

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

// The patch a token is, or -1 for a token that is not rotated. t counts within sequence b.
EVA02_KERNEL_INLINE int64_t rope_patch(const RopeTable& rope, int64_t b, int64_t t) {
  if (rope.form == RopeForm::none || t < rope.num_prefix) return -1;
  const int64_t i = t - rope.num_prefix;
  if (!rope.keep_idx) return i;
  const int64_t at = b * rope.num_kept + i;
  return rope.index_64 ? static_cast<const int64_t*>(rope.keep_idx)[at]
                       : static_cast<const int32_t*>(rope.keep_idx)[at];
}

// Two runs of D/4 values: the angles of the first and of the second half of the pairs.
struct RopeAngles {
  const float *cos[2], *sin[2];
};

// False: token t of sequence b is not rotated. Head h matters to per-head tables only.
EVA02_KERNEL_INLINE bool rope_angles(const RopeTable& rope, int64_t b, int64_t t, int64_t h, RopeAngles& angles) {
  const int64_t patch = rope_patch(rope, b, t);
  if (patch < 0) return false;
  const int64_t quarter = rope.head_dim / 4;
  int64_t first, second;
  if (rope.form == RopeForm::axis) {
    const int64_t w = rope.grids ? rope.grids[2 * b + 1] : rope.w;
    const int64_t row = patch / w, col = rope.h + patch % w;
    const int64_t base = b * rope.table_stride;
    first = base + (rope.swap ? col : row) * quarter;
    second = base + (rope.swap ? row : col) * quarter;
  } else {
    const int64_t table = rope.form == RopeForm::dense_head ? h : rope.form == RopeForm::dense_batch ? b : 0;
    first = table * rope.table_stride + patch * 2 * quarter;
    second = first + quarter;
  }
  angles = {{rope.cos + first, rope.cos + second}, {rope.sin + first, rope.sin + second}};
  return true;
}

}  // namespace eva02
