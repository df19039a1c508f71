"""Anchor attention within branches."""

from __future__ import annotations

from collections.abc import Sequence

from ..patterns import AttentionPattern, TokenSpec
from .multi_branch import MultiBranchAnchorAttention, group_names, tokens_by_branch
from .plan import bounded_cache


class SelfAnchorAttention(MultiBranchAnchorAttention):
    """Anchor attention within branches: the tokens of a branch attend to that branch's anchors.

    With branches ``surface`` and ``volume``, ``surface_anchors`` and ``surface_queries`` attend to ``surface_anchors``,
    and ``volume_anchors`` and ``volume_queries`` to ``volume_anchors``. Every branch must have its anchors in the
    input. Method: AB-UPT, https://arxiv.org/abs/2502.09692.

    Args:
        config: A :class:`MultiBranchAnchorAttentionConfig` or any object with its fields; or ``None`` and the fields as
            keywords.
    """

    def _create_attention_patterns(self, token_specs: Sequence[TokenSpec]) -> Sequence[AttentionPattern]:
        return _self_patterns(group_names(token_specs), self.branches, self.anchor_suffix)


@bounded_cache
def _self_patterns(
    names: tuple[str, ...], branches: tuple[str, ...], anchor_suffix: str
) -> tuple[AttentionPattern, ...]:
    tokens = tokens_by_branch(names, branches)
    return tuple(AttentionPattern(tuple(tokens[branch]), (branch + anchor_suffix,)) for branch in branches)
