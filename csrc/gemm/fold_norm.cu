// fold_norm: what the product behind a LayerNorm needs to take it in (ProjectNormedParams): the statistics of rows from
// those of their pieces, and the product's weight times the norm's
// Fused     all of it in one launch (without it: the norm's pass over the hidden layer, which reads and writes it)
// Bytes     reads the pieces, 8 bytes for 32 columns of a row, and the weight once
// Launch    a CTA for 32 rows, whose 8 warps each take a share of the pieces, then a warp for a row of the weight
// Numerics  float32; the variance from the pieces' squares about their means and from these means about their mean, so
//           that nothing cancels
// Limits    last dims contiguous
// Source    original; Chan, Golub, LeVeque: Updating Formulae and a Pairwise Algorithm for Computing Sample Variances
#include "gemm/product.cuh"

namespace eva02::cuda {
namespace {

constexpr int kFoldThreads = 256, kFoldWarps = kFoldThreads / 32;

// Sum over the CTA's warps of what lanes of one number hold, in the order of the warps, in each of them.
__device__ float sum_over_warps(float x) {
  __shared__ float share[kFoldWarps][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  share[warp][lane] = x;
  __syncthreads();
  x = 0.f;
#pragma unroll
  for (int w = 0; w < kFoldWarps; ++w) x += share[w][lane];
  __syncthreads();  // the next sum may write again
  return x;
}

__device__ void row_statistics_of_pieces(const FoldNormParams& p, int64_t row) {
  const int F = static_cast<int>(p.F), pieces = ceil_div(F, kNormPiece), share = ceil_div(pieces, kFoldWarps);
  const int begin = static_cast<int>(threadIdx.x) / 32 * share, end = min(begin + share, pieces);
  const auto* piece = reinterpret_cast<const float2*>(p.pieces) + row;
  const auto columns = [F](int i) { return static_cast<float>(min(kNormPiece, F - i * kNormPiece)); };
  const bool there = row < p.rows;
  float sum = 0.f, squares = 0.f;
  for (int i = begin; there && i < end; ++i) sum += columns(i) * piece[i * p.rows].x;
  const float mean = sum_over_warps(sum) / static_cast<float>(F);
  for (int i = begin; there && i < end; ++i) {
    const float2 of = piece[i * p.rows];
    squares += of.y + columns(i) * (of.x - mean) * (of.x - mean);
  }
  squares = sum_over_warps(squares);
  if (!there || threadIdx.x >= 32) return;
  p.mean[row] = mean;
  p.rstd[row] = 1.f / sqrtf(squares / static_cast<float>(F) + p.eps);
}

template <class T>
__global__ void __launch_bounds__(kFoldThreads) fold_norm_kernel(const __grid_constant__ FoldNormParams p) {
  const int64_t row_ctas = ceil_div<int64_t>(p.rows, 32), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (blockIdx.x < row_ctas) return row_statistics_of_pieces(p, blockIdx.x * int64_t{32} + lane);
  const int64_t row = (blockIdx.x - row_ctas) * kFoldWarps + warp;
  if (row >= p.N) return;
  float sum = 0.f, shift = 0.f;
  for (int64_t column = lane * kColumns; column < p.F; column += 32 * kColumns) {
    const int n = static_cast<int>(p.F - column);
    float w[kColumns], norm_weight[kColumns], norm_bias[kColumns];
    load_columns(static_cast<const T*>(p.weight) + row * p.weight_stride + column, n, w);
    load_columns(p.norm_weight, column, n, 1.f, norm_weight);
    load_columns(p.norm_bias, column, n, 0.f, norm_bias);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      sum += w[i] * norm_weight[i];
      shift += w[i] * norm_bias[i];
    }
  }
  sum = warp_sum(sum);
  shift = warp_sum(shift);
  if (lane != 0) return;
  p.weight_sums[row] = sum;
  float bias[kColumns];
  load_columns(p.bias, row, 1, 0.f, bias);
  p.shift[row] = shift + bias[0];
}

}  // namespace

const char* run_fold_norm(const FoldNormParams& p, const Device& device) {
  const int64_t ctas = ceil_div<int64_t>(p.rows, 32) + ceil_div<int64_t>(p.N, kFoldWarps);
  if (ctas == 0) return nullptr;
  return by_dtype(p.dtype, [&]<class T>() {
    fold_norm_kernel<T><<<static_cast<unsigned>(ctas), kFoldThreads, 0, stream_of(device)>>>(p);
    return launch_error();
  });
}

}  // namespace eva02::cuda
