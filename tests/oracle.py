"""What a result is held against: exact values in float64, and how far plain PyTorch in the same dtype is from them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from anchor_attention import anchor_attention, anchor_attention_reference
from anchor_attention._dtypes import working_dtype
from anchor_attention.reference import rope_reference
from tests.generators import AttentionInputs

Result = dict[str, torch.Tensor]


def plain_attention(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The operation as a user would write it: every step in the dtype of the inputs."""
    q = inputs.q if inputs.q_freqs is None else rope_reference(inputs.q, inputs.q_freqs)
    k = inputs.k if inputs.k_freqs is None else rope_reference(inputs.k, inputs.k_freqs)
    shared_by = q.size(2) // k.size(2)
    k, v = (tensor.repeat_interleave(shared_by, dim=2) for tensor in (k, inputs.v))
    scale = q.size(-1) ** -0.5 if inputs.scale is None else inputs.scale
    # Each entry is made whole before it is written: in-place updates would count a row's gradient twice.
    rows, lses, end = [], [], 0
    batch, n_queries, heads, _ = q.shape

    def gap(begin: int, until: int) -> None:
        zeros = q[:, begin:until, :, :1].masked_fill(torch.tensor(True), 0.0)
        rows.append(zeros.expand(-1, -1, -1, v.size(-1)))
        lses.append(torch.full((batch, heads, until - begin), -torch.inf, dtype=torch.float32))

    for (begin, until), key_ranges in inputs.table.entries():
        gap(end, begin)
        end = until
        index = torch.cat([torch.arange(*key_range) for key_range in key_ranges])
        scores = torch.einsum("bqhd,bkhd->bhqk", q[:, begin:until], k[:, index]) * scale
        if inputs.key_mask is not None:
            scores = scores.masked_fill(~inputs.key_mask[:, None, None, index], -torch.inf)
        probabilities = torch.softmax(scores, dim=-1).nan_to_num(0.0)
        rows.append(torch.einsum("bhqk,bkhd->bqhd", probabilities, v[:, index]))
        lses.append(torch.logsumexp(scores.float(), dim=-1))
    gap(end, n_queries)
    return torch.cat(rows, dim=1), torch.cat(lses, dim=-1)


def run(function: Callable[[AttentionInputs], tuple[torch.Tensor, torch.Tensor]], inputs: AttentionInputs) -> Result:
    """Outputs and gradients by name. lse takes part in the gradients where it is finite."""
    tensors = inputs.differentiable()
    out, lse = function(inputs)
    reached = lse.isfinite()
    loss = (out * inputs.grad_out).sum() + torch.where(reached, lse, 0.0).mul(0.1).sum()
    grads = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    result = {"out": out.detach(), "lse": lse.detach()}
    for (name, tensor), grad in zip(tensors.items(), grads, strict=True):
        result[f"grad_{name}"] = torch.zeros_like(tensor) if grad is None else grad
    return result


def fused(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    return anchor_attention(inputs.q, inputs.k, inputs.v, inputs.table, **inputs.keywords(), return_lse=True)


def reference(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    return anchor_attention_reference(inputs.q, inputs.k, inputs.v, inputs.table, **inputs.keywords(), return_lse=True)


def intermediate_rounding(inputs: AttentionInputs, exact: Result, name: str) -> float:
    """Rounding of the float32 sums on the way to a result, which cancellation can leave larger than the result.

    A probability is as uncertain as its score, absolutely: eps · |score|. A score's gradient is P · (<dO, v> − delta):
    its two terms are sums of head_dim products. The factor behind it depends on the gradient asked for. Rotated queries
    and keys are rounded to the dtype of the inputs, which every score then carries.
    """
    if inputs.q.numel() == 0 or inputs.k.numel() == 0:
        return 0.0
    if name == "lse":
        rotated = inputs.q_freqs is not None or inputs.k_freqs is not None
        scale = abs(inputs.q.size(-1) ** -0.5 if inputs.scale is None else inputs.scale)
        q, k = (tensor.float().square().mean().sqrt().item() for tensor in (inputs.q, inputs.k))
        score = torch.finfo(inputs.q.dtype).eps * scale * math.sqrt(inputs.q.size(-1)) * q * k / 4
        # What is a relative error of the sum of exponentials is an absolute one of its logarithm.
        return torch.finfo(working_dtype(inputs.q.dtype)).eps + rotated * score
    q, k, v, grad_out = (tensor.abs().max().item() for tensor in (inputs.q, inputs.k, inputs.v, inputs.grad_out))
    lse = exact["lse"]
    probability = lse[lse.isfinite()].abs().max().item() if lse.isfinite().any() else 0.0
    scale = abs(inputs.q.size(-1) ** -0.5 if inputs.scale is None else inputs.scale)
    rows = math.sqrt(inputs.q.size(1) * inputs.q.size(2))
    score_gradient = torch.finfo(torch.float32).eps * (1 + probability) * (grad_out * v + 0.1)
    # delta is formed from the output as it was rounded to the dtype of the inputs.
    rms_v, rms_grad_out = (tensor.float().square().mean().sqrt().item() for tensor in (inputs.v, inputs.grad_out))
    score_gradient += torch.finfo(inputs.q.dtype).eps * rms_v * rms_grad_out
    score_gradient *= math.sqrt(inputs.v.size(-1)) * scale
    return {
        "out": torch.finfo(torch.float32).eps * probability * v,
        "grad_v": torch.finfo(torch.float32).eps * probability * grad_out * rows,
        "grad_q": score_gradient * k,
        "grad_k": score_gradient * q * rows,
        "grad_q_freqs": score_gradient * q * k * rows,
        "grad_k_freqs": score_gradient * q * k * rows,
    }[name]


def assert_as_good_as_plain(
    actual: Result, exact: Result, plain: Result, inputs: AttentionInputs, factor: float = 2.0
) -> None:
    """Error ≤ 2 × that of plain PyTorch in the same dtype, plus rounding; infinities agree and nothing is NaN."""
    for name, expected in exact.items():
        found, theirs = (result[name].to(expected.dtype) for result in (actual, plain))
        assert found.shape == expected.shape, name
        finite = expected.isfinite()
        assert torch.equal(found.isfinite(), finite), name
        if not finite.any():
            continue
        # Gradients of freqs are float32, but sums over gradients that were rounded to the dtype of the inputs.
        result_eps = torch.finfo(torch.float32 if name == "lse" else inputs.q.dtype).eps
        rounding = 4 * (result_eps * expected[finite].abs().max() + intermediate_rounding(inputs, exact, name))
        bound = factor * (theirs - expected)[finite].abs().max() + rounding
        error = (found - expected)[finite].abs().max()
        assert error <= bound, f"{name}: error {error:.3e}, allowed {bound:.3e}"
