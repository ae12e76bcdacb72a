// gather_tokens: out[m] = x[index[m]], zero where index[m] < 0; backward dx[r] = sum of dout[m] with index[m] == r.
// scatter_tokens is the same pair the other way round: its forward is this backward.
// Fused     index arithmetic, gather, zero fill of padding (eager: an expanded index and a gather)
// Bytes     forward moves 2n elements (n = selected); backward reads n and writes every row of dx once
// Launch    parallel over output rows, at least 16 Ki elements a thread
// Numerics  forward exact; backward sums duplicates in float32 in index order, one rounding
// Limits    last dim contiguous; any batch and token stride
// Source    original
#include "common/rows.h"
#include "gather_tokens/gather_tokens.h"

namespace eva02::EVA02_ISA {
namespace {

template <class T>
void gather_tokens_fwd(const GatherTokensFwdParams& p, const Runtime& runtime) {
  const size_t bytes = static_cast<size_t>(p.C) * sizeof(T);
  runtime.parallel_for(0, p.index.count, row_grain(p.C), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      T* out = static_cast<T*>(p.out) + m * p.out_stride;
      const int64_t row = p.index[m];
      if (row < 0)
        memset(out, 0, bytes);
      else
        memcpy(out, static_cast<const T*>(p.x) + row / p.seqlen * p.x_batch_stride + row % p.seqlen * p.x_token_stride,
               bytes);
    }
  });
}

template <class T>
void gather_tokens_bwd(const GatherTokensBwdParams& p, const Runtime& runtime) {
  const size_t bytes = static_cast<size_t>(p.C) * sizeof(T);
  const int64_t rows = p.batch * p.seqlen;
  const T* dout = static_cast<const T*>(p.dout);
  runtime.parallel_for(0, rows, row_grain(p.C), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* dx = static_cast<T*>(p.dx) + row / p.seqlen * p.dx_batch_stride + row % p.seqlen * p.dx_token_stride;
      const int32_t* entries = p.inverse.entries + p.inverse.offsets[row];
      const int64_t count = p.inverse.offsets[row + 1] - p.inverse.offsets[row];
      if (count == 0)
        memset(dx, 0, bytes);
      else if (count == 1)
        memcpy(dx, dout + entries[0] * p.dout_stride, bytes);
      else
        columns(p.C, [&](int64_t i, auto part, int) EVA02_ALWAYS_INLINE {
          vf sum = ld(dout + entries[0] * p.dout_stride + i, part);
          for (int64_t k = 1; k < count; ++k) sum = sum + ld(dout + entries[k] * p.dout_stride + i, part);
          st(dx + i, sum, part);
        });
    }
  });
}

}  // namespace

void run_gather_tokens_fwd(const GatherTokensFwdParams& p, const Runtime& runtime) {
  switch (p.dtype) {
    case DType::f32: return gather_tokens_fwd<float>(p, runtime);
    case DType::bf16: return gather_tokens_fwd<bf16>(p, runtime);
    case DType::f16: return gather_tokens_fwd<f16>(p, runtime);
  }
}

void run_gather_tokens_bwd(const GatherTokensBwdParams& p, const Runtime& runtime) {
  switch (p.dtype) {
    case DType::f32: return gather_tokens_bwd<float>(p, runtime);
    case DType::bf16: return gather_tokens_bwd<bf16>(p, runtime);
    case DType::f16: return gather_tokens_bwd<f16>(p, runtime);
  }
}

}  // namespace eva02::EVA02_ISA
