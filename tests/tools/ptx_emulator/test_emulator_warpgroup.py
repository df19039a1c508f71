"""wgmma with every layout of its operands, groups and waits; setmaxnreg."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tools.ptx_emulator.harness import HOPPER_DEVICES, program, run
from tests.tools.ptx_emulator.layout import WIDTH, Layout, representable, to_bits

THREADS, ROWS = 128, 64
devices = pytest.mark.parametrize("device", HOPPER_DEVICES)
Array = np.ndarray


# Of the fragments that a thread holds, in %r50.
FIRST_ROW = (
    "shr.u32 %r50, %thread, 2;\nand.b32 %r50, %r50, 7;\nshr.u32 %r51, %thread, 5;\nmad.lo.u32 %r50, %r51, 16, %r50;"
)


def fill(base: str, pointer: int, n_words: int) -> str:
    """All threads copy words of an array to shared memory."""
    lines = [
        f"mul.wide.u32 %wide, %thread, 4;\nadd.u64 %rd20, %rd{pointer}, %wide;",
        f"mad.lo.u32 %r61, %thread, 4, {base};",
    ]
    for i in range(0, n_words, THREADS):
        lines.append(
            f"setp.lt.u32 %p5, %thread, {n_words - i};\n@%p5 ld.global.u32 %r62, [%rd20+{4 * i}];\n"
            f"@%p5 st.shared.u32 [%r61+{4 * i}], %r62;"
        )
    return "\n".join(lines) + "\n"


def accumulators(n: int) -> str:
    return "{" + ", ".join(f"%acc{i}" for i in range(n // 2)) + "}"


def move_accumulators(n: int, pointer: int, to_global: bool) -> str:
    """Element (row, column) of a (64, n) array and the register that holds it."""
    lines = [
        FIRST_ROW,
        "and.b32 %r51, %thread, 3;\nshl.b32 %r51, %r51, 1;",
        f"mad.lo.u32 %r50, %r50, {n}, %r51;\nmul.wide.u32 %wide, %r50, 4;\nadd.u64 %rd21, %rd{pointer}, %wide;",
    ]
    for i in range(n // 2):
        offset = 4 * (i // 4 * 8 + i % 2 + i // 2 % 2 * 8 * n)
        lines.append(
            f"st.global.f32 [%rd21+{offset}], %acc{i};" if to_global else f"ld.global.f32 %acc{i}, [%rd21+{offset}];"
        )
    return "\n".join(lines) + "\n"


def load_fragments(kind: str, depth: int) -> str:
    """Registers %a of a row-major (64, depth) array of bits behind %rd2."""
    width = WIDTH[kind]
    pitch = depth * width
    lines = [
        FIRST_ROW,
        f"and.b32 %r51, %thread, 3;\nshl.b32 %r51, %r51, 2;\nmad.lo.u32 %r50, %r50, {pitch}, %r51;",
        "cvt.u64.u32 %wide, %r50;\nadd.u64 %rd22, %rd2, %wide;",
    ]
    for i in range(depth * width // 32 * 4):
        offset = i // 4 * 32 + i % 2 * 8 * pitch + i // 2 % 2 * 16
        lines.append(f"ld.global.b32 %a{i}, [%rd22+{offset}];")
    return "\n".join(lines) + "\n"


def multiply(
    a: Array, b: Array, c: Array, kind: str, device: str, *, span: int = 128, outer_a: bool = False,
    outer_b: bool = False, in_registers: bool = False, scale_d: bool = True, signs: tuple[int, int] = (1, 1),
) -> Array:  # fmt: skip
    """c + a (64, K) · b (n, K)ᵀ by as many wgmma as K asks for. Of b only as many rows as c has columns take part."""
    depth, n = a.shape[1], c.shape[1]
    layout_a, layout_b = Layout(a, kind, span, outer_a), Layout(b, kind, span, outer_b)
    if outer_b and b.shape[0] * WIDTH[kind] <= span:
        layout_b.leading = 0  # there is no neighbour
    size_a = 0 if in_registers else -(-4 * layout_a.words.size // 1024) * 1024
    size = size_a + 4 * layout_b.words.size
    body = f".reg .f32 %acc<{n // 2}>;\n.reg .b32 %a<64>;\n.shared .align 1024 .b8 tile[{size}];\n"
    body += f"mov.u32 %r1, tile;\nadd.u32 %r2, %r1, {size_a};\n"
    body += f"setp.ne.u32 %p1, %thread, {'9999' if scale_d else '%thread'};\n"
    body += fill("%r2", 3, layout_b.words.size) + layout_b.descriptor("%rd11", "%r2")
    body += load_fragments(kind, depth) if in_registers else fill("%r1", 2, layout_a.words.size)
    body += layout_a.descriptor("%rd10", "%r1") + move_accumulators(n, 1, False)
    body += "fence.proxy.async.shared::cta;\nbar.sync 0;\nwgmma.fence.sync.aligned;\n"
    step = 32 // WIDTH[kind]
    for i in range(depth // step):
        operand_a = "{" + ", ".join(f"%a{4 * i + j}" for j in range(4)) + "}" if in_registers else "%rd10"
        flags = [str(sign) for sign in signs]
        if kind != "tf32":
            flags += [str(int(outer_b))] if in_registers else [str(int(outer_a)), str(int(outer_b))]
        body += f"wgmma.mma_async.sync.aligned.m64n{n}k{step}.f32.{kind}.{kind} {accumulators(n)}, {operand_a}, "
        body += f"%rd11, %p1, {', '.join(flags)};\n"
        body += f"add.u64 %rd10, %rd10, {layout_a.step >> 4};\nadd.u64 %rd11, %rd11, {layout_b.step >> 4};\n"
    body += "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n" + move_accumulators(n, 0, True)
    out = np.full((ROWS, n), np.nan, np.float32)
    source_a = to_bits(a, kind) if in_registers else layout_a.words
    arrays = [out, c, np.ascontiguousarray(source_a), layout_b.words]
    run(program(body, 4, "sm_90a"), arrays, THREADS, device=device)
    return out


def check(
    kind: str, n: int, device: str, depth: int, *, span: int = 128, outer_a: bool = False, outer_b: bool = False,
    in_registers: bool = False, scale_d: bool = True, signs: tuple[int, int] = (1, 1),
) -> None:  # fmt: skip
    rng = np.random.default_rng(n)
    a, b = representable(rng, (ROWS, depth), kind), representable(rng, (n, depth), kind)
    c = rng.standard_normal((ROWS, n)).astype(np.float32)
    out = multiply(
        a, b, c, kind, device, span=span, outer_a=outer_a, outer_b=outer_b, in_registers=in_registers,
        scale_d=scale_d, signs=signs,
    )  # fmt: skip
    a64, b64 = a.astype(np.float64) * signs[0], b.astype(np.float64) * signs[1]
    start = c.astype(np.float64) * scale_d
    # Products are exact; an instruction may lose, of each number that it adds, what is below 24 bits of the largest.
    bound = (depth + 2) * 2.0**-23 * (np.abs(a64) @ np.abs(b64).T + np.abs(start))
    error = np.abs(out - (a64 @ b64.T + start))
    assert (error <= bound).all(), error.max()


@devices
@pytest.mark.parametrize("kind", ("bf16", "f16", "tf32"))
@pytest.mark.parametrize("span", (0, 32, 64, 128))
def test_contiguous_along_k(span: int, kind: str, device: str) -> None:
    depth = (span or 64) // WIDTH[kind]
    check(kind, 64, device, depth, span=span)


@devices
@pytest.mark.parametrize("span", (0, 32, 64, 128))
@pytest.mark.parametrize(("outer_a", "outer_b"), ((True, False), (False, True), (True, True)))
def test_contiguous_along_the_rows(outer_a: bool, outer_b: bool, span: int, device: str) -> None:
    check("bf16", 128, device, (span or 64) // 2, span=span, outer_a=outer_a, outer_b=outer_b)


@devices
@pytest.mark.parametrize("kind", ("bf16", "f16", "tf32"))
def test_first_operand_in_registers(kind: str, device: str) -> None:
    check(kind, 48, device, 128 // WIDTH[kind], in_registers=True)
    if kind != "tf32":
        for n, span in ((32, 64), (64, 128), (96, 64), (128, 128)):
            check(kind, n, device, 64, span=span, in_registers=True, outer_b=True)


@devices
@pytest.mark.first_on_gpu
@pytest.mark.parametrize("in_registers", (True, False))
@pytest.mark.parametrize("kind", ("bf16", "f16"))
def test_48_of_the_64_columns_of_a_line(kind: str, in_registers: bool, device: str) -> None:
    """The forward pass of head size 48 reads its values like this; the columns beyond hold NaN.

    By the manual, N gives the shape of B and the descriptor where a line of 8 × 64 elements begins: whether N has to
    be a multiple of 64 it does not say.
    """
    rng = np.random.default_rng(48)
    a, b = representable(rng, (ROWS, 64), kind), representable(rng, (64, 64), kind)
    b[48:] = np.nan
    c = rng.standard_normal((ROWS, 48)).astype(np.float32)
    out = multiply(a, b, c, kind, device, outer_b=True, in_registers=in_registers)
    a64, b64 = a.astype(np.float64), b[:48].astype(np.float64)
    error = np.abs(out - (a64 @ b64.T + c))
    assert (error <= 66 * 2.0**-23 * (np.abs(a64) @ np.abs(b64).T + np.abs(c))).all()


@devices
@pytest.mark.parametrize("kind", ("bf16", "f16"))
@pytest.mark.parametrize("n", (8, 24, 32, 96, 128, 256))
def test_widths(n: int, kind: str, device: str) -> None:
    check(kind, n, device, 32, span=64)


@devices
@pytest.mark.parametrize("signs", ((-1, 1), (1, -1), (-1, -1)))
def test_signs_and_discarded_accumulators(signs: tuple[int, int], device: str) -> None:
    check("f16", 16, device, 16, span=32, signs=signs)
    check("f16", 16, device, 16, span=32, signs=signs, scale_d=False)


@devices
def test_special_values(device: str) -> None:
    """Infinities and NaN come out as such; products whose sum cancels leave what is small."""
    a = np.zeros((ROWS, 16), np.float32)
    b = np.zeros((16, 16), np.float32)
    b[:, 0] = 1
    b[:, 1] = 1
    a[0, 0] = np.inf
    a[1, :2] = np.inf, -np.inf
    a[2, 0] = np.nan
    a[3, :2] = 2.0**100, -(2.0**100)
    c = np.full((ROWS, 16), 0.25, np.float32)
    c[3] = 0
    out = multiply(a, b, c, "bf16", device, span=32)
    assert (out[0] == np.inf).all()
    assert np.isnan(out[1:3]).all()
    assert (out[3] == 0).all()
    assert (out[4:] == 0.25).all()


@devices
def test_registers_move_between_warpgroups(device: str) -> None:
    """168 registers for each of 384 threads: what one warpgroup gives back, the others take."""
    body = """
setp.lt.u32 %p1, %thread, 128;
@%p1 bra PRODUCER;
setmaxnreg.inc.sync.aligned.u32 240;
bra DONE;
PRODUCER:
setmaxnreg.dec.sync.aligned.u32 24;
DONE:
mul.wide.u32 %wide, %thread, 4;
add.u64 %rd0, %rd0, %wide;
st.global.u32 [%rd0], %thread;
"""
    text = program(body, 1, "sm_90a", directives="\n.maxntid 384, 1, 1\n.minnctapersm 1\n")
    for seed in range(3):
        out = np.zeros(384, np.uint32)
        run(text, [out], 384, device=device, seed=seed)
        np.testing.assert_array_equal(out, np.arange(384))
