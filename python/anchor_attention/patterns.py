"""Token groups and attention patterns: who reads whom, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenSpec:
    """A token group: a contiguous run of tokens of one role in the sequence.

    Args:
        name: Name of the group, for example ``"surface_anchors"``.
        size: Number of tokens, at least 0. ``None`` says that the group is not in the input: its keys and values come
            from a cache.

    Raises:
        ValueError: If the name is empty or the size is negative or no integer.
    """

    name: str
    size: int | None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"TokenSpec.name must be a non-empty string, got {self.name!r}")
        if self.size is None:
            return
        # A symbolic size (torch.SymInt, under torch.compile) is no int, and asking for its sign would add a guard.
        if isinstance(self.size, (bool, float, str)):
            raise ValueError(f"TokenSpec.size of {self.name!r} must be an integer or None, got {self.size!r}")
        if isinstance(self.size, int) and self.size < 0:
            raise ValueError(f"TokenSpec.size of {self.name!r} must be at least 0, got {self.size}")

    @classmethod
    def from_dict(cls, spec: Mapping[str, int | None]) -> TokenSpec:
        """Makes the spec of ``{name: size}``, the inverse of :meth:`to_dict`.

        Raises:
            ValueError: If ``spec`` does not hold exactly one entry.
        """
        if len(spec) != 1:
            raise ValueError(f"TokenSpec.from_dict takes one {{name: size}} entry, got {dict(spec)}")
        ((name, size),) = spec.items()
        return cls(name, size)

    def to_dict(self) -> dict[str, int | None]:
        """Returns ``{name: size}``."""
        return {self.name: self.size}


@dataclass(frozen=True)
class AttentionPattern:
    """Some groups (queries) attend, densely and non-causally, to some groups (keys and values).

    Args:
        query_tokens: Names of the groups that attend, at least one.
        key_value_tokens: Names of the groups that they attend to. With none, the queries' outputs are zero.

    Raises:
        ValueError: If a field is a string, holds something that is no string, or ``query_tokens`` is empty.
    """

    query_tokens: Sequence[str]
    key_value_tokens: Sequence[str]

    def __post_init__(self) -> None:
        for field in ("query_tokens", "key_value_tokens"):
            names = getattr(self, field)
            if isinstance(names, str) or not isinstance(names, Iterable):
                raise ValueError(f"AttentionPattern.{field} must be a sequence of names, got {names!r}")
            names = tuple(names)
            if not all(isinstance(name, str) for name in names):
                raise ValueError(f"AttentionPattern.{field} must hold strings, got {names!r}")
            object.__setattr__(self, field, names)
        if not self.query_tokens:
            raise ValueError("AttentionPattern.query_tokens must hold at least one name, got ()")
