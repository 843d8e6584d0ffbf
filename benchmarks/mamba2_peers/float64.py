"""Mamba-2 in float64 from its definition, in numpy, position by position: a judge that shares no code."""

import json
import pathlib

import numpy as np
from safetensors.numpy import load_file


def logits(folder: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
    """Logits [t, v] float64 of one row of tokens [t], from a checkpoint in the transformers format.

    Covers what the benchmark's checkpoint has: one group, no projection bias, silu, gated norm, tied head.
    """
    config = json.loads((folder / "config.json").read_text())
    if config["n_groups"] != 1 or config["use_bias"] or not config["tie_word_embeddings"]:
        raise ValueError("float64.logits covers one group, no projection bias and a tied head only.")
    w = {name: value.astype(np.float64) for name, value in load_file(folder / "model.safetensors").items()}
    eps = config["layer_norm_epsilon"]
    embedding = w["backbone.embeddings.weight"]
    stream = embedding[tokens]
    for i in range(config["num_hidden_layers"]):
        layer = f"backbone.layers.{i}."
        own = {name.removeprefix(layer): value for name, value in w.items() if name.startswith(layer)}
        stream = stream + _mixer(_rms(stream, own["norm.weight"], eps), own, config)
    return _rms(stream, w["backbone.norm_f.weight"], eps) @ embedding.T


def _mixer(u: np.ndarray, w: dict[str, np.ndarray], config: dict) -> np.ndarray:
    t, heads, p, n = len(u), config["num_heads"], config["head_dim"], config["state_size"]
    inner = heads * p
    z, xbc, dt = np.split(u @ w["mixer.in_proj.weight"].T, [inner, 2 * inner + 2 * n], axis=1)
    taps = w["mixer.conv1d.weight"][:, 0]
    padded = np.pad(xbc, ((taps.shape[1] - 1, 0), (0, 0)))
    xbc = w["mixer.conv1d.bias"] + sum(taps[:, k] * padded[k : k + t] for k in range(taps.shape[1]))
    x, B, C = np.split(_silu(xbc), [inner, inner + n], axis=1)
    x = x.reshape(t, heads, p)
    low, high = (float(limit["__float__"]) if isinstance(limit, dict) else limit for limit in config["time_step_limit"])
    dt = np.clip(np.logaddexp(0, dt + w["mixer.dt_bias"]), low, high)
    decay = np.exp(dt * -np.exp(w["mixer.A_log"]))
    state, y = np.zeros((heads, p, n)), np.empty_like(x)
    for i in range(t):
        state = decay[i, :, None, None] * state + (dt[i, :, None] * x[i])[:, :, None] * B[i]
        y[i] = state @ C[i] + w["mixer.D"][:, None] * x[i]
    gated = y.reshape(t, inner) * _silu(z)
    return _rms(gated, w["mixer.norm.weight"], config["layer_norm_epsilon"]) @ w["mixer.out_proj.weight"].T


def _rms(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))
