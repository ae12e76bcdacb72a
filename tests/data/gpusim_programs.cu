// Programs for the simulator's stand-in of the CUDA runtime: CUB's primitives, cooperative groups, pipelines, calls, local
// memory and printf, with their host code. run(name) gives 0 where the result is right.
#include <cooperative_groups.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <cub/cub.cuh>
#include <cuda/barrier>
#include <cuda/pipeline>
#include <mma.h>
#include <numeric>
#include <vector>

namespace cg = cooperative_groups;

namespace {

template <class T>
struct Device {
  T* data = nullptr;
  size_t count;
  explicit Device(size_t count) : count(count) { cudaMalloc(&data, count * sizeof(T)); }
  explicit Device(const std::vector<T>& host) : Device(host.size()) {
    cudaMemcpy(data, host.data(), count * sizeof(T), cudaMemcpyHostToDevice);
  }
  ~Device() { cudaFree(data); }
  Device(const Device&) = delete;
  std::vector<T> host() const {
    std::vector<T> out(count);
    cudaMemcpy(out.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost);
    return out;
  }
};

std::vector<int> numbers(size_t n) {
  std::vector<int> out(n);
  unsigned state = 12345;
  for (int& v : out) v = static_cast<int>((state = state * 1664525u + 1013904223u) >> 8) % 1000 - 500;
  return out;
}

// ---- CUB
__global__ void block_primitives(const int* in, int* scanned, int* sorted, int* sums) {
  using Scan = cub::BlockScan<int, 128>;
  using Sort = cub::BlockRadixSort<int, 128, 1>;
  using Reduce = cub::BlockReduce<int, 128>;
  __shared__ union {
    typename Scan::TempStorage scan;
    typename Sort::TempStorage sort;
    typename Reduce::TempStorage reduce;
  } shared;
  const int i = blockIdx.x * 128 + threadIdx.x;
  int value = in[i], sum;
  Scan(shared.scan).InclusiveSum(value, sum);
  scanned[i] = sum;
  __syncthreads();
  const int total = Reduce(shared.reduce).Sum(value);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
  __syncthreads();
  int keys[1] = {value};
  Sort(shared.sort).Sort(keys);
  sorted[i] = keys[0];
}

int run_block_primitives() {
  const std::vector<int> in = numbers(512);
  Device<int> a(in), scanned(512), sorted(512), sums(4);
  block_primitives<<<4, 128>>>(a.data, scanned.data, sorted.data, sums.data);
  std::vector<int> expected_scan(512), expected_sort = in, expected_sum(4);
  for (int b = 0; b < 512; b += 128) {
    std::partial_sum(in.begin() + b, in.begin() + b + 128, expected_scan.begin() + b);
    std::sort(expected_sort.begin() + b, expected_sort.begin() + b + 128);
    expected_sum[b / 128] = expected_scan[b + 127];
  }
  return scanned.host() != expected_scan || sorted.host() != expected_sort || sums.host() != expected_sum;
}

template <class F>
void with_storage(F call) {
  size_t bytes = 0;
  call(nullptr, bytes);
  Device<char> storage(std::max<size_t>(bytes, 1));
  call(storage.data, bytes);
}

int run_device_scan() {
  const int n = 5000;  // more tiles than one: each waits for those before it
  const std::vector<int> in = numbers(n);
  Device<int> a(in), out(n);
  with_storage([&](void* s, size_t& bytes) { cub::DeviceScan::InclusiveSum(s, bytes, a.data, out.data, n); });
  std::vector<int> expected(n);
  std::partial_sum(in.begin(), in.end(), expected.begin());
  return out.host() != expected;
}

int run_device_reduce() {
  const int n = 3000;
  const std::vector<int> in = numbers(n);
  Device<int> a(in), out(1);
  with_storage([&](void* s, size_t& bytes) { cub::DeviceReduce::Sum(s, bytes, a.data, out.data, n); });
  return out.host()[0] != std::accumulate(in.begin(), in.end(), 0);
}

int run_device_sort() {
  const int n = 2000;
  const std::vector<int> in = numbers(n);
  Device<int> a(in), out(n);
  with_storage([&](void* s, size_t& bytes) { cub::DeviceRadixSort::SortKeys(s, bytes, a.data, out.data, n); });
  std::vector<int> expected = in;
  std::sort(expected.begin(), expected.end());
  return out.host() != expected;
}

// ---- synchronisation
__global__ void neighbours(int* data, int n) {
  cg::grid_group grid = cg::this_grid();
  for (int round = 0; round < 3; ++round) {
    const int i = static_cast<int>(grid.thread_rank()), next = data[(i + 1) % n];
    grid.sync();
    data[i] = next + 1;
    grid.sync();
  }
}

int run_grid_sync() {
  int n = 256;
  std::vector<int> in(n), expected(n);
  for (int i = 0; i < n; ++i) in[i] = i * i, expected[i] = (i + 3) % n * ((i + 3) % n) + 3;
  Device<int> a(in);
  void* args[] = {&a.data, &n};
  if (cudaLaunchCooperativeKernel(reinterpret_cast<void*>(neighbours), 4, 64, args) != cudaSuccess) return 1;
  return a.host() != expected;
}

__global__ void piped(const float* in, float* out, int stages) {
  __shared__ float buffer[2][128];
  __shared__ cuda::pipeline_shared_state<cuda::thread_scope_block, 2> state;
  auto block = cg::this_thread_block();
  auto pipe = cuda::make_pipeline(block, &state);
  const auto fetch = [&](int i) {
    pipe.producer_acquire();
    if (i < stages)
      cuda::memcpy_async(block, buffer[i & 1], in + i * 128, cuda::aligned_size_t<16>(sizeof(buffer[0])), pipe);
    pipe.producer_commit();
  };
  fetch(0), fetch(1);
  float sum = 0;
  for (int i = 0; i < stages; ++i) {
    pipe.consumer_wait();
    block.sync();
    sum += buffer[i & 1][threadIdx.x ^ 1];
    block.sync();
    pipe.consumer_release();
    fetch(i + 2);
  }
  out[threadIdx.x] = sum;
}

int run_pipeline() {
  std::vector<float> in(5 * 128), expected(128);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i % 37);
  for (int i = 0; i < 5 * 128; ++i) expected[i % 128 ^ 1] += in[i];
  Device<float> a(in), out(128);
  piped<<<1, 128>>>(a.data, out.data, 5);
  return out.host() != expected;
}

__global__ void with_barrier(int* out) {
  __shared__ cuda::barrier<cuda::thread_scope_block> barrier;
  __shared__ int values[64];
  if (threadIdx.x == 0) init(&barrier, blockDim.x);
  __syncthreads();
  for (int round = 0; round < 4; ++round) {
    values[threadIdx.x] = static_cast<int>(threadIdx.x) * (round + 1);
    barrier.arrive_and_wait();
    out[round * 64 + threadIdx.x] = values[63 - threadIdx.x];
    barrier.wait(barrier.arrive());
  }
}

int run_barrier() {
  Device<int> out(256);
  with_barrier<<<1, 64>>>(out.data);
  std::vector<int> expected(256);
  for (int i = 0; i < 256; ++i) expected[i] = (63 - i % 64) * (i / 64 + 1);
  return out.host() != expected;
}

__global__ void count_by_value(const int* in, int* counts, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  auto group = cg::coalesced_threads();
  auto equal = cg::labeled_partition(group, in[i]);
  if (equal.thread_rank() == 0) atomicAdd(&counts[in[i]], static_cast<int>(equal.size()));
}

int run_coalesced_groups() {
  const int n = 200;
  std::vector<int> in(n), expected(7);
  for (int i = 0; i < n; ++i) in[i] = i * i % 7, ++expected[in[i]];
  Device<int> a(in), counts(std::vector<int>(7));
  count_by_value<<<4, 64>>>(a.data, counts.data, n);
  return counts.host() != expected;
}

// ---- calls, local memory, constants
__device__ __noinline__ int fibonacci(int n) { return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2); }
__device__ __noinline__ float plus_one(float x) { return x + 1; }
__device__ __noinline__ float twice(float x) { return x * 2; }
using Function = float (*)(float);
__device__ Function functions[2] = {plus_one, twice};
__constant__ float scale[4];
__device__ int launched;

__global__ void calls(int* numbers, float* x, const int* index) {
  const int i = threadIdx.x;
  numbers[i] = fibonacci(i % 9);
  float local[16];
  for (int k = 0; k < 16; ++k) local[k] = static_cast<float>(k) * scale[k & 3];
  local[(index[i] + 1) & 15] += 1;
  x[i] = functions[i & 1](local[index[i]]) + local[(index[i] + 1) & 15];
  if (i == 0) launched += 1;
}

int run_calls() {
  const float factors[4] = {1, 2, 3, 4};
  if (cudaMemcpyToSymbol(scale, factors, sizeof(factors)) != cudaSuccess) return 1;
  std::vector<int> index(64), fib = {0, 1};
  for (int i = 0; i < 64; ++i) index[i] = i * 5 % 16;
  while (fib.size() < 9) fib.push_back(fib[fib.size() - 1] + fib[fib.size() - 2]);
  Device<int> number(64), at(index);
  Device<float> x(64);
  calls<<<1, 64>>>(number.data, x.data, at.data);
  const auto got = number.host();
  const auto values = x.host();
  for (int i = 0; i < 64; ++i) {
    const int k = index[i], next = (k + 1) & 15;
    const float own = static_cast<float>(k) * factors[k & 3];
    const float expected = (i & 1 ? own * 2 : own + 1) + static_cast<float>(next) * factors[next & 3] + 1;
    if (got[i] != fib[i % 9] || values[i] != expected) return 1;
  }
  int count = 0;
  cudaMemcpyFromSymbol(&count, launched, sizeof(count));
  return count != 1;
}

__device__ int first_word = 7, other_word = 9;
__device__ int* pointed = &first_word;
__device__ Function stored;
__device__ Function initial = twice;

__global__ void store_addresses() {
  pointed = &other_word;
  stored = plus_one;
}
__global__ void use_addresses(float* out) {
  *out = stored(static_cast<float>(*pointed));
  if (*out < 0) *out = plus_one(twice(*out));  // names the functions that it may be given
}

int run_addresses() {
  int* before = nullptr;
  Function function = nullptr;
  cudaMemcpyFromSymbol(&before, pointed, sizeof(before));
  cudaMemcpyFromSymbol(&function, initial, sizeof(function));
  void* expected = nullptr;
  cudaGetSymbolAddress(&expected, first_word);
  if (before != expected || function == nullptr) return 1;
  store_addresses<<<1, 1>>>();
  Device<float> out(1);
  use_addresses<<<1, 1>>>(out.data);
  return out.host()[0] != 10;
}

__global__ void nothing() {}
__global__ void dynamic(float* x) {
  extern __shared__ float s[];
  s[threadIdx.x] = 1;
  x[threadIdx.x] = s[threadIdx.x];
}

// What a GPU refuses, and what it would do to freed memory.
int run_refusals() {
  nothing<<<dim3(1, 70000), 32>>>();
  if (cudaGetLastError() != cudaErrorInvalidConfiguration) return 1;
  nothing<<<1, dim3(1, 1, 65)>>>();
  if (cudaGetLastError() != cudaErrorInvalidConfiguration) return 2;
  Device<float> x(32);
  dynamic<<<1, 32, 60000>>>(x.data);
  if (cudaGetLastError() != cudaErrorInvalidValue) return 3;
  if (cudaFuncSetAttribute(dynamic, cudaFuncAttributeMaxDynamicSharedMemorySize, 60000) != cudaSuccess) return 4;
  dynamic<<<1, 32, 60000>>>(x.data);
  if (cudaGetLastError() != cudaSuccess || x.host()[31] != 1) return 5;
  float *freed, value = 1;
  cudaMalloc(&freed, 4);
  cudaFree(freed);
  if (cudaMemcpy(freed, &value, 4, cudaMemcpyHostToDevice) != cudaErrorInvalidValue) return 6;
  cudaGetLastError();
  return cudaDeviceSynchronize() != cudaSuccess;
}

__global__ void doubles(double* x) { x[threadIdx.x] = exp(x[threadIdx.x]) / 3.0 + sin(x[threadIdx.x]); }

int run_doubles() {
  std::vector<double> in(32);
  for (int i = 0; i < 32; ++i) in[i] = i * 0.25 - 4;
  Device<double> x(in);
  doubles<<<1, 32>>>(x.data);
  const auto got = x.host();
  for (int i = 0; i < 32; ++i)
    if (std::fabs(got[i] - (std::exp(in[i]) / 3.0 + std::sin(in[i]))) > 1e-14 * std::exp(in[i]) + 1e-14) return 1;
  return 0;
}

__global__ void say(int x) {
  if (threadIdx.x == 3) {
    printf("thread %d of %u: %5.2f %s %lld%%\n", x, blockDim.x, 1.25, "text", 1ll << 40);
    printf("[%*d] [%-*.*f] [%.*f]\n", 6, x, 8, 3, 2.0625, -1, 0.5);
  }
}

int run_printf() {
  say<<<1, 32>>>(3);
  return cudaDeviceSynchronize() != cudaSuccess;
}

// ---- wmma: rows of C = A B^T, of which one warp has a tile of 16 columns
constexpr int kRows = 48, kInner = 64;

__global__ void tiles(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
  using namespace nvcuda;
  __shared__ __nv_bfloat16 rows[16 * (kInner + 8)];
  for (int i = threadIdx.x; i < 16 * kInner; i += blockDim.x)
    rows[i / kInner * (kInner + 8) + i % kInner] = a[blockIdx.x * 16 * kInner + i];
  __syncthreads();
  const int column = threadIdx.x / 32 * 16;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
  wmma::fill_fragment(sum, 1.f);
  for (int k = 0; k < kInner; k += 16) {
    wmma::fragment<wmma::matrix_a, 16, 16, 16, __nv_bfloat16, wmma::row_major> left;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, __nv_bfloat16, wmma::col_major> right;
    wmma::load_matrix_sync(left, rows + k, kInner + 8);
    wmma::load_matrix_sync(right, b + column * kInner + k, kInner);
    wmma::mma_sync(sum, left, right, sum);
  }
  for (int i = 0; i < sum.num_elements; ++i) sum.x[i] *= 2;
  wmma::store_matrix_sync(c + blockIdx.x * 16 * kRows + column, sum, kRows, wmma::mem_row_major);
}

int run_tiles() {
  std::vector<__nv_bfloat16> a, b;
  for (int v : numbers(kRows * kInner)) a.push_back(__float2bfloat16(static_cast<float>(v % 8)));
  for (int v : numbers(2 * kRows * kInner)) b.push_back(__float2bfloat16(static_cast<float>(v % 8)));
  Device<__nv_bfloat16> da(a), db(b);
  Device<float> dc(kRows * kRows);
  tiles<<<kRows / 16, 2 * kRows>>>(da.data, db.data, dc.data);
  const auto c = dc.host();
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kRows; ++j) {
      float sum = 1;
      for (int k = 0; k < kInner; ++k) sum += __bfloat162float(a[i * kInner + k]) * __bfloat162float(b[j * kInner + k]);
      if (c[i * kRows + j] != 2 * sum) return 1;
    }
  return 0;
}

// ---- the device's heap: lists that one kernel makes, another sums and frees
struct Node {
  int value;
  Node* next;
};

__global__ void make_lists(Node** heads, int length) {
  Node* head = nullptr;
  for (int i = 0; i < length; ++i) head = new Node{static_cast<int>(threadIdx.x) * i, head};
  heads[threadIdx.x] = head;
}

__global__ void sum_lists(Node** heads, int* sums) {
  int sum = 0;
  for (Node* n = heads[threadIdx.x]; n != nullptr;) {
    sum += n->value;
    Node* next = n->next;
    delete n;
    n = next;
  }
  sums[threadIdx.x] = sum + (malloc(size_t{1} << 40) == nullptr ? 0 : 1);
}

__global__ void use_freed(Node** heads) {
  heads[threadIdx.x]->value = 1;  // <- freed
}

int run_heap() {
  Device<Node*> heads(40);
  Device<int> sums(40);
  for (int i = 0; i < 3; ++i) {
    make_lists<<<1, 40>>>(heads.data, 7);
    sum_lists<<<1, 40>>>(heads.data, sums.data);
    const auto got = sums.host();
    for (int t = 0; t < 40; ++t)
      if (got[t] != 21 * t) return 1;
  }
  return cudaDeviceSynchronize() != cudaSuccess;
}
int run_freed() {
  Device<Node*> heads(32);
  Device<int> sums(32);
  make_lists<<<1, 32>>>(heads.data, 1);
  sum_lists<<<1, 32>>>(heads.data, sums.data);
  use_freed<<<1, 32>>>(heads.data);
  return cudaDeviceSynchronize() != cudaErrorLaunchFailure;
}

// ---- clocks
__global__ void wait(long long* waited, int steps) {
  const long long begin = clock64();
  while (clock64() - begin < steps) {
  }
  waited[threadIdx.x] = clock64() - begin;
}

int run_clocks() {
  Device<long long> waited(64);
  wait<<<1, 64>>>(waited.data, 1000);
  for (long long n : waited.host())
    if (n < 1000 || n > 100000) return 1;
  return cudaDeviceSynchronize() != cudaSuccess;
}

// ---- faults
__global__ void beyond(float* x) {
  x[threadIdx.x + 1] = 1;  // <- beyond
}
__global__ void unread(const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x] + 1;  // <- unread
}

int run_beyond() {
  Device<float> x(64);
  beyond<<<1, 64>>>(x.data);
  return cudaDeviceSynchronize() != cudaErrorLaunchFailure;
}
int run_unread() {
  Device<float> x(64), y(64);
  unread<<<1, 64>>>(x.data, y.data);
  return cudaDeviceSynchronize() != cudaErrorLaunchFailure;
}

struct Case {
  const char* name;
  int (*run)();
};
const Case kCases[] = {{"block_primitives", run_block_primitives},
                       {"device_scan", run_device_scan},
                       {"device_reduce", run_device_reduce},
                       {"device_sort", run_device_sort},
                       {"grid_sync", run_grid_sync},
                       {"pipeline", run_pipeline},
                       {"barrier", run_barrier},
                       {"coalesced_groups", run_coalesced_groups},
                       {"calls", run_calls},
                       {"addresses", run_addresses},
                       {"refusals", run_refusals},
                       {"doubles", run_doubles},
                       {"printf", run_printf},
                       {"tiles", run_tiles},
                       {"heap", run_heap},
                       {"clocks", run_clocks},
                       {"freed", run_freed},
                       {"beyond", run_beyond},
                       {"unread", run_unread}};

}  // namespace

extern "C" int run(const char* name) {
  for (const Case& c : kCases)
    if (strcmp(c.name, name) == 0) return c.run();
  return -1;
}
