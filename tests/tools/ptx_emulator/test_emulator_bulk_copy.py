"""mbarrier and the TMA unit: boxes of tensors with every swizzle, bounds, reductions, phases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from tools.ptx_emulator import Memory, Module, TensorMap

from tests.tools.ptx_emulator.harness import HOPPER_DEVICES, program, run

THREADS = 128
UINT32, FLOAT32, BFLOAT16 = 2, 7, 9
SWIZZLE = {0: 0, 32: 1, 64: 2, 128: 3}  # bytes: enumerator
devices = pytest.mark.parametrize("device", HOPPER_DEVICES)

HEAD = """
.shared .align 1024 .b8 tile[{tile_bytes}];
.shared .align 8 .b8 barrier[16];
mov.u32 %r1, barrier;
mov.u32 %r2, tile;
mad.lo.u32 %r3, %thread, 4, %r2;
mul.wide.u32 %wide, %thread, 4;
add.u64 %rd20, %rd0, %wide;
setp.eq.u32 %p1, %thread, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r1], 1;
@%p1 fence.mbarrier_init.release.cluster;
bar.sync 0;
"""
WAIT = """
{label}:
mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], {parity};
@!%p2 bra {label};
"""


def setup(tile_bytes: int) -> str:
    return HEAD.format(tile_bytes=tile_bytes)


def expect(n_bytes: int) -> str:
    return f"@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], {n_bytes};\n"


def wait(parity: int = 0, label: str = "WAIT") -> str:
    return WAIT.format(parity=parity, label=label)


def copy_words(n_words: int, to_global: bool) -> str:
    """Every thread moves words between the tile and the array behind %rd20."""
    lines = []
    for i in range(0, n_words, THREADS):
        guard = f"setp.lt.u32 %p5, %thread, {n_words - i};\n@%p5 "
        if to_global:
            lines.append(f"{guard}ld.shared.u32 %r4, [%r3+{4 * i}];\n@%p5 st.global.u32 [%rd20+{4 * i}], %r4;")
        else:
            lines.append(f"{guard}ld.global.u32 %r4, [%rd20+{4 * i}];\n@%p5 st.shared.u32 [%r3+{4 * i}], %r4;")
    return "\n".join(lines)


def load_box(at: tuple[int, ...]) -> str:
    coordinates = ", ".join(f"%r{40 + axis}" for axis in range(len(at)))
    sets = "".join(f"mov.s32 %r{40 + axis}, {value};\n" for axis, value in enumerate(at))
    return (
        sets + f"@%p1 cp.async.bulk.tensor.{len(at)}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        f"[%r2], [%map0, {{{coordinates}}}], [%r1];\n"
    )


def store_box(at: tuple[int, ...], adds: bool) -> str:
    coordinates = ", ".join(f"%r{40 + axis}" for axis in range(len(at)))
    sets = "".join(f"mov.s32 %r{40 + axis}, {value};\n" for axis, value in enumerate(at))
    opcode = "cp.reduce.async.bulk.tensor.{}d.global.shared::cta.add.tile.bulk_group"
    opcode = opcode if adds else "cp.async.bulk.tensor.{}d.global.shared::cta.tile.bulk_group"
    return (
        sets + f"@%p1 {opcode.format(len(at))} [%map0, {{{coordinates}}}], [%r2];\n"
        "@%p1 cp.async.bulk.commit_group;\n@%p1 cp.async.bulk.wait_group 0;\n"
    )


def box_of(tensor: np.ndarray, at: tuple[int, ...], box: tuple[int, ...]) -> np.ndarray:
    """`box` elements of `tensor` from `at` on, zero outside; at and box innermost first, the result outermost first."""
    result = np.zeros(box[::-1], tensor.dtype)
    for index in itertools.product(*(range(n) for n in box[::-1])):
        place = tuple(i + start for i, start in zip(index, at[::-1], strict=True))
        if all(0 <= i < n for i, n in zip(place, tensor.shape, strict=True)):
            result[index] = tensor[place]
    return result


def swizzled(rows: np.ndarray, span: int) -> np.ndarray:
    """Rows of `span` bytes as they lie in shared memory: piece j of row r moves by the row's place among 128 bytes."""
    if span == 0:
        return rows
    pieces = rows.reshape(-1, span // 16, 16)
    result = np.empty_like(pieces)
    for row, piece in itertools.product(range(pieces.shape[0]), range(span // 16)):
        result[row, piece ^ (row * span // 128 % (span // 16))] = pieces[row, piece]
    return result


def tensor_map(tensor: np.ndarray, box: tuple[int, ...], data_type: int, span: int) -> TensorMap:
    return TensorMap(data_type, tensor.shape[::-1], tensor.strides[-2::-1], box, swizzle=SWIZZLE[span])


SHAPE_NAMES = ("shape", "box", "at", "span")
Shape = tuple[int, ...]
CASES = [
    ((8, 64), (64, 8), (0, 0), 128, np.uint16, BFLOAT16),
    ((40, 96), (32, 16), (32, 30), 64, np.uint16, BFLOAT16),
    ((33, 48), (16, 32), (40, -5), 32, np.uint16, BFLOAT16),
    ((20, 40), (24, 16), (20, 10), 0, np.uint16, BFLOAT16),
    ((64, 64), (32, 64), (32, 4), 128, np.uint32, FLOAT32),
    ((3, 20, 64), (64, 16, 1), (0, 8, 2), 128, np.uint16, BFLOAT16),
    ((2, 3, 20, 32), (32, 8, 2, 1), (-8, 16, 1, 1), 64, np.uint16, BFLOAT16),
    ((2, 2, 3, 8, 16), (16, 4, 2, 1, 2), (0, 6, 2, 1, 0), 32, np.uint16, BFLOAT16),
]


@devices
@pytest.mark.parametrize((*SHAPE_NAMES, "dtype", "data_type"), CASES)
def test_load_of_a_box(
    shape: Shape, box: Shape, at: Shape, span: int, dtype: type[np.generic], data_type: int, device: str
) -> None:
    tensor = np.random.default_rng(0).integers(1, 1 << 16, shape).astype(dtype)
    expected = swizzled(np.ascontiguousarray(box_of(tensor, at, box)).view(np.uint8), span)
    n_words = expected.size // 4
    body = setup(expected.size) + expect(expected.size) + load_box(at) + wait() + copy_words(n_words, True)
    out = np.zeros(n_words, np.uint32)
    text = program(body, 2, "sm_90a", 1)
    run(text, [out, tensor], THREADS, device=device, maps=[(1, tensor_map(tensor, box, data_type, span))])
    np.testing.assert_array_equal(out.view(np.uint8), expected.reshape(-1))


@devices
def test_load_through_strides(device: str) -> None:
    """One head of a packed projection: dims and strides say what the memory does not."""
    packed = np.random.default_rng(1).integers(0, 1 << 16, (1, 24, 3, 4, 32)).astype(np.uint16)
    view = packed[0, :, 1, 2]
    box, at = (32, 16), (0, 12)
    expected = swizzled(np.ascontiguousarray(box_of(view, at, box)).view(np.uint8), 64)
    start = (packed.ctypes.data + view.ctypes.data - 2 * packed.ctypes.data) // 2
    tensor = packed.reshape(-1)[start:]
    body = setup(1024) + expect(1024) + load_box(at) + wait() + copy_words(256, True)
    out = np.zeros(256, np.uint32)
    description = TensorMap(BFLOAT16, (32, 24), (view.strides[0],), box, swizzle=SWIZZLE[64])
    run(program(body, 2, "sm_90a", 1), [out, tensor], THREADS, device=device, maps=[(1, description)])
    np.testing.assert_array_equal(out.view(np.uint8), expected.reshape(-1))


@devices
@pytest.mark.parametrize("adds", (False, True))
@pytest.mark.parametrize(SHAPE_NAMES, (((40, 48), (32, 16), (32, 30), 128), ((2, 9, 8), (8, 4, 2), (0, 7, 1), 32)))
def test_store_of_a_box(shape: Shape, box: Shape, at: Shape, span: int, adds: bool, device: str) -> None:
    rng = np.random.default_rng(2)
    tensor = rng.integers(-50, 50, shape).astype(np.float32)
    values = rng.integers(-50, 50, box[::-1]).astype(np.float32)
    expected = tensor.copy()
    for index in itertools.product(*(range(n) for n in box[::-1])):
        place = tuple(i + start for i, start in zip(index, at[::-1], strict=True))
        if all(0 <= i < n for i, n in zip(place, shape, strict=True)):
            expected[place] = values[index] + (expected[place] if adds else 0)
    image = swizzled(values.view(np.uint8), span).reshape(-1).view(np.uint32)
    body = setup(4 * image.size) + copy_words(image.size, False)
    body += "\nfence.proxy.async.shared::cta;\nbar.sync 0;\n" + store_box(at, adds)
    maps = [(1, tensor_map(tensor, box, FLOAT32, span))]
    run(program(body, 2, "sm_90a", 1), [image, tensor], THREADS, device=device, maps=maps)
    np.testing.assert_array_equal(tensor, expected)


@devices
@pytest.mark.parametrize("adds", (False, True))
def test_plain_bulk_copies(adds: bool, device: str) -> None:
    """Global → shared → global, or added there."""
    source = np.random.default_rng(3).integers(-99, 99, THREADS).astype(np.float32)
    out = np.arange(THREADS, dtype=np.float32)
    expected = source + out if adds else source
    verb, operation = ("cp.reduce", ".add.f32") if adds else ("cp", "")
    store = f"{verb}.async.bulk.global.shared::cta.bulk_group{operation}"
    load = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
    body = setup(512) + expect(512) + "createpolicy.fractional.L2::evict_first.b64 %rd5, 0f3F800000;\n"
    body += f"@%p1 {load} [%r2], [%rd1], 512, [%r1], %rd5;\n" + wait()
    body += f"@%p1 {store} [%rd0], [%r2], 512;\n"
    body += "@%p1 cp.async.bulk.commit_group;\n@%p1 cp.async.bulk.wait_group.read 0;\n"
    run(program(body, 2, "sm_90a"), [out, source], THREADS, device=device)
    np.testing.assert_array_equal(out, expected)


@devices
def test_two_stages_of_a_pipeline(device: str) -> None:
    """Thread 0 loads, the others sum: full and empty barriers, phases that wrap around."""
    n_tiles, words = 7, 32
    source = np.random.default_rng(4).integers(0, 1 << 20, n_tiles * words).astype(np.uint32)
    body = """
.shared .align 128 .b8 tile[256];
.shared .align 8 .b8 barriers[32];
.reg .pred %empty;
mov.u32 %r1, barriers;
mov.u32 %r2, tile;
setp.ne.u32 %p1, %thread, 0;
@%p1 bra READY;
mbarrier.init.shared::cta.b64 [%r1], 1;
mbarrier.init.shared::cta.b64 [%r1+8], 1;
mbarrier.init.shared::cta.b64 [%r1+16], 32;
mbarrier.init.shared::cta.b64 [%r1+24], 32;
fence.mbarrier_init.release.cluster;
READY:
bar.sync 0;
mov.u32 %r10, 0;
mov.u32 %r20, 0;
setp.ge.u32 %p1, %thread, 32;
@%p1 bra CONSUME;
setp.ne.u32 %p1, %thread, 0;
@%p1 bra DONE;
PRODUCE:
and.b32 %r11, %r10, 1;
shr.u32 %r12, %r10, 1;
and.b32 %r12, %r12, 1;
xor.b32 %r13, %r12, 1;
mad.lo.u32 %r14, %r11, 8, %r1;
mad.lo.u32 %r15, %r11, 128, %r2;
EMPTY:
mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r14+16], %r13;
@!%p2 bra EMPTY;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r14], 128;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r15], [%rd1], 128, [%r14];
add.u64 %rd1, %rd1, 128;
add.u32 %r10, %r10, 1;
setp.lt.u32 %p3, %r10, 7;
@%p3 bra PRODUCE;
bra DONE;
CONSUME:
and.b32 %r11, %r10, 1;
shr.u32 %r12, %r10, 1;
and.b32 %r12, %r12, 1;
mad.lo.u32 %r14, %r11, 8, %r1;
mad.lo.u32 %r15, %r11, 128, %r2;
sub.u32 %r16, %thread, 32;
mad.lo.u32 %r15, %r16, 4, %r15;
FULL:
mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r14], %r12;
@!%p2 bra FULL;
ld.shared.u32 %r17, [%r15];
mbarrier.arrive.shared::cta.b64 _, [%r14+16];
add.u32 %r20, %r20, %r17;
add.u32 %r10, %r10, 1;
setp.lt.u32 %p3, %r10, 7;
@%p3 bra CONSUME;
mul.wide.u32 %wide, %r16, 4;
add.u64 %rd0, %rd0, %wide;
st.global.u32 [%rd0], %r20;
DONE:
"""
    for seed in range(4):
        out = np.zeros(words, np.uint32)
        run(program(body, 2, "sm_90a"), [out, source], 64, device=device, seed=seed)
        np.testing.assert_array_equal(out, source.reshape(n_tiles, words).sum(axis=0, dtype=np.uint32))


@devices
def test_states_and_counts_of_arrivals(device: str) -> None:
    """Half of the arrivals come with a count; the state of an arrival names the phase that it belongs to."""
    body = """
.shared .align 8 .b8 barrier[8];
mov.u32 %r1, barrier;
setp.eq.u32 %p1, %thread, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r1], 96;
bar.sync 0;
and.b32 %r2, %thread, 1;
add.u32 %r2, %r2, 1;
mbarrier.arrive.shared::cta.b64 %rd5, [%r1], %r2;
WAIT:
mbarrier.test_wait.shared::cta.b64 %p2, [%r1], %rd5;
@!%p2 bra WAIT;
mbarrier.test_wait.parity.shared::cta.b64 %p3, [%r1], 1;
selp.u32 %r5, 1, 0, %p3;
mul.wide.u32 %wide, %thread, 4;
add.u64 %rd0, %rd0, %wide;
st.global.u32 [%rd0], %r5;
"""
    out = np.full(64, 7, np.uint32)
    run(program(body, 1, "sm_90a"), [out], 64, device=device)
    np.testing.assert_array_equal(out, 0)


@devices
def test_bytes_without_a_copy_and_the_end_of_a_barrier(device: str) -> None:
    """A thread may complete bytes itself; behind its end the barrier's memory is ordinary again."""
    body = """
.shared .align 8 .b8 barrier[8];
mov.u32 %r1, barrier;
setp.eq.u32 %p1, %thread, 0;
@!%p1 bra READY;
mbarrier.init.shared::cta.b64 [%r1], 1;
mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r1], 48;
READY:
bar.sync 0;
@!%p1 bra WAIT;
mbarrier.arrive.release.cta.shared::cta.b64 %rd5, [%r1];
mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 %p3, [%r1], 0, 100;
selp.u32 %r5, 1, 0, %p3;
mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r1], 48;
WAIT:
mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 %p2, [%r1], 0;
@!%p2 bra WAIT;
bar.sync 0;
@!%p1 bra DONE;
mbarrier.inval.shared::cta.b64 [%r1];
st.shared.u32 [%r1+4], %r5;
ld.shared.u32 %r6, [%r1+4];
add.u32 %r6, %r6, 5;
st.global.u32 [%rd0], %r6;
DONE:
"""
    out = np.zeros(1, np.uint32)
    run(program(body, 1, "sm_90a"), [out], 64, device=device)
    assert out[0] == 5


def test_bytes_are_counted() -> None:
    """Whole boxes, in whichever direction, whether the tensor fills them or not."""
    tensor = np.zeros((40, 32), np.float32)
    body = setup(2048) + expect(2048) + load_box((0, 30)) + wait() + store_box((0, -5), True)
    memory = Memory()
    address = memory.register(tensor, "tensor", writable=True)
    description = tensor_map(tensor, (32, 16), FLOAT32, 128).encode(address)
    module = Module.from_ptx(program(body, 1, "sm_90a", 1))
    counters = module.launch("program", 1, THREADS, 0, [address, description], memory)
    assert counters.totals()["bulk_bytes"] == 2 * 2048
    assert counters.by_operation()["cp.reduce.async.bulk.tensor.2d.add"] == 4


def test_the_encoder_refuses_what_the_driver_refuses() -> None:
    good = {"data_type": BFLOAT16, "dims": (64, 100), "strides": (128,), "box": (64, 16), "swizzle": 3}
    assert len(TensorMap(**good).encode(1 << 20)) == 128
    wrong = (
        ("address", {}, 1 << 20 | 8),
        ("strides", {"strides": (136,)}, 1 << 20),
        ("strides", {"strides": ()}, 1 << 20),
        ("box", {"box": (64, 257)}, 1 << 20),
        ("box", {"box": (4, 16), "swizzle": 0}, 1 << 20),
        ("swizzle", {"box": (128, 16)}, 1 << 20),
        ("box", {"box": (64, 0)}, 1 << 20),
        ("dims", {"dims": (64, 0)}, 1 << 20),
        ("data_type", {"data_type": 13}, 1 << 20),
        ("element_strides", {"element_strides": (1, 2)}, 1 << 20),
        ("interleave", {"interleave": 1}, 1 << 20),
        ("oob_fill", {"oob_fill": 1}, 1 << 20),
    )
    for name, change, address in wrong:
        with pytest.raises(ValueError, match=name):
            TensorMap(**{**good, **change}).encode(address)
