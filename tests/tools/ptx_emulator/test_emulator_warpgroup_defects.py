"""Planted defects around wgmma and setmaxnreg that the emulator must report, beside their sound twins."""

from __future__ import annotations

import numpy as np
import pytest
from tools.ptx_emulator import (
    DeadlockError,
    DivergenceError,
    RaceError,
    UninitializedReadError,
    UnsupportedInstructionError,
)

from tests.tools.ptx_emulator.defects import SEEDS, launch, reported, without
from tests.tools.ptx_emulator.harness import program, run

MATRIX_TILES = """
.reg .f32 %acc<4>;
.reg .b32 %a<4>;
.shared .align 1024 .b8 tile[3072];
mov.u32 %r1, tile;
mad.lo.u32 %r3, %thread, 4, %r1;
mov.u32 %r4, 0x3f803f80;
st.shared.u32 [%r3], %r4;
st.shared.u32 [%r3+512], %r4;
st.shared.u32 [%r3+1024], %r4;
st.shared.u32 [%r3+1536], %r4;
st.shared.u32 [%r3+2048], %r4;
fence.proxy.async.shared::cta;
bar.sync 0;
shr.u32 %r5, %r1, 4;
cvt.u64.u32 %rd10, %r5;
or.b64 %rd10, %rd10, 0xc000001000000000;
add.u64 %rd11, %rd10, 128;
setp.eq.u32 %p1, %r4, 0;
setp.ne.u32 %p4, %r4, 0;
"""
OPCODE = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16"
ISSUE = OPCODE + " {%acc0, %acc1, %acc2, %acc3}, %rd10, %rd11, %p1, 1, 1, 0, 0;"
FROM_REGISTERS = ISSUE.replace("%rd10, %rd11", "{%a0, %a1, %a2, %a3}, %rd11").replace("1, 1, 0, 0;", "1, 1, 0;")
MORE = ISSUE.replace("%p1", "%p4")
RESULT = """
mul.wide.u32 %wide, %thread, 4;
add.u64 %rd0, %rd0, %wide;
st.global.f32 [%rd0], %acc0;
"""
MULTIPLIED = f"""{MATRIX_TILES}
wgmma.fence.sync.aligned;
{ISSUE}
{MORE}
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
{RESULT}"""
FENCE, COMMIT = "wgmma.fence.sync.aligned;", "wgmma.commit_group.sync.aligned;"
WAIT_ALL = "wgmma.wait_group.sync.aligned 0;"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_product_that_is_waited_for_is_sound(seed: int) -> None:
    out = launch(MULTIPLIED, seed=seed)[:128]
    np.testing.assert_array_equal(out.view(np.float32), 32)


def test_accumulators_before_the_wait() -> None:
    reported(without(MULTIPLIED, WAIT_ALL), RaceError, "a wgmma accumulates in")
    reported(without(MULTIPLIED, WAIT_ALL, WAIT_ALL.replace("0;", "1;")), RaceError, "a wgmma accumulates in")
    reported(without(MULTIPLIED, COMMIT), RaceError, "a wgmma accumulates in")
    early = without(MULTIPLIED, COMMIT, COMMIT + "\nadd.f32 %acc1, %acc1, %acc1;")
    reported(early, RaceError, "a wgmma accumulates in")
    renamed = without(MULTIPLIED, COMMIT, COMMIT + "\nmov.f32 %f1, %acc1;")
    launch(renamed)
    reported(without(renamed, WAIT_ALL, "add.f32 %f2, %f1, %f1;\n" + WAIT_ALL), RaceError, "a wgmma accumulates in")


def test_a_warp_that_ends_before_its_product() -> None:
    body = MULTIPLIED[: MULTIPLIED.index(WAIT_ALL)]
    reported(body, RaceError, "was not waited for")


def test_waiting_for_all_but_the_newest_group() -> None:
    two = f"""{MATRIX_TILES}
.reg .f32 %other<4>;
{FENCE}
{ISSUE}
{COMMIT}
{ISSUE.replace("acc", "other")}
{COMMIT}
wgmma.wait_group.sync.aligned 1;
add.f32 %acc0, %acc0, %which1;
{WAIT_ALL}
{RESULT}"""
    launch(two.replace("%which", "%acc"))
    reported(two.replace("%which", "%other"), RaceError, "read of a register that a wgmma accumulates in")


def test_missing_fence_of_registers() -> None:
    reported(without(MULTIPLIED, FENCE), RaceError, "wgmma.fence")
    zeroed = without(MULTIPLIED, FENCE, FENCE + "\nmov.f32 %acc0, 0f00000000;")
    reported(zeroed, RaceError, "without a wgmma.fence")
    again = f"\n{MORE}\n{COMMIT}\nwgmma.wait_group.sync.aligned 0;\n"
    launch(MULTIPLIED + FENCE + again)
    reported(MULTIPLIED + again, RaceError, "without a wgmma.fence")


def test_accumulating_in_another_shape() -> None:
    wider = MORE.replace("n8", "n16").replace("%acc3}", "%acc3, %f1, %f2, %f3, %f4}")
    reported(without(MULTIPLIED, MORE, wider), RaceError, "another shape")
    launch(without(MULTIPLIED, MORE, f"{COMMIT}\nwgmma.wait_group.sync.aligned 0;\n{FENCE}\n{wider}"))


OPERANDS = "".join(f"mov.b32 %a{i}, %r4;\n" for i in range(4))
REGISTERS = without(without(MULTIPLIED, MORE), ISSUE, FROM_REGISTERS).replace(FENCE, OPERANDS + FENCE)


def test_operands_in_registers_before_the_wait() -> None:
    np.testing.assert_array_equal(launch(REGISTERS)[:128].view(np.float32), 16)
    early = without(REGISTERS, COMMIT, COMMIT + "\nmov.b32 %a1, 0;")
    reported(early, RaceError, "write of a register that a wgmma reads")
    launch(without(REGISTERS, COMMIT, COMMIT + "\nadd.u32 %r9, %a1, %a2;"))
    late = without(REGISTERS, FENCE + "\n", FENCE + "\nadd.u32 %a2, %a2, 0;\n")
    reported(late, RaceError, "reads a register that was accessed without a wgmma.fence")


def test_overwriting_operands_in_shared_memory() -> None:
    store = "st.shared.u32 [%r3{}], %r4;\n"
    for offset in ("", "+2048"):
        body = without(MULTIPLIED, COMMIT, COMMIT + "\n" + store.format(offset))
        reported(body, RaceError, "may still read it|not ordered after the")
    # Behind the wait a warp may write what it alone has read, and after a barrier everything.
    launch(MULTIPLIED + "bar.sync 0;\n" + store.format("+2048"))
    reported(MULTIPLIED + store.format("+2048"), RaceError, "may still read it|not ordered after the")


def test_overwriting_operands_by_a_load() -> None:
    head = f"""
.shared .align 8 .b8 barrier[8];
mov.u32 %r20, barrier;
setp.eq.u32 %p6, %thread, 0;
@%p6 mbarrier.init.shared::cta.b64 [%r20], 1;
@%p6 fence.mbarrier_init.release.cluster;
{MULTIPLIED}"""
    load = """
add.u32 %r21, %r1, 2048;
@%p6 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], 256;
@%p6 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r21], [%rd1], 256, [%r20];
LANDED:
mbarrier.try_wait.parity.shared::cta.b64 %p7, [%r20], 0;
@!%p7 bra LANDED;
"""
    launch(head + "bar.sync 0;\n" + load)
    reported(head + load, (RaceError, UninitializedReadError), "may still read it|not ordered|bulk copy")
    reported(without(head, WAIT_ALL, "bar.sync 0;\n" + load + WAIT_ALL), RaceError, "may still read it")


def test_missing_proxy_fence_before_a_product() -> None:
    fence = "fence.proxy.async.shared::cta;"
    reported(without(MULTIPLIED, fence), RaceError, "without a fence.proxy.async")
    late = without(without(MULTIPLIED, fence), "bar.sync 0;", "bar.sync 0;\n" + fence)
    reported(late, RaceError, "without a fence.proxy.async")
    reported(without(MULTIPLIED, "bar.sync 0;"), (RaceError, UninitializedReadError))


def test_part_of_a_warpgroup() -> None:
    skip = "setp.lt.u32 %p6, %thread, 96;\n@!%p6 bra DONE;\n"
    body = without(MULTIPLIED, FENCE, skip + FENCE) + "\nDONE:\n"
    reported(body, DivergenceError, "warpgroup")
    part = "setp.lt.u32 %p6, %thread, 112;\n@%p6 "
    reported(without(MULTIPLIED, FENCE, part + FENCE), DivergenceError)
    with pytest.raises(DivergenceError, match="fewer than 4 warps"):
        launch(FENCE, threads=160)


def test_warps_of_a_warpgroup_that_disagree() -> None:
    other = "setp.ge.u32 %p6, %thread, 64;\n@%p6 add.u64 %rd11, %rd11, 2;\n"
    reported(without(MULTIPLIED, FENCE, other + FENCE), DivergenceError, "disagree on the arguments")
    lanes = "and.b32 %r30, %thread, 1;\nsetp.eq.u32 %p1, %r30, 0;\n"
    reported(without(MULTIPLIED, FENCE, lanes + FENCE), DivergenceError, "threads of a warp disagree")


SETMAXNREG = """
setp.ge.u32 %p1, %thread, 128;
@%p1 bra CONSUMER;
setmaxnreg.dec.sync.aligned.u32 {producer};
bra DONE;
CONSUMER:
setmaxnreg.inc.sync.aligned.u32 {consumer};
DONE:
"""
BOUNDS = "\n.maxntid 384, 1, 1\n.minnctapersm 1\n"


def test_register_budget() -> None:
    def attempt(producer: int, consumer: int, bounds: str = BOUNDS) -> None:
        for seed in SEEDS:
            launch(SETMAXNREG.format(producer=producer, consumer=consumer), 384, seed, directives=bounds)

    attempt(24, 240)
    attempt(40, 232)
    with pytest.raises(DeadlockError, match="registers are free"):
        attempt(32, 240)
    with pytest.raises(DivergenceError, match=r"setmaxnreg\.inc from 168 to 160"):
        attempt(24, 160)
    with pytest.raises(DivergenceError, match=r"setmaxnreg\.dec from 168 to 176"):
        attempt(176, 240)
    with pytest.raises(DivergenceError, match="launch bounds"):
        attempt(24, 240, "")
    for wrong in (16, 100, 264):
        with pytest.raises(UnsupportedInstructionError, match=f"register count {wrong}"):
            attempt(24, wrong)


def test_part_of_a_warpgroup_changes_its_registers() -> None:
    body = SETMAXNREG.format(producer=24, consumer=240).replace("%thread, 128", "%thread, 160")
    with pytest.raises((DivergenceError, DeadlockError)):
        launch(body, 384, directives=BOUNDS)


def test_other_targets_do_not_know_the_instructions() -> None:
    registers = SETMAXNREG.format(producer=24, consumer=240)
    for body, target in ((MULTIPLIED, "sm_90"), ("fence.proxy.async;", "sm_80"), (registers, "sm_100a")):
        with pytest.raises(UnsupportedInstructionError, match=f"target {target}"):
            run(program(body, 2, target), [np.zeros(4, np.uint32)] * 2, 128)
