"""Matrix products of the simulator: small elements, sparse matrices and wmma, against products of whole matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx import needs_core, run

from eva02_kernels.testing import gpusim

needs_core()

_G, _T = np.arange(32) // 4, np.arange(32) % 4
_BITS = {"b1": 1, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "f16": 16, "bf16": 16, "tf32": 32, "f32": 32, "s32": 32}
_RANGES = {"b1": (0, 2), "s4": (-8, 8), "u4": (0, 16), "s8": (-128, 128), "u8": (0, 256)}  # of others: -8 to 8


def _values(kind: str, shape: tuple[int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(*_RANGES.get(kind, (-8, 9)), shape)


def _words(kind: str, values: np.ndarray) -> np.ndarray:
    """Elements (..., n) as 32-bit words (..., words), the first element in the lowest bits."""
    per = 32 // _BITS[kind]
    if kind in ("f16", "bf16", "tf32", "f32"):
        dtype = {"f16": torch.float16, "bf16": torch.bfloat16}.get(kind, torch.float32)
        bits = torch.tensor(values).to(dtype).view({2: torch.int16, 4: torch.int32}[dtype.itemsize]).numpy()
    else:
        bits = values
    bits = (bits.astype(np.int64) % (1 << _BITS[kind])).reshape(*values.shape[:-1], -1, per)
    return (bits << (np.arange(per) * _BITS[kind])).sum(-1).astype(np.uint32).view(np.int32)


def _registers_of_a(kind: str, a: np.ndarray) -> np.ndarray:
    """Registers (r, lane) of A as the PTX ISA's tables give them (9.7.14.5)."""
    per = 32 // _BITS[kind]
    rows = 2 if a.shape[0] == 16 else 1
    count = a.size // 32 // per
    elements = [
        [a[_G + 8 * (r % rows), _T * per + e + 4 * per * (r // rows)] for e in range(per)] for r in range(count)
    ]
    return _words(kind, np.array(elements).transpose(0, 2, 1))[..., 0]


def _registers_of_b(kind: str, b: np.ndarray) -> np.ndarray:
    per = 32 // _BITS[kind]
    elements = [[b[_T * per + e + 4 * per * r, _G] for e in range(per)] for r in range(b.size // 32 // per)]
    return _words(kind, np.array(elements).transpose(0, 2, 1))[..., 0]


def _product(instruction: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, extra: str = "", more=None) -> torch.Tensor:
    """D's registers (r, lane): A, B, C (r, lane) are loaded from memory, ``more`` (lane) into %r40."""
    memory = [a, b, c] + ([] if more is None else [more[None]])
    counts = [len(m) for m in memory]
    names = [f"%r{10 + i}" for i in range(sum(counts))]
    loads = "".join(f"ld.global.b32 {name}, [%d4+{128 * i}];\n" for i, name in enumerate(names))
    lists, at = [], 0
    for n in counts[:3]:
        lists.append("{" + ", ".join(names[at : at + n]) + "}")
        at += n
    results = ["%r1", "%r5", "%r9", "%r3"][: len(c)]
    extra = extra.replace("$e", names[-1])
    stores = "".join(f"st.global.b32 [%d5+{128 * i}], {name};\n" for i, name in enumerate(results))
    out = torch.zeros(len(c), 32, dtype=torch.int32)
    run(f"{loads}{instruction} {{{', '.join(results)}}}, {', '.join(lists)}{extra};\n{stores}",
        torch.tensor(np.concatenate(memory)), out, threads=32)  # fmt: skip
    return out


def _sums(d: torch.Tensor, rows: int, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(rows, 8, dtype=dtype)
    for r in range(len(d)):
        out[_G + 8 * (r // 2), 2 * _T + r % 2] = d[r].view(dtype)
    return out


def _addends(kind: str, rows: int) -> tuple[np.ndarray, np.ndarray]:
    c = np.random.default_rng(9).integers(-1000, 1000, (rows, 8))
    return c, np.stack([_words(kind, c[_G + 8 * (r // 2), 2 * _T + r % 2][:, None])[:, 0] for r in range(rows // 4)])


@pytest.mark.parametrize(("kinds", "m", "k"), [
    *((pair, m, k) for pair in (("s4", "s4"), ("u4", "u4"), ("s4", "u4"), ("u4", "s4")) for m, k in ((8, 32), (16, 32), (16, 64))),
    (("s8", "s8"), 16, 16), (("u8", "s8"), 16, 32), (("tf32", "tf32"), 16, 4),
])  # fmt: skip
def test_products_of_small_elements(kinds, m, k):
    a, b = _values(kinds[0], (m, k), 1), _values(kinds[1], (k, 8), 2)
    sum_kind = "f32" if kinds[0] == "tf32" else "s32"
    c, c_registers = _addends(sum_kind, m)
    d = _product(f"mma.sync.aligned.m{m}n8k{k}.row.col.{sum_kind}.{kinds[0]}.{kinds[1]}.{sum_kind}",
                 _registers_of_a(kinds[0], a), _registers_of_b(kinds[1], b), c_registers)  # fmt: skip
    got = _sums(d, m, torch.float32 if sum_kind == "f32" else torch.int32)
    assert torch.equal(got, torch.tensor(a @ b + c).to(got.dtype))


@pytest.mark.parametrize(("m", "k"), [(8, 128), (16, 128), (16, 256)])
@pytest.mark.parametrize("operation", ["xor", "and"])
def test_products_of_bits(m, k, operation):
    a, b = _values("b1", (m, k), 1), _values("b1", (k, 8), 2)
    c, c_registers = _addends("s32", m)
    d = _product(f"mma.sync.aligned.m{m}n8k{k}.row.col.s32.b1.b1.s32.{operation}.popc", _registers_of_a("b1", a),
                 _registers_of_b("b1", b), c_registers)  # fmt: skip
    met = a[:, :, None] & b if operation == "and" else a[:, :, None] ^ b
    assert torch.equal(_sums(d, m, torch.int32), torch.tensor(met.sum(1) + c).int())


def test_integer_products_saturate_where_asked():
    a, b = np.full((8, 32), 7), np.full((32, 8), 7)
    c = np.full((2, 32), 2**31 - 5, np.int32)
    for suffix, expected in ((".satfinite", 2**31 - 1), ("", 2**31 - 5 + 32 * 49 - 2**32)):
        d = _product(f"mma.sync.aligned.m8n8k32.row.col{suffix}.s32.s4.s4.s32", _registers_of_a("s4", a),
                     _registers_of_b("s4", b), c)  # fmt: skip
        assert torch.equal(d, torch.full((2, 32), expected, dtype=torch.int32))


def _sparse(kind: str, k: int, seed: int) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """A matrix of 16 rows half of which is zeros; without them; the four bits of each row's chunks."""
    generator = np.random.default_rng(seed)
    width = 2 if _BITS[kind] == 4 else 1  # elements that stay together
    chunk, kept = (2, 1) if kind == "tf32" else (4, 2)
    dense, packed, codes = np.zeros((16, k), int), np.zeros((16, k // 2), int), []
    values = _values(kind, (16, k // 2), seed)
    for i in range(16):
        codes.append([])
        for c in range(k // (chunk * width)):
            places = np.sort(generator.permutation(chunk)[:kept])
            codes[i].append((0b1110 if places[0] else 0b0100) if kind == "tf32" else int(places[0] | places[1] << 2))
            for j, place in enumerate(places):
                for q in range(width):
                    at = (c * kept + j) * width + q
                    packed[i, at] = values[i, at]
                    dense[i, (c * chunk + place) * width + q] = values[i, at]
    return dense, packed, codes


def _metadata(kind: str, k: int, codes: list[list[int]], selector: int) -> np.ndarray:
    """The metadata operand (lane): the PTX ISA's figures (9.7.14.6.2)."""
    rows = [sum(code << (4 * i) for i, code in enumerate(row)) for row in codes]
    e = np.random.default_rng(7).integers(0, 2**32, 32)  # threads that are not selected hold anything
    for g in range(8):
        low, high = rows[g], rows[g + 8]
        if _BITS[kind] >= 16:
            threads = 1 if k * _BITS[kind] == 256 else 2
            for t in range(threads):
                e[4 * g + threads * selector + t] = (low >> 16 * t & 0xFFFF) | (high >> 16 * t & 0xFFFF) << 16
        else:
            for t in range(2 if k * _BITS[kind] == 512 else 1):
                e[4 * g + 2 * selector + 2 * t] = low >> 32 * t & 0xFFFFFFFF
                e[4 * g + 2 * selector + 2 * t + 1] = high >> 32 * t & 0xFFFFFFFF
    return e.astype(np.uint32).view(np.int32)


@pytest.mark.parametrize(("kind", "k", "selector"), [
    ("f16", 16, 0), ("f16", 16, 3), ("bf16", 32, 1), ("tf32", 8, 2), ("tf32", 16, 0), ("s8", 32, 1), ("u8", 64, 0), ("s4", 64, 0),
    ("s4", 128, 0), ("u4", 128, 0),
])  # fmt: skip
@pytest.mark.parametrize("name", ["sp", "sp::ordered_metadata"])
def test_products_with_a_sparse_matrix(kind, k, selector, name):
    a, packed, codes = _sparse(kind, k, 1)
    b = _values(kind, (k, 8), 2)
    sum_kind = "f32" if _BITS[kind] >= 16 else "s32"
    c, c_registers = _addends(sum_kind, 16)
    d = _product(f"mma.{name}.sync.aligned.m16n8k{k}.row.col.{sum_kind}.{kind}.{kind}.{sum_kind}",
                 _registers_of_a(kind, packed), _registers_of_b(kind, b), c_registers, f", $e, {selector}",
                 _metadata(kind, k, codes, selector))  # fmt: skip
    got = _sums(d, 16, torch.float32 if sum_kind == "f32" else torch.int32)
    assert torch.equal(got, torch.tensor(a @ b + c).to(got.dtype))


def test_metadata_that_name_one_element_twice_are_an_error():
    _, packed, codes = _sparse("f16", 16, 1)
    codes[3][2] = 0b0101
    c_registers = _addends("f32", 16)[1]
    with pytest.raises(gpusim.UnsupportedError, match="metadata 5 of row 3"):
        _product("mma.sp.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", _registers_of_a("f16", packed),
                 _registers_of_b("f16", _values("f16", (16, 8), 2)), c_registers, ", $e, 0",
                 _metadata("f16", 16, codes, 0))  # fmt: skip


# ---- wmma: type of A and B, of sums; shape; registers of A, B and sums
_WMMA = [
    ("f16", "f32", (16, 16, 16), (8, 8, 8)), ("f16", "f16", (16, 16, 16), (8, 8, 4)), ("f16", "f32", (8, 32, 16), (8, 8, 8)),
    ("bf16", "f32", (16, 16, 16), (4, 4, 8)), ("bf16", "f32", (32, 8, 16), (8, 2, 8)), ("tf32", "f32", (16, 16, 8), (4, 4, 8)),
    ("s8", "s32", (8, 32, 16), (1, 4, 8)), ("u8", "s32", (32, 8, 16), (4, 1, 8)), ("s4", "s32", (8, 8, 32), (1, 1, 2)),
    ("b1", "s32", (8, 8, 128), (1, 1, 2)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "sum_kind", "shape", "counts"), _WMMA)
@pytest.mark.parametrize("orders", [("row", "col", "row"), ("col", "row", "col")])
@pytest.mark.parametrize("space", ["global", "shared"])
def test_wmma(kind, sum_kind, shape, counts, orders, space):
    """Matrices in memory with rows (or columns) further apart than they are long, by way of shared memory or not."""
    m, n, k = shape
    if _BITS[kind] < 8 and orders[0] == "col":
        orders = ("row", "col", "col")
    a, b = _values(kind, (m, k), 1), _values(kind, (k, n), 2)
    c = np.random.default_rng(3).integers(-100, 100, (m, n))
    small = _BITS[kind] < 8
    name = f"m{m}n{n}k{k}"
    memory, text, places = [], "", {}
    for label, matrix, what, order in (
        ("a", a, kind, orders[0]),
        ("b", b, kind, orders[1]),
        ("c", c, sum_kind, orders[2]),
    ):
        lines = matrix if order == "row" else matrix.T
        stride = lines.shape[1] + (lines.shape[1] if small and label != "c" else 128 // _BITS[what])
        padded = np.zeros((len(lines), stride), int)
        padded[:, : lines.shape[1]] = lines
        places[label] = (sum(len(part) for part in memory) * 4, stride, order, what)
        words = _words(what, padded).reshape(-1)
        memory.append(np.pad(words, (0, -len(words) % 32)))
    words = torch.tensor(np.concatenate(memory))
    registers = {"a": [f"%r{10 + i}" for i in range(counts[0])], "b": [f"%r{20 + i}" for i in range(counts[1])],
                 "c": [f"%r{30 + i}" for i in range(counts[2])], "d": [f"%r{38 + i}" for i in range(counts[2])]}  # fmt: skip
    lists = {label: "{" + ", ".join(names) + "}" for label, names in registers.items()}
    if space == "shared":
        for i in range(0, len(words), 32):
            text += f"ld.global.b32 %r7, [%d4+{4 * i}];\nst.shared.b32 [%r4+{4 * i}], %r7;\n"
        text += "bar.sync 0;\n"
    base = "%d1" if space == "global" else "%r2"
    for label, (at, stride, order, what) in places.items():
        text += (
            f"wmma.load.{label}.sync.aligned.{order}.{name}.{space}.{what} {lists[label]}, [{base}+{at}], {stride};\n"
        )
    types = f"{sum_kind}.{sum_kind}" if kind == "f16" else f"{sum_kind}.{kind}.{kind}.{sum_kind}"
    operation = ".and.popc" if kind == "b1" else ""
    mma = f"wmma.mma{operation}.sync.aligned.{orders[0]}.{orders[1]}.{name}.{types}"
    text += f"{mma} {lists['d']}, {lists['a']}, {lists['b']}, {lists['c']};\n"
    text += f"wmma.store.d.sync.aligned.{orders[2]}.{name}.global.{sum_kind} [%d2], {lists['d']};"
    dtype = {"f32": torch.float32, "f16": torch.float16, "s32": torch.int32}[sum_kind]
    out = torch.zeros((m, n) if orders[2] == "row" else (n, m), dtype=dtype)
    report = run(text, words, out, threads=32, shared=4 * len(words) + 1024)
    got = out if orders[2] == "row" else out.T
    assert torch.equal(got, torch.tensor(a @ b + c).to(dtype))
    assert report.counters.global_store_bytes == out.nbytes
    if space == "global":
        assert report.counters.global_load_bytes == (m * k + k * n) * _BITS[kind] // 8 + out.nbytes


@pytest.mark.parametrize("orders", [("row", "col", "row"), ("col", "row", "col")])
def test_wmma_of_float64(orders):
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((8, 4), (4, 8), (8, 8)))
    parts = [t.contiguous() if order == "row" else t.T.contiguous() for t, order in zip((a, b, c), orders, strict=True)]
    out = torch.zeros(8, 8, dtype=torch.float64)
    run(f"wmma.load.a.sync.aligned.{orders[0]}.m8n8k4.f64 {{%d10}}, [%d1];\nwmma.load.b.sync.aligned.{orders[1]}.m8n8k4.f64 {{%d11}}, [%d1+256];\n"
        f"wmma.load.c.sync.aligned.{orders[2]}.m8n8k4.f64 {{%d12, %d13}}, [%d1+512];\nmov.b64 %e0, %d10;\nmov.b64 %e1, %d11;\nmov.b64 %e2, %d12;\nmov.b64 %e3, %d13;\n"
        f"wmma.mma.sync.aligned.{orders[0]}.{orders[1]}.m8n8k4.f64.f64.f64.f64 {{%e4, %e5}}, {{%e0}}, {{%e1}}, {{%e2, %e3}};\n"
        f"wmma.store.d.sync.aligned.{orders[2]}.m8n8k4.f64 [%d2], {{%e4, %e5}};",
        torch.cat([p.flatten() for p in parts]), out, threads=32)  # fmt: skip
    torch.testing.assert_close(out if orders[2] == "row" else out.T, a @ b + c, rtol=1e-15, atol=1e-15)


_LOAD = "wmma.load.a.sync.aligned.row.m16n16k16.global.bf16 {%r10, %r11, %r12, %r13}, [%d1+OFFSET], STRIDE;\n"


def test_what_is_wrong_with_a_fragment_is_found():
    a, b = torch.zeros(256, dtype=torch.bfloat16), torch.zeros(256)
    for offset, stride, error in ((0, 16, None), (16, 16, gpusim.OutOfBoundsError), (0, 24, gpusim.OutOfBoundsError),
                                  (2, 16, gpusim.MisalignedError), (0, 17, gpusim.MisalignedError)):  # fmt: skip
        text = _LOAD.replace("OFFSET", str(offset)).replace("STRIDE", str(stride))
        if error is None:
            run(text, a, b, threads=32)
        else:
            with pytest.raises(error):
                run(text, a, b, threads=32)


def test_a_row_of_a_that_nobody_wrote_spoils_its_row_of_the_product():
    load = "wmma.load.a.sync.aligned.row.m16n16k16.shared.bf16 {%r10, %r11, %r12, %r13}, [%r2], 16;\n"
    sums = "{%r30, %r31, %r32, %r33, %r34, %r35, %r36, %r37}"
    text = "mov.b32 %r7, 0;\nsetp.ge.u32 %p1, %r1, 24;\n@!%p1 st.shared.b32 [%r4], %r7;\n"  # row 3: words 24 to 31
    text += "".join(f"st.shared.b32 [%r4+{128 * i}], %r7;\n" for i in range(1, 4)) + "bar.sync 0;\n" + load
    text += "".join(f"mov.b32 %r{i}, 0;\n" for i in range(20, 38))
    text += f"wmma.mma.sync.aligned.row.col.m16n16k16.f32.bf16.bf16.f32 {sums}, {{%r10, %r11, %r12, %r13}}, "
    text += (
        f"{{%r20, %r21, %r22, %r23}}, {sums};\nwmma.store.d.sync.aligned.row.m16n16k16.shared.f32 [%r2+512], {sums};\n"
    )
    text += "bar.sync 0;\nld.shared.b32 %r7, [%r4+ROW];\nst.global.b32 [%d5], %r7;"
    a, b = torch.zeros(1), torch.ones(32)
    for words in (64, 32):  # rows 4 and 5, rows 2 and 3
        rows = text.replace("ROW", str(512 + 4 * words))
        if words == 64:
            run(rows, a, b, threads=32, shared=2048)
            assert (b == 0).all()
        else:
            with pytest.raises(gpusim.UninitialisedError) as found:
                run(rows, a, b, threads=32, shared=2048)
            assert found.value.thread == (16, 0, 0)
