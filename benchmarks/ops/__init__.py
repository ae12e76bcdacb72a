"""Peers of each operator: one file an operator, imported here so that their arms are registered."""

from benchmarks.ops import (  # noqa: F401
    apply_rope,
    gather_layer_norm,
    gelu_mlp,
    rope_attention,
    subln_swiglu,
    swiglu,
    swiglu_mlp,
)
