"""Every kernel once, on shapes small enough for a sanitizer: ``python -m benchmarks.gpu.small_shapes``.

Needs nothing but torch. Results are held against float64, so that this also is the first check on a new machine.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from anchor_attention import KeyRangeTable, anchor_attention

from .apart import AGAIN, NEXT, RIGHT, WRONG, add_options
from .small_shape_sizes import HEAD_DIMS, QUICK_HEAD_DIMS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
N_QUERIES, N_KEYS, BATCH, HEADS = 150, 140, 2, 2
DIFFERENTIABLE = ("q", "k", "v", "q_freqs", "k_freqs")
TABLES = {
    # Partial tiles, repeated and shared keys, a group without any, rows in no group.
    "ragged": KeyRangeTable.from_ranges(
        [(0, 70), (0, 70), (75, 140), (75, 140), (140, 145)], [(0, 20), (37, 140), (90, 130), (90, 130), (3, 3)]
    ),
    # Too many ranges for the parameters of a launch.
    "many_groups": KeyRangeTable.from_ranges(
        [(i, i + 1) for i in range(N_QUERIES)], [(i, 140 - i % 3) for i in [*range(70)] * 2 + [5] * 10]
    ),
}
# Rounding of the probabilities and of the scores' gradients to the dtype of the matrix units, at most one unit each for
# the result and three operands; in float32 what the order of some hundred terms and their cancellation leave.
EPSILONS = {torch.bfloat16: 4, torch.float16: 4, torch.float32: 64}


class Call(NamedTuple):
    """Arguments of one call: tensors that take gradients, freqs among them, and the key mask."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_freqs: Tensor
    k_freqs: Tensor
    key_mask: Tensor
    grad_out: Tensor


def make_call(dtype: torch.dtype, head_dim: int, device: str) -> Call:
    """Random tensors, k and v as views of one packed projection."""
    q = torch.randn(BATCH, N_QUERIES, HEADS, head_dim, device=device).to(dtype)
    k, v = torch.randn(BATCH, N_KEYS, 2, HEADS, head_dim, device=device).to(dtype).unbind(2)
    q_freqs, k_freqs = (
        torch.polar(torch.ones_like(angle), angle)
        for angle in (6.3 * torch.rand(1, n, head_dim // 2, device=device) for n in (N_QUERIES, N_KEYS))
    )
    key_mask = torch.rand(BATCH, N_KEYS, device=device) < 0.8
    grad_out = torch.randn(BATCH, N_QUERIES, HEADS, head_dim, device=device).to(dtype)
    return Call(q, k, v, q_freqs, k_freqs, key_mask, grad_out)


def multiplicities(table: KeyRangeTable) -> Tensor:
    """How often each query reads each key, (Nq, Nk) float64."""
    counts = torch.zeros(N_QUERIES, N_KEYS, dtype=torch.float64)
    for (q_begin, q_end), key_ranges in table.entries():
        for begin, end in key_ranges:
            counts[q_begin:q_end, begin:end] += 1
    return counts


def dense_attention(call: Call, counts: Tensor) -> Tensor:
    """The definition, over all pairs at once; a row that reads nothing is 0."""
    q, k = (
        torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * freqs[:, :, None]).flatten(-2)
        for x, freqs in ((call.q, call.q_freqs), (call.k, call.k_freqs))
    )
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.size(-1) ** -0.5
    weights = scores.exp() * counts * call.key_mask[:, None, None, :]
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("bhqk,bkhd->bqhd", weights / (total + (total == 0)), call.v)


def results(function: Callable[[Call], Tensor], call: Call) -> dict[str, Tensor]:
    """Output and gradients by name, on the CPU in double precision."""
    leaves = {name: getattr(call, name).detach().requires_grad_() for name in DIFFERENTIABLE}
    out = function(call._replace(**leaves))
    grads = torch.autograd.grad(out, list(leaves.values()), call.grad_out)
    named = {"out": out.detach()} | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: _wide(tensor) for name, tensor in named.items()}


def worst_error(call: Call, table: KeyRangeTable) -> tuple[float, str]:
    """The largest ‖result − exact‖ / ‖exact‖ of output and gradients, and of which it is; infinite where one is NaN."""

    def ours(call: Call) -> Tensor:
        q, k, v, q_freqs, k_freqs, key_mask, _ = call
        return anchor_attention(q, k, v, table, q_freqs=q_freqs, k_freqs=k_freqs, key_mask=key_mask)

    counts = multiplicities(table)
    found = results(ours, call)
    # Not on the device: a sanitizer would slow down, and report on, kernels that are not ours.
    exact = results(lambda call: dense_attention(call, counts), Call(*map(_wide, call)))
    errors = {name: ((found[name] - truth).norm() / truth.norm()).item() for name, truth in exact.items()}
    errors = {name: math.inf if math.isnan(error) else error for name, error in errors.items()}
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def is_poisoned(device: str) -> bool:
    """Whether nothing runs on the device any more in this process: an illegal access ends its context."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _wide(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.bool:
        return tensor.cpu()
    return tensor.cpu().to(torch.complex128 if tensor.is_complex() else torch.float64)


def main() -> int:
    """Runs the command line and returns the exit status."""
    command = argparse.ArgumentParser(prog="python -m benchmarks.gpu.small_shapes", description=__doc__)
    command.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    command.add_argument("--quick", action="store_true", help="fewer head dimensions")
    command.add_argument("--head-dims", nargs="+", type=int, default=[], help="these only")
    add_options(command)
    arguments = command.parse_args()
    torch.manual_seed(0)
    failures = int(arguments.lost != "")
    head_dims = arguments.head_dims or (QUICK_HEAD_DIMS if arguments.quick else HEAD_DIMS)
    cases = list(itertools.product(DTYPES, head_dims, TABLES.items()))
    for dtype, head_dim, (name, table) in cases[arguments.first :]:
        # Before it runs: a case that takes the GPU with it is the last one named.
        case = f"{dtype}, head_dim {head_dim}, {name}"
        print(f"{NEXT}{case}", flush=True)
        try:
            error, which = worst_error(make_call(dtype, head_dim, arguments.device), table)
        except RuntimeError as reason:
            print(f"FAILED: {case}: {reason}", flush=True)
            if is_poisoned(arguments.device):
                return AGAIN
            failures += 1
            continue
        bound = EPSILONS[dtype] * torch.finfo(dtype).eps
        right = error <= bound
        failures += not right
        verdict = "right" if right else "WRONG"
        print(f"{verdict}: {case}: {which} is off by {error:.1e}, allowed {bound:.1e}", flush=True)
    print(f"{failures} wrong")
    return WRONG if failures else RIGHT


if __name__ == "__main__":
    sys.exit(main())
