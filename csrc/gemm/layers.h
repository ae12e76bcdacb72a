// What layers put around a matrix product: operand sources with the previous operation applied on load, row
// statistics, LayerNorm's backward, column sums, and accumulation of weight gradients over chunks of rows.
#pragma once

#include "common/param.h"
#include "gemm/gemm.h"

namespace eva02::EVA02_ISA {

// Calls f(c, n) for vectors of n columns from c; n is the constant kLanes but for the last.
template <class F>
EVA02_INLINE void for_columns(int64_t count, const F& f) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) f(c, static_cast<int64_t>(kLanes));
  if (c < count) f(c, count - c);
}

template <class T>
EVA02_INLINE vf get(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_partial(p, n);
}
template <class T>
EVA02_INLINE void put(T* p, vf v, int64_t n) {
  if (n >= kLanes)
    store(p, v);
  else
    store_partial(p, v, n);
}

// v rounded to T and back.
template <class T>
EVA02_INLINE vf round_to(vf v) {
  if constexpr (sizeof(T) == 4) return v;
  T buffer[kLanes];
  store(buffer, v);
  return load(buffer);
}

// ---- small vectors -----------------------------------------------------------------------------------------------
// A parameter vector in float32, with room for a whole vector after its end; `fill` where it is absent.
class Floats {
 public:
  Floats(const Param& v, int64_t n, float fill) : buffer_(n + kLanes) {
    const vf empty = splat(fill);
    for (int64_t c = 0; c < n + kLanes; ++c) buffer_[c] = empty[0];
    if (v.data == nullptr) return;
    switch (v.dtype) {
      case DType::f32: copy(static_cast<const float*>(v.data), n); break;
      case DType::bf16: copy(static_cast<const bf16*>(v.data), n); break;
      case DType::f16: copy(static_cast<const f16*>(v.data), n); break;
    }
  }
  operator const float*() const { return buffer_; }
  float* data() const { return buffer_; }

 private:
  template <class T>
  void copy(const T* p, int64_t n) {
    for_columns(n, [&](int64_t c, int64_t lanes) { put(buffer_ + c, get(p + c, lanes), lanes); });
  }
  Buffer buffer_;
};

inline void write_vector(const ParamGrad& out, const float* p, int64_t n) {
  if (out.data == nullptr) return;
  const auto copy = [&](auto* q) {
    for_columns(n, [&](int64_t c, int64_t lanes) { put(q + c, get(p + c, lanes), lanes); });
  };
  switch (out.dtype) {
    case DType::f32: return copy(static_cast<float*>(out.data));
    case DType::bf16: return copy(static_cast<bf16*>(out.data));
    case DType::f16: return copy(static_cast<f16*>(out.data));
  }
}

inline void zero(float* p, int64_t n) { memset(p, 0, static_cast<size_t>(n) * sizeof(float)); }

// A factor per sample: rows [i * rows_per_sample, ...) share row_scale[i]; nullptr is 1.
struct RowScale {
  const float* data;
  int64_t rows_per_sample;
  EVA02_INLINE float operator()(int64_t row) const { return data == nullptr ? 1.f : data[row / rows_per_sample]; }
};

// ---- sources -----------------------------------------------------------------------------------------------------
template <class T>
struct Matrix {
  const T* data;
  int64_t stride;

  struct Row {
    const T* p;
    EVA02_INLINE vf load(int64_t c) const { return EVA02_ISA::load(p + c); }
    EVA02_INLINE vf load_partial(int64_t c, int64_t n) const { return EVA02_ISA::load_partial(p + c, n); }
  };
  EVA02_INLINE Row row(int64_t r) const { return {data + r * stride}; }
};

// Up to three contiguous matrices of one width on top of each other, such as the weights of q, k and v.
template <class T>
struct Stacked {
  const T* block[3];
  int64_t rows[3];
  int64_t width;

  EVA02_INLINE typename Matrix<T>::Row row(int64_t r) const {
    if (r < rows[0]) return {block[0] + r * width};
    r -= rows[0];
    if (r < rows[1]) return {block[1] + r * width};
    return {block[2] + (r - rows[1]) * width};
  }
};

// Rows times a factor per row and a factor per column.
template <class T>
struct Scaled {
  const T* data;
  int64_t stride;
  RowScale row_scale;
  const float* column_scale;

  struct Row {
    const T* p;
    float s;
    const float* columns;
    EVA02_INLINE vf load(int64_t c) const { return EVA02_ISA::load(p + c) * s * EVA02_ISA::load(columns + c); }
    EVA02_INLINE vf load_partial(int64_t c, int64_t n) const {
      return EVA02_ISA::load_partial(p + c, n) * s * EVA02_ISA::load(columns + c);
    }
  };
  EVA02_INLINE Row row(int64_t r) const { return {data + r * stride, row_scale(r), column_scale}; }
};

// LayerNorm of another source, on load.
template <class Source>
struct Normalized {
  Source source;
  const float *mean, *rstd;    // per row
  const float *weight, *bias;  // per column

  struct Row {
    RowOf<Source> inner;
    float mean, rstd;
    const float *weight, *bias;
    EVA02_INLINE vf apply(vf x, int64_t c) const {
      return (x - mean) * rstd * EVA02_ISA::load(weight + c) + EVA02_ISA::load(bias + c);
    }
    EVA02_INLINE vf load(int64_t c) const { return apply(inner.load(c), c); }
    EVA02_INLINE vf load_partial(int64_t c, int64_t n) const { return apply(inner.load_partial(c, n), c); }
  };
  EVA02_INLINE Row row(int64_t r) const { return {source.row(r), mean[r], rstd[r], weight, bias}; }
};

// ---- LayerNorm ---------------------------------------------------------------------------------------------------
// Two passes over a row that stays in L1/L2: the mean, then the squared deviations.
template <class Row>
EVA02_INLINE void row_statistics(const Row& row, int64_t n, float eps, float& mean, float& rstd) {
  vf sum[2] = {};
  int64_t c = 0;
  for (; c + 2 * kLanes <= n; c += 2 * kLanes) {
    sum[0] += row.load(c);
    sum[1] += row.load(c + kLanes);
  }
  for (; c < n; c += kLanes) sum[0] += at(row, c, n - c);
  const float m = hsum(sum[0] + sum[1]) / static_cast<float>(n);
  vf square[2] = {};
  for (c = 0; c + 2 * kLanes <= n; c += 2 * kLanes) {
    const vf d0 = row.load(c) - m, d1 = row.load(c + kLanes) - m;
    square[0] += d0 * d0;
    square[1] += d1 * d1;
  }
  float tail = 0.f;
  for (; c < n; c += kLanes) {
    const vf d = at(row, c, n - c) - m;
    if (n - c >= kLanes) {
      square[0] += d * d;
    } else {
      for (int i = 0; i < n - c; ++i) tail += d[i] * d[i];
    }
  }
  const float variance = (hsum(square[0] + square[1]) + tail) / static_cast<float>(n);
  mean = m;
  rstd = 1.f / __builtin_sqrtf(variance + eps);
}

// Row blocks over which partial sums are kept: fixed, so that results do not depend on the number of threads.
constexpr int64_t kBlockRows = 64;

// Sums over rows of two vectors of n columns (a norm's weight and bias gradients), in two stages.
class NormSums {
 public:
  NormSums(int64_t n, int64_t most_rows)
      : n_(n),
        padded_(round_up(n, 16)),
        blocks_(ceil_div(most_rows, kBlockRows)),
        partial_(blocks_ * 2 * padded_),
        total_(2 * padded_) {
    zero(total_, 2 * padded_);
  }
  float* weight(int64_t block) const { return partial_ + block * 2 * padded_; }
  float* bias(int64_t block) const { return weight(block) + padded_; }
  void reset(int64_t block) const { zero(weight(block), 2 * padded_); }

  // Adds the blocks of a chunk of rows to the total, in order.
  void add(const Runtime& runtime, int64_t rows) {
    const int64_t blocks = ceil_div(rows, kBlockRows);
    runtime.parallel_for(0, 2 * padded_ / 16, max64(1, 65536 / (16 * max64(blocks, 1))),
                         [&](int64_t begin, int64_t end) {
                           for (int64_t c = begin * 16; c < end * 16; c += kLanes) {
                             vf sum = load(total_ + c);
                             for (int64_t b = 0; b < blocks; ++b) sum += load(partial_ + b * 2 * padded_ + c);
                             store(total_ + c, sum);
                           }
                         });
  }
  void write(const ParamGrad& dweight, const ParamGrad& dbias) const {
    write_vector(dweight, total_, n_);
    write_vector(dbias, total_ + padded_, n_);
  }

 private:
  int64_t n_, padded_, blocks_;
  Buffer partial_, total_;
};

// LayerNorm backward of one row: `d` (float32, n columns, padded) holds the gradient of the normalised, affine output.
// emit(c, lanes, dx) receives the gradient of the input; dweight and dbias (may be null) are added to.
template <class Row, class Emit>
EVA02_INLINE void norm_backward_row(const Row& x, const float* d, int64_t n, float mean, float rstd,
                                    const float* weight, float* dweight, float* dbias, const Emit& emit) {
  vf sum_d = {}, sum_dx = {};
  for_columns(n, [&](int64_t c, int64_t lanes) {
    const vf g = get(d + c, lanes), xhat = (at(x, c, lanes) - mean) * rstd, gw = g * load(weight + c);
    sum_d += gw;
    sum_dx += gw * xhat;
    if (dweight != nullptr) {
      put(dweight + c, get(dweight + c, lanes) + g * xhat, lanes);
      put(dbias + c, get(dbias + c, lanes) + g, lanes);
    }
  });
  const float m1 = hsum(sum_d) / static_cast<float>(n), m2 = hsum(sum_dx) / static_cast<float>(n);
  for_columns(n, [&](int64_t c, int64_t lanes) {
    const vf xhat = (at(x, c, lanes) - mean) * rstd;
    emit(c, lanes, rstd * (get(d + c, lanes) * load(weight + c) - m1 - xhat * m2));
  });
}

// Backward of the LayerNorm before a layer, over rows [r0, r0 + rows): dn (rows, n) float32 is the gradient of its
// output; writes dx = LayerNorm backward (+ dout where add is given). dx may be nullptr (only the sums are wanted).
template <class T>
void pre_norm_backward(const Runtime& runtime, int64_t r0, int64_t rows, int64_t n, const Matrix<T>& x, const float* dn,
                       int64_t dn_stride, const float* mean, const float* rstd, const float* weight, const T* add,
                       int64_t add_stride, T* dx, int64_t dx_stride, NormSums* sums) {
  runtime.parallel_for(0, ceil_div(rows, kBlockRows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      if (sums != nullptr) sums->reset(block);
      for (int64_t i = block * kBlockRows; i < min64(rows, (block + 1) * kBlockRows); ++i) {
        const int64_t r = r0 + i;
        norm_backward_row(x.row(r), dn + i * dn_stride, n, mean[r], rstd[r], weight,
                          sums != nullptr ? sums->weight(block) : nullptr,
                          sums != nullptr ? sums->bias(block) : nullptr, [&](int64_t c, int64_t lanes, vf v) {
                            if (dx == nullptr) return;
                            if (add != nullptr) v += get(add + r * add_stride + c, lanes);
                            put(dx + r * dx_stride + c, v, lanes);
                          });
      }
    }
  });
  if (sums != nullptr) sums->add(runtime, rows);
}

// ---- products ----------------------------------------------------------------------------------------------------
// Rows of a call handled at a time: bounds the workspace of activations `width` wide to about 32 MB. Chunks are even.
inline int64_t chunk_rows(int64_t rows, int64_t width) {
  const int64_t limit = max64(1024, (int64_t{8} << 20) / max64(width, 1));
  return max64(1, ceil_div(rows, max64(1, ceil_div(rows, limit))));
}

// Panels for `x W^T`: rows of x and rows of W, k contiguous in both.
template <class Source>
struct RowPanels {
  Source source;
  int64_t r0, k;
  EVA02_INLINE void operator()(int64_t row0, int64_t rows, float* dst) const {
    pack_rows<kMR>(source, r0 + row0, rows, 0, k, dst);
  }
};
// The same with a LayerNorm first, whose statistics (of rows r0, r0 + 1, ...) are taken as the rows come by.
template <class T>
struct NormalizedRowPanels {
  Matrix<T> source;
  int64_t r0, k;
  bool normalize;
  float eps;
  float *mean, *rstd;
  const float *weight, *bias;

  EVA02_INLINE void operator()(int64_t row0, int64_t rows, float* dst) const {
    if (!normalize) return pack_rows<kMR>(source, r0 + row0, rows, 0, k, dst);
    for (int64_t r = r0 + row0; r < r0 + row0 + rows; ++r) row_statistics(source.row(r), k, eps, mean[r], rstd[r]);
    pack_rows<kMR>(Normalized<Matrix<T>>{source, mean, rstd, weight, bias}, r0 + row0, rows, 0, k, dst);
  }
};
template <class Source>
struct WeightRowPanels {
  Source source;
  EVA02_INLINE void operator()(int, int64_t col0, int64_t cols, int64_t k0, int64_t count, float* dst) const {
    pack_rows<kNR>(source, col0, cols, k0, count, dst);
  }
};
// Panels of columns of a matrix whose rows are the k dimension: W in `dy W`, x in `dy^T x` (from row r0).
template <class Source>
struct ColumnPanels {
  Source source;
  int64_t r0, width;
  EVA02_INLINE void operator()(int, int64_t col0, int64_t cols, int64_t k0, int64_t count, float* dst) const {
    pack_columns<kNR>(source, col0, cols, width, r0 + k0, count, dst);
  }
};

// Weight gradient C (n, k) = dy^T x over `rows` rows, from row dy0 of dy (n columns) and row x0 of x (k columns). The
// sums of dy's columns (the bias gradient) are taken from the packed panels and added to `column_sums` (n) unless it is
// nullptr.
template <class SourceY, class SourceX, class Epilogue>
void weight_gradient(const Runtime& runtime, int64_t rows, int64_t n, int64_t k, const SourceY& dy, int64_t dy0,
                     const SourceX& x, int64_t x0, float* column_sums, const Epilogue& epilogue) {
  gemm(
      runtime, GemmShape{.m = n, .n = k, .k = rows},
      [&](int64_t c0, int64_t columns, float* dst) {
        pack_columns<kMR>(dy, c0, columns, n, dy0, rows, dst);
        if (column_sums == nullptr) return;
        for (int64_t i = 0; i < columns; ++i) {
          // In blocks of 64: mean pooling makes rows equal, and one long sum of them rounds the same way each time.
          float total = 0.f;
          for (int64_t r = 0; r < rows;) {
            float sum[4] = {};
            const int64_t end = min64(rows, r + 64);
            for (; r + 4 <= end; r += 4)
              for (int j = 0; j < 4; ++j) sum[j] += dst[(r + j) * kMR + i];
            for (; r < end; ++r) sum[0] += dst[r * kMR + i];
            total += sum[0] + sum[1] + (sum[2] + sum[3]);
          }
          column_sums[c0 + i] += total;
        }
      },
      ColumnPanels<SourceX>{x, x0, k}, epilogue);
}

// column_sums (n) += sums of the columns of source over rows [r0, r0 + rows).
template <class Source>
void add_column_sums(const Runtime& runtime, int64_t r0, int64_t rows, int64_t n, const Source& source,
                     float* column_sums) {
  runtime.parallel_for(0, ceil_div(n, 4 * kLanes), max64(1, 65536 / (4 * kLanes * max64(rows, 1))),
                       [&](int64_t begin, int64_t end) {
                         for (int64_t block = begin; block < end; ++block) {
                           vf sum[4] = {};
                           const int64_t c0 = block * 4 * kLanes;
                           for (int64_t r = 0; r < rows; ++r) {
                             const auto row = source.row(r0 + r);
                             for (int j = 0; j < 4 && c0 + j * kLanes < n; ++j)
                               sum[j] += at(row, c0 + j * kLanes, n - c0 - j * kLanes);
                           }
                           for (int j = 0; j < 4 && c0 + j * kLanes < n; ++j) {
                             const int64_t c = c0 + j * kLanes, lanes = n - c;
                             put(column_sums + c, get(column_sums + c, lanes) + sum[j], lanes);
                           }
                         }
                       });
}

// Rows between the one that an epilogue stores and the one whose lines it asks for: a store that misses the caches
// otherwise waits for each.
constexpr int64_t kRowsAhead = 2;

// Epilogue of a layer's last product: out = [residual +] row_scale * scale * (tile + bias); tiles start at row r0.
template <class T>
EVA02_INLINE void write_output(const Tile& t, int64_t r0, const float* bias, const float* scale,
                               const RowScale& row_scale, const T* residual, int64_t residual_stride, T* out,
                               int64_t out_stride) {
  for (int64_t i = 0; i < t.rows; ++i) {
    const int64_t r = r0 + t.row0 + i;
    const float* const v = t.row(i);
    const float s = row_scale(r);
    T* const y = out + r * out_stride + t.col0;
    if (i + kRowsAhead < t.rows) prefetch<For::store>(y + kRowsAhead * out_stride, t.cols);
    if (residual != nullptr) {
      const T* const add = residual + r * residual_stride + t.col0;
      for_columns(t.cols, [&](int64_t c, int64_t lanes) {
        put(y + c, (load(v + c) + load(bias + t.col0 + c)) * (load(scale + t.col0 + c) * s) + get(add + c, lanes),
            lanes);
      });
    } else {
      for_columns(t.cols, [&](int64_t c, int64_t lanes) {
        put(y + c, (load(v + c) + load(bias + t.col0 + c)) * (load(scale + t.col0 + c) * s), lanes);
      });
    }
  }
}

// Epilogue that only converts and stores, plus `add` where it is given.
template <class T, class U = T>
EVA02_INLINE void write_rows(const Tile& t, int64_t r0, T* out, int64_t stride, const U* add = nullptr,
                             int64_t add_stride = 0) {
  for (int64_t i = 0; i < t.rows; ++i) {
    const float* const v = t.row(i);
    T* const y = out + (r0 + t.row0 + i) * stride + t.col0;
    if (add != nullptr) {
      const U* const a = add + (r0 + t.row0 + i) * add_stride + t.col0;
      for_columns(t.cols, [&](int64_t c, int64_t lanes) { put(y + c, load(v + c) + get(a + c, lanes), lanes); });
    } else {
      for_columns(t.cols, [&](int64_t c, int64_t lanes) { put(y + c, load(v + c), lanes); });
    }
  }
}

// Float32 sums of a weight gradient (n, k) over chunks of rows; nothing is kept when there is one chunk.
class ChunkSums {
 public:
  ChunkSums(int64_t n, int64_t k, int64_t chunks) : k_(k), chunks_(chunks), sums_(chunks > 1 ? n * k : 0) {}

  // Row i of a tile of chunk `chunk`: replaced by the total when this is the last chunk (true), else only added.
  EVA02_INLINE bool add(const Tile& t, int64_t i, int64_t chunk) const {
    if (chunks_ == 1) return true;
    const bool last = chunk + 1 == chunks_;
    float* const v = t.row(i);
    float* const sum = sums_ + (t.row0 + i) * k_ + t.col0;
    for_columns(t.cols, [&](int64_t c, int64_t lanes) {
      const vf s = chunk > 0 ? load(v + c) + get(sum + c, lanes) : load(v + c);
      if (last)
        store(v + c, s);
      else
        put(sum + c, s, lanes);
    });
    return last;
  }

 private:
  int64_t k_, chunks_;
  Buffer sums_;
};

// Gradients of y = row_scale * scale * (a W^T + b) with respect to W, b and scale, from dy = row_scale * dout:
// dW' = dy^T a and db' = sum dy give dW = scale dW', db = scale db', dscale = rowsum(W * dW') + b db'.
template <class T>
class OutputGradients {
 public:
  OutputGradients(int64_t n, int64_t k, int64_t chunks, bool dots)
      : n_(n),
        k_(k),
        dots_wanted_(dots),
        sums_(n, k, chunks),
        column_sums_(round_up(n, 16)),
        dots_(dots ? ceil_div(k, kNR) * n : 0) {
    zero(column_sums_, round_up(n, 16));
    if (dots) zero(dots_, ceil_div(k, kNR) * n);
  }
  float* column_sums() const { return column_sums_; }

  // Chunk `chunk`: `rows` rows from dy0 of dy and a0 of a. dweight (n, k) is written with the last chunk unless it is
  // nullptr.
  template <class SourceY, class SourceA>
  void accumulate(const Runtime& runtime, int64_t chunk, int64_t rows, const SourceY& dy, int64_t dy0, const SourceA& a,
                  int64_t a0, bool bias_sums, const T* weight, const float* scale, T* dweight) const {
    weight_gradient(runtime, rows, n_, k_, dy, dy0, a, a0, bias_sums ? column_sums() : nullptr, [&](const Tile& t) {
      for (int64_t i = 0; i < t.rows; ++i) {
        if (!sums_.add(t, i, chunk)) continue;
        const int64_t r = t.row0 + i;
        const float* const v = t.row(i);
        if (dots_wanted_) {
          const T* const w = weight + r * k_ + t.col0;
          for (int64_t j = 0; j < t.cols; j += kNR) {
            vf sum = {};
            for_columns(min64(kNR, t.cols - j),
                        [&](int64_t c, int64_t lanes) { sum += get(w + j + c, lanes) * get(v + j + c, lanes); });
            dots_[(t.col0 + j) / kNR * n_ + r] = hsum(sum);
          }
        }
        if (dweight == nullptr) continue;
        T* const out = dweight + r * k_ + t.col0;
        for_columns(t.cols, [&](int64_t c, int64_t lanes) { put(out + c, load(v + c) * scale[r], lanes); });
      }
    });
  }

  void finish(const float* scale, const float* bias, const ParamGrad& dbias, const ParamGrad& dscale) const {
    const Buffer result(round_up(n_, 16));
    for (int64_t r = 0; r < n_; ++r) result[r] = scale[r] * column_sums_[r];
    write_vector(dbias, result, n_);
    if (!dots_wanted_) return;
    for (int64_t r = 0; r < n_; ++r) {
      float sum = bias[r] * column_sums_[r];
      for (int64_t j = 0; j < ceil_div(k_, kNR); ++j) sum += dots_[j * n_ + r];
      result[r] = sum;
    }
    write_vector(dscale, result, n_);
  }

 private:
  int64_t n_, k_;
  bool dots_wanted_;
  ChunkSums sums_;
  Buffer column_sums_, dots_;
};

}  // namespace eva02::EVA02_ISA
