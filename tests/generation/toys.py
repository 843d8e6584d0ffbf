"""Small models with the decode-state protocol: generation is tested apart from any real model."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

TRACED: collections.Counter = collections.Counter()  # how often each method was traced (or run outside jit)


@dataclasses.dataclass(frozen=True)
class Config:
    vocab_size: int


class Recurrent(nnx.Module):
    """A gated recurrent language model: every logit depends on all tokens so far."""

    def __init__(self, vocab_size: int = 61, width: int = 24, *, rngs: nnx.Rngs):
        self.config = Config(vocab_size)
        self.width = width
        self.embed = nnx.Embed(vocab_size, width, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(2 * width, 2 * width, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(width, vocab_size, kernel_init=nnx.initializers.normal(1.0), rngs=rngs)

    def init_state(self, batch_size):
        return [jnp.zeros((batch_size, self.width)) for _ in self.layers]

    def step(self, token, state):
        TRACED["step"] += 1
        return self._step(token, state)

    def _step(self, token, state):
        x = self.embed(token)
        new = []
        for layer, h in zip(self.layers, state, strict=True):
            gate, value = jnp.split(layer(jnp.concatenate([x, h], -1)), 2, -1)
            gate = jax.nn.sigmoid(gate)
            new.append(gate * h + (1 - gate) * jnp.tanh(3 * value))
            x = x + new[-1]
        return self.head(x), new

    def prefill(self, tokens, lengths, state):
        TRACED["prefill"] += 1

        def one(carry, at):
            i, token = at
            logits, new = self._step(token, carry[1])
            real = (i < lengths)[:, None]
            return jax.tree.map(lambda a, b: jnp.where(real, a, b), (logits, new), carry), None

        start = (jnp.zeros((tokens.shape[0], self.config.vocab_size)), state)
        return jax.lax.scan(one, start, (jnp.arange(tokens.shape[1]), tokens.T))[0]


class Bigram(nnx.Module):
    """The next token's logits are the row of a table that the last token names."""

    def __init__(self, table):
        self.config = Config(table.shape[1])
        self.table = nnx.Param(jnp.asarray(table, jnp.float32))

    def init_state(self, batch_size):
        return jnp.zeros(batch_size)

    def prefill(self, tokens, lengths, state):
        TRACED["prefill"] += 1
        return self.table[jnp.take_along_axis(tokens, lengths[:, None] - 1, 1)[:, 0]], state

    def step(self, token, state):
        TRACED["step"] += 1
        return self.table[token], state + 1
