// Token indices as the launchers take them. For *_registration.cpp alone.
#pragma once

#include <vector>

#include "common/token_index.h"
#include "common/torch_adapter.h"

namespace eva02 {

// idx is (batch, K) with tokens of its own sample, or flat (M,) with values b * seqlen + s, int32 or int64, contiguous;
// negative means padding. On the CPU a value too large is an error; on a GPU, where it cannot be seen, padding.
inline TokenIndex token_index(const OptTensor& idx, int64_t batch, int64_t seqlen, const char* name) {
  using torch::headeronly::ScalarType;
  if (!idx.has_value()) return {};
  const bool wide = idx->scalar_type() == ScalarType::Long, flat = idx->dim() == 1;
  STD_TORCH_CHECK(wide || idx->scalar_type() == ScalarType::Int, name, ": expected int32 or int64");
  STD_TORCH_CHECK(flat || (idx->dim() == 2 && idx->size(0) == batch), name, ": expected (", batch, ", K) or (M,)");
  STD_TORCH_CHECK(idx->is_contiguous(), name, ": expected a contiguous tensor");
  static const int64_t nothing = -1;  // an index without entries is still one
  TokenIndex index{.data = idx->numel() == 0 ? &nothing : idx->data_ptr(),
                   .count = idx->numel(),
                   .wide = wide,
                   .per_sequence = flat ? 0 : idx->size(1),
                   .seqlen = seqlen,
                   .limit = flat ? batch * seqlen : seqlen};
  for (int64_t i = 0; kHostValues && i < index.count; ++i) {
    const int64_t value =
        wide ? static_cast<const int64_t*>(index.data)[i] : static_cast<const int32_t*>(index.data)[i];
    STD_TORCH_CHECK(value < index.limit, name, ": expected values below ", index.limit, ", found ", value,
                    " at position ", i);
  }
  return index;
}

// entries (count,) and offsets (rows + 1,) int32, as inverse_token_index fills them.
inline InverseTokenIndex inverse_of(const OptTensor& entries, const OptTensor& offsets) {
  return {.entries = ptr_as<const int32_t>(entries), .offsets = ptr_as<const int32_t>(offsets)};
}

}  // namespace eva02
