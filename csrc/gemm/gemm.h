// A packed float32 matrix product whose operands are read through functors and whose result ends in a functor, so that
// normalisation, activation, rotation, residual and conversion happen where the data already is in cache.
//
//   C[i, j] = sum_k A(i, k) * B(k, j)
//
// A is packed once per call, by all threads, into panels of kMR rows stored k-major. The columns of C are cut in
// strips; a worker owns a contiguous range of (strip, row panel) units in strip-major order, an equal share of the
// work, packs a strip of B into a buffer of its own (L2) when it comes to it, and runs its row panels against it in
// groups of kGroup. A micro-kernel holds kMR x kNR sums in registers over kKC steps of k, and adds them to a tile of
// float32; a finished tile goes to the epilogue. Every C element is owned by one worker and summed over k in one order,
// whatever the number of threads.
//
// 16-bit operands become float32 in the packing, hence run at the speed of float32.
#pragma once

#include "common/buffer.h"

namespace eva02::EVA02_ISA {

#if defined(__AVX512F__)
constexpr int kMR = 14;
constexpr int kGroup = 4;
#elif defined(__AVX2__)
constexpr int kMR = 6;
constexpr int kGroup = 8;
#else
constexpr int kMR = 4;
constexpr int kGroup = 8;
#endif
constexpr int kNR = 2 * kLanes;
constexpr int64_t kKC = 256;                // k steps between two visits of the tile of C
constexpr int64_t kKB = 1536;               // k steps of a packed strip of B
constexpr int64_t kStripBytes = 384 << 10;  // packed strip of B: the larger part of L2
constexpr int64_t kStripColumns = 512;
constexpr int64_t kSegmentRows = 896;  // rows of C kept open when k takes several strips

// c[i * ldc + j] (+)= sum over k of a[k * kMR + i] * b[k * kNR + j], for i < rows <= kMR and all j < kNR. Meanwhile it
// prefetches as much of next_a, the panel of the next call: A comes from L3 or memory once a strip, and the hardware
// prefetchers do not see the next panel coming.
using MicroKernel = void (*)(int64_t k, const float* a, const float* b, float* c, int64_t ldc, bool accumulate,
                             const float* next_a);
MicroKernel micro_kernel(int64_t rows);

EVA02_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// ---- compile-time loops --------------------------------------------------------------------------------------------
template <int I>
struct Constant {
  static constexpr int value = I;
  constexpr operator int() const { return I; }
};
template <int N, int I = 0, class F>
EVA02_INLINE void static_for(const F& f) {
  if constexpr (I < N) {
    f(Constant<I>{});
    static_for<N, I + 1>(f);
  }
}

// ---- packing -----------------------------------------------------------------------------------------------------
// A source is a matrix with contiguous rows: source.row(r) is a view with load(c) (kLanes columns from c) and
// load_partial(c, n) (n of them). `at` reads the first or the second, as the row has room.
template <class Source>
const Source& declare();
template <class Source>
using RowOf = decltype(declare<Source>().row(0));

template <class Row>
EVA02_INLINE vf at(const Row& row, int64_t c, int64_t n) {
  return n >= kLanes ? row.load(c) : row.load_partial(c, n);
}

#if defined(__AVX512F__)
#define EVA02_SHUFFLES(X)                                           \
  X(1, (0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30), \
    (1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))    \
  X(2, (0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),  \
    (2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))   \
  X(4, (0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),  \
    (4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))   \
  X(8, (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),    \
    (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#elif defined(__AVX2__)
#define EVA02_SHUFFLES(X)                                        \
  X(1, (0, 8, 2, 10, 4, 12, 6, 14), (1, 9, 3, 11, 5, 13, 7, 15)) \
  X(2, (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15)) \
  X(4, (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15))
#else
#define EVA02_SHUFFLES(X)          \
  X(1, (0, 4, 2, 6), (1, 5, 3, 7)) \
  X(2, (0, 1, 4, 5), (2, 3, 6, 7))
#endif
#define EVA02_UNWRAP(...) __VA_ARGS__

// v[i][j] <-> v[j][i]: swaps blocks of 1, 2, 4, ... lanes between rows as far apart.
EVA02_INLINE void transpose(vf (&v)[kLanes]) {
#define EVA02_STAGE(s, low, high)                                  \
  static_for<kLanes>([&](auto i) __attribute__((always_inline)) {  \
    if constexpr ((decltype(i)::value & s) == 0) {                 \
      const vf a = v[i], b = v[i + s];                             \
      v[i] = __builtin_shufflevector(a, b, EVA02_UNWRAP low);      \
      v[i + s] = __builtin_shufflevector(a, b, EVA02_UNWRAP high); \
    }                                                              \
  });
  EVA02_SHUFFLES(EVA02_STAGE)
#undef EVA02_STAGE
}

// Floats between two packed panels of W over k steps. The transposing packer stores whole vectors, so a panel is
// followed by a vector of slack.
template <int W>
constexpr int64_t panel_size(int64_t k) {
  return W % kLanes == 0 ? k * W : (k * W + kLanes + 15) / 16 * 16;
}

// dst[k * W + i] = source(r0 + i, c0 + k), i < rows <= W, k < count: panels across the rows of the source.
template <int W, class Source>
EVA02_INLINE void pack_rows(const Source& source, int64_t r0, int64_t rows, int64_t c0, int64_t count, float* dst) {
  static_assert(W < kLanes || W % kLanes == 0, "a partial block must be the only one");
  for (int block = 0; block < W; block += kLanes) {
    if (block >= rows) {
      for (int64_t k = 0; k < count; ++k) store(dst + k * W + block, vf{});
      continue;
    }
    RowOf<Source> row[kLanes];
    for (int i = 0; i < kLanes; ++i) row[i] = source.row(r0 + min64(block + i, rows - 1));
    vf v[kLanes];
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) {
      static_for<kLanes>([&](auto i) __attribute__((always_inline)) { v[i] = row[i].load(c0 + k); });
      transpose(v);
      float* d = dst + k * W + block;
      static_for<kLanes>([&](auto i) __attribute__((always_inline)) { store(d + i * W, v[i]); });
    }
    if (k < count) {
      const int64_t n = count - k;
      for (int i = 0; i < kLanes; ++i) v[i] = row[i].load_partial(c0 + k, n);
      transpose(v);
      for (int64_t i = 0; i < n; ++i) store(dst + (k + i) * W + block, v[i]);
    }
  }
}

// dst[k * W + i] = source(r0 + k, c0 + i), i < columns <= W, k < count: panels along the rows of the source, which has
// `width` columns in all (a whole vector is read where the row has room for it).
template <int W, class Source>
EVA02_INLINE void pack_columns(const Source& source, int64_t c0, int64_t columns, int64_t width, int64_t r0,
                               int64_t count, float* dst) {
  for (int64_t k = 0; k < count; ++k) {
    const auto row = source.row(r0 + k);
    float* d = dst + k * W;
    for (int block = 0; block < W; block += kLanes) {
      const int64_t n = min64(columns - block, width - c0 - block);
      if (n <= 0)
        store(d + block, vf{});
      else
        store(d + block, c0 + block + kLanes <= width ? row.load(c0 + block) : row.load_partial(c0 + block, n));
    }
  }
}

// ---- the product -------------------------------------------------------------------------------------------------
struct GemmShape {
  int64_t m, n, k;
  int parts = 1;            // C has `parts` blocks of n columns; a strip holds the same columns of each
  int64_t column_unit = 1;  // strips start at multiples of it
};

// Rows [row0, row0 + rows) and columns [col0, col0 + cols) of each part of C.
struct Tile {
  int64_t row0, rows, col0, cols;
  float* data;
  int64_t stride;       // between rows
  int64_t part_stride;  // between parts

  EVA02_INLINE float* row(int64_t r, int part = 0) const { return data + r * stride + part * part_stride; }
};

// Columns of a strip: as many as fit the buffer, evenly shared, and fewer when there are few row panels for the
// workers; a multiple of `unit`.
inline int64_t strip_columns(const GemmShape& s, int64_t row_panels, int64_t threads) {
  const int64_t k = min64(s.k, kKB);
  const int64_t unit = s.column_unit;
  int64_t limit = kStripBytes / (max64(k, 1) * s.parts * static_cast<int64_t>(sizeof(float)));
  limit = max64(min64(limit, kStripColumns / s.parts), kNR);
  if (row_panels < 4 * threads) limit = max64(kNR, min64(limit, ceil_div(s.n * row_panels, 4 * threads)));
  limit = limit / kNR * kNR;
  const int64_t strips = ceil_div(s.n, limit);
  int64_t columns = round_up(ceil_div(s.n, strips), kNR);
  if (unit > 1) {
    // Whole units only: of the widths near the wanted one, the one that wastes the least of its last panel.
    int64_t best = 0;
    double best_waste = 2.;
    const int64_t most = max64(1, min64(ceil_div(columns, unit), limit / unit));
    for (int64_t count = most; count >= max64(1, most / 2); --count) {
      const double waste = static_cast<double>(round_up(count * unit, kNR)) / static_cast<double>(count * unit);
      if (waste < best_waste) best = count, best_waste = waste;
    }
    columns = best * unit;
  }
  return columns;
}

// pack_a(row0, rows, dst): kMR-row panel of A, all k.
// pack_b(part, col0, cols, k0, count, dst): kNR-column panel of B, `count` steps of k.
// epilogue(tile): finished elements; called once for every element of C.
template <class PackA, class PackB, class Epilogue>
void gemm(const Runtime& runtime, const GemmShape& s, const PackA& pack_a, const PackB& pack_b,
          const Epilogue& epilogue) {
  if (s.m <= 0 || s.n <= 0) return;
  const int64_t panels = ceil_div(s.m, kMR);
  const int64_t threads = max64(1, min64(runtime.num_threads, 1 + s.m * s.n * s.parts * s.k / 100000));
  const int64_t strip = strip_columns(s, panels, threads), strips = ceil_div(s.n, strip);
  const int64_t units = panels * strips, workers = min64(threads, units);
  // The first unit of a worker, where it should start: the last strip may be narrower, so work is counted in columns.
  const auto first_unit = [&](int64_t worker) {
    const int64_t work = panels * s.n * worker / workers, before = panels * strip * (strips - 1);
    if (work <= before) return ceil_div(work, strip);
    return panels * (strips - 1) + ceil_div(work - before, s.n - strip * (strips - 1));
  };

  const bool split_k = s.k > kKB;
  const int64_t kb = split_k ? round_up(ceil_div(s.k, ceil_div(s.k, kKB)), 8) : s.k;
  const int64_t a_size = panel_size<kMR>(s.k);
  const int64_t strip_panels = ceil_div(strip, kNR);
  const int64_t b_size = s.parts * strip_panels * kNR * kb;
  const int64_t segment = split_k ? kSegmentRows / kMR / kGroup * kGroup : panels;
  const int64_t c_size =
      min64(panels, split_k ? segment : static_cast<int64_t>(kGroup)) * kMR * s.parts * strip_panels * kNR;
  // A packed, then for each worker its strip of B and its tiles: together large enough for huge pages, mostly.
  const Buffer workspace(panels * a_size + workers * (b_size + c_size));
  float* const a_packed = workspace;

  runtime.parallel_for(0, panels, ceil_div(panels, threads), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) pack_a(p * kMR, min64(kMR, s.m - p * kMR), a_packed + p * a_size);
  });
  const MicroKernel full = micro_kernel(kMR), last = micro_kernel(s.m - (panels - 1) * kMR);

  runtime.parallel_for(0, workers, 1, [&](int64_t first_worker, int64_t end_worker) {
    for (int64_t worker = first_worker; worker < end_worker; ++worker) {
      float* const b = a_packed + panels * a_size + worker * (b_size + c_size);
      float* const c = b + b_size;
      int64_t unit = first_unit(worker);
      const int64_t end_unit = first_unit(worker + 1);
      while (unit < end_unit) {
        const int64_t p0 = unit % panels, p1 = min64(panels, p0 + min64(end_unit - unit, segment));
        const int64_t col0 = unit / panels * strip, cols = min64(strip, s.n - col0);
        const int64_t column_panels = ceil_div(cols, kNR), part_stride = column_panels * kNR;
        const int64_t stride = s.parts * part_stride;
        unit += p1 - p0;
        int64_t k0 = 0;
        do {
          const int64_t kn = min64(kb, s.k - k0);
          for (int part = 0; part < s.parts; ++part)
            for (int64_t j = 0; j < column_panels; ++j)
              pack_b(part, col0 + j * kNR, min64(kNR, cols - j * kNR), k0, kn,
                     b + (part * column_panels + j) * kNR * kn);
          for (int64_t g0 = p0; g0 < p1; g0 += kGroup) {
            const int64_t g1 = min64(p1, g0 + kGroup);
            float* const tile = c + (split_k ? (g0 - p0) * kMR * stride : 0);
            int64_t kc0 = 0;
            do {
              const int64_t kc = min64(kKC, kn - kc0);
              const float* const a = a_packed + (k0 + kc0) * kMR;
              for (int64_t j = 0; j < s.parts * column_panels; ++j)
                for (int64_t i = g0; i < g1; ++i) {
                  const float* const next = i + 1 < g1 ? a + (i + 1) * a_size : a + g0 * a_size + kc * kMR;
                  (i + 1 < panels ? full : last)(kc, a + i * a_size, b + j * kNR * kn + kc0 * kNR,
                                                 tile + (i - g0) * kMR * stride + j * kNR, stride, k0 + kc0 > 0, next);
                }
              kc0 += kKC;
            } while (kc0 < kn);
            if (k0 + kn >= s.k)
              epilogue(Tile{g0 * kMR, min64(g1 * kMR, s.m) - g0 * kMR, col0, cols, tile, stride, part_stride});
          }
          k0 += kn;
        } while (k0 < s.k);
      }
    }
  });
}

}  // namespace eva02::EVA02_ISA
