"""Errors in the token groups that a branch module gets."""

from __future__ import annotations


class UnexpectedTokenError(ValueError):
    """A token group belongs to none of the configured branches."""


class MissingBranchTokensError(ValueError):
    """A configured branch has no token group in the input."""


class MissingAnchorTokenError(ValueError):
    """A configured branch has no anchors in the input."""
