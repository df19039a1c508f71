"""From token groups and patterns to index form: which tokens are projected to keys, and the key-range table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import NamedTuple, ParamSpec, TypeVar, cast

from ..key_range_table import KeyRangeTable
from .tracing import is_traced

Slice = tuple[int, int]
Pattern = tuple[tuple[str, ...], tuple[str, ...]]

P = ParamSpec("P")
R = TypeVar("R")

CACHED_CALLS = 256


def bounded_cache(function: Callable[P, R]) -> Callable[P, R]:
    """Caches the results of the latest calls of a pure function with hashable arguments.

    Arguments that are equal must mean the same: numbers are ``int``, never ``float`` or a type of another library.

    While ``torch.compile``, ``torch.export`` or another tracer run, sizes can be symbolic, and can't be looked up.
    """
    cached = cast(Callable[P, R], lru_cache(maxsize=CACHED_CALLS)(function))

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs) if is_traced() else cached(*args, **kwargs)

    return call


class GroupSize(NamedTuple):
    """Number of tokens of a group in x (``None``: not in x) and in the cache (``None``: not in the cache)."""

    name: str
    in_x: int | None
    in_cache: int | None


class AttentionPlan(NamedTuple):
    """What a call with given sizes and patterns does.

    The key axis holds the groups of x that are read, in the order of x, followed by the cached ones.

    Attributes:
        n_tokens: Tokens in x.
        table: Queries on the token axis of x, keys on the key axis.
        read_slices: The tokens of x that are read, neighbours joined.
        reads_all: Whether these are all tokens of x.
        cached_names: The groups that come from the cache.
        key_slices: Every group that is read, on the key axis.
    """

    n_tokens: int
    table: KeyRangeTable
    read_slices: tuple[Slice, ...]
    reads_all: bool
    cached_names: tuple[str, ...]
    key_slices: dict[str, Slice]


@bounded_cache
def attention_plan(
    groups: tuple[GroupSize, ...], patterns: tuple[Pattern, ...], keep_unread: bool, keep_names: tuple[str, ...] = ()
) -> AttentionPlan:
    """Makes the plan of a call.

    Args:
        groups: The token groups in the order of x.
        patterns: Names of the query groups and names of the key groups, for each pattern.
        keep_unread: Whether groups that are read only by groups outside x count as read too.
        keep_names: Groups that count as read in any case.

    Raises:
        ValueError: If groups or patterns contradict each other, or a group that is read is neither in x nor cached.
    """
    query_slices, n_tokens = _slices(groups)
    _check_patterns(groups, patterns)
    keys_of = {query: keys for queries, keys in patterns for query in queries}
    read = {key for queries, keys in patterns if keep_unread or any(q in query_slices for q in queries) for key in keys}
    read.update(keep_names)

    key_slices: dict[str, Slice] = {}
    read_slices: list[Slice] = []
    cached_names: list[str] = []
    n_keys = 0
    previous_is_read = False
    reads_all = True
    for name, size, _ in groups:
        if size is None or (size == 0 and name not in read):
            continue
        is_read = name in read
        if is_read:
            begin, end = query_slices[name]
            if previous_is_read:
                read_slices[-1] = (read_slices[-1][0], end)
            else:
                read_slices.append((begin, end))
            key_slices[name] = (n_keys, n_keys + size)
            n_keys = n_keys + size
        reads_all = reads_all and is_read
        previous_is_read = is_read
    for name, size, cached_size in groups:
        if size is None and name in read:
            if cached_size is None:
                raise ValueError(_missing_in_cache(name, groups))
            cached_names.append(name)
            key_slices[name] = (n_keys, n_keys + cached_size)
            n_keys = n_keys + cached_size

    q_ranges: list[int] = []
    k_offsets = [0]
    k_ranges: list[int] = []
    for name, query_slice in query_slices.items():
        q_ranges.extend(query_slice)
        for key in keys_of[name]:
            k_ranges.extend(key_slices[key])
        k_offsets.append(len(k_ranges) // 2)
    table = KeyRangeTable(q_ranges, k_offsets, k_ranges)
    reads_all = reads_all and len(read_slices) == 1
    return AttentionPlan(n_tokens, table, tuple(read_slices), reads_all, tuple(cached_names), key_slices)


def _slices(groups: Sequence[GroupSize]) -> tuple[dict[str, Slice], int]:
    slices: dict[str, Slice] = {}
    names: set[str] = set()
    begin = 0
    for name, size, _ in groups:
        if name in names:
            raise ValueError(f"token_specs must not hold a name twice, got {[group.name for group in groups]}")
        names.add(name)
        if size is None:
            continue
        if size < 0:
            raise ValueError(f"size of token {name!r} must be at least 0, got {size}")
        slices[name] = (begin, begin + size)
        begin = begin + size
    return slices, begin


def _check_patterns(groups: Sequence[GroupSize], patterns: Sequence[Pattern]) -> None:
    names = [group.name for group in groups]
    queries: set[str] = set()
    for query_tokens, key_value_tokens in patterns:
        for name in query_tokens:
            if name in queries:
                raise ValueError(
                    f"Token {name!r} cannot be a query in multiple attention patterns, got {list(patterns)}"
                )
            queries.add(name)
        for name in key_value_tokens:
            if name not in names:
                raise ValueError(f"Key/value token {name!r} is not defined in `token_specs`, which hold {names}")
    # Groups outside x have no rows that could attend: patterns may name them as queries or not.
    missing = [name for name, size, _ in groups if size is not None and name not in queries]
    unknown = [name for name in queries if name not in names]
    if missing or unknown:
        raise ValueError(
            "The set of query tokens must exactly match the tokens in x: "
            f"in no attention pattern {missing}, not in `token_specs` {sorted(unknown)}"
        )


def _missing_in_cache(name: str, groups: Sequence[GroupSize]) -> str:
    cached = [group.name for group in groups if group.in_cache is not None]
    if not cached:
        return f"kv_cache is empty, but token {name!r} has no size: its keys and values come from the cache"
    return f"Token {name!r} has no size and is missing in kv_cache, which holds {cached}"
