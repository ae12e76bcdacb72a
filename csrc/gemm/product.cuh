// The tile loop of the matrix products, and what their epilogues share.
//
// A CTA of 4 warps takes a tile of the product and all of K in steps of 64 bytes, which wait in shared memory in
// kStages tiles filled by asynchronous copies. Operands lie there as in memory: rows of 64 bytes of k, or k rows of the
// tile's other index; pieces of 16 bytes are permuted so that neither ldmatrix nor the plain loads of float32 meet a
// bank twice. Sums are handed to the epilogue as 8 consecutive columns of a row per thread, after an exchange between
// the four lanes that hold a row: its loads and stores are then of whole sectors.
#pragma once

#include "common/mma.cuh"
#include "common/rows.cuh"
#include "gemm/product.h"

namespace eva02::cuda {

constexpr int kProductThreads = 128, kWarps = 4;
constexpr int kStages = 4;
constexpr int kStepBytes = 64;  // of k in a stage: two steps of mma
constexpr int kGroupRows = 8;   // tile rows whose CTAs run one after the other for a tile column: both stay in L2
constexpr int kColumns = 8;     // consecutive columns that a thread's epilogue takes

// A warp's part of a CTA's tile is kWarpM x 64; warps are kWarpsM x (4 / kWarpsM).
template <int kWarpM_, int kWarpsM_, int kCtas_>
struct Tile {
  static constexpr int kCtas = kCtas_;  // resident on a multiprocessor, which leaves that many registers
  static constexpr int kWarpM = kWarpM_, kWarpsM = kWarpsM_, kWarpN = 64;
  static constexpr int kM = kWarpM * kWarpsM, kN = kWarpN * (kWarps / kWarpsM);
  static constexpr int kStageBytes = (kM + kN) * kStepBytes;
  static constexpr int kBytes = kStages * kStageBytes;
};
using LargeTile = Tile<64, 2, 2>;  // 128 x 128
using SmallTile = Tile<16, 4, 4>;  // 64 x 64

// ---- 8 columns of a row ---------------------------------------------------------------------------------------------
// n of them exist.
template <class T>
__device__ void load_columns(const T* p, int n, float (&v)[kColumns]) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (n >= kColumns && address % 16 == 0) return load_pack<kColumns>(p, v);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) v[i] = i < n ? to_float(p[i]) : 0.f;
}

template <class T>
__device__ void store_columns(T* p, int n, const float (&v)[kColumns]) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (n >= kColumns && address % 16 == 0) return store_pack<kColumns>(p, v);
  if (sizeof(T) == 2 && n >= kColumns && address % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kColumns; i += 2) store_pack<2>(p + i, v + i);
    return;
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i)
    if (i < n) p[i] = from_float<T>(v[i]);
}

// Columns first ... of a parameter, `absent` where there is none.
__device__ inline void load_columns(const Param& param, int64_t first, int n, float absent, float (&v)[kColumns]) {
  if (param.data == nullptr) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) v[i] = absent;
    return;
  }
  switch (param.dtype) {
    case DType::f32: return load_columns(static_cast<const float*>(param.data) + first, n, v);
    case DType::bf16: return load_columns(static_cast<const bf16*>(param.data) + first, n, v);
    case DType::f16: return load_columns(static_cast<const f16*>(param.data) + first, n, v);
  }
}

// A row of a hidden tensor, whose padding becomes zero: a product's columns beyond the last are zero, loaded ones too.
template <class T>
__device__ void store_hidden(void* p, int64_t row, int64_t stride, int64_t column, const float (&v)[kColumns]) {
  if (p != nullptr) store_columns(static_cast<T*>(p) + row * stride + column, kColumns, v);
}

// Of four pairs of columns, one from each n tile, the four lanes of a row get all pairs of one n tile each.
__device__ inline void exchange_columns(float (&v)[4][2]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
#pragma unroll
    for (int low = 0; low < 4; ++low) {
      if (low & bit) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float &a = v[low][i], &b = v[low | bit][i];
        const float got = __shfl_xor_sync(0xffffffffu, t & bit ? a : b, bit);
        (t & bit ? a : b) = got;
      }
    }
  }
}

// ---- operands in shared memory --------------------------------------------------------------------------------------
constexpr int kPiece = 16;  // bytes

// Outer indices of an operand from `first` on; zeros from `limit` on. With a second operand of the same stride, of 64
// indices the first 32 are of the one, the others of the other.
struct OuterRange {
  const void *data, *data2;
  int64_t stride;
  int first, limit;
};

// kOuter indices by a step of k.
template <class T, bool kKContiguous, int kOuter, bool kTwo = false>
struct OperandTile {
  static constexpr int kElements = kPiece / sizeof(T);  // in a piece
  static constexpr int kStep = kStepBytes / sizeof(T);
  static constexpr int kRowPieces = kKContiguous ? kStepBytes / kPiece : kOuter / kElements;
  static constexpr int kRowBytes = kRowPieces * kPiece;
  static constexpr int kCopies = kOuter * kStepBytes / kPiece / kProductThreads;  // of a thread
  static constexpr int kCopyRows = kProductThreads / kRowPieces;                  // from a copy to the next
  static_assert(!kTwo || (kKContiguous && kCopyRows == 32));

  // Place of a piece in its row: without it lanes of one access would share banks. Rows of a thread's copies agree.
  static __device__ int swizzled(int row, int piece) {
    if constexpr (kKContiguous) return piece ^ (row / 2 % 4);
    if constexpr (sizeof(T) == 2) return piece ^ (row % 8);
    return piece ^ (row % 4 * 2);
  }
  static __device__ uint32_t offset(int row, int piece) { return row * kRowBytes + swizzled(row, piece) * kPiece; }

  // ---- this thread's copies from memory; steps are called for in order
  const char* from;
  int64_t copy_bytes, step_bytes, other_bytes;  // from a copy, a step, the first operand to the next
  uint32_t to;
  int left;   // of what the steps run along: elements of k from this thread's piece on, or k rows from its row on
  int there;  // bytes of a piece that exist across it, of the copy j in bits 5j to 5j + 4
  bool aligned;

  __device__ OperandTile(const OuterRange& range, int K) {
    const int row = static_cast<int>(threadIdx.x) / kRowPieces, piece = static_cast<int>(threadIdx.x) % kRowPieces;
    const int i = range.first + (kKContiguous ? row : piece * kElements), k = kKContiguous ? piece * kElements : row;
    const int64_t stride = range.stride * static_cast<int64_t>(sizeof(T));
    from = static_cast<const char*>(range.data) +
           (kKContiguous ? i * stride + k * static_cast<int>(sizeof(T)) : k * stride + i * static_cast<int>(sizeof(T)));
    copy_bytes = kCopyRows * stride;
    step_bytes = kKContiguous ? kStepBytes : kStep * stride;
    other_bytes = static_cast<const char*>(range.data2) - static_cast<const char*>(range.data);
    to = offset(row, piece);
    left = K - k;
    there = 0;
#pragma unroll
    for (int j = 0; j < kCopies; ++j) {
      const int count = range.limit - (kKContiguous ? i + (kTwo ? j / 2 : j) * kCopyRows : i);
      const int bytes =
          kKContiguous ? (count > 0 ? kPiece : 0) : max(0, min(count, kElements)) * static_cast<int>(sizeof(T));
      there |= bytes << (5 * j);
    }
    aligned =
        (reinterpret_cast<uintptr_t>(range.data) | (kTwo ? reinterpret_cast<uintptr_t>(range.data2) : 0)) % 16 == 0 &&
        stride % 16 == 0;
  }

  // Fill the tile at shared address `tile`.
  __device__ void load(char* tile) {
    const uint32_t place = shared_address(tile) + to;
#pragma unroll
    for (int j = 0; j < kCopies; ++j) {
      const char* source = from + (kTwo ? j / 2 : j) * copy_bytes + (kTwo && j % 2 ? other_bytes : 0);
      int bytes = there >> (5 * j) & 31;
      if constexpr (kKContiguous) {
        bytes = min(bytes, max(0, min(left, kElements)) * static_cast<int>(sizeof(T)));
      } else {
        bytes = j * kCopyRows < left ? bytes : 0;
      }
      if (aligned)
        copy_async_part(place + j * kCopyRows * kRowBytes, source, bytes);
      else
        copy(tile + to + j * kCopyRows * kRowBytes, source, bytes);
    }
    from += step_bytes;
    left -= kStep;
  }
  static __device__ void copy(char* to, const char* from, int bytes) {
    Pack<T, kElements> pack;
#pragma unroll
    for (int e = 0; e < kElements; ++e)
      pack.item[e] = e * static_cast<int>(sizeof(T)) < bytes ? reinterpret_cast<const T*>(from)[e] : from_float<T>(0.f);
    *reinterpret_cast<Pack<T, kElements>*>(to) = pack;
  }

  // ---- fragments
  // Where this lane reads of what begins at outer index `first`, in bytes; an index i and a mma step beyond it are
  // at_fragment's to add. A: the four matrices are two of i by two of k; B: two of k by two of i.
  static __device__ uint32_t fragment_a(int first) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, line = lane % 8;
    if constexpr (kKContiguous) return offset(first + matrix % 2 * 8 + line, matrix / 2);
    if constexpr (sizeof(T) == 2) return offset(matrix / 2 * 8 + line, first / 8 + matrix % 2);
    return fragment_of_elements(first);
  }
  static __device__ uint32_t fragment_b(int first) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, line = lane % 8;
    if constexpr (kKContiguous) return offset(first + matrix / 2 * 8 + line, matrix % 2);
    if constexpr (sizeof(T) == 2) return offset(matrix % 2 * 8 + line, first / 8 + matrix / 2);
    return fragment_of_elements(first);
  }
  static __device__ uint32_t fragment_of_elements(int first) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    return offset(t, (first + g) / kElements) + g % kElements * sizeof(T);
  }
  // Registers from outer index i (a multiple of 16, within 64) and mma step `step` beyond `fragment`; the swizzle makes
  // a sum an exclusive or. kA: pairs of matrices in the order of A's fragment.
  template <bool kA>
  static __device__ void load_fragment(uint32_t (&r)[4], char* tile, uint32_t fragment, int i, int step) {
    const uint32_t address = shared_address(tile);
    if constexpr (kKContiguous) {
      load_matrices(r, address + (fragment ^ step * 32) + i * kRowBytes);
    } else if constexpr (sizeof(T) == 2) {
      load_matrices_transposed(r, address + (fragment ^ i * 2) + step * 16 * kRowBytes);
    } else {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int outer = (kA ? q % 2 : q / 2) * 8, k = step * 8 + (kA ? q / 2 : q % 2) * 4;
        r[q] = *reinterpret_cast<const uint32_t*>(tile + (fragment ^ (i + outer) * 4) + k * kRowBytes);
      }
    }
  }
};

__host__ __device__ inline const Product& product_of(const ProjectNormedParams& params) {
  return params.project.product;
}
template <class Params>
__host__ __device__ const Product& product_of(const Params& params) {
  return params.product;
}

// Where the columns of B are: of parts that are apart, a tile is of one.
struct ColumnPart {
  const void *b, *b2;
  int N, first_tile, index;
};

template <class Params>
__host__ __device__ int column_tiles(const Params& params, int tile) {
  if constexpr (std::is_same_v<Params, ProjectPartsParams>) {
    int64_t tiles = 0;
    for (const int64_t width : params.widths) tiles += ceil_div<int64_t>(width, tile);
    return static_cast<int>(tiles);
  } else {
    return static_cast<int>(ceil_div<int64_t>(product_of(params).N, tile));
  }
}

// That of column tile `at`.
template <class Params>
__device__ ColumnPart column_part(const Params& params, int tile, int at) {
  if constexpr (std::is_same_v<Params, ProjectPartsParams>) {
    const int width0 = static_cast<int>(params.widths[0]), width1 = static_cast<int>(params.widths[1]);
    const int end0 = ceil_div(width0, tile), end1 = end0 + ceil_div(width1, tile);
    if (at < end0) return {params.weights[0], nullptr, width0, 0, 0};
    if (at < end1) return {params.weights[1], nullptr, width1, end0, 1};
    return {params.weights[2], nullptr, static_cast<int>(params.widths[2]), end1, 2};
  } else {
    const Product& p = product_of(params);
    return {p.b.data, p.b2.data, static_cast<int>(p.N), 0, 0};
  }
}

// ---- kernels --------------------------------------------------------------------------------------------------------
// An Epilogue is made of its parameters and of a thread's first column, and called with a row and 8 columns of the
// product; kDual: of both products; kWholeWarps: by every lane, for rows and columns beyond the last too. Column sums
// of what a call leaves in its arguments go to partial sums, if kSums; sums of A's rows over k to store_row_sum, if
// kRowSums.
template <class T, bool kTf32, bool kAK, bool kBK, class Tile, class Epilogue>
__global__ void __launch_bounds__(kProductThreads, kTf32 ? Tile::kCtas : 3)
    product_kernel(const __grid_constant__ typename Epilogue::Params params, float* sums) {
  constexpr bool kDual = Epilogue::kDual;
  constexpr int kTileN = kDual ? Tile::kN / 2 : Tile::kN;  // columns of each product
  constexpr int kMTiles = Tile::kWarpM / 16, kNTiles = Tile::kWarpN / 8;
  // Steps of mma that are summed on their own: of three parts of float32 both, which halves the chain of sums over K.
  constexpr int kSteps = kStepBytes / 32, kTogether = kTf32 ? 1 : kSteps;
  using A = OperandTile<T, kAK, Tile::kM>;
  using B = OperandTile<T, kBK, Tile::kN, kDual>;
  extern __shared__ __align__(128) char shared[];
  const Product& p = product_of(params);
  const int rows = static_cast<int>(p.rows), K = static_cast<int>(p.K);

  const int tiles_m = ceil_div(rows, Tile::kM), tiles_n = column_tiles(params, kTileN);
  const int group = static_cast<int>(blockIdx.x) / (kGroupRows * tiles_n), within = blockIdx.x % (kGroupRows * tiles_n);
  const int height = min(kGroupRows, tiles_m - group * kGroupRows);
  const int tile_m = group * kGroupRows + within % height;
  const ColumnPart part = column_part(params, kTileN, within / height);
  const int first_row = tile_m * Tile::kM, first_column = (within / height - part.first_tile) * kTileN, N = part.N;

  A a_tile({p.a.data, nullptr, p.a.stride, first_row, rows}, K);
  B b_tile({part.b, part.b2, p.b.stride, first_column, N}, K);
  const int steps = ceil_div(K, A::kStep);
  const auto load = [&](int step) {
    char* stage = shared + step % kStages * Tile::kStageBytes;
    if (step < steps) {
      a_tile.load(stage);
      b_tile.load(stage + Tile::kM * kStepBytes);
    }
    copy_async_commit();
  };

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp % Tile::kWarpsM * Tile::kWarpM, warp_n = warp / Tile::kWarpsM * Tile::kWarpN;
  const uint32_t a_fragment = A::fragment_a(warp_m), b_fragment = B::fragment_b(warp_n);
  float acc[kMTiles][kNTiles][4] = {};
  float row_sums[Epilogue::kRowSums ? kMTiles : 1][4] = {};
  bool sums_rows = false;
  if constexpr (Epilogue::kRowSums) sums_rows = first_column == 0 && warp_n == 0 && params.sums_rows;
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    load(step + kStages - 1);
    char* stage = shared + step % kStages * Tile::kStageBytes;
#pragma unroll
    for (int k = 0; k < kSteps; k += kTogether) {
      uint32_t a[kMTiles][kTogether][4];
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int j = 0; j < kTogether; ++j) A::template load_fragment<true>(a[m][j], stage, a_fragment, m * 16, k + j);
      if constexpr (Epilogue::kRowSums) {
        if (sums_rows) {
          const uint32_t ones[2] = {two_ones<T>(), two_ones<T>()};
#pragma unroll
          for (int m = 0; m < kMTiles; ++m)
#pragma unroll
            for (int j = 0; j < kTogether; ++j) mma<T, false>(row_sums[m], a[m][j], ones);
        }
      }
#pragma unroll
      for (int n = 0; n < kNTiles; n += 2) {
        uint32_t b[kTogether][4];
#pragma unroll
        for (int j = 0; j < kTogether; ++j)
          B::template load_fragment<false>(b[j], stage + Tile::kM * kStepBytes, b_fragment, n * 8, k + j);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int m = 0; m < kMTiles; ++m) {
            if constexpr (kTf32) {
              mma<T, true>(acc[m][n + half], a[m][0], {b[0][2 * half], b[0][2 * half + 1]});
            } else {
              float part[4] = {};
#pragma unroll
              for (int j = 0; j < kTogether; ++j) mma_parts(part, a[m][j], {b[j][2 * half], b[j][2 * half + 1]});
#pragma unroll
              for (int i = 0; i < 4; ++i) acc[m][n + half][i] += part[i];
            }
          }
        }
      }
    }
  }

#pragma unroll
  for (int n = 0; n < kNTiles; n += kDual ? kNTiles : 4) {
    const int column = first_column + (kDual ? warp_n / 2 : warp_n + n * 8) + lane % 4 * kColumns;
    const Epilogue epilogue = [&] {
      if constexpr (std::is_same_v<typename Epilogue::Params, ProjectPartsParams>)
        return Epilogue(params, column, N - column, part.index);
      else
        return Epilogue(params, column, N - column);
    }();
    float total[2][kColumns] = {};
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + warp_m + m * 16 + half * 8 + lane / 4;
        float v[2][4][2];
#pragma unroll
        for (int product = 0; product < (kDual ? 2 : 1); ++product) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            v[product][j][0] = acc[m][n + product * 4 + j][2 * half];
            v[product][j][1] = acc[m][n + product * 4 + j][2 * half + 1];
          }
          exchange_columns(v[product]);
        }
        auto& y = reinterpret_cast<float (&)[kColumns]>(v[0]);
        auto& y2 = reinterpret_cast<float (&)[kColumns]>(v[1]);
        if constexpr (Epilogue::kWholeWarps) {
          epilogue(row, y, y2);
          continue;
        }
        if (row >= rows || column >= N) continue;
        epilogue(row, y, y2);
        if constexpr (Epilogue::kSums) {
#pragma unroll
          for (int i = 0; i < kColumns; ++i) {
            total[0][i] += y[i];
            total[1][i] += y2[i];
          }
        }
      }
    }
    if constexpr (Epilogue::kSums) {
      if (sums == nullptr) continue;
      // A warp's rows, for each of the two sums.
      float* mine = sums + (static_cast<int64_t>(tile_m) * Tile::kWarpsM + warp % Tile::kWarpsM) * 2 * N;
#pragma unroll
      for (int which = 0; which < 2; ++which) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          float x = total[which][i];
#pragma unroll
          for (int lanes = 4; lanes < 32; lanes *= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
          if (lane < 4 && column + i < N) mine[which * N + column + i] = x;
        }
      }
    }
  }
  if constexpr (Epilogue::kRowSums) {
    if (!sums_rows || lane % 4 != 0) return;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + warp_m + m * 16 + half * 8 + lane / 4;
        if (row < rows) Epilogue::store_row_sum(params, row, row_sums[m][2 * half]);
      }
    }
  }
}

// The epilogue alone, of products that are in memory: a thread for 8 columns of a row. Those that also sum columns hold
// most; bound for ten CTAs ptxas leaves them a few registers more than it would, and spills none.
template <class T, class Epilogue>
__global__ void __launch_bounds__(kProductThreads, Epilogue::kSums ? 10 : 0)
    epilogue_kernel(const __grid_constant__ typename Epilogue::Params params) {
  const Product& p = product_of(params);
  const int64_t pieces = ceil_div<int64_t>(p.N, kColumns);
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kProductThreads + threadIdx.x;
  const int64_t row = place / pieces, column = place % pieces * kColumns;
  if (row >= p.rows) return;
  const int n = static_cast<int>(p.N - column);
  float y[kColumns], y2[kColumns];
  load_columns(static_cast<const T*>(p.values) + row * p.values_stride + column, n, y);
  if constexpr (Epilogue::kDual) load_columns(static_cast<const T*>(p.values2) + row * p.values_stride + column, n, y2);
  Epilogue(params, static_cast<int>(column), n)(static_cast<int>(row), y, y2);
}

// ---- launching ------------------------------------------------------------------------------------------------------
inline constexpr char kProductTooLarge[] =
    "a product has more than 2^31 - 1 rows, columns or elements of its inner sum";

// The larger tile where its tiles give every multiprocessor one. The three-part products of float32 need the registers
// of the smaller one.
inline bool large_tiles(const Product& p, bool dual) {
  if (p.dtype == DType::f32 && !p.tf32) return false;
  const int64_t columns = dual ? LargeTile::kN / 2 : LargeTile::kN;
  return ceil_div<int64_t>(p.rows, LargeTile::kM) * ceil_div<int64_t>(p.N, columns) >= num_sms();
}

// Rows of a tile that one warp sums for the columns' sums: the rows of partial sums are ceil(rows / tile) times the
// warps over rows.
inline int64_t sum_parts(const Product& p, bool dual) {
  return large_tiles(p, dual) ? ceil_div<int64_t>(p.rows, LargeTile::kM) * LargeTile::kWarpsM
                              : ceil_div<int64_t>(p.rows, SmallTile::kM) * SmallTile::kWarpsM;
}

template <class T, bool kTf32, bool kAK, bool kBK, class Tile, class Epilogue>
const char* launch_product(const typename Epilogue::Params& params, float* sums, const Device& device) {
  const Product& p = product_of(params);
  const auto kernel = product_kernel<T, kTf32, kAK, kBK, Tile, Epilogue>;
  if (Tile::kBytes > 48 * 1024) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kBytes);
  const int64_t tiles =
      ceil_div<int64_t>(p.rows, Tile::kM) * column_tiles(params, Epilogue::kDual ? Tile::kN / 2 : Tile::kN);
  kernel<<<static_cast<unsigned>(tiles), kProductThreads, Tile::kBytes, stream_of(device)>>>(params, sums);
  return launch_error();
}

// Multiply as the operands lie, or finish a product that is known.
template <class T, bool kAK, bool kBK, template <class> class Epilogue, class Params>
const char* run_product(const Params& params, float* sums, const Device& device) {
  const Product& p = product_of(params);
  if (p.rows == 0 || p.N == 0) return nullptr;
  if (p.rows > INT32_MAX || p.N > INT32_MAX || p.K > INT32_MAX) return kProductTooLarge;
  if (p.values != nullptr) {
    const int64_t places = p.rows * ceil_div<int64_t>(p.N, kColumns);
    epilogue_kernel<T, Epilogue<T>>
        <<<static_cast<unsigned>(ceil_div<int64_t>(places, kProductThreads)), kProductThreads, 0, stream_of(device)>>>(
            params);
    return launch_error();
  }
  if constexpr (sizeof(T) == 4) {
    if (!p.tf32) return launch_product<T, false, kAK, kBK, SmallTile, Epilogue<T>>(params, sums, device);
  }
  if (large_tiles(p, Epilogue<T>::kDual))
    return launch_product<T, true, kAK, kBK, LargeTile, Epilogue<T>>(params, sums, device);
  return launch_product<T, true, kAK, kBK, SmallTile, Epilogue<T>>(params, sums, device);
}

}  // namespace eva02::cuda
