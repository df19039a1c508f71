"""Classes that stand in for attention modules whose tokens are spread over processes."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._context import interceptable
from ..integrations.fused_forward import Arguments
from ..integrations.fused_mixed import MixedForward, UntiedMixedForward
from ..modules.checks import Freqs, check_inputs
from ..modules.kv_cache import CacheEntry, KVCache
from ..modules.mixed import MixedAttention
from ..modules.multi_branch import MultiBranchAnchorAttention
from ..modules.plan import AttentionPlan, bounded_cache
from ..modules.projection import project
from ..modules.steps import named_call, plan_call, project_keys
from ..patterns import AttentionPattern, TokenSpec
from .sharded_plan import read_groups
from .sharded_steps import Sharding, attend_sharded


def _guarded(module: Any, kv_cache: Any, call: Callable[..., Any], *arguments: Any) -> Any:
    return module.sharding.guarded(module, kv_cache, lambda: call(*arguments))


# A graph of sizes that change would hold symbols where processes agree, and each process would compile at times of its
# own: what travels is no part of it.
_outside_graph = torch.compiler.disable(  # type: ignore[no-untyped-call]
    _guarded, reason="modules whose tokens are spread run outside the graph: compile without fullgraph=True"
)


class ShardedMixed(MixedAttention):
    """:class:`MixedAttention` of the tokens of this process, with the keys of all."""

    sharding: Sharding

    @interceptable
    def forward(
        self,
        x: Tensor,
        token_specs: Sequence[TokenSpec],
        attention_patterns: Sequence[AttentionPattern],
        key_padding_mask: Tensor | None = None,
        freqs: Freqs | None = None,
        kv_cache: Mapping[str, CacheEntry] | None = None,
        return_kv_cache: bool = False,
    ) -> Tensor | tuple[Tensor, KVCache]:
        """Arguments of this process, and its rows of the result; the cache is that of all processes."""
        arguments = (x, token_specs, attention_patterns, key_padding_mask, freqs, kv_cache, return_kv_cache)
        call = _outside_graph if torch.compiler.is_compiling() else _guarded
        result: Tensor | tuple[Tensor, KVCache] = call(self, kv_cache, self._forward, *arguments)
        return result

    def _forward(
        self,
        x: Tensor,
        token_specs: Sequence[TokenSpec],
        attention_patterns: Sequence[AttentionPattern],
        key_padding_mask: Tensor | None,
        freqs: Freqs | None,
        kv_cache: Mapping[str, CacheEntry] | None,
        return_kv_cache: bool,
    ) -> Tensor | tuple[Tensor, KVCache]:
        check_inputs(x, self.num_heads, self.head_dim, self.use_rope, key_padding_mask, freqs, layer=self.qkv)
        heads = (self.num_heads, self.head_dim)
        plan = plan_call(x, token_specs, attention_patterns, kv_cache, *heads, keep_unread=return_kv_cache)
        groups, patterns = named_call(x, token_specs, attention_patterns, kv_cache, *heads)
        if not read_groups(groups, plan.key_slices):
            # All keys are in the cache: nobody else is needed, and nobody may be asked.
            return _alone(  # type: ignore[no-any-return]
                self, x, token_specs, attention_patterns, key_padding_mask, freqs, kv_cache, return_kv_cache
            )
        k, v, project_queries = project_keys(self.qkv, x, plan, self.num_heads)

        def queries() -> Tensor:
            q = project_queries()
            return cast(Tensor, self.q_norm(q)).to(q.dtype)

        attended, cache = attend_sharded(
            self,
            self.sharding,
            self.k_norm(k).to(k.dtype),
            v,
            queries,
            groups,
            patterns,
            plan,
            key_padding_mask=key_padding_mask,
            freqs=freqs,
            kv_cache=kv_cache,
            return_kv_cache=return_kv_cache,
            dropout=self.dropout if self.training else 0.0,
        )
        out: Tensor = project(self.proj, attended)
        return out if cache is None else (out, cache)


# Without what stands between a module and its forward: the sharded module has that of its own.
_alone = inspect.unwrap(MixedAttention.forward)


class ShardedMultiBranch(MultiBranchAnchorAttention):
    """A branch module over :class:`ShardedMixed`: the other processes learn if its own checks fail."""

    sharding: Sharding

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the class that it stands in for."""
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        forward = super().forward
        return self.sharding.guarded(self.mixed_attention, kwargs.get("kv_cache"), lambda: forward(*args, **kwargs))


class ShardedMixedForward(MixedForward):
    """An accelerated module of noether, of the tokens of this process, with the keys of all."""

    sharding: Sharding

    def fused(self, arguments: Arguments) -> Any:
        """As the class that it stands in for; but what it can't compute, its original can't compute either."""
        call = _outside_graph if torch.compiler.is_compiling() else _guarded
        return call(self, arguments.get("kv_cache"), self._fused, arguments)

    def _fused(self, arguments: Arguments) -> Any:
        result = super().fused(arguments)
        if result is None:
            raise ValueError(
                f"{self.original_class.__name__} can't share the keys of this call, which only its original takes: "
                "dropout, a causal or a dense mask, inputs of another kind"
            )
        return result

    def _attend_fused(
        self, x: Tensor, token_specs: Any, patterns: Any, plan: AttentionPlan, **options: Any
    ) -> tuple[Tensor, KVCache | None]:
        groups, named = named_call(x, token_specs, patterns, options["kv_cache"], self.num_heads, self.head_dim)
        if not read_groups(groups, plan.key_slices):
            return super()._attend_fused(x, token_specs, patterns, plan, **options)
        k, v, project_queries = self._project(x, plan)
        return attend_sharded(self, self.sharding, k, v, project_queries, groups, named, plan, dropout=0.0, **options)

    def _project(self, x: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
        packed = getattr(self, "qkv", None)
        if not isinstance(packed, nn.Module):
            return super()._project(x, plan)
        k, v, project_queries = project_keys(packed, x, plan, self.num_heads)
        return self._normalised("k_norm", k), v, lambda: self._normalised("q_norm", project_queries())


@bounded_cache
def sharded_class(sharded: type[nn.Module], original: type[nn.Module]) -> type[nn.Module]:
    """Makes the subclass of ``original`` whose forward is that of ``sharded``."""

    def fill(namespace: dict[str, Any]) -> None:
        namespace.update(__module__=__name__, __doc__=original.__doc__)

    made: type[nn.Module] = types.new_class(f"Sharded{original.__name__}", (sharded, original), exec_body=fill)
    return made


_SHARDED: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = (
    (MixedAttention, ShardedMixed),
    (MultiBranchAnchorAttention, ShardedMultiBranch),
    (MixedForward, ShardedMixedForward),
)


def shard(module: nn.Module, sharding: Sharding) -> int:
    """Lets the attention modules in a module share their keys. Returns how many there are.

    Raises:
        ValueError: If one shares its keys already, or goes forward by a method of its own.
    """
    found = 0
    for part in module.modules():
        if isinstance(part, (ShardedMixed, ShardedMultiBranch, ShardedMixedForward)):
            raise ValueError(f"module must not share its keys already, got {type(part).__name__}")
        if isinstance(part, MixedAttention) and type(part).forward is not MixedAttention.forward:
            raise ValueError(f"module must go forward as MixedAttention does, got {type(part).__name__}.forward")
        if isinstance(part, UntiedMixedForward):
            raise ValueError(f"module must project all groups alike to share its keys, got {type(part).__name__}")
    for part in module.modules():
        for original, sharded in _SHARDED:
            if isinstance(part, original):
                part.__class__ = sharded_class(sharded, type(part))
                vars(part)["sharding"] = sharding
                found += original is not MultiBranchAnchorAttention
    return found
