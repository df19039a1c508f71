"""Planted defects around mbarrier and the TMA unit that the emulator must report, beside their sound twins."""

from __future__ import annotations

import numpy as np
import pytest
from tools.ptx_emulator import (
    DeadlockError,
    MbarrierError,
    Memory,
    MisalignedError,
    Module,
    OutOfBoundsError,
    RaceError,
    TensorMap,
    UninitializedReadError,
)

from tests.tools.ptx_emulator.defects import SEEDS, WORDS, launch, reported, without
from tests.tools.ptx_emulator.harness import program

BFLOAT16 = 9

HEAD = """
.shared .align 1024 .b8 tile[4096];
.shared .align 8 .b8 barrier[16];
mov.u32 %r1, barrier;
mov.u32 %r2, tile;
setp.eq.u32 %p1, %thread, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r1], 1;
@%p1 fence.mbarrier_init.release.cluster;
bar.sync 0;
"""
LOAD = "@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd1], 512, [%r1];"
EXPECT = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 512;"
WAIT = """WAIT:
mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], 0;
@!%p2 bra WAIT;
"""
USE = """
mad.lo.u32 %r3, %thread, 4, %r2;
ld.shared.u32 %r4, [%r3];
mul.wide.u32 %wide, %thread, 4;
add.u64 %rd20, %rd0, %wide;
st.global.u32 [%rd20], %r4;
"""
LOADED = f"{HEAD}\n{EXPECT}\n{LOAD}\n{WAIT}\n{USE}"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_load_that_is_waited_for_is_sound(seed: int) -> None:
    np.testing.assert_array_equal(launch(LOADED, seed=seed)[:128], np.arange(1, 129))


def test_missing_wait_for_a_load() -> None:
    reported(without(LOADED, WAIT), (UninitializedReadError, RaceError), "bulk copy|nothing has written")


def test_missing_announcement_of_bytes() -> None:
    body = without(LOADED, EXPECT, "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1];")
    reported(body, (UninitializedReadError, RaceError), "bulk copy")


@pytest.mark.parametrize("announced", (256, 528))
def test_wrong_count_of_bytes(announced: int) -> None:
    reported(without(LOADED, EXPECT, EXPECT.replace("512", str(announced))), DeadlockError, "mbarrier at offset 0")


def test_wrong_parity() -> None:
    body = without(LOADED, "[%r1], 0;", "[%r1], 1;")
    reported(body, (UninitializedReadError, RaceError), "bulk copy|nothing has written")


def test_a_phase_that_never_completes_names_the_barrier() -> None:
    body = without(LOADED, EXPECT, "@%p1 mbarrier.expect_tx.shared::cta.b64 [%r1], 512;")
    reported(body, DeadlockError, r"mbarrier at offset 0 in phase 0, with 1 of 1 arrivals and 0 bytes")
    memory = Memory()
    out = np.zeros(WORDS, np.uint32)
    address = memory.register(out, "out", writable=True)
    polling = Module.from_ptx(program(body.replace("try_wait", "test_wait"), 2, "sm_90a"))
    with pytest.raises(DeadlockError, match="spin"):
        polling.launch("program", 1, 128, 0, [address, address], memory, spin_limit=100_000)


def test_uninitialised_mbarrier() -> None:
    init = "@%p1 mbarrier.init.shared::cta.b64 [%r1], 1;"
    reported(without(LOADED, init), MbarrierError, "no mbarrier was initialised")
    reported(without(LOADED, init, 2 * (init + "\n")), MbarrierError, "without mbarrier.inval")
    reported(without(LOADED, init, init.replace(", 1", ", 0")), MbarrierError, "0 arrivals")


def test_mbarrier_used_before_others_know_of_it() -> None:
    reported(without(LOADED, "bar.sync 0;"), (RaceError, MbarrierError))
    reported(without(LOADED, "@%p1 fence.mbarrier_init.release.cluster;"), RaceError, "fence.mbarrier_init")
    launch(without(LOADED, "@%p1 fence.mbarrier_init.release.cluster;", "fence.proxy.async;"))


HANDOVER = """
mad.lo.u32 %r3, %thread, 4, %r2;
st.shared.u32 [%r3], %thread;
bar.warp.sync -1;
and.b32 %r5, %thread, 31;
setp.eq.u32 %p3, %r5, 0;
@%p3 mbarrier.arrive.shared::cta.b64 _, [%r1];
WAIT:
mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], 0;
@!%p2 bra WAIT;
xor.b32 %r6, %thread, 33;
mad.lo.u32 %r6, %r6, 4, %r2;
ld.shared.u32 %r7, [%r6];
"""


def test_an_arrival_speaks_for_the_lanes_that_have_met_it() -> None:
    body = without(HEAD, "[%r1], 1;", "[%r1], 4;") + HANDOVER
    for seed in SEEDS:
        launch(body, seed=seed)
    reported(without(body, "bar.warp.sync -1;"), RaceError, "not ordered after the write")
    # Its own lane's accesses need nothing.
    alone = without(without(body, "bar.warp.sync -1;"), "xor.b32 %r6, %thread, 33;", "and.b32 %r6, %thread, 96;")
    for seed in SEEDS:
        launch(alone, seed=seed)


def test_too_many_arrivals() -> None:
    body = HEAD + "mbarrier.arrive.shared::cta.b64 _, [%r1], {};\n"
    launch(without(body, "[%r1], 1;", "[%r1], 256;").format(2))
    with pytest.raises(MbarrierError, match="3 arrivals are not what"):
        launch(without(body, "[%r1], 1;", "[%r1], 256;").format(3))


def test_overflowing_count_of_bytes() -> None:
    line = "@%p1 mbarrier.expect_tx.shared::cta.b64 [%r1], {};\n"
    launch(HEAD + line.format((1 << 20) - 1))
    with pytest.raises(MbarrierError, match="leaves its range"):
        launch(HEAD + line.format(1 << 20))


def test_ordinary_accesses_to_an_mbarrier() -> None:
    with pytest.raises(UninitializedReadError, match="belongs to an mbarrier"):
        launch(HEAD + "ld.shared.u32 %r5, [%r1];")
    with pytest.raises(RaceError, match="belongs to an mbarrier"):
        launch(HEAD + "@%p1 st.shared.u32 [%r1], %thread;")


def test_overwriting_what_a_load_writes() -> None:
    early = without(LOADED, WAIT, "mad.lo.u32 %r3, %thread, 4, %r2;\nst.shared.u32 [%r3], %thread;\n" + WAIT)
    reported(early, RaceError)
    twice = without(LOADED, LOAD, LOAD + "\n" + LOAD).replace("_, [%r1], 512", "_, [%r1], 1024")
    reported(twice, RaceError, "while a bulk copy writes it")


def test_a_load_over_what_others_still_read() -> None:
    again = f"\n{{barrier}}\n{EXPECT}\n{LOAD}\n{WAIT.replace('WAIT', 'AGAIN').replace('[%r1], 0', '[%r1], 1')}"
    for seed in SEEDS:
        launch(LOADED + again.format(barrier="bar.sync 0;"), seed=seed)
    reported(LOADED + again.format(barrier=""), (RaceError, DeadlockError), "not ordered after the read|phase 2")


def test_changing_the_source_of_a_load() -> None:
    body = without(LOADED, WAIT, "@%p1 st.global.u32 [%rd1+64], %thread;\n" + WAIT)
    outcomes = []
    for seed in SEEDS:
        try:
            launch(body, seed=seed)
        except RaceError as error:
            outcomes.append(str(error))
    assert any("source of a bulk copy" in outcome for outcome in outcomes)


def test_a_block_that_ends_before_its_load_lands() -> None:
    body = f"{HEAD}\n{EXPECT}\n{LOAD}\n"
    errors = 0
    for seed in range(20):
        try:
            launch(body, seed=seed)
        except RaceError as error:
            errors += "the block ends" in str(error)
    assert errors > 10


def test_alignment_and_bounds_of_bulk_copies() -> None:
    with pytest.raises(MisalignedError, match="not a multiple of 16"):
        launch(LOADED.replace("[%rd1], 512", "[%rd1], 520"))
    with pytest.raises(MisalignedError, match="global address"):
        launch(LOADED.replace("[%rd1], 512", "[%rd1+8], 512"))
    with pytest.raises(MisalignedError, match="shared address"):
        launch(LOADED.replace("[%r2], [%rd1]", "[%r2+8], [%rd1]"))
    with pytest.raises(OutOfBoundsError, match="array 1"):
        launch(LOADED.replace("[%rd1], 512", "[%rd1+4080], 512"))
    with pytest.raises(OutOfBoundsError, match="shared memory"):
        launch(LOADED.replace("[%r2], [%rd1]", "[%r2+3840], [%rd1]"))


TENSOR_LOAD = LOADED.replace(
    LOAD,
    "mov.s32 %r40, 0;\nmov.s32 %r41, 28;\n@%p1 cp.async.bulk.tensor.2d.shared::cluster.global.tile"
    ".mbarrier::complete_tx::bytes [%r2], [%map0, {%r40, %r41}], [%r1];",
)


def rows(n: int) -> tuple[tuple[int, TensorMap], ...]:
    """The input as `n` rows of 64 bytes; boxes of 8 rows."""
    return ((1, TensorMap(BFLOAT16, (32, n), (64,), (32, 8), swizzle=2)),)


def test_a_tensor_map_that_promises_more_than_there_is() -> None:
    launch(TENSOR_LOAD, maps=rows(30))
    launch(TENSOR_LOAD, maps=rows(64))
    with pytest.raises(OutOfBoundsError, match="array 1"):
        launch(without(TENSOR_LOAD, "%r41, 28", "%r41, 60"), maps=rows(65))


def test_tensor_maps_of_another_shape() -> None:
    with pytest.raises(OutOfBoundsError, match="rank 1"):
        launch(TENSOR_LOAD, maps=((1, TensorMap(BFLOAT16, (32,), (), (32,))),))
    with pytest.raises(MisalignedError, match="tensor map"):
        launch(without(TENSOR_LOAD, "mov.s32 %r40, 0;", "mov.s32 %r40, 0;\nadd.u64 %map0, %map0, 8;"), maps=rows(64))
    with pytest.raises(OutOfBoundsError, match="no tensor map"):
        launch(without(TENSOR_LOAD, "mov.s32 %r40, 0;", "mov.s32 %r40, 0;\nmov.u64 %map0, %rd1;"), maps=rows(64))


STORE = """
mad.lo.u32 %r3, %thread, 4, %r2;
st.shared.u32 [%r3], %thread;
fence.proxy.async.shared::cta;
bar.sync 1;
@%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%r2], 512;
@%p1 cp.async.bulk.commit_group;
@%p1 cp.async.bulk.wait_group.read 0;
bar.sync 2;
add.u32 %r5, %thread, 7;
st.shared.u32 [%r3], %r5;
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_a_store_that_is_waited_for_is_sound(seed: int) -> None:
    np.testing.assert_array_equal(launch(HEAD + STORE, seed=seed)[:128], np.arange(128))


def test_missing_proxy_fence_before_a_store() -> None:
    fence = "fence.proxy.async.shared::cta;"
    reported(HEAD + without(STORE, fence), RaceError, "without a fence.proxy.async")
    reported(HEAD + without(STORE, fence, "@%p1 " + fence), RaceError, "without a fence.proxy.async")
    late = without(without(STORE, fence), "bar.sync 1;", "bar.sync 1;\n" + fence)
    reported(HEAD + late, RaceError, "without a fence.proxy.async")
    reported(HEAD + without(STORE, "bar.sync 1;"), (RaceError, UninitializedReadError))


def test_overwriting_the_source_of_a_store() -> None:
    wait = "@%p1 cp.async.bulk.wait_group.read 0;"
    reported(HEAD + without(STORE, wait), RaceError, "may still read it")
    reported(HEAD + without(STORE, wait, wait.replace("0;", "1;")), RaceError, "may still read it")
    reported(HEAD + without(STORE, "@%p1 cp.async.bulk.commit_group;"), RaceError, "may still read it")
    reported(HEAD + without(STORE, "bar.sync 2;"), RaceError)


def test_a_thread_that_ends_before_its_store_has_read() -> None:
    body = HEAD + STORE[: STORE.index("@%p1 cp.async.bulk.wait_group")]
    reported(body, RaceError, "thread ends while the bulk copy")


def test_a_load_over_what_was_written_without_a_proxy_fence() -> None:
    write = "mad.lo.u32 %r3, %thread, 4, %r2;\nst.shared.u32 [%r3], %thread;\n{}\n"
    body = without(LOADED, "bar.sync 0;", write + "bar.sync 0;")
    launch(body.format("fence.proxy.async;"))
    reported(body.format(""), RaceError, "without a fence.proxy.async")


SUMS = """
mad.lo.u32 %r3, %thread, 4, %r2;
cvt.rn.f32.u32 %f1, %thread;
st.shared.f32 [%r3], %f1;
fence.proxy.async.shared::cta;
bar.sync 0;
@!%p1 bra DONE;
mov.u32 %r11, %ctaid.x;
setp.eq.u32 %p3, %r11, 0;
@%p3 bra STORE;
TURN:
ld.acquire.gpu.global.u32 %r12, [%rd1];
setp.eq.u32 %p4, %r12, 0;
@%p4 bra TURN;
{fence}
cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%rd0], [%r2], 128;
cp.async.bulk.commit_group;
cp.async.bulk.wait_group 0;
bra DONE;
STORE:
cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%r2], 128;
cp.async.bulk.commit_group;
{wait}
mov.u32 %r13, 1;
st.release.gpu.global.u32 [%rd1], %r13;
DONE:
"""


def test_a_block_that_adds_to_what_another_has_stored() -> None:
    """The second block needs the first one's completed store, and a proxy fence behind its acquire."""
    fence, wait = "fence.proxy.async.global;", "cp.async.bulk.wait_group 0;"

    def attempt(fence: str, wait: str, seed: int) -> np.ndarray:
        memory = Memory()
        out, turn = np.zeros(32, np.float32), np.zeros(4, np.uint32)
        params = [memory.register(out, "out", writable=True), memory.register(turn, "turn", writable=True)]
        module = Module.from_ptx(program(HEAD + SUMS.format(fence=fence, wait=wait), 2, "sm_90a"))
        module.launch("program", 2, 32, 0, params, memory, seed=seed, concurrent_blocks=2)
        return out

    for seed in SEEDS:
        np.testing.assert_array_equal(attempt(fence, wait, seed), 2 * np.arange(32))
        attempt("fence.proxy.async;", wait, seed)
        with pytest.raises(RaceError, match="buffer 'out'"):
            attempt("fence.proxy.async.shared::cta;", wait, seed)
        with pytest.raises(RaceError, match="buffer 'out'"):
            attempt(fence, wait.replace("group 0", "group.read 0"), seed)
