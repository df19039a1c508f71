"""Anchor attention: fused attention of token groups to the anchor groups that their pattern names."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from . import _library

_library.load()

from . import ops  # noqa: E402, F401
from ._library import CpuInstructionSets, cpu_instruction_sets  # noqa: E402
from ._version import __version__  # noqa: E402
from .distance_bias import with_distance_bias  # noqa: E402
from .functional import anchor_attention, anchor_attention_jvp, merge_attention, rope, use_backend  # noqa: E402
from .key_range_table import KeyRangeTable  # noqa: E402
from .modules import (  # noqa: E402
    AttentionConfig,
    CrossAnchorAttention,
    CrossAnchorAttentionConfig,
    JointAnchorAttention,
    JointAnchorAttentionConfig,
    LatentAttention,
    LatentAttentionConfig,
    MissingAnchorTokenError,
    MissingBranchTokensError,
    MixedAttention,
    MixedAttentionConfig,
    MultiBranchAnchorAttention,
    MultiBranchAnchorAttentionConfig,
    PerceiverAttention,
    PerceiverAttentionConfig,
    RopeFrequency,
    RopeFrequencyConfig,
    SelfAnchorAttention,
    UnexpectedTokenError,
)
from .patterns import AttentionPattern, TokenSpec  # noqa: E402
from .reference import anchor_attention_reference, rope_reference  # noqa: E402

if TYPE_CHECKING:
    from . import converters, physics, streaming

__all__ = [
    "AttentionConfig",
    "AttentionPattern",
    "CpuInstructionSets",
    "CrossAnchorAttention",
    "CrossAnchorAttentionConfig",
    "JointAnchorAttention",
    "JointAnchorAttentionConfig",
    "KeyRangeTable",
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
    "TokenSpec",
    "UnexpectedTokenError",
    "__version__",
    "anchor_attention",
    "anchor_attention_jvp",
    "anchor_attention_reference",
    "converters",
    "cpu_instruction_sets",
    "merge_attention",
    "physics",
    "rope",
    "rope_reference",
    "streaming",
    "use_backend",
    "with_distance_bias",
]


def __dir__() -> list[str]:
    """The public names: what an editor offers, without the modules that they come from."""
    return list(__all__)


def __getattr__(name: str) -> ModuleType:
    """Imports these parts when they are first used: they take a third of the package's import time."""
    if name in ("converters", "physics", "streaming"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
