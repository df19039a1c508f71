"""Anchor attention across branches."""

from __future__ import annotations

from collections.abc import Sequence

from ..patterns import AttentionPattern, TokenSpec
from .config import CrossAnchorAttentionConfig
from .multi_branch import MultiBranchAnchorAttention, group_names, tokens_by_branch
from .plan import bounded_cache


class CrossAnchorAttention(MultiBranchAnchorAttention):
    """Anchor attention across branches: the tokens of a branch attend to the anchors of all other branches.

    With branches ``a``, ``b`` and ``c``, the tokens of ``a`` attend to ``b_anchors`` and ``c_anchors``, and so on. At
    least two branches; every one must have its anchors in the input. Method: AB-UPT, https://arxiv.org/abs/2502.09692.

    Args:
        config: A :class:`CrossAnchorAttentionConfig` or any object with its fields; or ``None`` and the fields as
            keywords.
    """

    config_class = CrossAnchorAttentionConfig

    def _create_attention_patterns(self, token_specs: Sequence[TokenSpec]) -> Sequence[AttentionPattern]:
        return _cross_patterns(group_names(token_specs), self.branches, self.anchor_suffix)


@bounded_cache
def _cross_patterns(
    names: tuple[str, ...], branches: tuple[str, ...], anchor_suffix: str
) -> tuple[AttentionPattern, ...]:
    tokens = tokens_by_branch(names, branches)
    return tuple(
        AttentionPattern(tuple(tokens[branch]), tuple(other + anchor_suffix for other in branches if other != branch))
        for branch in branches
    )
