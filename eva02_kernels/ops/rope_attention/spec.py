from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eva02_kernels._library import define, input_gradients, save_inputs
from eva02_kernels._registry import OpSpec, Sample
from eva02_kernels.ops._common import (
    autocast,
    check,
    check_activation,
    check_like,
    check_parameter,
    cpu_backend,
    cuda_backend,
    eager_backend,
    reference_backward,
    triton_backend,
)
from eva02_kernels.ops.rope_attention import native
from eva02_kernels.ops.rope_attention.reference import attention_with_lse_ref, rope_attention_ref
from eva02_kernels.rope import NUM_ROPE_ARGS, ROPE_SCHEMA, RopeTable, canonical_rope, rope_2d

ATTENTION_SCHEMA = (
    f"{ROPE_SCHEMA}, Tensor? key_padding_mask, Tensor? cu_seqlens, int max_seqlen, bool causal, float scale, "
    "Tensor? q_norm, Tensor? k_norm, float norm_eps"
)
# Places of the differentiable ones among ATTENTION_SCHEMA's arguments: cos, sin, q_norm, k_norm.
DIFFERENTIABLE = (0, 1, 12, 13)
NUM_SHARED = NUM_ROPE_ARGS + 8
_PLACES = (0, 1, 2, *(3 + i for i in DIFFERENTIABLE))


def canonical_attention(
    q: Tensor,
    num_kv_heads: int,
    rope: RopeTable | None = None,
    *,
    num_prefix_tokens: int = 1,
    keep_idx: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> tuple[Any, ...]:
    """Arguments of ATTENTION_SCHEMA for queries shaped as ``q``, checked."""
    *batch, tokens, heads, head_dim = q.shape
    if cu_seqlens is not None:
        check(q.dim() == 3, "q", "(T, H, D) with cu_seqlens", tuple(q.shape))
        check(
            cu_seqlens.dim() == 1 and cu_seqlens.dtype == torch.int32 and cu_seqlens.numel() >= 1,
            "cu_seqlens",
            "int32 (num_seq + 1,)",
            f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype}",
        )
        check(cu_seqlens.device == q.device, "cu_seqlens", f"a tensor on {q.device}", cu_seqlens.device)
        check(max_seqlen is not None, "max_seqlen", "an int with cu_seqlens", max_seqlen)
        check(key_padding_mask is None, "key_padding_mask", "None with cu_seqlens", "a tensor")
        check(keep_idx is None, "keep_idx", "None with cu_seqlens", "a tensor")
    else:
        check(q.dim() == 4, "q", "(B, S, H, D)", tuple(q.shape))
        if key_padding_mask is not None:
            check(
                key_padding_mask.dtype == torch.bool
                and tuple(key_padding_mask.shape) == (batch[0], tokens)
                and key_padding_mask.device == q.device,
                "key_padding_mask",
                f"bool ({batch[0]}, {tokens}) on {q.device}",
                f"{tuple(key_padding_mask.shape)} {key_padding_mask.dtype} on {key_padding_mask.device}",
            )
        check(
            rope is None or tokens >= num_prefix_tokens,
            "num_prefix_tokens",
            f"at most the {tokens} tokens",
            num_prefix_tokens,
        )
    check_parameter("q_norm", q_norm, (head_dim,), q)
    check_parameter("k_norm", k_norm, (head_dim,), q)
    table = canonical_rope(
        rope,
        head_dim,
        num_prefix_tokens,
        keep_idx,
        num_patches=None if cu_seqlens is not None else tokens - num_prefix_tokens,
        batch=batch[0] if cu_seqlens is None else len(cu_seqlens) - 1,
        num_heads=heads,
        num_kv_heads=num_kv_heads,
        like=q,
    )
    return (
        *table,
        key_padding_mask,
        cu_seqlens,
        int(max_seqlen or 0),
        causal,
        head_dim**-0.5 if scale is None else float(scale),
        q_norm,
        k_norm,
        norm_eps,
    )


def _canonical(q: Tensor, k: Tensor, v: Tensor, rope: RopeTable | None = None, **kwargs: Any) -> tuple[Any, ...]:
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_activation(name, t, min_dim=3)
    q, k, v = autocast(q, k, v)
    check(
        k.dim() == q.dim()
        and k.shape[:-2] == q.shape[:-2]
        and k.shape[-1] == q.shape[-1]
        and (k.shape[-2] > 0 and q.shape[-2] % k.shape[-2] == 0),
        "k",
        f"(..., Hkv, D) beside q {tuple(q.shape)}, Hkv dividing H",
        tuple(k.shape),
    )
    check_like("k", k, k.shape, q)
    check_like("v", v, k.shape, q)
    return q, k, v, *canonical_attention(q, k.shape[-2], rope, **kwargs)


def fake_attention(q: Tensor) -> tuple[Tensor, Tensor]:
    *batch, tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(*batch, heads, tokens, dtype=torch.float32)


def _fake_bwd(dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> list[Tensor]:
    *args, needs = args  # type: ignore[assignment]
    inputs = (q, k, v, *(args[i] for i in DIFFERENTIABLE))
    return [t.new_empty(t.shape) for t, need in zip(inputs, needs, strict=True) if need]


def save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    save_inputs(ctx, output, inputs)


def _backward(ctx: Any, dout: Tensor, dlse: None) -> list[Tensor | None]:
    return input_gradients(ctx, "rope_attention_bwd", dout, _PLACES)


def attention_inputs(
    dtype: torch.dtype,
    generator: torch.Generator,
    shape: tuple[int, ...],
    *,
    num_kv_heads: int | None = None,
    rope: str = "axis",
    grid: tuple[int, int] = (1, 1),
    layout: str = "interleaved",
    prefix: int = 1,
    keep: int | None = None,
    mask: bool = False,
    causal: bool = False,
    norm: bool = False,
    swap: bool = False,
    table_scale: float = 1.0,
    seqlens: tuple[tuple[int, int], ...] | None = None,
    grids: tuple[tuple[int, int], ...] | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """Random q, k, v of (B, H, D) = ``shape`` and keyword arguments; the sequence follows from the grid."""
    batch, heads, d = shape
    kv = num_kv_heads or heads
    patches = grid[0] * grid[1]
    kwargs: dict[str, Any] = {"num_prefix_tokens": prefix, "causal": causal}
    if seqlens is not None:
        lengths = [prefix + h * w for h, w in seqlens]
        lead: tuple[int, ...] = (sum(lengths),)
        kwargs["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        kwargs["max_seqlen"] = max(lengths)
    else:
        lead = (batch, prefix + (patches if keep is None else keep))
    q, k, v = (torch.randn(*lead, n, d, generator=generator).to(dtype) for n in (heads, kv, kv))
    if rope == "axis":
        sides: Any = grid
        extra: dict[str, Any] = {"grid_indexing": "xy" if swap else "ij"}
        if seqlens is not None or grids is not None:
            sides = torch.tensor(seqlens or grids, dtype=torch.int32)
            extra["max_grid"] = tuple(int(n) for n in sides.max(0).values)
        kwargs["rope"] = rope_2d(sides, d, layout=layout, **extra)
    elif rope != "none":
        lead_table = {"dense": (), "head": (heads,), "batch": (batch,)}[rope]
        angles = torch.randn(*lead_table, patches, d // 2, generator=generator) * 2
        angles = angles.to(torch.promote_types(dtype, torch.float32))
        per = None if rope == "dense" else rope
        kwargs["rope"] = RopeTable.from_cos_sin(table_scale * angles.cos(), table_scale * angles.sin(), layout, per=per)
    if keep is not None:
        kwargs["keep_idx"] = torch.stack([torch.randperm(patches, generator=generator)[:keep] for _ in range(batch)])
    if mask:
        keys = torch.rand(lead, generator=generator) > 0.3
        keys[0] = False  # a sample with no key at all
        kwargs["key_padding_mask"] = keys
    if norm:
        kwargs["q_norm"] = (1 + 0.1 * torch.randn(d, generator=generator)).to(dtype)
        kwargs["k_norm"] = (1 + 0.1 * torch.randn(d, generator=generator)).to(dtype)
    return (q, k, v), kwargs


def attention_cases() -> dict[str, dict[str, Any]]:
    """Keyword arguments of :func:`attention_inputs` by sample name; shared with the packed operator."""
    return {
        "S1": {"shape": (2, 2, 16), "grid": (0, 0)},
        "S2": {"shape": (2, 2, 16), "grid": (1, 1)},
        "S16": {"shape": (1, 2, 64), "grid": (3, 5)},
        "S17": {"shape": (1, 2, 64), "grid": (4, 4)},
        "S37": {"shape": (2, 3, 64), "grid": (4, 9)},
        "S64": {"shape": (1, 1, 16), "grid": (7, 9)},
        "S129": {"shape": (1, 1, 88), "grid": (8, 16), "layout": "half"},
        "half": {"shape": (2, 2, 32), "grid": (3, 4), "layout": "half", "prefix": 5},
        "swap": {"shape": (1, 2, 32), "grid": (3, 4), "swap": True, "prefix": 0},
        "none": {"shape": (2, 2, 20), "grid": (3, 3), "rope": "none"},
        "dense": {"shape": (2, 2, 24), "grid": (3, 3), "rope": "dense"},
        "scaled_table": {"shape": (2, 2, 24), "grid": (3, 3), "rope": "dense", "table_scale": 1.1},
        "head_table": {"shape": (2, 3, 16), "grid": (3, 4), "rope": "head", "layout": "half"},
        "batch_table": {"shape": (2, 3, 16), "grid": (3, 4), "rope": "batch"},
        "keep": {"shape": (2, 2, 64), "grid": (4, 4), "keep": 7},
        "mask": {"shape": (3, 2, 64), "grid": (4, 4), "mask": True},
        "causal": {"shape": (2, 2, 88), "grid": (5, 7), "causal": True},
        "gqa": {"shape": (2, 4, 64), "num_kv_heads": 2, "grid": (4, 5)},
        "norm": {"shape": (2, 4, 76), "num_kv_heads": 2, "grid": (4, 5), "norm": True},
        "varlen": {"shape": (1, 2, 64), "seqlens": ((2, 3), (4, 4), (1, 1))},
        "varlen_dense": {"shape": (3, 2, 24), "seqlens": ((2, 3), (4, 4), (1, 1)), "grid": (4, 4), "rope": "dense"},
        "varlen_batch": {"shape": (3, 2, 24), "seqlens": ((2, 3), (4, 4), (1, 1)), "grid": (4, 4), "rope": "batch"},
        # A sequence of fewer blocks than the longest has.
        "varlen_norm": {"shape": (2, 2, 16), "seqlens": ((2, 3), (5, 7)), "norm": True},
        "grids": {"shape": (2, 2, 16), "grid": (3, 4), "grids": ((3, 4), (4, 3)), "swap": True},
        "keep_dense": {"shape": (2, 2, 24), "grid": (4, 4), "keep": 7, "rope": "dense"},
        "keep_batch": {"shape": (2, 2, 24), "grid": (4, 4), "keep": 7, "rope": "batch"},
        "dense88": {"shape": (6, 3, 88), "grid": (2, 2), "rope": "dense"},
        # More partial sums of the norms' gradients than are added at a time.
        "norm_heads": {"shape": (3, 11, 8), "grid": (1, 1), "norm": True, "rope": "none"},
        "D128": {"shape": (1, 2, 128), "grid": (6, 6)},
        "empty": {"shape": (0, 2, 16), "grid": (2, 2)},
        "S257": {"shape": (1, 2, 64), "grid": (16, 16)},
        "block_L": {"shape": (1, 16, 64), "grid": (16, 16)},
        "S1025": {"shape": (1, 2, 64), "grid": (32, 32)},
    }


def _samples() -> list[Sample]:
    def make(case: dict[str, Any]) -> Any:
        return lambda dtype, generator: attention_inputs(dtype, generator, **case)

    return [
        Sample(name, make(case), smoke=name in ("keep", "gqa"), full=name in ("block_L", "S1025"))
        for name, case in attention_cases().items()
    ]


def _magnitude(name: str, q: Tensor, k: Tensor, v: Tensor, rope: Any = None, **kwargs: Any) -> float:
    """dq and dk are sums over keys (queries) of p * (dp - delta) * k (q): zero where there is one token."""
    if name not in ("arg0", "arg1") or not q.numel():
        return 0.0
    other = (k if name == "arg0" else q).detach()
    rms = [float(t.detach().square().mean().sqrt()) for t in (v, other)]
    # Two terms, p * dp and p * delta; scale * sqrt(D) = 1; incoming gradients have rms 1.
    return 2 * rms[0] * rms[1] / max(1, q.shape[-3]) ** 0.5


def attention_bytes(q: Tensor, num_kv_heads: int) -> tuple[int, int]:
    """Forward reads q, k, v and writes out; backward reads those, out and dout and writes three gradients."""
    one = q.element_size() * q.numel()
    kv = 2 * one * num_kv_heads // max(1, q.shape[-2])
    return 2 * one + kv, 4 * one + 2 * kv


def attention_flops(q: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """Two matrix products forward, five backward; not counted for packed sequences (lengths are on the device)."""
    if cu_seqlens is not None:
        return 0, 0
    batch, tokens, heads, d = q.shape
    product = 2 * batch * heads * tokens * tokens * d
    return 2 * product, 5 * product


def triton_unsupported(direction: str, args: tuple[Any, ...]) -> Sequence[str]:
    """Of rope_attention and rope_attention_packed; the first argument is q, qkv or dout."""
    reasons = []
    head_dim = args[0].shape[-1]
    if head_dim % 4 or not 4 <= head_dim <= 128:
        reasons.append(f"needs a head dim of 4..128 in steps of 4, got {head_dim}")
    for t in args[:6]:  # q, k, v or qkv; before them in backward dout, out, lse
        if isinstance(t, Tensor) and t.dim() >= 3 and t.dtype == args[0].dtype and t.shape[-3] * t.stride(-3) >= 2**31:
            sizes = f"{t.shape[-3]} tokens of {t.stride(-3)}"
            reasons.append(f"needs sequences that span under 2**31 elements, got {sizes}")
            break
    # The schema's shared arguments are the last ones, before `needs` in backward.
    shared = args[-NUM_SHARED:] if direction == "fwd" else args[-NUM_SHARED - 1 : -1]
    cos, sin, _, grid = shared[:4]
    q_norm, k_norm = shared[-3:-1]
    trains = False
    if cos is not None and not grid:
        trains = cos.requires_grad or sin.requires_grad or (direction == "bwd" and any(args[-1][-4:-2]))
    if trains and (q_norm is not None or k_norm is not None):
        reasons.append("has no gradient of a dense table beside q_norm or k_norm")
    return reasons


SPEC = define(
    OpSpec(
        name="rope_attention",
        summary="flash attention with q and k rotated on load (2-D RoPE)",
        formula="softmax(scale * R(q) R(k)^T) v",
        source="Dao et al., arXiv:2307.08691; EVA-02, arXiv:2303.11331",
        fwd_schema=f"Tensor q, Tensor k, Tensor v, {ATTENTION_SCHEMA}",
        fwd_returns="(Tensor, Tensor)",
        bwd_schema=f"Tensor dout, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, {ATTENTION_SCHEMA}, "
        "bool[] needs",
        canonical=_canonical,
        reference=attention_with_lse_ref,
        fake_fwd=lambda q, *args: fake_attention(q),
        fake_bwd=_fake_bwd,
        setup_context=save_attention,
        backward=_backward,
        backends=(
            cuda_backend(native.fwd, native.bwd, native.cuda_unsupported, error_multiple=native.ERROR_MULTIPLE),
            triton_backend("rope_attention", triton_unsupported, error_multiple=native.ERROR_MULTIPLE),
            cpu_backend(native.fwd, native.bwd, native.unsupported, error_multiple=native.ERROR_MULTIPLE),
            eager_backend(
                attention_with_lse_ref,
                reference_backward(
                    rope_attention_ref,
                    _PLACES,
                    lambda dout, out, lse, *args: ([dout], args[:-1], args[-1]),
                ),
            ),
        ),
        num_outputs=2,
        samples=_samples,
        saved="q, k, v as given; out; lse (B, H, S) float32; the tables",
        bytes_moved=lambda q, k, *args: attention_bytes(q, k.shape[-2]),
        flops=lambda q, k, v, *args: attention_flops(q, args[8]),
        magnitude=_magnitude,
    )
)
