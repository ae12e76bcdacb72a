// Token indices as the launchers take them: one int64 row of the flattened (batch * seqlen) tokens each, -1 for
// padding. For *_registration.cpp alone.
#pragma once

#include <vector>

#include "common/torch_adapter.h"

namespace eva02 {

inline std::vector<int64_t> read_indices(const Tensor& idx, const char* name) {
  using torch::headeronly::ScalarType;
  const bool wide = idx.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || idx.scalar_type() == ScalarType::Int, name, ": expected int32 or int64");
  STD_TORCH_CHECK(idx.dim() == 1 || idx.dim() == 2, name, ": expected 1 or 2 dims, found ", idx.dim());
  std::vector<int64_t> values(static_cast<size_t>(idx.numel()));
  if (values.empty()) return values;
  const int64_t outer = idx.dim() == 2 ? idx.size(0) : 1, inner = idx.size(idx.dim() - 1);
  const int64_t outer_stride = idx.dim() == 2 ? idx.stride(0) : 0, inner_stride = idx.stride(idx.dim() - 1);
  const void* data = idx.data_ptr();
  for (int64_t i = 0; i < outer; ++i)
    for (int64_t j = 0; j < inner; ++j) {
      const int64_t at = i * outer_stride + j * inner_stride;
      values[static_cast<size_t>(i * inner + j)] =
          wide ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
    }
  return values;
}

// idx is (batch, K) with tokens of its own sample, or flat (M,) with values b * seqlen + s; negative means padding.
inline std::vector<int64_t> token_rows(const Tensor& idx, int64_t batch, int64_t seqlen, const char* name) {
  std::vector<int64_t> rows = read_indices(idx, name);
  const bool flat = idx.dim() == 1;
  STD_TORCH_CHECK(flat || idx.size(0) == batch, name, ": expected ", batch, " rows, found ", idx.size(0));
  const int64_t limit = flat ? batch * seqlen : seqlen, K = flat ? 0 : idx.size(1);
  for (size_t i = 0; i < rows.size(); ++i) {
    STD_TORCH_CHECK(rows[i] < limit, name, ": expected values below ", limit, ", found ", rows[i], " at position ", i);
    if (rows[i] < 0)
      rows[i] = -1;
    else if (!flat)
      rows[i] += static_cast<int64_t>(i) / K * seqlen;
  }
  return rows;
}

}  // namespace eva02
