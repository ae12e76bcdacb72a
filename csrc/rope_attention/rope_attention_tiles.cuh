// What the attention kernels share: where a CTA works, tiles of head rows in shared memory, their rotation, products of
// tiles, and the way back to memory.
//
// A tile holds rows of one head, kDim channels each (the head's own, zeros behind them) and 16 bytes more, so that the
// eight rows of an ldmatrix lie in different banks. Channels travel in units of 8, which are 4 rotation pairs: a thread
// copies units and, once they have landed, rotates the same ones, so that no barrier lies between. In the half-split
// layout a unit is two runs of 4 channels; rotation leaves pairs adjacent whatever the layout, which scores do not see.
#pragma once

#include "common/mma.cuh"
#include "common/rows.cuh"
#include "rope_attention/rope_attention.h"

namespace eva02::cuda {

constexpr int kUnit = 8;       // channels
constexpr int kWarpRows = 16;  // rows of a warp, those of a matrix instruction
constexpr int kSubtile = 16;   // the last, partial tile of columns is taken in parts of this many
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr float kInfinity = __builtin_inff();

template <class T, int kDim>
constexpr int kPitch = kDim + 16 / static_cast<int>(sizeof(T));

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// ---- where a CTA works ----------------------------------------------------------------------------------------------
struct Place {
  int sequence, head;
  int sample, first;  // packed sequences are one sample, others start their own
  int length;         // tokens of the sequence
  int start;          // the CTA's first row

  __device__ Place(const RopeAttentionParams& p, int blocks, int heads)
      : Place(p, static_cast<int>(blockIdx.x) / blocks / heads) {
    const int item = static_cast<int>(blockIdx.x) / blocks;
    start = (static_cast<int>(blockIdx.x) - item * blocks) * rows();
    head = item - sequence * heads;
  }
  // The whole sequence.
  __device__ Place(const RopeAttentionParams& p, int sequence) : sequence(sequence), head(0), start(0) {
    if (p.cu_seqlens == nullptr) {
      sample = sequence;
      first = 0;
      length = static_cast<int>(p.S);
    } else {
      sample = 0;
      first = p.cu_seqlens[sequence];
      length = p.cu_seqlens[sequence + 1] - first;
    }
  }
  // The same, from which everything is computed again.
  __device__ Place again() const {
    Place place = *this;
    forget(place.sample), forget(place.first), forget(place.sequence);
    return place;
  }
  __device__ static int rows() { return static_cast<int>(blockDim.x) / 32 * kWarpRows; }

  // Of a (B, H, S) tensor, varlen (H, S), of a head of q.
  __device__ float* statistic(float* data, const RopeAttentionParams& p, int of_head) const {
    return data + (static_cast<int64_t>(sample) * p.H + of_head) * p.S + first;
  }
};

// Rows of one head of one sequence.
template <class T>
struct HeadRows {
  T* data;
  int stride;
  __device__ HeadRows(const HeadTensor& t, const Place& place, int head)
      : data(static_cast<T*>(t.data) + place.sample * t.batch + head * t.head + place.first * t.token),
        stride(static_cast<int>(t.token)) {}
  __device__ T* row(int i) const { return data + static_cast<int64_t>(i) * stride; }
};

// ---- rotation -------------------------------------------------------------------------------------------------------
// Where a token's angles are, in floats from the start of the tables: two runs of D/4 pairs; first < 0: not rotated.
struct RopeLine {
  int first, second;
};

// The tables of one head of one sequence.
struct Rotation {
  const RopeTable& rope;
  const float *cos, *sin;
  int sequence, quarter, width;
  bool wide;  // 4 pairs are of one run, and 16 aligned bytes

  __device__ Rotation(const RopeTable& rope, int sequence, int head)
      : rope(rope), cos(rope.cos), sin(rope.sin), sequence(sequence), quarter(static_cast<int>(rope.head_dim) / 4) {
    const int64_t table = rope.form == RopeForm::dense_head ? head : rope.form == RopeForm::dense ? 0 : sequence;
    cos += table * rope.table_stride;
    sin += table * rope.table_stride;
    width = rope.grids == nullptr ? static_cast<int>(rope.w) : rope.grids[2 * sequence + 1];
    wide = quarter % 4 == 0;
  }
  __device__ bool none() const { return rope.form == RopeForm::none; }
  // Are the members of a pair D/2 channels apart?
  __device__ bool split() const { return !none() && !rope.interleaved; }

  __device__ RopeLine line(int token) const {
    const int patch = static_cast<int>(rope_patch(rope, sequence, token));
    if (patch < 0) return {-1, -1};
    if (rope.form != RopeForm::axis) return {patch * 2 * quarter, (patch * 2 + 1) * quarter};
    const int y = static_cast<int>(static_cast<unsigned>(patch) / static_cast<unsigned>(width));
    const int row = y * quarter, column = (static_cast<int>(rope.h) + patch - y * width) * quarter;
    return rope.swap ? RopeLine{column, row} : RopeLine{row, column};
  }
  // Of tokens start ... of the sequence, by the CTA's threads.
  __device__ void lines(RopeLine* to, int rows, int start, int length) const {
    if (none()) return;
    for (int i = threadIdx.x; i < rows; i += blockDim.x)
      to[i] = start + i < length ? line(start + i) : RopeLine{-1, -1};
  }

  __device__ void angles(const float* table, const RopeLine& at, int pair, float (&v)[4]) const {
    if (wide) {
      load_pack<4>(table + (pair < quarter ? at.first + pair : at.second + pair - quarter), v);
    } else {
      const int next = pair + 2;
      load_pack<2>(table + (pair < quarter ? at.first + pair : at.second + pair - quarter), v);
      load_pack<2>(table + (next < quarter ? at.first + next : at.second + next - quarter), v + 2);
    }
  }
  // Channels of a unit, pairs adjacent.
  template <bool kInverse>
  __device__ void apply(const RopeLine& at, int unit, float (&v)[kUnit]) const {
    if (at.first < 0) return;
    float c[4], s[4];
    angles(cos, at, unit * 4, c);
    angles(sin, at, unit * 4, s);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float a = v[2 * i], b = v[2 * i + 1], bs = b * s[i], as = a * s[i];
      v[2 * i] = kInverse ? fmaf(a, c[i], bs) : fmaf(a, c[i], -bs);
      v[2 * i + 1] = kInverse ? fmaf(b, c[i], -as) : fmaf(b, c[i], as);
    }
  }
};

// Both members of 4 pairs: members adjacent <-> first members, then second members.
__device__ inline void join_pairs(float (&v)[kUnit]) {
  const float w[kUnit] = {v[0], v[4], v[1], v[5], v[2], v[6], v[3], v[7]};
#pragma unroll
  for (int i = 0; i < kUnit; ++i) v[i] = w[i];
}
__device__ inline void split_pairs(float (&v)[kUnit]) {
  const float w[kUnit] = {v[0], v[2], v[4], v[6], v[1], v[3], v[5], v[7]};
#pragma unroll
  for (int i = 0; i < kUnit; ++i) v[i] = w[i];
}

// ---- units ----------------------------------------------------------------------------------------------------------
// kN channels of 16 bits as one access.
template <int kN, class T>
__device__ void load_channels(const T* p, float* v) {
  static_assert(sizeof(T) == 2);
  const Pack<uint32_t, kN / 2> pack = *reinterpret_cast<const Pack<uint32_t, kN / 2>*>(p);
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) {
    if constexpr (std::is_same_v<T, bf16>) {
      v[2 * i] = __uint_as_float(pack.item[i] << 16);
      v[2 * i + 1] = __uint_as_float(pack.item[i] & 0xffff0000u);
    } else {
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(pack.item[i]));
      v[2 * i] = pair.x;
      v[2 * i + 1] = pair.y;
    }
  }
}

// One access each: nvcc may split the store of a vector whose words were computed apart.
__device__ inline void store_words(uint32_t shared, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(shared), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ inline void store_words(void* global, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(global), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ inline void store_words(void* global, uint32_t a, uint32_t b) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};\n" ::"l"(global), "r"(a), "r"(b) : "memory");
}
// To a shared address or a global pointer.
template <class At>
__device__ void store_floats(At at, const float* v) {
  store_words(at, __float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
}

// kN channels to global memory.
template <int kN, class T>
__device__ void store_channels(T* p, const float* v) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kN; i += 4) store_floats(static_cast<void*>(p + i), v + i);
  } else if constexpr (kN == 4) {
    store_words(p, packed<T>(v[0], v[1]), packed<T>(v[2], v[3]));
  } else {
    store_words(static_cast<void*>(p), packed<T>(v[0], v[1]), packed<T>(v[2], v[3]), packed<T>(v[4], v[5]),
                packed<T>(v[6], v[7]));
  }
}

// In shared memory a unit of float32 is two accesses; where `flip`, every other four lanes, the second half goes first,
// so that eight lanes meet all banks.
template <class T>
__device__ void load_unit(const T* p, bool flip, float (&v)[kUnit]) {
  if constexpr (sizeof(T) == 2) {
    load_channels<kUnit>(p, v);
  } else {
    float a[4], b[4];
    load_pack<4>(p + (flip ? 4 : 0), a);
    load_pack<4>(p + (flip ? 0 : 4), b);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[i] = flip ? b[i] : a[i];
      v[4 + i] = flip ? a[i] : b[i];
    }
  }
}

template <class T>
__device__ void store_unit(T* p, bool flip, const float (&v)[kUnit]) {
  if constexpr (sizeof(T) == 2) {
    store_words(shared_address(p), packed<T>(v[0], v[1]), packed<T>(v[2], v[3]), packed<T>(v[4], v[5]),
                packed<T>(v[6], v[7]));
  } else {
    float a[4], b[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = flip ? v[4 + i] : v[i];
      b[i] = flip ? v[i] : v[4 + i];
    }
    store_floats(shared_address(p + (flip ? 4 : 0)), a);
    store_floats(shared_address(p + (flip ? 0 : 4)), b);
  }
}

// ---- tiles ----------------------------------------------------------------------------------------------------------
template <int kBytes>
__device__ void copy_async(void* shared, const void* global, bool there) {
#pragma unroll
  for (int i = 0; i < kBytes; i += 16) {
    void* to = static_cast<char*>(shared) + i;
    const void* from = static_cast<const char*>(global) + i;
    if constexpr (kBytes == 8)
      copy_async_8(to, from, there);
    else
      copy_async_16(to, from, there);
  }
}

// f(row, unit) for the units of a tile that hold channels of the head, always in the same threads: eight lanes side by
// side on a row.
template <int kDim, class F>
__device__ void for_units(int rows, const F& f) {
  constexpr int kUnits = kDim / kUnit, kSide = kUnits < 8 ? kUnits : 8;
  const int side = threadIdx.x % kSide, step = static_cast<int>(blockDim.x) / kSide;
  for (int row = static_cast<int>(threadIdx.x) / kSide; row < rows; row += step)
#pragma unroll
    for (int unit = side; unit < kUnits + side; unit += kSide)
      if (kUnits % kSide == 0 || unit < kUnits) f(row, unit);
}

// Starts to copy rows start ... of a head; what lies beyond its D channels and the sequence's tokens becomes zero.
template <class T, int kDim>
__device__ void load_tile(T* tile, int rows, const HeadRows<T>& head, int start, int length, int D, bool split) {
  for_units<kDim>(rows, [&](int row, int unit) {
    const bool there = start + row < length && unit * kUnit < D;
    const T* from = there ? head.row(start + row) + (split ? unit * 4 : unit * kUnit) : head.data;
    T* to = tile + row * kPitch<T, kDim> + unit * kUnit;
    if (split) {
      copy_async<4 * sizeof(T)>(to, from, there);
      copy_async<4 * sizeof(T)>(to + 4, there ? from + D / 2 : from, there);
    } else {
      copy_async<kUnit * sizeof(T)>(to, from, there);
    }
  });
}

// Rotates the units that this thread copied.
template <class T, int kDim>
__device__ void rotate_tile(T* tile, int rows, const RopeLine* lines, const Rotation& rotation, int D) {
  if (rotation.none()) return;
  const bool split = rotation.split(), flip = threadIdx.x / 4 % 2;
  for_units<kDim>(rows, [&](int row, int unit) {
    const RopeLine line = lines[row];
    if (unit * kUnit >= D || (line.first < 0 && !split)) return;
    T* at = tile + row * kPitch<T, kDim> + unit * kUnit;
    float v[kUnit];
    load_unit(at, flip, v);
    if (split) join_pairs(v);
    rotation.apply<false>(line, unit, v);
    store_unit(at, flip, v);
  });
}

// Rows of a tile of kRows of which `rows` count, in whole parts.
template <int kRows>
__device__ int part_rows(int rows) {
  return min(kRows, (rows + kSubtile - 1) / kSubtile * kSubtile);
}

// ---- products of tiles, by a warp -----------------------------------------------------------------------------------
// Step k of the channels of 16 rows, as the first operand.
template <class T, int kDim>
__device__ void load_operand(uint32_t (&a)[4], const T* rows, int k) {
  const int lane = threadIdx.x % 32;
  load_matrices(a, reinterpret_cast<const char*>(rows + lane % 16 * kPitch<T, kDim>) + k * 32 + lane / 16 * 16);
}

// 16 rows as the first operand of many products: in registers, or read again each time.
template <class T, int kDim, bool kInRegisters>
struct Operand {
  static constexpr int kSteps = kDim / kMmaK<T>;
  const T* rows;
  uint32_t fragments[kInRegisters ? kSteps : 1][4];

  __device__ explicit Operand(const T* rows) : rows(rows) {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) load_operand<T, kDim>(fragments[k], rows, k);
    }
  }
  __device__ void step(int k, uint32_t (&a)[4]) const {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = fragments[k][i];
    } else {
      load_operand<T, kDim>(a, rows, k);
    }
  }
};

// s = a times the transposed rows of b.
template <class T, bool kTf32, int kDim, int kColumns, class A>
__device__ void rows_by_rows(float (&s)[kColumns / 8][4], const A& a, const T* b) {
  const int lane = threadIdx.x % 32;
  const char* mine =
      reinterpret_cast<const char*>(b + (lane % 8 + lane / 16 * 8) * kPitch<T, kDim>) + lane / 8 % 2 * 16;
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] = 0.f;
  constexpr int kAtOnce = sizeof(T) == 4 && !kTf32 ? 2 : A::kSteps;  // split operands take many registers
#pragma unroll(kAtOnce)
  for (int k = 0; k < A::kSteps; ++k) {
    uint32_t x[4];
    a.step(k, x);
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t y[4];
      load_matrices(y, mine + n * 16 * kPitch<T, kDim> * static_cast<int>(sizeof(T)) + k * 32);
      mma<T, kTf32>(s[2 * n], x, {y[0], y[1]});
      mma<T, kTf32>(s[2 * n + 1], x, {y[2], y[3]});
    }
  }
}

// acc += p times the rows of b, p as the products before left it.
template <class T, bool kTf32, int kDim, int kColumns>
__device__ void add_tile_by_rows(float (&acc)[kDim / 8][4], const float (&p)[kColumns / 8][4], const T* b) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    const T* mine = b + lane % 16 * kPitch<T, kDim> + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) {
      const uint32_t x[4] = {packed<T>(p[2 * k][0], p[2 * k][1]), packed<T>(p[2 * k][2], p[2 * k][3]),
                             packed<T>(p[2 * k + 1][0], p[2 * k + 1][1]), packed<T>(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        uint32_t y[4];
        load_matrices_transposed(y, mine + k * 16 * kPitch<T, kDim> + n * 16);
        mma<T, kTf32>(acc[2 * n], x, {y[0], y[1]});
        mma<T, kTf32>(acc[2 * n + 1], x, {y[2], y[3]});
      }
    }
  } else {
    // A lane has columns 2t and 2t + 1 of p and wants t and t + 4: the rows of b are taken in that order instead.
    const T* mine = b + lane % 4 * 2 * kPitch<T, kDim> + lane / 4;
    constexpr int kSteps = kColumns / 8, kAtOnce = kTf32 || kDim < 96 ? kSteps : 1;  // as above
#pragma unroll(kAtOnce)
    for (int k = 0; k < kSteps; ++k) {
      float scores[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[i] = p[0][i];
#pragma unroll
        for (int j = 1; j < kSteps; ++j) scores[i] = k == j ? p[j][i] : scores[i];
      }
      const uint32_t x[4] = {__float_as_uint(scores[0]), __float_as_uint(scores[2]), __float_as_uint(scores[1]),
                             __float_as_uint(scores[3])};
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const T* at = mine + k * 8 * kPitch<T, kDim> + n * 8;
        mma<T, kTf32>(acc[n], x, {__float_as_uint(at[0]), __float_as_uint(at[kPitch<T, kDim>])});
      }
    }
  }
}

// ---- which scores count ---------------------------------------------------------------------------------------------
// Bit i of `words`, shifted by this lane's first column of a product: may key start + i be attended to?
template <int kColumns>
struct Keys {
  uint32_t words[(kColumns + 31) / 32];

  __device__ Keys(const RopeAttentionParams& p, const Place& place, int start) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < (kColumns + 31) / 32; ++i) {
      const int key = start + i * 32 + lane;
      const bool there = key < place.length && (p.key_mask == nullptr || p.key_mask[int64_t{place.sample} * p.S + key]);
      words[i] = __ballot_sync(0xffffffffu, there) >> (lane % 4 * 2);
    }
  }
  // Column 8 n + i of this lane's two.
  __device__ bool operator()(int n, int i) const { return words[n / 4] >> (n % 4 * 8 + i) & 1; }
};

// Scores of rows first_row ... (of this warp) with keys start ...: those that do not count become -inf.
template <int kColumns>
__device__ void mask_scores(float (&s)[kColumns / 8][4], const RopeAttentionParams& p, const Place& place,
                            int first_row, int start) {
  const bool crosses = p.causal && start + kColumns - 1 > first_row;
  if (start + kColumns <= place.length && p.key_mask == nullptr && !crosses) return;
  const Keys<kColumns> keys(p, place, start);
  const int lane = threadIdx.x % 32, row = first_row + lane / 4, column = start + lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (!keys(n, i % 2) || (p.causal && column + n * 8 + i % 2 > row + i / 2 * 8)) s[n][i] = -kInfinity;
}

// ---- tiles one after the other --------------------------------------------------------------------------------------
// Two stages: load(i, stage) starts copies, arrive(i, stage) follows when this thread's have landed, use(i, stage) when
// everyone's have. The first load has been made by the caller; before the loop comes a barrier.
template <class Load, class Arrive, class Use>
__device__ void pipeline(int count, const Load& load, const Arrive& arrive, const Use& use) {
  for (int i = 0; i < count; ++i) {
    copy_async_wait<0>();
    arrive(i, i % 2);
    __syncthreads();
    if (i + 1 < count) {
      load(i + 1, (i + 1) % 2);
      copy_async_commit();
    }
    use(i, i % 2);
  }
}

// use<kColumns>(at) for the columns of a tile: all at once, or what there is of the last one in parts.
template <int kColumns, class Use>
__device__ void by_parts(int columns, const Use& use) {
  if constexpr (kColumns == kSubtile) {
    use.template operator()<kColumns>(0);
  } else {
    if (columns >= kColumns) return use.template operator()<kColumns>(0);
#pragma unroll 1
    for (int at = 0; at < columns; at += kSubtile) use.template operator()<kSubtile>(at);
  }
}

// ---- to memory ------------------------------------------------------------------------------------------------------
template <int kDim>
constexpr int kStagingPitch = kDim + 8;  // floats: 8 rows of two lanes each meet all banks

// A warp's 16 rows of sums, un-rotated where there is a rotation (lines of these rows), as rows start ... of a head.
template <class T, int kDim>
__device__ void store_rows(const float (&acc)[kDim / 8][4], float* staging, const HeadRows<T>& head, int start,
                           int length, int D, const Rotation* rotation = nullptr, const RopeLine* lines = nullptr) {
  constexpr int kUnits = kDim / kUnit;
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
    float* at = staging + lane / 4 * kStagingPitch<kDim> + n * 8 + lane % 4 * 2;
    store_pack<2>(at, acc[n]);
    store_pack<2>(at + 8 * kStagingPitch<kDim>, acc[n] + 2);
  }
  __syncwarp();
  const bool rotated = rotation != nullptr && !rotation->none(), split = rotated && rotation->split();
#pragma unroll 2
  for (int i = lane; i < kWarpRows * kUnits; i += 32) {
    const int row = i / kUnits, unit = i % kUnits;
    if (start + row >= length || unit * kUnit >= D) continue;
    float v[kUnit];
    load_unit(staging + row * kStagingPitch<kDim> + unit * kUnit, lane / 4 % 2, v);
    if (rotated) rotation->apply<true>(lines[row], unit, v);
    T* to = head.row(start + row) + (split ? unit * 4 : unit * kUnit);
    if (split) {
      split_pairs(v);
      store_channels<4>(to, v);
      store_channels<4>(to + D / 2, v + 4);
    } else {
      store_channels<kUnit>(to, v);
    }
  }
}

// ---- launching ------------------------------------------------------------------------------------------------------
// Blocks of at most kMaxWarps * 16 rows, as equal as can be.
struct Blocks {
  int count, warps;
  Blocks(int64_t rows, int max_warps) {
    count = static_cast<int>(ceil_div<int64_t>(rows, max_warps * kWarpRows));
    warps = static_cast<int>(ceil_div<int64_t>(ceil_div<int64_t>(rows, count), kWarpRows));
  }
};

template <class F>
const char* by_head_dim(int64_t D, const F& f) {
  if (D <= 32) return f.template operator()<32>();
  if (D <= 64) return f.template operator()<64>();
  if (D <= 96) return f.template operator()<96>();
  return f.template operator()<128>();
}

// f.template operator()<T, kTf32, kDim>().
template <class F>
const char* by_type(const RopeAttentionParams& p, const F& f) {
  if (p.D % kUnit != 0 || p.D > 128) return "needs a head dim of 8..128 in steps of 8";
  return by_dtype(p.dtype, [&]<class T>() {
    return by_head_dim(p.D, [&]<int kDim>() {
      if constexpr (sizeof(T) == 4)
        return by_bool(p.tf32, [&]<bool kTf32>() { return f.template operator()<T, kTf32, kDim>(); });
      else
        return f.template operator()<T, false, kDim>();
    });
  });
}

constexpr int kMaxShared = 96 << 10;  // of 99 KB that every device has, the rest for static arrays

// Starts kernel(p, blocks, more...) on heads * sequences * blocks CTAs.
template <class... More>
const char* launch_attention(void (*kernel)(RopeAttentionParams, int, More...), const RopeAttentionParams& p,
                             const Blocks& blocks, int64_t heads, size_t shared, const Device& device, More... more) {
  const int64_t ctas = p.B * heads * blocks.count;
  if (ctas > INT32_MAX) return "too many blocks for one launch";
  if (shared > kMaxShared) return "too much shared memory";
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxShared);
  kernel<<<static_cast<unsigned>(ctas), static_cast<unsigned>(blocks.warps) * 32, shared, stream_of(device)>>>(
      p, blocks.count, more...);
  return launch_error();
}

}  // namespace eva02::cuda
