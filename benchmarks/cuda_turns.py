"""What waiting for turns costs the Hopper backward, predicted from its schedules: ``python -m benchmarks.cuda_turns``.

Blocks start in the order of their items as multiprocessors become free, a tile takes what its slowest unit needs at
full rate, and an addition waits for its turn. Nothing here is measured: the rates are those of docs/hopper_backward.md,
and how long passing a turn on takes is a parameter. Writes one file, which ``--out`` names.
"""

from __future__ import annotations

import argparse
import heapq
import json
from pathlib import Path
from typing import Any

from tools.cuda_plans import plans

RESULT = Path(__file__).parent / "results" / "emulated" / "cuda_turns.json"
# Tokens (queries, and as many keys), heads, head size.
CASES = ((512, 3, 64), (1024, 3, 64), (2048, 3, 64), (4096, 3, 64), (8192, 3, 64), (2048, 12, 64), (2048, 3, 128),
         (16384, 12, 64))  # fmt: skip
TURN_US = (1.0, 2.0, 3.0)
MULTIPROCESSORS, CLOCK_GHZ, TERABYTES_PER_S = 132, 1.7, 3.0
KEYS, GROUP_WORDS, TURN_WORDS = 128, 6, 4
# Queries of a tile, cycles of a multiprocessor per 1000 scores.
TILES = {64: (128, 172), 128: (64, 359)}
# Until shared memory may be written to again.
READ_US = 0.3


def walks(schedule: dict[str, Any], queries_per_tile: int) -> list[list[tuple[int, int]]]:
    """Of every item of a head, in the order in which they are taken: the sums it adds to, and when."""
    words, n_groups = schedule["keys"], schedule["n_key_groups"]
    first_range = GROUP_WORDS * (n_groups + 1)
    first_turn = first_range + 2 * schedule["n_ranges"]
    items = []
    for g in range(n_groups):
        _, begin, end, first, n_splits, _ = words[GROUP_WORDS * g : GROUP_WORDS * (g + 1)]
        for tile in range(-(-(end - begin) // KEYS)):
            walk = []
            for r in range(first, words[GROUP_WORDS * (g + 1) + 3]):
                q_begin, q_end = words[first_range + 2 * r : first_range + 2 * r + 2]
                at, sums, turn, per_tile = words[first_turn + TURN_WORDS * r : first_turn + TURN_WORDS * (r + 1)]
                which, turn = divmod(turn + tile * per_tile, schedule["turns_per_sum"])
                walk += [(at + n * sums + which, turn) for n in range(-(-(q_end - q_begin) // queries_per_tile))]
            items += [walk[len(walk) * s // n_splits : len(walk) * (s + 1) // n_splits] for s in range(n_splits)]
    return items


def microseconds(schedule: dict[str, Any], heads: int, head_dim: int, turn_us: float) -> float:
    """Until the last block ends, and the sums are read."""
    queries, cycles = TILES[head_dim]
    tile_us = queries * KEYS / 1000 * cycles / CLOCK_GHZ / 1000
    free = [0.0] * MULTIPROCESSORS
    added: dict[tuple[int, int], float] = {}
    for walk in walks(schedule, queries):
        for head in range(heads):
            multiplied = buffer_free = warp_free = heapq.heappop(free)
            for at, turn in walk:
                multiplied = max(multiplied + tile_us, buffer_free)
                start = max(multiplied, warp_free, added[head, at] if turn > 0 else 0.0)
                buffer_free = warp_free = start + READ_US
                if schedule["turns_per_sum"] > turn + 1:
                    warp_free = added[head, at] = start + turn_us
            heapq.heappush(free, max(multiplied, warp_free))
    read_us = schedule["n_sums"] * heads * queries * head_dim * 4 / TERABYTES_PER_S / 1e6
    return max(free) + read_us


def schedules(tokens: int, heads: int, queries_per_tile: int, sum_bytes: int) -> dict[str, dict[str, Any]]:
    """Of a group that attends to itself: all turns at one sum, each at its own, and as it is chosen."""
    fields = {
        "q_ranges": [0, tokens], "k_offsets": [0, 1], "k_ranges": [0, tokens], "n_queries": tokens, "n_keys": tokens
    }  # fmt: skip
    items = 4 * MULTIPROCESSORS // heads
    return {
        name: plans().backward_schedule(
            fields, queries_per_tile, items, sum_bytes=n_bytes, concurrent_tiles=MULTIPROCESSORS // heads
        )
        # Sums of no size are never too large, and huge ones always.
        for name, n_bytes in (("shared", 1 << 60), ("own", 0), ("chosen", sum_bytes))
    }


def predict() -> list[dict[str, Any]]:
    """A row for each case, with microseconds of both choices."""
    rows = []
    for tokens, heads, head_dim in CASES:
        queries, _ = TILES[head_dim]
        sum_bytes = heads * queries * head_dim * 4
        own = schedules(tokens, heads, queries, sum_bytes)
        row: dict[str, Any] = {"tokens": tokens, "heads": heads, "head_dim": head_dim, "turns": -(-tokens // KEYS)}
        row["mib_of_own_sums"] = round(own["own"]["n_sums"] * sum_bytes / 2**20, 1)
        row["chosen"] = "own" if own["chosen"]["turns_per_sum"] == 1 else "shared"
        for turn_us in TURN_US:
            row[f"us_if_a_turn_takes_{turn_us:g}"] = {
                name: round(microseconds(own[name], heads, head_dim, turn_us), 1) for name in ("shared", "own")
            }
        rows.append(row)
        print(*row.values(), flush=True)
    return rows


def main() -> None:
    """Runs the command line."""
    command = argparse.ArgumentParser(prog="python -m benchmarks.cuda_turns", description=__doc__)
    command.add_argument("--out", type=Path, default=RESULT)
    arguments = command.parse_args()
    arguments.out.write_text(json.dumps({"predicted": predict()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
