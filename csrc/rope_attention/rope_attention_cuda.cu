// rope_attention, forward: out = softmax(scale R(q) R(k)^T + mask) v, with q and k rotated in shared memory
// Fused     rotation, prefix tokens, token selection, scores, masks, softmax, product with v, casts
// Bytes     reads q, k, v and writes out and lse; every block of queries reads k and v again (from L2)
// Launch    a CTA for a block of up to 128 queries (64 in float32) of a head of a sequence, 16 queries a warp, blocks
//           of one sequence as equal as can be; keys in tiles, the next one on its way while one is used
// Numerics  float32 scores, softmax and sums; rotated q and k and the probabilities are rounded to the dtype
// Limits    last dim contiguous, rows aligned to 16 bytes, head dims 8..128 in steps of 8, scale > 0
// Source    original; Dao, arXiv:2307.08691
#include "rope_attention/rope_attention_tiles.cuh"

namespace eva02::cuda {
namespace {

template <class T, int kDim>
struct Shape {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kMaxWarps = kHalf ? 8 : 4;
  static constexpr int kKeys = kHalf ? 64 : kDim <= 64 ? 32 : 16;
  static constexpr int kMinCtas = kHalf && kDim <= 64 ? 2 : 1;
  static constexpr int kTile = kKeys * kPitch<T, kDim>;  // elements
  // q passes through the second stage on its way to registers; in float32 it stays in memory of its own.
  static constexpr int kStages = 4 * kTile;
  static size_t bytes(int warps) {
    const size_t q = kHalf ? 0 : static_cast<size_t>(warps) * kWarpRows * kPitch<T, kDim>;
    return (kStages + q) * sizeof(T);
  }
  static_assert(!kHalf || kMaxWarps * kWarpRows * kPitch<T, kDim> <= 2 * kTile);
  static_assert(!kHalf || kMaxWarps * kWarpRows * kStagingPitch<kDim> * sizeof(float) <= kStages * sizeof(T));
  static_assert(kHalf || kWarpRows * kStagingPitch<kDim> <= kWarpRows * kPitch<T, kDim> + kStages / kMaxWarps);
};

// Of a lane's two rows: the largest score so far, and this lane's part of the sum.
struct Softmax {
  float largest[2] = {-kInfinity, -kInfinity}, total[2] = {0.f, 0.f};

  // Scores become probabilities less a factor, which `fade` takes from what was summed before.
  template <int kColumns>
  __device__ void add(float (&s)[kColumns / 8][4], float scale2, float (&fade)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float now = largest[r];
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) now = fmaxf(now, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 1));
      now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 2));
      const float shift = now == -kInfinity ? 0.f : now * scale2;  // no key so far: exp2(-inf - 0) = 0
      fade[r] = exp2_fast(fmaf(largest[r], scale2, -shift));
      largest[r] = now;
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          s[n][i] = exp2_fast(fmaf(s[n][i], scale2, -shift));
          sum += s[n][i];
        }
      total[r] = fmaf(total[r], fade[r], sum);
    }
  }
  __device__ float sum(int r) const {
    const float pair = total[r] + __shfl_xor_sync(0xffffffffu, total[r], 1);
    return pair + __shfl_xor_sync(0xffffffffu, pair, 2);
  }
};

template <class T, bool kTf32, int kDim>
__global__ void __launch_bounds__(Shape<T, kDim>::kMaxWarps * 32, Shape<T, kDim>::kMinCtas)
    fwd_kernel(const __grid_constant__ RopeAttentionParams p, int blocks) {
  using S = Shape<T, kDim>;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ RopeLine q_lines[S::kMaxWarps * kWarpRows], k_lines[2][S::kKeys];
  const Place place(p, blocks, static_cast<int>(p.H));
  if (place.start >= place.length) return;
  const int D = static_cast<int>(p.D), length = place.length, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int kv_head = place.head / static_cast<int>(p.H / p.Hkv);
  const HeadRows<T> q(p.q, place, place.head);
  const Rotation q_rotation(p.rope, place.sequence, place.head);
  const bool split = q_rotation.split();
  T* const stages = reinterpret_cast<T*>(memory);
  T* const q_tile = stages + (S::kHalf ? 2 * S::kTile : S::kStages);
  const int end = p.causal ? min(length, place.start + place.rows()) : length;
  const auto keys_of = [&](int i) { return part_rows<S::kKeys>(end - i * S::kKeys); };
  const auto load = [&](int i, int stage) {
    T* to = stages + stage * 2 * S::kTile;
    const Place here = place.again();
    load_tile<T, kDim>(to, keys_of(i), HeadRows<T>(p.k, here, kv_head), i * S::kKeys, length, D, split);
    load_tile<T, kDim>(to + S::kTile, keys_of(i), HeadRows<T>(p.v, here, kv_head), i * S::kKeys, length, D, false);
  };
  load_tile<T, kDim>(q_tile, place.rows(), q, place.start, length, D, split);
  copy_async_commit();
  load(0, 0);
  copy_async_commit();
  q_rotation.lines(q_lines, place.rows(), place.start, length);
  Rotation(p.rope, place.sequence, kv_head).lines(k_lines[0], S::kKeys, 0, length);
  __syncthreads();
  copy_async_wait<1>();
  rotate_tile<T, kDim>(q_tile, place.rows(), q_lines, q_rotation, D);
  __syncthreads();

  const Operand<T, kDim, S::kHalf> queries(q_tile + warp * kWarpRows * kPitch<T, kDim>);
  const int first_row = place.start + warp * kWarpRows;
  const float scale2 = p.scale * kLog2e;
  float acc[kDim / 8][4] = {};
  Softmax softmax;
  const auto arrive = [&](int i, int stage) {
    const Rotation k_rotation(p.rope, place.again().sequence, kv_head);
    rotate_tile<T, kDim>(stages + stage * 2 * S::kTile, keys_of(i), k_lines[stage], k_rotation, D);
    k_rotation.lines(k_lines[1 - stage], S::kKeys, (i + 1) * S::kKeys, length);
  };
  const auto use = [&](int i, int stage) {
    if (first_row >= length) return;
    by_parts<S::kKeys>(end - i * S::kKeys, [&]<int kColumns>(int at) {
      const T* keys = stages + stage * 2 * S::kTile + at * kPitch<T, kDim>;
      float s[kColumns / 8][4], fade[2];
      rows_by_rows<T, kTf32, kDim, kColumns>(s, queries, keys);
      mask_scores<kColumns>(s, p, place, first_row, i * S::kKeys + at);
      softmax.add<kColumns>(s, scale2, fade);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
        for (int r = 0; r < 4; ++r) acc[n][r] *= fade[r / 2];
      add_tile_by_rows<T, kTf32, kDim, kColumns>(acc, s, keys + S::kTile);
    });
  };
  pipeline(ceil_div(end, S::kKeys), load, arrive, use);

  float* lse = place.statistic(p.lse, p, place.head);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = softmax.sum(r), safe = sum == 0.f ? 1.f : sum;  // a query without keys: out 0, lse -inf
    const float share = 1.f / safe;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      acc[n][2 * r] *= share;
      acc[n][2 * r + 1] *= share;
    }
    const int row = first_row + lane / 4 + r * 8;
    if (lane % 4 == 0 && row < length) lse[row] = softmax.largest[r] * p.scale + logf(safe);
  }
  __syncthreads();
  store_rows<T, kDim>(acc, reinterpret_cast<float*>(memory) + warp * kWarpRows * kStagingPitch<kDim>,
                      HeadRows<T>(p.out, place, place.head), first_row, length, D);
}

}  // namespace

const char* run_rope_attention_fwd(const RopeAttentionParams& p, const Device& device) {
  if (p.B * p.max_seqlen * p.H == 0 || p.D == 0) return nullptr;
  return by_type(p, [&]<class T, bool kTf32, int kDim>() {
    using S = Shape<T, kDim>;
    const Blocks blocks(p.max_seqlen, S::kMaxWarps);
    return launch_attention(fwd_kernel<T, kTf32, kDim>, p, blocks, p.H, S::bytes(blocks.warps), device);
  });
}

}  // namespace eva02::cuda
