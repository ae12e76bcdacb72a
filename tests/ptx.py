"""Small PTX kernels for the simulator's tests: a body between a prologue that every kernel shares."""

from __future__ import annotations

import pytest
import torch

from eva02_kernels.testing import gpusim
from eva02_kernels.testing.gpusim.launch import core

_PROLOGUE = """\
.version 8.7
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 smem[];
.const .align 4 .b32 table[2] = {11, 22};
$module
.visible .entry kernel(.param .u64 a, .param .u64 b, .param .u32 n)
{
.reg .pred %p<8>;
.reg .b16 %h<16>;
.reg .b32 %r<48>;
.reg .f32 %f<32>;
.reg .b64 %d<32>;
.reg .f64 %e<8>;
ld.param.u64 %d1, [a];
ld.param.u64 %d2, [b];
ld.param.u32 %r9, [n];
mov.u32 %r1, %tid.x;
mov.u32 %r5, %ctaid.x;
mul.wide.u32 %d3, %r1, 4;
add.u64 %d4, %d1, %d3;
add.u64 %d5, %d2, %d3;
mov.u32 %r2, smem;
shl.b32 %r3, %r1, 2;
add.u32 %r4, %r2, %r3;
xor.b32 %r6, %r4, 128;
"""


def needs_core() -> None:
    """Skip the module that calls this where the simulator is not built."""
    try:
        core()
    except ImportError as error:
        pytest.skip(str(error), allow_module_level=True)


def source(body: str, module: str = "") -> str:
    """A module (with functions and variables of its own) whose kernel has a, b (tensors) and n, with in registers

    d1, d2: a, b; r9: n; r1: thread, r5: CTA; d4, d5: the thread's 4 bytes of a, b; r4: the thread's 4 bytes of shared
    memory, r6: those of the same lane of the other of two warps.
    """
    return _PROLOGUE.replace("$module\n", module and module + "\n") + body + "\nret;\n}\n"


def marked_line(text: str) -> int | None:
    """Number of the line that ends with ``// <-``."""
    return next((i for i, line in enumerate(text.splitlines(), 1) if line.rstrip().endswith("// <-")), None)


def run(
    body: str, a: torch.Tensor, b: torch.Tensor, n: int = 0, *, threads: int = 64, ctas: int = 1, shared: int = 1024,
    module: str = "",
):  # fmt: skip
    return gpusim.run_ptx(
        source(body, module), "kernel", grid=(ctas, 1, 1), block=(threads, 1, 1), args=[a, b, n], shared_bytes=shared
    )


# PTX type: the tensor's dtype, the registers' letter, bytes.
_TYPES = {
    **dict.fromkeys(("u16", "b16"), (torch.uint16, "h", 2)),
    **dict.fromkeys(("u32", "b32", "f16x2", "bf16x2"), (torch.uint32, "r", 4)),
    **dict.fromkeys(("u64", "b64"), (torch.uint64, "d", 8)),
    "s16": (torch.int16, "h", 2),
    "s32": (torch.int32, "r", 4),
    "s64": (torch.int64, "d", 8),
    "f16": (torch.float16, "h", 2),
    "bf16": (torch.bfloat16, "h", 2),
    "f32": (torch.float32, "f", 4),
    "f64": (torch.float64, "e", 8),
}


def apply(instruction: str, result: str, sources: list[tuple[str, torch.Tensor]]) -> torch.Tensor:
    """``instruction d, s0, s1, ...;`` in one thread for each element; types give registers and memory.

    The sources travel one behind the other in one tensor of 8 bytes an element.
    """
    count = len(sources[0][1])
    packed = torch.zeros(len(sources), count, 8, dtype=torch.uint8)
    body = []
    names = []
    used = {"h": 4, "r": 20, "f": 4, "d": 20, "e": 1}
    body.append("mul.wide.u32 %d6, %r1, 8;\nadd.u64 %d7, %d1, %d6;\nadd.u64 %d8, %d2, %d6;")
    for i, (kind, values) in enumerate(sources):
        dtype, letter, size = _TYPES[kind]
        packed[i, :, :size] = values.to(dtype).contiguous().view(torch.uint8).view(count, size)
        name = f"%{letter}{used[letter]}"
        used[letter] += 1
        names.append(name)
        access = {"h": "b16", "r": "b32", "f": "f32", "d": "b64", "e": "f64"}[letter]
        body.append(f"ld.global.{access} {name}, [%d7+{i * count * 8}];")
    dtype, letter, size = _TYPES[result]
    out = f"%{letter}{used[letter]}"
    body.append(
        f"{instruction.replace('$d', out)}" if "$d" in instruction else f"{instruction} {out}, {', '.join(names)};"
    )
    for i, name in enumerate(names):
        body[-1] = body[-1].replace(f"${i}", name)
    access = {"h": "b16", "r": "b32", "f": "f32", "d": "b64", "e": "f64"}[letter]
    body.append(f"st.global.{access} [%d8], {out};")
    b = torch.zeros(count, 8, dtype=torch.uint8)
    run("\n".join(body), packed, b, threads=count)
    return b[:, :size].contiguous().view(-1).view(dtype)
