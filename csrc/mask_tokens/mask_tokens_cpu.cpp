// mask_tokens: out[b, n] = t + pos_embed[n], t the prefix token n, the mask token, or the patch itself
// Fused     mask blend, prefix concatenation, position add (eager: 4 kernels, 9n elements moved); backward in one pass
// Bytes     forward reads the unmasked patches and writes n elements; backward reads n and writes the patches' gradient
// Launch    forward parallel over tokens; backward over at most 64 fixed chunks of positions, all samples of a position
//           together, so that a position's gradient is summed in cache; 16 Ki elements a thread
// Numerics  float32 inside, one rounding at the store
// Limits    last dim contiguous; any batch and token stride
// Source    original; the masked image modelling input of EVA-02, arXiv:2303.11331
#include "common/rows.h"
#include "mask_tokens/mask_tokens.h"

namespace eva02::EVA02_ISA {
namespace {

template <class T, class Pos>
void mask_tokens_fwd(const MaskTokensFwdParams& p, const Runtime& runtime) {
  const int64_t C = p.C, N = p.num_prefix + p.P, width = padded(C);
  const Buffer params((1 + p.num_prefix) * width);
  float *mask_token = params, *prefix = mask_token + width;
  load_param(mask_token, p.mask_token, C, 0.f);
  for (int64_t n = 0; n < p.num_prefix; ++n) load_param(prefix + n * width, row_of(p.prefix_tokens, n, C), C, 0.f);
  const Pos* pos_embed = static_cast<const Pos*>(p.pos_embed.data);
  runtime.parallel_for(0, p.batch * N, row_grain(C), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / N, n = row % N, patch = n - p.num_prefix;
      T* out = static_cast<T*>(p.out) + b * p.out_batch_stride + n * p.out_token_stride;
      const Pos* pos = pos_embed + n * C;
      auto write = [&](auto token) EVA02_ALWAYS_INLINE {
        if (pos_embed != nullptr)
          columns(C, [&](int64_t i, auto part, int)
                         EVA02_ALWAYS_INLINE { st(out + i, token(i, part) + ld(pos + i, part), part); });
        else
          columns(C, [&](int64_t i, auto part, int) EVA02_ALWAYS_INLINE { st(out + i, token(i, part), part); });
      };
      const bool masked =
          patch >= 0 && p.mask != nullptr && p.mask[b * p.mask_batch_stride + patch * p.mask_token_stride];
      if (patch < 0 || masked) {
        const float* token = masked ? mask_token : prefix + n * width;
        write([&](int64_t i, auto) EVA02_ALWAYS_INLINE { return load(token + i); });
      } else {
        const T* x = static_cast<const T*>(p.patches) + b * p.patches_batch_stride + patch * p.patches_token_stride;
        write([&](int64_t i, auto part) EVA02_ALWAYS_INLINE { return ld(x + i, part); });
      }
    }
  });
}

template <class T>
void mask_tokens_bwd(const MaskTokensBwdParams& p, const Runtime& runtime) {
  const int64_t C = p.C, N = p.num_prefix + p.P, width = padded(C);
  const RowChunks chunks(N, 16);  // a row is a position of all samples
  const bool token_grad = p.dmask_token.data != nullptr && p.mask != nullptr;
  const Buffer partials(token_grad ? chunks.count * width : 0);
  runtime.parallel_for(0, chunks.count, chunks.grain(C * max64(1, p.batch)), [&](int64_t begin, int64_t end) {
    const Buffer scratch(width);
    float* position = scratch;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* token = partials + chunk * width;
      if (token_grad) fill(token, width, 0.f);
      for (int64_t n = chunks.begin(chunk); n < chunks.end(chunk); ++n) {
        const int64_t patch = n - p.num_prefix;
        const bool wants_position = p.dpos_embed.data != nullptr || (patch < 0 && p.dprefix_tokens.data != nullptr);
        if (wants_position) fill(position, width, 0.f);
        for (int64_t b = 0; b < p.batch; ++b) {
          const T* dout = static_cast<const T*>(p.dout) + b * p.dout_batch_stride + n * p.dout_token_stride;
          const bool masked =
              patch >= 0 && p.mask != nullptr && p.mask[b * p.mask_batch_stride + patch * p.mask_token_stride];
          if (wants_position)
            columns(C, [&](int64_t i, auto part, int)
                           EVA02_ALWAYS_INLINE { store(position + i, load(position + i) + ld(dout + i, part)); });
          if (masked && token_grad)
            columns(C, [&](int64_t i, auto part, int)
                           EVA02_ALWAYS_INLINE { store(token + i, load(token + i) + ld(dout + i, part)); });
          if (patch >= 0 && p.dpatches != nullptr) {
            T* dx = static_cast<T*>(p.dpatches) + b * p.dpatches_batch_stride + patch * p.dpatches_token_stride;
            const size_t bytes = static_cast<size_t>(C) * sizeof(T);
            if (masked)
              memset(dx, 0, bytes);
            else
              memcpy(dx, dout, bytes);
          }
        }
        if (p.dpos_embed.data != nullptr) store_param(p.dpos_embed, n * C, position, C);
        if (patch < 0 && p.dprefix_tokens.data != nullptr) store_param(p.dprefix_tokens, n * C, position, C);
      }
    }
  });
  reduce(p.dmask_token, partials, token_grad ? chunks.count : 0, width, C, runtime);
}

template <class T>
void mask_tokens_fwd(const MaskTokensFwdParams& p, const Runtime& runtime) {
  if (p.pos_embed.dtype == p.dtype)
    mask_tokens_fwd<T, T>(p, runtime);
  else
    mask_tokens_fwd<T, float>(p, runtime);
}

}  // namespace

void run_mask_tokens_fwd(const MaskTokensFwdParams& p, const Runtime& runtime) {
  switch (p.dtype) {
    case DType::f32: return mask_tokens_fwd<float>(p, runtime);
    case DType::bf16: return mask_tokens_fwd<bf16>(p, runtime);
    case DType::f16: return mask_tokens_fwd<f16>(p, runtime);
  }
}

void run_mask_tokens_bwd(const MaskTokensBwdParams& p, const Runtime& runtime) {
  switch (p.dtype) {
    case DType::f32: return mask_tokens_bwd<float>(p, runtime);
    case DType::bf16: return mask_tokens_bwd<bf16>(p, runtime);
    case DType::f16: return mask_tokens_bwd<f16>(p, runtime);
  }
}

}  // namespace eva02::EVA02_ISA
