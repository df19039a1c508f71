"""Planted defects that the emulator must report, by the right name and at the right place, beside their sound twins."""

from __future__ import annotations

import re

import numpy as np
import pytest
from tools.ptx_emulator import (
    DeadlockError,
    DivergenceError,
    EmulatorError,
    Memory,
    MisalignedError,
    Module,
    OutOfBoundsError,
    PtxSyntaxError,
    RaceError,
    TrapError,
    UninitializedReadError,
    UnsupportedInstructionError,
)

from tests.tools.ptx_emulator.harness import program

SEEDS = range(6)


def launch(
    body: str, threads: int = 128, n_pointers: int = 1, seed: int = 0, grid: int = 1, **options: int
) -> np.ndarray:
    """Run a program whose pointers are writable buffers of 512 words."""
    memory = Memory()
    out = np.zeros((n_pointers, 512), dtype=np.uint32)
    addresses = [memory.register(out[i], f"buffer {i}", writable=True) for i in range(n_pointers)]
    module = Module.from_ptx(program(body, n_pointers))
    module.launch("program", grid, threads, 0, addresses, memory, seed=seed, **options)
    return out


def line_of(body: str, n_pointers: int, fragment: str) -> int:
    lines = program(body, n_pointers).splitlines()
    (number,) = [i for i, line in enumerate(lines, start=1) if fragment in line]
    return number


EXCHANGE = """
.shared .align 16 .b8 tile[2048];
mov.u32 %r1, tile;
mad.lo.u32 %r2, %thread, 4, %r1;
st.shared.u32 [%r2], %thread;
{barrier}
xor.b32 %r3, %thread, {distance};
mad.lo.u32 %r4, %r3, 4, %r1;
ld.shared.u32 %r5, [%r4];
mul.wide.u32 %wide, %thread, 4;
add.u64 %rd0, %rd0, %wide;
st.global.u32 [%rd0], %r5;
"""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("barrier", "distance"), (("bar.sync 0;", 32), ("bar.warp.sync -1;", 1), ("bar.sync 0;", 1)))
def test_ordered_exchange_is_accepted(barrier: str, distance: int, seed: int) -> None:
    out = launch(EXCHANGE.format(barrier=barrier, distance=distance), seed=seed)
    np.testing.assert_array_equal(out[0, :128], np.arange(128) ^ distance)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("barrier", "distance"), (("", 32), ("bar.warp.sync -1;", 32), ("", 1)))
def test_missing_barrier(barrier: str, distance: int, seed: int) -> None:
    """Depending on the order of the warps, the read meets unwritten memory or races with the write."""
    with pytest.raises((RaceError, UninitializedReadError), match=r"thread \d+, PTX line \d+: (ld|st)\.shared"):
        launch(EXCHANGE.format(barrier=barrier, distance=distance), seed=seed)


REUSE = (
    EXCHANGE.format(barrier="bar.sync 0;", distance=32)
    + "{barrier}\nadd.u32 %r6, %thread, 7;\nst.shared.u32 [%r2], %r6;"
)


@pytest.mark.parametrize("seed", SEEDS)
def test_overwriting_before_others_have_read(seed: int) -> None:
    launch(REUSE.format(barrier="bar.sync 0;"), seed=seed)
    with pytest.raises(RaceError, match=r"not ordered after the (read|write)"):
        launch(REUSE.format(barrier=""), seed=seed)


def test_two_warps_writing_one_word() -> None:
    body = ".shared .align 4 .b8 cell[4];\nmov.u32 %r1, cell;\nst.shared.u32 [%r1], {value};"
    with pytest.raises(RaceError):
        launch(body.format(value="%thread"))
    # Within a warp, one value from all lanes is sound.
    launch(body.format(value=5), threads=32)
    with pytest.raises(RaceError):
        launch(body.format(value="%thread"), threads=32)


def test_bytes_of_one_word_do_not_race() -> None:
    launch(
        ".shared .align 4 .b8 cells[128];\nmov.u32 %r1, cells;\nadd.u32 %r1, %r1, %thread;\n"
        "st.shared.u8 [%r1], %thread;"
    )


def test_atomics_do_not_race_with_each_other_but_with_plain_accesses() -> None:
    body = (
        ".shared .align 4 .b8 cell[4];\nmov.u32 %r1, cell;\nsetp.eq.u32 %p1, %thread, 0;\nmov.u32 %r2, 0;\n"
        "@%p1 st.shared.u32 [%r1], %r2;\nbar.sync 0;\natom.shared.add.u32 %r3, [%r1], 1;\n{barrier}\n"
        "ld.shared.u32 %r4, [%r1];"
    )
    launch(body.format(barrier="bar.sync 0;"))
    with pytest.raises(RaceError):
        for seed in SEEDS:
            launch(body.format(barrier=""), seed=seed)


COPY = """
.shared .align 16 .b8 tile[4096];
mov.u32 %r1, tile;
mad.lo.u32 %r2, %thread, 16, %r1;
mul.wide.u32 %wide, %thread, 16;
add.u64 %rd0, %rd0, %wide;
cp.async.cg.shared.global [%r2], [%rd0], 16;
cp.async.commit_group;
cp.async.cg.shared.global [%r2+2048], [%rd0], 16;
cp.async.commit_group;
{wait}
{barrier}
xor.b32 %r3, %thread, 64;
mad.lo.u32 %r4, %r3, 16, %r1;
ld.shared.u32 %r5, [%r4{offset}];
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_copies_that_were_waited_for(seed: int) -> None:
    launch(COPY.format(wait="cp.async.wait_group 1;", barrier="bar.sync 0;", offset=""), seed=seed)
    launch(COPY.format(wait="cp.async.wait_group 0;", barrier="bar.sync 0;", offset="+2048"), seed=seed)
    launch(COPY.format(wait="cp.async.wait_all;", barrier="bar.sync 0;", offset="+2048"), seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("wait", "offset"), (("", ""), ("cp.async.wait_group 2;", ""), ("cp.async.wait_group 1;", "+2048"))
)
def test_missing_wait(wait: str, offset: str, seed: int) -> None:
    with pytest.raises(UninitializedReadError, match=r"before the cp\.async that writes it was waited for"):
        launch(COPY.format(wait=wait, barrier="bar.sync 0;", offset=offset), seed=seed)


def test_waiting_is_not_enough_for_other_threads() -> None:
    with pytest.raises((RaceError, UninitializedReadError)):
        launch(COPY.format(wait="cp.async.wait_group 0;", barrier="", offset=""))


def test_copy_into_a_buffer_that_is_still_read() -> None:
    """The next stage's copy is issued before the barrier behind the reads."""
    again = COPY.format(wait="cp.async.wait_group 0;", barrier="bar.sync 0;", offset="")
    again += "{barrier}\ncp.async.cg.shared.global [%r2], [%rd0], 16;\ncp.async.wait_all;"
    launch(again.format(barrier="bar.sync 0;"))
    with pytest.raises(RaceError):
        for seed in SEEDS:
            launch(again.format(barrier=""), seed=seed)


def test_source_of_a_copy_changes_under_way() -> None:
    """The write is ordered behind the copy's issue, and before its wait: the copy may see either value."""
    body = (
        ".shared .align 16 .b8 tile[16];\nmov.u32 %r1, tile;\nmov.u32 %r2, 7;\nsetp.eq.u32 %p1, %thread, 0;\n"
        "setp.eq.u32 %p2, %thread, 32;\n@%p1 cp.async.cg.shared.global [%r1], [%rd0], 16;\n{early}\nbar.sync 0;\n"
        "@%p2 st.global.u32 [%rd0], %r2;\nbar.sync 0;\n{late}"
    )
    launch(body.format(early="cp.async.wait_all;", late=""), threads=64)
    # A copy that nobody waits for has no effect.
    launch(body.format(early="", late=""), threads=64)
    with pytest.raises(RaceError, match=r"source of a cp\.async, offset 0 of buffer 'buffer 0', was written"):
        launch(body.format(early="", late="cp.async.wait_all;"), threads=64)


def test_uninitialised_shared_memory() -> None:
    body = ".shared .align 16 .b8 tile[64];\nmov.u32 %r1, tile;\nld.shared.u32 %r2, [%r1+8];"
    with pytest.raises(UninitializedReadError, match="offset 8 that nothing has written"):
        launch(body)


def test_uninitialised_local_memory() -> None:
    with pytest.raises(UninitializedReadError):
        launch(
            ".local .align 4 .b8 depot[8];\nmov.u32 %r1, 0;\nst.local.u32 [depot], %r1;\nld.local.u32 %r2, [depot+4];"
        )


def test_reading_a_poisoned_buffer() -> None:
    memory = Memory()
    address = memory.register(np.zeros(4, dtype=np.float32), "accumulator", writable=True, poisoned=True)
    module = Module.from_ptx(program("ld.global.f32 %f1, [%rd0+4];", 1))
    with pytest.raises(UninitializedReadError, match="'accumulator'"):
        module.launch("program", 1, 32, 0, [address], memory)


def test_blocks_that_write_the_same_output() -> None:
    body = "mul.wide.u32 %wide, %thread, 4;\nadd.u64 %rd0, %rd0, %wide;\nst.global.u32 [%rd0], %thread;"
    for grid in (1, 2):
        memory = Memory()
        out = np.zeros(32, dtype=np.uint32)
        address = memory.register(out, "out", writable=True, poisoned=True, write_once=True)
        module = Module.from_ptx(program(body, 1))
        if grid == 1:
            module.launch("program", grid, 32, 0, [address], memory)
            continue
        with pytest.raises(RaceError, match="second write at offset 0 of the write-once buffer 'out'"):
            module.launch("program", grid, 32, 0, [address], memory)


@pytest.mark.parametrize("offset", (2048, -4, 1 << 33))
def test_global_access_out_of_bounds(offset: int) -> None:
    body = f"mov.u64 %rd5, {offset};\nadd.s64 %rd0, %rd0, %rd5;\nst.global.u32 [%rd0], %thread;"
    with pytest.raises(OutOfBoundsError, match=f"offset {offset} of buffer 'buffer 0' of 2048 bytes"):
        launch(body)


def test_access_to_no_buffer() -> None:
    with pytest.raises(OutOfBoundsError, match="no buffer"):
        launch("mov.u64 %rd0, 64;\nld.global.u32 %r1, [%rd0];")


def test_write_to_a_read_only_buffer() -> None:
    memory = Memory()
    address = memory.register(np.zeros(4, dtype=np.float32), "weights")
    with pytest.raises(OutOfBoundsError, match="read-only buffer 'weights'"):
        Module.from_ptx(program("st.global.u32 [%rd0], %thread;", 1)).launch("program", 1, 1, 0, [address], memory)


@pytest.mark.parametrize("address", ("%r1+64", "%r1+-4", "%r1+100000"))
def test_shared_access_out_of_bounds(address: str) -> None:
    with pytest.raises(OutOfBoundsError, match="of 64 bytes of shared memory"):
        launch(f".shared .align 16 .b8 tile[64];\nmov.u32 %r1, tile;\nst.shared.u32 [{address}], %r1;")


@pytest.mark.parametrize(
    "body",
    (
        "ld.global.u32 %r1, [%rd0+2];",
        "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd0+8];",
        ".shared .align 16 .b8 tile[64];\nmov.u32 %r1, tile;\nst.shared.v2.u32 [%r1+4], {%r1, %r1};",
        ".shared .align 16 .b8 tile[64];\nmov.u32 %r1, tile;\ncp.async.cg.shared.global [%r1], [%rd0+8], 16;",
        ".shared .align 16 .b8 tile[64];\nmov.u32 %r1, tile;\ncp.async.cg.shared.global [%r1+8], [%rd0], 16;",
        "atom.global.add.u64 %rd5, [%rd0+4], 1;",
    ),
)
def test_misaligned(body: str) -> None:
    with pytest.raises(MisalignedError):
        launch(body, threads=32)


def test_barrier_in_a_branch() -> None:
    body = "setp.lt.u32 %p1, %thread, {bound};\n@!%p1 bra SKIP;\nbar.sync 0;\nSKIP:\nmov.u32 %r1, 0;"
    launch(body.format(bound=128))
    with pytest.raises(DivergenceError, match="exit without it"):
        launch(body.format(bound=16), threads=32)


def test_different_barriers_in_both_branches() -> None:
    body = (
        "setp.lt.u32 %p1, %thread, 16;\n@%p1 bra LOW;\nbar.sync 0;\nbra END;\nLOW:\nbar.sync 0;\nEND:\nmov.u32 %r1, 0;"
    )
    with pytest.raises(DivergenceError, match="different collective instructions"):
        launch(body, threads=32)


def test_deadlock_of_a_barrier() -> None:
    """Warp 0 waits at barrier 1 for 96 threads of which only 64 exist."""
    with pytest.raises(DeadlockError, match=r"at barrier 1 \(PTX line \d+\)"):
        launch("bar.sync 1, 96;", threads=64)


def test_deadlock_of_crossed_barriers() -> None:
    body = (
        "setp.lt.u32 %p1, %thread, 32;\n@%p1 bra FIRST;\nbar.sync 2, 64;\nbar.sync 1, 64;\nbra END;\n"
        "FIRST:\nbar.sync 1, 64;\nbar.sync 2, 64;\nEND:\nmov.u32 %r1, 0;"
    )
    with pytest.raises(DeadlockError):
        launch(body, threads=64)


def test_barrier_with_conflicting_counts() -> None:
    body = "setp.lt.u32 %p1, %thread, 32;\nselp.u32 %r1, 64, 96, %p1;\nbar.sync 1, %r1;"
    with pytest.raises(DivergenceError, match="at the same time"):
        launch(body, threads=96)


def test_spinning_on_a_flag_that_nobody_sets() -> None:
    body = "SPIN:\nld.volatile.global.u32 %r1, [%rd0];\nsetp.eq.u32 %p1, %r1, 0;\n@%p1 bra SPIN;"
    with pytest.raises(DeadlockError, match="spin"):
        launch(body, spin_limit=100_000)


def test_waiting_for_a_block_that_cannot_start() -> None:
    body = (
        "atom.global.add.u32 %r1, [%rd0], 1;\nSPIN:\nld.acquire.gpu.global.u32 %r2, [%rd0];\n"
        "setp.lt.u32 %p1, %r2, 2;\n@%p1 bra SPIN;"
    )
    launch(body, threads=1, grid=2, concurrent_blocks=2)
    with pytest.raises(DeadlockError):
        launch(body, threads=1, grid=2, concurrent_blocks=1, spin_limit=100_000)


@pytest.mark.parametrize(
    ("body", "message"),
    (
        ("setp.lt.u32 %p1, %thread, 16;\n@%p1 shfl.sync.idx.b32 %r1, %thread, 0, 31, -1;", "exit without it"),
        ("shfl.sync.idx.b32 %r1, %thread, 0, 31, 0xffff;", "does not name it"),
        ("setp.lt.u32 %p1, %thread, 16;\n@%p1 bra A;\nbra B;\nA:\nshfl.sync.idx.b32 %r1, %thread, 20, 31, 0xffff;\nB:",
         "reads lane 20"),
        ("setp.lt.u32 %p1, %thread, 16;\n@%p1 ret;\nbar.warp.sync -1;", "have exited"),
        ("setp.lt.u32 %p1, %thread, 16;\n@%p1 mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 "
         "{%f1,%f2,%f3,%f4}, {%r1,%r2}, {%r3}, {%f1,%f2,%f3,%f4};", "exit without it"),
        ("mov.u32 %r1, 1;\nshl.b32 %r1, %r1, %thread;\nbar.warp.sync %r1;", "differs from another thread's"),
    ),
)  # fmt: skip
def test_broken_collectives(body: str, message: str) -> None:
    with pytest.raises(DivergenceError, match=message):
        launch(body, threads=32)


def test_trap() -> None:
    with pytest.raises(TrapError, match="thread 5"):
        launch("setp.eq.u32 %p1, %thread, 5;\n@%p1 trap;")


@pytest.mark.parametrize(
    "instruction",
    (
        "frobnicate.b32 %r1, %r2;",
        "add.frob.s32 %r1, %r2, %r3;",
        "add.rn.s32 %r1, %r2, %r3;",
        "ld.global.L2::cache_hint.u32 %r1, [%rd0], %rd1;",
        "cvt.rn.f8.f32 %r1, %f1;",
        "wgmma.fence.sync.aligned;",
        "cp.async.ca.shared.global [%r1], [%rd0], 12;",
        "cp.async.cg.shared.global [%r1], [%rd0], 8;",
        "add.s32 %r1, %r2;",
        "add.s32 %r1, %r2, %rd1;",
        "add.s32 %r1, %r2, %f3;",
        "add.s32 %r1, %r2, unknown;",
        "bra NOWHERE;",
        "cvt.u32.u64 %rd1, %rd0;",
        "call.uni helper, (%r1);",
        "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%r1,%r2}, {%r3}, {%r4}, {%r1,%r2};",
    ),
)
def test_unknown_instructions_are_refused_before_anything_runs(instruction: str) -> None:
    module = Module.from_ptx(program("st.global.u32 [%rd0], %thread;\n" + instruction, 2))
    memory = Memory()
    out = np.zeros(64, dtype=np.uint32)
    address = memory.register(out, "out", writable=True)
    with pytest.raises(UnsupportedInstructionError, match=rf"PTX line {line_of(instruction, 2, instruction) + 1}"):
        module.launch("program", 1, 32, 0, [address, 0], memory)
    assert not out.any()


def test_text_that_is_not_ptx() -> None:
    with pytest.raises(PtxSyntaxError, match="line 5"):
        Module.from_ptx(".version 7.8\n.target sm_80\n.address_size 64\n\nhello world;")


def test_report_names_the_place() -> None:
    body = "setp.eq.u32 %p1, %thread, 77;\nmov.u32 %r1, 1;\n@%p1 st.global.u32 [%rd0+4096], %r1;"
    line = line_of(body, 1, "@%p1 st.global")
    with pytest.raises(EmulatorError) as caught:
        launch(body, grid=3, seed=1)
    text = str(caught.value)
    assert re.search(rf"kernel program, block \(0, 0, 0\), warp 2, thread 77, PTX line {line}", text)
    assert "st.global.u32 [%rd0+4096], %r1" in text


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"grid": 0}, "grid"),
        ({"block": (1024, 2)}, "more than 1024"),
        ({"params": [1]}, "takes 2 parameters"),
        ({"params": b"123"}, "has 3 bytes"),
        ({"shared_bytes": -1}, "shared_bytes"),
    ),
)
def test_bad_launches_are_refused(options: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"grid": 1, "block": 32, "shared_bytes": 0, "params": [0, 0]} | options
    with pytest.raises(ValueError, match=message):
        Module.from_ptx(program("", 2)).launch("program", memory=Memory(), **arguments)  # type: ignore[arg-type]


# Every thread writes a word, a barrier, thread 0 raises the block's flag; the next block waits for it and reads.
CHAIN = """
mov.u32 %r1, %ctaid.x;
mul.wide.u32 %rd2, %r1, 4;
add.u64 %rd2, %rd1, %rd2;
mul.wide.u32 %wide, %thread, 4;
add.u64 %rd0, %rd0, %wide;
setp.eq.u32 %p1, %r1, 0;
setp.ne.u32 %p2, %thread, 0;
@%p1 bra WRITE;
@%p2 bra WAITED;
SPIN:
{load} %r2, [%rd2+-4];
setp.eq.u32 %p3, %r2, 0;
@%p3 bra SPIN;
{fence_after}
WAITED:
{barrier_after}
ld.global.u32 %r3, [%rd0];
WRITE:
add.u32 %r4, %r1, 1;
st.global.u32 [%rd0], %r4;
{barrier_before}
@%p2 bra END;
{fence_before}
{store} [%rd2], %r4;
END:
"""
SOUND_CHAIN = {
    "load": "ld.acquire.gpu.global.u32",
    "store": "st.release.gpu.global.u32",
    "fence_before": "",
    "fence_after": "",
    "barrier_before": "bar.sync 0;",
    "barrier_after": "bar.sync 0;",
}
FENCED_CHAIN = SOUND_CHAIN | {
    "load": "ld.volatile.global.u32",
    "store": "st.relaxed.gpu.global.u32",
    "fence_before": "membar.gl;",
    "fence_after": "fence.acq_rel.gpu;",
}


def run_chain(parts: dict[str, str], seed: int) -> None:
    out = launch(CHAIN.format(**parts), threads=64, n_pointers=2, grid=3, seed=seed, concurrent_blocks=3)
    assert (out[0, :64] == 3).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("parts", (SOUND_CHAIN, FENCED_CHAIN), ids=("release and acquire", "fences"))
def test_blocks_that_pass_data_on_in_order(parts: dict[str, str], seed: int) -> None:
    run_chain(parts, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "change",
    (
        {"barrier_before": ""},
        {"barrier_after": ""},
        {"load": "ld.relaxed.gpu.global.u32"},
        {"store": "st.relaxed.gpu.global.u32"},
        FENCED_CHAIN | {"fence_before": ""},
        FENCED_CHAIN | {"fence_after": ""},
    ),
)
def test_blocks_that_pass_data_on_without_order(change: dict[str, str], seed: int) -> None:
    with pytest.raises(RaceError, match=r"offset \d+ of buffer 'buffer 0' by thread \d+ of block \d is not ordered"):
        run_chain(SOUND_CHAIN | change, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_global_memory_within_a_block(seed: int) -> None:
    body = (
        "mul.wide.u32 %wide, %thread, 4;\nadd.u64 %rd2, %rd0, %wide;\nst.global.u32 [%rd2], %thread;\n{barrier}\n"
        "xor.b32 %r1, %thread, {distance};\nmul.wide.u32 %wide, %r1, 4;\nadd.u64 %rd2, %rd0, %wide;\n"
        "ld.global.u32 %r2, [%rd2];"
    )
    launch(body.format(barrier="bar.sync 0;", distance=32), seed=seed)
    launch(body.format(barrier="bar.warp.sync -1;", distance=1), seed=seed)
    for barrier, distance in (("", 32), ("bar.warp.sync -1;", 32), ("", 1)):
        with pytest.raises(RaceError):
            launch(body.format(barrier=barrier, distance=distance), seed=seed)


def test_overwriting_what_other_blocks_read() -> None:
    body = (
        "mov.u32 %r1, %ctaid.x;\nsetp.eq.u32 %p1, %r1, 7;\n@!%p1 ld.global.u32 %r2, [%rd0];\n"
        "setp.ne.u32 %p2, %thread, 0;\n@%p2 bra END;\n@%p1 st.global.u32 [%rd0], %r1;\nEND:"
    )
    launch(body, grid=7)
    for concurrent_blocks in (1, 8):
        with pytest.raises(RaceError, match="not ordered"):
            launch(body, grid=8, concurrent_blocks=concurrent_blocks)
