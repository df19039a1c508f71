"""Attention modules: anchor attention of branches, and attention in arbitrary patterns."""

from .config import (
    AttentionConfig,
    CrossAnchorAttentionConfig,
    JointAnchorAttentionConfig,
    MixedAttentionConfig,
    MultiBranchAnchorAttentionConfig,
    RopeFrequencyConfig,
)
from .cross import CrossAnchorAttention
from .errors import MissingAnchorTokenError, MissingBranchTokensError, UnexpectedTokenError
from .joint import JointAnchorAttention
from .mixed import MixedAttention
from .multi_branch import MultiBranchAnchorAttention
from .rope import RopeFrequency
from .self_anchor import SelfAnchorAttention

__all__ = [
    "AttentionConfig",
    "CrossAnchorAttention",
    "CrossAnchorAttentionConfig",
    "JointAnchorAttention",
    "JointAnchorAttentionConfig",
    "MissingAnchorTokenError",
    "MissingBranchTokensError",
    "MixedAttention",
    "MixedAttentionConfig",
    "MultiBranchAnchorAttention",
    "MultiBranchAnchorAttentionConfig",
    "RopeFrequency",
    "RopeFrequencyConfig",
    "SelfAnchorAttention",
    "UnexpectedTokenError",
]
