"""What the comparisons of blocks and of wide keys time on both sides computes the same."""

from __future__ import annotations

from functools import partial

import torch
from benchmarks.latent_block import Case, build_blocks, make_inputs, outputs_of
from benchmarks.whole_models import compare, table, too_different
from benchmarks.wide_keys import measure


def test_the_blocks_agree_and_a_difference_is_reported() -> None:
    case = Case(tokens=70, latents=6, dim=24, heads=2)
    plain, ours = build_blocks(case)
    record = compare(case.name, plain, ours, partial(make_inputs, case), outputs_of, rounds=1)
    assert not too_different([record])
    assert [len(row.split("|")) for row in table([record])] == [9] * 4
    with torch.no_grad():
        ours.attention.latents[0].add_(1.0)
    record = compare(case.name, plain, ours, partial(make_inputs, case), outputs_of, rounds=1)
    assert len(too_different([record])) == 2


def test_padded_and_direct_values_agree_and_have_gradients() -> None:
    record = measure(37, 50, rounds=1)
    assert not too_different([record]) and record["equality"]["gradients"] > 0
