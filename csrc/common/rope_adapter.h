// Fills a RopeTable from an operator's arguments and checks them; for *_registration.cpp alone.
#pragma once

#include "common/rope_table.h"
#include "common/torch_adapter.h"

namespace eva02 {

// The arguments every operator with a rotary table takes. Schema:
#define EVA02_ROPE_SCHEMA                                                                                             \
  "Tensor? rope_cos, Tensor? rope_sin, Tensor? rope_grids, int[] rope_grid, str rope_layout, int num_prefix_tokens, " \
  "Tensor? keep_idx"

// What the table is applied to. With cu (sequences + 1 offsets), sequence i is tokens cu[i] .. cu[i + 1].
struct RopeTokens {
  int64_t sequences, seqlen, head_dim, heads, kv_heads;
  const int32_t* cu = nullptr;

  int64_t length(int64_t sequence) const { return cu ? cu[sequence + 1] - cu[sequence] : seqlen; }
};

// cu_seqlens: int32, contiguous, not decreasing, from 0 to the number of tokens.
inline const int32_t* checked_cu_seqlens(const Tensor& cu_seqlens, int64_t tokens) {
  STD_TORCH_CHECK(cu_seqlens.scalar_type() == torch::headeronly::ScalarType::Int && cu_seqlens.dim() == 1 &&
                      cu_seqlens.size(0) >= 1 && cu_seqlens.is_contiguous(),
                  "cu_seqlens: expected a contiguous int32 tensor (sequences + 1,)");
  const int32_t* cu = static_cast<const int32_t*>(cu_seqlens.data_ptr());
  if (!kHostValues) return cu;
  const int64_t n = cu_seqlens.size(0) - 1;
  STD_TORCH_CHECK(cu[0] == 0 && cu[n] == tokens, "cu_seqlens: expected to run from 0 to the number of tokens, ", tokens,
                  ", found ", cu[0], " to ", cu[n]);
  for (int64_t i = 0; i < n; ++i)
    STD_TORCH_CHECK(cu[i] <= cu[i + 1], "cu_seqlens: expected no decrease, found ", cu[i + 1], " after ", cu[i]);
  return cu;
}

inline RopeTable checked_rope_table(const OptTensor& cos, const OptTensor& sin, const OptTensor& grids,
                                    const std::vector<int64_t>& grid, const std::string& layout, int64_t num_prefix,
                                    const OptTensor& keep_idx, const RopeTokens& tokens) {
  using torch::headeronly::ScalarType;
  RopeTable rope;
  rope.head_dim = tokens.head_dim;
  rope.num_prefix = num_prefix;
  if (!cos.has_value() || !cos->defined()) return rope;

  const std::string kind = layout.substr(0, layout.find(':'));
  const std::string tables = kind.size() == layout.size() ? "" : layout.substr(kind.size() + 1);
  STD_TORCH_CHECK(
      (kind == "interleaved" || kind == "half") && (tables.empty() || tables == "head" || tables == "batch"),
      "rope_layout: expected interleaved or half, alone or with :head or :batch, found ", layout);
  STD_TORCH_CHECK(sin.has_value() && sin->defined() && cos->scalar_type() == ScalarType::Float &&
                      sin->scalar_type() == ScalarType::Float && cos->is_contiguous() && sin->is_contiguous() &&
                      cos->dim() == sin->dim() && cos->numel() == sin->numel() && cos->dim() >= 2 && cos->dim() <= 3,
                  "rope_cos, rope_sin: expected two contiguous float32 tensors of one shape, 2-D or 3-D");
  STD_TORCH_CHECK(tokens.head_dim % 4 == 0, "rope: expected a head dim that is a multiple of 4, found ",
                  tokens.head_dim);
  STD_TORCH_CHECK(num_prefix >= 0, "num_prefix_tokens: expected at least 0, found ", num_prefix);
  const int64_t dim = cos->dim(), rows = cos->size(dim - 2), width = cos->size(dim - 1);
  const int64_t count = dim == 3 ? cos->size(0) : 1;
  rope.interleaved = kind == "interleaved";
  rope.cos = ptr_as<const float>(cos);
  rope.sin = ptr_as<const float>(sin);
  rope.table_stride = dim == 3 ? rows * width : 0;

  if (grid.empty()) {
    STD_TORCH_CHECK(width * 2 == tokens.head_dim,
                    "rope_cos: expected a last dim of head_dim / 2 = ", tokens.head_dim / 2, ", found ", width);
    rope.rows = rows;
    if (dim == 2) {
      rope.form = RopeForm::dense;
    } else if (tables == "head") {
      STD_TORCH_CHECK(count == tokens.heads && tokens.heads == tokens.kv_heads, "rope_cos: per-head tables: expected ",
                      tokens.heads, " tables and as many key heads, found ", count, " tables, ", tokens.kv_heads,
                      " key heads");
      rope.form = RopeForm::dense_head;
    } else {
      STD_TORCH_CHECK(tables == "batch", "rope_layout: 3-D tables need :head or :batch, found ", layout);
      STD_TORCH_CHECK(count == tokens.sequences, "rope_cos: expected ", tokens.sequences, " tables, found ", count);
      rope.form = RopeForm::dense_batch;
    }
  } else {
    STD_TORCH_CHECK(grid.size() == 3 && grid[0] >= 0 && grid[1] >= 0, "rope_grid: expected [h, w, swap]");
    STD_TORCH_CHECK(rows == grid[0] + grid[1] && width * 4 == tokens.head_dim,
                    "rope_cos: expected (h + w, head_dim / 4) = (", grid[0] + grid[1], ", ", tokens.head_dim / 4,
                    "), found (", rows, ", ", width, ")");
    STD_TORCH_CHECK(dim == 2 || count == tokens.sequences, "rope_cos: expected ", tokens.sequences, " tables, found ",
                    count);
    rope.form = RopeForm::axis;
    rope.h = grid[0];
    rope.w = grid[1];
    rope.swap = grid[2] != 0;
    if (grids.has_value() && grids->defined()) {
      STD_TORCH_CHECK(grids->scalar_type() == ScalarType::Int && grids->dim() == 2 && grids->is_contiguous() &&
                          grids->size(0) == tokens.sequences && grids->size(1) == 2,
                      "rope_grids: expected a contiguous int32 tensor (", tokens.sequences, ", 2)");
      rope.grids = ptr_as<const int32_t>(grids);
      for (int64_t i = 0; kHostValues && i < tokens.sequences; ++i) {
        const int32_t h = rope.grids[2 * i], w = rope.grids[2 * i + 1];
        STD_TORCH_CHECK(h >= 0 && w >= 0 && h <= rope.h && w <= rope.w, "rope_grids: expected grids within ", rope.h,
                        "x", rope.w, ", found ", h, "x", w, " for sequence ", i);
      }
    }
  }

  const auto patches = [&](int64_t sequence) -> int64_t {
    if (rope.form != RopeForm::axis) return rope.rows;
    return rope.grids ? int64_t{rope.grids[2 * sequence]} * rope.grids[2 * sequence + 1] : rope.h * rope.w;
  };
  if (keep_idx.has_value() && keep_idx->defined()) {
    STD_TORCH_CHECK(!tokens.cu, "keep_idx: cannot be combined with cu_seqlens");
    rope.index_64 = keep_idx->scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK((rope.index_64 || keep_idx->scalar_type() == ScalarType::Int) && keep_idx->dim() == 2 &&
                        keep_idx->is_contiguous() && keep_idx->size(0) == tokens.sequences,
                    "keep_idx: expected a contiguous int32 or int64 tensor (", tokens.sequences, ", K)");
    rope.keep_idx = keep_idx->data_ptr();
    rope.num_kept = keep_idx->size(1);
    STD_TORCH_CHECK(tokens.seqlen == num_prefix + rope.num_kept, "keep_idx: expected ", tokens.seqlen - num_prefix,
                    " indices a sample (tokens less prefix tokens), found ", rope.num_kept);
    for (int64_t b = 0; kHostValues && b < tokens.sequences; ++b) {
      const int64_t limit = patches(b);
      for (int64_t i = b * rope.num_kept; i < (b + 1) * rope.num_kept; ++i) {
        const int64_t patch = rope.index_64 ? static_cast<const int64_t*>(rope.keep_idx)[i]
                                            : static_cast<const int32_t*>(rope.keep_idx)[i];
        STD_TORCH_CHECK(patch >= 0 && patch < limit, "keep_idx: expected values in [0, ", limit, "), found ", patch);
      }
    }
  } else if (kHostValues || (tokens.cu == nullptr && rope.grids == nullptr)) {
    for (int64_t i = 0; i < (tokens.cu || rope.grids ? tokens.sequences : int64_t{1}); ++i)
      STD_TORCH_CHECK(tokens.length(i) - num_prefix <= patches(i), "rope: sequence ", i, " has ",
                      tokens.length(i) - num_prefix, " tokens after the prefix, the table has ", patches(i),
                      " patches");
  }
  return rope;
}

}  // namespace eva02
