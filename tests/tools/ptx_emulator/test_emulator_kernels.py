"""Every barrier and wait of the shipped kernels is needed, and the emulator notices when one is gone."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from tools.cuda_plans import KernelRun, attention_backward, attention_forward
from tools.cuda_plans import run as plans
from tools.cuda_plans.build import ptx_file
from tools.cuda_plans.run import to_storage
from tools.ptx_emulator import EmulatorError, Module

pytestmark = [pytest.mark.slow, pytest.mark.needs_nvcc]

SYNCHRONISATION = re.compile(r"(bar\.sync|bar\.warp\.sync|cp\.async\.wait_group|cp\.async\.wait_all)\b[^;]*;")
ENTRY = re.compile(r"\.entry\s+(\w+)")
SEEDS = range(4)
HEAD_DIM = 64


def run_passes(dtype: str, seed: int, backward: bool) -> None:
    """A forward and perhaps a backward whose key tiles are shared by several blocks, which add up in order."""
    rng = np.random.default_rng(0)
    shapes = ((1, 600, 1, HEAD_DIM), (1, 100, 1, HEAD_DIM), (1, 100, 1, HEAD_DIM))
    q, k, v = (to_storage(rng.standard_normal(shape), dtype) for shape in shapes)
    table = [((0, 600), [(0, 100)])]
    run = KernelRun(seed=seed)
    out, lse = np.zeros_like(q), np.zeros((1, 1, 600), dtype=np.float32)
    if backward:
        attention_backward(dtype, q, k, v, table, out, lse, q, run=run)
    else:
        attention_forward(dtype, q, k, v, table, run=run)


@pytest.mark.parametrize(("precision", "dtype"), (("bfloat16", "bfloat16"), ("tf32x3", "float32")))
def test_no_synchronisation_can_go(precision: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    instantiation = f"attention_{precision}_{HEAD_DIM}"
    text = Path(ptx_file(instantiation)).read_text()
    shipped = plans._module
    current = Module.from_ptx(text)
    monkeypatch.setattr(plans, "_module", lambda name: current if name == instantiation else shipped(name))
    for backward in (False, True):
        run_passes(dtype, 0, backward)

    entries = [(match.start(), match[1]) for match in ENTRY.finditer(text)]
    unnoticed = []
    mutations = list(SYNCHRONISATION.finditer(text))
    for place in mutations:
        kernel = [name for start, name in entries if start < place.start()][-1]
        current = Module.from_ptx(text[: place.start()] + text[place.end() :])
        for seed in SEEDS:
            try:
                run_passes(dtype, seed, "backward" in kernel)
            except EmulatorError:
                break
        else:
            unnoticed.append(f"{place[0]} of {kernel}, PTX line {text.count(chr(10), 0, place.start()) + 1}")
    assert mutations
    assert not unnoticed
