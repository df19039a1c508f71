"""Anchor attention within and across branches."""

from __future__ import annotations

from collections.abc import Sequence

from ..patterns import AttentionPattern, TokenSpec
from .config import JointAnchorAttentionConfig
from .errors import MissingAnchorTokenError
from .multi_branch import MultiBranchAnchorAttention, group_names, tokens_by_branch
from .plan import bounded_cache


class JointAnchorAttention(MultiBranchAnchorAttention):
    """Anchor attention within and across branches: all tokens attend to the anchors of all branches.

    At least two branches are configured; the input needs the anchors of at least one of them. Method: AB-UPT,
    https://arxiv.org/abs/2502.09692.

    Args:
        config: A :class:`JointAnchorAttentionConfig` or any object with its fields; or ``None`` and the fields as
            keywords.
    """

    config_class = JointAnchorAttentionConfig

    def _create_attention_patterns(self, token_specs: Sequence[TokenSpec]) -> Sequence[AttentionPattern]:
        return _joint_patterns(group_names(token_specs), self.branches, self.anchor_suffix)

    def _validate(self, token_specs: Sequence[TokenSpec]) -> None:
        _check_any_anchors(group_names(token_specs), self.branches, self.anchor_suffix)


@bounded_cache
def _joint_patterns(
    names: tuple[str, ...], branches: tuple[str, ...], anchor_suffix: str
) -> tuple[AttentionPattern, ...]:
    anchors = tuple(branch + anchor_suffix for branch in branches if branch + anchor_suffix in names)
    return (AttentionPattern(names, anchors),)


@bounded_cache
def _check_any_anchors(names: tuple[str, ...], branches: tuple[str, ...], anchor_suffix: str) -> None:
    tokens_by_branch(names, branches)
    if not any(branch + anchor_suffix in names for branch in branches):
        raise MissingAnchorTokenError(f"No branch of {branches} has anchors ('...{anchor_suffix}') in {names}")
