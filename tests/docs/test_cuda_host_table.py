"""Tables of the pages on CUDA say what the raw files hold: what a call costs the host, what waiting for turns costs."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "emulated"


def test_the_table_of_the_host() -> None:
    result = json.loads((RESULTS / "cuda_host.json").read_text())
    times = {(row["table"], row["kernels"], row["pass"]): row["least_us"] for row in result["calls"]}
    page = (ROOT / "docs" / "cuda.md").read_text()
    columns = [(kernels, passes) for kernels in ("sm90", "sm80") for passes in ("forward", "backward")]
    for table in dict.fromkeys(row["table"] for row in result["calls"]):
        cells = " | ".join(f"{times[table, kernels, passes]:.1f}" for kernels, passes in columns)
        assert f"| {table} | {cells} |" in page
    assert f"the least of {result['batches']} batches of {result['calls_per_batch']} calls" in " ".join(page.split())


def test_the_table_of_turns() -> None:
    page = (ROOT / "docs" / "hopper_backward.md").read_text()
    for row in json.loads((RESULTS / "cuda_turns.json").read_text())["predicted"]:
        times = [row[f"us_if_a_turn_takes_{turn}"] for turn in (1, 2, 3)]
        shared = " / ".join(f"{time['shared']:.1f}" for time in times)
        # Nothing waits there, however long a turn takes.
        assert times[0]["own"] == times[2]["own"]
        cells = [f"{row['tokens']} × {row['heads']}", row["head_dim"], row["mib_of_own_sums"], shared]
        cells += [f"{times[0]['own']:.1f}", row["chosen"]]
        assert f"| {' | '.join(map(str, cells))} |" in page
