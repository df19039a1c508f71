"""Stages of the suite: each is a process of its own, so that none can take the others' results or time with it.

Nothing here imports torch: a library that can't be loaded is a failed stage, not the end of the suite.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STAGES = "stages.json"
# Of the library: pins the kernels for every architecture.
KERNELS_VARIABLE = "ANCHOR_ATTENTION_CUDA_KERNELS"
PASSED, FAILED, TIMED_OUT, MISSING = "passed", "failed", "timed out", "missing"
LAST_LINES = 5
# What a stage that keeps its own time leaves for its start and its last case.
OWN_TIME_SHARE = 0.8
KILL_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Stage:
    """One process of the suite.

    Attributes:
        name: Its name, and that of its log.
        command: Its arguments behind the Python interpreter, or a whole command when ``program`` is set.
        weight: Its share of the time that is left when it starts, relative to the weights of all that are left.
        decides: Whether the suite fails with it: it says whether results are right.
        missing: Why it can't run here; it is recorded and not run.
        program: What runs the interpreter, the interpreter's path coming behind it.
        keeps_time: Whether it takes ``--seconds`` and ends by itself before its limit.
        variables: Environment variables on top of the suite's own.
        makes: Files that it leaves. Those of an earlier run go first: they would pass for this one's.
    """

    name: str
    command: tuple[str, ...]
    weight: float = 1.0
    decides: bool = False
    missing: str = ""
    program: tuple[str, ...] = ()
    keeps_time: bool = False
    variables: dict[str, str] = field(default_factory=dict)
    makes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a stage: how it ended, how long it took of how long it had (seconds), and its last words."""

    name: str
    status: str
    decides: bool
    seconds: float
    limit_seconds: float
    exit_status: int | None
    last_lines: list[str]

    @property
    def fails_suite(self) -> bool:
        """Whether the suite's exit status tells of it: a check that did not pass where it could run."""
        return self.decides and self.status in (FAILED, TIMED_OUT)


def run_stages(
    stages: Sequence[Stage], folder: Path, seconds: float, report: Callable[[Outcome], None] | None = None
) -> list[Outcome]:
    """Runs stages one after the other; what one leaves of its time goes to those behind it.

    Args:
        stages: In order.
        folder: Where logs and, after every stage, all outcomes so far are written.
        seconds: Time for all of them.
        report: Called with every outcome as it comes.
    """
    end = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for i, stage in enumerate(stages):
        weights = sum(other.weight for other in stages[i:] if not other.missing)
        remaining = max(0.0, end - time.monotonic())
        outcomes.append(run_stage(stage, folder, remaining * stage.weight / weights if weights else 0.0))
        write_json(folder / STAGES, [asdict(outcome) for outcome in outcomes])
        if report is not None:
            report(outcomes[-1])
    return outcomes


def run_stage(stage: Stage, folder: Path, limit: float) -> Outcome:
    """Runs one stage for at most ``limit`` seconds; its output goes to ``<name>.log``."""
    for name in stage.makes:
        (folder / name).unlink(missing_ok=True)
    if stage.missing:
        return Outcome(stage.name, MISSING, stage.decides, 0.0, limit, None, [stage.missing])
    command = [*stage.program, sys.executable, *stage.command]
    if stage.keeps_time:
        command += ["--seconds", f"{OWN_TIME_SHARE * limit:.1f}"]
    log = folder / f"{stage.name}.log"
    begin = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | stage.variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            exit_status: int | None = process.wait(timeout=limit)
            status = FAILED if exit_status else PASSED
        except subprocess.TimeoutExpired:
            exit_status, status = None, TIMED_OUT
        finally:
            _end(process)
    text = log.read_text(errors="replace").splitlines()
    lines = [line for line in text if line.strip()][-LAST_LINES:]
    return Outcome(stage.name, status, stage.decides, time.monotonic() - begin, limit, exit_status, lines)


def write_json(path: Path, content: Any) -> None:
    """Writes a file that is whole at any time: whoever is stopped in between leaves the one before."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a stage with everything that it started: a profiler's child would keep the GPU busy."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        if process.poll() is not None:
            continue
        try:
            process.wait(timeout=KILL_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
