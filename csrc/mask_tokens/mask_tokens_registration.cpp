#include "common/param_adapter.h"
#include "mask_tokens/mask_tokens.h"

namespace eva02 {
namespace {

// patches (B, P, C), dout and out (B, N, C), all with a contiguous last dim; mask (B, P) bool; the one, N and
// num_prefix tokens of mask_token, pos_embed and cls_token contiguous, pos_embed of the dtype of patches or float32.
// The Python adapter has checked shapes and dtypes.
void mask_tokens_fwd(Tensor patches, OptTensor mask, OptTensor mask_token, OptTensor pos_embed, OptTensor cls_token,
                     Tensor out) {
  const bool has_mask = ptr(mask) != nullptr;
  const Param pos = param_of(pos_embed, "pos_embed");
  const DType dtype = dtype_of(patches, "patches");
  STD_TORCH_CHECK(pos.data == nullptr || pos.dtype == dtype || pos.dtype == DType::f32,
                  "mask_tokens: pos_embed must have the dtype of patches or float32");
  run_mask_tokens_fwd({.dtype = dtype,
                       .patches = ptr(patches),
                       .mask = ptr_as<bool>(mask),
                       .mask_token = param_of(mask_token, "mask_token"),
                       .pos_embed = pos,
                       .prefix_tokens = param_of(cls_token, "cls_token"),
                       .out = ptr(out),
                       .batch = out.size(0),
                       .P = patches.size(1),
                       .num_prefix = out.size(1) - patches.size(1),
                       .C = out.size(2),
                       .patches_batch_stride = patches.stride(0),
                       .patches_token_stride = patches.stride(1),
                       .mask_batch_stride = has_mask ? mask->stride(0) : 0,
                       .mask_token_stride = has_mask ? mask->stride(1) : 0,
                       .out_batch_stride = out.stride(0),
                       .out_token_stride = out.stride(1)},
                      target_of(patches));
}

void mask_tokens_bwd(Tensor dout, OptTensor mask, int64_t num_prefix, OptTensor dpatches, OptTensor dmask_token,
                     OptTensor dpos_embed, OptTensor dcls_token) {
  const bool has_mask = ptr(mask) != nullptr, has_dpatches = ptr(dpatches) != nullptr;
  run_mask_tokens_bwd({.dtype = dtype_of(dout, "dout"),
                       .dout = ptr(dout),
                       .mask = ptr_as<bool>(mask),
                       .dpatches = ptr(dpatches),
                       .dmask_token = param_grad_of(dmask_token, "dmask_token"),
                       .dpos_embed = param_grad_of(dpos_embed, "dpos_embed"),
                       .dprefix_tokens = param_grad_of(dcls_token, "dcls_token"),
                       .batch = dout.size(0),
                       .P = dout.size(1) - num_prefix,
                       .num_prefix = num_prefix,
                       .C = dout.size(2),
                       .dout_batch_stride = dout.stride(0),
                       .dout_token_stride = dout.stride(1),
                       .mask_batch_stride = has_mask ? mask->stride(0) : 0,
                       .mask_token_stride = has_mask ? mask->stride(1) : 0,
                       .dpatches_batch_stride = has_dpatches ? dpatches->stride(0) : 0,
                       .dpatches_token_stride = has_dpatches ? dpatches->stride(1) : 0},
                      target_of(dout));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eva02_kernels_C, m) {
  m.def("mask_tokens_fwd" EVA02_TARGET
        "(Tensor patches, Tensor? mask, Tensor? mask_token, Tensor? pos_embed, Tensor? cls_token, "
        "Tensor(a!) out) -> ()");
  m.def("mask_tokens_bwd" EVA02_TARGET
        "(Tensor dout, Tensor? mask, int num_prefix, Tensor(a!)? dpatches, Tensor(b!)? dmask_token, "
        "Tensor(c!)? dpos_embed, Tensor(d!)? dcls_token) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(eva02_kernels_C, EVA02_KEY, m) {
  m.impl("mask_tokens_fwd" EVA02_TARGET, TORCH_BOX(&mask_tokens_fwd));
  m.impl("mask_tokens_bwd" EVA02_TARGET, TORCH_BOX(&mask_tokens_bwd));
}

}  // namespace eva02
