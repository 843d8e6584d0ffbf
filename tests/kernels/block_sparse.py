"""Attention over blocks that a table selects at run time, by its definition; both kernels are held against it."""

from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """q [b, t, h, k], k [b, s, g, k], v [b, s, g, v]; table [b, h_sel, t / R, n]; positions and segments of tokens."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    table: np.ndarray
    q_positions: np.ndarray
    k_positions: np.ndarray
    q_segments: np.ndarray
    k_segments: np.ndarray
    dout: np.ndarray
    rows: int
    columns: int
    scale: float


def case(seed: int, *, h: int = 2, g: int = 1, tables: int = 2, rows: int = 16, columns: int = 32) -> Case:
    """Returns a case with blocks named twice, padding, rows that name nothing, and keys out of order."""
    rng = np.random.default_rng(seed)
    b, blocks, keys, n, width, wide = 2, 3, 4, 2, 16, 24
    t, s = blocks * rows, keys * columns
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    table = rng.integers(-1, keys, (b, tables, blocks, n)).astype(np.int32)
    table[0, :, 1], table[1, 0, 2] = -1, [3, 3]
    places = [np.stack([rng.permutation(s) for _ in range(b)]).astype(np.int32) for _ in range(2)]
    segments = [rng.integers(0, 2, (b, size)).astype(np.int32) for size in (t, s)]
    return Case(
        normal(b, t, h, width), normal(b, s, g, width), normal(b, s, g, wide), table, places[0][:, :t], places[1],
        segments[0], segments[1], normal(b, t, h, wide), rows, columns, 0.3,
    )  # fmt: skip


def definition(c: Case) -> dict[str, np.ndarray]:
    """Returns result, log-sum-exp and the gradients for `dout`, in float64."""
    b, t, h, _ = c.q.shape
    share = h // c.k.shape[2]
    q, dout = (np.moveaxis(x, 2, 1).astype(np.float64) for x in (c.q, c.dout))
    k, v = (np.repeat(np.moveaxis(x, 2, 1), share, 1).astype(np.float64) for x in (c.k, c.v))
    selected = np.zeros((b, h, t, k.shape[2]), bool)
    for row, head, i in np.ndindex(b, h, t):
        for block in c.table[row, head * c.table.shape[1] // h, i // c.rows]:
            if block >= 0:
                selected[row, head, i, block * c.columns : (block + 1) * c.columns] = True
    sees = selected & (c.k_positions[:, None, None] <= c.q_positions[:, None, :, None])
    sees &= c.k_segments[:, None, None] == c.q_segments[:, None, :, None]
    with np.errstate(divide="ignore"):
        weights = np.where(sees, np.exp(q @ np.swapaxes(k, 2, 3) * c.scale), 0)
        total = weights.sum(-1, keepdims=True)
        weights = weights / np.where(total == 0, 1, total)
        lse = np.log(total)[..., 0]
    out = weights @ v
    slopes = dout @ np.swapaxes(v, 2, 3)
    dscores = weights * (slopes - (weights * slopes).sum(-1, keepdims=True)) * c.scale
    grouped = lambda x: x.reshape(b, -1, share, *x.shape[2:]).sum(2)  # noqa: E731
    found = {
        "out": out, "lse": lse[..., None], "dq": dscores @ k,
        "dk": grouped(np.swapaxes(dscores, 2, 3) @ q), "dv": grouped(np.swapaxes(weights, 2, 3) @ dout),
    }  # fmt: skip
    return {name: np.moveaxis(x, 1, 2) for name, x in found.items()} | {"sees": np.moveaxis(sees.any(-1), 1, 2)}


def intervals(c: Case) -> np.ndarray:
    """Returns [b, T, 4, R]: up to a query's position, and its segment alone."""
    first = [np.full_like(c.q_positions, np.iinfo(np.int32).min), c.q_segments]
    ends = [c.q_positions + 1, c.q_segments + 1]
    return np.stack([x.reshape(len(x), -1, c.rows) for x in (*first, *ends)], 2)


def places(c: Case) -> np.ndarray:
    """Returns [b, S, 2, C]."""
    return np.stack([x.reshape(len(x), -1, c.columns) for x in (c.k_positions, c.k_segments)], 2)
