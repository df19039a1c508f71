"""What every test shares: markers and what they mean, threads of parallel workers, and the list of what a run left out.

A test that cannot run here is skipped with a reason. Tests marked `slow` are deselected by `make test` (with
`-m "not slow"`). The summary at the end of a run counts all of them.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Sequence
from typing import Any

# Parallel workers share the cores. OpenMP reads this once, when torch is loaded.
if "PYTEST_XDIST_WORKER" in os.environ:
    _share = len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _share)))

import hypothesis
import pytest
import torch
from tools.nvcc import MISSING, find_nvcc

hypothesis.settings.register_profile("quick", max_examples=60, deadline=None)
hypothesis.settings.register_profile("brief", max_examples=25, deadline=None)
hypothesis.settings.register_profile("thorough", max_examples=1000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

SLOW = "slow, run by `make test-slow`"
_deselected: Counter[str] = Counter()
_connect = socket.socket.connect
_network_allowed = False


@pytest.hookimpl(tryfirst=True)  # before -m selects by them
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    has_nvcc = find_nvcc() is not None
    for item in items:
        if "ptx_emulator" in item.path.parts:
            item.add_marker(pytest.mark.emulator)
        if not has_nvcc and item.get_closest_marker("needs_nvcc") is not None:
            item.add_marker(pytest.mark.skip(reason=MISSING))


def _connect_here(self: socket.socket, address: Any) -> None:
    """``socket.connect`` of a process that may reach itself only."""
    far = self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost")
    if far and not _network_allowed:
        raise RuntimeError(f"a test reaches {address[0]}: only tests marked `network` may")
    _connect(self, address)


def pytest_configure() -> None:
    socket.socket.connect = _connect_here  # type: ignore[method-assign]


def pytest_runtest_setup(item: pytest.Item) -> None:
    global _network_allowed
    _network_allowed = item.get_closest_marker("network") is not None


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    _deselected.update(SLOW for item in items if item.get_closest_marker("slow") is not None)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker tells the process that prints the summary."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["deselected"] = dict(_deselected)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """All workers collect, and deselect, the same tests."""
    _deselected.update(Counter(getattr(node, "workeroutput", {}).get("deselected", {})) - _deselected)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    left_out = Counter(_deselected)
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        left_out[reason.removeprefix("Skipped: ")] += 1
    if left_out:
        terminalreporter.section("left out")
        for reason, count in left_out.most_common():
            terminalreporter.write_line(f"{count} test{'s' if count > 1 else ''}: {reason}")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
