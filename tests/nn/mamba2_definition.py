"""A Mamba-2 mixer in numpy, float64, one position at a time, from the paper's definition: an oracle for every option.

It shares no code with the library and covers what transformers lacks: norm before the gate, a skip weight for each
channel of a head, no norm, packed segments, and the same step-size limits everywhere.
"""

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def rms_norm(x, scale, groups, eps):
    blocks = x.reshape(groups, -1)
    return (blocks / np.sqrt((blocks**2).mean(-1, keepdims=True) + eps)).reshape(-1) * scale


def mixer(layer, u, segments=None):
    """Returns y [t, d] for one row u [t, d]; `layer` is a `portable.nn.Mamba2`, read for its Params and options."""

    def value(param):
        return np.asarray(param.get_value(), np.float64)

    def linear(module, x):
        return x @ value(module.kernel) + (0 if module.bias is None else value(module.bias))

    h, p, n, g = layer.num_heads, layer.head_dim, layer.state_size, layer.n_groups
    rates, skip = -np.exp(value(layer.A_log)), value(layer.D).reshape(h, -1)
    histories = {name: [] for name in "xBC"}
    state = np.zeros((h, p, n))
    out = []
    for t, now in enumerate(np.asarray(u, np.float64)):
        if segments is not None and t and segments[t] != segments[t - 1]:
            histories, state = {name: [] for name in "xBC"}, np.zeros((h, p, n))
        conv = {}
        for name in "xBC":
            module = getattr(layer, f"conv_{name}")
            histories[name].append(linear(getattr(layer, f"in_{name}"), now))
            kernel = value(module.kernel)
            recent = histories[name][-len(kernel) :]
            total = sum(k * x for k, x in zip(kernel[len(kernel) - len(recent) :], recent, strict=True))
            conv[name] = silu(total + (0 if module.bias is None else value(module.bias)))
        dt = np.clip(softplus(linear(layer.in_dt, now) + value(layer.dt_bias)), *layer.dt_limit)
        x, B, C = conv["x"].reshape(h, p), conv["B"].reshape(g, n), conv["C"].reshape(g, n)
        y = np.zeros((h, p))
        for i in range(h):
            j = i // (h // g)
            state[i] = np.exp(dt[i] * rates[i]) * state[i] + dt[i] * np.outer(x[i], B[j])
            y[i] = state[i] @ C[j] + skip[i] * x[i]
        y, z = y.reshape(-1), silu(linear(layer.in_z, now))
        if layer.norm is None:
            y = y * z
        elif layer.norm.norm_before_gate:
            y = rms_norm(y, value(layer.norm.scale), layer.norm.groups, layer.norm.eps) * z
        else:
            y = rms_norm(y * z, value(layer.norm.scale), layer.norm.groups, layer.norm.eps)
        out.append(linear(layer.out, y))
    return np.stack(out)
