"""One cell of the suite: its times beside those of its peers, and, apart from them, everybody's errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anchor_attention import MultiBranchAnchorAttention
from anchor_attention.benchmark import (
    NotSupportedError,
    Quartiles,
    interleave,
    make_operation_inputs,
    operation_contestant,
    prepare_peer,
    ratios,
)
from anchor_attention.benchmark.operation import FORWARD, OperationInputs, attention_flops
from anchor_attention.benchmark.peers import OURS
from anchor_attention.benchmark.timing import quartiles

from .inputs import make_module, make_module_inputs, real_tokens, scores_per_head
from .machine import REGISTER_CEILINGS, matmul, register_ceiling
from .peers import MODULE_PEERS, module_contestant
from .workloads import Workload

MODULE, OPERATION = "module", "op"
LEVELS = (MODULE, OPERATION)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPERATION_PEERS = (OURS, "eager", "sdpa_per_pattern", "dense_mask")
# Compiled for each shape, which takes longer than all of its rounds: some shapes have to do.
FLEX_ATTENTION, FLEX_WORKLOADS = "flex_attention", ("drivaer_train", "showcase_query", "wells")
EXACT_PEER = "sdpa_per_pattern"
# The machine's own rates take part in the rounds of the operation, so that all see the same clock.
MATMUL, MATMUL_SIZE, REGISTERS = "matmul", 1536, "registers"

Contestant = Callable[[Any], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """What is measured: level, workload, pattern, dtype by name, passes."""

    level: str
    workload: Workload
    pattern: str
    dtype: str
    passes: str

    def describe(self) -> dict[str, Any]:
        """The case in a form for files."""
        return {
            "level": self.level,
            "workload": self.workload.name,
            "pattern": self.pattern,
            "dtype": self.dtype,
            "pass": self.passes,
            "batch": self.workload.batch,
            "heads": self.workload.heads,
            "head_dim": self.workload.head_dim,
            "token_specs": [(spec.name, spec.size) for spec in self.workload.token_specs],
            "attention_flops": attention_flops(
                scores_per_head(self.workload, self.pattern), self.workload.heads, self.workload.head_dim, self.passes
            ),
        }


@dataclass(frozen=True)
class Contest:
    """What takes part in a case.

    Attributes:
        contestants: The timed functions by name.
        make_inputs: Makes their inputs.
        not_supported: Who can't take part, and why.
        build_seconds: How long what depends on the table alone took to make.
        module: The module whose weights all use, at the module level.
    """

    contestants: Mapping[str, Contestant]
    make_inputs: Callable[[], Any]
    not_supported: Mapping[str, str] = field(default_factory=dict)
    build_seconds: Mapping[str, float] = field(default_factory=dict)
    module: MultiBranchAnchorAttention | None = None


def make_contest(case: Case, peers: tuple[str, ...] = (), device: str = "cpu") -> Contest:
    """Prepares a case.

    Args:
        case: What to measure.
        peers: Who takes part besides ours; the standing peers of the level when empty.
        device: Where.
    """
    if case.level == MODULE:
        dtype = DTYPES[case.dtype]
        module = make_module(case.workload, case.pattern, dtype, device)
        names = (OURS, *peers) if peers else tuple(MODULE_PEERS)
        return Contest(
            {name: module_contestant(name, module, case.workload, case.pattern, case.passes) for name in names},
            partial(make_module_inputs, case.workload, module, dtype, device),
            module=module,
        )
    contestants, not_supported, build_seconds = {}, {}, {}
    names = (OURS, *peers) if peers else OPERATION_PEERS
    if not peers and case.workload.name in FLEX_WORKLOADS:
        names = (*names, FLEX_ATTENTION)
    for name in names:
        try:
            contestants[name], build_seconds[name] = _operation(case, name, device)
        except NotSupportedError as error:
            not_supported[name] = str(error)
    return Contest(contestants, partial(_operation_inputs, case, device), not_supported, build_seconds)


def time_case(
    case: Case, rounds: int, warmup: int = 0, peers: tuple[str, ...] = (), device: str = "cpu"
) -> dict[str, Any]:
    """Times ours and the peers round by round, and what each takes to get ready, which warms it up."""
    contest = make_contest(case, peers, device)
    contestants: dict[str, Callable[[Any], object]] = {}
    not_supported, ready = dict(contest.not_supported), {}
    for name, run in contest.contestants.items():
        try:
            ready[name] = interleave({name: run}, contest.make_inputs, rounds=1, warmup=0)
            contestants[name] = run
        except NotSupportedError as error:
            not_supported[name] = str(error)
    ceilings: dict[str, float] = {}
    if case.level == OPERATION:
        if device == "cpu":
            with suppress(NotSupportedError):
                contestants[MATMUL], ceilings[MATMUL] = matmul(DTYPES[case.dtype], MATMUL_SIZE)
        else:
            factors = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE, device=device).to(DTYPES[case.dtype])
            contestants[MATMUL], ceilings[MATMUL] = lambda _: (factors[0] @ factors[1],), 2.0 * MATMUL_SIZE**3
        if device == "cpu" and case.dtype in REGISTER_CEILINGS:
            with suppress(NotSupportedError):
                contestants[REGISTERS], ceilings[REGISTERS] = register_ceiling(
                    REGISTER_CEILINGS[case.dtype], torch.get_num_threads()
                )
    seconds = interleave(contestants, contest.make_inputs, rounds=rounds, warmup=warmup, device=device)
    record = case.describe()
    record["ceilings"] = {}
    for name, flops in ceilings.items():
        share = ratios(seconds[name], seconds[OURS])
        record["ceilings"][name] = {
            "gflops": quartiles([flops / t / 1e9 for t in seconds.pop(name)]),
            "our_share": Quartiles(*(ratio * record["attention_flops"] / flops for ratio in share)),
        }
    return record | {
        "seconds": seconds,
        "time_relative_to_ours": {name: ratios(own, seconds[OURS]) for name, own in seconds.items()},
        "not_supported": not_supported,
        "ready_seconds": {name: contest.build_seconds.get(name, 0.0) + own[name][0] for name, own in ready.items()},
    }


def relative_errors(case: Case, peers: tuple[str, ...] = (), device: str = "cpu") -> dict[str, dict[str, float]]:
    """Everybody's ‖result − exact‖ / ‖exact‖ against float64: of the output, and the worst of the gradients."""
    contest = make_contest(case, peers, device)
    inputs = contest.make_inputs()
    if contest.module is not None:
        wide = deepcopy(contest.module).double()
        exact = module_contestant(EXACT_PEER, wide, case.workload, case.pattern, case.passes)(inputs.double())
    else:
        exact = contest.contestants[EXACT_PEER](inputs.to(torch.float64))
    errors = {}
    for name, contestant in contest.contestants.items():
        try:
            results = contestant(inputs)
        except NotSupportedError:
            continue
        found = [
            ((result.double() - truth).norm() / truth.norm()).item()
            for result, truth in zip(results, exact, strict=True)
        ]
        errors[name] = {"out": found[0]} | ({} if case.passes == FORWARD else {"worst_gradient": max(found[1:])})
    return errors


def _operation(case: Case, peer: str, device: str) -> tuple[Contestant, float]:
    names, table = case.workload.key_axis(case.pattern)
    prepared = prepare_peer(
        peer,
        table,
        case.workload.n_tokens,
        _n_keys(case),
        key_mask=_key_mask(case, names, device),
        backward=case.passes != FORWARD,
        device=device,
    )
    return operation_contestant(prepared.attention, case.passes), prepared.build_seconds


def _operation_inputs(case: Case, device: str) -> OperationInputs:
    workload = case.workload
    return make_operation_inputs(
        workload.batch,
        workload.n_tokens,
        _n_keys(case),
        workload.heads,
        workload.head_dim,
        dtype=DTYPES[case.dtype],
        device=device,
    )


def _n_keys(case: Case) -> int:
    names, _ = case.workload.key_axis(case.pattern)
    return sum(spec.size or 0 for spec in case.workload.anchor_specs if spec.name in names)


def _key_mask(case: Case, names: tuple[str, ...], device: str) -> Tensor | None:
    mask = real_tokens(case.workload, device)
    if mask is None:
        return None
    specs = case.workload.token_specs
    groups = torch.split(mask, [spec.size or 0 for spec in specs], dim=1)
    return torch.cat([group for spec, group in zip(specs, groups, strict=True) if spec.name in names], dim=1)
