"""Planted faults, each with its clean twin, and clean programs that look faulty."""

from __future__ import annotations

import pytest
import torch
from ptx import marked_line, needs_core, run, source

from eva02_kernels.testing import gpusim

needs_core()

# A function that adds one, twice: through a variable of its own and through a call of itself.
FUNCTIONS = """\
.func (.param .b32 out) twice(.param .b32 x)
{
.local .align 4 .b32 kept[2];
.reg .b32 %r<4>;
.reg .b64 %d<4>;
ld.param.b32 %r1, [x];
mov.u64 %d1, kept;
add.u32 %r2, %r1, %r1;
st.local.b32 [%d1+4], %r2;
cvta.local.u64 %d2, %d1;
ld.b32 %r3, [%d2+4];
st.param.b32 [out], %r3;
ret;
}
.func (.param .b32 out) factorial(.param .b32 n)
{
.reg .b32 %r<6>;
.reg .pred %p<2>;
ld.param.b32 %r1, [n];
mov.u32 %r2, 1;
setp.le.u32 %p1, %r1, 1;
@%p1 bra DONE;
sub.u32 %r3, %r1, 1;
{ .param .b32 arg; .param .b32 got; st.param.b32 [arg], %r3; call (got), factorial, (arg); ld.param.b32 %r4, [got]; }
mul.lo.u32 %r2, %r4, %r1;
DONE:
st.param.b32 [out], %r2;
ret;
}
.func forever()
{
call forever;
ret;
}
.global .align 8 .u64 table_of_functions[2] = {twice, factorial};
.global .align 1 .b8 text[8] = {120, 32, 60, 32, 49, 48, 0, 0};
.global .align 1 .b8 file[5] = {97, 46, 99, 117, 0};
.extern .func __assertfail(.param .b64 m, .param .b64 f, .param .b32 l, .param .b64 n, .param .b64 c);"""
CALL = "{{ .param .b32 arg; .param .b32 got; st.param.b32 [arg], {0}; call (got), {1}, (arg){2}; ld.param.b32 %r7, [got]; }}"
# CTA 0 writes, the others wait until the flag says so; in between stands what makes order, or does not.
HANDOVER = (
    "setp.ne.u32 %p1, %r5, 0;\n@%p1 bra READ;\nst.global.b32 [%d2+128], 5;\n{write}\nret;\nREAD:\nL:\n{read}\n"
    "setp.eq.u32 %p2, %r7, 0;\n@%p2 bra L;\n{behind}ld.global.b32 %r8, [%d2+128]; // <-\nmul.wide.u32 %d6, %r5, 4;\n"
    "add.u64 %d6, %d6, %d2;\nst.global.b32 [%d6], %r8;"
)


def handover(write: str, read: str, behind: str = "") -> str:
    return HANDOVER.format(write=write, read=read, behind=behind)


# name: (kind, body with the fault at the line marked `// <-`, body without it[, options of run])
FAULTS: dict[str, tuple] = {
    "missing barrier": (
        "race",
        "st.shared.b32 [%r4], 0;\nbar.sync 0;\nst.shared.b32 [%r4], %r1;\nld.shared.b32 %r7, [%r6]; // <-\nst.global.b32 [%d5], %r7;",
        "st.shared.b32 [%r4], %r1;\nbar.sync 0;\nld.shared.b32 %r7, [%r6];\nst.global.b32 [%d5], %r7;",
    ),
    "warp barrier instead of the CTA's": (
        "race",
        "st.shared.b32 [%r4], 0;\nbar.sync 0;\nst.shared.b32 [%r4], %r1;\nbar.warp.sync -1;\nld.shared.b32 %r7, [%r6]; // <-\nst.global.b32 [%d5], %r7;",
        "st.shared.b32 [%r4], %r1;\nbarrier.sync 0;\nld.shared.b32 %r7, [%r6];\nst.global.b32 [%d5], %r7;",
    ),
    "write after read without a barrier": (
        "race",
        "st.shared.b32 [%r4], 0;\nbar.sync 0;\nst.shared.b32 [%r4], %r1;\nbar.sync 0;\nld.shared.b32 %r7, [%r6];\nst.shared.b32 [%r4], %r3; // <-\nst.global.b32 [%d5], %r7;",
        "st.shared.b32 [%r4], %r1;\nbar.sync 0;\nld.shared.b32 %r7, [%r6];\nbar.sync 0;\nst.shared.b32 [%r4], %r3;\nst.global.b32 [%d5], %r7;",
    ),
    "halves of words written again while others read whole rows": (
        "race",
        "cvt.u16.u32 %h1, %r1;\nshl.b32 %r7, %r1, 1;\nadd.u32 %r7, %r7, %r2;\nand.b32 %r10, %r1, 3;\nshl.b32 %r10, %r10, 4;\nadd.u32 %r10, %r10, %r2;\nst.shared.b16 [%r7], %h1;\nbar.sync 0;\nld.shared.v4.b32 {%r11, %r12, %r13, %r14}, [%r10];\nst.shared.b16 [%r7], %h1; // <-\nst.global.b32 [%d5], %r11;",
        "cvt.u16.u32 %h1, %r1;\nshl.b32 %r7, %r1, 1;\nadd.u32 %r7, %r7, %r2;\nand.b32 %r10, %r1, 3;\nshl.b32 %r10, %r10, 4;\nadd.u32 %r10, %r10, %r2;\nst.shared.b16 [%r7], %h1;\nbar.sync 0;\nld.shared.v4.b32 {%r11, %r12, %r13, %r14}, [%r10];\nbar.sync 0;\nst.shared.b16 [%r7], %h1;\nst.global.b32 [%d5], %r11;",
    ),
    "rows of halves read by a warp that was not at their barrier": (
        "race",
        "cvt.u16.u32 %h1, %r1;\nshl.b32 %r7, %r1, 1;\nadd.u32 %r7, %r7, %r2;\nand.b32 %r10, %r1, 3;\nshl.b32 %r10, %r10, 4;\nadd.u32 %r10, %r10, %r2;\nsetp.ge.u32 %p1, %r1, 32;\n@%p1 bra W;\nst.shared.b16 [%r7], %h1;\nbar.sync 1, 32;\nbra R;\nW:\nbar.sync 2, 32;\nR:\nld.shared.v4.b32 {%r11, %r12, %r13, %r14}, [%r10]; // <-\nst.global.b32 [%d5], %r11;",
        "cvt.u16.u32 %h1, %r1;\nshl.b32 %r7, %r1, 1;\nadd.u32 %r7, %r7, %r2;\nand.b32 %r10, %r1, 3;\nshl.b32 %r10, %r10, 4;\nadd.u32 %r10, %r10, %r2;\nsetp.ge.u32 %p1, %r1, 32;\n@%p1 bra R;\nst.shared.b16 [%r7], %h1;\nR:\nbar.sync 1, 64;\nld.shared.v4.b32 {%r11, %r12, %r13, %r14}, [%r10];\nst.global.b32 [%d5], %r11;",
    ),
    "two warps write one byte": (
        "race",
        "and.b32 %r7, %r3, 127;\nadd.u32 %r7, %r7, %r2;\nst.shared.b32 [%r7], %r1; // <-",
        "and.b32 %r7, %r3, 127;\nadd.u32 %r7, %r7, %r2;\nand.b32 %r8, %r1, 31;\nst.shared.b32 [%r7], %r8;",
    ),
    "lanes of a warp without bar.warp.sync": (
        "race",
        "xor.b32 %r7, %r4, 4;\nst.shared.b32 [%r4], %r1;\nld.shared.b32 %r8, [%r7]; // <-\nst.global.b32 [%d5], %r8;",
        "xor.b32 %r7, %r4, 4;\nst.shared.b32 [%r4], %r1;\nbar.warp.sync -1;\nld.shared.b32 %r8, [%r7];\nst.global.b32 [%d5], %r8;",
    ),
    "double buffer without its second barrier": (
        "race",
        "st.shared.b32 [%r4], 0;\nbar.sync 0;\nmov.u32 %r10, 0;\nL:\nadd.u32 %r11, %r1, %r10;\nst.shared.b32 [%r4], %r11; // <-\nbar.sync 0;\nld.shared.b32 %r7, [%r6];\n"
        "add.u32 %r10, %r10, 1;\nsetp.lt.u32 %p1, %r10, 3;\n@%p1 bra L;\nst.global.b32 [%d5], %r7;",
        "mov.u32 %r10, 0;\nL:\nadd.u32 %r11, %r1, %r10;\nst.shared.b32 [%r4], %r11;\nbar.sync 0;\nld.shared.b32 %r7, [%r6];\nbar.sync 0;\n"
        "add.u32 %r10, %r10, 1;\nsetp.lt.u32 %p1, %r10, 3;\n@%p1 bra L;\nst.global.b32 [%d5], %r7;",
    ),
    "two stores of a warp meet": (
        "race",
        "xor.b32 %r7, %r4, 4;\nst.shared.b32 [%r4], %r1;\nst.shared.b32 [%r7], %r3; // <-",
        "xor.b32 %r7, %r4, 4;\nst.shared.b32 [%r4], %r1;\nbar.warp.sync -1;\nst.shared.b32 [%r7], %r3;",
    ),
    "atomic beside a plain store": (
        "race",
        "st.shared.b32 [%r2], 0; // <-\nsetp.lt.u32 %p1, %r1, 32;\n@%p1 bra L;\natom.shared.add.u32 %r7, [%r2], 1;\nL:",
        "st.shared.b32 [%r2], 0;\nbar.sync 0;\nsetp.lt.u32 %p1, %r1, 32;\n@%p1 bra L;\natom.shared.add.u32 %r7, [%r2], 1;\nL:",
    ),
    "half of the warps at a named barrier": (
        "race",
        "st.shared.b32 [%r4], 0;\nbar.sync 0;\nst.shared.b32 [%r4], %r1;\nbar.sync 1, 64;\nxor.b32 %r7, %r4, 256;\nld.shared.b32 %r8, [%r7]; // <-\nst.global.b32 [%d5], %r8;",
        "st.shared.b32 [%r4], 0;\nbar.sync 0;\nst.shared.b32 [%r4], %r1;\nbar.sync 1, 128;\nxor.b32 %r7, %r4, 256;\nld.shared.b32 %r8, [%r7];\nst.shared.b32 [%r4+512], %r8;",
        {"threads": 128},
    ),
    "zero that nobody wrote": (
        "uninitialised",
        "mov.u32 %r7, 255;\nld.shared.b32 %r8, [%r4];\nand.b32 %r7, %r7, %r8;\nst.global.b32 [%d5], %r7; // <-",
        "mov.u32 %r7, 0;\nld.shared.b32 %r8, [%r4];\nand.b32 %r7, %r7, %r8;\nst.global.b32 [%d5], %r7;",
    ),
    "named barrier of the wrong warps": (
        "race",
        "st.shared.b32 [%r4], 0;\nbar.sync 0;\nst.shared.b32 [%r4], %r1;\nshr.u32 %r7, %r1, 5;\nbar.sync %r7, 32;\nld.shared.b32 %r8, [%r6]; // <-\nst.global.b32 [%d5], %r8;",
        "st.shared.b32 [%r4], %r1;\nbar.sync 3, 64;\nld.shared.b32 %r8, [%r6];\nst.global.b32 [%d5], %r8;",
    ),
    "asynchronous copy read before its wait": (
        "race",
        "cp.async.ca.shared.global [%r4], [%d4], 4;\ncp.async.commit_group;\nbar.sync 0;\nld.shared.b32 %r7, [%r4]; // <-\nst.global.b32 [%d5], %r7;",
        "cp.async.ca.shared.global [%r4], [%d4], 4;\ncp.async.commit_group;\ncp.async.wait_group 0;\nld.shared.b32 %r7, [%r4];\nst.global.b32 [%d5], %r7;",
    ),
    "asynchronous copy read by others after the wait alone": (
        "race",
        "st.shared.b32 [%r4], 0;\nbar.sync 0;\ncp.async.ca.shared.global [%r4], [%d4], 4;\ncp.async.wait_all;\nld.shared.b32 %r7, [%r6]; // <-\nst.global.b32 [%d5], %r7;",
        "cp.async.ca.shared.global [%r4], [%d4], 4;\ncp.async.wait_all;\nbar.sync 0;\nld.shared.b32 %r7, [%r6];\nst.global.b32 [%d5], %r7;",
    ),
    "wait for a group too few": (
        "race",
        "cp.async.ca.shared.global [%r4], [%d4], 4;\ncp.async.commit_group;\ncp.async.ca.shared.global [%r4+512], [%d4], 4;\ncp.async.commit_group;\n"
        "cp.async.wait_group 1;\nld.shared.b32 %r7, [%r4+512]; // <-\nst.global.b32 [%d5], %r7;",
        "cp.async.ca.shared.global [%r4], [%d4], 4;\ncp.async.commit_group;\ncp.async.ca.shared.global [%r4+512], [%d4], 4;\ncp.async.commit_group;\n"
        "cp.async.wait_group 1;\nld.shared.b32 %r7, [%r4];\nst.global.b32 [%d5], %r7;",
    ),
    "copy into a buffer that is still read": (
        "race",
        "st.shared.b32 [%r4], 0;\nbar.sync 0;\nst.shared.b32 [%r4], %r1;\nbar.sync 0;\nld.shared.b32 %r7, [%r6];\ncp.async.ca.shared.global [%r4], [%d4], 4; // <-\n"
        "cp.async.wait_all;\nst.global.b32 [%d5], %r7;",
        "st.shared.b32 [%r4], %r1;\nbar.sync 0;\nld.shared.b32 %r7, [%r6];\nbar.sync 0;\ncp.async.ca.shared.global [%r4], [%d4], 4;\n"
        "cp.async.wait_all;\nst.global.b32 [%d5], %r7;",
    ),
    "store while a copy is in flight": (
        "race",
        "cp.async.ca.shared.global [%r4], [%d4], 4;\nst.shared.b32 [%r4], %r1; // <-\ncp.async.wait_all;",
        "cp.async.ca.shared.global [%r4], [%d4], 4;\ncp.async.wait_all;\nst.shared.b32 [%r4], %r1;",
    ),
    "CTAs write one address": (
        "race",
        "st.global.b32 [%d2], %r5; // <-",
        "mul.wide.u32 %d6, %r5, 4;\nadd.u64 %d6, %d6, %d2;\nst.global.b32 [%d6], %r5;",
        {"ctas": 3, "threads": 1},
    ),
    "CTA reads what another wrote": (
        "race",
        "mul.wide.u32 %d6, %r5, 4;\nadd.u64 %d6, %d6, %d2;\nst.global.b32 [%d6], %r5;\nld.global.b32 %r7, [%d2]; // <-",
        "mul.wide.u32 %d6, %r5, 4;\nadd.u64 %d6, %d6, %d2;\nst.global.b32 [%d6], %r5;\nld.global.b32 %r7, [%d1];",
        {"ctas": 3, "threads": 1},
    ),
    "CTA writes what another read": (
        "race",
        "ld.global.b32 %r7, [%d2+8];\nmul.wide.u32 %d6, %r5, 4;\nadd.u64 %d6, %d6, %d2;\nst.global.b32 [%d6], %r5; // <-",
        "ld.global.b32 %r7, [%d1+8];\nmul.wide.u32 %d6, %r5, 4;\nadd.u64 %d6, %d6, %d2;\nst.global.b32 [%d6], %r5;",
        {"ctas": 3, "threads": 1},
    ),
    "an update that two CTAs make": (
        "race",
        "ld.global.b32 %r7, [%d2+128];\nadd.u32 %r7, %r7, 1;\nst.global.b32 [%d2+128], %r7; // <-",
        "red.global.add.u32 [%d2+128], 1;",
        {"ctas": 2, "threads": 1},
    ),
    "lanes of a warp at different barriers": (
        "barrier",
        "shr.u32 %r7, %r1, 4;\nbarrier.sync %r7; // <-",
        "shr.u32 %r7, %r1, 5;\nadd.u32 %r7, %r7, 1;\nbarrier.sync %r7, 32;",
        {"threads": 32},
    ),
    "read-only load of written bytes": (
        "race",
        "st.global.b32 [%d5], %r1;\nld.global.nc.b32 %r7, [%d5]; // <-",
        "st.global.b32 [%d5], %r1;\nld.global.b32 %r7, [%d5];",
    ),
    "off by one at the end": (
        "out of bounds",
        "ld.global.b32 %r7, [%d4+4]; // <-",
        "setp.lt.u32 %p1, %r1, 63;\n@%p1 ld.global.b32 %r7, [%d4+4];",
    ),
    "before the beginning": ("out of bounds", "ld.global.b32 %r7, [%d4+-4]; // <-", "ld.global.b32 %r7, [%d4+0];"),
    "wrong mask of a store": (
        "out of bounds",
        "setp.le.u32 %p1, %r1, 63;\n@%p1 st.global.b32 [%d5+4], %r1; // <-",
        "setp.lt.u32 %p1, %r1, 63;\n@%p1 st.global.b32 [%d5+4], %r1;",
    ),
    "wide store over the end": (
        "out of bounds",
        "mul.wide.u32 %d6, %r1, 8;\nadd.u64 %d6, %d6, %d2;\nst.global.b64 [%d6], %d3; // <-",
        "mul.wide.u32 %d6, %r1, 8;\nadd.u64 %d6, %d6, %d2;\nsetp.lt.u32 %p1, %r1, 32;\n@%p1 st.global.b64 [%d6], %d3;",
    ),
    "only in the last CTA": (
        "out of bounds",
        "mul.wide.u32 %d6, %r5, 68;\nadd.u64 %d6, %d6, %d1;\nld.global.b32 %r7, [%d6+56]; // <-",
        "mul.wide.u32 %d6, %r5, 64;\nadd.u64 %d6, %d6, %d1;\nld.global.b32 %r7, [%d6+56];",
        {"ctas": 4, "threads": 1},
    ),
    "generic address of a shared variable": (
        "out of bounds",
        "cvt.u64.u32 %d6, %r4;\ncvta.shared.u64 %d6, %d6;\nst.shared.b32 [%d6], %r1; // <-",
        "cvt.u64.u32 %d6, %r4;\ncvta.shared.u64 %d6, %d6;\nst.b32 [%d6], %r1;\nld.shared.b32 %r7, [%r4];\nst.global.b32 [%d5], %r7;",
    ),
    "null pointer": ("out of bounds", "mov.u64 %d6, 0;\nld.global.b32 %r7, [%d6]; // <-", "ld.global.b32 %r7, [%d1];"),
    "beyond shared memory": (
        "out of bounds",
        "st.shared.b32 [%r4+1000], %r1; // <-",
        "st.shared.b32 [%r4+768], %r1;",
    ),
    "shared window through a generic pointer": (
        "out of bounds",
        "cvt.u64.u32 %d6, %r4;\ncvta.shared.u64 %d7, %d6;\nst.b32 [%d7+1000], %r1; // <-",
        "cvt.u64.u32 %d6, %r4;\ncvta.shared.u64 %d7, %d6;\nst.b32 [%d7], %r1;",
    ),
    "store to constant memory": (
        "out of bounds",
        "mov.u64 %d6, table;\nst.global.b32 [%d6], %r1; // <-",
        "ld.const.b32 %r7, [table+4];\nst.global.b32 [%d5], %r7;",
    ),
    "atomic beyond the end": (
        "out of bounds",
        "red.global.add.u32 [%d5+4], 1; // <-",
        "red.global.add.u32 [%d5], 1;",
    ),
    "asynchronous copy beyond the end": (
        "out of bounds",
        "cp.async.ca.shared.global [%r4], [%d4+4], 4; // <-\ncp.async.wait_all;",
        "setp.lt.u32 %p1, %r1, 63;\nselp.b32 %r7, 4, 0, %p1;\ncp.async.ca.shared.global [%r4], [%d4+4], 4, %r7;\ncp.async.wait_all;",
    ),
    "misaligned vector load": (
        "misaligned",
        "setp.lt.u32 %p1, %r1, 16;\n@%p1 ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d4]; // <-",
        "mul.wide.u32 %d6, %r1, 16;\nadd.u64 %d6, %d6, %d1;\nsetp.lt.u32 %p1, %r1, 16;\n@%p1 ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d6];",
    ),
    "misaligned shared store": (
        "misaligned",
        "st.shared.b64 [%r4], %d3; // <-",
        "shl.b32 %r7, %r1, 3;\nadd.u32 %r7, %r7, %r2;\nst.shared.b64 [%r7], %d3;",
    ),
    "misaligned asynchronous copy": (
        "misaligned",
        "setp.lt.u32 %p1, %r1, 1;\n@%p1 cp.async.cg.shared.global [%r4+4], [%d4], 16; // <-\ncp.async.wait_all;",
        "setp.lt.u32 %p1, %r1, 1;\n@%p1 cp.async.cg.shared.global [%r4], [%d4], 16;\ncp.async.wait_all;",
    ),
    "misaligned ldmatrix": (
        "misaligned",
        "st.shared.b32 [%r4], %r1;\nst.shared.b32 [%r4+256], %r1;\nbar.sync 0;\nand.b32 %r7, %r1, 31;\nmad.lo.u32 %r8, %r7, 8, %r2;\n"
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r10}, [%r8]; // <-",
        "st.shared.b32 [%r4], %r1;\nst.shared.b32 [%r4+256], %r1;\nbar.sync 0;\nand.b32 %r7, %r1, 31;\nmad.lo.u32 %r8, %r7, 16, %r2;\n"
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r10}, [%r8];\nst.global.b32 [%d5], %r10;",
    ),
    "register nobody wrote": (
        "uninitialised",
        "st.global.b32 [%d5], %r20; // <-",
        "mov.u32 %r20, 1;\nst.global.b32 [%d5], %r20;",
    ),
    "register written by half of the lanes": (
        "uninitialised",
        "setp.lt.u32 %p1, %r1, 16;\n@%p1 mov.u32 %r20, 1;\nst.global.b32 [%d5], %r20; // <-",
        "setp.lt.u32 %p1, %r1, 16;\n@%p1 mov.u32 %r20, 1;\n@%p1 st.global.b32 [%d5], %r20;",
    ),
    "unfilled shared tile": (
        "uninitialised",
        "ld.shared.b32 %r7, [%r4];\nadd.u32 %r8, %r7, 1;\nst.global.b32 [%d5], %r8; // <-",
        "st.shared.b32 [%r4], 0;\nld.shared.b32 %r7, [%r4];\nadd.u32 %r8, %r7, 1;\nst.global.b32 [%d5], %r8;",
    ),
    "unfilled upper half": (
        "uninitialised",
        "st.shared.b16 [%r4], 1;\nld.shared.b32 %r7, [%r4];\nst.global.b32 [%d5], %r7; // <-",
        "st.shared.b16 [%r4], 1;\nld.shared.b32 %r7, [%r4];\nand.b32 %r7, %r7, 65535;\nst.global.b32 [%d5], %r7;",
    ),
    "branch on nothing": (
        "uninitialised",
        "ld.shared.b32 %r7, [%r4];\nsetp.eq.u32 %p1, %r7, 0;\n@%p1 bra L; // <-\nst.global.b32 [%d5], %r1;\nL:",
        "st.shared.b32 [%r4], 0;\nld.shared.b32 %r7, [%r4];\nsetp.eq.u32 %p1, %r7, 0;\n@%p1 bra L;\nst.global.b32 [%d5], %r1;\nL:",
    ),
    "address from nothing": (
        "uninitialised",
        "ld.shared.b32 %r7, [%r4];\nmul.wide.u32 %d6, %r7, 0;\nadd.u64 %d6, %d6, %d1;\nld.global.b32 %r8, [%d6]; // <-",
        "st.shared.b32 [%r4], 5;\nld.shared.b32 %r7, [%r4];\nmul.wide.u32 %d6, %r7, 0;\nadd.u64 %d6, %d6, %d1;\nld.global.b32 %r8, [%d6];",
    ),
    "atomic on unfilled shared memory": (
        "uninitialised",
        "atom.shared.add.u32 %r7, [%r4], 1; // <-",
        "st.shared.b32 [%r4], 0;\natom.shared.add.u32 %r7, [%r4], 1;",
    ),
    "shuffle from a lane that has nothing": (
        "uninitialised",
        "setp.lt.u32 %p1, %r1, 8;\n@%p1 mov.u32 %r20, 1;\nshfl.sync.bfly.b32 %r7, %r20, 8, 31, -1;\nst.global.b32 [%d5], %r7; // <-",
        "mov.u32 %r20, 1;\nshfl.sync.bfly.b32 %r7, %r20, 8, 31, -1;\nst.global.b32 [%d5], %r7;",
        {"threads": 32},
    ),
    "matrix product of an unfilled tile": (
        "uninitialised",
        "ld.shared.b32 %r10, [%r4];\nmov.f32 %f1, 0f00000000;\n"
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f2, %f3, %f4, %f5}, {%r10, %r1}, {%r1}, {%f1, %f1, %f1, %f1};\nst.global.f32 [%d5], %f2; // <-",
        "st.shared.b32 [%r4], 0;\nld.shared.b32 %r10, [%r4];\nmov.f32 %f1, 0f00000000;\n"
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f2, %f3, %f4, %f5}, {%r10, %r1}, {%r1}, {%f1, %f1, %f1, %f1};\nst.global.f32 [%d5], %f2;",
        {"threads": 32},
    ),
    "divergent barrier": (
        "barrier",
        "setp.lt.u32 %p1, %r1, 16;\n@%p1 bra L;\nst.shared.b32 [%r4], %r1;\nbar.sync 0; // <-\nL:\nbar.sync 0;",
        "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra L;\nst.shared.b32 [%r4], %r1;\nbar.sync 1, 32;\nL:",
    ),
    "barrier that other warps do not reach": (
        "deadlock",
        "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra L;\nbar.sync 1; // <-\nret;\nL:\nbar.sync 2;",
        "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra L;\nbar.sync 1;\nret;\nL:\nbar.sync 1;",
    ),
    "barrier for more threads than there are": ("deadlock", "bar.sync 1, 128; // <-", "bar.sync 1, 64;"),
    "matrix product of half a warp": (
        "barrier",
        "mov.f32 %f1, 0f00000000;\nsetp.lt.u32 %p1, %r1, 16;\n"
        "@%p1 mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f2, %f3, %f4, %f5}, {%r1, %r1}, {%r1}, {%f1, %f1, %f1, %f1}; // <-",
        "mov.f32 %f1, 0f00000000;\nsetp.lt.u32 %p1, %r1, 16;\n"
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f2, %f3, %f4, %f5}, {%r1, %r1}, {%r1}, {%f1, %f1, %f1, %f1};",
        {"threads": 32},
    ),
    "endless loop": (
        "budget",
        "L:\nadd.u32 %r7, %r1, 1; // <-\nbra L;",
        "mov.u32 %r7, 0;\nL:\nadd.u32 %r7, %r7, 1;\nsetp.lt.u32 %p1, %r7, 100;\n@%p1 bra L;",
    ),
    "trap": ("trap", "setp.eq.u32 %p1, %r1, 7;\n@%p1 trap; // <-", "setp.eq.u32 %p1, %r1, 99;\n@%p1 trap;"),
    "barrier on both sides of an if": (
        "barrier",
        "setp.lt.u32 %p1, %r1, 16;\n@%p1 bra L;\nbar.sync 0;\nret;\nL:\nbar.sync 0; // <-",
        "setp.lt.u32 %p1, %r1, 16;\n@%p1 bra L;\nbarrier.sync 0;\nret;\nL:\nbarrier.sync 0;",
        {"threads": 32},
    ),
    "shuffle whose partners wait at a barrier": (
        "barrier",
        "setp.lt.u32 %p1, %r1, 16;\n@%p1 bra L;\nshfl.sync.bfly.b32 %r7, %r1, 1, 31, -1; // <-\nret;\nL:\nbar.warp.sync -1;",
        "setp.lt.u32 %p1, %r1, 16;\n@%p1 bra L;\nshfl.sync.bfly.b32 %r7, %r1, 1, 31, 0xffff0000;\nret;\nL:\nbar.warp.sync 0xffff;",
        {"threads": 32},
    ),
    "named barrier that waits for more arrivals": (
        "deadlock",
        "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra P;\nbar.sync 1, 96; // <-\nret;\nP:\nbar.arrive 1, 96;",
        "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra P;\nbar.sync 1, 64;\nret;\nP:\nbar.arrive 1, 64;",
    ),
    "consumer does not wait for bar.arrive": (
        "race",
        "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra P;\nld.shared.b32 %r7, [%r6]; // <-\nbar.sync 1, 64;\nret;\nP:\n"
        "st.shared.b32 [%r4], %r1;\nbar.arrive 1, 64;",
        "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra P;\nbar.sync 1, 64;\nld.shared.b32 %r7, [%r6];\nst.global.b32 [%d5], %r7;\nret;\nP:\n"
        "st.shared.b32 [%r4], %r1;\nbar.arrive 1, 64;",
    ),
    "mbarrier with too many arrivals": (
        "barrier",
        "setp.ne.u32 %p1, %r1, 0;\n@%p1 bra L;\nmbarrier.init.shared.b64 [%r2], 1;\nL:\nbar.sync 0;\nmbarrier.arrive.shared.b64 %d6, [%r2], 2; // <-",
        "setp.ne.u32 %p1, %r1, 0;\n@%p1 bra L;\nmbarrier.init.shared.b64 [%r2], 2;\nL:\nbar.sync 0;\nmbarrier.arrive.shared.b64 %d6, [%r2], 2;",
    ),
    "mbarrier that nobody initialised": (
        "uninitialised",
        "mbarrier.arrive.shared.b64 %d6, [%r2]; // <-",
        "setp.ne.u32 %p1, %r1, 0;\n@%p1 bra L;\nmbarrier.init.shared.b64 [%r2], 64;\nL:\nbar.sync 0;\nmbarrier.arrive.shared.b64 %d6, [%r2];",
    ),
    "mbarrier that is not waited for": (
        "race",
        "st.shared.b32 [%r4], 0;\nsetp.eq.u32 %p1, %r1, 0;\n@%p1 mbarrier.init.shared.b64 [%r2+512], 64;\nbar.sync 0;\nst.shared.b32 [%r4], %r1;\n"
        "mbarrier.arrive.shared.b64 %d6, [%r2+512];\nld.shared.b32 %r7, [%r6]; // <-\nst.global.b32 [%d5], %r7;",
        "setp.eq.u32 %p1, %r1, 0;\n@%p1 mbarrier.init.shared.b64 [%r2+512], 64;\nbar.sync 0;\nst.shared.b32 [%r4], %r1;\n"
        "mbarrier.arrive.shared.b64 %d6, [%r2+512];\nL:\nmbarrier.test_wait.shared.b64 %p2, [%r2+512], %d6;\n@!%p2 bra L;\n"
        "ld.shared.b32 %r7, [%r6];\nst.global.b32 [%d5], %r7;",
    ),
    "copies behind an mbarrier that is not waited for": (
        "race",
        "st.shared.b32 [%r4], 0;\nsetp.eq.u32 %p1, %r1, 0;\n@%p1 mbarrier.init.shared.b64 [%r2+512], 64;\nbar.sync 0;\ncp.async.ca.shared.global [%r4], [%d4], 4;\n"
        "cp.async.mbarrier.arrive.noinc.shared.b64 [%r2+512];\nld.shared.b32 %r7, [%r6]; // <-\nst.global.b32 [%d5], %r7;",
        "setp.eq.u32 %p1, %r1, 0;\n@%p1 mbarrier.init.shared.b64 [%r2+512], 64;\nbar.sync 0;\ncp.async.ca.shared.global [%r4], [%d4], 4;\n"
        "cp.async.mbarrier.arrive.noinc.shared.b64 [%r2+512];\nL:\nmbarrier.test_wait.parity.shared.b64 %p2, [%r2+512], 0;\n@!%p2 bra L;\n"
        "ld.shared.b32 %r7, [%r6];\nst.global.b32 [%d5], %r7;",
    ),
    "tensor written by another warp, no barrier": (
        "race",
        "xor.b32 %r7, %r1, 32;\nmul.wide.u32 %d6, %r7, 4;\nadd.u64 %d6, %d6, %d2;\nst.global.b32 [%d5], %r1;\n"
        "ld.global.b32 %r8, [%d6]; // <-\nst.global.b32 [%d5], %r8;",
        "xor.b32 %r7, %r1, 32;\nmul.wide.u32 %d6, %r7, 4;\nadd.u64 %d6, %d6, %d2;\nst.global.b32 [%d5], %r1;\nbar.sync 0;\n"
        "ld.global.b32 %r8, [%d6];\nbar.sync 0;\nst.global.b32 [%d5], %r8;",
    ),
    "flag of a plain store": (
        "race",
        handover("st.global.b32 [%d2+192], 1;", "ld.acquire.gpu.global.b32 %r7, [%d2+192]; // <-").replace(
            "[%d2+128]; // <-", "[%d2+128];"
        ),
        handover("st.release.gpu.global.b32 [%d2+192], 1;", "ld.acquire.gpu.global.b32 %r7, [%d2+192];"),
        {"ctas": 2, "threads": 1},
    ),
    "flag without a release": (
        "race",
        handover("st.relaxed.gpu.global.b32 [%d2+192], 1;", "ld.acquire.gpu.global.b32 %r7, [%d2+192];"),
        handover(
            "fence.acq_rel.gpu;\nst.relaxed.gpu.global.b32 [%d2+192], 1;", "ld.acquire.gpu.global.b32 %r7, [%d2+192];"
        ),
        {"ctas": 2, "threads": 1},
    ),
    "flag without an acquire": (
        "race",
        handover("st.release.gpu.global.b32 [%d2+192], 1;", "ld.relaxed.gpu.global.b32 %r7, [%d2+192];"),
        handover(
            "membar.gl;\nst.volatile.global.b32 [%d2+192], 1;", "ld.volatile.global.b32 %r7, [%d2+192];", "membar.gl;\n"
        ),
        {"ctas": 2, "threads": 1},
    ),
    "fence of too narrow a scope": (
        "race",
        handover(
            "fence.acq_rel.cta;\nst.relaxed.gpu.global.b32 [%d2+192], 1;", "ld.acquire.gpu.global.b32 %r7, [%d2+192];"
        ),
        handover(
            "atom.global.acq_rel.gpu.add.u32 %r7, [%d2+192], 1;", "atom.global.acq_rel.gpu.add.u32 %r7, [%d2+192], 0;"
        ),
        {"ctas": 2, "threads": 1},
    ),
    "dropped release in split-K": (
        "race",
        "L:\nld.acquire.gpu.global.b32 %r7, [%d2+128];\nsetp.ne.u32 %p1, %r7, %r5;\n@%p1 bra L;\nld.global.b32 %r8, [%d2]; // <-\n"
        "add.u32 %r8, %r8, %r5;\nst.global.b32 [%d2], %r8;\nadd.u32 %r7, %r7, 1;\nst.relaxed.gpu.global.b32 [%d2+128], %r7;",
        "L:\nld.acquire.gpu.global.b32 %r7, [%d2+128];\nsetp.ne.u32 %p1, %r7, %r5;\n@%p1 bra L;\nld.global.b32 %r8, [%d2];\n"
        "add.u32 %r8, %r8, %r5;\nst.global.b32 [%d2], %r8;\nadd.u32 %r7, %r7, 1;\nst.release.gpu.global.b32 [%d2+128], %r7;",
        {"ctas": 3, "threads": 1},
    ),
    "beyond a local array": (
        "out of bounds",
        "mov.u64 %d6, scratch;\nadd.u64 %d6, %d6, %d3;\nst.local.b32 [%d6], %r1; // <-",
        "mov.u64 %d6, scratch;\nand.b64 %d7, %d3, 12;\nadd.u64 %d6, %d6, %d7;\nst.local.b32 [%d6], %r1;\nld.local.b32 %r7, [%d6];\nst.global.b32 [%d5], %r7;",
        {"scratch": True},
    ),
    "local variable that nobody wrote": (
        "uninitialised",
        "st.local.b32 [scratch], %r1;\nld.local.b32 %r7, [scratch+4];\nst.global.b32 [%d5], %r7; // <-",
        "st.local.b32 [scratch+4], %r1;\nld.local.b32 %r7, [scratch+4];\nst.global.b32 [%d5], %r7;",
        {"scratch": True},
    ),
    "misaligned local access": (
        "misaligned",
        "st.local.b32 [scratch], 0;\nld.local.b32 %r7, [scratch+2]; // <-",
        "st.local.b32 [scratch], 0;\nld.local.u16 %h1, [scratch+2];",
        {"scratch": True},
    ),
    "call of what is no function": (
        "out of bounds",
        "mov.u64 %d6, 5;\n" + CALL.format("%r1", "%d6", ", p") + " // <-",
        "mov.u64 %d6, twice;\n" + CALL.format("%r1", "%d6", ", p") + "\nst.global.b32 [%d5], %r7;",
        {"module": FUNCTIONS},
    ),
    "calls without an end": (
        "out of bounds",
        "call forever;",
        CALL.format("5", "factorial", "") + "\nst.global.b32 [%d5], %r7;",
        {"module": FUNCTIONS.replace("call forever;", "call forever; // <-")},
    ),
    "assertion": (
        "trap",
        "setp.lt.u32 %p1, %r1, 10;\n@%p1 bra L;\n{ .param .b64 m; .param .b64 f; .param .b32 l; .param .b64 n; .param .b64 c;\n"
        "mov.u64 %d6, text; st.param.b64 [m], %d6; mov.u64 %d6, file; st.param.b64 [f], %d6; st.param.b32 [l], 12;\n"
        "st.param.b64 [n], %d6; st.param.b64 [c], 1;\ncall __assertfail, (m, f, l, n, c); // <-\n}\nL:",
        "setp.lt.u32 %p1, %r1, 99;\n@%p1 bra L;\ntrap;\nL:",
        {"module": FUNCTIONS},
    ),
    "branch beyond its table": (
        "out of bounds",
        "and.b32 %r7, %r1, 3;\nmov.u32 %r8, 0;\nT: .branchtargets A, B;\nbrx.idx %r7, T; // <-\nA:\nadd.u32 %r8, %r8, 1;\nB:\nst.global.b32 [%d5], %r8;",
        "and.b32 %r7, %r1, 1;\nmov.u32 %r8, 0;\nT: .branchtargets A, B;\nbrx.idx %r7, T;\nA:\nadd.u32 %r8, %r8, 1;\nB:\nst.global.b32 [%d5], %r8;",
    ),
    "instruction that is not supported": ("unsupported", "tanh.approx.f16x3 %r7, %r8; // <-", "mov.u32 %r7, %r1;"),
}


ORDERS = ("in", "reverse", "random")
SCRATCH = ".local .align 16 .b8 scratch[16];\n"


def _run(body, extra, seed=0, order="in"):
    a, b = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    extra = dict(extra)
    if extra.pop("scratch", False):
        body = SCRATCH + body
    with gpusim.options(budget=500_000, seed=seed, order=order):
        run(body, a, b, **extra)
    return b


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_at_its_line(name):
    kind, body, _, *extra = FAULTS[name]
    with pytest.raises(gpusim.SimulationError, match=kind) as caught:
        _run(body, extra[0] if extra else {})
    assert caught.value.kind == kind
    if kind != "budget":  # it stops anywhere in the loop
        # Either access of a race may come second; a deadlock has a line for each warp.
        options = extra[0] if extra else {}
        prefix = SCRATCH if options.get("scratch") else ""
        line = marked_line(source(prefix + body, options.get("module", "")))
        assert line in (caught.value.line, caught.value.other_line) or f"PTX line {line}" in str(caught.value)


@pytest.mark.parametrize("name", FAULTS)
def test_its_clean_twin_is_silent_in_every_order(name):
    _, _, body, *extra = FAULTS[name]
    results = [_run(body, extra[0] if extra else {}, seed, ORDERS[seed % 3]) for seed in range(8)]
    assert all(torch.equal(r, results[0]) for r in results)


CLEAN: dict[str, tuple] = {
    "lanes store to one address": ("and.b32 %r7, %r1, 0;\nst.global.b32 [%d2], %r7;", {"threads": 32}),
    "lanes store different values to one address": ("st.shared.b32 [%r2], %r1;", {"threads": 32}),
    "CTAs write equal values": ("st.global.b32 [%d5], %r1;", {"ctas": 3}),
    "warps write equal values": ("st.shared.b32 [%r2], 7;\nbar.sync 0;\nld.shared.b32 %r7, [%r2];\nst.global.b32 [%d5], %r7;", {}),
    "warps hold the same values, lanes of a warp do not": (
        "and.b32 %r7, %r1, 31;\nst.shared.b32 [%r2], %r7;\nbar.sync 0;\nld.shared.b32 %r8, [%r2];\nst.global.b32 [%d5], %r8;",
        {},
    ),
    "warps read one byte": ("st.shared.b32 [%r4], %r1;\nbar.sync 0;\nld.shared.b32 %r7, [%r2];\nbar.sync 0;\nst.shared.b32 [%r4], %r7;", {"threads": 128}),
    "early return before a barrier": ("setp.ge.u32 %p1, %r1, 32;\n@%p1 ret;\nst.shared.b32 [%r4], %r1;\nbar.sync 0;\nld.shared.b32 %r7, [%r4];\nst.global.b32 [%d5], %r7;", {}),
    "early return of some lanes": ("setp.ge.u32 %p1, %r1, 50;\n@%p1 ret;\nst.shared.b32 [%r4], %r1;\nbar.sync 0;\nld.shared.b32 %r7, [%r4];\nst.global.b32 [%d5], %r7;", {}),
    "unused bytes of a load": (
        "setp.eq.u32 %p1, %r1, 63;\n.pragma \"used_bytes_mask 0x000f\";\n@%p1 ld.global.v2.b32 {%r10, %r11}, [%d4+-4];\n@%p1 st.global.b32 [%d5], %r10;",
        {},
    ),
    "unused bytes beyond the tensor": (
        "setp.eq.u32 %p1, %r1, 62;\nadd.u64 %d6, %d4, 8;\nmov.u64 %d7, %d4;\n.pragma \"used_bytes_mask 0x000f\";\n"
        "@%p1 ld.global.v2.b32 {%r10, %r11}, [%d7];\n@%p1 st.global.b32 [%d5], %r10;",
        {},
    ),
    "masked-off rows stay unfilled": (
        "setp.lt.u32 %p1, %r1, 40;\n@%p1 st.shared.b32 [%r4], %r1;\nbar.sync 0;\nld.shared.b32 %r7, [%r4];\nselp.b32 %r8, %r7, 0, %p1;\nst.global.b32 [%d5], %r8;",
        {},
    ),
    "masked-off loads": ("setp.lt.u32 %p1, %r1, 10;\nmov.u32 %r7, 0;\n@%p1 ld.global.b32 %r7, [%d4+200];\nst.global.b32 [%d5], %r7;", {}),
    "zero-filled copy": ("setp.lt.u32 %p1, %r1, 10;\nselp.b32 %r7, 4, 0, %p1;\ncp.async.ca.shared.global [%r4], [%d4+200], 4, %r7;\ncp.async.wait_all;\nld.shared.b32 %r8, [%r4];\nst.global.b32 [%d5], %r8;", {}),
    "two stages in flight": (
        "cp.async.ca.shared.global [%r4], [%d4], 4;\ncp.async.commit_group;\ncp.async.ca.shared.global [%r4+256], [%d4], 4;\ncp.async.commit_group;\n"
        "cp.async.wait_group 1;\nbar.sync 0;\nld.shared.b32 %r7, [%r6];\ncp.async.wait_group 0;\nbar.sync 0;\nld.shared.b32 %r8, [%r6+256];\n"
        "add.u32 %r7, %r7, %r8;\nst.global.b32 [%d5], %r7;",
        {},
    ),
    "producer and consumer with two named barriers": (
        "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra P;\nbar.sync 1, 64;\nld.shared.b32 %r7, [%r6];\nbar.sync 2, 64;\nst.global.b32 [%d5], %r7;\nret;\n"
        "P:\nst.shared.b32 [%r4], %r1;\nbar.sync 1, 64;\nbar.sync 2, 64;\nst.shared.b32 [%r4], %r3;",
        {},
    ),
    "neighbouring halves of a word": ("shl.b32 %r7, %r1, 1;\nadd.u32 %r7, %r7, %r2;\ncvt.u16.u32 %h1, %r1;\nst.shared.b16 [%r7], %h1;\nld.shared.u16 %h2, [%r7];\nst.global.b16 [%d5], %h2;", {}),
    "lanes merge behind a branch": (
        "mov.u32 %r7, 0;\nsetp.lt.u32 %p1, %r1, 5;\n@%p1 bra A;\nadd.u32 %r7, %r7, 1;\nbra B;\nA:\nadd.u32 %r7, %r7, 2;\nB:\n"
        "shfl.sync.bfly.b32 %r8, %r7, 1, 31, -1;\nbar.sync 0;\nst.global.b32 [%d5], %r8;",
        {},
    ),
    "loops of different lengths": (
        "and.b32 %r10, %r1, 7;\nmov.u32 %r7, 0;\nL:\nadd.u32 %r7, %r7, 1;\nsetp.le.u32 %p1, %r7, %r10;\n@%p1 bra L;\nbar.sync 0;\nst.global.b32 [%d5], %r7;",
        {},
    ),
    "shuffle in a part of the warp": ("setp.lt.u32 %p1, %r1, 16;\nmov.u32 %r8, 0;\n@!%p1 bra L;\nshfl.sync.bfly.b32 %r8, %r1, 1, 31, 65535;\nL:\nst.global.b32 [%d5], %r8;", {"threads": 32}),
    "sum over atomics": ("st.shared.b32 [%r4], 0;\nbar.sync 0;\natom.shared.add.u32 %r7, [%r2], 1;\nbar.sync 0;\nld.shared.b32 %r8, [%r2];\nst.global.b32 [%d5], %r8;", {}),
    "atomics of several CTAs": ("red.global.add.u32 [%d2], 1;", {"ctas": 4}),
    "a register of other bytes is not used": ("st.shared.b16 [%r4], 5;\nld.shared.b32 %r7, [%r4];\nmov.b32 {%h1, %h2}, %r7;\nst.global.b16 [%d5], %h1;", {}),
    "full mask on both sides of an if": (
        "setp.lt.u32 %p1, %r1, 16;\n@%p1 bra L;\nadd.u32 %r7, %r1, 100;\nshfl.sync.bfly.b32 %r8, %r7, 16, 31, -1;\nbra M;\nL:\n"
        "shfl.sync.bfly.b32 %r8, %r1, 16, 31, -1;\nM:\nst.global.b32 [%d5], %r8;",
        {"threads": 32},
    ),
    "groups of equal lanes, each with its own mask": (
        "and.b32 %r7, %r1, 3;\nmatch.any.sync.b32 %r8, %r7, -1;\nredux.sync.add.u32 %r10, %r1, %r8;\nst.global.b32 [%d5], %r10;",
        {"threads": 32},
    ),
    "lanes of a warp queue for a lock": (
        "setp.eq.u32 %p1, %r1, 0;\n@%p1 st.shared.v2.b32 [%r2], {0, 0};\nbar.sync 0;\nL:\natom.shared.acquire.cta.cas.b32 %r7, [%r2], 0, 1;\n"
        "setp.ne.u32 %p2, %r7, 0;\n@%p2 bra L;\nld.shared.b32 %r8, [%r2+4];\nadd.u32 %r8, %r8, 1;\nst.shared.b32 [%r2+4], %r8;\n"
        "atom.shared.release.cta.exch.b32 %r7, [%r2], 0;\nbar.sync 0;\nld.shared.b32 %r8, [%r2+4];\nst.global.b32 [%d5], %r8;",
        {"threads": 64},
    ),
    "a warp waits for a flag that another sets": (
        "setp.eq.u32 %p1, %r1, 0;\n@%p1 st.shared.v2.b32 [%r2], {0, 0};\nbar.sync 0;\nsetp.ge.u32 %p2, %r1, 32;\n@%p2 bra W;\nL:\n"
        "ld.volatile.shared.b32 %r7, [%r2];\nsetp.eq.u32 %p3, %r7, 0;\n@%p3 bra L;\nfence.acq_rel.cta;\nld.shared.b32 %r8, [%r2+4];\n"
        "st.global.b32 [%d5], %r8;\nret;\nW:\nsetp.ne.u32 %p4, %r1, 32;\n@%p4 bra E;\nst.shared.b32 [%r2+4], 9;\nfence.acq_rel.cta;\n"
        "st.volatile.shared.b32 [%r2], 1;\nE:",
        {},
    ),
    "votes at a barrier": (
        "setp.lt.u32 %p1, %r1, 40;\nbar.red.popc.u32 %r7, 0, %p1;\nbar.red.and.pred %p2, 0, %p1;\nbar.red.or.pred %p3, 0, !%p1;\n"
        "selp.b32 %r8, 100, 0, %p2;\nadd.u32 %r7, %r7, %r8;\nselp.b32 %r8, 1000, 0, %p3;\nadd.u32 %r7, %r7, %r8;\nst.global.b32 [%d5], %r7;",
        {},
    ),
    "calls in a part of the warp": (
        "and.b32 %r8, %r1, 7;\nmov.u32 %r7, 0;\nsetp.lt.u32 %p1, %r1, 13;\n@%p1 bra L;\n" + CALL.format("%r8", "factorial", "") + "\nL:\n"
        "bar.sync 0;\nst.global.b32 [%d5], %r7;",
        {"module": FUNCTIONS},
    ),
    "lanes call different functions": (
        "and.b32 %r8, %r1, 1;\nmul.wide.u32 %d6, %r8, 8;\nmov.u64 %d7, table_of_functions;\nadd.u64 %d6, %d6, %d7;\nld.global.b64 %d6, [%d6];\n"
        + CALL.format("4", "%d6", ", p") + "\nshfl.sync.bfly.b32 %r8, %r7, 1, 31, -1;\nst.global.b32 [%d5], %r8;",
        {"module": FUNCTIONS},
    ),
    "one label in two scopes": (
        "mov.u32 %r7, 0;\n{ .reg .pred p; L: add.u32 %r7, %r7, 1; setp.lt.u32 p, %r7, 5; @p bra L; }\n"
        "{ .reg .pred p; L: add.u32 %r7, %r7, 10; setp.lt.u32 p, %r7, 50; @p bra L; }\nst.global.b32 [%d5], %r7;",
        {},
    ),
    "the last CTA adds what all wrote": (
        "mul.wide.u32 %d6, %r5, 4;\nadd.u64 %d6, %d6, %d2;\nadd.u32 %r7, %r5, 1;\nst.global.b32 [%d6+64], %r7;\nmembar.gl;\n"
        "atom.global.add.u32 %r8, [%d2], 1;\nsetp.ne.u32 %p1, %r8, 3;\n@%p1 ret;\nmembar.gl;\nld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d2+64];\n"
        "add.u32 %r10, %r10, %r11;\nadd.u32 %r10, %r10, %r12;\nadd.u32 %r10, %r10, %r13;\nst.global.b32 [%d2+128], %r10;",
        {"ctas": 4, "threads": 1},
    ),
    "each CTA adds to what those before it sum up to": (
        "mul.wide.u32 %d6, %r5, 4;\nadd.u64 %d6, %d6, %d2;\nmov.u32 %r7, 0;\nsetp.eq.u32 %p1, %r5, 0;\n@%p1 bra W;\nL:\n"
        "ld.acquire.gpu.global.b32 %r7, [%d6+-4];\nsetp.eq.u32 %p2, %r7, 0;\n@%p2 bra L;\nW:\nadd.u32 %r7, %r7, 3;\n"
        "st.release.gpu.global.b32 [%d6], %r7;",
        {"ctas": 40, "threads": 1},
    ),
    "all CTAs meet at a counter": (
        "mul.wide.u32 %d6, %r5, 4;\nadd.u64 %d6, %d6, %d2;\nadd.u32 %r7, %r5, 5;\nst.global.b32 [%d6], %r7;\n"
        "red.release.gpu.global.add.u32 [%d2+200], 1;\nL:\nld.acquire.gpu.global.b32 %r8, [%d2+200];\nsetp.lt.u32 %p1, %r8, 8;\n@%p1 bra L;\n"
        "xor.b32 %r10, %r5, 7;\nmul.wide.u32 %d7, %r10, 4;\nadd.u64 %d7, %d7, %d2;\nld.global.b32 %r11, [%d7];\nst.global.b32 [%d6+64], %r11;",
        {"ctas": 8, "threads": 1},
    ),
    "copies of one value, loaded by two warps and stored by one": (
        "and.b32 %r7, %r1, 31;\nmul.wide.u32 %d6, %r7, 4;\nadd.u64 %d6, %d6, %d2;\nld.global.b32 %r8, [%d6];\nadd.u32 %r8, %r8, 1;\n"
        "setp.lt.u32 %p1, %r1, 32;\n@%p1 st.global.b32 [%d6], %r8;",
        {},
    ),
    "a flag is taken back by the one who saw it": (
        "setp.ne.u32 %p1, %r5, 0;\n@%p1 bra L;\nst.release.gpu.global.b32 [%d2+192], 1;\nret;\nL:\nld.acquire.gpu.global.b32 %r7, [%d2+192];\n"
        "setp.eq.u32 %p2, %r7, 0;\n@%p2 bra L;\nst.global.b32 [%d2+192], 0;",
        {"ctas": 2, "threads": 1},
    ),
    "a barrier that counts all threads, and one that counts none": (
        "bar.sync 0;\nst.shared.b32 [%r4], %r1;\nsetp.lt.u32 %p1, %r1, 32;\n@%p1 bra L;\nbar.sync 0, 64;\nbra M;\nL:\nbar.sync 0;\nM:\n"
        "ld.shared.b32 %r7, [%r6];\nst.global.b32 [%d5], %r7;",
        {},
    ),
    "permuted bytes": ("st.shared.b16 [%r4], 5;\nld.shared.b32 %r7, [%r4];\nprmt.b32 %r8, %r7, %r1, 16912;\nprmt.b32 %r8, %r7, 0, 17424;\nst.global.b32 [%d5], %r8;", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CLEAN)
def test_what_only_looks_faulty_is_silent(name):
    body, extra = CLEAN[name]
    results = [_run(body, extra, seed, ORDERS[seed % 3]) for seed in range(8)]
    assert all(torch.equal(r, results[0]) for r in results)


def test_equal_values_of_two_ctas_are_an_error_where_asked():
    body, extra = CLEAN["CTAs write equal values"]
    with pytest.raises(gpusim.RaceError), gpusim.options(races="strict"):
        _run(body, extra)


def test_outputs_must_be_written_and_not_be_read_before():
    a, b = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    with gpusim.options(outputs=[b]):
        with pytest.raises(gpusim.UninitialisedError, match=r"4 of 256 bytes.*never written"):
            run("setp.lt.u32 %p1, %r1, 63;\n@%p1 st.global.b32 [%d5], %r1;", a, b)
        with pytest.raises(gpusim.UninitialisedError, match="a store to global memory"):
            run("ld.global.b32 %r7, [%d5];\nst.global.b32 [%d5], %r7;", a, b)
        run("st.global.b32 [%d5], %r1;", a, b)
    assert torch.equal(a, b)


def test_bounds_may_be_those_of_the_view():
    a = torch.arange(256, dtype=torch.int32)
    rows = a.view(4, 64)[:, :32]
    b = torch.zeros(64, dtype=torch.int32)
    body = "ld.global.b32 %r7, [%d4];\nst.global.b32 [%d5], %r7;"
    run(body, rows, b)
    with pytest.raises(gpusim.OutOfBoundsError), gpusim.options(bounds="view"):
        run(body, rows, b)


def test_unwritten_bytes_may_be_an_error_at_the_load():
    body = "ld.shared.b32 %r7, [%r4]; // <-"
    _run(body, {})
    with pytest.raises(gpusim.UninitialisedError), gpusim.options(uninit="load"):
        _run(body, {})


def test_faults_can_be_collected():
    a, b = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    body = "ld.global.b32 %r7, [%d4+4];\nst.global.b32 [%d5+8], %r1;\nst.global.b32 [%d5], %r20;"
    with gpusim.options(on_error="collect"):
        report = run(body, a, b)
    assert [e.kind for e in sorted(report.errors, key=lambda e: e.line)] == [
        "out of bounds",
        "out of bounds",
        "uninitialised",
        "race",
    ]


def test_three_warps_reading_are_all_waited_for():
    """The write must be ordered after every reader, not only after the last one."""
    body = (
        "st.shared.b32 [%r4], 0;\nbar.sync 0;\nshr.u32 %r7, %r1, 5;\nld.shared.b32 %r8, [%r2];\n"
        "setp.eq.u32 %p1, %r7, 1;\n@%p1 bra OUT;\nbar.sync 1, 96;\nsetp.eq.u32 %p2, %r1, 0;\n@%p2 st.shared.b32 [%r2], 9; // <-\nOUT:"
    )
    for seed in range(8):
        with pytest.raises(gpusim.RaceError), gpusim.options(seed=seed):
            run(body, torch.zeros(1), torch.zeros(1), threads=128)
    everybody = body.replace("@%p1 bra OUT;\n", "").replace("bar.sync 1, 96", "bar.sync 1, 128")
    for seed in range(8):
        with gpusim.options(seed=seed):
            run(everybody, torch.zeros(1), torch.zeros(1), threads=128)
