"""Instructions of the simulator against numpy's models: special values, roundings, limits of shifts and conversions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx import apply, needs_core, run

from eva02_kernels.testing import gpusim

needs_core()

_SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, 3.4e38, -3.4e38, 1e-45, -1e-45,
            1.1754942e-38, 1.17549435e-38, 65504.0, 65520.0, 2**31, -(2.0**31), 2.0**32, 2.0**63, 1e10, -1e10, 0.1]  # fmt: skip
_INTEGERS = [
    0,
    1,
    2,
    3,
    5,
    7,
    31,
    32,
    33,
    63,
    64,
    255,
    256,
    32767,
    32768,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    0x12345678,
]


def _floats(count=256, seed=0):
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(count - len(_SPECIAL)) * 10.0 ** generator.integers(
        -20, 20, count - len(_SPECIAL)
    )
    return torch.tensor(np.concatenate([_SPECIAL, values]).astype(np.float32))


def _pairs(values):
    """Every value with every special one."""
    n = len(_SPECIAL)
    a = torch.cat([values[:n].repeat_interleave(n), values])
    b = torch.cat([values[:n].repeat(n), values.flip(0)])
    return a[:1024], b[:1024]


def _bits(t):
    """Bits with every NaN the same: all NaN of the simulator are canonical."""
    if not t.dtype.is_floating_point:
        return t.to(torch.int64) if t.dtype not in (torch.uint64, torch.int64) else t.view(torch.int64)
    view = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return torch.where(t.isnan(), torch.full_like(t, math.nan), t).view(view)


def _assert_same(got, expected):
    expected = torch.as_tensor(expected).to(got.dtype)
    same = _bits(got) == _bits(expected)
    assert same.all(), [(got[i].item(), expected[i].item()) for i in torch.nonzero(~same).flatten()[:5]]


@pytest.fixture(autouse=True)
def _quiet():
    with np.errstate(all="ignore"):
        yield


@pytest.mark.parametrize(
    ("name", "model"),
    [("add.f32", np.add), ("sub.rn.f32", np.subtract), ("mul.f32", np.multiply), ("div.rn.f32", np.divide),
     ("copysign.f32", lambda a, b: np.copysign(b, a))],
)  # fmt: skip
def test_float32_arithmetic(name, model):
    a, b = _pairs(_floats())
    _assert_same(apply(name, "f32", [("f32", a), ("f32", b)]), model(a.numpy(), b.numpy()))


def test_fused_multiply_add_rounds_once():
    a, b = _pairs(_floats())
    c = b.roll(7)
    got = apply("fma.rn.f32", "f32", [("f32", a), ("f32", b), ("f32", c)])
    for x, y, z, r in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), strict=True):
        if not all(map(math.isfinite, (x, y, z, r))):
            continue
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        below, above = (float(np.nextafter(np.float32(r), np.float32(end))) for end in (-math.inf, math.inf))
        error = abs(Fraction(r) - exact)
        assert all(error <= abs(Fraction(n) - exact) for n in (below, above) if math.isfinite(n)), (x, y, z)
    assert apply("fma.rn.f32", "f32", [("f32", torch.tensor([1 + 2.0**-12])), ("f32", torch.tensor([1 + 2.0**-12])),
                                       ("f32", torch.tensor([-1 - 2.0**-11]))]).item() == 2.0**-24  # fmt: skip


@pytest.mark.parametrize(("suffix", "towards"), [("rz", 0.0), ("rm", -math.inf), ("rp", math.inf)])
@pytest.mark.parametrize(
    ("name", "model"), [("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("div", np.divide)]
)
def test_directed_roundings(name, model, suffix, towards):
    generator = np.random.default_rng(1)
    a, b = (torch.tensor(generator.standard_normal(512).astype(np.float32)) for _ in range(2))
    got = apply(f"{name}.{suffix}.f32", "f32", [("f32", a), ("f32", b)]).double()
    exact = model(a.double().numpy(), b.double().numpy())
    step = torch.tensor(np.spacing(got.float().numpy())).double().abs()
    exact = torch.from_numpy(exact)
    if towards == 0.0:
        assert (got.abs() <= exact.abs()).all()
    elif towards < 0:
        assert (got <= exact).all()
    else:
        assert (got >= exact).all()
    assert ((got - exact).abs() <= step).all()


@pytest.mark.parametrize("name", ["min", "max"])
def test_min_and_max_with_nan_and_signed_zeros(name):
    a, b = _pairs(_floats())
    numpy = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}[name]
    for suffix, model in zip(("", ".NaN"), numpy, strict=True):
        got = apply(f"{name}{suffix}.f32", "f32", [("f32", a), ("f32", b)])
        expected = torch.from_numpy(model(a.numpy(), b.numpy()))
        zeros = (a == 0) & (b == 0)  # -0 is below +0
        negative = (a.signbit() | b.signbit()) if name == "min" else (a.signbit() & b.signbit())
        expected = torch.where(zeros, torch.where(negative, -0.0, 0.0), expected)
        _assert_same(got, expected)


@pytest.mark.parametrize(
    ("name", "model", "ulps"),
    [("sqrt.rn.f32", torch.sqrt, 0), ("rcp.rn.f32", torch.reciprocal, 0), ("ex2.approx.f32", torch.exp2, 1),
     ("lg2.approx.f32", torch.log2, 1), ("rsqrt.approx.f32", torch.rsqrt, 1), ("sin.approx.f32", torch.sin, 1),
     ("cos.approx.f32", torch.cos, 1), ("tanh.approx.f32", torch.tanh, 1), ("abs.f32", torch.abs, 0), ("neg.f32", torch.neg, 0)],
)  # fmt: skip
def test_functions_of_one_float(name, model, ulps):
    a = _floats()
    got, expected = apply(name, "f32", [("f32", a)]), model(a.double()).float()
    if ulps == 0:
        _assert_same(got, expected)
    else:
        torch.testing.assert_close(got, expected, rtol=2e-7 * ulps, atol=0, equal_nan=True)


def test_subnormals_are_flushed_where_asked():
    a = torch.tensor([1e-40, -1e-40, 1.2e-38, 0.5])
    one = torch.tensor([1.0, 1.0, 0.5, 1.0])
    assert apply("mul.ftz.f32", "f32", [("f32", a), ("f32", one)]).tolist() == [0.0, -0.0, 0.0, 0.5]
    assert apply("mul.f32", "f32", [("f32", a), ("f32", one)])[2] != 0


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_half_arithmetic_rounds_once(kind, dtype, name):
    a, b = (v.to(dtype) for v in _pairs(_floats()))
    got = apply(f"{name}.{kind}", kind, [(kind, a), (kind, b)])
    operator = {"add": torch.add, "sub": torch.sub, "mul": torch.mul}[name]
    _assert_same(got, operator(a.double(), b.double()).to(dtype))
    packed = a.view(torch.int16).view(-1, 2), b.view(torch.int16).view(-1, 2)
    words = [(p.to(torch.int64) & 0xFFFF) @ torch.tensor([1, 1 << 16]) for p in packed]
    both = apply(f"{name}.{kind}x2", "b32", [(f"{kind}x2", words[0]), (f"{kind}x2", words[1])])
    halves = torch.stack([both.to(torch.int64) & 0xFFFF, both.to(torch.int64) >> 16], 1).flatten()
    _assert_same(halves.to(torch.uint16).view(dtype), got)


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_fma_rounds_once(kind, dtype):
    a, b = (v.to(dtype) for v in _pairs(_floats()))
    c = b.roll(3)
    got = apply(f"fma.rn.{kind}", kind, [(kind, a), (kind, b), (kind, c)])
    steps = got.view(torch.int16)
    for x, y, z, r, bits in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), steps.tolist(), strict=True):
        if not all(map(math.isfinite, (x, y, z, r))) or r == 0:
            continue
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        neighbours = torch.tensor([bits - 1, bits + 1], dtype=torch.int16).view(dtype).tolist()
        error = abs(Fraction(r) - exact)
        assert all(error <= abs(Fraction(n) - exact) for n in neighbours if math.isfinite(n)), (x, y, z)
    # 1 + 2^-k: below half a step above 1, which a sum rounded in between would lose or round up.
    step = torch.finfo(dtype).eps
    tiny = torch.tensor([torch.finfo(dtype).tiny], dtype=dtype)
    half_step = torch.tensor([1 + step], dtype=dtype)
    assert apply(f"fma.rn.{kind}", kind, [(kind, tiny), (kind, tiny), (kind, half_step)]).item() == 1 + step


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("name", ["add", "sub", "mul.lo", "mul.hi", "div", "rem", "min", "max"])
def test_integer_arithmetic(kind, name):
    bits, signed = int(kind[1:]), kind[0] == "s"
    values = [v & ((1 << bits) - 1) for v in [*_INTEGERS, 2**63, 2**64 - 1]]
    values = [v - (1 << bits) if signed and v >> (bits - 1) else v for v in values]
    a, b = [x for x in values for _ in values], values * len(values)

    def model(x, y):
        if name in ("div", "rem") and y == 0:
            return -1 if name == "div" else x
        quotient = abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) if y else 0
        table = {"add": x + y, "sub": x - y, "mul.lo": x * y, "mul.hi": (x * y) >> bits, "min": min(x, y), "max": max(x, y),
                 "div": quotient, "rem": x - quotient * y}  # fmt: skip
        return table[name]

    expected = [model(x, y) & ((1 << bits) - 1) for x, y in zip(a, b, strict=True)]
    dtype = {16: np.uint16, 32: np.uint32, 64: np.uint64}[bits]
    tensors = [torch.from_numpy(np.array([v & ((1 << bits) - 1) for v in x], dtype)) for x in (a, b)]
    source = [(f"u{bits}", t) for t in tensors]
    got = apply(f"{name}.{kind}", f"u{bits}", source)
    assert got.numpy().tolist() == expected


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "s16", "s32", "s64", "u16", "u32", "u64"])
def test_shifts_clamp(kind):
    bits, signed = int(kind[1:]), kind[0] == "s"
    values = [0, 1, (1 << bits) - 1, 1 << (bits - 1), 0x5A5A5A5A5A5A5A5A & ((1 << bits) - 1)]
    amounts = [0, 1, 7, bits - 1, bits, bits + 1, 255, 2**31]
    a, n = [v for v in values for _ in amounts], amounts * len(values)
    dtype = {16: np.uint16, 32: np.uint32, 64: np.uint64}[bits]
    source = [(f"u{bits}", torch.from_numpy(np.array(a, dtype))), ("u32", torch.from_numpy(np.array(n, np.uint32)))]
    if kind[0] == "b":
        left = apply(f"shl.{kind}", f"u{bits}", source)
        assert left.numpy().tolist() == [
            (v << m) & ((1 << bits) - 1) if m < bits else 0 for v, m in zip(a, n, strict=True)
        ]
    right = apply(f"shr.{kind}", f"u{bits}", source)
    signed_values = [v - (1 << bits) if signed and v >> (bits - 1) else v for v in a]
    expected = [
        (v >> min(m, bits if not signed else bits - 1)) & ((1 << bits) - 1)
        for v, m in zip(signed_values, n, strict=True)
    ]
    assert right.numpy().tolist() == expected


@pytest.mark.parametrize(("to", "low", "high"), [("s32", -(2**31), 2**31 - 1), ("u32", 0, 2**32 - 1), ("s64", -(2**63), 2**63 - 1),
                                                 ("u16", 0, 65535), ("s16", -32768, 32767)])  # fmt: skip
@pytest.mark.parametrize("mode", ["rzi", "rni", "rmi", "rpi"])
def test_floats_to_integers_saturate(to, low, high, mode):
    a = torch.cat([_floats(), torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9])])
    got = apply(f"cvt.{mode}.{to}.f32", to, [("f32", a)])
    function = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[mode]

    def model(v):
        if math.isnan(v):
            return low if to == "s64" else 0
        if math.isinf(v):
            return high if v > 0 else low
        return min(max(int(function(v)), low), high)

    assert got.numpy().tolist() == [model(float(v)) for v in a]


@pytest.mark.parametrize(("to", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_float32_to_half(to, dtype):
    ties = torch.tensor(
        [1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 2.0**-25, 6e-8, 65519.996, 65520.0]
    )
    a = torch.cat([_floats(), ties])
    _assert_same(apply(f"cvt.rn.{to}.f32", to, [("f32", a)]), a.to(dtype))
    toward_zero = apply(f"cvt.rz.{to}.f32", to, [("f32", a)]).double()
    finite = a.isfinite()
    assert (toward_zero.abs() <= a.double().abs())[finite].all()
    assert toward_zero[finite].isfinite().all()
    pair = apply(f"cvt.rn.{to}x2.f32", "b32", [("f32", a), ("f32", a.flip(0))]).to(torch.int64)
    _assert_same((pair >> 16).to(torch.uint16).view(dtype), a.to(dtype))
    _assert_same((pair & 0xFFFF).to(torch.uint16).view(dtype), a.flip(0).to(dtype))
    _assert_same(apply(f"cvt.f32.{to}", "f32", [(to, a.to(dtype))]), a.to(dtype).float())


def test_tf32_is_rounded_away():
    a = torch.tensor([1 + 2.0**-11, 1 + 2.0**-12, -1 - 2.0**-11, math.inf])
    assert apply("cvt.rna.tf32.f32", "f32", [("f32", a)]).tolist() == [1 + 2.0**-10, 1.0, -1 - 2.0**-10, math.inf]


@pytest.mark.parametrize(
    "how", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
)
def test_comparisons_of_floats(how):
    a, b = _pairs(_floats())
    nan = a.isnan() | b.isnan()
    plain = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    expected = {"num": ~nan, "nan": nan}.get(how)
    if expected is None:
        expected = (plain[how[:2]] & ~nan) if len(how) == 2 else (plain[how[:2]] | nan)
    got = apply(f"setp.{how}.f32 %p1, $0, $1;\nselp.b32 $d, 1, 0, %p1;", "b32", [("f32", a), ("f32", b)])
    assert torch.equal(got.to(torch.int64), expected.to(torch.int64))


def test_bit_operations():
    a = torch.tensor([v & (2**32 - 1) for v in _INTEGERS], dtype=torch.int64).to(torch.uint32)
    numbers = a.tolist()
    source = [("b32", a)]
    assert apply("popc.b32", "b32", source).tolist() == [v.bit_count() for v in numbers]
    assert apply("clz.b32", "b32", source).tolist() == [32 - v.bit_length() for v in numbers]
    assert apply("brev.b32", "b32", source).tolist() == [int(f"{v:032b}"[::-1], 2) for v in numbers]
    assert apply("bfind.u32", "b32", source).tolist() == [v.bit_length() - 1 if v else 2**32 - 1 for v in numbers]
    assert apply("not.b32", "b32", source).tolist() == [v ^ (2**32 - 1) for v in numbers]
    b, c = a.to(torch.int64).roll(3).to(torch.uint32), a.to(torch.int64).roll(5).to(torch.uint32)
    for table in (0x96, 0xE8, 0xCA, 0x01):
        got = apply(f"lop3.b32 $d, $0, $1, $2, {table};", "b32", [("b32", a), ("b32", b), ("b32", c)]).tolist()
        for x, y, z, r in zip(numbers, b.tolist(), c.tolist(), got, strict=True):
            assert all(
                (r >> i & 1) == (table >> ((x >> i & 1) << 2 | (y >> i & 1) << 1 | (z >> i & 1)) & 1) for i in range(32)
            )
    bytes_of = [x | y << 32 for x, y in zip(numbers, b.tolist(), strict=True)]
    got = apply("prmt.b32 $d, $0, $1, 0x7531;", "b32", [("b32", a), ("b32", b)]).tolist()
    assert got == [sum((w >> (8 * k) & 255) << (8 * i) for i, k in enumerate((1, 3, 5, 7))) for w in bytes_of]
    got = apply("shf.l.wrap.b32 $d, $0, $1, 8;", "b32", [("b32", a), ("b32", b)]).tolist()
    assert got == [(w << 8 >> 32) & (2**32 - 1) for w in bytes_of]
    got = apply("bfe.s32 $d, $0, 4, 8;", "s32", source).tolist()
    assert got == [((v >> 4 & 255) ^ 128) - 128 for v in numbers]
    got = apply("bfi.b32 $d, $0, $1, 4, 8;", "b32", [("b32", a), ("b32", b)]).tolist()
    assert got == [(y & ~0xFF0) | (x & 255) << 4 for x, y in zip(numbers, b.tolist(), strict=True)]


@pytest.mark.parametrize(("mode", "source"), [("bfly", lambda i: i ^ 5), ("idx", lambda i: 5), ("down", lambda i: i + 5 if i < 27 else i),
                                              ("up", lambda i: i - 5 if i >= 5 else i)])  # fmt: skip
def test_shuffles(mode, source):
    a, b = torch.arange(100, 132, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    clamp = 0 if mode == "up" else 31
    run(
        f"ld.global.b32 %r7, [%d4];\nshfl.sync.{mode}.b32 %r8|%p1, %r7, 5, {clamp}, -1;\nst.global.b32 [%d5], %r8;",
        a,
        b,
        threads=32,
    )
    assert b.tolist() == [100 + source(i) for i in range(32)]


def test_votes_and_warp_reductions():
    a, b = torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    run("setp.lt.u32 %p1, %r1, 5;\nvote.sync.ballot.b32 %r7, %p1, -1;\nst.global.b32 [%d5], %r7;", a, b, threads=32)
    assert b.tolist() == [31] * 32
    run("redux.sync.add.s32 %r7, %r1, -1;\nst.global.b32 [%d5], %r7;", a, b, threads=32)
    assert b.tolist() == [496] * 32
    run(
        "setp.lt.u32 %p1, %r1, 5;\nvote.sync.any.pred %p2, %p1, -1;\nselp.b32 %r7, 3, 4, %p2;\nst.global.b32 [%d5], %r7;",
        a,
        b,
        threads=32,
    )
    assert b.tolist() == [3] * 32


# Registers of A and B and their elements a register, k.
_MATRICES = {"m16n8k16.row.col.f32.f16.f16.f32": (4, 2, 16, torch.float16), "m16n8k16.row.col.f32.bf16.bf16.f32": (4, 2, 16, torch.bfloat16),
             "m16n8k8.row.col.f32.f16.f16.f32": (2, 1, 8, torch.float16), "m16n8k8.row.col.f32.tf32.tf32.f32": (4, 2, 8, torch.float32)}  # fmt: skip


@pytest.mark.parametrize("shape", _MATRICES)
def test_matrix_products(shape):
    num_a, num_b, k, dtype = _MATRICES[shape]
    generator = torch.Generator().manual_seed(0)
    a_matrix = torch.randint(-8, 9, (16, k), generator=generator).to(dtype)
    b_matrix = torch.randint(-8, 9, (k, 8), generator=generator).to(dtype)
    c_matrix = torch.randint(-8, 9, (16, 8), generator=generator).float()
    per = 4 // dtype.itemsize
    g, t = torch.arange(32) // 4, torch.arange(32) % 4
    # Fragments as the PTX ISA's tables give them (9.7.14.5): register r, element e of lane 4g + t.
    a = torch.stack(
        [
            torch.stack([a_matrix[g + 8 * (r % 2), t * per + e + 4 * per * (r // 2)] for e in range(per)], 1)
            for r in range(num_a)
        ]
    )
    b = torch.stack(
        [torch.stack([b_matrix[t * per + e + 4 * per * r, g] for e in range(per)], 1) for r in range(num_b)]
    )
    c = torch.stack([c_matrix[g + 8 * (r // 2), 2 * t + r % 2] for r in range(4)])
    memory = torch.cat(
        [a.reshape(-1).view(torch.int32), b.reshape(-1).view(torch.int32), c.reshape(-1).view(torch.int32)]
    )
    out = torch.zeros(128)
    loads = "".join(f"ld.global.b32 %r{10 + i}, [%d4+{128 * i}];\n" for i in range(num_a + num_b))
    loads += "".join(f"ld.global.f32 %f{i}, [%d4+{128 * (num_a + num_b + i)}];\n" for i in range(4))
    a_regs = ", ".join(f"%r{10 + i}" for i in range(num_a))
    b_regs = ", ".join(f"%r{10 + num_a + i}" for i in range(num_b))
    stores = "".join(f"st.global.f32 [%d5+{128 * i}], %f{10 + i};\n" for i in range(4))
    run(f"{loads}mma.sync.aligned.{shape} {{%f10, %f11, %f12, %f13}}, {{{a_regs}}}, {{{b_regs}}}, {{%f0, %f1, %f2, %f3}};\n{stores}",
        memory, out, threads=32)  # fmt: skip
    expected = a_matrix.float() @ b_matrix.float() + c_matrix
    got = torch.empty(16, 8)
    for r in range(4):
        got[g + 8 * (r // 2), 2 * t + r % 2] = out[32 * r : 32 * r + 32]
    assert torch.equal(got, expected)


def test_a_matrix_product_rounds_once():
    """2^24 + 1 - 2^24 is 1 where the sum is not rounded in between."""
    memory = torch.zeros(32 * 6, dtype=torch.int32)
    a_matrix, b_matrix = torch.zeros(16, 8, dtype=torch.bfloat16), torch.zeros(8, 8, dtype=torch.bfloat16)
    a_matrix[0, :3] = torch.tensor([2.0**24, 1.0, -(2.0**24)])
    b_matrix[:3, 0] = 1
    g, t = torch.arange(32) // 4, torch.arange(32) % 4
    a = torch.stack([torch.stack([a_matrix[g + 8 * r, 2 * t + e] for e in range(2)], 1) for r in range(2)])
    b = torch.stack([b_matrix[2 * t + e, g] for e in range(2)], 1)
    memory[:64], memory[64:96] = a.reshape(-1).view(torch.int32), b.reshape(-1).view(torch.int32)
    out = torch.zeros(32)
    run("ld.global.b32 %r10, [%d4];\nld.global.b32 %r11, [%d4+128];\nld.global.b32 %r12, [%d4+256];\nmov.f32 %f0, 0f00000000;\n"
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r10, %r11}, {%r12}, {%f0, %f0, %f0, %f0};\n"
        "st.global.f32 [%d5], %f1;", memory, out, threads=32)  # fmt: skip
    assert out[0] == 1


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed):
    a = torch.arange(4 * 64, dtype=torch.int16)
    out = torch.zeros(4, 32, dtype=torch.int32)
    suffix = ".trans" if transposed else ""
    run("shl.b32 %r10, %r1, 4;\nadd.u32 %r10, %r10, %r2;\nmul.wide.u32 %d6, %r1, 16;\nadd.u64 %d6, %d6, %d1;\n"
        "ld.global.v4.b32 {%r11, %r12, %r13, %r14}, [%d6];\nst.shared.v4.b32 [%r10], {%r11, %r12, %r13, %r14};\nbar.sync 0;\n"
        f"ldmatrix.sync.aligned.m8n8.x4{suffix}.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r10];\n"
        + "".join(f"st.global.b32 [%d5+{128 * i}], %r{20 + i};\n" for i in range(4)), a, out, threads=32)  # fmt: skip
    matrices = a.view(4, 8, 8)
    if transposed:
        matrices = matrices.mT
    assert torch.equal(out.view(torch.int16).view(4, 8, 8), matrices)


def test_every_cta_and_thread_has_its_index():
    out = torch.zeros(2, 3, 2, 4, dtype=torch.int32)
    text = """.version 8.7
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 out) {
.reg .b32 %r<20>; .reg .b64 %d<5>;
ld.param.u64 %d1, [out];
mov.u32 %r1, %ctaid.y; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %tid.y; mov.u32 %r4, %tid.x; mov.u32 %r5, %nctaid.x; mov.u32 %r6, %ntid.y; mov.u32 %r7, %ntid.x;
mad.lo.u32 %r8, %r1, %r5, %r2; mad.lo.u32 %r8, %r8, %r6, %r3; mad.lo.u32 %r8, %r8, %r7, %r4;
mul.wide.u32 %d2, %r8, 4; add.u64 %d2, %d2, %d1; st.global.b32 [%d2], %r8; ret;
}"""
    gpusim.run_ptx(text, "kernel", grid=(3, 2, 1), block=(4, 2, 1), args=[out])
    assert out.flatten().tolist() == list(range(48))


# ---- carries, and what few programs use
def test_carries_make_wide_sums():
    values = torch.tensor([0, 1, 2**32 - 1, -(2**63), -1, 0x123456789ABCDEF0])
    a, b = (t.flatten() for t in torch.meshgrid(values, values, indexing="ij"))
    split = "mov.b64 {%r20, %r21}, $0;\nmov.b64 {%r22, %r23}, $1;\n"
    for name, model in (("add", a + b), ("sub", a - b)):
        text = split + f"{name}.cc.u32 %r24, %r20, %r22;\n{name}c.u32 %r25, %r21, %r23;\nmov.b64 $d, {{%r24, %r25}};"
        assert torch.equal(apply(text, "s64", [("s64", a), ("s64", b)]), model)  # both wrap


def test_carries_make_wide_products():
    values = [0, 1, 2**32 - 1, 2**31, 0x9E3779B9]
    pairs = [(x, y, z) for x in values for y in values for z in (0, 1, 2**64 - 1, 2**63)]
    a, b = (torch.tensor([p[i] for p in pairs], dtype=torch.uint32) for i in range(2))
    c = torch.tensor([p[2] - 2**64 if p[2] >= 2**63 else p[2] for p in pairs])
    text = (
        "mov.b64 {%r22, %r23}, $2;\nmad.lo.cc.u32 %r24, $0, $1, %r22;\nmadc.hi.u32 %r25, $0, $1, %r23;\n"
        "mov.b64 $d, {%r24, %r25};"
    )
    got = apply(text, "s64", [("u32", a), ("u32", b), ("s64", c)]).tolist()
    assert [g % 2**64 for g in got] == [(x * y + z) % 2**64 for x, y, z in pairs]


def test_a_comparison_as_a_number():
    a, b = (t.flatten() for t in torch.meshgrid(_floats(), _floats(), indexing="ij"))
    assert torch.equal(apply("set.lt.u32.f32", "u32", [("f32", a), ("f32", b)]), _flags(a < b, 2**32 - 1))
    assert torch.equal(apply("set.geu.f32.f32", "f32", [("f32", a), ("f32", b)]), (~(a < b)).float())
    h, k = a.half(), b.half()
    assert torch.equal(apply("set.eq.f16.f16", "f16", [("f16", h), ("f16", k)]), (h == k).half())


def _floats():
    return torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45])


def _flags(condition, value):
    return torch.where(condition, value, 0).to(torch.uint32)


def test_comparisons_flush_where_asked():
    a, b = torch.tensor([1e-45, 1e-45, 1.0]), torch.tensor([0.0, 1e-44, 2.0])
    for suffix, expected in (("", [0, 1, 1]), (".ftz", [0, 0, 1])):
        text = f"setp.lt{suffix}.f32 %p1, $0, $1;\nselp.b32 $d, 1, 0, %p1;"
        assert apply(text, "u32", [("f32", a), ("f32", b)]).tolist() == expected


def test_small_dot_products_and_differences():
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.integers(0, 2**32, 64, dtype=np.uint32)) for _ in range(2))
    ints = list(zip(a.tolist(), b.tolist(), strict=True))
    low = [((x & 0xFFFF) * (y & 255) + (x >> 16) * (y >> 8 & 255) + 7) % 2**32 for x, y in ints]
    high = [((x & 0xFFFF) * (y >> 16 & 255) + (x >> 16) * (y >> 24) + 7) % 2**32 for x, y in ints]
    assert apply("dp2a.lo.u32.u32 $d, $0, $1, 7;", "u32", [("u32", a), ("u32", b)]).tolist() == low
    assert apply("dp2a.hi.u32.u32 $d, $0, $1, 7;", "u32", [("u32", a), ("u32", b)]).tolist() == high
    differences = [sum(abs((x >> i & 255) - (y >> i & 255)) << i for i in (0, 8, 16, 24)) for x, y in ints]
    assert apply("vabsdiff4.u32.u32.u32 $d, $0, $1, 0;", "u32", [("u32", a), ("u32", b)]).tolist() == differences


def test_the_nth_set_bit():
    bits = torch.full((6,), 0b10110, dtype=torch.uint32)
    base, n = torch.tensor([0, 0, 2, 4, 2, 1]).to(torch.uint32), torch.tensor([1, 3, 1, -1, -2, 0], dtype=torch.int32)
    got = apply("fns.b32 $d, $0, $1, $2;", "u32", [("u32", bits), ("u32", base), ("s32", n)])
    assert got.tolist() == [1, 4, 2, 4, 1, 1]


def test_lanes_with_equal_values_find_each_other():
    a, b = (torch.arange(32) % 3).to(torch.int32), torch.zeros(32, dtype=torch.int32)
    run("ld.global.b32 %r7, [%d4];\nmatch.any.sync.b32 %r8, %r7, -1;\nst.global.b32 [%d5], %r8;", a, b, threads=32)
    expected = [sum(1 << k for k in range(32) if k % 3 == i % 3) for i in range(32)]
    assert [v % 2**32 for v in b.tolist()] == expected
    text = "match.all.sync.b32 %r8|%p1, 5, -1;\nselp.b32 %r8, %r8, 0, %p1;\nst.global.b32 [%d5], %r8;"
    run(text, a, b, threads=32)
    assert b.tolist() == [-1] * 32


def test_a_product_of_bytes():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-128, 128, (8, 16), generator=generator, dtype=torch.int8) for _ in range(2))
    c = torch.randint(-1000, 1000, (8, 8), generator=generator, dtype=torch.int32)
    # Lane 4 i + j holds bytes 4 j of row i of A, of column i of B, and elements 2 j of row i of C.
    memory = torch.cat(
        [
            a.reshape(-1).view(torch.int32),
            b.reshape(-1).view(torch.int32),
            c[:, ::2].reshape(-1),
            c[:, 1::2].reshape(-1),
        ]
    )
    out = torch.zeros(2, 32, dtype=torch.int32)
    loads = "".join(f"ld.global.b32 %r{10 + i}, [%d4+{128 * i}];\n" for i in range(4))
    run(f"{loads}mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {{%r20, %r21}}, {{%r10}}, {{%r11}}, {{%r12, %r13}};\n"
        "st.global.b32 [%d5], %r20;\nst.global.b32 [%d5+128], %r21;", memory, out, threads=32)  # fmt: skip
    expected = a.int() @ b.int().mT + c
    assert torch.equal(out[0].view(8, 4), expected[:, ::2])
    assert torch.equal(out[1].view(8, 4), expected[:, 1::2])


@pytest.mark.parametrize(
    ("name", "letter", "bits"), [("%clock", "r", 32), ("%clock64", "d", 64), ("%globaltimer", "d", 64)]
)
def test_clocks_count_the_instructions_of_the_cta(name, letter, bits):
    """One warp: what lies between two readings, the second included; two warps: each sees the other's go by as well."""
    before, after, passed = f"%{letter}20", f"%{letter}21", f"%{letter}22"
    text = (
        f"mov.u{bits} {before}, {name};\n" + "add.u32 %r7, %r7, 1;\n" * 5 + f"mov.u{bits} {after}, {name};\n"
        f"sub.u{bits} {passed}, {after}, {before};\n" + (f"cvt.u32.u64 %r22, {passed};\n" if letter == "d" else "")
        + "st.global.b32 [%d5], %r22;"
    )  # fmt: skip
    a, out = torch.zeros(1), torch.zeros(64, dtype=torch.int32)
    run(f"mov.u32 %r7, 0;\n{text}", a, out, threads=32)
    assert out[:32].tolist() == [6] * 32
    barrier = f"mov.u32 %r7, 0;\n{text.replace('add.u32 %r7, %r7, 1;', 'bar.sync 0;')}"
    run(barrier, a, out, threads=64)
    assert ((out > 6) & (out < 100)).all()


_HEAP = """.extern .func (.param .b64 func_retval0) malloc (.param .b64 malloc_param_0);
.extern .func free (.param .b64 free_param_0);"""
_MALLOC = """{{ .param .b64 p; .param .b64 q; st.param.b64 [p], {bytes};
call.uni (q), malloc, (p);
ld.param.b64 {to}, [q]; }}
"""
_FREE = """{{ .param .b64 p; st.param.b64 [p], {what};
call.uni free, (p);
}}
"""


def _heap(body: str, **kwargs) -> torch.Tensor:
    out = torch.zeros(64, dtype=torch.int32)
    run(body, torch.zeros(1), out, module=_HEAP, **kwargs)
    return out


def test_blocks_of_the_heap_are_apart_and_come_back():
    text = _MALLOC.format(bytes=100, to="%d10") + "st.b32 [%d10+96], %r1;\nbar.sync 0;\nld.b32 %r7, [%d10+96];\n"
    assert _heap(text + "st.global.b32 [%d5], %r7;").tolist() == list(range(64))
    # Each round gives back what it took: 3 rounds of 64 times 100 kB are more than there is at once.
    rounds = (
        _MALLOC.format(bytes=100000, to="%d10")
        + "st.b32 [%d10], %r1;\nld.b32 %r7, [%d10];\n"
        + _FREE.format(what="%d10")
    )
    assert _heap("\nbar.sync 0;\n".join([rounds] * 3) + "st.global.b32 [%d5], %r7;").tolist() == list(range(64))
    null = (
        _MALLOC.format(bytes=9 << 20, to="%d10")
        + _FREE.format(what="%d10")
        + "cvt.u32.u64 %r7, %d10;\nst.global.b32 [%d5], %r7;"
    )
    assert _heap(null).tolist() == [0] * 64


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (_MALLOC.format(bytes=100, to="%d10") + "st.b32 [%d10+100], %r1;", gpusim.OutOfBoundsError),
        (_MALLOC.format(bytes=100, to="%d10") + _FREE.format(what="%d10") + "ld.b32 %r7, [%d10];", gpusim.OutOfBoundsError),
        (_MALLOC.format(bytes=100, to="%d10") + _FREE.format(what="%d10") * 2, gpusim.OutOfBoundsError),
        (_FREE.format(what="%d1"), gpusim.OutOfBoundsError),
        (_MALLOC.format(bytes=100, to="%d10") + "ld.b32 %r7, [%d10];\nst.global.b32 [%d5], %r7;", gpusim.UninitialisedError),
        (_MALLOC.format(bytes=100, to="%d10") + "st.b32 [%d10], 1;\n" + _FREE.format(what="%d10") + _MALLOC.format(bytes=100, to="%d10")
         + "ld.b32 %r7, [%d10];\nst.global.b32 [%d5], %r7;", gpusim.UninitialisedError),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_heap_is_found(body, error):
    with pytest.raises(error):
        _heap(body)
