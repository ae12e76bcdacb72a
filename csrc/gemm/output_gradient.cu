// Around the products of backward: the gradient of a projection's output without its scales, and what the layer scale,
// the bias and the weight get from the weight's unscaled gradient
// Fused     both scales and the bias's column sums in one pass over rows; what centred columns lack, layer scale,
//           rounding and the layer scale's own gradient in one pass over the weight's
// Bytes     scale_and_sum reads its rows once and writes what is wanted once; partial sums are a float for 16 rows of a
//           column, or fewer
// Launch    scale_and_sum 8 columns a thread, rows in turn; finish_gradients a CTA for a row of the weight
// Numerics  float32 inside, sums in a fixed order
// Limits    last dims contiguous, any row stride
// Source    original
#include "gemm/product.cuh"

namespace eva02::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kPieceThreads)
    scale_and_sum_kernel(const __grid_constant__ ScaleAndSumParams p, float* partials) {
  const int64_t part = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int column = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * kColumns;
  const int n = static_cast<int>(p.N) - column;
  if (n <= 0) return;
  float scale[kColumns], sums[kColumns] = {};
  load_columns(p.layer_scale, column, n, 1.f, scale);
  for (int64_t row = part; row < p.rows; row += gridDim.x * blockDim.y) {
    const float row_scale = p.row_scale == nullptr ? 1.f : p.row_scale[row / p.rows_per_sample];
    float x[kColumns];
    load_columns(static_cast<const T*>(p.x) + row * p.x_stride + column, n, x);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sums[i] += x[i] *= row_scale;
    if (p.row_scaled != nullptr)
      store_columns(static_cast<T*>(p.row_scaled) + row * p.row_scaled_stride + column, n, x);
    if (p.scaled == nullptr) continue;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) x[i] *= scale[i];
    store_columns(static_cast<T*>(p.scaled) + row * p.scaled_stride + column, n, x);
  }
  if (partials != nullptr) store_columns(partials + part * p.N + column, n, sums);
}

constexpr int kScaleThreads = 128;

template <class T>
__global__ void __launch_bounds__(kScaleThreads)
    finish_gradients_kernel(const __grid_constant__ FinishGradientsParams p) {
  const int64_t row = blockIdx.x;
  const auto value = [row](const Param& param, float absent) {
    if (param.data == nullptr) return absent;
    switch (param.dtype) {
      case DType::bf16: return to_float(static_cast<const bf16*>(param.data)[row]);
      case DType::f16: return to_float(static_cast<const f16*>(param.data)[row]);
      default: return static_cast<const float*>(param.data)[row];
    }
  };
  const float scale = value(p.layer_scale, 1.f), sum = p.sums == nullptr ? 0.f : p.sums[row];
  const bool wants_scale = p.dlayer_scale.data != nullptr;
  float dscale = 0.f;
  if (p.product != nullptr) {
    for (int64_t k = threadIdx.x; k < p.K; k += kScaleThreads) {
      float g = p.product[row * p.K + k];
      if (p.centre != nullptr) g += sum * p.centre[k];
      if (wants_scale) dscale += g * to_float(static_cast<const T*>(p.weight)[row * p.weight_stride + k]);
      if (p.dweight != nullptr) static_cast<T*>(p.dweight)[row * p.K + k] = from_float<T>(g * scale);
    }
    if (wants_scale) dscale = block_sum(dscale);
  }
  if (threadIdx.x != 0) return;
  if (p.dbias.data != nullptr) store_param(p.dbias, row, sum * scale);
  if (!wants_scale) return;
  dscale += sum * value(p.bias, 0.f);
  store_param(p.dlayer_scale, row, dscale);
}

}  // namespace

const char* run_scale_and_sum(const ScaleAndSumParams& p, const Device& device) {
  if (p.N == 0) return nullptr;
  int64_t parts = 0;
  float* partials = nullptr;
  if (p.rows > 0) {
    PieceGrid grid(p.rows, p.N);
    const int64_t few = ceil_div<int64_t>(p.rows, 16 * grid.threads.y), resident = 8 * num_sms();
    grid.ctas.x = static_cast<unsigned>(few < resident ? few : resident);
    parts = static_cast<int64_t>(grid.ctas.x) * grid.threads.y;
    if (p.sums.data != nullptr && (partials = workspace(device, parts * p.N)) == nullptr) return kNoMemory;
    const char* error = by_dtype(p.dtype, [&]<class T>() {
      scale_and_sum_kernel<T><<<grid.ctas, grid.threads, 0, stream_of(device)>>>(p, partials);
      return launch_error();
    });
    if (error != nullptr) return error;
  }
  sum_columns(p.sums, partials, static_cast<int>(parts), p.N, p.N, device);
  return launch_error();
}

const char* run_finish_gradients(const FinishGradientsParams& p, const Device& device) {
  if (p.N == 0) return nullptr;
  return by_dtype(p.dtype, [&]<class T>() {
    finish_gradients_kernel<T><<<static_cast<unsigned>(p.N), kScaleThreads, 0, stream_of(device)>>>(p);
    return launch_error();
  });
}

}  // namespace eva02::cuda
