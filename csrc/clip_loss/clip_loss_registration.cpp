#include "clip_loss/clip_loss.h"
#include "common/param_adapter.h"

namespace eva02 {
namespace {

// rows (M, D) and keys (N, D) with a contiguous last dim; scale, loss, dloss and dscale one float32; target and
// row_... (M,), column_... and key_... (N,) float32 contiguous. The Python adapter has checked shapes and dtypes.
void clip_loss_fwd(Tensor rows, Tensor keys, Tensor scale, int64_t first, Tensor target, Tensor row_loss,
                   OptTensor column_loss, Tensor loss) {
  run_clip_loss_fwd({.dtype = dtype_of(rows, "rows"),
                     .rows = ptr(rows),
                     .keys = ptr(keys),
                     .scale = ptr_as<const float>(scale),
                     .target = ptr_as<float>(target),
                     .row_loss = ptr_as<float>(row_loss),
                     .column_loss = ptr_as<float>(column_loss),
                     .loss = ptr_as<float>(loss),
                     .M = rows.size(0),
                     .N = keys.size(0),
                     .D = rows.size(1),
                     .first = first,
                     .row_stride = rows.stride(0),
                     .key_stride = keys.stride(0)},
                    target_of(rows));
}

void clip_loss_bwd(Tensor dloss, Tensor rows, Tensor keys, Tensor scale, int64_t first, Tensor row_target,
                   Tensor row_loss, Tensor key_target, Tensor key_loss, OptTensor drows, OptTensor dkeys,
                   OptTensor dscale) {
  run_clip_loss_bwd({.dtype = dtype_of(rows, "rows"),
                     .dloss = ptr_as<const float>(dloss),
                     .scale = ptr_as<const float>(scale),
                     .rows = ptr(rows),
                     .keys = ptr(keys),
                     .row_target = ptr_as<const float>(row_target),
                     .row_loss = ptr_as<const float>(row_loss),
                     .key_target = ptr_as<const float>(key_target),
                     .key_loss = ptr_as<const float>(key_loss),
                     .drows = ptr(drows),
                     .dkeys = ptr(dkeys),
                     .dscale = ptr_as<float>(dscale),
                     .M = rows.size(0),
                     .N = keys.size(0),
                     .D = rows.size(1),
                     .first = first,
                     .row_stride = rows.stride(0),
                     .key_stride = keys.stride(0),
                     .drow_stride = row_stride(drows),
                     .dkey_stride = row_stride(dkeys)},
                    target_of(dloss));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eva02_kernels_C, m) {
  m.def("clip_loss_fwd" EVA02_TARGET
        "(Tensor rows, Tensor keys, Tensor scale, int first, Tensor(a!) target, Tensor(b!) row_loss, "
        "Tensor(c!)? column_loss, Tensor(d!) loss) -> ()");
  m.def(
      "clip_loss_bwd" EVA02_TARGET
      "(Tensor dloss, Tensor rows, Tensor keys, Tensor scale, int first, Tensor row_target, "
      "Tensor row_loss, Tensor key_target, Tensor key_loss, Tensor(a!)? drows, Tensor(b!)? dkeys, Tensor(c!)? dscale) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(eva02_kernels_C, EVA02_KEY, m) {
  m.impl("clip_loss_fwd" EVA02_TARGET, TORCH_BOX(&clip_loss_fwd));
  m.impl("clip_loss_bwd" EVA02_TARGET, TORCH_BOX(&clip_loss_bwd));
}

}  // namespace eva02
