"""Exchange between the lanes of a warp, divergence and reconvergence, barriers."""

from __future__ import annotations

import numpy as np
import pytest
from tools.ptx_emulator import Memory, Module

from tests.tools.ptx_emulator.harness import DEVICES, program, run

pytestmark = pytest.mark.parametrize("device", DEVICES)

LANES = 32
STORE = "mul.wide.u32 %wide, %thread, 4;\nadd.u64 %rd0, %rd0, %wide;\nst.global.u32 [%rd0], %r1;"


def run_warp(
    body: str, n_threads: int, device: str, inputs: np.ndarray | None = None, target: str = "sm_80"
) -> np.ndarray:
    """%r1 of every thread after `body`; %r0 holds the thread's input."""
    out = np.full(n_threads, 0xAAAAAAAA, dtype=np.uint32)
    arrays = [out] if inputs is None else [out, inputs.astype(np.uint32)]
    load = (
        ""
        if inputs is None
        else "mul.wide.u32 %wide, %thread, 4;\nadd.u64 %rd1, %rd1, %wide;\nld.global.u32 %r0, [%rd1];\n"
    )
    run(program(load + body + "\n" + STORE, len(arrays), target), arrays, n_threads, device=device)
    return out


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """Source lane and predicate, as the PTX manual's pseudo-code has them."""
    segment, clamp = c >> 8 & 31, c & 31
    last, first = (lane & segment) | (clamp & ~segment), lane & segment
    b &= 31
    source, valid = {
        "up": (lane - b, lane - b >= last),
        "down": (lane + b, lane + b <= last),
        "bfly": (lane ^ b, (lane ^ b) <= last),
        "idx": (first | (b & ~segment), (first | (b & ~segment)) <= last),
    }[mode]
    return (source if valid else lane), valid


@pytest.mark.parametrize("width", (32, 16, 8, 2))
@pytest.mark.parametrize("mode", ("up", "down", "bfly", "idx"))
def test_shfl(mode: str, width: int, device: str) -> None:
    segment = (LANES - width) << 8 | (0 if mode == "up" else 31)
    values = np.random.default_rng(0).integers(0, 2**31, LANES, dtype=np.uint32)
    for b in (0, 1, 3, 7, 16, 31):
        body = f"shfl.sync.{mode}.b32 %r1|%p1, %r0, {b}, {segment}, -1;\n"
        body += "selp.u32 %r2, 0x80000000, 0, %p1;\nor.b32 %r1, %r1, %r2;"
        got = run_warp(body, LANES, device, values)
        expected = []
        for lane in range(LANES):
            source, valid = shuffled(mode, lane, b, segment)
            expected.append(int(values[source]) | (0x80000000 if valid else 0))
        assert got.tolist() == expected


@pytest.mark.parametrize("lanes", ((), (3,), tuple(range(32)), (0, 31), tuple(range(5, 20))))
def test_vote(lanes: tuple[int, ...], device: str) -> None:
    flags = np.array([lane in lanes for lane in range(LANES)], dtype=np.uint32)
    set_up = "setp.ne.u32 %p1, %r0, 0;\n"
    ballot = sum(1 << lane for lane in lanes)
    assert set(run_warp(set_up + "vote.sync.ballot.b32 %r1, %p1, -1;", LANES, device, flags)) == {ballot}
    for mode, expected in (("any", bool(lanes)), ("all", len(lanes) == 32), ("uni", len(lanes) in (0, 32))):
        body = set_up + f"vote.sync.{mode}.pred %p2, %p1, -1;\nselp.u32 %r1, 1, 0, %p2;"
        assert set(run_warp(body, LANES, device, flags)) == {int(expected)}
    body = set_up + "vote.sync.ballot.b32 %r1, !%p1, -1;"
    assert set(run_warp(body, LANES, device, flags)) == {ballot ^ 0xFFFFFFFF}


def test_redux(device: str) -> None:
    values = np.random.default_rng(1).integers(0, 2**32, LANES, dtype=np.uint32)
    signed = values.view(np.int32)
    expected = {
        "add.u32": values.sum(dtype=np.uint32), "min.u32": values.min(), "max.u32": values.max(),
        "min.s32": signed.min().astype(np.uint32), "max.s32": signed.max().astype(np.uint32),
        "and.b32": np.bitwise_and.reduce(values), "or.b32": np.bitwise_or.reduce(values),
        "xor.b32": np.bitwise_xor.reduce(values),
    }  # fmt: skip
    for name, value in expected.items():
        assert set(run_warp(f"redux.sync.{name} %r1, %r0, -1;", LANES, device, values)) == {value}


def test_match(device: str) -> None:
    values = np.array([lane % 5 for lane in range(LANES)], dtype=np.uint32)
    got = run_warp("match.any.sync.b32 %r1, %r0, -1;", LANES, device, values)
    assert got.tolist() == [sum(1 << other for other in range(LANES) if other % 5 == lane % 5) for lane in range(LANES)]
    body = "match.all.sync.b32 %r1|%p1, %r0, -1;\nselp.u32 %r2, 1, 0, %p1;\nadd.u32 %r1, %r1, %r2;"
    assert set(run_warp(body, LANES, device, values)) == {0}
    assert set(run_warp(body, LANES, device, np.full(LANES, 9))) == {0}


def test_elect_and_activemask(device: str) -> None:
    if device == "emulated":
        got = run_warp("elect.sync %r2|%p1, -1;\nselp.u32 %r1, 100, 0, %p1;\nadd.u32 %r1, %r1, %r2;", LANES, device,
                       target="sm_90")  # fmt: skip
        assert got.tolist() == [100] + [0] * 31
    body = "mov.u32 %r1, 7;\nsetp.gt.u32 %p1, %thread, 11;\n@%p1 bra SKIP;\nactivemask.b32 %r1;\nSKIP:"
    assert run_warp(body, LANES, device).tolist() == [0xFFF] * 12 + [7] * 20


def test_loops_with_different_trip_counts(device: str) -> None:
    """Lane i adds 1 … i; the shuffle behind the loop needs every lane back."""
    body = """
    mov.u32 %r1, 0;
    mov.u32 %r2, 0;
    LOOP:
    setp.ge.u32 %p1, %r2, %thread;
    @%p1 bra DONE;
    add.u32 %r2, %r2, 1;
    add.u32 %r1, %r1, %r2;
    bra LOOP;
    DONE:
    shfl.sync.bfly.b32 %r1, %r1, 1, 31, -1;
    """
    assert run_warp(body, 64, device).tolist() == [(i ^ 1) * ((i ^ 1) + 1) // 2 for i in range(64)]


def test_nested_branches_reconverge(device: str) -> None:
    """A four-way branch whose last arm lies behind the join, as compilers lay out unlikely code."""
    body = """
    and.b32 %r2, %thread, 3;
    setp.eq.u32 %p1, %r2, 3;
    @%p1 bra FAR;
    setp.eq.u32 %p2, %r2, 0;
    @%p2 bra ZERO;
    mov.u32 %r1, 10;
    setp.eq.u32 %p3, %r2, 2;
    @!%p3 bra JOIN;
    mov.u32 %r1, 20;
    bra JOIN;
    ZERO:
    mov.u32 %r1, 0;
    JOIN:
    redux.sync.add.u32 %r3, %r1, -1;
    add.u32 %r1, %r1, %r3;
    bra END;
    FAR:
    mov.u32 %r1, 30;
    bra JOIN;
    END:
    """
    total = 8 * (0 + 10 + 20 + 30)
    assert run_warp(body, 32, device).tolist() == [10 * (i & 3) + total for i in range(32)]


def test_collectives_within_a_branch(device: str) -> None:
    """Half of the warp shuffles among itself under its own member mask."""
    body = """
    mov.u32 %r1, %thread;
    setp.ge.u32 %p1, %thread, 16;
    @%p1 bra HIGH;
    shfl.sync.bfly.b32 %r1, %r1, 15, 31, 0xffff;
    bra END;
    HIGH:
    shfl.sync.idx.b32 %r1, %r1, 20, 31, 0xffff0000;
    END:
    """
    assert run_warp(body, 32, device).tolist() == [15 - i for i in range(16)] + [20] * 16


def test_threads_that_return_early_do_not_block_a_barrier(device: str) -> None:
    body = """
    mov.u32 %r1, 5;
    setp.ge.u32 %p1, %thread, 40;
    @%p1 ret;
    bar.sync 0;
    """
    got = run_warp(body, 96, device)
    assert got.tolist() == [5] * 40 + [0xAAAAAAAA] * 56


def test_barrier_reductions(device: str) -> None:
    flags = (np.arange(128) % 3 == 0).astype(np.uint32)
    set_up = "setp.ne.u32 %p1, %r0, 0;\n"
    assert set(run_warp(set_up + "bar.red.popc.u32 %r1, 0, %p1;", 128, device, flags)) == {flags.sum()}
    for mode, expected in (("or", 1), ("and", 0)):
        body = set_up + f"bar.red.{mode}.pred %p2, 0, %p1;\nselp.u32 %r1, 1, 0, %p2;"
        assert set(run_warp(body, 128, device, flags)) == {expected}
    body = set_up + "bar.red.and.pred %p2, 0, %p1;\nselp.u32 %r1, 1, 0, %p2;"
    assert set(run_warp(body, 128, device, np.ones(128))) == {1}


def producer_and_consumer() -> str:
    """Warp 0 fills a slot, warp 1 reads it: named barriers 1 (full) and 2 (empty), three rounds."""
    return program(
        """
        .shared .align 4 .b8 slot[128];
        mov.u32 %r2, slot;
        and.b32 %r3, %thread, 31;
        shl.b32 %r4, %r3, 2;
        add.u32 %r2, %r2, %r4;
        mov.u32 %r5, 0;
        mov.u32 %r1, 0;
        setp.ge.u32 %p1, %thread, 32;
        @%p1 bra CONSUMER;
        PRODUCE:
        add.u32 %r6, %r5, %r3;
        st.shared.u32 [%r2], %r6;
        bar.arrive 1, 64;
        bar.sync 2, 64;
        add.u32 %r5, %r5, 1;
        setp.lt.u32 %p2, %r5, 3;
        @%p2 bra PRODUCE;
        bra END;
        CONSUMER:
        bar.sync 1, 64;
        xor.b32 %r7, %r4, 4;
        sub.u32 %r8, %r2, %r4;
        add.u32 %r8, %r8, %r7;
        ld.shared.u32 %r6, [%r8];
        add.u32 %r1, %r1, %r6;
        bar.arrive 2, 64;
        add.u32 %r5, %r5, 1;
        setp.lt.u32 %p2, %r5, 3;
        @%p2 bra CONSUMER;
        END:
        """
        + STORE,
        1,
    )


@pytest.mark.parametrize("seed", range(5))
def test_named_barriers_order_producer_and_consumer(seed: int, device: str) -> None:
    out = np.zeros(64, dtype=np.uint32)
    if device == "emulated":
        memory = Memory()
        address = memory.register(out, "out", writable=True)
        Module.from_ptx(producer_and_consumer()).launch("program", 1, 64, 0, [address], memory, seed=seed)
    else:
        run(producer_and_consumer(), [out], 64, device=device)
    assert out.tolist() == [0] * 32 + [3 * (i ^ 1) + 3 for i in range(32)]


def test_a_spinning_warp_does_not_starve_another(device: str) -> None:
    """Warp 0 spins on a flag that warp 3 sets."""
    text = program(
        """
        mov.u32 %r1, 1;
        setp.eq.u32 %p1, %thread, 96;
        @%p1 bra SET;
        setp.ge.u32 %p2, %thread, 32;
        @%p2 bra END;
        SPIN:
        ld.acquire.gpu.global.u32 %r2, [%rd1];
        setp.eq.u32 %p3, %r2, 0;
        @%p3 bra SPIN;
        mov.u32 %r1, %r2;
        bra END;
        SET:
        mov.u32 %r3, 42;
        st.release.gpu.global.u32 [%rd1], %r3;
        END:
        """
        + STORE,
        2,
    )
    out, flag = np.zeros(128, dtype=np.uint32), np.zeros(1, dtype=np.uint32)
    run(text, [out, flag], 128, device=device)
    assert out.tolist() == [42] * 32 + [1] * 96


def test_a_spinning_lane_does_not_starve_its_warp(device: str) -> None:
    """Lane 0 spins, at a lower address, on a flag that lane 1 sets: lanes progress independently since sm_70."""
    text = program(
        """
        mov.u32 %r1, 1;
        setp.ne.u32 %p1, %thread, 0;
        @%p1 bra OTHERS;
        SPIN:
        ld.acquire.gpu.global.u32 %r2, [%rd1];
        setp.eq.u32 %p3, %r2, 0;
        @%p3 bra SPIN;
        mov.u32 %r1, %r2;
        bra END;
        OTHERS:
        setp.ne.u32 %p2, %thread, 1;
        @%p2 bra END;
        mov.u32 %r3, 42;
        st.release.gpu.global.u32 [%rd1], %r3;
        END:
        """
        + STORE,
        2,
    )
    out, flag = np.zeros(32, dtype=np.uint32), np.zeros(1, dtype=np.uint32)
    run(text, [out, flag], 32, device=device)
    assert out.tolist() == [42] + [1] * 31


def test_blocks_that_wait_for_each_other_can_run_together(device: str) -> None:
    text = program(
        """
        mov.u32 %r2, %ctaid.x;
        setp.ne.u32 %p1, %thread, 0;
        @%p1 bra END;
        atom.global.add.u32 %r3, [%rd0], 1;
        SPIN:
        ld.acquire.gpu.global.u32 %r4, [%rd0];
        setp.lt.u32 %p2, %r4, 4;
        @%p2 bra SPIN;
        END:
        """,
        1,
    )
    counter = np.zeros(1, dtype=np.uint32)
    if device == "emulated":
        memory = Memory()
        address = memory.register(counter, "counter", writable=True)
        Module.from_ptx(text).launch("program", 4, 32, 0, [address], memory, concurrent_blocks=4)
    else:
        run(text, [counter], 32, grid=4, device=device)
    assert counter[0] == 4


def test_a_value_that_a_later_iteration_does_not_write_again(device: str) -> None:
    """Its first mention is a write without a condition, which a branch skips; other registers are used in between."""
    body = """
        mov.u32 %r4, 0;
        AGAIN:
        setp.ne.u32 %p1, %r4, 0;
        @%p1 bra SKIP;
        mov.u32 %r2, 41;
        SKIP:
        add.u32 %r3, %r2, 1;
        mov.u32 %r5, 7;
        mov.u32 %r6, 9;
        add.u32 %r7, %r5, %r6;
        add.u32 %r1, %r3, %r7;
        add.u32 %r4, %r4, 1;
        setp.lt.u32 %p2, %r4, 3;
        @%p2 bra AGAIN;
    """
    assert run_warp(body, LANES, device).tolist() == [41 + 1 + 7 + 9] * LANES
