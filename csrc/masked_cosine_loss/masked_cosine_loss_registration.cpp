#include "common/param_adapter.h"
#include "common/token_rows.h"
#include "masked_cosine_loss/masked_cosine_loss.h"

namespace eva02 {
namespace {

// pred (M, D) and target (T, D) with a contiguous last dim; idx (M,) flat rows of target, negative: left out; loss and
// dloss one float32; stats (3, M) float32 contiguous. The Python adapter has checked shapes and dtypes; indices are
// checked here. Without idx, T == M.
void masked_cosine_loss_fwd_cpu(Tensor pred, Tensor target, OptTensor idx, Tensor loss, Tensor stats) {
  std::vector<int64_t> index;
  if (idx.has_value()) index = token_rows(*idx, 1, target.size(0), "idx");
  run_masked_cosine_loss_fwd({.dtype = dtype_of(pred, "pred"),
                              .pred = ptr(pred),
                              .target = ptr(target),
                              .index = idx.has_value() ? index.data() : nullptr,
                              .loss = ptr_as<float>(loss),
                              .stats = ptr_as<float>(stats),
                              .M = pred.size(0),
                              .D = pred.size(1),
                              .pred_stride = pred.stride(0),
                              .target_stride = target.stride(0)},
                             torch_runtime());
}

void masked_cosine_loss_bwd_cpu(Tensor dloss, Tensor pred, Tensor target, OptTensor idx, Tensor stats, OptTensor dpred,
                                OptTensor dtarget) {
  std::vector<int64_t> index;
  if (idx.has_value()) index = token_rows(*idx, 1, target.size(0), "idx");
  run_masked_cosine_loss_bwd({.dtype = dtype_of(pred, "pred"),
                              .dloss = ptr_as<float>(dloss),
                              .pred = ptr(pred),
                              .target = ptr(target),
                              .index = idx.has_value() ? index.data() : nullptr,
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
                             torch_runtime());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eva02_kernels_C, m) {
  m.def("masked_cosine_loss_fwd_cpu(Tensor pred, Tensor target, Tensor? idx, Tensor(a!) loss, Tensor(b!) stats) -> ()");
  m.def(
      "masked_cosine_loss_bwd_cpu(Tensor dloss, Tensor pred, Tensor target, Tensor? idx, Tensor stats, "
      "Tensor(a!)? dpred, Tensor(b!)? dtarget) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(eva02_kernels_C, CPU, m) {
  m.impl("masked_cosine_loss_fwd_cpu", TORCH_BOX(&masked_cosine_loss_fwd_cpu));
  m.impl("masked_cosine_loss_bwd_cpu", TORCH_BOX(&masked_cosine_loss_bwd_cpu));
}

}  // namespace eva02
