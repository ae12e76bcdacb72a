// Sums of the partial sums that CTAs leave of a parameter's gradient, in a fixed order.
// Bytes     reads parts * C floats, writes C elements
// Launch    a CTA for 32 columns, its 8 warps each a contiguous share of the parts
// Numerics  float32; one rounding at the store
#include "common/rows.cuh"

namespace eva02::cuda {
namespace {

__global__ void __launch_bounds__(256)
    column_sums_kernel(const float* partials, int parts, int64_t stride, int C, ParamGrad out) {
  __shared__ float share[8][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = blockIdx.x * 32 + lane;
  const int per_warp = ceil_div(parts, 8), begin = warp * per_warp, end = min(parts, begin + per_warp);
  float sum = 0.f;
  if (c < C)
    for (int part = begin; part < end; ++part) sum += partials[part * stride + c];
  share[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || c >= C) return;
#pragma unroll
  for (int w = 1; w < 8; ++w) sum += share[w][lane];
  store_param(out, c, sum);
}

}  // namespace

void sum_columns(const ParamGrad& out, const float* partials, int parts, int64_t stride, int64_t C,
                 const Device& device) {
  if (out.data == nullptr || C == 0) return;
  const auto ctas = static_cast<unsigned>(ceil_div<int64_t>(C, 32));
  column_sums_kernel<<<ctas, 256, 0, stream_of(device)>>>(partials, parts, stride, static_cast<int>(C), out);
}

}  // namespace eva02::cuda
