// For each source row, which entries of an index name it, in increasing order: turns a scatter with duplicates into a
// gather, so that every row is written once and sums have a fixed order.
#pragma once

#include "common/rows.h"

namespace eva02::EVA02_ISA {

struct InverseIndex {
  int64_t *offsets, *entries;  // row r is named by entries[offsets[r]] ... entries[offsets[r + 1] - 1]

  InverseIndex(const int64_t* index, int64_t count, int64_t rows)
      : offsets(static_cast<int64_t*>(calloc(static_cast<size_t>(rows + 2), sizeof(int64_t)))),
        entries(static_cast<int64_t*>(malloc(static_cast<size_t>(count + 1) * sizeof(int64_t)))) {
    if (offsets == nullptr || entries == nullptr) abort();
    // Counting two places ahead leaves offsets[r + 1] as row r's next free entry while the entries are laid out.
    for (int64_t m = 0; m < count; ++m)
      if (index[m] >= 0) ++offsets[index[m] + 2];
    for (int64_t r = 0; r < rows; ++r) offsets[r + 2] += offsets[r + 1];
    for (int64_t m = 0; m < count; ++m)
      if (index[m] >= 0) entries[offsets[index[m] + 1]++] = m;
  }
  ~InverseIndex() {
    free(offsets);
    free(entries);
  }
  InverseIndex(const InverseIndex&) = delete;
  InverseIndex& operator=(const InverseIndex&) = delete;
};

}  // namespace eva02::EVA02_ISA
