"""Neighborhood attention by lists of positions, in numpy: value, log-sum-exp and gradients in float64."""

import functools
import itertools
import math

import numpy as np


def sees(length, window, stride, dilation, causal) -> np.ndarray:
    """What each position of an axis sees, from lists of positions."""
    table = np.zeros((length, length), bool)
    for i in range(length):
        group = list(range(length))[i % dilation :: dilation]
        p = group.index(i)
        sharing = group[p - p % stride :][:stride]
        if causal:
            leader = group.index(sharing[-1])
            seen = group[max(0, leader - window + 1) : p + 1]
        else:
            centre = group.index(sharing[min(stride // 2, len(sharing) - 1)])
            first = centre - window // 2
            while first > 0 and first + window > len(group):
                first -= 1
            seen = group[max(first, 0) :][:window]
        table[i, seen] = True
    return table


def definition(
    q, k, v, dout, dlse, *, mask, rel_pos_bias=None, key_mask=None, extra_k=None, extra_v=None, windows=None
):
    """Value, log-sum-exp and gradients in numpy, float64: one row of the batch and head at a time.

    `mask` is one [n, n] table, `windows` what the bias needs: (space, dilation, window).
    """
    q, k, v, dout, dlse = (np.asarray(x, np.float64) for x in (q, k, v, dout, dlse))
    (b, *space, h, width), g = q.shape, k.shape[-2]
    n = math.prod(space)
    grads = {"q": np.zeros_like(q), "k": np.zeros_like(k), "v": np.zeros_like(v)}
    out, lse = np.zeros((*q.shape[:-1], v.shape[-1])), np.zeros(q.shape[:-1])
    if rel_pos_bias is not None:
        grads["rel_pos_bias"], index = np.zeros(rel_pos_bias.shape), []
        for p, d, w in zip(np.indices(space).reshape(len(space), n), *windows, strict=True):
            index.append(np.clip(p[None] // d - p[:, None] // d + w - 1, 0, 2 * w - 2))
    if extra_k is not None:
        grads["extra_k"], grads["extra_v"] = np.zeros(extra_k.shape), np.zeros(extra_v.shape)
    flat = lambda x, i, j: x[i].reshape(n, x.shape[-2], -1)[:, j]  # noqa: E731 (a view)
    for i, j in itertools.product(range(b), range(h)):
        kv = j // (h // g)
        rows, keys, values = flat(q, i, j), flat(k, i, kv), flat(v, i, kv)
        allowed = mask if key_mask is None else mask & np.asarray(key_mask)[i].reshape(1, n)
        bias = 0 if rel_pos_bias is None else np.asarray(rel_pos_bias, np.float64)[(j, *index)]
        if extra_k is not None:
            keys = np.concatenate([keys, np.asarray(extra_k, np.float64)[i, :, kv]])
            values = np.concatenate([values, np.asarray(extra_v, np.float64)[i, :, kv]])
            allowed = np.concatenate([allowed, np.ones((n, extra_k.shape[1]), bool)], 1)
            bias = np.pad(np.broadcast_to(bias, (n, n)), ((0, 0), (0, extra_k.shape[1])))
        scores = np.where(allowed, rows @ keys.T * width**-0.5 + bias, -np.inf)
        dead = ~allowed.any(1)
        highest = np.where(dead, 0, scores.max(1))
        total = np.exp(scores - highest[:, None]).sum(1)
        weights = np.exp(scores - highest[:, None]) / np.where(dead, 1, total)[:, None]
        flat(out, i, j)[:] = weights @ values
        with np.errstate(divide="ignore"):
            lse[i].reshape(n, h)[:, j] = highest + np.log(total)
        do, dl = flat(dout, i, j), np.where(dead, 0, dlse[i].reshape(n, h)[:, j])
        slopes = do @ values.T
        dscores = weights * (slopes - (weights * slopes).sum(1, keepdims=True) + dl[:, None])
        flat(grads["q"], i, j)[:] = dscores @ keys * width**-0.5
        dkeys, dvalues = dscores.T @ rows * width**-0.5, weights.T @ do
        flat(grads["k"], i, kv)[:] += dkeys[:n]
        flat(grads["v"], i, kv)[:] += dvalues[:n]
        if extra_k is not None:
            grads["extra_k"][i, :, kv] += dkeys[n:]
            grads["extra_v"][i, :, kv] += dvalues[n:]
        if rel_pos_bias is not None:
            np.add.at(grads["rel_pos_bias"][j], tuple(index), dscores[:, :n])
    return out, lse, grads


def table(space, window, stride, dilation, is_causal) -> np.ndarray:
    every = itertools.starmap(sees, zip(space, window, stride, dilation, is_causal, strict=True))
    return functools.reduce(np.kron, every, np.ones((1, 1), bool))
