"""What overlapping saves: two processes in network namespaces of their own, joined by a cable of limited bandwidth.

    sudo python -m benchmarks.distributed.overlap --out DIR

Each round times a step (forward and backward of one attention module) with transfers that overlap with what is
computed, and one in which every transfer is waited for where it is started; the result is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMESPACES = ("anchor0", "anchor1")
ADDRESSES = ("10.234.5.1", "10.234.5.2")
PORT = 29511


@dataclass(frozen=True)
class Sizes:
    """What a process holds: its anchors, its queries, and the width of the tokens."""

    anchors: int
    queries: int
    dim: int
    heads: int


FULL = Sizes(anchors=256, queries=8192, dim=1024, heads=16)
QUICK = Sizes(anchors=16, queries=64, dim=64, heads=2)


@contextmanager
def limited_network(megabits: float) -> Iterator[None]:
    """Two network namespaces with one end of a virtual cable each, through which so many megabits pass a second."""
    commands = [f"ip netns add {name}" for name in NAMESPACES]
    commands.append(
        f"ip link add {NAMESPACES[0]} netns {NAMESPACES[0]} type veth peer {NAMESPACES[1]} netns {NAMESPACES[1]}"
    )
    for name, address in zip(NAMESPACES, ADDRESSES, strict=True):
        commands += [
            f"ip -n {name} address add {address}/24 dev {name}",
            f"ip -n {name} link set {name} up",
            f"ip -n {name} link set lo up",
            f"tc -n {name} qdisc add dev {name} root tbf rate {megabits}mbit burst 64kb latency 400ms",
        ]
    try:
        for command in commands:
            subprocess.run(command.split(), check=True)
        yield
    finally:
        for name in NAMESPACES:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def run(sizes: Sizes, rounds: int, megabits: float) -> dict[str, Any]:
    """Times the steps in both processes, and returns what the first one measured."""
    with limited_network(megabits):
        workers = []
        for rank, name in enumerate(NAMESPACES):
            arguments = json.dumps([rank, vars(sizes), rounds])
            workers.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, sys.executable, "-m", __spec__.name, "--worker", arguments],
                    stdout=subprocess.PIPE,
                    text=True,
                    env=os.environ | {"GLOO_SOCKET_IFNAME": name},
                )
            )
        outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise RuntimeError(f"a process failed: exit statuses {[worker.returncode for worker in workers]}")
    seconds: dict[str, list[float]] = json.loads(outputs[0].splitlines()[-1])
    result: dict[str, Any] = {"megabits": megabits, "sizes": vars(sizes), "rounds": rounds, "seconds": seconds}
    for case in ("gathered", "ring"):
        pairs = list(zip(seconds[f"{case}, overlapping"], seconds[f"{case}, waiting"], strict=True))
        result[case] = {
            "overlapping": statistics.median(pair[0] for pair in pairs),
            "waiting": statistics.median(pair[1] for pair in pairs),
            "saved_share": statistics.median(1 - pair[0] / pair[1] for pair in pairs),
        }
    return result


def work(rank: int, sizes: Sizes, rounds: int) -> dict[str, list[float]]:
    """What one process does."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    from anchor_attention import SelfAnchorAttention, TokenSpec
    from anchor_attention.distributed import SequenceParallelAttention

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://{ADDRESSES[0]}:{PORT}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    specs = [TokenSpec("volume_anchors", sizes.anchors), TokenSpec("volume_queries", sizes.queries)]
    x = torch.randn(1, sizes.anchors + sizes.queries, sizes.dim)
    modules = {}
    for case in ("gathered", "ring"):
        module = SelfAnchorAttention(dim=sizes.dim, num_heads=sizes.heads, branches=("volume",))
        modules[case] = parallelize_module(module, mesh, SequenceParallelAttention(case=case, agree="once"))
    seconds: dict[str, list[float]] = {}
    for step in range(rounds + 1):
        for case, module in modules.items():
            for mode in ("overlapping", "waiting"):
                dist.barrier()
                begin = time.perf_counter()
                with waiting() if mode == "waiting" else overlapping():
                    module(x, specs).sum().backward()
                if step:  # the first one starts threads and agrees on sizes
                    seconds.setdefault(f"{case}, {mode}", []).append(time.perf_counter() - begin)
    dist.barrier()
    return seconds


@contextmanager
def overlapping() -> Iterator[None]:
    """As it is."""
    yield


@contextmanager
def waiting() -> Iterator[None]:
    """Every transfer is waited for where it is started."""
    from anchor_attention.distributed import ring, sharded_steps
    from anchor_attention.distributed.collectives import wait
    from anchor_attention.distributed.gathered import Gathering

    class Waiting(Gathering):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self._arrived = super().finish()

        def finish(self) -> Any:
            return self._arrived

    send_on = ring.send_on

    def send_and_wait(*args: Any) -> Any:
        return wait(send_on(*args), args[-1])

    sharded_steps.Gathering, ring.send_on = Waiting, send_and_wait  # type: ignore[misc]
    try:
        yield
    finally:
        sharded_steps.Gathering, ring.send_on = Gathering, send_on  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabits", type=float, default=100.0, help="bandwidth, per second and direction")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--out", type=Path, help="folder for overlap.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        rank, sizes, rounds = json.loads(arguments.worker)
        print(json.dumps(work(rank, Sizes(**sizes), rounds)))
        return
    result = run(QUICK if arguments.quick else FULL, arguments.rounds, arguments.megabits)
    for case in ("gathered", "ring"):
        print(
            f"{case}: {result[case]['overlapping']:.2f} s overlapping, {result[case]['waiting']:.2f} s waiting, "
            f"{result[case]['saved_share']:.0%} saved"
        )
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "overlap.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
