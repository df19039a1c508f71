"""The key-range table: attention patterns in index form."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .block_mask import make_block_mask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from .patterns import AttentionPattern, TokenSpec

Slice = tuple[int, int]


class KeyRangeTable:
    """Which keys each query reads, as ranges. Immutable.

    In CSR form: group ``g`` holds the queries ``[q_ranges[2g], q_ranges[2g+1])`` and reads the key ranges number
    ``k_offsets[g]`` to ``k_offsets[g+1] - 1`` of ``k_ranges``. Query ranges are disjoint; key ranges of one group may
    be apart, shared with other groups, empty, or repeated (a repeated range counts twice in the softmax, as a
    concatenation would). Queries in no range, or with no key, get output 0 and a log-sum-exp of −inf.

    The constructor checks the table and brings it into a canonical form, which depends only on its meaning: groups
    without keys are dropped, ranges are sorted, touching ranges are joined. While ``torch.compile`` traces, numbers are
    symbolic: then the operation does both at run time, and no guard is added.

    Args:
        q_ranges: Query ranges ``(begin, end)`` one after the other, 2 G integers.
        k_offsets: First key range of each group and their total number, G + 1 integers.
        k_ranges: Key ranges ``(begin, end)`` one after the other, 2 R integers.

    Raises:
        ValueError: If a range is negative, reversed or too large, query ranges overlap, or offsets decrease.
    """

    __slots__ = ("k_offsets", "k_ranges", "padded_ranges", "q_ranges")

    q_ranges: tuple[int, ...]
    k_offsets: tuple[int, ...]
    k_ranges: tuple[int, ...]
    # The same three, padded with empty ranges: to a tracer their lengths are constants, and with the padding few
    # different lengths serve batches of any number of samples.
    padded_ranges: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

    def __init__(self, q_ranges: Iterable[int], k_offsets: Iterable[int], k_ranges: Iterable[int]) -> None:
        names = ("q_ranges", "k_offsets", "k_ranges")
        for name, numbers in zip(names, (q_ranges, k_offsets, k_ranges), strict=True):
            if not isinstance(numbers, Iterable):
                raise ValueError(f"{name} must be integers in a sequence, array or tensor, got {numbers!r:.60}")
        table = padded = (tuple(q_ranges), tuple(k_offsets), tuple(k_ranges))
        if not _is_traced(table):
            for name, numbers in zip(names, table, strict=True):
                _check_integers(name, numbers)
            table = _canonical(*table)
            padded = _padded(*table)
        for name, numbers in zip(names, table, strict=True):
            object.__setattr__(self, name, numbers)
        object.__setattr__(self, "padded_ranges", padded)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"KeyRangeTable is immutable: can't set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"KeyRangeTable is immutable: can't delete {name!r}")

    def __reduce__(self) -> tuple[type[KeyRangeTable], tuple[tuple[int, ...], ...]]:
        return KeyRangeTable, (self.q_ranges, self.k_offsets, self.k_ranges)

    @classmethod
    def from_patterns(
        cls, token_specs: Sequence[TokenSpec], attention_patterns: Sequence[AttentionPattern]
    ) -> KeyRangeTable:
        """Makes the table of attention patterns, queries and keys on the same token axis.

        Args:
            token_specs: The groups in the order of the axis. A size of ``None`` counts as 0.
            attention_patterns: Each group is a query in at most one pattern.

        Raises:
            ValueError: If a name is repeated or unknown, or a group is a query in several patterns.
        """
        slices: dict[str, Slice] = {}
        begin = 0
        for spec in token_specs:
            if spec.name in slices:
                raise ValueError(f"token_specs hold {spec.name!r} more than once")
            end = begin + (0 if spec.size is None else spec.size)
            slices[spec.name] = (begin, end)
            begin = end
        return cls.from_slices(slices, slices, attention_patterns)

    @classmethod
    def from_slices(
        cls,
        query_slices: Mapping[str, Slice],
        key_slices: Mapping[str, Slice],
        attention_patterns: Sequence[AttentionPattern],
    ) -> KeyRangeTable:
        """Makes the table of attention patterns, queries and keys on separate axes.

        Args:
            query_slices: ``{group: (begin, end)}`` on the query axis.
            key_slices: ``{group: (begin, end)}`` on the key axis.
            attention_patterns: Each group is a query in at most one pattern.

        Raises:
            ValueError: If a name is unknown, or a group is a query in several patterns.
        """
        q_ranges: list[int] = []
        k_offsets: list[int] = [0]
        k_ranges: list[int] = []
        seen: set[str] = set()
        for pattern in attention_patterns:
            for name in pattern.query_tokens:
                if name in seen:
                    raise ValueError(f"Token {name!r} cannot be a query in multiple attention patterns")
                seen.add(name)
                q_ranges.extend(_named_slice(query_slices, name))
                for key_name in pattern.key_value_tokens:
                    k_ranges.extend(_named_slice(key_slices, key_name))
                k_offsets.append(len(k_ranges) // 2)
        return cls(q_ranges, k_offsets, k_ranges)

    @classmethod
    def from_ranges(cls, q_ranges: Any, k_ranges: Any) -> KeyRangeTable:
        """Makes the table of paired rows: the queries of ``q_ranges[i]`` read the keys of ``k_ranges[i]``.

        Args:
            q_ranges: (n, 2) begin and end: nested sequences, an array or a tensor of integers. A range may repeat, to
                read several key ranges; different ranges must not overlap.
            k_ranges: (n, 2), likewise.

        Raises:
            ValueError: If the shapes are not (n, 2) twice, or as for the constructor.
        """
        query_rows = _rows("q_ranges", q_ranges)
        key_rows = _rows("k_ranges", k_ranges)
        if len(query_rows) != len(key_rows):
            raise ValueError(
                f"q_ranges and k_ranges must have equally many rows, got {len(query_rows)} and {len(key_rows)}"
            )
        groups: dict[Any, tuple[Slice, list[int]]] = {}
        for query, key in zip(query_rows, key_rows, strict=True):
            groups.setdefault(_name_of(query, groups), (query, []))[1].extend(key)
        k_offsets = [0]
        for _, keys in groups.values():
            k_offsets.append(k_offsets[-1] + len(keys) // 2)
        return cls(
            (bound for query, _ in groups.values() for bound in query),
            k_offsets,
            (bound for _, keys in groups.values() for bound in keys),
        )

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens_q: Any, cu_seqlens_k: Any) -> KeyRangeTable:
        """Makes the block-diagonal table of packed samples.

        Args:
            cu_seqlens_q: (n + 1,) cumulative query counts: a sequence, an array or a tensor of integers, 0 first.
            cu_seqlens_k: (n + 1,) cumulative key counts.

        Raises:
            ValueError: If the lengths differ, or an entry is smaller than the one before.
        """
        bounds_q = integers("cu_seqlens_q", cu_seqlens_q)
        bounds_k = integers("cu_seqlens_k", cu_seqlens_k)
        if len(bounds_q) != len(bounds_k):
            raise ValueError(
                f"cu_seqlens_q and cu_seqlens_k must be equally long, got {len(bounds_q)} and {len(bounds_k)} entries"
            )
        for name, bounds in (("cu_seqlens_q", bounds_q), ("cu_seqlens_k", bounds_k)):
            if not bounds or bounds[0] != 0:
                raise ValueError(f"{name} must begin with 0, got {bounds[:1]}")
            for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
                if end < begin:
                    raise ValueError(f"{name} must not decrease, got {name}[{i}] = {begin} and {name}[{i + 1}] = {end}")
        n = len(bounds_q) - 1
        return cls(
            (bounds_q[i + j] for i in range(n) for j in (0, 1)),
            range(n + 1),
            (bounds_k[i + j] for i in range(n) for j in (0, 1)),
        )

    def entries(self) -> list[tuple[Slice, list[Slice]]]:
        """Returns ``[((q_begin, q_end), [(k_begin, k_end), …]), …]``."""
        keys = list(zip(self.k_ranges[::2], self.k_ranges[1::2], strict=True))
        return [
            ((self.q_ranges[2 * g], self.q_ranges[2 * g + 1]), keys[self.k_offsets[g] : self.k_offsets[g + 1]])
            for g in range(len(self.k_offsets) - 1)
        ]

    def area(self) -> int:
        """Number of scores, Σ over groups of queries · keys: what time is proportional to."""
        return sum(
            (q_end - q_begin) * sum(end - begin for begin, end in keys) for (q_begin, q_end), keys in self.entries()
        )

    def check_coverage(self, n_queries: int) -> None:
        """Checks that each of the queries ``[0, n_queries)`` reads a key.

        Raises:
            ValueError: If one reads none; the message names the first run of such queries.
        """
        covered = 0
        for (q_begin, q_end), keys in [*self.entries(), ((n_queries, n_queries), [(0, 1)])]:
            if covered < q_begin <= n_queries:
                raise ValueError(
                    f"table must cover every query, but [{covered}, {q_begin}) of {n_queries} queries read no key"
                )
            if any(begin < end for begin, end in keys):
                covered = q_end

    def to_dense(self, n_queries: int, n_keys: int) -> torch.Tensor:
        """Returns the table as a (n_queries, n_keys) bool mask, True where a query reads a key.

        Raises:
            ValueError: If a range is out of bounds, or a group reads a key twice, which no mask can express.
        """
        self._check_expressible_as_mask(n_queries, n_keys)
        mask = torch.zeros(n_queries, n_keys, dtype=torch.bool)
        for (q_begin, q_end), keys in self.entries():
            for begin, end in keys:
                mask[q_begin:q_end, begin:end] = True
        return mask

    def to_block_mask(
        self, n_queries: int, n_keys: int, *, block_size: int | tuple[int, int] = 128, device: Any = "cpu"
    ) -> BlockMask:
        """Returns the table as a ``BlockMask`` of FlexAttention; the dense mask never exists.

        Args:
            n_queries: Length of the query axis.
            n_keys: Length of the key axis.
            block_size: Block size of both axes, or (queries, keys).
            device: Device of the mask's tensors.

        Raises:
            ValueError: As :meth:`to_dense`.
        """
        sizes = block_size if isinstance(block_size, (list, tuple)) else (block_size,) * 2
        if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"block_size must be a positive integer or a pair of them, got {block_size!r}")
        self._check_expressible_as_mask(n_queries, n_keys)
        lengths, block_size = (n_queries, n_keys), (sizes[0], sizes[1])
        return make_block_mask(self.q_ranges, self.k_offsets, self.k_ranges, lengths, block_size, device)

    def picture(self, width: int = 64) -> str:
        """Draws who reads whom: a row per group of queries, ``width`` columns over the keys, ``█`` where they read."""
        if not self.q_ranges:
            return "(no query reads a key)"
        n_keys = max(self.k_ranges)
        labels = [f"[{begin}, {end})" for (begin, end), _ in self.entries()]
        pad = max(map(len, [*labels, "queries"]))
        lines = [f"{'queries':>{pad}} | keys [0, {n_keys})"]
        for label, (_, keys) in zip(labels, self.entries(), strict=True):
            cells = ["·"] * width
            for begin, end in keys:
                first, last = begin * width // n_keys, max(-(-end * width // n_keys), begin * width // n_keys + 1)
                cells[first:last] = "█" * (last - first)
            lines.append(f"{label:>{pad}} | {''.join(cells)}")
        return "\n".join(lines)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KeyRangeTable):
            return NotImplemented
        return (self.q_ranges, self.k_offsets, self.k_ranges) == (other.q_ranges, other.k_offsets, other.k_ranges)

    def __hash__(self) -> int:
        return hash((self.q_ranges, self.k_offsets, self.k_ranges))

    def __repr__(self) -> str:
        shown = [
            f"[{q_begin}, {q_end}) → " + " ∪ ".join(f"[{begin}, {end})" for begin, end in keys)
            for (q_begin, q_end), keys in self.entries()
        ]
        if len(shown) > 8:
            shown[4:-3] = [f"… {len(shown) - 7} more …"]
        return f"KeyRangeTable({'; '.join(shown)})"

    def _check_expressible_as_mask(self, n_queries: int, n_keys: int) -> None:
        _canonical(self.q_ranges, self.k_offsets, self.k_ranges, n_queries, n_keys)
        for (q_begin, q_end), keys in self.entries():
            for (_, end), (following, _) in itertools.pairwise(keys):
                if following < end:
                    raise ValueError(
                        f"queries [{q_begin}, {q_end}) read key {following} more than once, which a mask can't express"
                    )


def _canonical(
    q_ranges: Sequence[int],
    k_offsets: Sequence[int],
    k_ranges: Sequence[int],
    n_queries: int = 2**31 - 1,
    n_keys: int = 2**31 - 1,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    try:
        tables = torch.ops.anchor_attention.canonical_key_ranges(q_ranges, k_offsets, k_ranges, n_queries, n_keys)
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    canonical_q_ranges, canonical_k_offsets, canonical_k_ranges = (tuple(numbers) for numbers in tables)
    return canonical_q_ranges, canonical_k_offsets, canonical_k_ranges


def _named_slice(slices: Mapping[str, Slice], name: str) -> Slice:
    if name not in slices:
        raise ValueError(f"Token {name!r} is not defined in `token_specs`, which hold {sorted(slices)}")
    return slices[name]


def _is_traced(table: Iterable[Sequence[int]]) -> bool:
    """Whether numbers may be symbols: what depends on their values is then left to the operation."""
    return torch.compiler.is_compiling() or any(isinstance(n, torch.SymInt) for numbers in table for n in numbers)


def _padded(
    q_ranges: tuple[int, ...], k_offsets: tuple[int, ...], k_ranges: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    n_groups, n_ranges = len(q_ranges) // 2, len(k_ranges) // 2
    groups, ranges = _rounded_up(n_groups), _rounded_up(n_ranges)
    offsets = (*k_offsets, *(n_ranges,) * (groups - n_groups))
    return (
        (*q_ranges, *(0, 0) * (groups - n_groups)),
        # The last group gets the ranges that were added, which are empty.
        (*offsets[:-1], ranges) if groups > 0 else offsets,
        (*k_ranges, *(0, 0) * (ranges - n_ranges)) if groups > 0 else k_ranges,
    )


def _rounded_up(n: int) -> int:
    """The next of 0, 1, 2, 4, 8, 16, 64, 256, …: eight sizes up to 256, of which ``torch.compile`` allows eight."""
    size = 1 if n > 0 else 0
    while size < n:
        size *= 2 if size < 16 else 4
    return size


def _check_integers(name: str, numbers: Iterable[Any]) -> None:
    for number in numbers:
        if isinstance(number, bool) or not hasattr(number, "__index__"):
            raise ValueError(f"{name} must be one-dimensional integers, got {number!r}")
        if not -(2**63) <= operator.index(number) < 2**63:
            raise ValueError(f"{name} must hold numbers of tokens below 2**31, got {number}")


def integers(name: str, numbers: Any) -> list[int]:
    """Reads a one-dimensional sequence, array or tensor of integers.

    Raises:
        ValueError: If it is something else; the message calls it ``name``.
    """
    values = _listed(name, numbers)
    if any(isinstance(value, list) for value in values):
        raise ValueError(f"{name} must be one-dimensional integers, got {_described(numbers)}")
    # What is written as numbers stays numbers while torch traces: what is read from a tensor would be unknown.
    if not all(type(value) in (int, torch.SymInt) for value in values):
        _check_integers(name, values)
        values = [operator.index(value) for value in values]
    return values


def _name_of(query: Slice, groups: Mapping[Any, tuple[Slice, list[int]]]) -> Any:
    """The key under which a range of queries is looked up among those before it."""
    if torch.compiler.is_compiling():
        # The hash of a symbol would make it a constant of the graph; a comparison only guards which ones are equal.
        for name, (other, _) in groups.items():
            if other[0] == query[0] and other[1] == query[1]:
                return name
        return len(groups)
    # Symbolic numbers have no hash: they are equal where their expressions are.
    return tuple(bound if type(bound) is int else str(bound) for bound in query)


def _rows(name: str, ranges: Any) -> list[Slice]:
    rows = _listed(name, ranges)
    if hasattr(ranges, "shape") and len(ranges.shape) != 2 and rows:
        raise ValueError(f"{name} must have shape (n, 2), got {tuple(ranges.shape)}")
    rows = [row if isinstance(row, (list, tuple)) else _listed(name, row, ranges) for row in rows]
    for row in rows:
        if len(row) != 2:
            raise ValueError(f"{name} must have shape (n, 2), got ({len(rows)}, {len(row)})")
    numbers = integers(name, [bound for row in rows for bound in row])
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _listed(name: str, numbers: Any, whole: Any = None) -> list[Any]:
    """The entries of a sequence, an array or a tensor."""
    if isinstance(numbers, (list, tuple, range)):
        return list(numbers)
    if isinstance(numbers, torch.Tensor) and numbers.device.type == "meta":
        raise ValueError(f"{name} must hold numbers, but a tensor on the meta device has none")
    values = numbers.tolist() if hasattr(numbers, "tolist") else numbers
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        got = _described(numbers if whole is None else whole)
        raise ValueError(f"{name} must be integers in a sequence, array or tensor, got {got}")
    return list(values)


def _described(numbers: Any) -> str:
    if hasattr(numbers, "shape") and hasattr(numbers, "dtype"):
        return f"shape {tuple(numbers.shape)}, {numbers.dtype}"
    return f"{numbers!r:.60}"
