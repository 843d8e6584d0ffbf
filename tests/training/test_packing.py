"""Rows of examples: packed as the definition of best fit packs, and nothing lost, doubled or moved."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portable.checks import DataError
from portable.training.data import IGNORE
from portable.training.examples import Example
from portable.training.packing import Rows, best_fit


def by_definition(sizes, capacity):
    """Best-fit decreasing by looking at every bin for every item; the sizes of each bin."""
    bins = []
    for size in sorted(sizes, reverse=True):
        fitting = [b for b in bins if sum(b) + size <= capacity]
        if fitting:
            max(fitting, key=sum).append(size)
        else:
            bins.append([size])
    return sorted(sorted(b) for b in bins)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 12), max_size=40))
def test_bins_are_those_of_the_definition(sizes):
    bins = best_fit(sizes, 12)
    assert sorted(itertools.chain(*bins)) == list(range(len(sizes)))
    # Among bins with equal room the choice is free, and may divide sizes otherwise: how full bins are may not differ.
    assert sorted(sum(sizes[i] for i in b) for b in bins) == sorted(map(sum, by_definition(sizes, 12)))


def example(tokens, trained=None):
    tokens = np.asarray(tokens, np.int32)
    trained = np.ones(len(tokens), bool) if trained is None else np.asarray(trained, bool)
    trained[:1] = False
    return Example(tokens, trained, len(tokens))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 14)), min_size=1, max_size=8), st.integers(2, 9))
def test_every_trained_token_is_a_target_once_after_what_precedes_it(sizes, length):
    number, examples, wanted = itertools.count(1), [], []
    for before, after in sizes:
        tokens = [next(number) for _ in range(before + after)]
        trained = np.arange(len(tokens)) >= before
        examples.append(example(tokens, trained))
        whole = before <= 1
        kept = tokens if whole else tokens[: length + 1]
        wanted += [(a, b) for i, (a, b) in enumerate(itertools.pairwise(kept)) if i + 1 >= max(1, before)]
    if not wanted:
        with pytest.raises(DataError, match="nothing to train on in rows of"):
            Rows(examples, length)
        return
    for packed in (True, False):
        rows, seen, contexts = Rows(examples, length, packed=packed), [], 0
        for i in range(len(rows)):
            row = rows[i]
            assert [(v.shape, v.dtype) for v in row.values()] == [((length,), np.int32)] * 3
            real = row["targets"] != IGNORE
            seen += list(zip(row["tokens"][real].tolist(), row["targets"][real].tolist()))
            parts = [list(g) for _, g in itertools.groupby(zip(row["segments"], row["tokens"]), key=lambda p: p[0])]
            assert [p[0][0] for p in parts] == list(range(len(parts)))  # a segment is one run
            for part in parts:  # the numbers of one example are consecutive: whatever is not, is of two
                ids = [int(t) for _, t in part]
                assert set(np.diff(ids)) <= ({0} if ids[0] == 0 else {1})
            contexts += sum(p[0][1] != 0 for p in parts)
        assert sorted(seen) == sorted(wanted)
        assert rows.trained == len(wanted)
        assert contexts == len(rows) if not packed else contexts >= len(rows)


def test_what_is_cut_and_lost_is_counted():
    told = [0, 0, 0, 1, 1, 1, 1]
    rows = Rows([example(range(1, 8), told), example(range(1, 8), [0] * 6 + [1]), example(range(1, 20))], 5)
    assert (rows.cut, rows.lost, len(rows)) == (1, 1, 5)
    said = rows.summary()
    assert "5 rows of 5 tokens, 92.0% filled" in said
    assert "1 example is longer than a row and cut at its end" in said
    assert "1 left out, because the prompt alone fills a row" in said
    with pytest.raises(DataError, match="rows of 5 tokens: got 1 examples, 1 of them with a prompt that fills a row"):
        Rows([example(range(1, 8), [0] * 6 + [1])], 5)
    with pytest.raises(DataError, match="nothing to train on"):
        Rows([], 5)
