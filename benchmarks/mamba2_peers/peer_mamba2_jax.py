"""mamba2-jax, used the way its README and `tests/run_model.py` use it: a Python loop over one jitted step."""

import importlib
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from harness import measure
from safetensors.numpy import load_file

from mamba2_peers import tasks


def build(spec: dict[str, Any]) -> Any:
    """The task of `spec`, weights loaded; `options.chunk_size` overrides the library's default of 256."""
    folder = pathlib.Path(spec["checkpoint"])
    model = load(folder, spec["options"].get("chunk_size"))
    kind = spec["task"].rstrip("0123456789")
    return {"prefill": Prefill, "decode": Decode, "train": Train, "logits": Logits}[kind](model, spec)


def load(folder: pathlib.Path, chunk_size: int | None) -> nnx.Module:
    """The model with all weights of the checkpoint; raises if one of them found no place.

    Its loader knows only the state-spaces spelling of the embedding and skips the other one, so it is renamed
    here.
    """
    modeling = importlib.import_module("mamba2_jax.modeling")
    params = importlib.import_module("mamba2_jax.params")
    written = json.loads((folder / "config.json").read_text())
    names = (
        "vocab_size",
        "hidden_size",
        "state_size",
        "num_hidden_layers",
        "head_dim",
        "expand",
        "conv_kernel",
    )
    chosen = {"chunk_size": chunk_size} if chunk_size else {}
    config = modeling.Mamba2Config(**{name: written[name] for name in names}, **chosen)
    tensors = {
        name.replace("backbone.embeddings.", "backbone.embedding."): value
        for name, value in load_file(folder / "model.safetensors").items()
    }
    model, _, skipped = params.load_pytorch_weights(params.create_random_model(config), tensors)
    if skipped:
        raise RuntimeError(f"mamba2-jax has no place for {skipped}.")
    return model


def compiled(function: Any, *arguments: Any) -> tuple[Any, dict[str, float]]:
    """The program for these arguments, and the seconds that tracing and compiling took."""
    begin = time.perf_counter()
    lowered = function.lower(*arguments)
    middle = time.perf_counter()
    program = lowered.compile()
    return program, {"trace_s": middle - begin, "compile_s": time.perf_counter() - middle}


class Prefill:
    """Logits of the last token and the cache; all logits are computed, for it offers nothing else."""

    def __init__(self, model: Any, spec: dict[str, Any]):
        self.model = model
        self.tokens = jnp.asarray(tasks.ids(tasks.length_of(spec["task"]), vocab_size=model.cfg.vocab_size), jnp.int32)

    def prepare(self) -> dict[str, float]:
        def prefill(model, tokens):
            out = model(tokens)
            return out["logits"][:, -1], out["cache"]

        self.program, seconds = compiled(jax.jit(prefill), self.model, self.tokens)
        return seconds

    def sample(self) -> dict[str, float]:
        return measure.timed(lambda: jax.block_until_ready(self.program(self.model, self.tokens)))


class Decode:
    """Greedy tokens after the prompt; the token and the cache stay on the device."""

    def __init__(self, model: Any, spec: dict[str, Any]):
        self.model = model
        self.count = spec["options"].get("tokens", tasks.TOKENS)
        self.prompt = jnp.asarray(tasks.ids(tasks.PROMPT, vocab_size=model.cfg.vocab_size), jnp.int32)

    def prepare(self) -> dict[str, float]:
        def step(model, token, cache):
            out = model(token, cache=cache)
            return jnp.argmax(out["logits"][:, -1], -1)[:, None], out["cache"]

        first = jax.jit(lambda model, tokens: step(model, tokens, None))
        self.first, self.cache = first(self.model, self.prompt)
        self.step = jax.jit(step)
        # The program is thrown away: the loop below calls the jitted function, as a user does.
        _, seconds = compiled(self.step, self.model, self.first, self.cache)
        jax.block_until_ready(self.step(self.model, self.first, self.cache))
        return seconds

    def sample(self) -> dict[str, Any]:
        found = []

        def decode() -> None:
            token, cache = self.first, self.cache
            for _ in range(self.count):
                found.append(token)
                token, cache = self.step(self.model, token, cache)
            jax.block_until_ready(token)

        seconds = measure.timed(decode)
        return {**seconds, "tokens": np.concatenate(found, axis=1)[0].tolist()}


class Train:
    """The library's own loss, and its gradients for every parameter."""

    def __init__(self, model: Any, spec: dict[str, Any]):
        self.graph, self.state = nnx.split(model)
        self.tokens = jnp.asarray(tasks.ids(tasks.length_of(spec["task"]), vocab_size=model.cfg.vocab_size), jnp.int32)

    def prepare(self) -> dict[str, float]:
        def loss(state, tokens):
            return nnx.merge(self.graph, state)(tokens, labels=tokens)["loss"]

        self.program, seconds = compiled(jax.jit(jax.value_and_grad(loss)), self.state, self.tokens)
        return seconds

    def sample(self) -> dict[str, float]:
        found = {}

        def step() -> None:
            found["value"], found["grads"] = jax.block_until_ready(self.program(self.state, self.tokens))

        seconds = measure.timed(step)
        norm = measure.norm(map(np.asarray, jax.tree.leaves(found["grads"])))
        return {**seconds, "loss": float(found["value"]), "grad_norm": norm}


class Logits:
    """All logits of one sequence of tokens, written to a file."""

    def __init__(self, model: Any, spec: dict[str, Any]):
        self.model = model
        self.length = spec["options"]["length"]

    def prepare(self) -> dict[str, float]:
        self.forward = jax.jit(lambda model, tokens: model(tokens)["logits"])
        return {}

    def sample(self, seed: int, path: str) -> dict[str, float]:
        tokens = jnp.asarray(tasks.ids(self.length, seed, self.model.cfg.vocab_size), jnp.int32)
        np.save(path, np.asarray(self.forward(self.model, tokens)[0]))
        return {}
