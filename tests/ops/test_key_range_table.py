"""KeyRangeTable: constructors, canonical form, converters."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from anchor_attention import AttentionPattern, KeyRangeTable, TokenSpec, anchor_attention
from tests.generators import tables

SPECS = [TokenSpec("a_anchors", 4), TokenSpec("a_queries", 6), TokenSpec("b_anchors", 3), TokenSpec("b_queries", 2)]


def test_patterns_become_ranges() -> None:
    joint = [AttentionPattern([spec.name for spec in SPECS], ["a_anchors", "b_anchors"])]
    assert KeyRangeTable.from_patterns(SPECS, joint).entries() == [((0, 15), [(0, 4), (10, 13)])]
    own = [AttentionPattern(["a_queries", "a_anchors"], ["a_anchors"]), AttentionPattern(["b_anchors"], ["b_anchors"])]
    assert KeyRangeTable.from_patterns(SPECS, own).entries() == [((0, 10), [(0, 4)]), ((10, 13), [(10, 13)])]


def test_a_spec_without_size_takes_no_place() -> None:
    specs = [TokenSpec("a_anchors", None), TokenSpec("a_queries", 5)]
    table = KeyRangeTable.from_patterns(specs, [AttentionPattern(["a_queries"], ["a_queries", "a_anchors"])])
    assert table.entries() == [((0, 5), [(0, 5)])]


def test_queries_and_keys_may_have_axes_of_their_own() -> None:
    patterns = [AttentionPattern(["x"], ["a", "b"]), AttentionPattern(["y"], ["b"])]
    table = KeyRangeTable.from_slices({"x": (0, 5), "y": (5, 9)}, {"a": (3, 7), "b": (0, 3)}, patterns)
    assert table.entries() == [((0, 5), [(0, 7)]), ((5, 9), [(0, 3)])]


@given(st.data())
def test_dense_mask_says_what_the_rows_say(data: st.DataObject) -> None:
    n_queries, n_keys = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 40))
    table = data.draw(tables(n_queries, n_keys))
    counts = torch.zeros(n_queries, n_keys, dtype=torch.int64)
    for (q_begin, q_end), keys in table.entries():
        for begin, end in keys:
            counts[q_begin:q_end, begin:end] += 1
    assert table.area() == counts.sum()
    if (counts > 1).any():
        with pytest.raises(ValueError, match="more than once"):
            table.to_dense(n_queries, n_keys)
    else:
        assert torch.equal(table.to_dense(n_queries, n_keys), counts == 1)


@given(st.data())
def test_canonical_form_depends_on_the_meaning_alone(data: st.DataObject) -> None:
    """Splitting ranges, reordering them and adding empty ones changes nothing."""
    table = data.draw(tables(60, 60))
    q_rows, k_rows = [], []
    for (q_begin, q_end), keys in reversed(table.entries()):
        cut = data.draw(st.integers(q_begin, q_end))
        for queries in ((cut, q_end), (q_begin, cut)):
            if queries[0] == queries[1]:
                continue
            for begin, end in reversed(keys):
                middle = data.draw(st.integers(begin, end))
                q_rows += [queries] * 3
                k_rows += [(middle, end), (middle, middle), (begin, middle)]
    rebuilt = KeyRangeTable.from_ranges(q_rows, k_rows)
    assert rebuilt == table


@given(tables(60, 60))
def test_round_trips(table: KeyRangeTable) -> None:
    assert KeyRangeTable(table.q_ranges, table.k_offsets, table.k_ranges) == table
    assert pickle.loads(pickle.dumps(table)) == table and copy.deepcopy(table) == table
    assert len({table, copy.copy(table)}) == 1


def test_ranges_may_be_arrays_or_tensors() -> None:
    q_ranges, k_ranges = [[0, 3], [3, 8], [3, 8]], [[1, 4], [0, 2], [5, 9]]
    expected = KeyRangeTable.from_ranges(q_ranges, k_ranges)
    assert KeyRangeTable.from_ranges(np.array(q_ranges), np.array(k_ranges)) == expected
    assert KeyRangeTable.from_ranges(torch.tensor(q_ranges), torch.tensor(k_ranges, dtype=torch.int32)) == expected
    assert KeyRangeTable.from_ranges([], []) == KeyRangeTable([], [0], [])


def test_cumulative_lengths() -> None:
    table = KeyRangeTable.from_cu_seqlens([0, 3, 3, 8], torch.tensor([0, 2, 6, 6], dtype=torch.int32))
    assert table.entries() == [((0, 3), [(0, 2)])]


@pytest.mark.parametrize("block_size", [16, (32, 16)])
@given(data=st.data())
def test_block_mask_says_the_same_to_flex_attention(data: st.DataObject, block_size: int | tuple[int, int]) -> None:
    table = data.draw(tables(70, 90))
    try:
        dense = table.to_dense(70, 90)
    except ValueError:
        return
    mask = table.to_block_mask(70, 90, block_size=block_size)
    q_block, k_block = (block_size, block_size) if isinstance(block_size, int) else block_size
    blocks = torch.nn.functional.pad(dense, (0, -90 % k_block, 0, -70 % q_block))
    scores = blocks.unflatten(1, (-1, k_block)).unflatten(0, (-1, q_block)).sum((1, 3))
    for counts, indices, expected in (
        (mask.kv_num_blocks, mask.kv_indices, (scores > 0) & (scores < q_block * k_block)),
        (mask.full_kv_num_blocks, mask.full_kv_indices, scores == q_block * k_block),
    ):
        for row in range(expected.size(0)):
            chosen = indices[0, 0, row, : counts[0, 0, row]].sort().values
            assert torch.equal(chosen.long(), expected[row].nonzero().flatten())
    index = torch.arange(70)[:, None], torch.arange(90)[None]
    assert torch.equal(mask.mask_mod(torch.tensor(0), torch.tensor(0), *index), dense)


def test_flex_attention_agrees() -> None:
    table = KeyRangeTable.from_ranges([[0, 30], [30, 128], [30, 128]], [[0, 64], [10, 90], [100, 120]])
    q, k, v = (torch.randn(1, 128, 2, 16) for _ in range(3))
    expected = flex_attention(
        *(tensor.transpose(1, 2) for tensor in (q, k, v)), block_mask=table.to_block_mask(128, 128)
    )
    torch.testing.assert_close(anchor_attention(q, k, v, table), expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_table_is_immutable() -> None:
    table = KeyRangeTable([0, 3], [0, 1], [0, 5])
    with pytest.raises(AttributeError, match="immutable"):
        table.q_ranges = (0, 1)  # type: ignore[misc]
    with pytest.raises(AttributeError, match="immutable"):
        del table.k_ranges


def test_repr_and_picture_are_readable() -> None:
    table = KeyRangeTable.from_ranges([[0, 3], [0, 3], [5, 8]], [[0, 4], [8, 12], [4, 8]])
    assert repr(table) == "KeyRangeTable([0, 3) → [0, 4) ∪ [8, 12); [5, 8) → [4, 8))"
    assert table.picture(12).splitlines() == [
        "queries | keys [0, 12)",
        " [0, 3) | ████····████",
        " [5, 8) | ····████····",
    ]
    many = KeyRangeTable.from_cu_seqlens(range(0, 200, 2), range(0, 200, 2))
    assert "… 92 more …" in repr(many)
    assert KeyRangeTable([], [0], []).picture() == "(no query reads a key)"


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: KeyRangeTable([0, 4], [0, 1], [5, 3]), r"k_ranges\[0\] = \[5, 3\) is reversed"),
        (lambda: KeyRangeTable([0, 4], [0, 1], [0, 2**31]), r"k_ranges\[0\] = \[0, 2147483648\) is out of bounds"),
        (lambda: KeyRangeTable([0, 4, 3, 5], [0, 1, 1], [0, 3]), "q_ranges must be disjoint"),
        (lambda: KeyRangeTable.from_ranges([[0, 4]], [[0, 3], [3, 4]]), "equally many rows, got 1 and 2"),
        (lambda: KeyRangeTable.from_ranges([[0, 4, 5]], [[0, 3]]), r"q_ranges must have shape \(n, 2\), got \(1, 3\)"),
        (lambda: KeyRangeTable.from_ranges([[0, 4.5]], [[0, 3]]), "q_ranges must be one-dimensional integers"),
        (lambda: KeyRangeTable.from_cu_seqlens([0, 4], [0, 3, 5]), "equally long, got 2 and 3 entries"),
        (lambda: KeyRangeTable.from_cu_seqlens([0, 4], [1, 3]), r"cu_seqlens_k must begin with 0, got \[1\]"),
        (
            lambda: KeyRangeTable.from_cu_seqlens([0, 4, 2], [0, 3, 5]),
            r"cu_seqlens_q\[1\] = 4 and .*\[2\] = 2",
        ),
        (lambda: KeyRangeTable.from_patterns([*SPECS, SPECS[0]], []), "token_specs hold 'a_anchors' more than once"),
        (
            lambda: KeyRangeTable.from_patterns(SPECS, [AttentionPattern(["a_anchors"], ["c"])]),
            "Token 'c' is not defined in `token_specs`",
        ),
        (
            lambda: KeyRangeTable.from_patterns(SPECS, [AttentionPattern(["a_anchors"] * 2, ["a_anchors"])]),
            "'a_anchors' cannot be a query in multiple",
        ),
        (lambda: KeyRangeTable([0, 4], [0, 1], [0, 9]).to_dense(4, 8), r"\[0, 9\) is out of bounds for n_keys = 8"),
        (
            lambda: KeyRangeTable([0, 4], [0, 1], [0, 9]).to_block_mask(3, 9),
            "bounds for n_queries = 3",
        ),
        (lambda: TokenSpec("", 3), "TokenSpec.name must be a non-empty string"),
        (lambda: TokenSpec("a", -1), "size of 'a' must be at least 0, got -1"),
        (lambda: TokenSpec("a", 1.5), "must be an integer or None, got 1.5"),
        (lambda: TokenSpec.from_dict({"a": 1, "b": 2}), "takes one {name: size} entry"),
        (lambda: AttentionPattern("abc", ["a"]), "query_tokens must be a sequence of names, got 'abc'"),
        (lambda: AttentionPattern([], ["a"]), "query_tokens must hold at least one name"),
        (lambda: AttentionPattern(["a"], [1]), r"key_value_tokens must hold strings, got \(1,\)"),
    ],
)
def test_errors_name_the_argument_and_its_value(build: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build()  # type: ignore[operator]


def test_token_spec_dict_round_trip() -> None:
    assert TokenSpec.from_dict({"a": 3}) == TokenSpec("a", 3)
    assert TokenSpec("a", None).to_dict() == {"a": None}
