"""The table of docs/cuda.md on what a call costs the host says what the raw file holds."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
RAW = ROOT / "benchmarks" / "results" / "emulated" / "cuda_host.json"


def test_the_table_is_that_of_the_raw_file() -> None:
    result = json.loads(RAW.read_text())
    times = {(row["table"], row["kernels"], row["pass"]): row["least_us"] for row in result["calls"]}
    page = (ROOT / "docs" / "cuda.md").read_text()
    columns = [(kernels, passes) for kernels in ("sm90", "sm80") for passes in ("forward", "backward")]
    for table in dict.fromkeys(row["table"] for row in result["calls"]):
        cells = " | ".join(f"{times[table, kernels, passes]:.1f}" for kernels, passes in columns)
        assert f"| {table} | {cells} |" in page
    assert f"the least of {result['batches']} batches of {result['calls_per_batch']} calls" in " ".join(page.split())
