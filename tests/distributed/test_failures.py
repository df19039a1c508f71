"""What goes wrong on one process is one clear error on every other, within the timeout."""

from __future__ import annotations

import os
import re
import time
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module

from anchor_attention import (
    JointAnchorAttention,
    LatentAttention,
    MixedAttention,
    SelfAnchorAttention,
    TokenSpec,
)
from anchor_attention.distributed import SequenceParallelAttention
from tests.distributed.processes import Failed, Processes, processes
from tests.module_cases import DIM, HEADS, make, specs, total, unit_freqs

SPECS = {"surface_anchors": 5, "surface_queries": 4, "volume_anchors": 6, "volume_queries": 3}


def call(mesh: Any, differs: str) -> None:
    """A call that process 1 makes in another way than the others."""
    other = mesh.get_local_rank() == 1
    fields: dict[str, Any] = {"dim": DIM * 2} if other and differs == "dim" else {}
    model = make(SelfAnchorAttention, **fields)
    parallelize_module(model, mesh, SequenceParallelAttention())
    groups: dict[str, int | None] = dict(SPECS)
    if other and differs == "branches":
        groups = {"surface_anchors": 5, "surface_queries": 4}
    if other and differs == "group":
        groups["volume_more"] = groups.pop("volume_queries")
    token_specs = specs(**groups)
    x = torch.randn(1, total(token_specs) + (other and differs == "tokens"), model.mixed_attention.hidden_dim)
    if other and differs == "batch":
        x = x.expand(3, -1, -1)
    if other and differs == "dtype":
        model, x = model.double(), x.double()
    freqs = unit_freqs(1, x.shape[1]) if other and differs == "freqs" else None
    model(x, token_specs, freqs)


@pytest.mark.parametrize(
    ("differs", "own", "others"),
    [
        ("dim", r"ValueError: .*k_width=16.*process 1.*k_width=32", None),
        ("batch", r"ValueError: .*batch=1.*process 1.*batch=3", None),
        ("dtype", r"ValueError: .*torch\.float32.*process 1.*torch\.float64", None),
        ("group", r"ValueError: .*volume_queries.*process 1.*volume_more", None),
        ("branches", r"MissingBranchTokensError: .*volume", r"ProcessError: process 1 .*MissingBranchTokensError: .*"),
        (
            "tokens",
            r"ValueError: Token specs total size 18",
            r"ProcessError: process 1 .*ValueError: Token specs total",
        ),
        ("freqs", r"ValueError: RoPE usage mismatch", r"ProcessError: process 1 .*ValueError: RoPE usage mismatch"),
    ],
)
def test_every_process_hears_of_a_call_that_does_not_fit(
    four: Processes, differs: str, own: str, others: str | None
) -> None:
    begin = time.monotonic()
    outcomes = four.outcomes(call, 3, differs)
    assert time.monotonic() - begin < 10
    for rank, outcome in enumerate(outcomes):
        assert isinstance(outcome, Failed)
        assert re.match(own if rank == 1 or others is None else others, str(outcome), re.DOTALL), (rank, outcome)
    # Nobody is left in a state in which the next call fails.
    four.run(call, 3, "nothing")


def changing_sizes(mesh: Any) -> None:
    model = nn.ModuleList([make(JointAnchorAttention), make(JointAnchorAttention)])
    parallelize_module(model, mesh, {"*": SequenceParallelAttention()})
    for n, module in zip((4, 6), model, strict=True):
        module(torch.randn(1, n, DIM), [TokenSpec("surface_anchors", n)])


def test_sizes_that_change_within_a_pass_are_refused(four: Processes) -> None:
    for outcome in four.outcomes(changing_sizes, 2):
        assert re.match(r"ValueError: token_specs must not change .* got \(0, 4\) and then \(0, 6\)", str(outcome))


class OwnForward(MixedAttention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x


def refused(mesh: Any, kind: str) -> None:
    module = {
        "linear": lambda: nn.Linear(3, 3),
        "latent": lambda: LatentAttention(dim=DIM, num_heads=HEADS, num_latents=4),
        "own forward": lambda: OwnForward(dim=DIM, num_heads=HEADS),
        "twice": lambda: parallelize_module(make(SelfAnchorAttention), mesh, SequenceParallelAttention()),
        "option": lambda: SequenceParallelAttention(agree="sometimes"),
        "dropout": lambda: dropping(mesh),
    }[kind]()
    parallelize_module(module, mesh, SequenceParallelAttention())


def dropping(mesh: Any) -> None:
    module = make(SelfAnchorAttention, dropout=0.5)
    parallelize_module(module, mesh, SequenceParallelAttention(case="ring"))
    module(torch.randn(1, total(specs(**SPECS)), DIM), specs(**SPECS))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("linear", "module must hold anchor attention of this package, got Linear"),
        ("latent", "module must hold anchor attention of this package, got LatentAttention"),
        ("own forward", "module must go forward as MixedAttention does, got OwnForward.forward"),
        ("twice", "module must not share its keys already"),
        ("option", "agree must be one of .* got 'sometimes'"),
        ("dropout", "dropout must be 0 in a ring, got 0.5"),
    ],
)
def test_what_cannot_share_its_keys_is_refused(four: Processes, kind: str, message: str) -> None:
    (outcome,) = four.outcomes(refused, 1, kind)
    assert re.match(f"ValueError: {message}", str(outcome)), outcome


class Stumbling(nn.Module):
    """A block behind which process 1 ends, or raises what only it knows of; forward or backward."""

    def __init__(self, how: str, stumbles: bool) -> None:
        super().__init__()
        self.attention = make(JointAnchorAttention)
        self.how = how if stumbles else "not at all"

    def forward(self, x: torch.Tensor, token_specs: Any) -> torch.Tensor:
        x = x + self.attention(x, token_specs)
        if self.how == "ends":
            os._exit(1)
        if self.how == "ends in the backward":
            x.register_hook(lambda grad: os._exit(1))
        if self.how == "raises":
            raise KeyError("what only this process knows of")
        return x


def stumble(mesh: Any, how: str, case: str) -> Any:
    model = nn.ModuleList(Stumbling(how, mesh.get_local_rank() == 1 and i == 1) for i in range(3))
    parallelize_module(model, mesh, {"*.attention": SequenceParallelAttention(case=case)})
    token_specs = specs(**SPECS)
    x = torch.randn(1, total(token_specs), DIM)
    begin = time.monotonic()
    try:
        for block in model:
            x = block(x, token_specs)
        x.sum().backward()
    except KeyError:
        raise
    except Exception as error:
        # Autograd may wrap what a derivative raises, but keeps the text.
        return type(error).__name__, str(error), time.monotonic() - begin
    return None


TIMEOUT = 4.0


@pytest.mark.parametrize(
    ("how", "case"),
    [("ends", "gathered"), ("ends in the backward", "ring"), ("raises", "gathered")],
)
def test_survivors_of_a_lost_process_hear_of_it_within_the_timeout(how: str, case: str) -> None:
    with processes(3, timeout=TIMEOUT) as pool:
        outcomes = pool.outcomes(stumble, 3, how, case)
    lost = outcomes.pop(1)
    assert ("what only this process knows of" if how == "raises" else "is gone") in str(lost)
    for name, text, seconds in outcomes:
        assert name == "ProcessError"
        assert re.search("a process of the group has failed, has ended or did not take part within the timeout", text)
        # One timeout of the process that waited, and some time to start.
        assert seconds < 3 * TIMEOUT
