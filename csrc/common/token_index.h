// Which tokens an operator picks, as the launchers see them.
#pragma once

#include "common/dtype.h"

namespace eva02 {

struct TokenIndex {
  const void* data = nullptr;  // nullptr: entry m is row m
  int64_t count = 0;
  bool wide = true;  // int64, else int32
  // Entries number the rows of all sequences together; or with per_sequence > 0 the tokens of their own sequence, which
  // has that many entries and seqlen tokens.
  int64_t per_sequence = 0, seqlen = 0;
  int64_t limit = 0;  // an entry outside [0, limit) is padding

  // The row of the flattened (sequences * seqlen) tokens that entry m names, -1 for padding.
  EVA02_KERNEL_INLINE int64_t operator[](int64_t m) const {
    if (data == nullptr) return m;
    const int64_t entry = wide ? static_cast<const int64_t*>(data)[m] : static_cast<const int32_t*>(data)[m];
    if (entry < 0 || entry >= limit) return -1;
    return per_sequence > 0 ? m / per_sequence * seqlen + entry : entry;
  }
};

// For each row, which entries of an index name it, in increasing order: row r is named by entries[offsets[r]] ...
// entries[offsets[r + 1] - 1]. Turns a scatter with duplicates into a gather with sums in a fixed order.
struct InverseTokenIndex {
  const int32_t *entries = nullptr, *offsets = nullptr;
};

}  // namespace eva02
