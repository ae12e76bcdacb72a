"""Text that is no PTX, or no longer: an error, never the end of the process."""

from __future__ import annotations

import random

import pytest
import torch
from ptx import needs_core, source

from eva02_kernels.testing import gpusim

needs_core()

_PIECES = ["{", "}", ";", ",", "[", "]", "(", ")", "%r1", ".reg", ".param .b64 x;", "0x", '"', "-", "@", "!", "|", "st.global.v4.b32",
           "99999999999999999999", "\0", "é", "call", "bra", "ret;", ".local .b8 y[100];", ".u64", ".cc", "\n"]  # fmt: skip

_FUNCTION = """\
.func (.param .b32 out) f(.param .b32 x)
{
.local .align 8 .b8 kept[16];
.reg .b32 %r<4>;
.reg .pred %p<2>;
ld.param.b32 %r1, [x];
st.local.b32 [kept+4], %r1;
setp.eq.u32 %p1, %r1, 0;
@%p1 bra L;
sub.u32 %r2, %r1, 1;
{ .param .b32 a; .param .b32 b; st.param.b32 [a], %r2; call (b), f, (a); ld.param.b32 %r3, [b]; }
L:
st.param.b32 [out], %r1;
ret;
}
.global .align 8 .u64 pointers[2] = {f, generic(f)+0};"""

# name: body, module
_TEXTS = {
    "accesses": ("setp.eq.u32 %p1, %r1, 3;\nld.global.b32 %r7, [%d4];\nst.global.b32 [%d5], %r7;\nbar.sync 0;\n@%p1 bra L;\nL:", ""),
    "calls": (
        "and.b32 %r7, %r1, 3;\n{ .param .b32 a; .param .b32 b; st.param.b32 [a], %r7; call (b), f, (a); ld.param.b32 %r8, [b]; }\n"
        "mov.u64 %d6, pointers;\nld.global.b64 %d6, [%d6];\n{ .param .b32 a; .param .b32 b; st.param.b32 [a], 1; call (b), %d6, (a), p; "
        "ld.param.b32 %r8, [b]; }\nst.global.b32 [%d5], %r8;",
        _FUNCTION,
    ),
    "lanes together": (
        "mbarrier.init.shared.b64 [%r2], 64;\nbar.sync 0;\nshfl.sync.bfly.b32 %r7|%p1, %r1, 1, 31, -1;\nvote.sync.ballot.b32 %r8, %p1, -1;\n"
        "mbarrier.arrive.shared.b64 %d6, [%r2];\nbar.red.popc.u32 %r9, 1, 64, %p1;\nmatch.any.sync.b32 %r8, %r1, -1;\n"
        "T: .branchtargets A, B;\nand.b32 %r7, %r1, 1;\nbrx.idx %r7, T;\nA:\nB:\nadd.cc.u32 %r10, %r7, %r8;\naddc.u32 %r11, %r7, 0;\n"
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r2];",
        "",
    ),
}  # fmt: skip


def _mutated(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 4)):
        if not text:
            break
        at, other = rng.randrange(len(text)), rng.randrange(len(text))
        text = rng.choice([
            text[:at],
            text[:at] + rng.choice(_PIECES) + text[at:],
            text[:at] + text[at + rng.randint(1, 30):],
            text[:at] + text[other:other + 20] + text[at:],
        ])  # fmt: skip
    return text


@pytest.mark.parametrize("name", _TEXTS)
def test_mutated_text_is_an_error_or_runs(name):
    text = source(*_TEXTS[name])
    rng = random.Random(0)
    ran = 0
    for _ in range(1500):
        try:
            with gpusim.options(budget=2000):
                gpusim.run_ptx(_mutated(text, rng), "kernel", grid=(1, 1, 1), block=(64, 1, 1),
                               args=[torch.zeros(64), torch.zeros(64), 0], shared_bytes=1024)  # fmt: skip
            ran += 1
        except (ValueError, gpusim.SimulationError):
            pass
    assert 0 < ran < 1500  # some mutations change nothing, others everything
