"""Attention modules: anchor attention of branches, and attention in arbitrary patterns."""

from .config import (
    AttentionConfig,
    CrossAnchorAttentionConfig,
    JointAnchorAttentionConfig,
    LatentAttentionConfig,
    MixedAttentionConfig,
    MultiBranchAnchorAttentionConfig,
    PerceiverAttentionConfig,
    RopeFrequencyConfig,
)
from .cross import CrossAnchorAttention
from .errors import MissingAnchorTokenError, MissingBranchTokensError, UnexpectedTokenError
from .joint import JointAnchorAttention
from .latent import LatentAttention
from .mixed import MixedAttention
from .multi_branch import MultiBranchAnchorAttention
from .perceiver import PerceiverAttention
from .rope import RopeFrequency
from .self_anchor import SelfAnchorAttention

__all__ = [
    "AttentionConfig",
    "CrossAnchorAttention",
    "CrossAnchorAttentionConfig",
    "JointAnchorAttention",
    "JointAnchorAttentionConfig",
    "LatentAttention",
    "LatentAttentionConfig",
    "MissingAnchorTokenError",
    "MissingBranchTokensError",
    "MixedAttention",
    "MixedAttentionConfig",
    "MultiBranchAnchorAttention",
    "MultiBranchAnchorAttentionConfig",
    "PerceiverAttention",
    "PerceiverAttentionConfig",
    "RopeFrequency",
    "RopeFrequencyConfig",
    "SelfAnchorAttention",
    "UnexpectedTokenError",
]
