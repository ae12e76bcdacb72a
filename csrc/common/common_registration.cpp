// The library itself: which instruction sets it can run here, and (for tests) which it is told to use; the memory that
// it keeps.
#include "common/token_rows.h"

namespace eva02 {
namespace {

int64_t cpu_isa_get() { return static_cast<int64_t>(cpu_isa()); }

void cpu_isa_set(int64_t isa) {
  STD_TORCH_CHECK(isa >= 0 && isa <= 2 && cpu_has(static_cast<Isa>(isa)),
                  "cpu_isa: this CPU or this build lacks the instruction set asked for");
  set_cpu_isa(static_cast<Isa>(isa));
}

int64_t keep_workspaces_of(int64_t bytes) {
  STD_TORCH_CHECK(bytes >= 0, "bytes: expected at least 0");
  return static_cast<int64_t>(keep_workspaces(static_cast<size_t>(bytes)));
}

// Fills entries (count,) and offsets (batch * seqlen + 1,) int32 as InverseTokenIndex has them; entries that are not
// filled, as many as idx has padding, are at the end.
void inverse_token_index(Tensor idx, int64_t batch, int64_t seqlen, Tensor entries, Tensor offsets) {
  const TokenIndex index = token_index(idx, batch, seqlen, "idx");
  const int64_t rows = batch * seqlen;
  int32_t *entry = static_cast<int32_t*>(entries.data_ptr()), *offset = static_cast<int32_t*>(offsets.data_ptr());
  // Counting two places ahead leaves next[r + 1] as row r's next free entry while the entries are laid out.
  std::vector<int32_t> next(static_cast<size_t>(rows + 2));
  for (int64_t m = 0; m < index.count; ++m)
    if (index[m] >= 0) ++next[static_cast<size_t>(index[m] + 2)];
  for (size_t r = 0; r < static_cast<size_t>(rows); ++r) next[r + 2] += next[r + 1];
  for (int64_t m = 0; m < index.count; ++m)
    if (index[m] >= 0) entry[next[static_cast<size_t>(index[m] + 1)]++] = static_cast<int32_t>(m);
  for (int64_t r = 0; r <= rows; ++r) offset[r] = next[static_cast<size_t>(r)];
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eva02_kernels_C, m) {
  m.def("cpu_isa_get() -> int");
  m.def("cpu_isa_set(int isa) -> ()");
  m.def("release_workspaces() -> ()");
  m.def("keep_workspaces(int bytes) -> int");
  m.def("fill_workspaces_with_nan(bool fill) -> bool");
  m.def("inverse_token_index_cpu(Tensor idx, int batch, int seqlen, Tensor(a!) entries, Tensor(b!) offsets) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(eva02_kernels_C, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa_get", TORCH_BOX(&cpu_isa_get));
  m.impl("cpu_isa_set", TORCH_BOX(&cpu_isa_set));
  m.impl("release_workspaces", TORCH_BOX(&release_workspaces));
  m.impl("keep_workspaces", TORCH_BOX(&keep_workspaces_of));
  m.impl("fill_workspaces_with_nan", TORCH_BOX(&fill_workspaces_with_nan));
}

STABLE_TORCH_LIBRARY_IMPL(eva02_kernels_C, CPU, m) {
  m.impl("inverse_token_index_cpu", TORCH_BOX(&inverse_token_index));
}

}  // namespace eva02
