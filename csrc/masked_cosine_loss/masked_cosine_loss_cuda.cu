// masked_cosine_loss: -mean over selected rows of cos(pred[m], target[index[m]]); 0 where no row is selected
// Fused     gather of the target rows, both norms, dot product, mean (eager: 6 kernels); each backward in one pass
// Bytes     forward reads 2n elements; backward reads 2n and writes n for dpred, and the same for dtarget; 12 bytes a
//           row
// Launch    forward a CTA for a row, then one CTA for the mean; backward one CTA for its scale, then a thread for 8
//           columns of a row of each gradient
// Numerics  float32 inside, the mean over rows in float64; norms are clamped from below by 1e-8, and a clamped norm is
//           a constant (its derivative is zero)
// Limits    last dim contiguous, up to 8192; any row stride; target rows may repeat (their gradients are summed in
// index
//           order); an index out of range leaves the row out
// Source    original; the feature distillation loss of EVA-02, arXiv:2303.11331
#include "common/rows.cuh"
#include "masked_cosine_loss/masked_cosine_loss.h"

namespace eva02::cuda {
namespace {

constexpr float kEps = 1e-8f, kClamped = 1.f / kEps;
constexpr int kOneCta = 512;

template <class T, int W>
__global__ void __launch_bounds__(kMaxRowThreads) fwd_kernel(const __grid_constant__ MaskedCosineLossFwdParams p) {
  const int D = static_cast<int>(p.D);
#pragma unroll 1
  for (int64_t m = blockIdx.x; m < p.M; m += gridDim.x) {
    const int64_t row = p.index[m];  // the same for the whole CTA
    float inv_x = 0.f, inv_t = 0.f, cosine = 0.f;
    if (row >= 0) {
      float x[kItems], t[kItems], sums[3] = {};
      load_row<W>(static_cast<const T*>(p.pred) + m * p.pred_stride, D, x);
      load_row<W>(static_cast<const T*>(p.target) + row * p.target_stride, D, t);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        sums[0] += x[i] * x[i];
        sums[1] += t[i] * t[i];
        sums[2] += x[i] * t[i];
      }
      block_sum(sums);
      const float norm_x = sqrtf(sums[0]), norm_t = sqrtf(sums[1]);
      inv_x = norm_x < kEps ? kClamped : 1.f / norm_x;  // a NaN norm stays NaN
      inv_t = norm_t < kEps ? kClamped : 1.f / norm_t;
      cosine = sums[2] * inv_x * inv_t;
    }
    if (threadIdx.x == 0) {
      p.stats[m] = inv_x;
      p.stats[p.M + m] = inv_t;
      p.stats[2 * p.M + m] = cosine;
    }
  }
}

// Sums of one CTA of kOneCta threads: of values, or with nullptr zero, and the number of selected rows.
struct Total {
  double sum;
  int64_t count;
};
__device__ Total total_of(const TokenIndex& index, int64_t M, const float* values) {
  __shared__ double sums[kOneCta];
  __shared__ int64_t counts[kOneCta];
  double sum = 0.;
  int64_t count = 0;
  for (int64_t m = threadIdx.x; m < M; m += kOneCta) {
    if (values != nullptr) sum += values[m];
    count += index[m] >= 0;
  }
  sums[threadIdx.x] = sum;
  counts[threadIdx.x] = count;
  for (int half = kOneCta / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      sums[threadIdx.x] += sums[threadIdx.x + half];
      counts[threadIdx.x] += counts[threadIdx.x + half];
    }
  }
  __syncthreads();
  return {sums[0], counts[0]};
}

__global__ void __launch_bounds__(kOneCta, 1) mean_kernel(const __grid_constant__ MaskedCosineLossFwdParams p) {
  const Total total = total_of(p.index, p.M, p.stats + 2 * p.M);
  if (threadIdx.x == 0)
    *p.loss = total.count == 0 ? 0.f : static_cast<float>(-total.sum / static_cast<double>(total.count));
}

// d loss / d cos of a selected row.
__global__ void __launch_bounds__(kOneCta, 1)
    scale_kernel(const __grid_constant__ MaskedCosineLossBwdParams p, float* scale) {
  const Total total = total_of(p.index, p.M, nullptr);
  if (threadIdx.x == 0) *scale = total.count == 0 ? 0.f : -*p.dloss / static_cast<float>(total.count);
}

// d cos / d x = (t / |t| - cos * x / |x|) / |x|, without the second term where |x| is clamped.
struct Coefficients {
  float other, self;
};
__device__ Coefficients coefficients(float scale, float inv_self, float inv_other, float cosine) {
  return {scale * inv_self * inv_other, inv_self < kClamped ? -scale * cosine * inv_self * inv_self : 0.f};
}

template <class T, int W>
__global__ void __launch_bounds__(kPieceThreads)
    dpred_kernel(const __grid_constant__ MaskedCosineLossBwdParams p, const float* scale) {
  const RowPiece piece(p.M, p.D);
  if (piece.width <= 0) return;
  const int64_t m = piece.row, row = p.index[m];
  float d[kItems] = {};
  if (row >= 0) {
    const Coefficients c = coefficients(*scale, p.stats[m], p.stats[p.M + m], p.stats[2 * p.M + m]);
    float x[kItems];
    load_row<W>(static_cast<const T*>(p.pred) + m * p.pred_stride + piece.first, piece.width, x);
    load_row<W>(static_cast<const T*>(p.target) + row * p.target_stride + piece.first, piece.width, d);
#pragma unroll
    for (int i = 0; i < kItems; ++i) d[i] = c.other * d[i] + c.self * x[i];
  }
  store_row<W>(static_cast<T*>(p.dpred) + m * p.dpred_stride + piece.first, piece.width, d);
}

template <class T, int W>
__global__ void __launch_bounds__(kPieceThreads)
    dtarget_kernel(const __grid_constant__ MaskedCosineLossBwdParams p, const float* scale) {
  const RowPiece piece(p.T, p.D);
  if (piece.width <= 0) return;
  const bool indexed = p.index.data != nullptr;  // without an index, row m is named by m alone
  const int64_t begin = indexed ? p.inverse.offsets[piece.row] : piece.row;
  const int64_t end = indexed ? p.inverse.offsets[piece.row + 1] : piece.row + 1;
  float sum[kItems] = {}, self = 0.f, x[kItems];
  for (int64_t k = begin; k < end; ++k) {
    const int64_t m = indexed ? p.inverse.entries[k] : k;
    const Coefficients c = coefficients(*scale, p.stats[p.M + m], p.stats[m], p.stats[2 * p.M + m]);
    self += c.self;
    load_row<W>(static_cast<const T*>(p.pred) + m * p.pred_stride + piece.first, piece.width, x);
#pragma unroll
    for (int i = 0; i < kItems; ++i) sum[i] += c.other * x[i];
  }
  if (begin < end) {
    load_row<W>(static_cast<const T*>(p.target) + piece.row * p.target_stride + piece.first, piece.width, x);
#pragma unroll
    for (int i = 0; i < kItems; ++i) sum[i] += self * x[i];
  }
  store_row<W>(static_cast<T*>(p.dtarget) + piece.row * p.dtarget_stride + piece.first, piece.width, sum);
}

}  // namespace

const char* run_masked_cosine_loss_fwd(const MaskedCosineLossFwdParams& p, const Device& device) {
  if (p.D > kMaxColumns) return kRowTooWide;
  if (p.M > 0) {
    const int threads = row_threads(p.D > 0 ? p.D : 1), ctas = row_ctas(p.M, threads);
    const char* error = by_dtype(p.dtype, [&]<class T>() {
      PackWidth width(sizeof(T));
      width.rows(p.pred, p.pred_stride).rows(p.target, p.target_stride);
      return by_width<T>(width, [&]<int W>() {
        fwd_kernel<T, W><<<ctas, threads, 0, stream_of(device)>>>(p);
        return launch_error();
      });
    });
    if (error != nullptr) return error;
  }
  mean_kernel<<<1, kOneCta, 0, stream_of(device)>>>(p);
  return launch_error();
}

const char* run_masked_cosine_loss_bwd(const MaskedCosineLossBwdParams& p, const Device& device) {
  float* scale = workspace(device, 1);
  if (scale == nullptr) return kNoMemory;
  scale_kernel<<<1, kOneCta, 0, stream_of(device)>>>(p, scale);
  return by_dtype(p.dtype, [&]<class T>() {
    PackWidth width(sizeof(T));
    width.rows(p.pred, p.pred_stride).rows(p.target, p.target_stride);
    width.rows(p.dpred, p.dpred_stride).rows(p.dtarget, p.dtarget_stride);
    return by_width<T>(width, [&]<int W>() {
      if (p.dpred != nullptr && p.M > 0 && p.D > 0) {
        const PieceGrid grid(p.M, p.D);
        dpred_kernel<T, W><<<grid.ctas, grid.threads, 0, stream_of(device)>>>(p, scale);
      }
      if (p.dtarget != nullptr && p.T > 0 && p.D > 0) {
        const PieceGrid grid(p.T, p.D);
        dtarget_kernel<T, W><<<grid.ctas, grid.threads, 0, stream_of(device)>>>(p, scale);
      }
      return launch_error();
    });
  });
}

}  // namespace eva02::cuda
