"""What every peer is asked to do, and the inputs it gets: the same numbers for all of them."""

import numpy as np

PROMPT = 32  # tokens before the measured decoding
TOKENS = 64  # tokens decoded in one sample
ORIGINAL_VOCABULARY = 50277  # ids above are padding rows of the published checkpoints


def ids(length: int, seed: int = 0, vocab_size: int = ORIGINAL_VOCABULARY) -> np.ndarray:
    """Token ids [1, length] int64, the same for every peer."""
    return np.random.default_rng(seed).integers(0, min(vocab_size, ORIGINAL_VOCABULARY), (1, length))


def length_of(task: str) -> int:
    """512 for `prefill512` and `train512`."""
    return int(task.lstrip("abcdefghijklmnopqrstuvwxyz"))
