"""Launch choices of the Triton kernels, as data: block sizes, warps and stages, best guess first.

Where a function gives several, the first is used unless autotuning times them (``_triton.tuned``). They are chosen from
registers, shared memory and occupancy as compiled (``benchmarks.kernels``), not yet by times on GPUs.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

import torch

from eva02_kernels import _triton


@dataclass(frozen=True, eq=False)
class Choice:
    """Keyword arguments of a launch: the kernel's block sizes and the compiler's options. Compared by identity."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 2
    # Registers of a thread that ptxas may use, where it would rather spill for occupancy; AMD's compiler has no such.
    max_registers: int | None = None
    options: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "options", {**dict(self.blocks), "num_warps": self.num_warps, "num_stages": self.num_stages}
        )

    def __getitem__(self, name: str) -> int:
        return self.options[name]


def choice(num_warps: int = 4, num_stages: int = 2, *, max_registers: int | None = None, **blocks: int) -> Choice:
    return Choice(tuple(blocks.items()), num_warps, num_stages, max_registers)


def power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


MAX_ROW_WIDTH = 16384
"""Columns of a row that is held in registers as a whole, as normalisation needs it."""


@functools.cache
def whole_rows(width: int, elements: int = 16) -> Choice:
    """Tiles BLOCK_M x BLOCK_N of whole rows: about ``elements`` a thread, several narrow rows a program."""
    block_n = power_of_2(width)
    block_m = max(1, 512 // block_n)
    num_warps = min(16, max(1, block_m * block_n // (32 * elements)))
    return choice(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=1)


@functools.cache
def row_pieces(width: int) -> Choice:
    """Tiles of pieces of rows, for kernels that need no sum over a row."""
    block_n = min(1024, power_of_2(width))
    block_m = max(1, 2048 // block_n)
    return choice(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4, num_stages=1)


@functools.cache
def fold_norm(pieces: int) -> Choice:
    """A program for rows of statistics in so many pieces, or for a row of a weight."""
    block_p = max(2, power_of_2(pieces))
    return choice(BLOCK_M=max(1, min(32, 4096 // block_p)), BLOCK_P=block_p, BLOCK_N=1024, num_warps=4, num_stages=1)


COLUMN_SUMS = choice(BLOCK_P=32, BLOCK_N=64, num_warps=4, num_stages=1)
"""The second stage of parameter gradients: sums of (programs, width) over the programs."""


ONE_SUM = choice(BLOCK=4096, num_warps=8, num_stages=1)
"""A single program that sums a vector: one number a row, so that a kernel with more programs would gain little."""


@functools.cache
def pair_chunks(head_dim: int) -> tuple[int, int]:
    """Channel pairs in the one or two tiles of a head: powers of two from 16 on (what a matrix instruction takes)."""
    pairs = (head_dim + 1) // 2
    first = 16
    while 2 * first <= pairs:
        first *= 2
    rest = pairs - first
    if rest <= 0:
        return first, 0
    second = max(16, power_of_2(rest))
    return (2 * first, 0) if second == first else (first, second)


# ---- attention -------------------------------------------------------------------------------------------------------
# BLOCK_M queries by BLOCK_N keys, for heads that take tiles of up to 64, 96 and 128 channels. Each was the largest
# without spilled registers among those compiled in bfloat16; rotated tiles are computed in registers, which is what
# limits them.
_ATTENTION = {
    "fwd": {
        64: (choice(4, 2, BLOCK_M=64, BLOCK_N=64), choice(8, 2, BLOCK_M=128, BLOCK_N=64)),
        96: (choice(4, 2, BLOCK_M=64, BLOCK_N=32), choice(8, 2, BLOCK_M=128, BLOCK_N=32)),
        128: (choice(8, 2, BLOCK_M=64, BLOCK_N=32), choice(8, 1, BLOCK_M=128, BLOCK_N=32)),
    },
    "dq": {
        64: (choice(4, 2, BLOCK_M=64, BLOCK_N=32), choice(8, 2, BLOCK_M=128, BLOCK_N=32)),
        96: (choice(4, 2, BLOCK_M=64, BLOCK_N=32), choice(8, 2, BLOCK_M=128, BLOCK_N=32)),
        128: (choice(8, 2, BLOCK_M=64, BLOCK_N=32), choice(4, 1, BLOCK_M=32, BLOCK_N=32)),
    },
    "dkdv": {
        64: (choice(8, 2, BLOCK_M=16, BLOCK_N=128), choice(4, 1, BLOCK_M=32, BLOCK_N=64)),
        96: (choice(4, 1, BLOCK_M=16, BLOCK_N=64), choice(8, 1, BLOCK_M=16, BLOCK_N=128)),
        128: (choice(8, 1, BLOCK_M=16, BLOCK_N=128), choice(4, 1, BLOCK_M=32, BLOCK_N=32)),
    },
}
# What 10.0 and 12.0, which need more registers, get instead.
_ATTENTION_100 = {
    ("fwd", 96): (choice(4, 2, BLOCK_M=64, BLOCK_N=32), choice(8, 2, BLOCK_M=128, BLOCK_N=32, max_registers=168)),
    ("dq", 96): (choice(4, 2, BLOCK_M=64, BLOCK_N=32, max_registers=168), choice(8, 2, BLOCK_M=128, BLOCK_N=32)),
    ("dkdv", 64): (choice(8, 2, BLOCK_M=16, BLOCK_N=128, max_registers=168), choice(4, 1, BLOCK_M=32, BLOCK_N=64)),
    ("dkdv", 128): (choice(8, 1, BLOCK_M=16, BLOCK_N=128),),
}
_ATTENTION_120 = {
    **{
        (kernel, 96): (choice(4, 1, BLOCK_M=64, BLOCK_N=32), choice(8, 1, BLOCK_M=128, BLOCK_N=32))
        for kernel in ("fwd", "dq")
    },
    ("dkdv", 96): (choice(4, 1, BLOCK_M=16, BLOCK_N=64),),
}
# float32 products without TF32 have no matrix instruction: operands are in registers too. The same goes for every
# product on 7.5, whose matrix instructions Triton does not use.
_PLAIN = {
    64: choice(8, 1, BLOCK_M=32, BLOCK_N=32),
    96: choice(8, 1, BLOCK_M=16, BLOCK_N=32),
    128: choice(8, 1, BLOCK_M=16, BLOCK_N=16),
}
_PLAIN_LIMITED = _PLAIN | {channels: dataclasses.replace(_PLAIN[channels], max_registers=128) for channels in (96, 128)}
_PLAIN_DQ = {64: _PLAIN[64], 96: _PLAIN[128], 128: _PLAIN[128]}
_ATTENTION_75 = choice(8, 1, BLOCK_M=16, BLOCK_N=16, max_registers=255)


def attention_chunks(dtype: torch.dtype, head_dim: int, arch: int) -> tuple[int, int]:
    """Channel pairs of the tiles of a head; smaller ones for products that hold their operands."""
    first, second = pair_chunks(head_dim)
    return (32, 32) if first == 64 and (dtype == torch.float32 or arch < 80) else (first, second)


def attention(kernel: str, dtype: torch.dtype, head_dim: int, arch: int) -> tuple[Choice, ...]:
    """Choices of rope_attention's kernel ``"fwd"``, ``"dq"`` or ``"dkdv"``."""
    channels = next(n for n in (64, 96, 128) if head_dim <= n)
    if arch < 80:
        return (_ATTENTION_75,)
    if dtype == torch.float32:
        if kernel == "dq":
            return (_PLAIN_DQ[channels],)
        limited = arch < 120 and _triton.dot_precision(dtype) == "ieee"
        return ((_PLAIN_LIMITED if limited else _PLAIN)[channels],)
    special = _ATTENTION_120 if arch >= 120 else _ATTENTION_100 if arch >= 100 else {}
    return special.get((kernel, channels), _ATTENTION[kernel][channels])


@functools.cache
def rope_tokens(head_dim: int) -> Choice:
    """Rotation: tiles of BLOCK_T tokens of one head; BLOCK_H heads, one after the other, share their angles."""
    block_t = max(1, 2048 // power_of_2(max(32, head_dim)))
    return choice(BLOCK_T=block_t, BLOCK_H=4, num_warps=4, num_stages=1)


@functools.cache
def rope_table_rows(head_dim: int) -> Choice:
    """A table's gradient: BLOCK_R rows of tokens' heads that meet one row of the table."""
    return choice(BLOCK_R=max(1, 2048 // power_of_2(max(32, head_dim))), num_warps=4, num_stages=1)


# ---- matrix products -------------------------------------------------------------------------------------------------
GROUP_ROWS = 8
"""Row tiles whose programs run one after the other for each column tile, so that both operands stay in L2."""

force_fused: bool | None = None
"""Takes one route for every product, for tests: True Triton's, False torch.mm with Triton kernels around it."""


def fused_gemm(arch: int, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether products are Triton kernels with everything around them in their epilogue, and why."""
    if force_fused is not None:
        return force_fused, "_launch.force_fused is set"
    if _triton.executing == "interpreter":
        return True, "the interpreter runs every kernel"
    if torch.version.hip is not None:
        return False, "AMD: Triton's products are not tuned for its matrix cores here"
    if arch < 80:
        return False, "no asynchronous copies to pipeline with"
    if arch >= 90:
        return False, "cuBLAS is pipelined for this architecture, Triton's product is not"
    if _triton.dot_precision(dtype) == "ieee" and dtype == torch.float32:
        return False, "float32 without TF32: Triton multiplies outside the tensor cores"
    return True, "tensor cores with asynchronous copies"


def gemm_route(arch: int, dtype: torch.dtype) -> str:
    """One line about where products run, for ``python -m eva02_kernels.info``."""
    fused, reason = fused_gemm(arch, dtype)
    return f"{'Triton, fused epilogues' if fused else 'torch.mm and Triton kernels around it'} ({reason})"


def fused_cuda_gemm(arch: int) -> tuple[bool, str]:
    """The same for the CUDA backend: whether products are those of ``csrc/gemm``, and why."""
    if force_fused is not None:
        return force_fused, "_launch.force_fused is set"
    if arch >= 90:
        return False, "cuBLAS is pipelined for this architecture, mma.sync is not its fastest instruction"
    return True, "tensor cores with asynchronous copies"


def cuda_gemm_route(arch: int) -> str:
    """:func:`gemm_route` for the CUDA backend."""
    fused, reason = fused_cuda_gemm(arch)
    return f"{'csrc/gemm, fused epilogues' if fused else 'torch.mm and CUDA kernels around it'} ({reason})"


def _tiles(m: int, n: int, k: int, num_warps: int, num_stages: int) -> Choice:
    return choice(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=num_warps, num_stages=num_stages)


# Largest tiles first, for each kind of epilogue: "plain"; "rich", which reads or writes several tiles; "dual", two
# products at once, and "with norm" the statistics of what they give. None spills compiled for 8.0; shared memory is
# under the 99 KiB of 8.6 and 8.9, but for what 8.0 with its 163 KiB gets instead of the first.
_GEMM_16_BIT = {
    "plain": (_tiles(128, 256, 64, 8, 3), _tiles(128, 128, 64, 8, 3), _tiles(64, 128, 32, 4, 4),
              _tiles(64, 64, 64, 4, 3)),
    "rich": (_tiles(128, 128, 64, 8, 3), _tiles(64, 128, 32, 4, 4), _tiles(64, 64, 64, 4, 3)),
    "dual": (_tiles(128, 64, 64, 8, 3), _tiles(128, 64, 32, 8, 4), _tiles(64, 64, 32, 4, 4)),
    "dual with norm": (_tiles(128, 64, 32, 8, 4), _tiles(64, 64, 32, 4, 4)),
}  # fmt: skip
_GEMM_16_BIT_80 = {
    "plain": (_tiles(128, 256, 64, 8, 4), *_GEMM_16_BIT["plain"][1:]),
    "rich": (_tiles(128, 128, 64, 8, 4), *_GEMM_16_BIT["rich"][1:]),
    "dual": (_tiles(128, 64, 64, 8, 4), *_GEMM_16_BIT["dual"][1:]),
    "dual with norm": _GEMM_16_BIT["dual with norm"],
}
_GEMM_32_BIT = {
    "plain": (_tiles(128, 128, 32, 8, 3), _tiles(64, 128, 32, 4, 3), _tiles(64, 64, 32, 4, 4)),
    "rich": (_tiles(128, 128, 32, 8, 3), _tiles(64, 128, 32, 4, 3), _tiles(64, 64, 32, 4, 4)),
    "dual": (_tiles(128, 64, 32, 8, 3), _tiles(64, 64, 32, 4, 3), _tiles(64, 32, 32, 4, 3)),
    # Asked for no limit, ptxas spills there for one more program on 8.0.
    "dual with norm": (choice(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, max_registers=255), _tiles(64, 32, 32, 4, 3)),
}


def gemm_choices(
    epilogue: str, rows: int, width: int, dtype: torch.dtype, arch: int, processors: int
) -> tuple[Choice, ...]:  # fmt: skip
    """Choices for a product of (rows, width): those whose tiles give every multiprocessor one, or the smallest."""
    table = _GEMM_32_BIT if dtype == torch.float32 else _GEMM_16_BIT_80 if arch == 80 else _GEMM_16_BIT
    choices = table[epilogue]

    def tiles(c: Choice) -> int:
        return -(-rows // c["BLOCK_M"]) * -(-width // c["BLOCK_N"])

    return tuple(c for c in choices if tiles(c) >= processors) or choices[-1:]


# ---- clip_loss -------------------------------------------------------------------------------------------------------
_SIMILARITIES = choice(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32)
_SIMILARITIES_100 = choice(8, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=32)  # the wide ones spill
_SIMILARITIES_PLAIN = choice(8, 1, BLOCK_M=32, BLOCK_N=32, BLOCK_K=32)
PARTIAL_STATISTICS = choice(4, 1, BLOCK=128)
"""Columns of partial statistics that a program merges."""


def similarities(dtype: torch.dtype, arch: int) -> Choice:
    """Tiles of clip_loss's products; small ones where there is no matrix instruction for them."""
    if arch < 80 or (dtype == torch.float32 and _triton.dot_precision(dtype) == "ieee"):
        return _SIMILARITIES_PLAIN
    return _SIMILARITIES_100 if 100 <= arch < 120 else _SIMILARITIES


def similarity_rows(keys: int) -> int:
    """Rows of similarities that exist at a time: 64 MiB of them in 16 bits, in whole tiles."""
    if _triton.executing in ("interpreter", "simulator"):
        return 64
    return max(128, (1 << 25) // max(1, keys) // 128 * 128)
