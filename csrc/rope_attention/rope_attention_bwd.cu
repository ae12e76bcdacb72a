// rope_attention, backward: dq by blocks of queries, dk and dv by blocks of keys, both from scores computed again
// Fused     rotation, scores, masks, softmax from lse, delta = sum(dout out), products, un-rotation of dq and dk, casts
// Bytes     the dq kernel reads q, k, v, dout, out and writes dq and delta; the other reads q, k, v, dout, delta and
//           writes dk and dv; the blocks of the other side are read again by every block (from L2); dense tables with a
//           gradient: dq and dk also in float32, read by a third kernel
// Launch    a CTA for a block of up to 96 rows (64 or 32 of wide heads and in float32) of a head of a
//           sequence, 16 rows a warp; the other side in tiles, the next one on its way while one is used
// Numerics  float32 scores and sums; rotated q and k, probabilities and score gradients are rounded to the dtype; two
//           kernels and seven products instead of five, no atomics: the same bits in every run; gradients of dense
//           tables are sums, in the order of sequences, tokens and heads, of the float32 dq and dk
// Limits    those of the forward
// Source    original; Dao, arXiv:2307.08691
#include "rope_attention/rope_attention_tiles.cuh"

namespace eva02::cuda {
namespace {

template <class T, int kDim>
struct Shape {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kMaxWarps = kHalf ? (kDim <= 64 ? 6 : 4) : kDim <= 64 ? 4 : 2;
  static constexpr int kMinCtas = kHalf ? 2 : 1;
  static constexpr int kColumns = kHalf ? 32 : 16;
  static constexpr int kTile = kColumns * kPitch<T, kDim>;  // elements
  static constexpr int kStages = 4 * kTile;
  __host__ __device__ static constexpr int row_tile(int warps) { return warps * kWarpRows * kPitch<T, kDim>; }
  // Two tiles of rows that stay, the stages behind them; sums are staged over all of it.
  static size_t bytes(int warps) { return (2 * static_cast<size_t>(row_tile(warps)) + kStages) * sizeof(T); }
  static_assert(kWarpRows * kStagingPitch<kDim> * sizeof(float) <=
                (2 * row_tile(kMaxWarps) + kStages) * sizeof(T) / kMaxWarps);
};

// lse in base 2; a query without keys gets infinity, which makes all its probabilities 0.
__device__ float lse2_of(float lse) { return lse == -kInfinity ? kInfinity : lse * kLog2e; }

// sum(dout * out) of a warp's 16 rows, in lanes 0 ... 15 and again in 16 ... 31.
template <class T, int kDim>
__device__ float row_delta(const T* dout, const T* out) {
  const int lane = threadIdx.x % 32, row = lane % 16 * kPitch<T, kDim>;
  constexpr int kPack = 16 / sizeof(T);
  float sum = 0.f;
#pragma unroll 4
  for (int at = lane / 16 * kPack; at < kDim; at += 2 * kPack) {
    float a[kPack], b[kPack];
    load_pack<kPack>(dout + row + at, a);
    load_pack<kPack>(out + row + at, b);
#pragma unroll
    for (int i = 0; i < kPack; ++i) sum += a[i] * b[i];
  }
  return sum + __shfl_xor_sync(0xffffffffu, sum, 16);
}

// What the kernels leave for those after them: float32 memory.
struct Workspace {
  float* delta;                // as lse
  HeadTensor rotated[2] = {};  // dense tables with a gradient: dq and dk before they are un-rotated, pairs adjacent
};

// A warp's rows of dq or dk, from sums that lack the scale.
template <class T, int kDim>
__device__ void store_gradient(float (&acc)[kDim / 8][4], void* memory, const RopeAttentionParams& p,
                               const HeadTensor& gradient, const HeadTensor& rotated, const Place& place, int first_row,
                               const RopeLine* lines) {
  const Rotation rotation(p.rope, place.again().sequence, place.head);
  const int warp = threadIdx.x / 32, D = static_cast<int>(p.D);
  float* staging = static_cast<float*>(memory) + warp * kWarpRows * kStagingPitch<kDim>;
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
    for (int r = 0; r < 4; ++r) acc[n][r] *= p.scale;
  if (rotated.data != nullptr)
    store_rows<float, kDim>(acc, staging, HeadRows<float>(rotated, place, place.head), first_row, place.length, D);
  if (gradient.data != nullptr)
    store_rows<T, kDim>(acc, staging, HeadRows<T>(gradient, place, place.head), first_row, place.length, D, &rotation,
                        lines + warp * kWarpRows);
}

template <class T, bool kTf32, int kDim>
__global__ void __launch_bounds__(Shape<T, kDim>::kMaxWarps * 32, Shape<T, kDim>::kMinCtas)
    dq_kernel(const __grid_constant__ RopeAttentionParams p, int blocks, Workspace to) {
  using S = Shape<T, kDim>;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ RopeLine q_lines[S::kMaxWarps * kWarpRows], k_lines[2][S::kColumns];
  const Place place(p, blocks, static_cast<int>(p.H));
  if (place.start >= place.length) return;
  const int D = static_cast<int>(p.D), length = place.length, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int kv_head = place.head / static_cast<int>(p.H / p.Hkv);
  const HeadRows<T> q(p.q, place, place.head);
  const Rotation q_rotation(p.rope, place.sequence, place.head);
  const bool split = q_rotation.split();
  T* const q_tile = reinterpret_cast<T*>(memory);
  T* const dout_tile = q_tile + S::row_tile(blockDim.x / 32);
  T* const stages = dout_tile + S::row_tile(blockDim.x / 32);
  const int rows = place.rows(), end = p.causal ? min(length, place.start + rows) : length;
  const auto keys_of = [&](int i) { return part_rows<S::kColumns>(end - i * S::kColumns); };
  const auto load = [&](int i, int stage) {
    T* tiles = stages + stage * 2 * S::kTile;
    const Place here = place.again();
    load_tile<T, kDim>(tiles, keys_of(i), HeadRows<T>(p.k, here, kv_head), i * S::kColumns, length, D, split);
    load_tile<T, kDim>(tiles + S::kTile, keys_of(i), HeadRows<T>(p.v, here, kv_head), i * S::kColumns, length, D,
                       false);
  };
  const int warp_rows = warp * kWarpRows * kPitch<T, kDim>, first_row = place.start + warp * kWarpRows;

  // out passes through the memory of q, for delta alone.
  load_tile<T, kDim>(dout_tile, rows, HeadRows<T>(p.dout, place, place.head), place.start, length, D, false);
  load_tile<T, kDim>(q_tile, rows, HeadRows<T>(p.out, place, place.head), place.start, length, D, false);
  copy_async_commit();
  q_rotation.lines(q_lines, rows, place.start, length);
  Rotation(p.rope, place.sequence, kv_head).lines(k_lines[0], S::kColumns, 0, length);
  copy_async_wait<0>();
  __syncthreads();
  const float warp_delta = row_delta<T, kDim>(dout_tile + warp_rows, q_tile + warp_rows);
  if (lane < kWarpRows && first_row + lane < length)
    place.statistic(to.delta, p, place.head)[first_row + lane] = warp_delta;
  __syncthreads();
  load_tile<T, kDim>(q_tile, rows, q, place.start, length, D, split);
  copy_async_commit();
  load(0, 0);
  copy_async_commit();
  float delta[2], lse2[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + lane / 4 + r * 8;
    delta[r] = __shfl_sync(0xffffffffu, warp_delta, lane / 4 + r * 8);
    lse2[r] = row < length ? lse2_of(place.statistic(p.lse, p, place.head)[row]) : kInfinity;
  }
  copy_async_wait<1>();
  rotate_tile<T, kDim>(q_tile, rows, q_lines, q_rotation, D);
  __syncthreads();

  const Operand<T, kDim, S::kHalf> queries(q_tile + warp_rows), douts(dout_tile + warp_rows);
  const float scale2 = p.scale * kLog2e;
  float acc[kDim / 8][4] = {};
  const auto arrive = [&](int i, int stage) {
    const Rotation k_rotation(p.rope, place.again().sequence, kv_head);
    rotate_tile<T, kDim>(stages + stage * 2 * S::kTile, keys_of(i), k_lines[stage], k_rotation, D);
    k_rotation.lines(k_lines[1 - stage], S::kColumns, (i + 1) * S::kColumns, length);
  };
  const auto use = [&](int i, int stage) {
    if (first_row >= length) return;
    by_parts<S::kColumns>(end - i * S::kColumns, [&]<int kColumns>(int at) {
      const T* keys = stages + stage * 2 * S::kTile + at * kPitch<T, kDim>;
      float s[kColumns / 8][4], dp[kColumns / 8][4];
      rows_by_rows<T, kTf32, kDim, kColumns>(s, queries, keys);
      mask_scores<kColumns>(s, p, place, first_row, i * S::kColumns + at);
      rows_by_rows<T, kTf32, kDim, kColumns>(dp, douts, keys + S::kTile);
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
        for (int r = 0; r < 4; ++r) s[n][r] = exp2_fast(s[n][r] * scale2 - lse2[r / 2]) * (dp[n][r] - delta[r / 2]);
      add_tile_by_rows<T, kTf32, kDim, kColumns>(acc, s, keys);
    });
  };
  pipeline(ceil_div(end, S::kColumns), load, arrive, use);

  __syncthreads();
  store_gradient<T, kDim>(acc, memory, p, p.dq, to.rotated[0], place, first_row, q_lines);
}

template <class T, bool kTf32, int kDim>
__global__ void __launch_bounds__(Shape<T, kDim>::kMaxWarps * 32, Shape<T, kDim>::kMinCtas)
    dkdv_kernel(const __grid_constant__ RopeAttentionParams p, int blocks, Workspace from) {
  using S = Shape<T, kDim>;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ RopeLine k_lines[S::kMaxWarps * kWarpRows], q_lines[2][S::kColumns];
  __shared__ __align__(16) float lse2s[2][S::kColumns], deltas[2][S::kColumns];
  const Place place(p, blocks, static_cast<int>(p.Hkv));
  if (place.start >= place.length) return;
  const int D = static_cast<int>(p.D), length = place.length, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const HeadRows<T> k(p.k, place, place.head), v(p.v, place, place.head);
  const Rotation k_rotation(p.rope, place.sequence, place.head);
  const bool split = k_rotation.split();
  T* const k_tile = reinterpret_cast<T*>(memory);
  T* const v_tile = k_tile + S::row_tile(blockDim.x / 32);
  T* const stages = v_tile + S::row_tile(blockDim.x / 32);
  const int rows = place.rows(), warp_rows = warp * kWarpRows * kPitch<T, kDim>;
  const int first_row = place.start + warp * kWarpRows;

  // Tiles of queries: those of one head of the group after those of another.
  const int group = static_cast<int>(p.H / p.Hkv), begin = p.causal ? place.start / S::kColumns * S::kColumns : 0;
  const int per_head = ceil_div(length - begin, S::kColumns), count = group * per_head;
  const auto head_of = [&](int i) { return place.head * group + i / per_head; };
  const auto start_of = [&](int i) { return begin + i % per_head * S::kColumns; };
  const auto queries_of = [&](int i) { return part_rows<S::kColumns>(length - start_of(i)); };
  const auto lines = [&](int i, int stage) {
    Rotation(p.rope, place.again().sequence, head_of(i)).lines(q_lines[stage], S::kColumns, start_of(i), length);
  };
  const auto load = [&](int i, int stage) {
    T* tiles = stages + stage * 2 * S::kTile;
    const int head = head_of(i), start = start_of(i);
    const Place here = place.again();
    load_tile<T, kDim>(tiles, queries_of(i), HeadRows<T>(p.q, here, head), start, length, D, split);
    load_tile<T, kDim>(tiles + S::kTile, queries_of(i), HeadRows<T>(p.dout, here, head), start, length, D, false);
    const float* lse = here.statistic(p.lse, p, head) + start;
    const float* delta = here.statistic(from.delta, p, head) + start;
    for (int column = threadIdx.x; column < S::kColumns; column += blockDim.x) {
      const bool there = start + column < length;
      copy_async_4(&lse2s[stage][column], lse + (there ? column : 0), there);
      copy_async_4(&deltas[stage][column], delta + (there ? column : 0), there);
    }
  };
  load_tile<T, kDim>(k_tile, rows, k, place.start, length, D, split);
  load_tile<T, kDim>(v_tile, rows, v, place.start, length, D, false);
  copy_async_commit();
  if (count > 0) {
    load(0, 0);
    copy_async_commit();
    lines(0, 0);
  }
  k_rotation.lines(k_lines, rows, place.start, length);
  __syncthreads();
  if (count > 0)
    copy_async_wait<1>();
  else
    copy_async_wait<0>();
  rotate_tile<T, kDim>(k_tile, rows, k_lines, k_rotation, D);
  __syncthreads();

  const Operand<T, kDim, false> keys(k_tile + warp_rows), values(v_tile + warp_rows);
  float dk[kDim / 8][4] = {}, dv[kDim / 8][4] = {};
  bool counts[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int key = first_row + lane / 4 + r * 8;
    counts[r] = key < length && (p.key_mask == nullptr || p.key_mask[int64_t{place.sample} * p.S + key]);
  }
  const auto arrive = [&](int i, int stage) {
    for (int column = threadIdx.x; column < S::kColumns; column += blockDim.x)
      lse2s[stage][column] = lse2_of(lse2s[stage][column]);
    const Rotation rotation(p.rope, place.again().sequence, head_of(i));
    rotate_tile<T, kDim>(stages + stage * 2 * S::kTile, queries_of(i), q_lines[stage], rotation, D);
    if (i + 1 < count) lines(i + 1, 1 - stage);
  };
  const auto use = [&](int i, int stage) {
    forget(i);  // else its start is in a register, of which float32 heads of 128 have none to spare
    const int start = start_of(i);
    if (first_row >= length || (p.causal && start + S::kColumns <= first_row)) return;
    by_parts<S::kColumns>(length - start, [&]<int kColumns>(int at) {
      const T* queries = stages + stage * 2 * S::kTile + at * kPitch<T, kDim>;
      const T* douts = queries + S::kTile;
      const float *lse2 = lse2s[stage] + at + lane % 4 * 2, *delta = deltas[stage] + at + lane % 4 * 2;
      const int row = first_row + lane / 4, column = start + at + lane % 4 * 2;
      float s[kColumns / 8][4], dp[kColumns / 8][4];
      rows_by_rows<T, kTf32, kDim, kColumns>(s, keys, queries);
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        float l[2];
        load_pack<2>(lse2 + n * 8, l);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const bool allowed = counts[r / 2] && !(p.causal && row + r / 2 * 8 > column + n * 8 + r % 2);
          s[n][r] = allowed ? exp2_fast(fmaf(s[n][r], p.scale * kLog2e, -l[r % 2])) : 0.f;
        }
      }
      add_tile_by_rows<T, kTf32, kDim, kColumns>(dv, s, douts);
      rows_by_rows<T, kTf32, kDim, kColumns>(dp, values, douts);
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        float d[2];
        load_pack<2>(delta + n * 8, d);
#pragma unroll
        for (int r = 0; r < 4; ++r) s[n][r] *= dp[n][r] - d[r % 2];
      }
      add_tile_by_rows<T, kTf32, kDim, kColumns>(dk, s, queries);
    });
  };
  pipeline(count, load, arrive, use);

  __syncthreads();
  float* staging = reinterpret_cast<float*>(memory) + warp * kWarpRows * kStagingPitch<kDim>;
  if (p.dv.data != nullptr)
    store_rows<T, kDim>(dv, staging, HeadRows<T>(p.dv, place, place.head), first_row, length, D);
  store_gradient<T, kDim>(dk, memory, p, p.dk, from.rotated[1], place, first_row, k_lines);
}

// A thread's pair of one patch of a table: the sum over all tokens that are the patch, and over heads, of q and of k.
template <class T>
__global__ void table_kernel(const __grid_constant__ RopeAttentionParams p, Workspace from) {
  const RopeTable& rope = p.rope;
  const int patch = static_cast<int>(blockIdx.x), table = static_cast<int>(blockIdx.y), pair = threadIdx.x;
  const int half = static_cast<int>(p.D) / 2;
  if (pair >= half) return;
  const int first = rope.interleaved ? 2 * pair : pair, second = rope.interleaved ? first + 1 : first + half;
  const bool per_head = rope.form == RopeForm::dense_head, per_sequence = rope.form == RopeForm::dense_batch;
  float dcos = 0.f, dsin = 0.f;
  const auto add_heads = [&](const HeadTensor& x, const HeadTensor& gradient, const Place& place, int token,
                             int64_t heads) {
    for (int head = per_head ? table : 0; head < (per_head ? table + 1 : heads); ++head) {
      const T* value = HeadRows<const T>(x, place, head).row(token);
      const float* d = HeadRows<const float>(gradient, place, head).row(token);
      const float xa = to_float(value[first]), xb = to_float(value[second]), da = d[2 * pair], db = d[2 * pair + 1];
      dcos += xa * da + xb * db;
      dsin += xa * db - xb * da;
    }
  };
  for (int sequence = per_sequence ? table : 0; sequence < (per_sequence ? table + 1 : p.B); ++sequence) {
    const Place place(p, sequence);
    // Without keep_idx a patch is one token; with it, any that names the patch.
    const int begin = static_cast<int>(rope.num_prefix) + (rope.keep_idx == nullptr ? patch : 0);
    const int end = rope.keep_idx == nullptr ? min(begin + 1, place.length) : place.length;
    for (int token = begin; token < end; ++token) {
      if (rope_patch(rope, sequence, token) != patch) continue;
      add_heads(p.q, from.rotated[0], place, token, p.H);
      add_heads(p.k, from.rotated[1], place, token, p.Hkv);
    }
  }
  const int64_t at = table * rope.table_stride + static_cast<int64_t>(patch) * half + pair;
  p.dcos[at] = dcos;
  p.dsin[at] = dsin;
}

const char* table_gradients(const RopeAttentionParams& p, const Workspace& from, const Device& device) {
  const int64_t tables = p.rope.form == RopeForm::dense_head ? p.H : p.rope.form == RopeForm::dense_batch ? p.B : 1;
  if (p.rope.rows * tables == 0) return nullptr;
  const dim3 grid(static_cast<unsigned>(p.rope.rows), static_cast<unsigned>(tables));
  return by_dtype(p.dtype, [&]<class T>() {
    table_kernel<T><<<grid, 64, 0, stream_of(device)>>>(p, from);
    return launch_error();
  });
}

// (B, S, H, D) or packed (S, H, D), contiguous.
HeadTensor rotated_workspace(const RopeAttentionParams& p, int64_t heads, const Device& device) {
  const bool packed = p.cu_seqlens != nullptr;
  const int64_t sample = p.S * heads * p.D;
  return {workspace(device, packed ? sample : p.B * sample), packed ? 0 : sample, heads * p.D, p.D};
}

}  // namespace

const char* run_rope_attention_bwd(const RopeAttentionParams& p, const Device& device) {
  const bool tables = p.dcos != nullptr;
  if (p.B * p.max_seqlen * p.H == 0 || p.D == 0) return tables ? table_gradients(p, {}, device) : nullptr;
  Workspace made = {.delta = workspace(device, (p.cu_seqlens == nullptr ? p.B : 1) * p.H * p.S)};
  if (made.delta == nullptr) return kNoMemory;
  if (tables) {
    made.rotated[0] = rotated_workspace(p, p.H, device);
    made.rotated[1] = rotated_workspace(p, p.Hkv, device);
    if (made.rotated[0].data == nullptr || made.rotated[1].data == nullptr) return kNoMemory;
  }
  const char* error = by_type(p, [&]<class T, bool kTf32, int kDim>() {
    using S = Shape<T, kDim>;
    const Blocks blocks(p.max_seqlen, S::kMaxWarps);
    const size_t shared = S::bytes(blocks.warps);
    const char* error = launch_attention(dq_kernel<T, kTf32, kDim>, p, blocks, p.H, shared, device, made);
    if (error != nullptr || (p.dk.data == nullptr && p.dv.data == nullptr && !tables)) return error;
    return launch_attention(dkdv_kernel<T, kTf32, kDim>, p, blocks, p.Hkv, shared, device, made);
  });
  return error == nullptr && tables ? table_gradients(p, made, device) : error;
}

}  // namespace eva02::cuda
