"""Outputs and gradients of the modules against recorded ones of the modules that they replace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anchor_attention import AttentionPattern, TokenSpec, use_backend
from anchor_attention.modules import CrossAnchorAttention, JointAnchorAttention, MixedAttention, SelfAnchorAttention

CASES = sorted(path.stem for path in (Path(__file__).parents[1] / "data" / "golden").glob("*.npz"))
BRANCH_MODULES = {"self": SelfAnchorAttention, "cross": CrossAnchorAttention, "joint": JointAnchorAttention}

# What float32 sums in another order allow, given with the recorded data.
OUTPUT_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4


class Case:
    """One recorded case: the module with the recorded weights, and its call."""

    def __init__(self, name: str, fused_weights: bool) -> None:
        with np.load(Path(__file__).parents[1] / "data" / "golden" / f"{name}.npz") as archive:
            self.arrays = {key: torch.from_numpy(archive[key]) for key in archive.files if key != "meta"}
            self.meta: dict[str, Any] = json.loads(str(archive["meta"]))
        fields = {
            "hidden_dim": self.meta["dim"],
            "num_heads": self.meta["heads"],
            "use_rope": self.meta["rope"],
            "bias": self.meta.get("bias", True),
        }
        self.module: torch.nn.Module
        if self.meta["kind"] == "mixed":
            self.module = MixedAttention(**fields)
            self.mixed = self.module
        else:
            suffix = {"anchor_suffix": self.meta["suffix"]} if "suffix" in self.meta else {}
            self.module = BRANCH_MODULES[self.meta["kind"]](**fields, **suffix, branches=tuple(self.meta["branches"]))
            self.mixed = self.module.mixed_attention
        self.mixed.load_state_dict(self.state_dict(fused_weights))
        self.specs = [TokenSpec(group, size) for group, size in self.meta["specs"]]
        self.freqs: torch.Tensor | None = None
        if "freqs_angle" in self.arrays:
            angle = self.arrays["freqs_angle"]
            self.freqs = torch.polar(torch.ones_like(angle), angle)

    def state_dict(self, fused: bool) -> dict[str, torch.Tensor]:
        kinds = ("weight", "bias") if self.meta.get("bias", True) else ("weight",)
        weights = {
            f"{name}.{kind}": self.arrays[f"{name}_{kind}"] for name in ("q", "k", "v", "proj") for kind in kinds
        }
        if fused:
            for kind in kinds:
                weights[f"qkv.{kind}"] = torch.cat([weights.pop(f"{name}.{kind}") for name in ("q", "k", "v")])
        return weights

    def run(self, x: torch.Tensor, specs: list[TokenSpec], freqs: torch.Tensor | None, **options: Any) -> Any:
        if "key_padding_mask" in self.arrays:
            options["key_padding_mask"] = self.arrays["key_padding_mask"].bool()
        if self.meta["kind"] == "mixed":
            patterns = [AttentionPattern(queries, keys) for queries, keys in self.meta["patterns"]]
            return self.module(x, specs, patterns, freqs=freqs, **options)
        return self.module(x, specs, freqs, **options)


def test_all_recorded_cases_are_there() -> None:
    assert len(CASES) == 13


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name: str, backend: str) -> None:
    case = Case(name, fused_weights=backend == "fused")
    x = case.arrays["x"].clone().requires_grad_()
    with use_backend(backend):
        y = case.run(x, case.specs, case.freqs)
        y.backward(case.arrays["grad_y"])
    torch.testing.assert_close(y, case.arrays["y"], rtol=0, atol=OUTPUT_TOLERANCE)
    torch.testing.assert_close(x.grad, case.arrays["grad_x"], rtol=0, atol=GRADIENT_TOLERANCE)
    for name, parameter in case.mixed.named_parameters():
        layer, kind = name.split(".")
        parts = ("q", "k", "v") if layer == "qkv" else (layer,)
        expected = torch.cat([case.arrays[f"grad_{part}_{kind}"] for part in parts])
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=GRADIENT_TOLERANCE)


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("name", [name for name in CASES if "cached" in name])
def test_queries_against_the_cache(name: str, backend: str) -> None:
    case = Case(name, fused_weights=True)
    suffix = case.meta.get("suffix", "_anchors")
    sizes = [spec.size for spec in case.specs]
    rows = torch.cat(
        [
            torch.arange(sum(sizes[:i]), sum(sizes[: i + 1]))
            for i, spec in enumerate(case.specs)
            if not spec.name.endswith(suffix)
        ]
    )
    queries_only = [TokenSpec(spec.name, None if spec.name.endswith(suffix) else spec.size) for spec in case.specs]
    assert case.freqs is not None
    with use_backend(backend), torch.no_grad():
        y, cache = case.run(case.arrays["x"], case.specs, case.freqs, return_kv_cache=True)
        y_queries = case.run(case.arrays["x"][:, rows], queries_only, case.freqs[:, rows], kv_cache=cache)
    torch.testing.assert_close(y, case.arrays["y"], rtol=0, atol=OUTPUT_TOLERANCE)
    torch.testing.assert_close(y_queries, case.arrays["y_cached_queries"], rtol=0, atol=OUTPUT_TOLERANCE)
