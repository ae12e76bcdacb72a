// gather_tokens: out[m] = x[index[m]], zero where index[m] < 0; backward dx[r] = sum of dout[m] with index[m] == r.
// scatter_tokens is the same pair the other way round: its forward is this backward.
// Fused     index arithmetic, gather, zero fill of padding (eager: an expanded index and a gather)
// Bytes     forward moves 2n elements (n = selected); backward reads n and writes every row of dx once
// Launch    a thread for 8 columns of an output row, CTAs of 256 threads over rows and columns
// Numerics  forward exact; backward sums duplicates in float32 in index order, one rounding
// Limits    last dim contiguous; any batch and token stride; an index out of range is padding
// Source    original
#include "common/rows.cuh"
#include "gather_tokens/gather_tokens.h"

namespace eva02::cuda {
namespace {

template <class T, int W>
__global__ void __launch_bounds__(kPieceThreads) fwd_kernel(const __grid_constant__ GatherTokensFwdParams p) {
  const RowPiece piece(p.index.count, p.C);
  if (piece.width <= 0) return;
  const int64_t row = p.index[piece.row];
  float v[kItems] = {};
  if (row >= 0) {
    const T* x = static_cast<const T*>(p.x) + row / p.seqlen * p.x_batch_stride + row % p.seqlen * p.x_token_stride;
    load_row<W>(x + piece.first, piece.width, v);
  }
  store_row<W>(static_cast<T*>(p.out) + piece.row * p.out_stride + piece.first, piece.width, v);
}

template <class T, int W>
__global__ void __launch_bounds__(kPieceThreads) bwd_kernel(const __grid_constant__ GatherTokensBwdParams p) {
  const RowPiece piece(p.batch * p.seqlen, p.C);
  if (piece.width <= 0) return;
  float sum[kItems];
  sum_of_run<W>(p.inverse, piece.row, static_cast<const T*>(p.dout) + piece.first, p.dout_stride, piece.width, sum);
  const int64_t b = piece.row / p.seqlen, s = piece.row % p.seqlen;
  T* dx = static_cast<T*>(p.dx) + b * p.dx_batch_stride + s * p.dx_token_stride;
  store_row<W>(dx + piece.first, piece.width, sum);
}

}  // namespace

const char* run_gather_tokens_fwd(const GatherTokensFwdParams& p, const Device& device) {
  if (p.index.count == 0 || p.C == 0) return nullptr;
  const PieceGrid grid(p.index.count, p.C);
  return by_dtype(p.dtype, [&]<class T>() {
    PackWidth width(sizeof(T));
    width.rows(p.x, p.x_batch_stride, p.x_token_stride).rows(p.out, p.out_stride);
    return by_width<T>(width, [&]<int W>() {
      fwd_kernel<T, W><<<grid.ctas, grid.threads, 0, stream_of(device)>>>(p);
      return launch_error();
    });
  });
}

const char* run_gather_tokens_bwd(const GatherTokensBwdParams& p, const Device& device) {
  const int64_t rows = p.batch * p.seqlen;
  if (rows == 0 || p.C == 0) return nullptr;
  const PieceGrid grid(rows, p.C);
  return by_dtype(p.dtype, [&]<class T>() {
    PackWidth width(sizeof(T));
    width.rows(p.dout, p.dout_stride).rows(p.dx, p.dx_batch_stride, p.dx_token_stride);
    return by_width<T>(width, [&]<int W>() {
      bwd_kernel<T, W><<<grid.ctas, grid.threads, 0, stream_of(device)>>>(p);
      return launch_error();
    });
  });
}

}  // namespace eva02::cuda
