"""LatentAttention and PerceiverAttention against the same in plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anchor_attention import LatentAttention, MissingAnchorTokenError, PerceiverAttention, TokenSpec, rope_reference
from tests.generators import unit_freqs

SPECS = [TokenSpec("a_anchors", 5), TokenSpec("a_queries", 3), TokenSpec("b_anchors", 4), TokenSpec("b_queries", 6)]
A_ANCHORS, A, B_ANCHORS, B = slice(0, 5), slice(0, 8), slice(8, 12), slice(8, 18)


def randomise(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)


def heads(tensor: Tensor, n: int) -> Tensor:
    return tensor.unflatten(-1, (n, -1)).transpose(1, 2)


def plain_perceiver(module: PerceiverAttention, q: Tensor, kv: Tensor, freqs: Any = None) -> Tensor:
    queries, keys, values = (heads(layer(x), n) for layer, x, n in (
        (module.q, q, module.num_heads), (module.k, kv, module.num_kv_heads), (module.v, kv, module.num_kv_heads)
    ))  # fmt: skip
    queries, keys = module.q_norm(queries), module.k_norm(keys)
    if freqs is not None:
        rotated = ((queries, freqs[0]), (keys, freqs[1]))
        queries, keys = (rope_reference(x.transpose(1, 2), factors).transpose(1, 2) for x, factors in rotated)
    out = nn.functional.scaled_dot_product_attention(queries, keys, values, enable_gqa=True)
    return module.proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("num_kv_heads", (4, 2, 1))
@pytest.mark.parametrize("qk_norm", (False, "rms"))
def test_perceiver_is_plain_attention(num_kv_heads: int, qk_norm: bool | str) -> None:
    fields = {"dim": 32, "num_heads": 4, "kv_dim": 20, "num_kv_heads": num_kv_heads, "qk_norm": qk_norm}
    module = PerceiverAttention(use_rope=True, **fields).double()
    randomise(module)
    q, kv = torch.randn(2, 7, 32, dtype=torch.float64), torch.randn(2, 11, 20, dtype=torch.float64)
    freqs = unit_freqs(1, 7, 8, torch.float64), unit_freqs(2, 11, 8, torch.float64)
    out, cache = module(q, kv, q_freqs=freqs[0], k_freqs=freqs[1], return_kv_cache=True)
    torch.testing.assert_close(out, plain_perceiver(module, q, kv, freqs))
    assert cache["k"].shape == (2, num_kv_heads, 11, 8)
    torch.testing.assert_close(module(q[:, 2:], kv_cache=cache, q_freqs=freqs[0][:, 2:]), out[:, 2:])


def test_perceiver_leaves_out_padding() -> None:
    module = PerceiverAttention(dim=16, num_heads=2).double()
    randomise(module)
    q, kv = torch.randn(2, 7, 16, dtype=torch.float64), torch.randn(2, 11, 16, dtype=torch.float64)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[:, 6:] = False
    torch.testing.assert_close(module(q, kv, key_padding_mask=mask), plain_perceiver(module, q, kv[:, :6]))


def test_perceiver_names_its_parameters_as_others_do() -> None:
    names = {f"{layer}.{kind}" for layer in ("q", "k", "v", "proj") for kind in ("weight", "bias")}
    assert set(PerceiverAttention(dim=16, num_heads=2).state_dict()) == names


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def plain_latent(module: LatentAttention, x: Tensor, taken_up: Tensor, latents: Tensor) -> Tensor:
    """Tokens of x by way of latents that take up other tokens."""
    keys, taken_keys = (module.k_norm(module.k(t).unflatten(-1, (module.num_heads, -1))) for t in (x, taken_up))
    values = module.v(taken_up).unflatten(-1, (module.num_heads, -1))
    latents = module.q_norm(latents).expand(x.shape[0], -1, -1, -1)
    taken = attend(latents, taken_keys, values, module.scale)
    return module.proj(attend(keys, latents, taken, module.scale).flatten(2))


def latent_module(**fields: Any) -> tuple[LatentAttention, Tensor]:
    module = LatentAttention(dim=16, num_heads=2, num_latents=3, **fields).double()
    randomise(module)
    return module, torch.randn(2, 18, 16, dtype=torch.float64)


@pytest.mark.parametrize("qk_norm", (False, True, "rms"))
def test_latents_of_all_tokens(qk_norm: bool | str) -> None:
    module, x = latent_module(qk_norm=qk_norm, scale=0.7)
    torch.testing.assert_close(module(x), plain_latent(module, x, x, module.latents))
    given = torch.randn(1, 3, 2, 8, dtype=torch.float64)
    torch.testing.assert_close(module(x, latents=given), plain_latent(module, x, x, given))
    mask = torch.ones(2, 18, dtype=torch.bool)
    mask[:, 11:] = False
    torch.testing.assert_close(module(x, key_padding_mask=mask), plain_latent(module, x, x[:, :11], module.latents))


def test_shared_latents_take_up_the_anchors_of_all_branches() -> None:
    module, x = latent_module(branches=("a", "b"))
    anchors = torch.cat([x[:, A_ANCHORS], x[:, B_ANCHORS]], dim=1)
    torch.testing.assert_close(module(x, SPECS), plain_latent(module, x, anchors, module.latents))


def test_latents_of_a_branch_take_up_its_anchors() -> None:
    module, x = latent_module(branches=("a", "b"), per_branch=True)
    out = module(x, SPECS)
    parts = ((A, A_ANCHORS, module.latents[:3]), (B, B_ANCHORS, module.latents[3:]))
    for tokens, anchors, latents in parts:
        torch.testing.assert_close(out[:, tokens], plain_latent(module, x[:, tokens], x[:, anchors], latents))


@pytest.mark.parametrize("per_branch", (False, True))
def test_cached_latents_answer_later_queries(per_branch: bool) -> None:
    module, x = latent_module(branches=("a", "b"), per_branch=per_branch)
    out, cache = module(x, SPECS, return_latent_cache=True)
    later = [TokenSpec("a_anchors", None), TokenSpec("b_queries", 6), TokenSpec("a_queries", 3)]
    found = module(torch.cat([x[:, 12:], x[:, 5:8]], dim=1), later, latent_cache=cache)
    torch.testing.assert_close(found, torch.cat([out[:, 12:], out[:, 5:8]], dim=1))


def test_gradients_reach_every_parameter() -> None:
    for module, call in (
        (LatentAttention(dim=16, num_heads=2, qk_norm="rms"), lambda m: m(torch.randn(1, 9, 16))),
        (PerceiverAttention(dim=16, num_heads=2, num_kv_heads=1), lambda m: m(*torch.randn(2, 1, 9, 16))),
    ):
        randomise(module)
        call(module).square().sum().backward()
        # A bias of the keys moves all scores of a query alike.
        unmoved = {"k.bias"} if isinstance(module, PerceiverAttention) else set()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and (parameter.grad.abs().max() > 1e-6 or name in unmoved), name


def test_modules_compile_with_any_number_of_tokens() -> None:
    module = LatentAttention(dim=16, num_heads=2)
    randomise(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (9, 20, 31):
        x = torch.randn(2, n, 16)
        torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LatentAttention(dim=16, num_heads=2, use_rope=True), "has no field 'use_rope'"),
        (lambda: LatentAttention(dim=16, num_heads=2, per_branch=True), r"per_branch needs branches, got \(\)"),
        (lambda: LatentAttention(dim=16, num_heads=2, num_latents=0), "num_latents must be a positive integer, got 0"),
        (lambda: LatentAttention(dim=16, num_heads=2, scale=float("inf")), "scale must be a finite number, got inf"),
        (lambda: PerceiverAttention(dim=16, num_heads=4, num_kv_heads=3), "num_heads must be divisible by num_kv_hea"),
        (lambda: PerceiverAttention(dim=16, num_heads=2)(torch.zeros(1, 2, 16)), "either kv or kv_cache, got neither"),
        (
            lambda: PerceiverAttention(dim=16, num_heads=2, kv_dim=4)(torch.zeros(1, 2, 16), torch.zeros(1, 3, 5)),
            r"kv must be \(batch, tokens, 4\), got shape \(1, 3, 5\)",
        ),
        (
            lambda: PerceiverAttention(dim=16, num_heads=2)(torch.zeros(1, 2, 16), kv_cache={"k": torch.zeros(1, 3)}),
            r"kv_cache must hold 'k'",
        ),
        (
            lambda: PerceiverAttention(dim=16, num_heads=2)(torch.zeros(1, 2, 16), torch.zeros(2, 3, 16)),
            "kv must have the batch size of q, 1, got 2",
        ),
        (
            lambda: PerceiverAttention(dim=16, num_heads=2)(torch.zeros(1, 2, 16), [[1.0]]),
            "kv must be a Tensor, got list",
        ),
        (
            lambda: PerceiverAttention(dim=16, num_heads=2)(
                torch.zeros(1, 2, 16), torch.zeros(1, 3, 16, device="meta")
            ),
            r"kv must be on the device of the module's weights \(cpu\), got meta",
        ),
        (
            lambda: latent_module()[0](torch.zeros(1, 2, 16, device="meta")),
            r"x must be on the device of the module's weights \(cpu\), got meta",
        ),
        (lambda: latent_module()[0](torch.zeros(1, 2, 16).double(), SPECS), "the module has no branches"),
        (lambda: latent_module(branches=("a",))[0](torch.zeros(1, 2, 16).double()), "token_specs must be given"),
        (
            lambda: latent_module(branches=("a", "b"))[0](torch.zeros(1, 2, 16).double(), SPECS),
            "Token specs total size 18 must equal the number of tokens of x, 2",
        ),
        (
            lambda: latent_module()[0](torch.zeros(1, 2, 16).double(), latent_cache=torch.zeros(1, 4, 2, 8)),
            r"latent_cache must have shape \(1, 3, 2, 8\), got \(1, 4, 2, 8\)",
        ),
    ],
)
def test_wrong_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_a_branch_without_anchors_is_an_error() -> None:
    module, x = latent_module(branches=("a",))
    with pytest.raises(MissingAnchorTokenError):
        module(x[:, :3], [TokenSpec("a_queries", 3)])
