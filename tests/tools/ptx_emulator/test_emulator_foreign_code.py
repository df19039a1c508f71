"""What other people's compilers write and ours does not: spellings, carries, clusters of one block, the lax mode."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from tools.ptx_emulator import (
    DeadlockError,
    DivergenceError,
    EmulatorError,
    OutOfBoundsError,
    RaceError,
    TensorMap,
    UninitializedReadError,
)

from tests.tools.ptx_emulator.harness import apply, devices, hopper_devices, program, run

SEEDS = range(4)
THREAD_WORD = "mul.wide.u32 %wide, %thread, 4;\nadd.u64 %rd0, %rd0, %wide;\n"


# Spellings


@devices
def test_vectors_of_one_and_sizes_in_hexadecimal(device: str) -> None:
    source, out = np.arange(128, dtype=np.uint32), np.zeros(32, np.uint32)
    body = f"""
    .shared .align 16 .b8 tile[512];
    mov.u32 %r1, tile;
    mad.lo.u32 %r2, %thread, 16, %r1;
    mul.wide.u32 %wide, %thread, 16;
    add.u64 %rd2, %rd1, %wide;
    cp.async.cg.shared.global [ %r2 + 0 ], [ %rd2 + 0 ], 0x10, 0x8;
    cp.async.wait_all;
    bar.warp.sync 0xffffffff;
    ld.shared.b32 {{ %r3 }}, [ %r2 + 4 ];
    ld.shared.b32 {{ %r4 }}, [ %r2 + 8 ];
    mad.lo.u32 %r3, %r4, 1000, %r3;
    {THREAD_WORD}
    st.global.b32 [ %rd0 + 0 ], {{ %r3 }};
    """
    run(program(body, 2), [out, source], 32, device=device)
    # Of sixteen bytes eight come from memory, the others are zero.
    np.testing.assert_array_equal(out, source[1::4])


@devices
@pytest.mark.parametrize(
    "order", ["acq_rel.gpu.global", "global.gpu.acq_rel", "relaxed.gpu.global", "global.gpu.relaxed"]
)
def test_words_of_an_atomic_in_any_order(order: str, device: str) -> None:
    out, total = np.zeros(32, np.uint32), np.zeros(1, np.uint32)
    body = f"atom.{order}.add.u32 %r1, [%rd1], 3;\n{THREAD_WORD}st.global.u32 [%rd0], %r1;"
    run(program(body, 2), [out, total], 32, device=device)
    np.testing.assert_array_equal(np.sort(out), 3 * np.arange(32))
    assert total[0] == 96


@devices
@pytest.mark.parametrize(
    "order", ["acquire.gpu.global", "global.acquire.gpu", "relaxed.gpu.global", "global.relaxed.gpu"]
)
def test_words_of_a_load_in_any_order(order: str, device: str) -> None:
    out, source = np.zeros(32, np.uint32), np.arange(32, dtype=np.uint32)
    body = f"mul.wide.u32 %wide, %thread, 4;\nadd.u64 %rd1, %rd1, %wide;\nld.{order}.b32 %r1, [%rd1];\n"
    run(program(f"{body}add.u64 %rd0, %rd0, %wide;\nst.global.u32 [%rd0], %r1;", 2), [out, source], 32, device=device)
    np.testing.assert_array_equal(out, source)


@hopper_devices
@pytest.mark.parametrize("words", ["m8n8.x4.trans", "x4.m8n8.trans", "x4.trans.m8n8", "m8n8.x4", "x4.m8n8"])
def test_words_of_stmatrix_in_any_order(words: str, device: str) -> None:
    """Register i holds matrix i, whose rows go to the addresses of lanes 8i to 8i + 7."""
    out = np.zeros(128, np.uint32)
    body = f"""
    .shared .align 16 .b8 tile[512];
    mov.u32 %r1, tile;
    mad.lo.u32 %r2, %thread, 16, %r1;
    mov.u32 %r4, %thread;
    add.u32 %r5, %thread, 256;
    add.u32 %r6, %thread, 512;
    add.u32 %r7, %thread, 768;
    stmatrix.sync.aligned.{words}.shared.b16 [%r2], {{%r4, %r5, %r6, %r7}};
    bar.warp.sync 0xffffffff;
    ld.shared.v4.u32 {{%r8, %r9, %r10, %r11}}, [%r2];
    mul.wide.u32 %wide, %thread, 16;
    add.u64 %rd0, %rd0, %wide;
    st.global.v4.u32 [%rd0], {{%r8, %r9, %r10, %r11}};
    """
    run(program(body, 1, "sm_90"), [out], 32, device=device)
    # Lane t holds columns 2 (t % 4) and the next of row t / 4: its number as the first, what is above 16 bits as next.
    halves = np.zeros((4, 8, 8), np.uint16)
    for matrix, lane in itertools.product(range(4), range(32)):
        halves[matrix, lane // 4, lane % 4 * 2] = lane + 256 * matrix
    if "trans" in words:
        halves = halves.transpose(0, 2, 1)
    np.testing.assert_array_equal(out, np.ascontiguousarray(halves).view(np.uint32).reshape(-1))


# Carries: add.cc gives one, addc takes one, addc.cc does both


WIDTHS = {"u32": 32, "s32": 32, "u64": 64, "s64": 64}


def edges(type_name: str, n: int, seed: int) -> list[int]:
    """Bit patterns at which carries appear and disappear, then random ones."""
    width = WIDTHS[type_name]
    top = (1 << width) - 1
    fixed = [0, 1, top, top - 1, 1 << width - 1, (1 << width - 1) - 1]
    rng = np.random.default_rng(seed)
    return [fixed[i] for i in rng.integers(0, len(fixed), n)] + [
        int(v) * 0x9E3779B97F4A7C15 & top for v in rng.integers(0, 1 << 62, n)
    ]


def unsigned(values: list[int], type_name: str) -> np.ndarray[Any, Any]:
    return np.array(values, np.uint32 if WIDTHS[type_name] == 32 else np.uint64)


def chained(lines: str, type_name: str, values: list[list[int]], device: str) -> list[int]:
    """The result {d} of several instructions with a register t of their own."""
    bits = f"b{WIDTHS[type_name]}"
    body = f"{{{{\n.reg .{bits} t, zero;\nmov.{bits} zero, 0;\n{lines}\n}}}}"
    inputs = [(f"u{bits[1:]}", unsigned(column, type_name)) for column in values]
    out = apply(body, inputs, f"u{bits[1:]}", unsigned([], type_name).dtype, device)
    return [int(v) for v in out]


@devices
@pytest.mark.parametrize("type_name", WIDTHS)
@pytest.mark.parametrize("base", ["add", "sub"])
def test_sums_of_two_words(base: str, type_name: str, device: str) -> None:
    a, b, c, d = (edges(type_name, 40, seed) for seed in range(4))
    width, sign = WIDTHS[type_name], 1 if base == "add" else -1
    first = f"{base}.cc.{type_name} t, {{0}}, {{1}};\n"
    high = chained(first + f"{base}c.{type_name} {{d}}, {{2}}, {{3}};", type_name, [a, b, c, d], device)
    lines = first + f"{base}c.cc.{type_name} t, {{2}}, {{3}};\n{base}c.{type_name} {{d}}, zero, zero;"
    over = chained(lines, type_name, [a, b, c, d], device)
    for i, (low_a, low_b, high_a, high_b) in enumerate(zip(a, b, c, d, strict=True)):
        total = (high_a << width | low_a) + sign * (high_b << width | low_b)
        assert high[i] == total >> width & (1 << width) - 1
        # What is carried into a third word, or borrowed from it.
        assert over[i] == total >> 2 * width & (1 << width) - 1


@devices
@pytest.mark.parametrize("type_name", WIDTHS)
def test_products_of_two_words(type_name: str, device: str) -> None:
    """mad.lo.cc, madc.hi and madc.hi.cc: a · b plus a number of two words."""
    a, b, c, d = (edges(type_name, 40, 10 + seed) for seed in range(4))
    width = WIDTHS[type_name]
    mask = (1 << width) - 1
    first = f"mad.lo.cc.{type_name} t, {{0}}, {{1}}, {{2}};\n"
    high = chained(first + f"madc.hi.{type_name} {{d}}, {{0}}, {{1}}, {{3}};", type_name, [a, b, c, d], device)
    lines = first + f"madc.hi.cc.{type_name} t, {{0}}, {{1}}, {{3}};\naddc.{type_name} {{d}}, zero, zero;"
    over = chained(lines, type_name, [a, b, c, d], device)

    def value(bits: int) -> int:
        return bits - (1 << width) if type_name[0] == "s" and bits >> width - 1 else bits

    for i, (x, y, low, top) in enumerate(zip(a, b, c, d, strict=True)):
        product = value(x) * value(y) & (1 << 2 * width) - 1
        total = product + (top << width | low)
        assert high[i] == total >> width & mask
        assert over[i] == total >> 2 * width


@devices
def test_carries_of_other_products(device: str) -> None:
    """mad.hi.cc and madc.lo, with and without .cc, by the manual's formulas."""
    a, b, c, d = (edges("u32", 40, 20 + seed) for seed in range(4))
    mask = 0xFFFFFFFF
    first = "mad.hi.cc.u32 t, {0}, {1}, {2};\n"
    results = [
        chained(first + "madc.lo.u32 {d}, {0}, {1}, {3};", "u32", [a, b, c, d], device),
        chained(first + "madc.lo.cc.u32 t, {0}, {1}, {3};\naddc.u32 {d}, zero, zero;", "u32", [a, b, c, d], device),
    ]
    for x, y, z, w, low, over in zip(a, b, c, d, *results, strict=True):
        carry = (x * y >> 32) + z >> 32
        total = (x * y & mask) + w + carry
        assert (low, over) == (total & mask, total >> 32)


@devices
def test_each_lane_has_a_carry_of_its_own(device: str) -> None:
    """Lanes that a guard keeps from an instruction keep their carry."""
    out = np.zeros(32, np.uint32)
    body = f"""
    and.b32 %r1, %thread, 1;
    sub.u32 %r2, 0, %r1;
    add.cc.u32 %r3, %r2, 1;
    setp.lt.u32 %p1, %thread, 16;
    @%p1 add.cc.u32 %r4, %thread, 1;
    addc.u32 %r5, 0, 0;
    {THREAD_WORD}st.global.u32 [%rd0], %r5;
    """
    run(program(body, 1), [out], 32, device=device)
    lanes = np.arange(32)
    np.testing.assert_array_equal(out, (lanes % 2 == 1) & (lanes >= 16))


@devices
def test_gross_reciprocal_of_doubles(device: str) -> None:
    """From the upper halves, the lower ones zero; subnormal numbers become zeros of their sign."""
    rng = np.random.default_rng(0)
    special = [np.inf, -np.inf, 0.0, -0.0, 5e-324, -5e-324, 2.0**-1022, -(2.0**1023), 1.5 * 2.0**1023, 1.0, -3.0]
    x = np.array([*special, *(rng.standard_normal(100) * 2.0 ** rng.integers(-900, 900, 100))])
    y = apply("rcp.approx.ftz.f64 {d}, {0};", [("f64", x)], "f64", np.float64, device)
    upper = (x.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)
    flushed = np.where(np.abs(upper) < 2.0**-1022, np.copysign(0.0, upper), upper)
    with np.errstate(divide="ignore"):
        expected = 1 / flushed
    expected = np.where(np.abs(expected) < 2.0**-1022, np.copysign(0.0, expected), expected)
    np.testing.assert_array_equal(y.view(np.uint64) & np.uint64(0xFFFFFFFF), 0)
    np.testing.assert_array_equal(np.signbit(y), np.signbit(expected))
    # 20 bits of the significand are stored.
    np.testing.assert_allclose(y, expected, rtol=2.0**-19, atol=0)
    assert np.isnan(apply("rcp.approx.ftz.f64 {d}, {0};", [("f64", np.array([np.nan]))], "f64", np.float64, device)[0])


# Clusters of one block


@hopper_devices
def test_registers_of_a_cluster_of_one_block(device: str) -> None:
    names = [
        "%cluster_ctaid.x",
        "%cluster_ctarank",
        "%cluster_nctaid.x",
        "%cluster_nctarank",
        "%clusterid.x",
        "%nclusterid.x",
    ]
    lines = "".join(f"mov.u32 %r2, {name};\nst.global.u32 [%rd0+{4 * i}], %r2;\n" for i, name in enumerate(names))
    out = np.zeros((3, 8), np.uint32)
    body = "mov.u32 %r1, %ctaid.x;\nmul.wide.u32 %wide, %r1, 32;\nadd.u64 %rd0, %rd0, %wide;\n" + lines
    run(program(body, 1, "sm_90"), [out], 1, 3, device=device)
    np.testing.assert_array_equal(out[:, :6], [[0, 0, 1, 1, block, 3] for block in range(3)])


def exchanged(
    arrive: str = "barrier.cluster.arrive.release.aligned;", wait: str = "barrier.cluster.wait.acquire.aligned;"
) -> str:
    """Each thread of 128 reads what the thread opposite has written, through an address from mapa."""
    return f"""
    .shared .align 16 .b8 tile[512];
    mov.u32 %r1, tile;
    mad.lo.u32 %r2, %thread, 4, %r1;
    st.shared.u32 [%r2], %thread;
    {arrive}
    sub.u32 %r3, 127, %thread;
    mad.lo.u32 %r3, %r3, 4, %r1;
    mov.u32 %r5, %cluster_ctarank;
    mapa.shared::cluster.u32 %r3, %r3, %r5;
    {wait}
    ld.shared::cluster.u32 %r4, [%r3];
    {THREAD_WORD}st.global.u32 [%rd0], %r4;
    """


@hopper_devices
@pytest.mark.parametrize("seed", SEEDS)
def test_barrier_of_a_cluster_of_one_block(seed: int, device: str) -> None:
    out = np.zeros(128, np.uint32)
    run(program(exchanged(), 1, "sm_90"), [out], 128, device=device, seed=seed)
    np.testing.assert_array_equal(out, 127 - np.arange(128))


@hopper_devices
@pytest.mark.parametrize("seed", SEEDS)
def test_a_warp_may_pass_the_wait_while_another_has_only_arrived(seed: int, device: str) -> None:
    """The second warp waits for the first one's word between its arrival and its wait."""
    out = np.zeros(1, np.uint32)
    body = """
    .shared .align 16 .b8 word[16];
    mov.u32 %r1, word;
    setp.eq.u32 %p2, %thread, 0;
    @%p2 st.shared.u32 [%r1], 0;
    bar.sync 0;
    barrier.cluster.arrive.aligned;
    setp.ge.u32 %p1, %thread, 32;
    @%p1 bra SECOND;
    barrier.cluster.wait.aligned;
    @%p2 atom.shared.exch.b32 %r2, [%r1], 7;
    bra DONE;
    SECOND:
    atom.shared.or.b32 %r3, [%r1], 0;
    setp.ne.u32 %p3, %r3, 7;
    @%p3 bra SECOND;
    barrier.cluster.wait.aligned;
    setp.eq.u32 %p4, %thread, 32;
    @%p4 st.global.u32 [%rd0], %r3;
    DONE:
    """
    run(program(body, 1, "sm_90"), [out], 64, device=device, seed=seed)
    assert out[0] == 7


@pytest.mark.parametrize(
    ("arrive", "wait", "error"),
    [
        ("barrier.cluster.arrive.relaxed.aligned;", "barrier.cluster.wait.aligned;", RaceError),
        ("barrier.cluster.arrive.aligned;", "", (RaceError, UninitializedReadError)),
        ("", "barrier.cluster.wait.aligned;", DivergenceError),
        (
            "barrier.cluster.arrive.aligned;\nbarrier.cluster.arrive.aligned;",
            "barrier.cluster.wait.aligned;",
            DivergenceError,
        ),
    ],
)
def test_misuse_of_the_barrier_of_a_cluster(
    arrive: str, wait: str, error: type[EmulatorError] | tuple[type[EmulatorError], ...]
) -> None:
    for seed in SEEDS:
        with pytest.raises(error):
            run(program(exchanged(arrive, wait), 1, "sm_90"), [np.zeros(128, np.uint32)], 128, seed=seed)


def test_arrival_that_never_comes() -> None:
    body = "setp.lt.u32 %p1, %thread, 32;\n@%p1 barrier.cluster.arrive.aligned;\n@%p1 barrier.cluster.wait.aligned;\n"
    with pytest.raises(DeadlockError, match=r"barrier\.cluster\.wait"):
        run(program(body + "bar.sync 0;", 0, "sm_90"), [], 64)


def test_other_blocks_of_a_cluster_of_one() -> None:
    with pytest.raises(OutOfBoundsError, match="mapa to block 1"):
        run(program("mapa.shared::cluster.u32 %r1, %thread, 1;", 0, "sm_90"), [], 32)


# What the lax mode passes over


def reported_only_where_strict(
    body: str, expected: np.ndarray[Any, Any], match: str, maps: tuple[Any, ...] = ()
) -> None:
    """`body` has a pointer to a zeroed array of the result's shape and one to 0, 1, 2, …"""
    source = np.arange(1024, dtype=np.uint32)
    text = program(body, 2, "sm_90a", len(maps))
    for seed in SEEDS:
        with pytest.raises(RaceError, match=match):
            run(text, [np.zeros_like(expected), source], 128, maps=maps, seed=seed)
        out = np.zeros_like(expected)
        run(text, [out, source], 128, maps=maps, seed=seed, lax=True)
        np.testing.assert_array_equal(out, expected)


def test_mbarrier_without_the_fence_after_its_initialisation() -> None:
    body = f"""
    .shared .align 128 .b8 tile[512];
    .shared .align 8 .b8 barrier[8];
    mov.u32 %r1, barrier;
    mov.u32 %r2, tile;
    setp.eq.u32 %p1, %thread, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r1], 1;
    bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 512;
    @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd1], 512, [%r1];
    WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], 0;
    @!%p2 bra WAIT;
    mad.lo.u32 %r3, %thread, 4, %r2;
    ld.shared.u32 %r4, [%r3];
    {THREAD_WORD}st.global.u32 [%rd0], %r4;
    """
    reported_only_where_strict(body, np.arange(128, dtype=np.uint32), "without fence.mbarrier_init")


def test_bulk_store_of_what_was_written_without_a_proxy_fence() -> None:
    body = """
    .shared .align 128 .b8 tile[512];
    mov.u32 %r2, tile;
    mad.lo.u32 %r3, %thread, 4, %r2;
    mul.wide.u32 %wide, %thread, 4;
    add.u64 %rd2, %rd1, %wide;
    cp.async.ca.shared.global [%r3], [%rd2], 4;
    cp.async.wait_all;
    bar.sync 0;
    setp.eq.u32 %p1, %thread, 0;
    @%p1 cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [%map0, {0}], [%r2];
    @%p1 cp.async.bulk.commit_group;
    @%p1 cp.async.bulk.wait_group 0;
    """
    tensor_map = TensorMap(2, (128,), (), (128,))
    expected = np.arange(128, dtype=np.uint32)
    reported_only_where_strict(body, expected, "without a fence.proxy.async", ((0, tensor_map),))


def test_bulk_store_by_all_lanes_of_a_warp() -> None:
    body = """
    .shared .align 128 .b8 tile[512];
    mov.u32 %r2, tile;
    mad.lo.u32 %r3, %thread, 4, %r2;
    st.shared.u32 [%r3], %thread;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    setp.lt.u32 %p1, %thread, 32;
    @%p1 cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [%map0, {0}], [%r2];
    @%p1 cp.async.bulk.commit_group;
    @%p1 cp.async.bulk.wait_group 0;
    """
    expected = np.arange(128, dtype=np.uint32)
    reported_only_where_strict(
        body, expected, "is not ordered after the write", ((0, TensorMap(2, (128,), (), (128,))),)
    )


REDUNDANT = f"""
    .shared .align 16 .b8 tile[128];
    mov.u32 %r1, tile;
    and.b32 %r2, %thread, 31;
    mad.lo.u32 %r3, %r2, 4, %r1;
    VALUE
    st.shared.u32 [%r3], %r4;
    bar.sync 0;
    ld.shared.u32 %r5, [%r3];
    {THREAD_WORD}st.global.u32 [%rd0], %r5;
"""


def test_warps_that_write_the_same() -> None:
    body = REDUNDANT.replace("VALUE", "add.u32 %r4, %r2, 5;")
    reported_only_where_strict(body, np.arange(128, dtype=np.uint32) % 32 + 5, "write of shared memory")


def test_warps_that_write_different_values_are_reported_in_every_mode() -> None:
    body = REDUNDANT.replace("VALUE", "add.u32 %r4, %thread, 5;")
    for lax in (False, True):
        for seed in SEEDS:
            with pytest.raises(RaceError, match="write of shared memory"):
                run(program(body, 1), [np.zeros(128, np.uint32)], 128, seed=seed, lax=lax)


def test_missing_barriers_are_reported_in_every_mode() -> None:
    body = REDUNDANT.replace("VALUE", "mov.u32 %r4, %thread;\nmad.lo.u32 %r3, %thread, 4, %r1;")
    body = body.replace("bar.sync 0;", "sub.u32 %r6, 127, %thread;\nmad.lo.u32 %r3, %r6, 4, %r1;").replace(
        "[128]", "[512]"
    )
    for lax in (False, True):
        for seed in SEEDS:
            with pytest.raises((RaceError, UninitializedReadError), match="shared memory"):
                run(program(body, 1), [np.zeros(128, np.uint32)], 128, seed=seed, lax=lax)
