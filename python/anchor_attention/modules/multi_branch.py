"""Base of the branch modules: token groups by branch, anchors by suffix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NoReturn

from torch import Tensor, nn

from .._context import interceptable
from ..patterns import AttentionPattern, TokenSpec
from .checks import Freqs, check_groups
from .config import MultiBranchAnchorAttentionConfig, default, given, resolve_config
from .errors import MissingAnchorTokenError, MissingBranchTokensError, UnexpectedTokenError
from .kv_cache import CacheEntry, KVCache
from .mixed import MixedAttention
from .plan import bounded_cache


class MultiBranchAnchorAttention(nn.Module):
    """Anchor attention of several branches that share one set of projections. Abstract.

    A token group belongs to the longest branch name that its name starts with; the anchors of a branch are the group
    ``branch + anchor_suffix``. A subclass defines who reads whom in ``_create_attention_patterns``, and may define in
    ``_validate`` what the input must contain.

    Args:
        config: A config of the class ``config_class`` or any object with its fields; or ``None`` and the fields as
            keywords.
        hidden_dim: Width of the tokens, a multiple of ``num_heads``.
        num_heads: Number of heads.
        branches: Names of the branches: prefixes of their token groups' names.
        anchor_suffix: The anchors of a branch are the group ``branch + anchor_suffix``.
        use_rope: Whether queries and keys are rotated by ``freqs``, which ``forward`` then requires.
        dropout: Probability with which attention weights are dropped while training.
        init_weights: How the projections are initialised, see :class:`AttentionConfig`.
        bias: Whether the projections have a bias.
        qk_norm: Whether queries and keys are normalised: ``False``, ``True``, or ``"rms"`` with learnt weights.
        dim: Another name for ``hidden_dim``.

    Raises:
        TypeError: If a field is missing or unknown.
        ValueError: If a field is out of its range, for example too few branches.
    """

    config_class: ClassVar[type[MultiBranchAnchorAttentionConfig]] = MultiBranchAnchorAttentionConfig

    def __init__(
        self,
        config: Any = None,
        *,
        hidden_dim: int | None = None,
        num_heads: int | None = None,
        branches: Sequence[str] | None = None,
        anchor_suffix: str = default("_anchors"),
        use_rope: bool = default(False),
        dropout: float = default(0.0),
        init_weights: str = default("truncnormal002"),
        bias: bool = default(True),
        qk_norm: bool | str = default(False),
        dim: int | None = None,
        **unknown: NoReturn,
    ) -> None:
        super().__init__()
        resolved = resolve_config(self.config_class, config, given(locals()), unknown)
        self.mixed_attention = MixedAttention(resolved)
        self.branches = resolved.branches
        self.anchor_suffix = resolved.anchor_suffix

    @interceptable
    def forward(
        self,
        x: Tensor,
        token_specs: Sequence[TokenSpec],
        freqs: Freqs | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        kv_cache: Mapping[str, CacheEntry] | None = None,
        return_kv_cache: bool = False,
    ) -> Tensor | tuple[Tensor, KVCache]:
        """Applies attention in the patterns of the subclass. Arguments and result as for :class:`MixedAttention`.

        Raises:
            UnexpectedTokenError: If a token group belongs to no branch.
            MissingBranchTokensError: If a branch that the module needs has no token group.
            MissingAnchorTokenError: If anchors that the module needs are not among the token groups.
            ValueError: As for :class:`MixedAttention`.
        """
        check_groups(token_specs)
        self._validate(token_specs)
        result: Tensor | tuple[Tensor, KVCache] = self.mixed_attention(
            x,
            token_specs,
            self._create_attention_patterns(token_specs),
            key_padding_mask=key_padding_mask,
            freqs=freqs,
            kv_cache=kv_cache,
            return_kv_cache=return_kv_cache,
        )
        return result

    def extra_repr(self) -> str:
        return f"branches={self.branches}, anchor_suffix={self.anchor_suffix!r}"

    def _create_attention_patterns(self, token_specs: Sequence[TokenSpec]) -> Sequence[AttentionPattern]:
        """Says who reads whom. Called in every forward pass."""
        raise NotImplementedError(f"{type(self).__name__} must implement _create_attention_patterns")

    def _validate(self, token_specs: Sequence[TokenSpec]) -> None:
        """Checks that every group has a branch, and every branch its groups and its anchors."""
        check_complete(group_names(token_specs), self.branches, self.anchor_suffix)


def group_names(token_specs: Sequence[TokenSpec]) -> tuple[str, ...]:
    """Names of the token groups, in order."""
    return tuple(spec.name for spec in token_specs)


@bounded_cache
def tokens_by_branch(names: tuple[str, ...], branches: tuple[str, ...]) -> dict[str, list[str]]:
    """Sorts token groups by branch, in order.

    Raises:
        UnexpectedTokenError: If a group belongs to no branch.
    """
    tokens: dict[str, list[str]] = {branch: [] for branch in branches}
    for name in names:
        matching = [branch for branch in branches if name.startswith(branch)]
        if not matching:
            raise UnexpectedTokenError(f"Token {name!r} belongs to none of the branches {branches}")
        tokens[max(matching, key=len)].append(name)
    return tokens


@bounded_cache
def check_complete(names: tuple[str, ...], branches: tuple[str, ...], anchor_suffix: str) -> None:
    """Checks that every branch has tokens and anchors.

    Raises:
        UnexpectedTokenError: If a group belongs to no branch.
        MissingBranchTokensError: If a branch has no group.
        MissingAnchorTokenError: If a branch has no anchors.
    """
    for branch, tokens in tokens_by_branch(names, branches).items():
        if not tokens:
            raise MissingBranchTokensError(f"Branch {branch!r} has no tokens in {names}")
        if branch + anchor_suffix not in tokens:
            raise MissingAnchorTokenError(f"Branch {branch!r} has no anchors {branch + anchor_suffix!r} in {names}")
