"""Attention to selected blocks and choices of blocks by their definitions, in numpy float64, a query at a time."""

import numpy as np


def attend(q, k, v, table, *, block_q, block_k, is_causal, dout, dlse, scale=None, **arrays):
    """Returns out, lse and the gradients of q, k and v for the cotangents dout and dlse."""
    q, k, v, dout, dlse = (np.asarray(x, np.float64) for x in (q, k, v, dout, dlse))
    (b, t, h, width), (s, g) = q.shape, k.shape[1:3]
    scale = width**-0.5 if scale is None else scale
    places = {n: np.asarray(arrays.get(n, np.arange(m)), int) for n, m in (("q_positions", t), ("kv_positions", s))}
    at, keys_at = (np.broadcast_to(places[n], (b, m)) for n, m in (("q_positions", t), ("kv_positions", s)))
    ids = arrays.get("segment_ids", (np.zeros((b, t)), np.zeros((b, s))))
    mine, theirs = ids if isinstance(ids, tuple) else (ids, ids)
    table = np.asarray(table)
    out, lse = np.zeros((b, t, h, v.shape[-1])), np.full((b, h, t), -np.inf)
    dq, dk, dv = (np.zeros_like(x) for x in (q, k, v))
    for row, i, head in np.ndindex(b, t, h):
        group, chosen = head // (h // g), set(table[row, head * table.shape[1] // h, i // block_q].tolist())
        seen = [
            j for j in range(s)
            if j // block_k in chosen
            and (not is_causal or keys_at[row, j] <= at[row, i])
            and mine[row][i] == theirs[row][j]
        ]  # fmt: skip
        if not seen:
            continue
        x = k[row, seen, group] @ q[row, i, head] * scale
        weights = np.exp(x - x.max())
        total = weights.sum()
        weights, lse[row, head, i] = weights / total, x.max() + np.log(total)
        out[row, i, head] = weights @ v[row, seen, group]
        slopes = v[row, seen, group] @ dout[row, i, head]
        dx = weights * (slopes - weights @ slopes + dlse[row, head, i]) * scale
        dq[row, i, head] = dx @ k[row, seen, group]
        np.add.at(dk, (row, seen, group), dx[:, None] * q[row, i, head])
        np.add.at(dv, (row, seen, group), weights[:, None] * dout[row, i, head])
    return out, lse, dq, dk, dv


def moba(q, k, block, top_k, at=None):
    """Returns the sets of blocks of each [b, h, t]."""
    (b, t, h, _), g = q.shape, k.shape[2]
    found = np.empty((b, h, t), object)
    for row, head, i in np.ndindex(b, h, t):
        own = (i if at is None else at[row, i]) // block
        keys = k[row, :, head // (h // g)].astype(np.float64)
        rank = {n: q[row, i, head].astype(np.float64) @ keys[n * block : (n + 1) * block].mean(0) for n in range(own)}
        best = sorted(rank, key=lambda n: -rank[n])[: top_k - 1]
        found[row, head, i] = {own, *best}
    return found


def compressed(q, k, *, kernel, stride, block, top_k, initial, local, pool, scale=None):
    """Returns the sets of blocks of each [b, g, t] by attention to means of kernels.

    `pool` is "share" (each kernel counts as often as it shares a stride with the block) or "max" (of those that touch).
    """
    (b, t, h, width), (s, g) = q.shape, k.shape[1:3]
    scale = width**-0.5 if scale is None else scale
    found = np.empty((b, g, t), object)
    starts = range(0, s - kernel + 1, stride)
    for row, group, i in np.ndindex(b, g, t):
        seen = [c for c in starts if c + kernel - 1 <= i]
        p = dict.fromkeys(seen, 0.0)
        for head in range(group * (h // g), (group + 1) * (h // g)):
            means = [k[row, c : c + kernel, group].astype(np.float64).mean(0) for c in seen]
            x = np.array([m @ q[row, i, head].astype(np.float64) * scale for m in means])
            for c, w in zip(seen, np.exp(x - x.max()) if seen else [], strict=True):
                p[c] += w / np.exp(x - x.max()).sum()
        own, scores = i // block, {}
        for n in range(own + 1):
            touch = [
                (len(set(range(c, c + kernel)) & set(range(n * block, (n + 1) * block))) // stride, p[c]) for c in seen
            ]
            touch = [(share, w) for share, w in touch if share]
            total = sum(share * w for share, w in touch) if pool == "share" else max((w for _, w in touch), default=0)
            scores[n] = np.inf if n < initial or n > own - local else total
        found[row, group, i] = set(sorted(scores, key=lambda n: (-scores[n], n))[:top_k])
    return found


def index(q, k, w, top_k):
    """Returns the sets of tokens of each [b, t] by a lightning indexer."""
    b, t = q.shape[:2]
    found = np.empty((b, t), object)
    for row, i in np.ndindex(b, t):
        scores = [
            sum(w[row, i, j] * max(0.0, float(q[row, i, j].astype(np.float64) @ k[row, s])) for j in range(q.shape[2]))
            for s in range(i + 1)
        ]
        found[row, i] = set(sorted(range(i + 1), key=lambda s: (-scores[s], s))[:top_k])
    return found


def sets(indices):
    """Returns the sets of indices [..., n] without -1, as an array of objects."""
    indices = np.asarray(indices)
    found = np.empty(indices.shape[:-1], object)
    for at in np.ndindex(found.shape):
        found[at] = set(indices[at].tolist()) - {-1}
    return found
