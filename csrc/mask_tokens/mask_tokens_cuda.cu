// mask_tokens: out[b, n] = t + pos_embed[n], t the prefix token n, the mask token, or the patch itself
// Fused     mask blend, prefix concatenation, position add (eager: 4 kernels, 9n elements moved); backward in one pass,
//           the mask token's gradient as one partial sum for each position, which a second kernel adds
// Bytes     forward reads the unmasked patches and writes n elements; backward reads n and writes the patches'
// gradient;
//           parameters and their partial sums are 1/batch of n
// Launch    forward a thread for 8 columns of a token; backward a thread for 8 columns of a position in all samples
// Numerics  float32 inside, one rounding at the store
// Limits    last dim contiguous; any batch and token stride
// Source    original; the masked image modelling input of EVA-02, arXiv:2303.11331
#include "common/rows.cuh"
#include "mask_tokens/mask_tokens.h"

namespace eva02::cuda {
namespace {

template <class Params>
__device__ bool is_masked(const Params& p, int64_t b, int64_t patch) {
  return patch >= 0 && p.mask != nullptr && p.mask[b * p.mask_batch_stride + patch * p.mask_token_stride];
}

template <class T, int W>
__global__ void __launch_bounds__(kPieceThreads) fwd_kernel(const __grid_constant__ MaskTokensFwdParams p) {
  const int64_t N = p.num_prefix + p.P;
  const RowPiece piece(p.batch * N, p.C);
  if (piece.width <= 0) return;
  const int64_t b = piece.row / N, n = piece.row % N, patch = n - p.num_prefix;
  float v[kItems], pos[kItems];
  if (patch < 0)
    load_param<W>(part_of(p.prefix_tokens, n * p.C + piece.first), piece.width, v, 0.f);
  else if (is_masked(p, b, patch))
    load_param<W>(part_of(p.mask_token, piece.first), piece.width, v, 0.f);
  else
    load_row<W>(
        static_cast<const T*>(p.patches) + b * p.patches_batch_stride + patch * p.patches_token_stride + piece.first,
        piece.width, v);
  load_param<W>(part_of(p.pos_embed, n * p.C + piece.first), piece.width, pos, 0.f);
#pragma unroll
  for (int i = 0; i < kItems; ++i) v[i] += pos[i];
  store_row<W>(static_cast<T*>(p.out) + b * p.out_batch_stride + n * p.out_token_stride + piece.first, piece.width, v);
}

template <class T, int W>
__global__ void __launch_bounds__(kPieceThreads)
    bwd_kernel(const __grid_constant__ MaskTokensBwdParams p, float* partials) {
  const RowPiece piece(p.num_prefix + p.P, p.C);
  if (piece.width <= 0) return;
  const int64_t n = piece.row, patch = n - p.num_prefix;
  float position[kItems] = {}, token[kItems] = {};
  for (int64_t b = 0; b < p.batch; ++b) {
    const bool masked = is_masked(p, b, patch);
    float d[kItems];
    load_row<W>(static_cast<const T*>(p.dout) + b * p.dout_batch_stride + n * p.dout_token_stride + piece.first,
                piece.width, d);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      position[i] += d[i];
      if (masked) {
        token[i] += d[i];
        d[i] = 0.f;
      }
    }
    if (patch >= 0 && p.dpatches != nullptr)
      store_row<W>(
          static_cast<T*>(p.dpatches) + b * p.dpatches_batch_stride + patch * p.dpatches_token_stride + piece.first,
          piece.width, d);
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int c = column_of<W>(i);
    if (c >= piece.width) continue;
    const int64_t at = n * p.C + piece.first + c;
    if (p.dpos_embed.data != nullptr) store_param(p.dpos_embed, at, position[i]);
    if (patch < 0 && p.dprefix_tokens.data != nullptr) store_param(p.dprefix_tokens, at, position[i]);
    if (partials != nullptr) partials[at] = token[i];
  }
}

}  // namespace

const char* run_mask_tokens_fwd(const MaskTokensFwdParams& p, const Device& device) {
  const int64_t rows = p.batch * (p.num_prefix + p.P);
  if (rows == 0 || p.C == 0) return nullptr;
  const PieceGrid grid(rows, p.C);
  return by_dtype(p.dtype, [&]<class T>() {
    PackWidth width(sizeof(T));
    width.rows(p.patches, p.patches_batch_stride, p.patches_token_stride);
    width.rows(p.out, p.out_batch_stride, p.out_token_stride);
    return by_width<T>(width, [&]<int W>() {
      fwd_kernel<T, W><<<grid.ctas, grid.threads, 0, stream_of(device)>>>(p);
      return launch_error();
    });
  });
}

const char* run_mask_tokens_bwd(const MaskTokensBwdParams& p, const Device& device) {
  const int64_t positions = p.num_prefix + p.P;
  if (p.C == 0) return nullptr;
  float* partials = nullptr;
  if (p.dmask_token.data != nullptr && positions > 0 && (partials = workspace(device, positions * p.C)) == nullptr)
    return kNoMemory;
  if (positions > 0) {
    const PieceGrid grid(positions, p.C);
    const char* error = by_dtype(p.dtype, [&]<class T>() {
      PackWidth width(sizeof(T));
      width.rows(p.dout, p.dout_batch_stride, p.dout_token_stride);
      width.rows(p.dpatches, p.dpatches_batch_stride, p.dpatches_token_stride);
      return by_width<T>(width, [&]<int W>() {
        bwd_kernel<T, W><<<grid.ctas, grid.threads, 0, stream_of(device)>>>(p, partials);
        return launch_error();
      });
    });
    if (error != nullptr) return error;
  }
  sum_columns(p.dmask_token, partials, static_cast<int>(positions), p.C, p.C, device);
  return launch_error();
}

}  // namespace eva02::cuda
