"""transformers on torch, eager, as `from_pretrained` gives it (on a processor it has no other path)."""

from typing import Any

import numpy as np
import torch
from harness import measure
from transformers import Mamba2ForCausalLM

from mamba2_peers import tasks


def build(spec: dict[str, Any]) -> Any:
    """The task of `spec`, weights loaded; `options.chunk_size` overrides the checkpoint's chunk size."""
    torch.set_num_threads(spec["threads"])
    model = Mamba2ForCausalLM.from_pretrained(spec["checkpoint"], dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # from_pretrained maps the file: copied, so that the idle process holds the weights like the
            # others do.
            parameter.data = parameter.data.clone()
    chunk_size = spec["options"].get("chunk_size")
    if chunk_size:
        for block in model.backbone.layers:
            block.mixer.chunk_size = chunk_size
    kind = spec["task"].rstrip("0123456789")
    return {"prefill": Prefill, "decode": Decode, "train": Train, "logits": Logits, "greedy": Greedy}[kind](model, spec)


def tokens_of(model: Any, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids [1, length], those every peer gets."""
    return torch.tensor(tasks.ids(length, seed, model.config.vocab_size))


class Prefill:
    """Logits of the last token and the cache."""

    def __init__(self, model: Any, spec: dict[str, Any]):
        self.model = model
        self.tokens = tokens_of(model, tasks.length_of(spec["task"]))

    def prepare(self) -> dict[str, float]:
        return {}

    def sample(self) -> dict[str, float]:
        with torch.inference_mode():
            return measure.timed(lambda: self.model(self.tokens, use_cache=True, logits_to_keep=1))


class Decode:
    """Greedy tokens after the prompt through the cached step, without the overhead of `generate`."""

    def __init__(self, model: Any, spec: dict[str, Any]):
        self.model = model
        self.count = spec["options"].get("tokens", tasks.TOKENS)
        self.prompt = tokens_of(model, tasks.PROMPT)

    def prepare(self) -> dict[str, float]:
        return {}

    def sample(self) -> dict[str, Any]:
        found = []
        with torch.inference_mode():
            out = self.model(self.prompt, use_cache=True, logits_to_keep=1)
            cache, token = out.cache_params, out.logits[:, -1].argmax(-1, keepdim=True)

            def decode() -> None:
                following = token
                for _ in range(self.count):
                    found.append(following)
                    logits = self.model(following, cache_params=cache, use_cache=True).logits
                    following = logits[:, -1].argmax(-1, keepdim=True)

            seconds = measure.timed(decode)
        return {**seconds, "tokens": torch.cat(found, 1)[0].tolist()}


class Train:
    """The library's own loss, and its gradients for every parameter."""

    def __init__(self, model: Any, spec: dict[str, Any]):
        self.model = model.train()
        self.tokens = tokens_of(model, tasks.length_of(spec["task"]))

    def prepare(self) -> dict[str, float]:
        return {}

    def sample(self) -> dict[str, float]:
        found = {}

        def step() -> None:
            self.model.zero_grad(set_to_none=True)
            found["loss"] = self.model(self.tokens, labels=self.tokens, use_cache=False).loss
            found["loss"].backward()

        seconds = measure.timed(step)
        norm = measure.norm(p.grad.numpy() for p in self.model.parameters() if p.grad is not None)
        self.model.zero_grad(set_to_none=True)
        return {**seconds, "loss": float(found["loss"]), "grad_norm": norm}


class Logits:
    """All logits of one sequence of tokens, written to a file."""

    def __init__(self, model: Any, spec: dict[str, Any]):
        self.model = model
        self.length = spec["options"]["length"]

    def prepare(self) -> dict[str, float]:
        return {}

    def sample(self, seed: int, path: str) -> dict[str, float]:
        with torch.inference_mode():
            np.save(path, self.model(tokens_of(self.model, self.length, seed)).logits[0].numpy())
        return {}


class Greedy:
    """Greedy tokens by a full forward each (its cached decode forgets the limits of dt); their margins."""

    def __init__(self, model: Any, spec: dict[str, Any]):
        self.model = model
        self.count = spec["options"].get("tokens", tasks.TOKENS)

    def prepare(self) -> dict[str, float]:
        return {}

    def sample(self, seed: int) -> dict[str, Any]:
        tokens, margins = tokens_of(self.model, tasks.PROMPT, seed), []
        with torch.inference_mode():
            for _ in range(self.count):
                best = self.model(tokens, use_cache=False, logits_to_keep=1).logits[0, -1].topk(2)
                margins.append(float(best.values[0] - best.values[1]))
                tokens = torch.cat([tokens, best.indices[None, :1]], 1)
        return {"tokens": tokens[0, tasks.PROMPT :].tolist(), "smallest_margin": min(margins)}
