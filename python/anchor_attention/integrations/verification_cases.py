"""The small random calls on which a stand-in and its original are compared: those that a noether module may get."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

BATCH = 2
# Makes scores of some tens: an original may bound them.
LARGE = 4.0
WITHIN, ACROSS, JOINT = "attention within branches", "attention across branches", "joint attention"

Call = Callable[[nn.Module], Any]
# Its name, the call, and whether it runs in training.
Case = tuple[str, Call, bool]


@dataclass(frozen=True)
class _Group:
    """A token group with the properties that an original may ask for."""

    name: str
    size: int | None

    @property
    def domain(self) -> str:
        return self.name.split("_")[0]

    @property
    def attn_type(self) -> str:
        return self.name.split("_")[-1]


@dataclass(frozen=True)
class _Pattern:
    query_tokens: list[str]
    key_value_tokens: list[str]


def random_values(*shape: int) -> Tensor:
    """Normal numbers in float32, the same for a model on any device."""
    return torch.randn(shape, device="cpu", dtype=torch.float32)


def cases(module: nn.Module, branches: Sequence[str], device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """What is compared. Each case runs once, in training or not: modules with millions of parameters are slow."""
    inputs = _Inputs(module, tuple(inspect.signature(type(module).forward).parameters), device, dtype)
    if "attention_patterns" in inputs.names:
        yield from _mixed_cases(inputs, branches)
    elif "kv" in inputs.names:
        yield from _perceiver_cases(inputs, branches)
    elif hasattr(module, "q_global"):
        yield from _latent_cases(inputs)
    else:
        yield from _plain_cases(inputs)


@dataclass(frozen=True)
class _Inputs:
    module: nn.Module
    names: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype

    def tokens(self, n: int, width: int | None = None, batch: int = BATCH) -> Tensor:
        width = int(self.module.num_heads) * int(self.module.head_dim) if width is None else width  # type: ignore[arg-type]
        return random_values(batch, n, width).to(self.device, self.dtype)

    def freqs(self, n: int, batch: int = BATCH) -> Tensor | None:
        if not getattr(self.module, "use_rope", False):
            return None
        angles = 3 * random_values(batch, n, int(self.module.head_dim) // 2)  # type: ignore[arg-type]
        factors = torch.polar(torch.ones_like(angles), angles)
        return factors.to(self.device, torch.complex128 if self.dtype == torch.float64 else torch.complex64)

    def angles(self, n: int) -> tuple[Tensor, ...] | None:
        """The legacy form of the factors of three axes, as wide as the heads allow."""
        width = int(self.module.head_dim) // 6 * 2  # type: ignore[arg-type]
        if width == 0:
            return None
        return tuple((3 * random_values(BATCH, n, width)).to(self.device, self.dtype) for _ in range(3))

    def call(self, *tokens: str, **arguments: Any) -> Call:
        """A call, followed by the gradients of the named arguments."""
        given = {name: value for name, value in arguments.items() if name in self.names and value is not None}

        def run(module: nn.Module) -> Any:
            inputs = dict(given)
            entered: list[Tensor] = []
            with torch.set_grad_enabled(bool(tokens)):
                for name in tokens:
                    inputs[name] = tree_map(lambda part: part.detach().requires_grad_(), inputs[name])
                proj = module.get_submodule("out_linear" if hasattr(module, "q_global") else "proj")
                handle = proj.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
                try:
                    result = module.forward(**inputs)
                finally:
                    handle.remove()
                outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
                if not tokens:
                    return result, entered
                total = sum((out * torch.cos(torch.arange(out.shape[-1], device=out.device))).sum() for out in outputs)
                grads = torch.autograd.grad(total, tree_leaves([inputs[name] for name in tokens]))  # type: ignore[arg-type]
            return [out.detach() for out in (*outputs, *entered)], grads

        return run


def _mixed_cases(inputs: _Inputs, branches: Sequence[str]) -> Iterator[Case]:
    first, second, *others = branch_names(inputs.module, branches)
    sizes = {
        "balanced groups": ((4, 6), (4, 6)),
        "unbalanced groups": ((3, 4), (5, 13)),
        "nearly balanced groups": ((10, 11), (10, 10)),
        "anchors alone": ((4, 0), (7, 0)),
    }
    for name, (of_first, of_second) in sizes.items():
        groups = _groups({first: of_first, second: of_second, **dict.fromkeys(others, of_second)})
        for kind, patterns in _patterns(groups).items():
            # Gradients of every pattern, whether the projections know balanced groups or not.
            trains = (name, kind) in (("balanced groups", JOINT), ("unbalanced groups", WITHIN)) or (
                (name, kind) == ("unbalanced groups", ACROSS)
            )
            if trains or kind == JOINT or name == "balanced groups":
                yield f"{name}, {kind}", _mixed_call(inputs, groups, patterns, *(["x"] if trains else [])), trains
    yield "one branch", _mixed_call(inputs, _groups({first: (4, 6)}), None), False
    yield "an empty branch", _mixed_call(inputs, _groups({first: (4, 6), second: (5, 0)}, keep_empty=True), None), True
    yield "queries first", _mixed_call(inputs, _groups({first: (4, 6), second: (5, 9)})[::-1], None), True
    groups = _groups({first: (4, 6), second: (5, 9)})
    if inputs.module.use_rope:
        yield "factors that the samples share", _mixed_call(inputs, groups, None, freqs_batch=1), True
        angles = inputs.angles(sum(group.size or 0 for group in groups))
        if angles is not None:
            yield "angles by axis", _mixed_call(inputs, groups, None, freqs=angles), False
    if inputs.dtype in (torch.float32, torch.float64):
        yield "large tokens", _mixed_call(inputs, groups, None, scale=LARGE), False
    if "key_padding_mask" in inputs.names:
        for name, of_second in (("a mask", (5, 9)), ("a mask, balanced groups", (4, 6))):
            masked = _groups({first: (4, 6), second: of_second})
            for kind, patterns in _patterns(masked).items():
                if kind == JOINT or name == "a mask":
                    yield f"{name}, {kind}", _mixed_call(inputs, masked, patterns, mask_batch=BATCH), kind == ACROSS
        yield "a mask that the samples share", _mixed_call(inputs, groups, None, mask_batch=1), False
    if "kv_cache" in inputs.names:
        for absent in (False, True):
            call = _cached_call(inputs, groups, absent)
            yield f"a cache{', a branch without queries' if absent else ''}", call, absent
        if "key_padding_mask" in inputs.names:
            yield "a mask and a cache", _cached_call(inputs, groups, False, mask_batch=BATCH), False


def branch_names(module: nn.Module, branches: Sequence[str]) -> list[str]:
    """Two or more branches that the module may get, the known ones first."""
    domains = [branch.split("_")[0] for branch in branches]
    names = list(branches) if len(set(domains)) == len(domains) else []
    # As many as there are projections by domain, where there are such.
    n_domains = getattr(getattr(module, "q", None), "num_types", 2)
    names += [name for name in ("surface", "volume", *(f"domain{i}" for i in range(n_domains))) if name not in names]
    return names[: max(2, n_domains)]


def _groups(sizes: dict[str, tuple[int, int]], keep_empty: bool = False) -> list[_Group]:
    groups = []
    for branch, (anchors, queries) in sizes.items():
        groups.append(_Group(f"{branch}_anchors", anchors))
        if queries or keep_empty:
            groups.append(_Group(f"{branch}_queries", queries))
    return groups


def _patterns(groups: Sequence[_Group]) -> dict[str, list[_Pattern]]:
    """Attention within, across, and within and across branches."""
    by_branch: dict[str, list[str]] = {}
    for group in groups:
        by_branch.setdefault(group.name.rsplit("_", 1)[0], []).append(group.name)
    anchors = {branch: f"{branch}_anchors" for branch in by_branch}
    every = [group.name for group in groups]
    return {
        WITHIN: [_Pattern(names, [anchors[branch]]) for branch, names in by_branch.items()],
        ACROSS: [
            _Pattern(names, [anchor for other, anchor in anchors.items() if other != branch or len(anchors) == 1])
            for branch, names in by_branch.items()
        ],
        JOINT: [_Pattern(every, list(anchors.values()))],
    }


def _mixed_call(
    inputs: _Inputs,
    groups: Sequence[_Group],
    patterns: Sequence[_Pattern] | None,
    *tokens: str,
    mask_batch: int | None = None,
    freqs_batch: int = BATCH,
    freqs: Any = None,
    scale: float = 1.0,
) -> Call:
    n = sum(group.size or 0 for group in groups)
    padding = None
    if mask_batch is not None:
        padding = random_values(mask_batch, n) > -0.5
        begin = 0
        for group in groups:
            # No row without keys: what an original makes of them is not the same in every version of torch.
            padding[:, begin] = True
            begin += group.size or 0
        padding = padding.to(inputs.device)
    patterns = _patterns(groups)[JOINT] if patterns is None else patterns
    return inputs.call(
        *tokens,
        x=scale * inputs.tokens(n),
        token_specs=list(groups),
        attention_patterns=list(patterns),
        key_padding_mask=padding,
        freqs=inputs.freqs(n, freqs_batch) if freqs is None else freqs,
    )


def _cached_call(inputs: _Inputs, groups: Sequence[_Group], absent: bool, mask_batch: int | None = None) -> Call:
    """A call that returns a cache, and one of queries alone that reads it."""
    patterns = _patterns(groups)[JOINT]
    alone = [
        _Group(group.name, None if group.name.endswith("_anchors") else group.size)
        for group in groups
        if not (absent and group is groups[-1])
    ]
    n_alone = sum(group.size or 0 for group in alone)
    queries, query_freqs = inputs.tokens(n_alone), inputs.freqs(n_alone)
    names = {group.name for group in alone}
    kept = [_Pattern([name for name in p.query_tokens if name in names], p.key_value_tokens) for p in patterns]
    first = _mixed_call(inputs, groups, patterns, mask_batch=mask_batch)

    def both(module: nn.Module) -> Any:
        whole = first(module)
        cache = whole[0][1]
        second = inputs.call(x=queries, token_specs=alone, attention_patterns=kept, freqs=query_freqs, kv_cache=cache)
        return whole, second(module)

    return both


def _plain_cases(inputs: _Inputs) -> Iterator[Case]:
    x, freqs = inputs.tokens(9), inputs.freqs(9)
    first = torch.arange(9, device="cpu") == 0
    masks = {
        "no mask": None,
        "a mask of keys": (random_values(BATCH, 1, 1, 9) > -0.5) | first,
        "a mask of keys that the samples share": (random_values(1, 1, 1, 9) > -0.5).index_fill(
            3, torch.tensor([2], device="cpu"), True
        ),
        "a mask of pairs": (random_values(BATCH, 1, 9, 9) > -0.5) | torch.eye(9, dtype=torch.bool, device="cpu"),
        "a mask that is added": random_values(9, 9).to(inputs.dtype),
    }
    for name, mask in masks.items():
        mask = None if mask is None else mask.to(inputs.device)
        tokens = ["x"] if name in ("no mask", "a mask of keys") else []
        yield name, inputs.call(*tokens, x=x, attn_mask=mask, freqs=freqs), name == "no mask"
    yield "one token", inputs.call(x=inputs.tokens(1), freqs=inputs.freqs(1)), False
    if inputs.dtype in (torch.float32, torch.float64):
        yield "large tokens", inputs.call(x=LARGE * x, freqs=freqs), False


def _perceiver_cases(inputs: _Inputs, branches: Sequence[str]) -> Iterator[Case]:
    first, second, *others = branch_names(inputs.module, branches)
    layer = getattr(inputs.module, "k", None) or getattr(inputs.module, "kv", None)
    width = getattr(layer, "in_features", None)
    balances = {"balanced groups": (5, 5), "nearly balanced groups": (21, 20), "unbalanced groups": (4, 13)}
    kv = inputs.tokens(7, width)
    for name, (of_first, of_second) in balances.items():
        groups = [_Group(f"{first}_anchors", of_first)]
        groups += [_Group(f"{branch}_anchors", of_second) for branch in (second, *others)]
        n = sum(group.size or 0 for group in groups)
        x, q_freqs, k_freqs = inputs.tokens(n), inputs.freqs(n), inputs.freqs(7)
        mask = ((random_values(BATCH, 1, 1, 7) > -0.5) | (torch.arange(7, device="cpu") == 0)).to(inputs.device)
        arguments = {"q": x, "token_specs": groups, "kv": kv, "q_freqs": q_freqs, "k_freqs": k_freqs}
        yield name, inputs.call("q", "kv", **arguments), True
        yield f"{name} and a mask", inputs.call(attn_mask=mask, **arguments), False
        if inputs.dtype in (torch.float32, torch.float64):
            yield f"{name} and large tokens", inputs.call(**{**arguments, "q": LARGE * x, "kv": LARGE * kv}), False
        if "kv_cache" in inputs.names:
            cached = {"q": inputs.tokens(n), "token_specs": groups, "q_freqs": q_freqs}

            def both(module: nn.Module, arguments: Any = arguments, cached: Any = cached) -> Any:
                whole = inputs.call(**arguments)(module)
                return whole, inputs.call(kv_cache=whole[0][1], **cached)(module)

            yield f"{name} and a cache", both, False


def _latent_cases(inputs: _Inputs) -> Iterator[Case]:
    module: Any = inputs.module
    width = module.in_project_x.in_features
    several = "context" in inputs.names
    # Two runs of dropout can't be compared; it is a layer of its own, which the stand-in calls.
    trains = all(getattr(part, "p", 0.0) == 0.0 for part in module.modules())
    for name, n in {"many tokens": 67, "fewer tokens than latents": 3, "one token": 1}.items():
        x = inputs.tokens(n, width)
        yield name, inputs.call("x", x=(x,) if several else x), trains
        if inputs.dtype in (torch.float32, torch.float64) and n > 1:
            yield f"{name}, large", inputs.call(x=(LARGE * x,) if several else LARGE * x), False
    if several and hasattr(module, "cross_k"):
        streams = tuple(inputs.tokens(n, width) for n in (9, 4))
        yield "two streams", inputs.call("x", x=streams), trains
        context = random_values(BATCH, module.heads, 7, module.cross_k.in_features)
        context = context.to(inputs.device, inputs.dtype)
        yield "two streams and a context", inputs.call("x", "context", x=streams, context=context), trains
        if inputs.dtype in (torch.float32, torch.float64):
            yield "a large context", inputs.call(x=streams, context=LARGE * context), False
