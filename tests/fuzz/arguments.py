"""Wrong arguments, guided by coverage: ``make fuzz-arguments``.

Calls begin right and are changed a little at a time. A call that reaches a line of the checks for tensors without data
which no call reached before, or is refused in words that are new but for their numbers, is kept and changed further.
Every call is made twice: with data, where the checks in C++ answer, and without, where those in Python do. Both must
take it, or refuse it in the same words.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor

from anchor_attention import argument_checks, ops  # noqa: F401  (registers what is called)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)
OTHER_DTYPES = (torch.int32, torch.int64, torch.uint8, torch.bool)
NUMBERS = (0, 1, 2, 3, 5, 8, -1, 2**31, 2**40)
Arguments = tuple[Any, ...]


def _attention(rng: random.Random) -> Arguments:
    n, m, heads, head_dim = 5, 4, rng.choice((1, 2, 4)), rng.choice((2, 8))
    q, k, v = (torch.zeros(2, size, heads, head_dim) for size in (n, m, m))
    freqs = torch.ones(rng.choice((1, 2)), n, head_dim // 2, dtype=torch.complex64)
    mask = torch.ones(2, m, dtype=torch.bool)
    return (
        q,
        k,
        v,
        [0, 2, 3, n],
        [0, 1, 3],
        [0, m, 1, 2, 0, 1],
        *_optional(rng, freqs, mask),
        rng.choice((None, 0.5)),
        False,
    )


def _attention_backward(rng: random.Random) -> Arguments:
    arguments = _attention(rng)
    q = arguments[0]
    lse = torch.zeros(q.shape[0], q.shape[2], q.shape[1])
    grad_lse = lse.clone() if rng.random() < 0.5 else None
    needs = [rng.random() < 0.7 for _ in range(4)]
    needs[3] = needs[3] and arguments[6] is not None
    return q.clone(), grad_lse, *arguments[:3], q.clone(), lse, *arguments[3:], *needs


def _attention_jvp(rng: random.Random) -> Arguments:
    q, k, v, *table, _, key_mask, scale, _ = _attention(rng)
    n_tangents = rng.choice((1, 3))
    known = _optional(rng, torch.zeros_like(q), torch.zeros(q.shape[0], q.shape[2], q.shape[1]))
    tangents = _optional(rng, *(torch.zeros(n_tangents, *x.shape) for x in (q, k, v)))
    return q, k, v, *known, *tangents, *table, key_mask, scale


def _attention_double_backward(rng: random.Random) -> Arguments:
    grad_out, grad_lse, q, k, v, out, lse, *table, _, key_mask, scale, _ = _attention_backward(rng)[:14]
    tangents = _optional(rng, *(torch.zeros_like(x) for x in (q, k, v)))
    needs = [rng.random() < 0.7 for _ in range(3)]
    return grad_out, grad_lse, q, k, v, out, lse, *tangents, *table, key_mask, scale, *needs


def _optional(rng: random.Random, *tensors: Tensor) -> list[Tensor | None]:
    return [tensor if rng.random() < 0.6 else None for tensor in tensors]


def _rope(rng: random.Random) -> Arguments:
    x = torch.zeros(2, 5, 3, 8)
    return x, torch.ones(rng.choice((1, 2)), 5, 4, dtype=torch.complex64)


def _rope_backward(rng: random.Random) -> Arguments:
    x, freqs = _rope(rng)
    need_freqs = rng.random() < 0.7
    return x.clone(), x if need_freqs else None, freqs, True, need_freqs


OPERATIONS: dict[str, Callable[[random.Random], Arguments]] = {
    "attention": _attention,
    "attention_backward": _attention_backward,
    "attention_jvp": _attention_jvp,
    "attention_double_backward": _attention_double_backward,
    "rope": _rope,
    "rope_backward": _rope_backward,
}


def _other_tensor(rng: random.Random, x: Tensor) -> Tensor:
    shape = list(x.shape)
    change = rng.randrange(6)
    if change == 0 and shape:
        shape[rng.randrange(len(shape))] = rng.choice((0, 1, 2, 3, 4, 5, 8))
    elif change == 1 and shape:
        del shape[rng.randrange(len(shape))]
    elif change == 2 and len(shape) < 6:
        shape.insert(rng.randint(0, len(shape)), rng.choice((1, 2)))
    elif change == 3 and len(shape) > 1:
        i, j = rng.sample(range(len(shape)), 2)
        return x.transpose(i, j)
    elif change == 4:
        return torch.zeros(shape, dtype=rng.choice((*DTYPES, *OTHER_DTYPES)))
    elif change == 5 and len(shape) > 1:
        # The same sizes, in memory that skips every other element of an axis.
        i = rng.randrange(len(shape))
        shape[i] *= 2
        return torch.zeros(shape, dtype=x.dtype).unflatten(i, (-1, 2)).select(i + 1, 0)
    return torch.zeros(shape, dtype=x.dtype)


def _other_numbers(rng: random.Random, numbers: list[int]) -> list[int]:
    numbers = list(numbers)
    change = rng.randrange(4)
    if change == 0 and numbers:
        numbers[rng.randrange(len(numbers))] = rng.choice(NUMBERS)
    elif change == 1 and numbers:
        del numbers[rng.randrange(len(numbers))]
    elif change == 2:
        numbers.insert(rng.randint(0, len(numbers)), rng.choice(NUMBERS))
    else:
        rng.shuffle(numbers)
    return numbers


def changed(rng: random.Random, arguments: Arguments) -> Arguments:
    """The same call with one argument changed."""
    found = list(arguments)
    i = rng.randrange(len(found))
    if isinstance(found[i], Tensor):
        found[i] = _other_tensor(rng, found[i])
    elif isinstance(found[i], list):
        found[i] = _other_numbers(rng, found[i])
    elif isinstance(found[i], bool):
        found[i] = not found[i]
    elif isinstance(found[i], float):
        found[i] = rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e300))
    return tuple(found)


def _without_data(x: Tensor) -> Tensor:
    # Not x.to("meta"), which closes gaps between elements.
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def refusal(name: str, arguments: Arguments) -> str | None:
    """The words in which an operation refuses a call; ``None`` if it takes it."""
    try:
        getattr(torch.ops.anchor_attention, name)(*arguments)
    except RuntimeError as error:
        return str(error)
    return None


def _lines_of(code: CodeType) -> Iterator[int]:
    yield from (line for _, _, line in code.co_lines() if line and line != code.co_firstlineno)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _lines_of(inner)


def lines_of_checks() -> set[int]:
    """Lines within the functions of the checks for tensors without data."""
    functions = (f for f in vars(argument_checks).values() if getattr(f, "__module__", "") == argument_checks.__name__)
    return {line for f in functions if hasattr(f, "__code__") for line in _lines_of(f.__code__)}


@contextmanager
def _recorded(lines: set[int]) -> Iterator[None]:
    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != argument_checks.__file__:
            return None
        if event == "line":
            lines.add(frame.f_lineno)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@dataclass
class Report:
    """What a run of the fuzzer has seen."""

    calls: int = 0
    taken: int = 0
    words: set[str] = field(default_factory=set)
    lines: set[int] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)


def fuzz(seed: int, calls: int, seconds: float = float("inf")) -> Report:
    """Makes calls until their number or the time is up; the same ones for the same seed."""
    rng, report, end = random.Random(seed), Report(), time.monotonic() + seconds
    kept = [(name, maker(rng)) for name, maker in OPERATIONS.items() for _ in range(8)]
    while report.calls < calls and time.monotonic() < end:
        name, arguments = rng.choice(kept)
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            arguments = changed(rng, arguments)
        lines: set[int] = set()
        with_data = refusal(name, arguments)
        with _recorded(lines):
            without = refusal(name, tuple(_without_data(a) if isinstance(a, Tensor) else a for a in arguments))
        report.calls += 1
        report.taken += with_data is None
        if with_data != without:
            report.failures.append(f"{name}{_shown(arguments)}:\n  with data: {with_data}\n  without:   {without}")
        elif with_data is not None and not with_data.startswith("anchor_attention"):
            report.failures.append(f"{name}{_shown(arguments)}: refused by {with_data[:200]!r}")
        words = f"{name}: " + re.sub(r"-?\d+(\.\d+)?(e[+-]\d+)?", "#", with_data or "taken")
        if words not in report.words or not lines <= report.lines:
            kept.append((name, arguments))
        report.words.add(words)
        report.lines |= lines
    return report


def _shown(arguments: Arguments) -> str:
    return str(tuple(f"{tuple(a.shape)} {a.dtype} {a.stride()}" if isinstance(a, Tensor) else a for a in arguments))


def main() -> int:
    """Runs the fuzzer; 1 if a call was refused in two ways, or by somebody else."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.arguments", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    report = fuzz(options.seed, calls=10**9, seconds=options.seconds)
    missed = sorted(lines_of_checks() - report.lines)
    print(
        f"{report.calls} calls, {report.taken} taken, {len(report.words)} kinds of answers, lines not reached: {missed}"
    )
    print(*report.failures[:20], sep="\n")
    return int(bool(report.failures))


if __name__ == "__main__":
    sys.exit(main())
