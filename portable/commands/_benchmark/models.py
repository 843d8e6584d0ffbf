"""Times a model's forward pass, decoding and training step on the device at hand."""

import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from portable.checks import PortableError
from portable.commands._benchmark import timing
from portable.generation import generate
from portable.nn import fresh_state
from portable.parity import numbers


class Resumed(nnx.Module):
    """A model that has already read its prompt: `generate` on it is the decode loop and nothing else.

    Args:
      model: a decoder (see `portable.generation.Decoder`).
      logits: [b, v], of the prompt's last token.
      state: the decode state behind the prompt.
    """

    def __init__(self, model: Any, logits: jax.Array, state: Any):
        self.model, self.config = model, model.config
        self.held = nnx.data((logits, state))

    def init_state(self, batch_size: int) -> Any:
        """The state behind the prompt."""
        return self.held[1]

    def prefill(self, tokens: jax.Array, lengths: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Nothing is left to read."""
        return self.held[0], state

    def step(self, token: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """The model's own step."""
        return self.model.step(token, state)


class GreedyLoop:
    """The compiled loop of `portable.generate` on a model held right behind a prompt; compiles when made.

    Args:
      model, logits, state: see `Resumed`.
      tokens: steps of the loop in one run.

    Attributes:
      compile_seconds: what the first call took; it makes two tokens.
    """

    def __init__(self, model: Any, logits: jax.Array, state: Any, tokens: int):
        self._resumed = Resumed(model, logits, state)
        self._prompts = [[0]] * logits.shape[0]  # not read
        self._count = tokens + 1  # the first token comes from the held logits
        begin = time.perf_counter()
        generate(self._resumed, self._prompts, max_new_tokens=2)
        self.compile_seconds = time.perf_counter() - begin

    def run(self) -> np.ndarray:
        """Greedy tokens [b, tokens + 1] on the host."""
        return generate(self._resumed, self._prompts, max_new_tokens=self._count).tokens


def read(model: Any, tokens: jax.Array, room: int | None = None) -> tuple[jax.Array, Any]:
    """Prefills [b, t] tokens; returns (logits of the last ones [b, v], state with room for so many, t unless given)."""
    b, t = tokens.shape
    return model.prefill(tokens, jnp.full(b, t), fresh_state(model, b, room or t))


def loss(model: Any, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy [] of each next token of [b, t]."""
    logits = model(tokens)[:, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def published(name: str) -> dict[str, Any]:
    """Returns the configurations of a model's published sizes by short name, the smallest first.

    Raises:
      PortableError: no model has that name.
    """
    from portable import models

    known = models.MODELS
    if name not in known:
        raise PortableError(f"bench: there is no model or op called {name!r}; models: {', '.join(known)}.")
    config = known[name].config
    made = {n.removeprefix(f"{name}_"): getattr(config, n)() for n in dir(config) if n.startswith(f"{name}_")}

    def size(config: Any) -> int:
        if hasattr(config, "depths"):
            return sum(config.depths) * config.embed_dim**2
        return config.num_hidden_layers * config.hidden_size**2

    return dict(sorted(made.items(), key=lambda item: size(item[1])))


def build(name: str, size: str | None, folder: str | None, dtype: str, *, quick: bool) -> tuple[str, Any]:
    """Makes the model to time, from a folder or with random weights; returns (what it is, model)."""
    from portable import models

    wide = jnp.dtype(dtype)
    if folder is not None:
        return folder, models.load(folder, wide, compute_dtype=wide)
    sizes = published(name)
    if not sizes:
        raise PortableError(f"bench: {name} has no sizes to name here; give --model FOLDER.")
    size = size or next(iter(sizes))
    if size not in sizes:
        raise PortableError(f"bench: {name} has no published size {size!r}; there are: {', '.join(sizes)}.")
    config = numbers.shortened(sizes[size], 2) if quick else sizes[size]
    label = f"{name}-{size}, random weights" + (", its first 2 layers" if quick else "")
    return label, models.MODELS[name].model(config, dtype=wide, param_dtype=wide, rngs=nnx.Rngs(0))


def records(model: Any, *, batch: int, prompt: int, tokens: int, samples: int) -> Iterator[dict]:
    """Yields a record each for prefill, decode and training of [batch, prompt] tokens."""
    ids = jax.random.randint(jax.random.key(0), (batch, prompt), 0, model.config.vocab_size)
    graph, weights = nnx.split(model)

    def prefill(weights, ids):
        return read(nnx.merge(graph, weights), ids, prompt + tokens)

    yield _record("prefill", batch * prompt, timing.measure(prefill, weights, ids, samples=samples))

    logits, state = jax.jit(prefill)(weights, ids)
    loop = GreedyLoop(model, logits, state, tokens)
    runs = timing.Timing(timing.repeat(loop.run, samples), loop.compile_seconds, None)
    yield _record("decode", batch * tokens, runs)

    graph, weights, rest = nnx.split(model, nnx.Param, ...)
    train = jax.value_and_grad(lambda weights, ids: loss(nnx.merge(graph, weights, rest), ids))
    yield _record("forward and backward", batch * prompt, timing.measure(train, weights, ids, samples=samples))


def image_records(model: Any, *, batch: int, pixels: int, samples: int) -> Iterator[dict]:
    """Yields a record each for the forward pass and for training of [batch, pixels, pixels] images."""
    images = jax.random.normal(jax.random.key(0), (batch, pixels, pixels, model.config.num_channels), model.dtype)
    labels = jnp.arange(batch) % max(1, model.config.num_labels)
    graph, weights, rest = nnx.split(model, nnx.Param, ...)

    def forward(weights, images):
        return nnx.merge(graph, weights, rest)(images)

    def loss(weights, images):
        return optax.softmax_cross_entropy_with_integer_labels(forward(weights, images), labels).mean()

    train = jax.value_and_grad(loss)
    for task, program in (("forward", forward), ("forward and backward", train)):
        yield _record(task, batch, timing.measure(program, weights, images, samples=samples), "image")


def _record(task: str, count: int, runs: timing.Timing, unit: str = "token") -> dict[str, Any]:
    return {
        "task": task,
        f"{unit}s": count,
        "ms": 1e3 * runs.median,
        "samples_s": runs.seconds,
        f"{unit}s_per_s": count / runs.median,
        f"ms_per_{unit}": 1e3 * runs.median / count,
        "compile_s": runs.compile_seconds,
        "temporary_mib": None if runs.temporary_bytes is None else runs.temporary_bytes / 2**20,
    }
