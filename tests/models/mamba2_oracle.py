"""Mamba-2 in transformers beside ours, on the same random weights: what they are and how far apart.

`python -m tests.models.mamba2_oracle` prints the "tested on" table of models/mamba2/README.md, and with
`--write` puts it there.
"""

import contextlib
import dataclasses
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import jax
import numpy as np
from flax import nnx

from portable import models
from portable.checkpoint import tensors_of
from portable.generation import generate
from portable.models.mamba2 import Mamba2LM, weight_map
from tests.oracles import ROOT, need

README = ROOT / "models" / "mamba2" / "README.md"
BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 8,
    "state_size": 16,
    "n_groups": 1,
    "chunk_size": 16,
    "tie_word_embeddings": True,
    "residual_in_fp32": True,
}
# Options of transformers' Mamba2Config, together every one that changes a result. `ours` is our chunk size.
CASES: dict[str, dict[str, Any]] = {
    "as published": {"ours": None},
    "groups, untied head": {"n_groups": 4, "tie_word_embeddings": False, "ours": 8},
    "biases, none on the convolution": {"use_bias": True, "use_conv_bias": False, "n_groups": 2, "ours": 64},
    "limits on dt": {"time_step_limit": (0.02, 0.3), "tie_word_embeddings": False, "ours": None},
    "other widths": {
        "expand": 3,
        "num_heads": 12,
        "n_groups": 3,
        "conv_kernel": 2,
        "chunk_size": 64,
        "ours": 16,
    },
    "gelu, large epsilon": {
        "hidden_act": "gelu",
        "layer_norm_epsilon": 1e-2,
        "residual_in_fp32": False,
        "ours": None,
    },
    "few wide heads": {
        "num_heads": 2,
        "head_dim": 32,
        "n_groups": 2,
        "state_size": 4,
        "chunk_size": 7,
        "conv_kernel": 5,
        "use_bias": True,
        "hidden_act": "tanh",
        "ours": 5,
    },
}
FORWARD = 1e-5  # relative: max|a - b| / max|b|
GRADIENT = 2.5 * FORWARD
NEW_TOKENS = 64


@dataclasses.dataclass
class Distance:
    """How far our model is from transformers'; the first three relative, the worst of all arrays."""

    logits: float
    hidden_states: float
    gradients: float
    equal_tokens: int
    margin: float
    distinct_tokens: int


def relative(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    return float(np.abs(got - want).max() / np.abs(want).max())


def oracle(options: dict[str, Any], seed: int = 0) -> Any:
    """Returns transformers' model with every parameter moved away from its initial value."""
    torch, transformers = need("torch", "transformers")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    options = {name: value for name, value in options.items() if name != "ours"}
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**BASE | options)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            # Large mixers and heads: tokens vary, and no two logits are near a tie.
            p.add_(torch.randn_like(p) * (0.6 if "out_proj.weight" in name or "lm_head" in name else 0.3))
    return model


def loaded(theirs: Any, chunk_size: int | None = None, **options) -> Mamba2LM:
    """Returns our model, loaded from what transformers saves."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model = models.load(folder, **options)
    if chunk_size is None:
        return model
    chunked = Mamba2LM(dataclasses.replace(model.config, chunk_size=chunk_size), dtype=model.dtype, rngs=nnx.Rngs(0))
    nnx.update(chunked, nnx.state(model))
    return chunked


def by_tensor(model: Mamba2LM) -> dict[str, np.ndarray]:
    """Returns a model's parameters (or gradients in their place) under transformers' names, in its layouts."""
    return {name: source.fetch() for name, source in tensors_of(model, weight_map()).items()}


def tokens(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, BASE["vocab_size"], shape)


def forward_and_gradients(theirs: Any, ours: Mamba2LM) -> tuple[float, float, float]:
    """Returns the distances of logits, hidden states and gradients of all parameters."""
    torch = need("torch")
    given = tokens((2, 45))
    weights = np.random.default_rng(1).standard_normal((*given.shape, BASE["vocab_size"])).astype(np.float32)

    out = theirs(torch.tensor(given), output_hidden_states=True, use_cache=False)
    theirs.zero_grad()
    (out.logits * torch.tensor(weights)).sum().backward()
    gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}

    graphdef, params = nnx.split(ours)

    @jax.jit
    def run(params):
        def loss(params):
            logits, hidden = nnx.merge(graphdef, params)(given, return_hidden=True)
            return (logits * weights).sum(), (logits, hidden)

        return jax.grad(loss, has_aux=True)(params)

    found, (logits, hidden) = run(params)
    found = by_tensor(nnx.merge(graphdef, found))
    assert found.keys() == gradients.keys()
    hidden = hidden[-len(out.hidden_states) :]  # transformers leaves out the embedding
    return (
        relative(logits, out.logits.detach()),
        max(relative(a, b.detach()) for a, b in zip(hidden, out.hidden_states, strict=True)),
        max(relative(found[name], gradient) for name, gradient in gradients.items()),
    )


@contextlib.contextmanager
def _one_thread(torch: Any) -> Iterator[None]:
    """Threads that wait for each other cost more than these small products."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def greedy(theirs: Any, prompts: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns greedy tokens by repeated full forwards and the smallest lead of a token over the next best.

    transformers' cached decoding is no oracle: it forgets the limits on dt.
    """
    torch = need("torch")
    given, margin = torch.tensor(prompts), float("inf")
    with torch.no_grad(), _one_thread(torch):
        for _ in range(NEW_TOKENS):
            best = theirs(given, use_cache=False, logits_to_keep=1).logits[:, -1].topk(2)
            margin = min(margin, float((best.values[:, 0] - best.values[:, 1]).min()))
            given = torch.cat([given, best.indices[:, :1]], 1)
    return given[:, prompts.shape[1] :].numpy(), margin


def measure(name: str) -> Distance:
    """Compares one case in everything."""
    theirs = oracle(CASES[name])
    ours = loaded(theirs, CASES[name]["ours"])
    logits, hidden, gradients = forward_and_gradients(theirs, ours)
    prompts = tokens((2, 7), seed=2)
    want, margin = greedy(theirs, prompts)
    got = np.asarray(generate(ours, prompts, max_new_tokens=NEW_TOKENS).tokens)
    equal = int((got == want).all(0).cumprod().sum())
    return Distance(logits, hidden, gradients, equal, margin, len(np.unique(want)))


def table() -> str:
    """Returns the table of all cases in Markdown, with the versions it was made with."""
    need("torch", "transformers")
    rows = [
        "| case | options | logits | hidden states | gradients | greedy tokens |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, options in CASES.items():
        d = measure(name)
        changed = ", ".join(f"{key}={value}" for key, value in options.items() if key != "ours") or "tied head"
        errors = " | ".join(f"{error:.1e}" for error in (d.logits, d.hidden_states, d.gradients))
        rows.append(f"| {name} | {changed} | {errors} | {d.equal_tokens} of {NEW_TOKENS} |")
    versions = ", ".join(
        f"{package} {metadata.version(package)}" for package in ("transformers", "torch", "jax", "flax")
    )
    return "\n".join([*rows, "", f"{versions}, {platform.machine()} {jax.default_backend()}."])


def main(arguments: list[str]) -> None:
    if arguments == ["--write"]:
        block = r"(<!-- output of: [^>]*mamba2_oracle -->\n).*(<!-- end of output -->)"
        text = table()
        README.write_text(re.sub(block, lambda m: f"{m[1]}{text}\n{m[2]}", README.read_text(), flags=re.S))
    else:
        print(table())


if __name__ == "__main__":
    main(sys.argv[1:])
