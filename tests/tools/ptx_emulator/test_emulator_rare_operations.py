"""Operations of our kernels that no other test of an instruction runs, against what the PTX manual says of each."""

from __future__ import annotations

import numpy as np
import pytest
from tools.ptx_emulator import Memory, Module, TensorMap

from tests.tools.ptx_emulator.harness import apply, devices, hopper_devices, program, run
from tests.tools.ptx_emulator.test_emulator_bulk_copy import (
    SWIZZLE,
    THREADS,
    UINT32,
    copy_words,
    expect,
    setup,
    store_box,
    wait,
)

# %rd20: element `thread` of the array behind a pointer.
ELEMENT = "mul.wide.u32 %wide, %thread, {size};\nadd.u64 %rd20, %rd{pointer}, %wide;\n"


def words(n: int, kind: type = np.uint64) -> np.ndarray:
    """Random ones, and those of all zeros and of all ones."""
    values = np.random.default_rng(0).integers(0, np.iinfo(kind).max, n, kind, endpoint=True)
    values[:2] = 0, np.iinfo(kind).max
    return values


@devices
def test_bits_of_64(device: str) -> None:
    a, b = words(64), words(64)[::-1].copy()
    np.testing.assert_array_equal(
        apply("and.b64 {d}, {0}, {1};", [("b64", a), ("b64", b)], "b64", a.dtype, device), a & b
    )
    np.testing.assert_array_equal(apply("not.b64 {d}, {0};", [("b64", a)], "b64", a.dtype, device), ~a)
    narrow = words(64, np.uint32)
    found = apply("not.b32 {d}, {0};", [("b32", narrow)], "b32", narrow.dtype, device)
    np.testing.assert_array_equal(found, ~narrow)


@devices
def test_selections_and_comparisons(device: str) -> None:
    which = np.arange(64, dtype=np.uint32) % 3
    for kind, dtype in (("b64", np.uint64), ("u16", np.uint16)):
        a, b = words(64, dtype), words(64, dtype)[::-1].copy()
        select = f"setp.ne.u32 %p1, {{2}}, 0;\nselp.{kind} {{d}}, {{0}}, {{1}}, %p1;"
        found = apply(select, [(kind, a), (kind, b), ("u32", which)], kind, dtype, device)
        np.testing.assert_array_equal(found, np.where(which != 0, a, b))
    a = words(64)
    b = np.where(which == 0, a, a ^ (np.uint64(1) << (np.arange(64, dtype=np.uint64))))
    equal = "setp.eq.b64 %p1, {0}, {1};\nselp.u32 {d}, 1, 0, %p1;"
    found = apply(equal, [("b64", a), ("b64", b)], "u32", np.uint32, device)
    np.testing.assert_array_equal(found, which == 0)


@devices
def test_integers_of_other_widths(device: str) -> None:
    """A narrower destination takes the low bits, a wider one gets zeros: the sources are unsigned."""
    wide, narrow = words(64), words(64, np.uint16)
    found = apply("cvt.u16.u64 {d}, {0};", [("u64", wide)], "u16", np.uint16, device)
    np.testing.assert_array_equal(found, wide & np.uint64(0xFFFF))
    for kind, dtype in (("u32", np.uint32), ("u64", np.uint64)):
        found = apply(f"cvt.{kind}.u16 {{d}}, {{0}};", [("u16", narrow)], kind, dtype, device)
        np.testing.assert_array_equal(found, narrow.astype(dtype))
    signed = np.array([0, 1, -1, 5, -32768, 32767], np.int16)
    found = apply("neg.s16 {d}, {0};", [("s16", signed)], "s16", np.int16, device)
    # The least has no opposite: what overflows is cut.
    np.testing.assert_array_equal(found, [0, -1, 1, -5, -32768, -32767])


@devices
def test_differences_are_rounded_to_the_nearest(device: str) -> None:
    """Ties to even; subnormal numbers stay; what cancels is +0."""
    a = np.array([1, 1, 1 + 2.0**-23, 3, 2.0**-126, 5, np.inf, np.inf], np.float32)
    b = np.array([2.0**-25, -(2.0**-24), -(2.0**-24), 2.0**-30, 2.0**-127, 5, 1, np.inf], np.float32)
    found = apply("sub.rn.f32 {d}, {0}, {1};", [("f32", a), ("f32", b)], "f32", np.float32, device)
    expected = np.array([1, 1, 1 + 2.0**-22, 3, 2.0**-127, 0, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(found, expected)
    assert not np.signbit(found[5])


@devices
def test_vectors_lie_in_memory_in_the_order_of_their_registers(device: str) -> None:
    """Read two and four at a time from global memory, passed through shared memory, written in reverse."""
    body = ".shared .align 16 .b8 tile[1024];\nmov.u32 %r1, tile;\nmad.lo.u32 %r1, %thread, 16, %r1;\n"
    body += ELEMENT.format(size=16, pointer=0)
    body += """
    ld.global.v4.f32 {%f0, %f1, %f2, %f3}, [%rd20];
    ld.global.v2.f32 {%f4, %f5}, [%rd20+8];
    st.shared.v4.f32 [%r1], {%f1, %f0, %f5, %f4};
    ld.shared.v2.f32 {%f6, %f7}, [%r1];
    ld.shared.v2.f32 {%f8, %f9}, [%r1+8];
    """
    body += ELEMENT.format(size=16, pointer=1) + "st.global.v4.f32 [%rd20], {%f6, %f7, %f8, %f9};\n"
    body += ELEMENT.format(size=16, pointer=2)
    body += "st.global.v2.f32 [%rd20], {%f9, %f8};\nst.global.v2.f32 [%rd20+8], {%f7, %f6};\n"
    body += "mov.b32 %r4, %f6;\nmov.b32 %r5, %f7;\n" + ELEMENT.format(size=16, pointer=3)
    body += "st.global.v4.u32 [%rd20], {%r5, %r4, %thread, 7};\n"
    x = np.random.default_rng(1).standard_normal((64, 4)).astype(np.float32)
    swapped, reverse, integers = np.zeros_like(x), np.zeros_like(x), np.zeros((64, 4), np.uint32)
    run(program(body, 4), [x, swapped, reverse, integers], 64, device=device)
    np.testing.assert_array_equal(swapped, x[:, [1, 0, 3, 2]])
    np.testing.assert_array_equal(reverse, x[:, [2, 3, 0, 1]])
    np.testing.assert_array_equal(integers[:, :2].copy().view(np.float32), x[:, :2])
    np.testing.assert_array_equal(integers[:, 2:], [[i, 7] for i in range(64)])


@devices
def test_registers_that_are_wider_than_what_is_loaded(device: str) -> None:
    """Filled with zeros, or with the sign where the type has one. A store takes the low bits."""
    body = """
    .shared .align 16 .b8 tile[1024];
    mov.u32 %r1, tile;
    mad.lo.u32 %r1, %thread, 8, %r1;
    """
    body += ELEMENT.format(size=4, pointer=0) + "ld.global.f32 %f1, [%rd20];\nst.shared.f32 [%r1], %f1;\n"
    body += "ld.shared.s32 %rd21, [%r1];\nld.shared.u8 %r3, [%r1+3];\n"
    body += ELEMENT.format(size=8, pointer=1) + "st.global.b64 [%rd20], %rd21;\n"
    body += ELEMENT.format(size=4, pointer=2) + "st.global.u32 [%rd20], %r3;\n"
    body += "cvt.u16.u32 %h1, %thread;\nst.shared.b16 [%r1+2], %h1;\nld.shared.u32 %r4, [%r1];\n"
    body += ELEMENT.format(size=4, pointer=3) + "st.global.u32 [%rd20], %r4;\n"
    x = words(64, np.uint32)
    wide, byte, patched = np.zeros(64, np.int64), np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    run(program(body, 4), [x.view(np.float32), wide, byte, patched], 64, device=device)
    np.testing.assert_array_equal(wide, x.view(np.int32))
    np.testing.assert_array_equal(byte, x >> 24)
    np.testing.assert_array_equal(patched, x & 0xFFFF | np.arange(64, dtype=np.uint32) << 16)


def test_parameters_of_every_type() -> None:
    """Vectors begin at multiples of their size; a signed number fills a wider register with its sign."""
    text = """
    .version 7.8
    .target sm_80
    .address_size 64
    .visible .entry program(.param .u64 out, .param .f32 f, .param .s32 s, .param .align 16 .b8 pair[16],
                            .param .align 8 .b8 words[8], .param .align 16 .b8 four[16])
    {
    .reg .b64 %rd<8>;
    .reg .b32 %r<8>;
    .reg .f32 %f1;
    ld.param.u64 %rd0, [out];
    cvta.to.global.u64 %rd1, %rd0;
    ld.param.f32 %f1, [f];
    st.global.f32 [%rd1], %f1;
    ld.param.s32 %rd2, [s];
    st.global.b64 [%rd1+8], %rd2;
    ld.param.v2.u64 {%rd3, %rd4}, [pair];
    st.global.b64 [%rd1+16], %rd3;
    st.global.b64 [%rd1+24], %rd4;
    ld.param.v2.u32 {%r1, %r2}, [words];
    st.global.u32 [%rd1+32], %r1;
    st.global.u32 [%rd1+36], %r2;
    ld.param.v4.u32 {%r3, %r4, %r5, %r6}, [four];
    st.global.u32 [%rd1+40], %r3;
    st.global.u32 [%rd1+44], %r4;
    st.global.u32 [%rd1+48], %r5;
    st.global.u32 [%rd1+52], %r6;
    ret;
    }
    """
    out, memory = np.zeros(7, np.int64), Memory()
    pair, halves = np.array([2**63 - 5, 17], np.int64), np.array([3, 2**31 - 1], np.int32)
    four = np.array([4, -1, 9, 11], np.int32)
    values = [memory.register(out, "out", writable=True), 1.5, -5, pair.tobytes(), halves.tobytes()]
    values.append(four.tobytes())
    Module.from_ptx(text).launch("program", 1, 1, 0, values, memory)
    assert out[0] == np.float32(1.5).view(np.uint32) and out[1] == -5
    np.testing.assert_array_equal(out[2:4], pair)
    np.testing.assert_array_equal(out[4:].view(np.int32), [*halves, *four])


@devices
def test_a_generic_address_of_global_memory(device: str) -> None:
    body = "cvta.to.global.u64 %rd20, %rd0;\nmul.wide.u32 %wide, %thread, 4;\nadd.u64 %rd20, %rd20, %wide;\n"
    out = np.zeros(32, np.uint32)
    run(program(body + "st.global.u32 [%rd20], %thread;\n", 1), [out], 32, device=device)
    np.testing.assert_array_equal(out, np.arange(32))


@devices
def test_atomic_additions_return_what_was_there(device: str) -> None:
    """Every thread finds another sum: all of them come after one another, in some order."""
    body = "mov.s32 %r2, -3;\natom.global.add.s32 %r1, [%rd1], %r2;\n" + ELEMENT.format(size=4, pointer=0)
    found, total = np.zeros(128, np.int32), np.full(1, 10, np.int32)
    run(program(body + "st.global.u32 [%rd20], %r1;\n", 2), [found, total], 64, grid=1, device=device)
    assert total[0] == 10 - 3 * 64
    assert sorted(found[:64]) == sorted(10 - 3 * i for i in range(64))


@devices
@pytest.mark.parametrize("seed", range(4))
def test_what_is_released_is_seen_by_who_acquires_it(seed: int, device: str) -> None:
    """Warp 0 writes, then releases the flag; warp 1 acquires it, then reads: patterns of two threads in the manual."""
    body = (
        ELEMENT.format(size=4, pointer=1)
        + """
    setp.ge.u32 %p1, %thread, 32;
    @%p1 bra READ;
    st.global.u32 [%rd20], %thread;
    bar.warp.sync 0xffffffff;
    setp.ne.u32 %p2, %thread, 0;
    @%p2 bra END;
    mov.s32 %r1, -7;
    st.release.gpu.global.s32 [%rd2], %r1;
    bra END;
    READ:
    ld.acquire.gpu.global.s32 %r2, [%rd2];
    setp.ne.s32 %p3, %r2, -7;
    @%p3 bra READ;
    ld.global.u32 %r3, [%rd20+-128];
    mul.wide.u32 %wide, %thread, 4;
    add.u64 %rd21, %rd0, %wide;
    st.global.u32 [%rd21+-128], %r3;
    END:
    """
    )
    out, data, flag = np.full(32, 99, np.uint32), np.zeros(64, np.uint32), np.zeros(1, np.int32)
    run(program(body, 3), [out, data, flag], 64, device=device, seed=seed)
    np.testing.assert_array_equal(out, np.arange(32))


@devices
def test_lanes_that_meet_see_what_the_others_wrote(device: str) -> None:
    """The whole warp, then each half under a mask of its own."""
    body = """
    .shared .align 4 .b8 slot[128];
    mov.u32 %r1, slot;
    mad.lo.u32 %r2, %thread, 4, %r1;
    st.shared.u32 [%r2], %thread;
    bar.warp.sync 0xffffffff;
    xor.b32 %r3, %thread, 31;
    mad.lo.u32 %r3, %r3, 4, %r1;
    ld.shared.u32 %r4, [%r3];
    bar.warp.sync 0xffffffff;
    mul.lo.u32 %r4, %r4, 10;
    st.shared.u32 [%r2], %r4;
    setp.ge.u32 %p1, %thread, 16;
    @%p1 bra HIGH;
    bar.warp.sync 0xffff;
    bra JOIN;
    HIGH:
    bar.warp.sync 0xffff0000;
    JOIN:
    xor.b32 %r3, %thread, 1;
    mad.lo.u32 %r3, %r3, 4, %r1;
    ld.shared.u32 %r4, [%r3];
    """
    body += ELEMENT.format(size=4, pointer=0) + "st.global.u32 [%rd20], %r4;\n"
    out = np.zeros(32, np.uint32)
    run(program(body, 1), [out], 32, device=device)
    np.testing.assert_array_equal(out, [10 * (31 - (i ^ 1)) for i in range(32)])


@hopper_devices
def test_what_was_written_is_copied_behind_a_fence_of_the_proxies(device: str) -> None:
    """Ordinary writes to global memory; who has met the writers copies them."""
    n_bytes = 4 * THREADS
    body = setup(n_bytes) + "st.global.u32 [%rd20], %thread;\nbar.sync 0;\nfence.proxy.async.global;\n"
    body += expect(n_bytes)
    body += "@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
    body += f"[%r2], [%rd0], {n_bytes}, [%r1];\n" + wait()
    body += "ld.shared.u32 %r4, [%r3];\nadd.u32 %r4, %r4, 1;\n" + ELEMENT.format(size=4, pointer=1)
    source, out = np.zeros(THREADS, np.uint32), np.zeros(THREADS, np.uint32)
    run(program(body + "st.global.u32 [%rd20], %r4;\n", 2, "sm_90a"), [source, out], THREADS, device=device)
    np.testing.assert_array_equal(out, np.arange(1, THREADS + 1))


@hopper_devices
@pytest.mark.parametrize("at", [(0, 0, 0, 0), (4, 1, 1, 2), (8, 2, 0, 1), (-4, -1, 2, 0)])
def test_boxes_of_four_axes_are_stored(at: tuple[int, ...], device: str) -> None:
    """The first coordinate is that of the innermost axis; what lies outside of the tensor is not written."""
    dims, box = (12, 3, 3, 4), (8, 2, 2, 2)
    n = int(np.prod(box))
    text = (
        setup(4 * n) + copy_words(n, False) + "\nfence.proxy.async.shared::cta;\nbar.sync 0;\n" + store_box(at, False)
    )
    source = np.arange(1, n + 1, dtype=np.uint32)
    target = np.zeros(dims[::-1], np.uint32)
    strides = tuple(4 * int(np.prod(dims[: axis + 1])) for axis in range(3))
    tensor_map = TensorMap(UINT32, dims, strides, box, swizzle=SWIZZLE[0])
    run(program(text, 2, "sm_90a", 1), [source, target], THREADS, device=device, maps=[(1, tensor_map)])
    expected = np.zeros_like(target)
    tile = source.reshape(box[::-1])
    for place in np.ndindex(*tile.shape):
        where = tuple(i + start for i, start in zip(place, at[::-1], strict=True))
        if all(0 <= i < extent for i, extent in zip(where, target.shape, strict=True)):
            expected[where] = tile[place]
    np.testing.assert_array_equal(target, expected)
