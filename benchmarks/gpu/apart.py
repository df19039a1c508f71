"""Cases of a stage under a limit each: ``python -m benchmarks.gpu.apart MODULE ARGUMENTS``.

The module goes through its cases in a process of its own and names each before it runs. A case that hangs, or that
takes the process with it, is lost alone: the cases behind it run in a fresh process. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# What a module says before a case, and with which statuses it ends.
NEXT = "next: "
RIGHT, WRONG = 0, 3
# A case has failed, and with it the device's context: the cases behind it need a fresh process.
AGAIN = 4
START_SECONDS = 90.0
POLL_SECONDS = 0.1


def add_options(command: argparse.ArgumentParser) -> None:
    """The options that a module is started with again."""
    command.add_argument("--first", type=int, default=0, help="number of the case to begin with")
    command.add_argument("--lost", default="", help="what became of the case before that one")


@dataclass(frozen=True)
class _Run:
    """One process: the last case that it named, its exit status, and what went wrong, if anything did."""

    reached: int
    status: int
    trouble: str = ""


def run_apart(command: Callable[[int, str], Sequence[str]], case_seconds: float, start_seconds: float) -> int:
    """Runs a module until each of its cases has ended or is lost.

    Args:
        command: From the number of the first case, and what became of the one before it, if it was lost.
        case_seconds: Limit of a case.
        start_seconds: Limit of the time until the first case is named.

    Returns:
        0 if every case was right; 1 otherwise, and if no case could be started.
    """
    first, lost, failed = 0, "", False
    while True:
        run = _run_once(command(first, lost), first, case_seconds, start_seconds)
        if run.status in (RIGHT, WRONG) and not run.trouble:
            return int(failed or run.status == WRONG)
        failed, lost = True, run.trouble
        if lost:
            print(f"LOST: {lost}", flush=True)
        if run.reached < first:
            return 1
        first = run.reached + 1


def _run_once(command: Sequence[str], first: int, case_seconds: float, start_seconds: float) -> _Run:
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        with process.stdout as output:
            for line in output:
                lines.put(line)

    threading.Thread(target=read, daemon=True).start()
    reached, limit = first - 1, start_seconds
    end = time.monotonic() + limit
    while True:
        # Before the look at its output: children that outlive it may keep that open.
        status = process.poll()
        if status is None and time.monotonic() > end:
            process.kill()
            return _Run(reached, process.wait(), f"did not end within {limit:g} s")
        try:
            line = lines.get(timeout=POLL_SECONDS)
        except queue.Empty:
            if status is None:
                continue
            known = status in (RIGHT, WRONG, AGAIN)
            return _Run(reached, status, "" if known else f"the process ended with status {status}")
        print(line, end="", flush=True)
        if line.startswith(NEXT):
            reached, limit = reached + 1, case_seconds
            end = time.monotonic() + limit


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    command = argparse.ArgumentParser(prog="python -m benchmarks.gpu.apart", description=__doc__)
    command.add_argument("--case-seconds", type=float, required=True)
    command.add_argument("--start-seconds", type=float, default=START_SECONDS)
    command.add_argument("module")
    command.add_argument("arguments", nargs=argparse.REMAINDER, help="of the module; of --seconds it gets what is left")
    arguments = command.parse_args(argv)
    timed = argparse.ArgumentParser(add_help=False)
    timed.add_argument("--seconds", type=float)
    known, rest = timed.parse_known_args(arguments.arguments)
    begin = time.monotonic()

    def again(first: int, lost: str) -> list[str]:
        words = [sys.executable, "-u", "-m", arguments.module, *rest, "--first", str(first), "--lost", lost]
        if known.seconds is not None:
            words += ["--seconds", str(known.seconds - (time.monotonic() - begin))]
        return words

    return run_apart(again, arguments.case_seconds, arguments.start_seconds)


if __name__ == "__main__":
    sys.exit(main())
