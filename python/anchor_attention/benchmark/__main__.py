"""Times a shape of your own: ``python -m anchor_attention.benchmark --help``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._library import cpu_instruction_sets
from ..key_range_table import KeyRangeTable
from ..patterns import AttentionPattern, TokenSpec
from .operation import FORWARD, PASSES, attention_flops, make_operation_inputs, operation_contestant
from .peers import OURS, PEERS, NotSupportedError, prepare_peer
from .timing import interleave, quartiles, ratios

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
EPILOG = """\
The shape is a list of token groups and who attends to whom:

  --group surface_anchors=2048 --group surface_queries=8192 \\
  --attend surface_anchors,surface_queries:surface_anchors

or, for packed samples, pairs of ranges begin-end of queries and keys:

  --ranges 0-1000:0-200 --ranges 1000-1800:200-500
"""


@dataclass(frozen=True)
class Shape:
    """Who attends to whom: a table, and the lengths of its axes."""

    table: KeyRangeTable
    n_queries: int
    n_keys: int


def parse_groups(groups: Sequence[str], attends: Sequence[str]) -> Shape:
    """Makes the shape of ``NAME=SIZE`` groups and ``QUERIES:KEYS`` patterns of comma-separated names.

    Raises:
        ValueError: If a text can't be read that way, or the patterns don't fit the groups.
    """
    specs = []
    for text in groups:
        name, separator, size = text.partition("=")
        if not separator or not size.isdecimal():
            raise ValueError(f"--group must be NAME=SIZE, got {text!r}")
        specs.append(TokenSpec(name, int(size)))
    patterns = []
    for text in attends:
        queries, separator, keys = text.partition(":")
        if not separator:
            raise ValueError(f"--attend must be QUERIES:KEYS with comma-separated names, got {text!r}")
        patterns.append(AttentionPattern(queries.split(","), keys.split(",")))
    n_tokens = sum(spec.size or 0 for spec in specs)
    return Shape(KeyRangeTable.from_patterns(specs, patterns), n_tokens, n_tokens)


def parse_ranges(texts: Sequence[str]) -> Shape:
    """Makes the shape of ``begin-end:begin-end`` pairs of a query and a key range.

    Raises:
        ValueError: If a text can't be read that way, or query ranges overlap.
    """
    rows = []
    for text in texts:
        numbers = text.replace(":", "-").split("-")
        if len(numbers) != 4 or not all(number.isdecimal() for number in numbers):
            raise ValueError(f"--ranges must be BEGIN-END:BEGIN-END of queries and keys, got {text!r}")
        rows.append([int(number) for number in numbers])
    table = KeyRangeTable.from_ranges([row[:2] for row in rows], [row[2:] for row in rows])
    return Shape(table, max(row[1] for row in rows), max(row[3] for row in rows))


def measure(arguments: argparse.Namespace, shape: Shape) -> list[dict[str, Any]]:
    """Times ours and the peers on the shape, and measures their errors. One record per contestant."""
    dtype = DTYPES[arguments.dtype]
    backward = arguments.passes != FORWARD
    sizes = (arguments.batch, shape.n_queries, shape.n_keys, arguments.heads, arguments.head_dim)
    contestants, records = {}, []
    for name in dict.fromkeys([OURS, *arguments.peer]):
        record: dict[str, Any] = {"name": name}
        try:
            attention, record["build_seconds"] = prepare_peer(
                name, shape.table, shape.n_queries, shape.n_keys, backward=backward, device=arguments.device
            )
            contestants[name] = operation_contestant(attention, arguments.passes)
        except NotSupportedError as error:
            record["not_supported"] = str(error)
        records.append(record)

    check = make_operation_inputs(*sizes, dtype=dtype, device=arguments.device)
    exact = operation_contestant(
        prepare_peer("sdpa_per_pattern", shape.table, shape.n_queries, shape.n_keys).attention, arguments.passes
    )(check.to(torch.float64))
    for record in records:
        if record["name"] in contestants:
            try:
                results = contestants[record["name"]](check)
            except NotSupportedError as error:
                record["not_supported"] = str(error)
                del contestants[record["name"]]
                continue
            record["relative_error"] = max(
                ((result.double() - truth).norm() / truth.norm()).item()
                for result, truth in zip(results, exact, strict=True)
            )

    seconds = interleave(
        contestants,
        lambda: make_operation_inputs(*sizes, dtype=dtype, device=arguments.device),
        rounds=arguments.rounds,
        device=arguments.device,
    )
    flops = attention_flops(arguments.batch * shape.table.area(), arguments.heads, arguments.head_dim, arguments.passes)
    for record in records:
        if record["name"] in seconds:
            own = seconds[record["name"]]
            record["seconds"] = own
            record["gflops"] = flops / quartiles(own).median / 1e9
            record["time_relative_to_ours"] = ratios(own, seconds[OURS])
    return records


def lines(records: Sequence[dict[str, Any]]) -> list[str]:
    """The records as a table."""
    out = [f"{'':20} {'ms':>9} {'GFLOP/s':>9} {'× our time':>11} {'quartiles':>15} {'relative error':>15}"]
    for record in records:
        if "not_supported" in record:
            out.append(f"{record['name']:20} not measured: {record['not_supported']}")
            continue
        lower, median, upper = record["time_relative_to_ours"]
        milliseconds = quartiles(record["seconds"]).median * 1e3
        out.append(
            f"{record['name']:20} {milliseconds:9.2f} {record['gflops']:9.1f} {median:11.2f} "
            f"{f'{lower:.2f} – {upper:.2f}':>15} {record['relative_error']:15.1e}"
        )
    return out


def verdict(records: Sequence[dict[str, Any]]) -> str:
    """Who won, in words: ours against the fastest peer, by the median of the ratios within a round."""
    by_time = {
        record["name"]: record["time_relative_to_ours"] for record in records if "time_relative_to_ours" in record
    }
    by_time.pop(OURS)
    if not by_time:
        return "There was no peer to compare with."
    best = min(by_time, key=lambda name: by_time[name].median)
    lower, median, upper = by_time[best]
    if lower <= 1 <= upper:
        return f"A draw between {OURS} and {best}: the ratio's quartiles, {lower:.2f} and {upper:.2f}, enclose 1."
    if median > 1:
        return f"{OURS} won: {best}, the fastest peer, takes {median:.2f} times as long."
    return f"{best} won: {OURS} takes {1 / median:.2f} times as long."


def positive(text: str) -> int:
    """A positive number of the command line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m anchor_attention.benchmark",
        description="Times anchor attention beside plain PyTorch on a shape of your own.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--group", action="append", default=[], metavar="NAME=SIZE", help="a token group")
    result.add_argument("--attend", action="append", default=[], metavar="QUERIES:KEYS", help="who reads whom")
    result.add_argument("--ranges", action="append", default=[], metavar="Q-Q:K-K", help="a query and a key range")
    result.add_argument("--batch", type=positive, default=1)
    result.add_argument("--heads", type=positive, default=3)
    result.add_argument("--head-dim", type=positive, default=64)
    result.add_argument("--dtype", choices=DTYPES, default="float32")
    result.add_argument("--pass", dest="passes", choices=PASSES, default=FORWARD)
    result.add_argument("--peer", action="append", choices=[name for name in PEERS if name != OURS], default=[])
    result.add_argument("--rounds", type=positive, default=11)
    result.add_argument("--threads", type=positive, default=None, help="default: torch's own choice")
    result.add_argument("--device", default="cpu")
    result.add_argument("--json", type=Path, default=None, help="writes the raw times here")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; see ``--help``."""
    command = parser()
    arguments = command.parse_args(argv)
    try:
        # Only making a tensor shows whether a device can be used.
        if torch.empty(1, device=arguments.device).is_meta:
            raise RuntimeError("it holds no data")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        command.error(f"--device {arguments.device!r} can't be used: {str(error).splitlines()[0]}")
    if bool(arguments.ranges) == bool(arguments.group):
        command.error("give either --group and --attend, or --ranges")
    arguments.peer = arguments.peer or ["eager", "sdpa_per_pattern"]
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    try:
        shape = parse_ranges(arguments.ranges) if arguments.ranges else parse_groups(arguments.group, arguments.attend)
    except ValueError as error:
        command.error(str(error))
    kernels = f", kernels for {cpu_instruction_sets().selected}" if arguments.device == "cpu" else ""
    print(f"{shape.table}\n{arguments.dtype}, {arguments.passes}, {torch.get_num_threads()} threads{kernels}")
    records = measure(arguments, shape)
    print("\n".join([*lines(records), verdict(records)]))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
