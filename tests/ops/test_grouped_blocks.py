"""Blocks of rows: every row in one block of its own group, at a place of its own, and no more blocks than announced."""

import jax.numpy as jnp
import numpy as np
import pytest

from portable.ops._grouped_matmul import blocks


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize(
    "sizes, rows, size",
    [
        ((3, 0, 9, 1), 13, 4),
        ((3, 0, 8, 1), 20, 4),
        ((0, 0, 17, 0), 17, 8),
        ((0, 0), 5, 4),
        ((1, 1, 1, 1, 1), 5, 16),
        ((0, 1, 0), 1, 8),
    ],
)
def test_every_row_has_a_block_and_a_place(sizes, rows, size, rest):
    found = blocks.make(jnp.asarray(sizes), rows, size, rest=rest)
    group, row, end, place = (np.asarray(x) for x in (found.group, found.row, found.end, found.place))
    (count,) = np.asarray(found.count)
    want = np.repeat(np.arange(len(sizes)), sizes)
    if rest:
        want = np.append(want, np.full(rows - len(want), len(sizes)))
    seen = [r for b in range(count) for r in range(row[b], end[b])]
    assert seen == list(range(len(want)))
    assert [g for b in range(count) for g in [group[b]] * (end[b] - row[b])] == list(want)
    for b in range(max(count, 1), len(group)):  # those behind repeat the last
        assert (group[b], row[b]) == (group[max(count, 1) - 1], row[max(count, 1) - 1])
    assert len(set(place[: len(want)])) == len(want)
    assert (np.asarray(found.rows)[place[: len(want)]] == np.arange(len(want))).all()
    assert [group[p // size] for p in place[: len(want)]] == list(want)
    assert ((place >= 0) & (place < len(group) * size)).all()
    # At most one block of a group is not full.
    assert count * size <= len(want) + min(len(sizes) + rest, rows) * (size - 1)
