"""One random call for every seed, and what its result is held against."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch

from anchor_attention import KeyRangeTable, anchor_attention, cpu_instruction_sets
from tests.generators import LAYOUTS, AttentionInputs, strided, unit_freqs
from tests.oracle import assert_as_good_as_plain, fused, plain_attention, reference, run

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = (0, 1, 2, 5, 16, 31, 33, 63, 64, 65, 100)
HEAD_DIMS = (1, 2, 8, 16, 24, 40, 64, 65, 80, 128, 200)


def random_table(rng: random.Random, n_queries: int, n_keys: int) -> KeyRangeTable:
    """Gaps, groups without keys, and empty, repeated, touching and overlapping ranges of keys."""
    cuts = sorted(rng.randint(0, n_queries) for _ in range(2 * rng.randint(0, 5)))
    k_offsets, k_ranges = [0], []
    for _ in range(len(cuts) // 2):
        chosen = [sorted(rng.randint(0, n_keys) for _ in range(2)) for _ in range(rng.choice((0, 1, 1, 2, 3)))]
        if chosen and rng.random() < 0.2:
            chosen.append(chosen[0])
        k_ranges += [bound for key_range in chosen for bound in key_range]
        k_offsets.append(len(k_ranges) // 2)
    return KeyRangeTable(cuts, k_offsets, k_ranges)


def random_inputs(rng: random.Random, dtype: torch.dtype) -> AttentionInputs:
    """A call of random sizes, strides, table, mask, rotation and scale."""
    batch, heads, head_dim = rng.choice((1, 1, 1, 2, 3, 0)), rng.choice((1, 2, 3)), rng.choice(HEAD_DIMS)
    n_queries, n_keys = rng.choice(SIZES), rng.choice(SIZES)
    q, k, v, grad_out = (
        strided(batch, tokens, heads, head_dim, dtype, rng.choice(LAYOUTS))
        for tokens in (n_queries, n_keys, n_keys, n_queries)
    )
    inputs = AttentionInputs(q, k, v, random_table(rng, n_queries, n_keys), grad_out)
    if head_dim % 2 == 0 and rng.random() < 0.4:
        inputs.q_freqs = unit_freqs(rng.choice((1, batch)), n_queries, head_dim, dtype)
    if head_dim % 2 == 0 and rng.random() < 0.4:
        inputs.k_freqs = unit_freqs(rng.choice((1, batch)), n_keys, head_dim, dtype)
    if rng.random() < 0.4:
        inputs.key_mask = torch.rand(batch, n_keys) < rng.choice((0.0, 0.3, 0.9))
    if rng.random() < 0.4:
        inputs.scale = rng.choice((0.0, 0.3, -0.2, 2.0))
    return inputs


def ordinary(rng: random.Random) -> str:
    """Outputs and gradients of ordinary numbers."""
    dtype = rng.choice(DTYPES)
    inputs = random_inputs(rng, dtype)
    _compare(inputs)
    return str(dtype)


def large_or_tiny(rng: random.Random) -> str:
    """Scores of thousands, or values below the smallest normal number."""
    dtype = rng.choice(DTYPES[:2])
    inputs = random_inputs(rng, dtype)
    if rng.random() < 0.5:
        inputs.q, inputs.k = inputs.q * 30, inputs.k * 30
        # Rotated rows are rounded to the dtype, which moves scores of thousands by whole units.
        inputs.q_freqs = inputs.k_freqs = None
        _compare(inputs)
        return "large"
    inputs.v = inputs.v * 1e-39
    inputs.grad_out = torch.zeros_like(inputs.grad_out)
    out, expected = fused(inputs)[0].double(), reference(inputs.to(torch.float64))[0]
    # The processors' dot products of bfloat16 take denormals as zero; everything else keeps them to their last bit.
    if dtype == torch.bfloat16 and cpu_instruction_sets().selected in ("amx", "amx_model", "avx512_bf16"):
        bound = torch.finfo(dtype).smallest_normal
    else:
        bound = 1e-2 * 1e-39 * 8 + 2 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert not out.numel() or (out - expected).abs().max().item() <= bound
    return "tiny"


def special(rng: random.Random) -> str:
    """NaN and infinities reach the rows that read them, and no others."""
    dtype = rng.choice(DTYPES)
    inputs = random_inputs(rng, dtype)
    inputs.q_freqs = inputs.k_freqs = None
    name, value = rng.choice("qkv"), rng.choice((math.nan, math.inf, -math.inf))
    tensor = getattr(inputs, name).clone()
    setattr(inputs, name, tensor)
    for _ in range(rng.randint(1, 3) if tensor.numel() else 0):
        tensor[tuple(rng.randrange(size) for size in tensor.shape)] = value
    out, expected = fused(inputs)[0], reference(inputs.to(torch.float64))[0]
    # Infinity or NaN: a probability that is 0 in float32 need not be 0 in float64, and 0 · ∞ is NaN.
    finite = expected.isfinite()
    assert torch.equal(out.isfinite(), finite), "NaN or infinity at other places"
    torch.testing.assert_close(
        out[finite].double(), expected[finite], rtol=0, atol=0.1 if dtype.itemsize == 2 else 1e-3
    )
    return f"{value} in {name}"


def arguments(rng: random.Random) -> str:
    """Wrong arguments: tensors with data and without are refused in the same words, or both are taken."""
    dtypes = (torch.float32, torch.float32, torch.float32, torch.float16, torch.int64)

    def tensor(sizes: list[int]) -> torch.Tensor:
        if rng.random() < 0.1:
            sizes = [rng.choice((0, 1, 2, 3, 4)) for _ in range(rng.choice((2, 3, 4, 4, 5)))]
        made = torch.zeros(sizes, dtype=rng.choice(dtypes) if rng.random() < 0.1 else torch.float32)
        return made.transpose(-1, -2) if made.dim() > 1 and rng.random() < 0.05 else made

    batch, n_queries, n_keys, heads, head_dim = (rng.choice((1, 2, 3, 4)) for _ in range(5))
    q, k, v = (tensor([batch, n, heads, head_dim]) for n in (n_queries, n_keys, n_keys))
    q_freqs = tensor([1, n_queries, head_dim // 2]).to(rng.choice((torch.complex64, torch.complex128)))
    key_mask = tensor([batch, n_keys]).to(rng.choice((torch.bool, torch.bool, torch.uint8)))
    numbers = [
        [rng.choice((0, 0, 1, 2, 3, 4, -1, 2**40)) for _ in range(rng.choice((0, 1, 2, 2, 4)))] for _ in range(3)
    ]
    if rng.random() < 0.5:
        numbers = [[0, n_queries], [0, 1], [0, n_keys]]
    optional = [argument if rng.random() < 0.3 else None for argument in (q_freqs, key_mask)]
    given = (q, k, v, *numbers, *optional, rng.choice((None, 0.5, math.nan)))
    texts = [_refusal(given), _refusal([a.to("meta") if isinstance(a, torch.Tensor) else a for a in given])]
    assert texts[0] == texts[1], texts
    assert texts[0] is None or texts[0].startswith("anchor_attention: "), texts[0]
    return "taken" if texts[0] is None else "refused"


def _refusal(given: Any) -> str | None:
    try:
        torch.ops.anchor_attention.attention(*given)
    except RuntimeError as error:
        return str(error)
    return None


def _compare(inputs: AttentionInputs) -> None:
    exact = run(reference, inputs.to(torch.float64))
    actual = run(fused, inputs)
    if inputs.q.dtype == torch.float64:
        for name, expected in exact.items():
            torch.testing.assert_close(actual[name], expected, rtol=1e-10, atol=1e-10, msg=name)
        return
    assert_as_good_as_plain(actual, exact, run(plain_attention, inputs), inputs)
    again = anchor_attention(inputs.q, inputs.k, inputs.v, inputs.table, **inputs.keywords())  # type: ignore[arg-type]
    assert torch.equal(again, actual["out"]), "two runs differ"


KINDS: dict[str, Callable[[random.Random], str]] = {
    "ordinary": ordinary,
    "large or tiny": large_or_tiny,
    "special": special,
    "arguments": arguments,
}
WEIGHTS = (5, 1, 2, 2)


def run_case(seed: int) -> str:
    """Runs the case of a seed and says of what kind it was.

    Raises:
        Exception: Whatever is wrong.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    (kind,) = rng.choices(list(KINDS), WEIGHTS)
    return f"{kind}: {KINDS[kind](rng)}"
