"""Steps of linear, gelu_mlp, swiglu_mlp and qkv_rope on a GPU, over the kernels of a backend.

The kernels are those of a module, ``_triton_gemm`` or ``_cuda_gemm``: :class:`Kernels` says what it has. Two routes
(``Kernels.fused``): products with everything around them in their epilogue, or torch.mm (cuBLAS) for the products and
one kernel over rows for what is around them.
Hidden tensors have rows padded to 16 bytes (``padded``); their padding is zero, as is that of weights which meet it, so
that products run over the padded width with aligned rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from eva02_kernels.ops._common import empty_stats, padded


class Part(NamedTuple):
    """Of projections of one input, whose gradient dy is of all, those of dy's columns from ``first`` on: gradients of
    their weight (columns, K) and bias (columns,), where wanted."""

    first: int
    weight: Tensor | None
    bias: Tensor | None


class HiddenNorm(NamedTuple):
    """LayerNorm of a hidden layer (F columns), and where its statistics go."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    mean: Tensor
    rstd: Tensor


class Kernels(Protocol):
    """Kernels on rows: activations are (rows, N) with a contiguous last dim and any row stride, outputs come first to
    last as arguments, what is None is not read or not written."""

    @staticmethod
    def fused(t: Tensor) -> bool:
        """Whether products of t are this backend's, with everything around them in their epilogue."""

    @staticmethod
    def multiply(a: Tensor, b: Tensor, out: Tensor, add: Tensor | None = None) -> Tensor:
        """out = a b [+ a bias (N,) or a matrix]; a and b with rows or columns contiguous."""

    @staticmethod
    def weight_gradients(dy: Tensor, a: Tensor | None, parts: Sequence[Part]) -> None:
        """Fill what is wanted of each part: weight = dy^T a and bias = column sums of dy, of the part's columns of dy.
        ``a`` is for weights alone."""

    @staticmethod
    def weight_gradient_float32(dy: Tensor, a: Tensor) -> Tensor:
        """dy^T a in float32, of 16-bit operands too."""

    @staticmethod
    def project(
        a: Tensor, weight: Tensor, bias: Tensor | None, layer_scale: Tensor | None, row_scale: Tensor | None,
        residual: Tensor | None, out: Tensor,
    ) -> None:  # fmt: skip
        """out = residual + row_scale * layer_scale * (a weight^T + bias)."""

    @staticmethod
    def project_parts(a: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], out: Tensor) -> bool:
        """out = a W^T + b of three weights and biases, one behind the other; False where one launch does not do it."""

    @staticmethod
    def finish(
        y: Tensor, bias: Tensor | None, layer_scale: Tensor | None, row_scale: Tensor | None,
        residual: Tensor | None, out: Tensor,
    ) -> None:  # fmt: skip
        """The same from y = a weight^T."""

    @staticmethod
    def activate(
        a: Tensor, w_gate: Tensor, w_up: Tensor | None, b_gate: Tensor | None, b_up: Tensor | None,
        kept: Tensor | None, hidden: Tensor | None, norm_weight: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """kept (rows, 2, Fp) = gate and up, hidden (rows, Fp) = silu(gate) * up; without w_up kept (rows, 1, Fp) =
        gate before its bias and hidden = gelu(gate + bias). With ``norm_weight`` hidden is multiplied by it and what
        :meth:`project_normed` needs of the rows is returned."""

    @staticmethod
    def project_normed(
        hidden: Tensor, rows: Any, norm: HiddenNorm, weight: Tensor, bias: Tensor | None, layer_scale: Tensor | None,
        row_scale: Tensor | None, residual: Tensor | None, out: Tensor,
    ) -> None:  # fmt: skip
        """:meth:`project` of the LayerNorm of what :meth:`activate` made ``hidden`` and ``rows`` from; weight padded as
        hidden is."""

    @staticmethod
    def activate_rows(kept: Tensor, bias: Tensor | None, hidden: Tensor, width: int) -> None:
        """hidden from kept (and, of a GELU, gate's bias), of ``width`` columns without the padding."""

    @staticmethod
    def hidden_gradient(
        dy: Tensor, w_down: Tensor, kept: Tensor, bias: Tensor | None, centre: Tensor | None, dkept: Tensor,
        hidden: Tensor | None, grads: Sequence[Tensor | None],
    ) -> None:  # fmt: skip
        """dkept like kept for dhidden = dy w_down, hidden again, and the gradients of the biases of gate and up. Of a
        GELU: gate's bias, and what is subtracted from hidden's columns (F,) float32."""

    @staticmethod
    def hidden_gradient_rows(
        dhidden: Tensor, kept: Tensor, bias: Tensor | None, centre: Tensor | None, dkept: Tensor,
        hidden: Tensor | None, width: int,
    ) -> None:  # fmt: skip
        """The same from dhidden (rows, Fp), without the biases."""

    @staticmethod
    def project_rope(
        a: Tensor, weight: Tensor, bias: Tensor | None, rope: Any, tokens: int, heads: int, kv_heads: int,
        head_dim: int, out: Tensor,
    ) -> None:  # fmt: skip
        """out = a weight^T + bias, heads of q and k, or of either, rotated (interleaved pairs)."""

    @staticmethod
    def scale_and_sum(
        x: Tensor, *, layer_scale: Tensor | None = None, row_scale: Tensor | None = None, scaled: Tensor | None = None,
        row_scaled: Tensor | None = None, sums: Tensor | None = None,
    ) -> None:  # fmt: skip
        """row_scaled = row_scale x, scaled = layer_scale row_scale x, sums (N,) = column sums of row_scale x."""

    @staticmethod
    def finish_gradients(
        product: Tensor | None, sums: Tensor | None, centre: Tensor | None, weight: Tensor, bias: Tensor | None,
        layer_scale: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, dscale: Tensor | None,
    ) -> None:  # fmt: skip
        """See :func:`output_parameter_gradients`; product (N, K), sums (N,) and centre (K,) are float32."""

    @staticmethod
    def normalise(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor, mean: Tensor, rstd: Tensor
    ) -> None:
        """LayerNorm of rows and its statistics."""

    @staticmethod
    def norm_backward(
        dnormed: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, dx: Tensor | None,
        *, dresidual: Tensor | None = None, dweight: Tensor | None = None, dbias: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Its gradients; dresidual is added to dx."""

    @staticmethod
    def subln_forward(
        gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor, mean: Tensor, rstd: Tensor,
        *, cols: int,
    ) -> None:  # fmt: skip
        """subln_swiglu of rows padded to ``cols`` columns."""

    @staticmethod
    def subln_backward(
        dout: Tensor, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor,
        dgate: Tensor, dup: Tensor, hidden: Tensor | None, grads: Sequence[Tensor | None],
    ) -> None:  # fmt: skip
        """Its gradients dgate and dup (rows, cols), its output again, and the gradients of its weight, its bias and the
        biases of gate and up; the padding becomes zero."""

    @staticmethod
    def rotate(x: Tensor, rope: Sequence[Any], *, inverse: bool, out: Tensor | None = None) -> Tensor:
        """x (B, S, H, D) rotated, or rotated back."""

    @staticmethod
    def table_gradients(dout: Tensor, x: Tensor, rope: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Gradients of a dense table's cosines and sines."""


# ---- operands --------------------------------------------------------------------------------------------------------
def padded_columns(weight: Tensor) -> Tensor:
    """weight (N, F) with rows of 16 bytes' multiples: a copy with zeros behind each row, or itself."""
    width = weight.shape[1]
    if padded(width) == width:
        return weight
    return torch.nn.functional.pad(weight, (0, padded(width) - width))


def stacked(parts: Sequence[Tensor | None], like: Tensor, width: int) -> Tensor:
    """Rows (or elements) of the parts, each with zeros behind up to ``width``: itself where one part needs none."""
    only = parts[0]
    if len(parts) == 1 and only is not None and only.shape[0] == width and only.dtype == like.dtype:
        return only
    shape = (len(parts), width, *like.shape[1:])
    out = torch.zeros(shape, dtype=like.dtype, device=like.device)
    for place, part in zip(out, parts, strict=True):
        if part is not None:
            place[: part.shape[0]] = part
    return out.view(-1, *like.shape[1:])


def gate_and_up(kept: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if kept is None:
        return None, None
    return kept[:, 0], kept[:, 1] if kept.shape[1] == 2 else None


def _parts(gate: Tensor | None, up: Tensor | None, w_up: Tensor | None, halves: int) -> list[Tensor | None]:
    """The parts of a hidden weight or bias; a packed one is split only where its halves are padded."""
    if w_up is not None or halves == 1:
        return [gate, up][:halves]
    assert gate is not None
    width = gate.shape[0] // 2
    return [gate[:width], gate[width:]]


def _stack_hidden(w_gate: Tensor, w_up: Tensor | None, halves: int) -> Tensor:
    """(halves * Fp, K) weights of gate and up with zero rows as padding; a packed weight that needs none is itself."""
    if w_up is None and w_gate.shape[0] == halves * padded(w_gate.shape[0] // halves):
        return w_gate
    parts = _parts(w_gate, w_up, w_up, halves)
    assert parts[0] is not None
    return stacked(parts, w_gate, padded(parts[0].shape[0]))


# ---- products by torch ---------------------------------------------------------------------------------------------
def by_torch(a: Tensor, b: Tensor, out: Tensor, add: Tensor | None = None) -> Tensor:
    """out = a b [+ a bias (N,) or a matrix]: cuBLAS, rounded once."""
    if add is None:
        return torch.mm(a, b, out=out)
    return torch.addmm(add.to(a.dtype), a, b, out=out)


def weight_gradients_by_torch(
    dy: Tensor, a: Tensor | None, parts: Sequence[Part], scale_and_sum: Callable[..., None]
) -> None:
    """A product for each weight, a pass over dy for each bias."""
    for first, weight, bias in parts:
        if weight is not None:
            assert a is not None
            torch.mm(dy[:, first : first + weight.shape[0]].t(), a, out=weight)
        if bias is not None:
            scale_and_sum(dy[:, first : first + bias.shape[0]], sums=bias)


def weight_gradient_float32_by_torch(dy: Tensor, a: Tensor) -> Tensor:
    """dy^T a in float32, of 16-bit operands too."""
    if a.is_cuda and a.dtype != torch.float32 and torch.version.hip is None:
        return torch.mm(dy.t(), a, out_dtype=torch.float32)
    out = torch.empty(dy.shape[1], a.shape[1], dtype=torch.float32, device=a.device)
    return torch.mm(dy.t().float(), a.float(), out=out)


# ---- forward ---------------------------------------------------------------------------------------------------------
def project(
    on: Kernels, a: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None, residual: Tensor | None = None,
) -> None:  # fmt: skip
    """out = residual + row_scale * layer_scale * (a weight^T + bias), rows with any stride."""
    if not a.shape[0] or not weight.shape[0]:
        return
    if on.fused(a):
        on.project(a, weight, bias, layer_scale, row_scale, residual, out)
    elif layer_scale is None and row_scale is None and residual is None:
        on.multiply(a, weight.t(), out, bias)
    else:
        y = on.multiply(a, weight.t(), torch.empty(out.shape, dtype=out.dtype, device=out.device))
        on.finish(y, bias, layer_scale, row_scale, residual, out)


def project_parts(
    on: Kernels, a: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], out: Tensor
) -> None:
    """out = a W^T + b of weights and biases one behind the other."""
    if not a.shape[0] or (len(weights) == 3 and on.fused(a) and on.project_parts(a, weights, biases, out)):
        return
    first = 0
    for weight, bias in zip(weights, biases, strict=True):
        project(on, a, weight, bias, out[:, first : first + weight.shape[0]])
        first += weight.shape[0]


def activate(
    on: Kernels, a: Tensor, w_gate: Tensor, b_gate: Tensor | None, w_up: Tensor | None, b_up: Tensor | None, *,
    kept: Tensor | None, hidden: Tensor | None, gelu: bool = False, norm_weight: Tensor | None = None,
) -> Any:  # fmt: skip
    """kept (rows, 2, Fp) = gate and up, hidden (rows, Fp) = silu(gate) * up; with ``gelu`` kept (rows, 1, Fp) = gate
    before its bias and hidden = gelu(gate + bias). Without w_up, w_gate is packed (or the only one). Either output may
    be None.

    ``norm_weight``, where :func:`folds_norm`: see ``Kernels.activate``.
    """
    rows, halves = a.shape[0], 1 if gelu else 2
    width = w_gate.shape[0] // (halves if w_up is None else 1)
    cols = padded(width)
    if not rows or not width:
        return None
    if on.fused(a):
        if not gelu and w_up is None:
            w_gate, w_up = w_gate[:width], w_gate[width:]
            b_gate, b_up = (None, None) if b_gate is None else (b_gate[:width], b_gate[width:])
        elif w_up is not None and w_up.stride(0) != w_gate.stride(0):
            w_gate, w_up = w_gate.contiguous(), w_up.contiguous()
        return on.activate(a, w_gate, w_up, b_gate, b_up, kept, hidden, norm_weight)
    if kept is None:
        kept = torch.empty(rows, halves, cols, dtype=a.dtype, device=a.device)
    weight, bias = _stack_hidden(w_gate, w_up, halves), None
    if not gelu and (b_gate is not None or b_up is not None):
        bias = stacked(_parts(b_gate, b_up, w_up, halves), weight[:, 0], cols)
    on.multiply(a, weight.t(), kept.view(rows, -1), bias)
    if hidden is not None:
        on.activate_rows(kept, b_gate if gelu else None, hidden, width)
    return None


def folds_norm(on: Kernels, a: Tensor) -> bool:
    """Whether the product behind a LayerNorm of silu(gate) * up takes it in, with a alike.

    In float16 it does not: before it is normalised, silu(gate) * up may be beyond 65504.
    """
    return on.fused(a) and a.dtype != torch.float16


def normed_input(
    on: Kernels, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, pre_norm: bool, *,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """LayerNorm of rows x where there is one before the projection; it is not kept, backward computes it again.

    ``statistics``: where mean and rstd go, if they are wanted.
    """
    if not pre_norm:
        return x
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = statistics or (empty_stats(x, x.shape[0]), empty_stats(x, x.shape[0]))
    on.normalise(x, weight, bias, eps, out, mean, rstd)
    return out


# ---- gradients of hidden layers ----------------------------------------------------------------------------------
def hidden_gradient(
    on: Kernels, dy: Tensor, w_down: Tensor, kept: Tensor, dkept: Tensor, hidden: Tensor | None,
    db_gate: Tensor | None, db_up: Tensor | None, *, bias: Tensor | None = None, centre: Tensor | None = None,
) -> None:  # fmt: skip
    """dkept like kept = gradients of gate and up (or of gate before a GELU) for dy of the output, ``hidden`` (where
    wanted) the activation again, and the gradients (F,) of the biases, where wanted.

    Of a GELU: ``bias`` is gate's, and ``centre`` (F,) float32 is subtracted from hidden.
    """
    rows, grads = dy.shape[0], (db_gate, db_up)
    if on.fused(dy) and rows:
        on.hidden_gradient(dy, w_down, kept, bias, centre, dkept, hidden, grads)
        return
    if rows:
        dhidden = torch.empty(rows, kept.shape[2], dtype=dy.dtype, device=dy.device)
        on.multiply(dy, padded_columns(w_down), dhidden)
        on.hidden_gradient_rows(dhidden, kept, bias, centre, dkept, hidden, w_down.shape[1])
    hidden_bias_gradients(on, dkept, grads)


def hidden_bias_gradients(on: Kernels, dkept: Tensor, grads: Sequence[Tensor | None]) -> None:
    for d, grad in zip(gate_and_up(dkept), grads, strict=True):
        if grad is not None and d is not None:
            on.scale_and_sum(d[:, : grad.shape[0]], sums=grad)


def hidden_input_gradient(
    on: Kernels, dkept: Tensor, w_gate: Tensor, w_up: Tensor | None, *, add: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dgate w_gate + dup w_up [+ add] as one product over both, in the dtype of the activations."""
    rows, halves, cols = dkept.shape
    out = torch.empty(rows, w_gate.shape[1], dtype=dkept.dtype, device=dkept.device) if out is None else out
    return on.multiply(dkept.view(rows, halves * cols), _stack_hidden(w_gate, w_up, halves), out, add)


def hidden_weight_gradients(
    on: Kernels, dkept: Tensor, a: Tensor, dw_gate: Tensor | None, dw_up: Tensor | None, *, packed: bool = False
) -> None:
    """dw_gate = dgate^T a and dw_up = dup^T a, where wanted; a packed dw_gate is of both."""
    rows, halves, cols = dkept.shape
    if packed and dw_gate is not None and dw_gate.shape[0] != halves * cols:
        dw_gate, dw_up = dw_gate.chunk(2)
    parts = [Part(first, grad, None) for first, grad in ((0, dw_gate), (cols, dw_up)) if grad is not None]
    if parts:
        on.weight_gradients(dkept.view(rows, halves * cols), a, parts)


# ---- gradients of an output projection -------------------------------------------------------------------------------
class OutputGradient(NamedTuple):
    """dy, the gradient of a product a W^T + b; that without the layer scale; the column sums of the latter, where
    a pass over it makes them."""

    dy: Tensor
    unscaled: Tensor
    sums: Tensor | None


def output_gradient(
    on: Kernels, dout: Tensor, bias: Tensor | None, layer_scale: Tensor | None, row_scale: Tensor | None,
    needs: Sequence[bool], *, centred: bool = False,
) -> OutputGradient:  # fmt: skip
    """What the gradients of row_scale * layer_scale * (a W^T + b) start from; ``needs`` for W, b and layer_scale.

    ``centred``: a will be, see :func:`output_parameter_gradients`.
    """
    needs_weight, needs_bias, needs_scale = needs
    dy = unscaled = dout
    scaled = row_scaled = sums = None
    if row_scale is not None and (layer_scale is None or needs_weight or needs_scale):
        unscaled = row_scaled = torch.empty(dout.shape, dtype=dout.dtype, device=dout.device)
        dy = unscaled
    if layer_scale is not None:
        dy = scaled = torch.empty(dout.shape, dtype=dout.dtype, device=dout.device)
    if centred:
        sums = torch.empty(dout.shape[1], dtype=torch.float32, device=dout.device)
    elif bias is not None and (needs_bias or needs_scale) and (layer_scale is not None or row_scaled is not None):
        dtype = bias.dtype if layer_scale is None else torch.float32
        sums = torch.empty(bias.shape, dtype=dtype, device=dout.device)
    if scaled is not None or row_scaled is not None or sums is not None:
        on.scale_and_sum(
            dout, layer_scale=layer_scale, row_scale=row_scale, scaled=scaled, row_scaled=row_scaled, sums=sums
        )
    return OutputGradient(dy, unscaled, sums)


def output_parameter_gradients(
    on: Kernels, gradient: OutputGradient, a: Tensor | None, weight: Tensor, bias: Tensor | None,
    layer_scale: Tensor | None, needs: Sequence[bool], *, centre: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of weight, bias and layer_scale; ``a``, the product's left operand, is for those of the first and last.

    With G = (row_scale dout)^T a, the weight's is layer_scale G, and the layer scale's is the row sums of W G, plus b
    times the column sums of row_scale dout: y is not computed again. ``centre`` (K,): what ``a`` lacks in its columns,
    so that G has those sums times centre added, in float32.
    """
    needs_weight, needs_bias, needs_scale = needs
    device = weight.device
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=device) if needs_weight else None
    separate = layer_scale is None and centre is None
    if separate and gradient.sums is not None:
        dbias = gradient.sums if needs_bias else None
    else:
        dbias = torch.empty(bias.shape, dtype=bias.dtype, device=device) if needs_bias and bias is not None else None
    if separate:
        wanted = Part(0, dweight, None if gradient.sums is not None else dbias)
        if wanted.weight is not None or wanted.bias is not None:
            on.weight_gradients(gradient.dy, a, [wanted])
        return dweight, dbias, None
    dscale = None if layer_scale is None or not needs_scale else torch.empty_like(layer_scale)
    product = None
    if needs_weight or needs_scale:
        assert a is not None
        product = on.weight_gradient_float32(gradient.unscaled, a)
    if weight.shape[0] and (product is not None or dbias is not None):
        on.finish_gradients(product, gradient.sums, centre, weight, bias, layer_scale, dweight, dbias, dscale)
    return dweight, dbias, dscale
