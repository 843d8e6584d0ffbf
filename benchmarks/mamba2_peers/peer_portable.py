"""portable itself, and the loops that only it runs: beside bare matrix products, and after a long context."""

import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from harness import measure

import portable
from mamba2_peers import matvec, tasks
from portable import models, nn
from portable.commands._benchmark.models import GreedyLoop, loss, read
from portable.generation import generate


def build(spec: dict[str, Any]) -> Any:
    """The task of `spec`, weights loaded and touched (a file may be mapped instead of read)."""
    options = spec["options"]
    wide = jnp.float64 if options.get("float64") else jnp.float32
    model = models.load(pathlib.Path(spec["checkpoint"]), wide, compute_dtype=wide)
    kind = spec["task"].rstrip("0123456789")
    if kind == "train":
        model.remat = options["remat"]
        if options["stacked"]:
            model = nn.stack(model)
    for leaf in jax.tree.leaves(nnx.state(model)):
        np.asarray(leaf).sum()
    kinds = {
        "prefill": Prefill,
        "decode": Decode,
        "step": Step,
        "roofline": Roofline,
        "context": Context,
        "train": Train,
        "logits": Logits,
        "greedy": Greedy,
    }
    return kinds[kind](model, spec)


def tokens_of(model: Any, length: int, seed: int = 0) -> jax.Array:
    """Token ids [1, length], those every peer gets."""
    return jnp.asarray(tasks.ids(length, seed, model.config.vocab_size), jnp.int32)


class Prefill:
    """Logits of the last token and the state."""

    def __init__(self, model: Any, spec: dict[str, Any]):
        self.graph, self.weights = nnx.split(model)
        self.tokens = tokens_of(model, tasks.length_of(spec["task"]))

    def prepare(self) -> dict[str, float]:
        def prefill(weights, tokens):
            return read(nnx.merge(self.graph, weights), tokens)

        begin = time.perf_counter()
        lowered = jax.jit(prefill).lower(self.weights, self.tokens)
        middle = time.perf_counter()
        self.program = lowered.compile()
        return {"trace_s": middle - begin, "compile_s": time.perf_counter() - middle}

    def sample(self) -> dict[str, float]:
        return measure.timed(lambda: jax.block_until_ready(self.program(self.weights, self.tokens)))


class Decode:
    """Greedy tokens after the prompt: `portable.generate` on a model that has read it."""

    def __init__(self, model: Any, spec: dict[str, Any]):
        self.model = model
        self.count = spec["options"].get("tokens", tasks.TOKENS)

    def prepare(self) -> dict[str, float]:
        graph, weights = nnx.split(self.model)
        prompt = tokens_of(self.model, tasks.PROMPT)
        prefill = jax.jit(lambda weights, tokens: read(nnx.merge(graph, weights), tokens))
        logits, state = jax.block_until_ready(prefill(weights, prompt))
        self.loop = GreedyLoop(self.model, logits, state, self.count)
        return {"compile_s": self.loop.compile_seconds}

    def sample(self) -> dict[str, Any]:
        found = {}
        seconds = measure.timed(lambda: found.update(tokens=self.loop.run()))
        return {**seconds, "tokens": found["tokens"][0, :-1].tolist()}


class Step:
    """One decode step and the choice of its token, to be compiled only."""

    def __init__(self, model: Any, spec: dict[str, Any]):
        self.graph, self.weights = nnx.split(model)

    def prepare(self) -> dict[str, float]:
        def step(weights, token, state):
            logits, state = nnx.merge(self.graph, weights).step(token, state)
            return jnp.argmax(logits, axis=-1), state

        state = nnx.merge(self.graph, self.weights).init_state(1)
        begin = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=2).lower(self.weights, jnp.zeros(1, jnp.int32), state)
        middle = time.perf_counter()
        lowered.compile()
        return {"trace_s": middle - begin, "compile_s": time.perf_counter() - middle}

    def sample(self) -> dict[str, float]:
        return {}


class Roofline(Decode):
    """The decode loop, and in turn with it a loop of only its matrix-vector products on the same weights."""

    def __init__(self, model: Any, spec: dict[str, Any]):
        super().__init__(model, spec)
        self.weights = matrices(model)
        self.turn = 0

    def prepare(self) -> dict[str, float]:
        self.products = matvec.compiled(self.weights, self.count)
        self.first = jax.block_until_ready(jnp.zeros([1], jnp.int32))
        jax.block_until_ready(self.products(self.weights, self.first))
        return {**super().prepare(), "bytes_per_token": matvec.bytes_per_token(self.weights)}

    def sample(self) -> dict[str, Any]:
        def decode() -> dict[str, Any]:
            return super(Roofline, self).sample()

        def products() -> dict[str, float]:
            seconds = measure.timed(lambda: jax.block_until_ready(self.products(self.weights, self.first)))
            return {f"products_{name}": value for name, value in seconds.items()}

        # Whoever runs second finds the other's data in the cache, so the order changes from sample to sample.
        self.turn += 1
        pair = (decode, products) if self.turn % 2 else (products, decode)
        return {**pair[0](), **pair[1]()}


def matrices(model: Any) -> matvec.Weights:
    """The model's own arrays, not copies, of every matrix that a decode step multiplies with."""
    layers = []
    for block in model.layers:
        mixer = block.mixer
        inputs = [getattr(mixer, name).kernel[...] for name in ("in_z", "in_x", "in_B", "in_C", "in_dt")]
        layers.append((inputs, mixer.out.kernel[...]))
    head = None if model.head is None else model.head.kernel[...]
    return matvec.Weights(layers, model.embed.embedding[...], head)


class Context:
    """Decode after a short and a long context, in turn; the long one is read in pieces, the state carried."""

    def __init__(self, model: Any, spec: dict[str, Any]):
        self.model = model
        self.count = spec["options"].get("tokens", tasks.TOKENS)
        self.lengths = spec["options"]["contexts"]
        self.piece = spec["options"]["piece"]
        self.turn = 0

    def prepare(self) -> dict[str, Any]:
        graph, weights = nnx.split(self.model)

        @jax.jit
        def go_on(weights, tokens, state):
            return nnx.merge(graph, weights).prefill(tokens, jnp.full(1, self.piece), state)

        tokens = tokens_of(self.model, max(self.lengths))
        state = self.model.init_state(1)
        self.loops = {}
        for end in range(self.piece, max(self.lengths) + 1, self.piece):
            logits, state = go_on(weights, tokens[:, end - self.piece : end], state)
            if end in self.lengths:
                self.loops[end] = GreedyLoop(self.model, logits, state, self.count)
        held = sum(x.nbytes for x in jax.tree.leaves(state))
        return {"state_bytes": held}

    def sample(self) -> dict[str, float]:
        self.turn += 1
        lengths = self.lengths if self.turn % 2 else self.lengths[::-1]
        found = {}
        for length in lengths:
            for name, value in measure.timed(self.loops[length].run).items():
                found[f"{name}_{length}"] = value
        return found


class Train:
    """Mean cross-entropy of the next token, and its gradients for every parameter."""

    def __init__(self, model: Any, spec: dict[str, Any]):
        self.graph, self.weights, self.rest = nnx.split(model, nnx.Param, ...)
        self.tokens = tokens_of(model, tasks.length_of(spec["task"]))

    def prepare(self) -> dict[str, float]:
        def value(weights, tokens):
            return loss(nnx.merge(self.graph, weights, self.rest), tokens)

        begin = time.perf_counter()
        lowered = jax.jit(jax.value_and_grad(value)).lower(self.weights, self.tokens)
        middle = time.perf_counter()
        self.program = lowered.compile()
        temporary = self.program.memory_analysis().temp_size_in_bytes / 2**20
        return {
            "trace_s": middle - begin,
            "compile_s": time.perf_counter() - middle,
            "temporary_mb": temporary,
        }

    def sample(self) -> dict[str, float]:
        found = {}

        def step() -> None:
            found["value"], found["grads"] = jax.block_until_ready(self.program(self.weights, self.tokens))

        seconds = measure.timed(step)
        norm = measure.norm(map(np.asarray, jax.tree.leaves(found["grads"])))
        return {**seconds, "loss": float(found["value"]), "grad_norm": norm}


class Logits:
    """All logits of one sequence, written to a file; `options.implementation` names what the ops run."""

    def __init__(self, model: Any, spec: dict[str, Any]):
        self.model = model
        self.length = spec["options"]["length"]
        self.implementation = spec["options"].get("implementation")

    def prepare(self) -> dict[str, float]:
        graph, self.weights = nnx.split(self.model)
        self.forward = jax.jit(lambda weights, tokens: nnx.merge(graph, weights)(tokens))
        return {}

    def sample(self, seed: int, path: str) -> dict[str, Any]:
        with portable.using(self.implementation):
            logits = np.asarray(self.forward(self.weights, tokens_of(self.model, self.length, seed))[0])
        np.save(path, logits)
        return {"dtype": logits.dtype.name}


class Greedy:
    """Greedy tokens as a user gets them."""

    def __init__(self, model: Any, spec: dict[str, Any]):
        self.model = model
        self.count = spec["options"].get("tokens", tasks.TOKENS)

    def prepare(self) -> dict[str, float]:
        return {}

    def sample(self, seed: int) -> dict[str, Any]:
        prompt = tasks.ids(tasks.PROMPT, seed, self.model.config.vocab_size)
        return {"tokens": generate(self.model, prompt, max_new_tokens=self.count).tokens[0].tolist()}
