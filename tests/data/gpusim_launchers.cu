// Host launchers as operators have them: C functions of raw pointers, sizes, strides, workspace and stream, which give
// the CUDA runtime's error.
#include <cuda_runtime.h>

namespace {

__global__ void row_sums(const float* x, float* sums, int columns, long stride, int beyond) {
  extern __shared__ float partial[];
  const float* row = x + blockIdx.x * stride;
  float sum = 0;
  for (int i = threadIdx.x; i < columns + beyond; i += blockDim.x) sum += row[i];  // <- beyond
  partial[threadIdx.x] = sum;
  __syncthreads();
  for (int n = blockDim.x / 2; n > 0; n /= 2) {
    if (threadIdx.x < n) partial[threadIdx.x] += partial[threadIdx.x + n];
    __syncthreads();
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = partial[0];
}

__global__ void divide(const float* x, const float* sums, float* out, int columns, long stride) {
  for (int i = threadIdx.x; i < columns; i += blockDim.x)
    out[blockIdx.x * columns + i] = x[blockIdx.x * stride + i] / sums[blockIdx.x];  // <- unread
}

__global__ void racy(float* out) {
  __shared__ float last;
  last = threadIdx.x;  // <- race
  __syncthreads();
  out[threadIdx.x] = last;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int normalise(const float* x, float* out, float* workspace, long rows,
                                                                int columns, long stride, int mode, void* stream) {
  cudaStream_t on = static_cast<cudaStream_t>(stream);
  int device = -1, most = 0;
  cudaStreamCaptureStatus capturing;
  if (cudaGetDevice(&device) != cudaSuccess || cudaStreamIsCapturing(on, &capturing) != cudaSuccess) return -1;
  if (cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return -2;
  const size_t shared = mode == 2 ? static_cast<size_t>(most) : 128 * sizeof(float);
  if (mode == 2 && cudaFuncSetAttribute(row_sums, cudaFuncAttributeMaxDynamicSharedMemorySize, most) != cudaSuccess)
    return -3;
  const unsigned threads = mode == 3 ? 2048 : 128;
  if (mode != 4) row_sums<<<static_cast<unsigned>(rows), threads, shared, on>>>(x, workspace, columns, stride, mode == 1);
  if (cudaPeekAtLastError() != cudaSuccess) return cudaGetLastError();
  divide<<<static_cast<unsigned>(mode == 5 ? rows - 1 : rows), 128, 0, on>>>(x, workspace, out, columns, stride);
  return cudaGetLastError();
}

extern "C" __attribute__((visibility("default"))) int race(float* out, void* stream) {
  racy<<<1, 64, 0, static_cast<cudaStream_t>(stream)>>>(out);
  return cudaGetLastError();
}
