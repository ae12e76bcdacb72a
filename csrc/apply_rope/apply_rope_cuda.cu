// apply_rope: heads of q or k rotated by the angles of their token's patch, or rotated back; prefix tokens are copied
// Fused     table look-up, rotation, concatenation with the prefix (eager: 13 passes over half-tensors); the gradients
// of
//           dense tables in one pass over x and dout
// Bytes     forward and backward move 2n elements: the minimum; tables are (h + w) D/4 or P D/2 floats
// Launch    a thread for 4 rotation pairs of a head; table gradients a CTA for a patch, a thread for a pair, which
// walks
//           all samples and heads
// Numerics  float32 inside, one rounding; table gradients are summed in the order of samples, tokens and heads
// Limits    last dim contiguous, any other strides; a head dim in multiples of 4; 16-byte accesses where D and strides
//           allow (half-split layout: 8-byte)
// Source    original; Su et al., arXiv:2104.09864; EVA-02, arXiv:2303.11331
#include "apply_rope/apply_rope.h"
#include "common/rows.cuh"

namespace eva02::cuda {
namespace {

constexpr int kPairs = 4, kThreads = 256;
constexpr int kResident = 5;  // CTAs of a multiprocessor: for a sixth the registers would be too few

// n of N contiguous elements, in packs of W.
template <int W, int N, class T>
__device__ void load_span(const T* p, int n, float* v) {
  constexpr int kPack = W < N ? W : N;
#pragma unroll
  for (int i = 0; i < N; i += kPack) {
    if (i + kPack <= n) {
      load_pack<kPack>(p + i, v + i);
    } else {
#pragma unroll
      for (int k = i; k < i + kPack; ++k) v[k] = k < n ? to_float(p[k]) : 0.f;
    }
  }
}

template <int W, int N, class T>
__device__ void store_span(T* p, int n, const float* v) {
  constexpr int kPack = W < N ? W : N;
#pragma unroll
  for (int i = 0; i < N; i += kPack) {
    if (i + kPack <= n) {
      store_pack<kPack>(p + i, v + i);
    } else {
#pragma unroll
      for (int k = i; k < i + kPack; ++k)
        if (k < n) p[k] = from_float<T>(v[k]);
    }
  }
}

// The angles of pairs first ... first + n - 1.
__device__ void load_angles(const float* const (&runs)[2], int first, int n, int quarter, float (&v)[kPairs]) {
  const float* run = first < quarter ? runs[0] + first : runs[1] + (first - quarter);
  if (quarter % kPairs == 0 && n == kPairs && reinterpret_cast<uintptr_t>(run) % (kPairs * sizeof(float)) == 0)
    return load_pack<kPairs>(run, v);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int pair = first + i;
    v[i] = i < n ? (pair < quarter ? runs[0][pair] : runs[1][pair - quarter]) : 0.f;
  }
}

template <class T, int W, bool kInterleaved>
__global__ void __launch_bounds__(kThreads, kResident) rotate_kernel(const __grid_constant__ ApplyRopeParams p) {
  const int D = static_cast<int>(p.D), half = D / 2, chunks = ceil_div(half, kPairs);
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int chunk = static_cast<int>(item % chunks), first = chunk * kPairs, n = min(kPairs, half - first);
  const int64_t head = item / chunks, h = head % p.H, t = head / p.H % p.S, b = head / p.H / p.S;
  if (b >= p.B) return;
  const T* x = static_cast<const T*>(p.x) + b * p.x_stride[0] + t * p.x_stride[1] + h * p.x_stride[2];
  T* y = static_cast<T*>(p.out) + b * p.out_stride[0] + t * p.out_stride[1] + h * p.out_stride[2];
  float v[2 * kPairs];  // interleaved: as stored; half split: the first members of the pairs, then the second ones
  if constexpr (kInterleaved) {
    load_span<W, 2 * kPairs>(x + 2 * first, 2 * n, v);
  } else {
    load_span<W, kPairs>(x + first, n, v);
    load_span<W, kPairs>(x + half + first, n, v + kPairs);
  }
  RopeAngles angles;
  if (rope_angles(p.rope, b, t, h, angles)) {
    float cos[kPairs], sin[kPairs];
    load_angles(angles.cos, first, n, D / 4, cos);
    load_angles(angles.sin, first, n, D / 4, sin);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      float& first_member = kInterleaved ? v[2 * i] : v[i];
      float& second_member = kInterleaved ? v[2 * i + 1] : v[kPairs + i];
      const float a = first_member, c = second_member, s = p.inverse ? -sin[i] : sin[i];
      first_member = a * cos[i] - c * s;
      second_member = c * cos[i] + a * s;
    }
  }
  if constexpr (kInterleaved) {
    store_span<W, 2 * kPairs>(y + 2 * first, 2 * n, v);
  } else {
    store_span<W, kPairs>(y + first, n, v);
    store_span<W, kPairs>(y + half + first, n, v + kPairs);
  }
}

template <class T>
__global__ void table_grad_kernel(const __grid_constant__ ApplyRopeTableGradParams p) {
  const RopeTable& rope = p.rope;
  const int64_t patch = blockIdx.x, table = blockIdx.y, half = p.D / 2;
  const int64_t pair = threadIdx.x;
  if (pair >= half) return;
  const int64_t first = rope.interleaved ? 2 * pair : pair, second = rope.interleaved ? first + 1 : first + half;
  const bool per_head = rope.form == RopeForm::dense_head, per_batch = rope.form == RopeForm::dense_batch;
  float dcos = 0.f, dsin = 0.f;
  for (int64_t b = per_batch ? table : 0; b < (per_batch ? table + 1 : p.B); ++b) {
    // Without keep_idx a patch is one token; with it, any that names the patch.
    const int64_t begin = rope.keep_idx == nullptr ? rope.num_prefix + patch : rope.num_prefix;
    const int64_t end = rope.keep_idx == nullptr ? min(begin + 1, p.S) : p.S;
    for (int64_t t = begin; t < end; ++t) {
      if (rope_patch(rope, b, t) != patch) continue;
      for (int64_t h = per_head ? table : 0; h < (per_head ? table + 1 : p.H); ++h) {
        const T* x = static_cast<const T*>(p.x) + b * p.x_stride[0] + t * p.x_stride[1] + h * p.x_stride[2];
        const T* d = static_cast<const T*>(p.dout) + b * p.dout_stride[0] + t * p.dout_stride[1] + h * p.dout_stride[2];
        const float xa = to_float(x[first]), xb = to_float(x[second]);
        const float da = to_float(d[first]), db = to_float(d[second]);
        dcos += xa * da + xb * db;
        dsin += xa * db - xb * da;
      }
    }
  }
  const int64_t at = table * rope.table_stride + patch * half + pair;
  p.dcos[at] = dcos;
  p.dsin[at] = dsin;
}

}  // namespace

const char* run_apply_rope_fwd(const ApplyRopeParams& p, const Device& device) {
  const int64_t items = p.B * p.S * p.H * ceil_div<int64_t>(p.D / 2, kPairs);
  if (items == 0) return nullptr;
  return by_dtype(p.dtype, [&]<class T>() {
    PackWidth width(sizeof(T));
    const int64_t half = p.rope.interleaved ? 0 : p.D / 2;
    width.rows(p.x, p.x_stride[0], p.x_stride[1], p.x_stride[2], half);
    width.rows(p.out, p.out_stride[0], p.out_stride[1], p.out_stride[2]);
    const auto ctas = static_cast<unsigned>(ceil_div<int64_t>(items, kThreads));
    return by_width<T>(width, [&]<int W>() {
      return by_bool(p.rope.interleaved, [&]<bool kInterleaved>() {
        rotate_kernel<T, W, kInterleaved><<<ctas, kThreads, 0, stream_of(device)>>>(p);
        return launch_error();
      });
    });
  });
}

const char* run_apply_rope_table_grad(const ApplyRopeTableGradParams& p, const Device& device) {
  const int64_t tables = p.rope.form == RopeForm::dense_head ? p.H : p.rope.form == RopeForm::dense_batch ? p.B : 1;
  if (p.rope.rows == 0 || tables == 0 || p.D == 0) return nullptr;
  return by_dtype(p.dtype, [&]<class T>() {
    const dim3 grid(static_cast<unsigned>(p.rope.rows), static_cast<unsigned>(tables));
    const auto threads = static_cast<unsigned>(ceil_div<int64_t>(p.D / 2, 32) * 32);
    table_grad_kernel<T><<<grid, threads, 0, stream_of(device)>>>(p);
    return launch_error();
  });
}

}  // namespace eva02::cuda
