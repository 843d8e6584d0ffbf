"""The float64 judge (`float64.py`) behind the same interface as the peers."""

import pathlib
from typing import Any

import numpy as np

from mamba2_peers import float64, tasks


def build(spec: dict[str, Any]) -> Any:
    """The logits of one sequence of tokens; there is nothing to load before."""
    return Logits(spec)


class Logits:
    """All logits of one sequence of tokens, written to a file."""

    def __init__(self, spec: dict[str, Any]):
        self.folder = pathlib.Path(spec["checkpoint"])
        self.length, self.vocab_size = spec["options"]["length"], spec["options"]["vocab_size"]

    def prepare(self) -> dict[str, float]:
        return {}

    def sample(self, seed: int, path: str) -> dict[str, Any]:
        np.save(path, float64.logits(self.folder, tasks.ids(self.length, seed, self.vocab_size)[0]))
        return {}
