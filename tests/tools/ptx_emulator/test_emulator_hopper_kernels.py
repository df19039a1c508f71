"""The emulator notices when a barrier, a wait or a fence of the sm_90a kernels is gone, or it is known why not."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from tools.cuda_plans import KernelRun
from tools.cuda_plans import run as plans
from tools.cuda_plans.build import ptx_file
from tools.cuda_plans.run import Table, to_storage
from tools.ptx_emulator import EmulatorError, Module
from tools.ptx_emulator.ptx import InstructionText

from tests.cuda.kernel_cases import Case, make_case

pytestmark = [pytest.mark.slow, pytest.mark.needs_nvcc]

DTYPE, HEAD_DIM = "bfloat16", 64
SEEDS = range(4)
SYNCHRONISATION = re.compile(
    r"bar\.(sync|arrive|warp\.sync)|mbarrier\.(arrive|try_wait)|fence\.(proxy\.async|mbarrier_init)"
    r"|wgmma\.(fence|commit_group|wait_group)|cp\.async\.bulk\.(wait_group|commit_group)|ld\.acquire|st\.release"
)
_LOCATION = re.compile(r"\.loc\s+(\d+) (\d+) (\d+)(?:.*inlined_at (\d+) (\d+) (\d+))?")
Place = tuple[int, int, int]  # file, line, column


@dataclass(frozen=True)
class Operation:
    """A synchronisation as the source has it: its copies in PTX, the chain of calls that leads to it."""

    opcode: str
    chain: tuple[Place, ...]
    text: str


class Kernel:
    """One entry of an instantiation whose instructions can be replaced."""

    def __init__(self, instantiation: str, pattern: str) -> None:
        self.instantiation = instantiation
        text = Path(ptx_file(instantiation)).read_text()
        self._lines = text.splitlines()
        self.module = Module.from_ptx(text)
        self.name = self.module.find(pattern)
        self.body = self.module.text.kernels[self.name].instructions

    def operations(self) -> dict[Operation, list[int]]:
        """Instructions of every synchronisation; a loop's peeled or unrolled copies are one."""
        result: dict[Operation, list[int]] = defaultdict(list)
        for index, instruction in enumerate(self.body):
            if SYNCHRONISATION.match(instruction.opcode):
                chain = tuple(self._chain(instruction.line))
                text = " < ".join(_source_line(self.module.text.files[file], line) for file, line, _ in chain)
                result[Operation(instruction.opcode, chain, text)].append(index)
        return dict(result)

    def _chain(self, line: int) -> Iterator[Place]:
        wanted: Place | None = None
        for text in reversed(self._lines[: line - 1]):
            match = _LOCATION.search(text)
            if match is None or match[2] == "0":
                continue
            file, row, column, *outer = (int(number) if number else None for number in match.groups())
            if wanted not in (None, (file, row, column)):
                continue
            yield file, row, column
            if outer[0] is None:
                return
            wanted = (outer[0], outer[1], outer[2])

    @contextmanager
    def without(self, indices: list[int]) -> Iterator[None]:
        originals = {index: self.body[index] for index in indices}
        for index, instruction in originals.items():
            self.body[index] = disarmed(instruction)
        self.module._lowered.clear()
        try:
            yield
        finally:
            for index, instruction in originals.items():
                self.body[index] = instruction
            self.module._lowered.clear()


@cache
def _source(file: str) -> list[str]:
    return Path(file).read_text().splitlines()


def _source_line(file: str, line: int) -> str:
    return _source(file)[line - 1].strip()


def disarmed(instruction: InstructionText) -> InstructionText:
    """An instruction that does the same but for the synchronisation."""
    opcode, operands = instruction.opcode, instruction.operands
    if opcode.startswith("mbarrier.try_wait"):
        return replace(instruction, opcode="setp.eq.u32", operands=[operands[0], "0", "0"])
    if ".expect_tx" in opcode:
        return replace(instruction, opcode=opcode.replace(".expect_tx", ""), operands=operands[:2])
    if opcode.startswith(("ld.", "st.")):
        return replace(instruction, opcode=re.sub("acquire|release", "relaxed", opcode))
    return replace(instruction, opcode="nanosleep.u32", operands=["0"])


def hopper_case(n_queries: int, n_keys: int, table: Table, keep: float | None = None, heads: int = 2) -> Case:
    return make_case(
        DTYPE, n_queries=n_queries, n_keys=n_keys, heads=heads, head_dim=HEAD_DIM, table=table, generation="sm90",
        **({} if keep is None else {"keep": keep}),
    )  # fmt: skip


def forward_runs() -> list[Callable[[int], None]]:
    """Whole and partial tiles, warpgroups without rows, items without keys, blocks that take several items.

    Of items without keys many in a row, while the warp that loads the values is late.
    """
    table: Table = [((0, 270), [(0, 130), (150, 400)]), ((270, 330), [(10, 200)]), ((330, 390), []),
                    ((390, 500), [(0, 128)])]  # fmt: skip
    without_keys = hopper_case(1700, 100, [((0, 1600), []), ((1600, 1700), [(0, 100)])], heads=1)
    cases = [(hopper_case(500, 400, table), ()), (hopper_case(200, 400, [((0, 200), [(0, 400)])], keep=0.9), ()),
             (without_keys, (1,))]  # fmt: skip

    def run(case: Case, late: tuple[int, ...], seed: int) -> None:
        case.run = KernelRun(generation="sm90", seed=seed, multiprocessors=1, reluctant_warps=late)
        case.forward()

    return [lambda seed, case=case, late=late: run(case, late, seed) for case, late in cases]


def backward_runs(*wanted: str) -> list[Callable[[int], None]]:
    """Tiles that several blocks add to in turn, short tiles, splits over queries, tiles without keys."""
    table: Table = [((0, 200), [(0, 130), (10, 300)]), ((200, 330), [(0, 128)]), ((340, 370), [(350, 450)])]
    masked = hopper_case(200, 300, [((0, 200), [(0, 300)])], heads=1)
    masked.key_mask = np.ones((1, 300), bool)
    masked.key_mask[0, :256] = False
    # On one multiprocessor all blocks add to one sum of a tile.
    cases = [(hopper_case(400, 450, table, keep=0.8, heads=1), 1),
             (hopper_case(1300, 40, [((0, 1300), [(0, 40)])], heads=1), 132), (masked, 1)]  # fmt: skip
    runs = []
    for case, multiprocessors in cases:
        case.wanted = wanted
        reference = case.reference()
        out = np.ascontiguousarray(to_storage(reference.out.value, DTYPE))
        runs.append((case, out, np.ascontiguousarray(reference.lse.value, np.float32), multiprocessors))

    def run(case: Case, out: np.ndarray, lse: np.ndarray, multiprocessors: int, seed: int) -> None:
        case.run = KernelRun(generation="sm90", seed=seed, multiprocessors=multiprocessors, concurrent_blocks=4)
        case.backward(out, lse)

    return [lambda seed, arguments=arguments: run(*arguments, seed) for arguments in runs]


# Where the loss goes unnoticed, by opcode and source: at how many places at most, and why.
UNNOTICED = {
    "forward": {
        r"try_wait.* wait_for\(control\(\).k_full\); < pass_over\(\);": (
            2,
            "the turn that comes next is passed on by a warpgroup that has waited; without keys, the caller has waited",
        ),
        r"try_wait.* wait_for\(control\(\).v_full\); < pass_over\(\); < ForwardConsumer": (
            1,
            "another warpgroup has rows of the item and waits for its values; taking turns keeps this one beside it",
        ),
        r"bar\.warp\.sync .*release\(control\(\).v_empty, ring_.stage\); < pass_over": (
            2,
            "nothing was read since the release of the keys",
        ),
        r"bar\.warp\.sync .*release\(control\(\).v_empty, [\w.]+\); < loaded = attend": (
            2,
            "wgmma.wait_group has just done that",
        ),
        r"bar\.sync .*synchronise_warpgroup\(\); < write_rotated_q": (
            1,
            "taking the turn is a barrier of the same warps",
        ),
        r"bar\.sync .*warpgroup_ == 0\) take_turn": (1, "it only leaves the barrier empty when the kernel ends"),
        r"bar\.warp\.sync .*__syncwarp\(\); < load_(keys|values)": (
            2,
            "one lane alone writes; it keeps the warp together",
        ),
    },
    "backward": {
        r"wgmma\.fence.*multiply_tiles": (2, "the registers were last accessed before the fence of earlier products"),
        r"fence\.proxy\.async\.global .*< add_query_gradients": (
            1,
            "behind the wait: the sums are visible to the thread",
        ),
        r"bar\.warp\.sync .*arrive_as_warp\(block.barriers.empty": (1, "wgmma.wait_group has just done that"),
        r"bar\.warp\.sync .*< pass_turns": (2, "needed, but between blocks the clocks do not tell lanes apart"),
    },
    "backward_key": {
        r"wgmma\.fence.*multiply_tiles": (2, "the registers were last accessed before the fence of earlier products"),
        r"wgmma\.wait_group.*wgmma_wait<1>\(\); < multiply_tiles": (
            1,
            "the next wait comes before anything touches the registers",
        ),
        r"bar\.warp\.sync .*arrive_as_warp\(block.barriers.empty": (1, "wgmma.wait_group has just done that"),
    },
}
KERNELS = {
    "forward": (f"sm90_forward_{DTYPE}_{HEAD_DIM}", "attention_forward", forward_runs),
    "backward": (
        f"sm90_backward_{DTYPE}_{HEAD_DIM}",
        "attention_backward.*Bfloat16.*QueryGradientE1",
        lambda: backward_runs("q", "k", "v"),
    ),
    "backward_key": (
        f"sm90_backward_{DTYPE}_{HEAD_DIM}",
        "attention_backward.*Bfloat16.*QueryGradientE0",
        lambda: backward_runs("k", "v"),
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_no_synchronisation_can_go(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    instantiation, pattern, make_runs = KERNELS[name]
    kernel = Kernel(instantiation, pattern)
    shipped = plans._module
    monkeypatch.setattr(plans, "_module", lambda other: kernel.module if other == instantiation else shipped(other))
    runs = make_runs()
    for run in runs:
        for seed in SEEDS:
            run(seed)

    def noticed(indices: list[int]) -> bool:
        with kernel.without(indices):
            for seed in SEEDS:
                for run in runs:
                    try:
                        run(seed)
                    except EmulatorError:
                        return True
        return False

    operations = kernel.operations()
    unnoticed = [
        f"{operation.opcode} {operation.text}" for operation, indices in operations.items() if not noticed(indices)
    ]
    explained = {place: sum(re.search(place, text) is not None for text in unnoticed) for place in UNNOTICED[name]}
    unexplained = [text for text in unnoticed if not any(re.search(place, text) for place in UNNOTICED[name])]
    assert operations
    assert not unexplained, "\n".join(unexplained)
    for place, n in explained.items():
        assert 1 <= n <= UNNOTICED[name][place][0], f"{n} places like {place} go unnoticed"
