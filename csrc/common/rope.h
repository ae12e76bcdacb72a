// Rotary embedding of head rows, float32 inside, for kernels (included once per instruction set).
//
// A token's angles are first expanded into 2 D floats, `cs`, that any number of heads of that token then use:
//   interleaved  cs = [c0 c0 c1 c1 ...], [-s0 s0 -s1 s1 ...]   so that  y = x * c + swap_pairs(x) * s
//   half split   cs = [c0 c1 ... (D/2)], [s0 s1 ... (D/2)]     each at the start of its D floats
// A token that is not rotated gets c = 1, s = 0.
#pragma once

#include "common/rope_table.h"
#include "common/vec.h"

namespace eva02::EVA02_ISA {

// Do two different sequences, or heads, share the angles of equal token positions?
EVA02_INLINE bool rope_same_for_all_sequences(const RopeTable& rope) {
  return !rope.keep_idx && !rope.grids && rope.form != RopeForm::dense_batch &&
         !(rope.form == RopeForm::axis && rope.table_stride != 0);
}
EVA02_INLINE bool rope_same_for_all_heads(const RopeTable& rope) { return rope.form != RopeForm::dense_head; }

// cs: 2 D floats, see the top of this file.
inline void rope_expand(const RopeTable& rope, int64_t b, int64_t t, int64_t h, float* cs) {
  const int64_t D = rope.head_dim, quarter = D / 4;
  float *c = cs, *s = cs + D;
  RopeAngles angles;
  if (!rope_angles(rope, b, t, h, angles)) {
    for (int64_t i = 0; i < D; ++i) {
      c[i] = 1.f;
      s[i] = 0.f;
    }
    return;
  }
  for (int half = 0; half < 2; ++half) {
    const float *cos = angles.cos[half], *sin = angles.sin[half];
    if (rope.interleaved) {
      float *ch = c + half * 2 * quarter, *sh = s + half * 2 * quarter;
      for (int64_t j = 0; j < quarter; ++j) {
        ch[2 * j] = cos[j];
        ch[2 * j + 1] = cos[j];
        sh[2 * j] = -sin[j];
        sh[2 * j + 1] = sin[j];
      }
    } else {
      for (int64_t j = 0; j < quarter; ++j) {
        c[half * quarter + j] = cos[j];
        s[half * quarter + j] = sin[j];
      }
    }
  }
}

EVA02_INLINE vf swap_pairs(vf v) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif defined(__AVX2__)
  return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
#else
  return __builtin_shufflevector(v, v, 1, 0, 3, 2);
#endif
}

// dst = mul * R(src), or mul * R^T(src) for the inverse; one head's row of D channels. dst may be src (of one type).
template <bool Inverse, class Src, class Dst>
EVA02_INLINE void rope_rotate_interleaved(const Src* src, const float* cs, int64_t D, float mul, Dst* dst) {
  const float *c = cs, *s = cs + D;
  int64_t i = 0;
  for (; i + kLanes <= D; i += kLanes) {
    const vf x = load(src + i), t = swap_pairs(x) * load(s + i);
    store(dst + i, (Inverse ? x * load(c + i) - t : x * load(c + i) + t) * mul);
  }
  if (i < D) {
    const int64_t n = D - i;
    const vf x = load_partial(src + i, n), t = swap_pairs(x) * load_partial(s + i, n), y = x * load_partial(c + i, n);
    store_partial(dst + i, (Inverse ? y - t : y + t) * mul, n);
  }
}

template <bool Inverse, class Src, class Dst>
EVA02_INLINE void rope_rotate_half(const Src* src, const float* cs, int64_t D, float mul, Dst* dst) {
  const float *c = cs, *s = cs + D;
  const int64_t half = D / 2;
  const auto rotate = [](vf a, vf b, vf c, vf s, vf& ya, vf& yb) {
    ya = Inverse ? a * c + b * s : a * c - b * s;
    yb = Inverse ? b * c - a * s : b * c + a * s;
  };
  vf ya, yb;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    rotate(load(src + i), load(src + half + i), load(c + i), load(s + i), ya, yb);
    store(dst + i, ya * mul);
    store(dst + half + i, yb * mul);
  }
  if (i < half) {
    const int64_t n = half - i;
    rotate(load_partial(src + i, n), load_partial(src + half + i, n), load_partial(c + i, n), load_partial(s + i, n),
           ya, yb);
    store_partial(dst + i, ya * mul, n);
    store_partial(dst + half + i, yb * mul, n);
  }
}

template <bool Inverse, class Src, class Dst>
EVA02_INLINE void rope_rotate(bool interleaved, const Src* src, const float* cs, int64_t D, float mul, Dst* dst) {
  if (interleaved)
    rope_rotate_interleaved<Inverse>(src, cs, D, mul, dst);
  else
    rope_rotate_half<Inverse>(src, cs, D, mul, dst);
}

// Adds a row's share of the angles' gradients, from x (before the rotation) and dy (the gradient after it):
// dcos_j += x_a dy_a + x_b dy_b, dsin_j += x_a dy_b - x_b dy_a.
EVA02_INLINE void rope_add_table_grad(bool interleaved, const float* x, const float* dy, int64_t D, float mul,
                                      float* dcos, float* dsin) {
  const int64_t half = D / 2, step = interleaved ? 2 : 1, other = interleaved ? 1 : half;
  for (int64_t j = 0; j < half; ++j) {
    const float xa = x[j * step], xb = x[j * step + other], da = dy[j * step], db = dy[j * step + other];
    dcos[j] += mul * (xa * da + xb * db);
    dsin[j] += mul * (xa * db - xb * da);
  }
}

}  // namespace eva02::EVA02_ISA
