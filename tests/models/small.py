"""A small Mamba-2 with random weights, and ways to spoil the folder it is saved in."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from portable.models.mamba2 import Mamba2Config, Mamba2LM

CONFIG = Mamba2Config(
    vocab_size=48,
    hidden_size=16,
    num_hidden_layers=2,
    num_heads=4,
    head_dim=8,
    state_size=4,
    n_groups=2,
    use_bias=True,
    bos_token_id=0,
)
TOKENS = np.arange(24).reshape(2, 12) % 48
EMBEDDING = "backbone.embeddings.weight"


@functools.cache
def random_model(dtype=jnp.float32, **options):
    """A model of `CONFIG` in which every parameter is random; always the same one, so nothing may change it."""
    config = dataclasses.replace(CONFIG, **options)
    model = Mamba2LM(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    graphdef, state = nnx.split(model)
    state = jax.tree.map(lambda p: jnp.asarray(0.3 * rng.standard_normal(p.shape), dtype), state)
    return nnx.merge(graphdef, state)


def values(model):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(p.get_value()) for path, p in flat}


def assert_same(got, want):
    got, want = values(got), values(want)
    assert got.keys() == want.keys()
    for path, value in want.items():
        assert got[path].dtype == value.dtype, path
        np.testing.assert_array_equal(got[path], value, err_msg=path)


def rewrite_tensors(folder, change):
    """Rewrites the weights of a folder with the safetensors library."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    changed = change(tensors)
    save_file(tensors if changed is None else changed, file)


def rewrite_config(folder, **change):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | change
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
