"""What layers of sparse attention refuse, in sentences: sizes when they are made, arrays when they are called."""

import jax.numpy as jnp
import pytest
from flax import nnx

from portable import nn

HEADS = {"num_heads": 2}
SMALL = {"block_size": 4, "kernel": 4, "stride": 2, "top_k": 4}
INDEXER = {"num_heads": 2, "head_dim": 8, "rope": None}

# (layer, options, the sentence): refused when the layer is made.
FAULTS = {
    "no block": (nn.MoBA, {"block_size": 0}, "block_size must be at least 1; got 0"),
    "float block": (nn.MoBA, {"block_size": 4.0}, "block_size must be an integer; got float"),
    "taps": (nn.MoBA, {"key_taps": -1}, "key_taps must be at least 0; got -1"),
    "float segments": (nn.MoBA, {"max_segments": 2.5}, "max_segments must be an integer; got float"),
    "no room": (nn.InfLLMv2Attention, {"top_k": 16}, "got top_k=16 for 1 at the start and 32 up to the query"),
    "window": (
        nn.InfLLMv2Attention,
        {"local_window": 100},
        "local_window must be a multiple of block_k; got 100 and 64",
    ),
    "no stride": (nn.InfLLMv2Attention, {"stride": 0}, "stride must be at least 1; got 0"),
    "dense": (nn.InfLLMv2Attention, {"dense_below": -1}, "dense_below must be at least 0; got -1"),
    "stride": (nn.NSA, {"stride": 48}, "stride must divide kernel and block_k; got stride=48"),
    "nothing last": (nn.NSA, {"last": 0}, "last must be at least 1; got 0"),
    "no blocks of HISA": (nn.SparseIndexer, INDEXER | {"block_size": 0}, "block_size must be at least 1; got 0"),
    "one block": (nn.SparseIndexer, INDEXER | {"block_size": 4, "blocks": 1}, "blocks must be at least 2; got 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_sizes_are_checked_when_a_layer_is_made(fault):
    layer, options, sentence = FAULTS[fault]
    with pytest.raises((ValueError, TypeError), match=f"^{layer.__name__}: .*{sentence}"):
        layer(8, **HEADS | options, rngs=nnx.Rngs(0))


LAYERS = {
    "Attention": (nn.Attention, {}),
    "MoBA": (nn.MoBA, {"block_size": 4}),
    "InfLLMv2Attention": (nn.InfLLMv2Attention, SMALL | {"local_window": 4}),
    "NSA": (nn.NSA, SMALL),
    "SparseIndexer": (nn.SparseIndexer, INDEXER),
}
U = jnp.zeros((1, 6, 8))


@pytest.mark.parametrize("name", LAYERS)
def test_arrays_of_a_call_are_checked(name):
    kind, options = LAYERS[name]
    layer = kind(8, **HEADS | options, rngs=nnx.Rngs(0))
    calls = [
        ({"u": U[..., :5]}, ValueError, r"u must be \[b, t, d\] with d=8; got \[1, 6, 5\]"),
        ({"lengths": jnp.array([3, 4])}, ValueError, r"lengths must be \[b\] with b=1; got shape \[2\]"),
        ({"lengths": jnp.array([3.0])}, TypeError, "lengths must be integers; got float32"),
        ({"segment_ids": jnp.zeros((1, 5), int)}, ValueError, r"segment_ids must be \[b, t\] with t=6"),
    ]
    if name == "SparseIndexer":
        calls.append(({"queries": U[:, :5]}, ValueError, r"queries must be \[b, t, q\] with t=6"))
    for given, error, sentence in calls:
        with pytest.raises(error, match=f"^{name}: {sentence}"):
            layer(**{"u": U} | given)


def test_nsa_has_no_dense_form():
    layer = nn.NSA(8, **HEADS, **SMALL, rngs=nnx.Rngs(0))
    layer.is_sparse = False
    with pytest.raises(ValueError, match="NSA: is_sparse must be True"):
        layer(U)
