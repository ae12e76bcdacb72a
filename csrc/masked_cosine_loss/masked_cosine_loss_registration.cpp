#include "common/param_adapter.h"
#include "common/token_rows.h"
#include "masked_cosine_loss/masked_cosine_loss.h"

namespace eva02 {
namespace {

// pred (M, D) and target (T, D) with a contiguous last dim; idx (M,) flat rows of target, negative: left out; loss and
// dloss one float32; stats (3, M) float32 contiguous. The Python adapter has checked shapes and dtypes; values of the
// index are checked here, on the CPU. Without idx, T == M.
void masked_cosine_loss_fwd(Tensor pred, Tensor target, OptTensor idx, Tensor loss, Tensor stats) {
  run_masked_cosine_loss_fwd({.dtype = dtype_of(pred, "pred"),
                              .pred = ptr(pred),
                              .target = ptr(target),
                              .index = token_index(idx, 1, target.size(0), "idx"),
                              .loss = ptr_as<float>(loss),
                              .stats = ptr_as<float>(stats),
                              .M = pred.size(0),
                              .D = pred.size(1),
                              .pred_stride = pred.stride(0),
                              .target_stride = target.stride(0)},
                             target_of(pred));
}

void masked_cosine_loss_bwd(Tensor dloss, Tensor pred, Tensor target, OptTensor idx, OptTensor entries,
                            OptTensor offsets, Tensor stats, OptTensor dpred, OptTensor dtarget) {
  run_masked_cosine_loss_bwd({.dtype = dtype_of(pred, "pred"),
                              .dloss = ptr_as<float>(dloss),
                              .pred = ptr(pred),
                              .target = ptr(target),
                              .index = token_index(idx, 1, target.size(0), "idx"),
                              .inverse = inverse_of(entries, offsets),
                              .stats = ptr_as<float>(stats),
                              .dpred = ptr(dpred),
                              .dtarget = ptr(dtarget),
                              .M = pred.size(0),
                              .T = target.size(0),
                              .D = pred.size(1),
                              .pred_stride = pred.stride(0),
                              .target_stride = target.stride(0),
                              .dpred_stride = row_stride(dpred),
                              .dtarget_stride = row_stride(dtarget)},
                             target_of(dloss));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eva02_kernels_C, m) {
  m.def("masked_cosine_loss_fwd" EVA02_TARGET
        "(Tensor pred, Tensor target, Tensor? idx, Tensor(a!) loss, Tensor(b!) stats) -> ()");
  m.def("masked_cosine_loss_bwd" EVA02_TARGET
        "(Tensor dloss, Tensor pred, Tensor target, Tensor? idx, Tensor? entries, Tensor? offsets, Tensor stats, "
        "Tensor(a!)? dpred, Tensor(b!)? dtarget) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(eva02_kernels_C, EVA02_KEY, m) {
  m.impl("masked_cosine_loss_fwd" EVA02_TARGET, TORCH_BOX(&masked_cosine_loss_fwd));
  m.impl("masked_cosine_loss_bwd" EVA02_TARGET, TORCH_BOX(&masked_cosine_loss_bwd));
}

}  // namespace eva02
