"""The programs whose time a TPU's compiler estimates; a child process of `portable.parity` imports this by name."""

import jax
import jax.numpy as jnp
from flax import nnx

from portable import parity


def mamba2_jax(layers: int, length: int, last: bool) -> parity.Program:
    """The forward of mamba2-jax at the widths of mamba2-2.7b in bfloat16, from tokens to the last position's logits.

    Args:
      layers: 64 in the published model.
      length: tokens of the one row.
      last: whether only the last position goes through the head; as shipped all do.
    """
    import mamba2_jax as peer

    sizes = {"vocab_size": 50288, "hidden_size": 2560, "state_size": 128, "head_dim": 64}
    config = peer.Mamba2Config(num_hidden_layers=layers, **sizes)
    graph, state = nnx.split(nnx.eval_shape(lambda: peer.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))))

    def half(x):
        return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)

    def forward(state, tokens):
        model = nnx.merge(graph, state)
        if not last:
            return model(tokens)["logits"][:, -1]
        hidden = model.backbone(tokens)["last_hidden_state"][:, -1]
        return hidden @ model.backbone.embedder.embedding[...].T

    return parity.Program(forward, (jax.tree.map(half, state), jax.ShapeDtypeStruct((1, length), jnp.int32)))
