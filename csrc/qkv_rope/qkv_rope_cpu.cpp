// qkv_rope: qkv = LayerNorm(x) W^T + b, q and k heads rotated
// Fused     LayerNorm on load; bias, rotation and conversion in the product's epilogue; backward un-rotates once
// Bytes     forward reads x, W and writes qkv once; backward reads dqkv once, x and W twice, and writes each gradient
//           once; workspace: float32 panels of the left operand and float32 un-rotated dqkv and LayerNorm gradient, for
//           at most chunk_rows rows at a time, and 2 D floats of angles a token
// Launch    two parallel regions per product (gemm/gemm.h) and chunk of rows, one for the angles
// Numerics  float32 sums and rotation, one rounding at the store; LayerNorm statistics in two passes
// Limits    head dim a multiple of 4 (of 1 without a table); last dims contiguous, any row stride of activations
// Source    original
#include "common/rope.h"
#include "gemm/layers.h"
#include "qkv_rope/qkv_rope.h"

namespace eva02::EVA02_ISA {
namespace {

// Where a row of x lies: sequence b, token t.
struct Tokens {
  const int32_t* cu;
  int64_t sequences, seqlen;

  EVA02_INLINE void locate(int64_t row, int64_t& b, int64_t& t) const {
    if (cu == nullptr) {
      b = row / seqlen;
      t = row % seqlen;
      return;
    }
    int64_t low = 0, high = sequences;  // cu[low] <= row < cu[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (cu[middle] <= row ? low : high) = middle;
    }
    b = low;
    t = row - cu[low];
  }
};

// The angles of every token, expanded once and used by all heads and by q and k. Tables per head cannot be shared:
// those are expanded where they are used.
class Angles {
 public:
  Angles(const Runtime& runtime, const RopeTable& rope, const Tokens& tokens, int64_t rows, int64_t head_dim)
      : rope_(rope),
        tokens_(tokens),
        size_(2 * head_dim),
        on(rope.form != RopeForm::none),
        shared_(rope_same_for_all_sequences(rope) && tokens.cu == nullptr),
        per_head_(!rope_same_for_all_heads(rope)) {
    if (!on || per_head_) return;
    const int64_t count = shared_ ? min64(rows, tokens.seqlen) : rows;
    table_.reset(count * size_);
    runtime.parallel_for(0, count, max64(1, 8192 / size_), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        int64_t b = 0, t = row;
        if (!shared_) tokens_.locate(row, b, t);
        rope_expand(rope_, b, t, 0, table_ + row * size_);
      }
    });
  }

  // The angles of all heads of a row, or nullptr where each has its own.
  EVA02_INLINE const float* of_row(int64_t row) const {
    return per_head_ ? nullptr : table_ + (shared_ ? row % tokens_.seqlen : row) * size_;
  }
  // Those of one head, into 2 D floats.
  void of_head(int64_t row, int64_t head, float* own) const {
    int64_t b, t;
    tokens_.locate(row, b, t);
    rope_expand(rope_, b, t, head, own);
  }

 private:
  const RopeTable& rope_;
  Tokens tokens_;
  int64_t size_;
  Buffer table_;

 public:
  const bool on;

 private:
  bool shared_, per_head_;
};

constexpr int64_t kMostHeadDim = 1024;  // of per-head tables: their angles are expanded on the stack

// Columns [c0, c0 + cols), whole heads, of a row packed as q heads, k heads, v heads: rotates the former two and only
// converts v. src and dst point at column c0.
template <bool Inverse, class P, class Src, class Dst>
EVA02_INLINE void rotate_heads(const P& p, const Angles& angles, int64_t row, int64_t c0, int64_t cols, const Src* src,
                               Dst* dst) {
  const int64_t D = p.head_dim, rotated = min64(cols, (p.heads + p.kv_heads) * D - c0);
  int64_t c = 0;
  if (angles.on) {
    const float* const shared = angles.of_row(row);
    for (; c < rotated; c += D) {
      float own[2 * kMostHeadDim];
      const int64_t head = (c0 + c) / D;
      if (shared == nullptr) angles.of_head(row, head < p.heads ? head : head - p.heads, own);
      rope_rotate<Inverse>(p.rope.interleaved, src + c, shared != nullptr ? shared : own, D, 1.f, dst + c);
    }
  }
  for_columns(cols - c, [&](int64_t i, int64_t lanes) { put(dst + c + i, get(src + c + i, lanes), lanes); });
}

// The bias of all N columns in float32.
void stack_bias(const Param (&bias)[3], const int64_t (&rows)[3], float* out) {
  int64_t at = 0;
  for (int i = 0; i < 3; ++i) {
    const Floats part(bias[i], rows[i], 0.f);
    memcpy(out + at, part.data(), static_cast<size_t>(rows[i]) * sizeof(float));
    at += rows[i];
  }
}

template <class T, class P>
Stacked<T> stacked_weight(const P& p) {
  Stacked<T> w;
  for (int i = 0; i < 3; ++i) {
    w.block[i] = static_cast<const T*>(p.weight[i]);
    w.rows[i] = p.weight_rows[i];
  }
  w.width = p.C;
  return w;
}

template <class T>
void qkv_rope_fwd(const QkvRopeFwdParams& p, const Runtime& runtime) {
  const Matrix<T> x{static_cast<const T*>(p.x), p.x_stride};
  const Stacked<T> weight = stacked_weight<T>(p);
  T* const qkv = static_cast<T*>(p.qkv);
  const Buffer bias(p.N + kLanes);
  stack_bias(p.bias, p.weight_rows, bias);
  const Floats pre_weight(p.pre_weight, p.C, 1.f), pre_bias(p.pre_bias, p.C, 0.f);
  const Angles angles(runtime, p.rope, Tokens{p.cu, p.sequences, p.seqlen}, p.M, p.head_dim);

  const int64_t chunk = chunk_rows(p.M, p.C);
  for (int64_t r0 = 0; r0 < p.M; r0 += chunk) {
    gemm(runtime, {.m = min64(chunk, p.M - r0), .n = p.N, .k = p.C, .column_unit = p.head_dim},
         NormalizedRowPanels<T>{x, r0, p.C, p.normalize, p.pre_eps, p.pre_mean, p.pre_rstd, pre_weight, pre_bias},
         WeightRowPanels<Stacked<T>>{weight}, [&](const Tile& t) {
           for (int64_t i = 0; i < t.rows; ++i) {
             const int64_t r = r0 + t.row0 + i;
             float* const v = t.row(i);
             for (int64_t c = 0; c < t.cols; c += kLanes) store(v + c, load(v + c) + load(bias + t.col0 + c));
             T* const out = qkv + r * p.qkv_stride + t.col0;
             if (i + kRowsAhead < t.rows) prefetch<For::store>(out + kRowsAhead * p.qkv_stride, t.cols);
             rotate_heads<false>(p, angles, r, t.col0, t.cols, v, out);
           }
         });
  }
}

// Chunks of rows: dqkv is un-rotated to float32, dx = [LayerNorm backward of] d W, dW += d^T LayerNorm(x).
template <class T, class Source>
void backward(const QkvRopeBwdParams& p, const Runtime& runtime, const Source& input) {
  const Matrix<T> x{static_cast<const T*>(p.x), p.x_stride};
  const Stacked<T> weight = stacked_weight<T>(p);
  const Floats pre_weight(p.pre_weight, p.C, 1.f);
  const T* const dqkv = static_cast<const T*>(p.dqkv);
  T* const dx = static_cast<T*>(p.dx);
  const Angles angles(runtime, p.rope, Tokens{p.cu, p.sequences, p.seqlen}, p.M, p.head_dim);
  const int64_t chunk = chunk_rows(p.M, p.N), chunks = max64(1, ceil_div(p.M, chunk));
  const bool norm_sums = p.dpre_weight.data != nullptr || p.dpre_bias.data != nullptr;
  const bool input_gradient = dx != nullptr || norm_sums;
  NormSums sums(norm_sums ? p.C : 1, norm_sums ? chunk : 1);

  const Buffer d(chunk * p.N + kLanes), dn(p.normalize && input_gradient ? chunk * p.C : 0);
  const Matrix<float> dy{d, p.N};
  const Buffer column_sums(round_up(p.N, 16) + 16);
  zero(column_sums, round_up(p.N, 16) + 16);
  int64_t first[3] = {0, p.weight_rows[0], p.weight_rows[0] + p.weight_rows[1]};
  bool any_weight = false;
  for (int i = 0; i < 3; ++i) any_weight = any_weight || p.dweight[i] != nullptr;
  const ChunkSums totals(any_weight ? p.N : 0, p.C, chunks);

  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t r0 = i * chunk, rows = min64(chunk, p.M - r0);
    runtime.parallel_for(0, rows, max64(1, 16384 / p.N), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        rotate_heads<true>(p, angles, r0 + row, 0, p.N, dqkv + (r0 + row) * p.dqkv_stride, d + row * p.N);
    });
    if (input_gradient) {
      gemm(runtime, {.m = rows, .n = p.C, .k = p.N}, RowPanels<Matrix<float>>{dy, 0, p.N},
           ColumnPanels<Stacked<T>>{weight, 0, p.C}, [&](const Tile& t) {
             if (p.normalize)
               write_rows(t, 0, static_cast<float*>(dn), p.C);
             else
               write_rows(t, r0, dx, p.dx_stride);
           });
      if (p.normalize)
        pre_norm_backward<T>(runtime, r0, rows, p.C, x, dn, p.C, p.pre_mean, p.pre_rstd, pre_weight, nullptr, 0, dx,
                             p.dx_stride, norm_sums ? &sums : nullptr);
    }
    // One product over neighbouring weights whose gradients are wanted.
    for (int from = 0; from < 3;) {
      if (p.dweight[from] == nullptr) {
        if (p.dbias[from].data != nullptr)
          add_column_sums(runtime, 0, rows, p.weight_rows[from], Matrix<float>{d + first[from], p.N},
                          column_sums + first[from]);
        ++from;
        continue;
      }
      int to = from + 1;
      while (to < 3 && p.dweight[to] != nullptr) ++to;
      const int64_t c0 = first[from], n = first[to - 1] + p.weight_rows[to - 1] - c0;
      // Rows of x from r0, rows of d from 0.
      weight_gradient(runtime, rows, n, p.C, Matrix<float>{d + c0, p.N}, 0, input, r0, column_sums + c0,
                      [&](const Tile& t) {
                        for (int64_t j = 0; j < t.rows; ++j) {
                          Tile shifted = t;
                          shifted.row0 += c0;
                          if (!totals.add(shifted, j, i)) continue;
                          const int64_t r = c0 + t.row0 + j;
                          const int block = r >= first[2] ? 2 : r >= first[1] ? 1 : 0;
                          T* const out = static_cast<T*>(p.dweight[block]) + (r - first[block]) * p.C + t.col0;
                          const float* const v = t.row(j);
                          for_columns(t.cols, [&](int64_t c, int64_t lanes) { put(out + c, load(v + c), lanes); });
                        }
                      });
      from = to;
    }
  }
  for (int i = 0; i < 3; ++i) write_vector(p.dbias[i], column_sums + first[i], p.weight_rows[i]);
  if (norm_sums) sums.write(p.dpre_weight, p.dpre_bias);
}

template <class T>
void qkv_rope_bwd(const QkvRopeBwdParams& p, const Runtime& runtime) {
  const Matrix<T> x{static_cast<const T*>(p.x), p.x_stride};
  if (!p.normalize) return backward<T>(p, runtime, x);
  const Floats pre_weight(p.pre_weight, p.C, 1.f), pre_bias(p.pre_bias, p.C, 0.f);
  backward<T>(p, runtime, Normalized<Matrix<T>>{x, p.pre_mean, p.pre_rstd, pre_weight, pre_bias});
}

}  // namespace

void run_qkv_rope_fwd(const QkvRopeFwdParams& p, const Runtime& runtime) {
  switch (p.dtype) {
    case DType::f32: return qkv_rope_fwd<float>(p, runtime);
    case DType::bf16: return qkv_rope_fwd<bf16>(p, runtime);
    case DType::f16: return qkv_rope_fwd<f16>(p, runtime);
  }
}

void run_qkv_rope_bwd(const QkvRopeBwdParams& p, const Runtime& runtime) {
  switch (p.dtype) {
    case DType::f32: return qkv_rope_bwd<float>(p, runtime);
    case DType::bf16: return qkv_rope_bwd<bf16>(p, runtime);
    case DType::f16: return qkv_rope_bwd<f16>(p, runtime);
  }
}

}  // namespace eva02::EVA02_ISA
