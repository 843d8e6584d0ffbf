"""The order of tiles and the lists of blocks that both kernels walk along, against what the definition sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from portable.ops._neighborhood_attention import layout, tables
from portable.ops._neighborhood_attention.reference import seen
from portable.pallas_kernels import block_lists
from portable.pallas_kernels.block_lists import FIRST, FULL, LAST, MASKED


def spaces(seed: int, count: int):
    """Yields sides of random spaces of one or two axes."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        sides = []
        for _ in range(rng.integers(1, 3)):
            length, dilation = int(rng.integers(3, 30)), int(rng.integers(1, 4))
            window = int(rng.integers(1, length + 2))
            axis = tables.Axis(length, window, int(rng.integers(1, window + 1)), dilation, bool(rng.integers(2)))
            sides.append(layout.Side(axis, int(rng.choice([1, 2, 4])), int(rng.choice([1, 2, 3]))))
        yield tuple(sides)


def ordered_mask(sides) -> np.ndarray:
    """Returns what each query (row) sees, [G, tokens, tokens] in the order of tiles; padding sees nothing."""
    mask = np.ones((1, 1), bool)
    for s in sides:
        axis = s.axis
        mask = np.kron(mask, seen(axis.length, axis.window, axis.stride, axis.dilation, axis.causal))
    number = 1 + jnp.arange(len(mask), dtype=jnp.int32).reshape(1, *(s.axis.length for s in sides))
    order = np.asarray(layout.to_tiles(number, sides)) - 1  # -1 where padding is
    return mask[order[:, :, None], order[:, None, :]] & (order[:, :, None] >= 0) & (order[:, None, :] >= 0)


@pytest.mark.parametrize("count", [6, pytest.param(80, marks=pytest.mark.full)])
def test_pairs_and_intervals_are_what_the_definition_sees(count, seed):
    for sides in spaces(seed, count):
        rows, columns = layout.rows(sides)
        mask = ordered_mask(sides)
        real = np.asarray(layout.to_tiles(jnp.ones((1, *(s.axis.length for s in sides)), bool), sides))
        first, end = np.split(np.asarray(layout.intervals(sides)), 2, axis=2)  # [G or 1, T, rank, R]
        first, end = (np.moveaxis(x, 2, -1).reshape(len(x), -1, 1, len(sides)) for x in (first, end))
        place = np.moveaxis(np.asarray(layout.places(sides)), 2, -1).reshape(1, 1, -1, len(sides))
        inside = np.broadcast_to(((first <= place) & (place < end)).all(-1), mask.shape)
        np.testing.assert_array_equal(inside & real[:, :, None], mask)  # and no padded key is in a real query's
        tiles = inside.reshape(len(mask), -1, rows, mask.shape[2] // columns, columns).transpose(0, 1, 3, 2, 4)
        queries, keys, full = layout.pairs(sides)
        assert len(set(zip(queries.tolist(), keys.tolist(), strict=True))) == len(queries)
        listed, whole = np.zeros(tiles.shape[1:3], bool), np.zeros(tiles.shape[1:3], bool)
        listed[queries, keys], whole[queries, keys] = True, full
        assert not (tiles.any((0, 3, 4)) & ~listed).any()
        np.testing.assert_array_equal(whole & ~tiles.all((0, 3, 4)), False)
        if len(sides) == 1:  # what is listed without need would be work in vain
            np.testing.assert_array_equal(whole, tiles.all((0, 3, 4)))
        counts = [layout.count(s) for s in sides]
        assert (len(keys), full.sum()) == tuple(np.prod(counts, axis=0))


def test_the_order_of_tiles_is_a_permutation(seed):
    for sides in spaces(seed, 3):
        x = np.random.default_rng(seed).normal(size=(2, *(s.axis.length for s in sides), 3))
        tiled = layout.to_tiles(x, sides)
        assert tiled.shape == (2 * layout.groups(sides), np.prod([s.padded for s in sides]), 3)
        np.testing.assert_array_equal(layout.from_tiles(tiled, sides), jnp.asarray(x))


def walk(steps, row: int, head: int) -> list[tuple]:
    """Walks as a kernel does; returns (own, the blocks that it works on, whether unmasked) of each own block."""
    found, met, plain = [], [], set()
    for own, other, kind in zip(*(np.asarray(x)[row, head] for x in steps), strict=True):
        if kind & FIRST:
            met, plain = [], set()
        if kind & (MASKED | FULL):
            assert not (kind & MASKED and kind & FULL)
            there = other[other >= 0].tolist()
            assert there
            met += there
            plain |= set(there) if kind & FULL else set()
            assert len(there) == len(other) or not kind & FULL
        if kind & LAST:
            found.append((int(own), sorted(met), plain))
    return found


@pytest.mark.parametrize("fan", [1, 3])
def test_steps_meet_every_pair_once(fan, seed):
    rng = np.random.default_rng(seed)
    hits = rng.uniform(size=(7, 9)) < 0.4
    hits[2] = False
    own, other = np.nonzero(hits)
    full = rng.uniform(size=len(own)) < 0.5
    found = walk(block_lists.steps(block_lists.known(own, other, full, 7), fan), 0, 0)
    assert [(o, m) for o, m, _ in found] == [(i, np.nonzero(hits[i])[0].tolist()) for i in range(7)]
    for i, _, plain in found:
        assert plain <= set(other[(own == i) & full].tolist())
        assert fan > 1 or plain == set(other[(own == i) & full].tolist())


@pytest.mark.parametrize("fan", [1, 2])
def test_a_table_made_at_run_time_lists_its_set(fan, seed):
    rows, heads, own, keys, n = 2, 2, 5, 6, 4
    table = np.random.default_rng(seed).integers(-1, keys, (rows, heads, own, n)).astype(np.int32)
    table[0, 0, 3] = -1

    @jax.jit
    def both(table):
        forward = block_lists.steps(block_lists.selected(table), fan, own * -(-n // fan))
        back = block_lists.selected(table, by_keys=keys)
        return forward, block_lists.steps(back, fan, keys + own * n // fan)

    forward, back = both(table)
    for row, head in np.ndindex(rows, heads):
        sets = [sorted(set(x.tolist()) - {-1}) for x in table[row, head]]
        assert [(o, m) for o, m, _ in walk(forward, row, head)] == list(enumerate(sets))
        turned = [[i for i in range(own) if key in sets[i]] for key in range(keys)]
        assert [(o, m) for o, m, _ in walk(back, row, head)] == list(enumerate(turned))
