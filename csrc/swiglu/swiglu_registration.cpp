#include "common/torch_adapter.h"
#include "swiglu/swiglu.h"

namespace eva02 {
namespace {

// Every tensor is 2-D (rows, F) with a contiguous last dim; the Python adapter has checked shapes and dtypes.
void swiglu_fwd(Tensor gate, Tensor up, Tensor out) {
  run_swiglu_fwd({.dtype = dtype_of(gate, "gate"),
                  .gate = ptr(gate),
                  .up = ptr(up),
                  .out = ptr(out),
                  .rows = gate.size(0),
                  .F = gate.size(1),
                  .gate_stride = gate.stride(0),
                  .up_stride = up.stride(0),
                  .out_stride = out.stride(0)},
                 target_of(gate));
}

void swiglu_bwd(Tensor dout, Tensor gate, Tensor up, Tensor dgate, Tensor dup) {
  run_swiglu_bwd({.dtype = dtype_of(gate, "gate"),
                  .dout = ptr(dout),
                  .gate = ptr(gate),
                  .up = ptr(up),
                  .dgate = ptr(dgate),
                  .dup = ptr(dup),
                  .rows = gate.size(0),
                  .F = gate.size(1),
                  .dout_stride = dout.stride(0),
                  .gate_stride = gate.stride(0),
                  .up_stride = up.stride(0),
                  .dgate_stride = dgate.stride(0),
                  .dup_stride = dup.stride(0)},
                 target_of(dout));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eva02_kernels_C, m) {
  m.def("swiglu_fwd" EVA02_TARGET "(Tensor gate, Tensor up, Tensor(a!) out) -> ()");
  m.def("swiglu_bwd" EVA02_TARGET "(Tensor dout, Tensor gate, Tensor up, Tensor(a!) dgate, Tensor(b!) dup) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(eva02_kernels_C, EVA02_KEY, m) {
  m.impl("swiglu_fwd" EVA02_TARGET, TORCH_BOX(&swiglu_fwd));
  m.impl("swiglu_bwd" EVA02_TARGET, TORCH_BOX(&swiglu_bwd));
}

}  // namespace eva02
