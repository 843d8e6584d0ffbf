"""Checks of what `generate` is given, and prompts of unequal length in one right-padded array."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from portable.generation.sampling import Options

# End tokens travel in an array of this many, so that their number does not recompile the loop.
_EOS_SLOTS = 8


def pack(prompts: Any, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Puts prompts side by side, right padded to a length bucket.

    Args:
      prompts: integer array [b, t], or a list of b lists or 1-D integer arrays of any lengths.
      vocab_size: ids must be in [0, vocab_size).

    Returns:
      tokens [b, bucket(longest)] int32 padded with 0, lengths [b] int32.

    Raises:
      TypeError: text, floats, booleans, object arrays, a single unnested prompt.
      ValueError: no prompt, an empty prompt, a token id out of range.
    """
    rows = _rows(prompts)
    if not rows:
        raise ValueError("generate: there must be at least one prompt; got none; pass [b, t] or a list of lists.")
    for i, row in enumerate(rows):
        if row.size == 0:
            raise ValueError(
                f"generate: a prompt must have at least one token; got an empty row {i}; "
                "begin it with the model's begin-of-text token, or drop it."
            )
        outside = (row < 0) | (row >= vocab_size)
        if outside.any():
            at = int(outside.argmax())
            raise ValueError(
                f"generate: token ids must be in [0, {vocab_size}); got {row[at]} in row {i}, place {at}; "
                "use the tokenizer that belongs to this model."
            )
    lengths = np.array([row.size for row in rows], np.int32)
    tokens = np.zeros((len(rows), bucket(int(lengths.max()))), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : row.size] = row
    return tokens, lengths


def bucket(length: int) -> int:
    """Rounds a prompt length up to a multiple of 32 or, above 256, to one of four steps an octave.

    Prefill compiles once for each bucket; at most a fifth of the longest row is padding above 128 tokens.
    """
    step = max(32, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


def options(temperature: Any, top_k: Any, top_p: Any, min_p: Any, repetition_penalty: Any) -> Options:
    """Checks the ways to sample and gives them as scalars of fixed type, so that no value recompiles.

    Raises:
      TypeError: not a number.
      ValueError: outside the range the sentence names.
    """
    t = _real("temperature", temperature)
    if not 0 <= t < math.inf:
        raise ValueError(f"generate: temperature must be 0 (greedy) or positive and finite; got {t}.")
    if top_k is not None:
        top_k = _whole("top_k", top_k)
        if top_k < 1:
            raise ValueError(f"generate: top_k must be at least 1; got {top_k}; pass None to keep every token.")
    if top_p is not None:
        top_p = _real("top_p", top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"generate: top_p must be in (0, 1]; got {top_p}; pass None to keep every token.")
    if min_p is not None:
        min_p = _real("min_p", min_p)
        if not 0 <= min_p <= 1:
            raise ValueError(f"generate: min_p must be in [0, 1]; got {min_p}; pass None to keep every token.")
    if repetition_penalty is not None:
        repetition_penalty = _real("repetition_penalty", repetition_penalty)
        if not 0 < repetition_penalty < math.inf:
            raise ValueError(
                f"generate: repetition_penalty must be positive and finite; got {repetition_penalty}; "
                "1 changes nothing."
            )
    penalty = None if repetition_penalty is None else np.float32(repetition_penalty)
    if t == 0:  # filters cannot change the most likely token: greedy decoding keeps to one program
        return Options(np.float32(0), repetition_penalty=penalty)
    return Options(
        np.float32(max(t, 1e-30)),  # where float32 ends; greedy by then
        None if top_k is None else np.int32(min(top_k, np.iinfo(np.int32).max)),
        None if top_p is None else np.float32(top_p),
        None if min_p is None else np.float32(min_p),
        penalty,
    )


def count(max_new_tokens: Any) -> int:
    """Checks `max_new_tokens`."""
    n = _whole("max_new_tokens", max_new_tokens)
    if n < 1:
        raise ValueError(f"generate: max_new_tokens must be at least 1; got {n}.")
    if n >= 2**31:
        raise ValueError(f"generate: max_new_tokens must be below 2**31; got {n}.")
    return n


def pad_token(pad_id: Any) -> np.int32:
    """Checks `pad_id`, which only marks places in the result: any int32 will do, -1 too."""
    value = _whole("pad_id", pad_id)
    if not -(2**31) <= value < 2**31:
        raise ValueError(f"generate: pad_id must fit into int32; got {value}.")
    return np.int32(value)


def end_tokens(eos_id: Any, vocab_size: int) -> np.ndarray:
    """Checks `eos_id` (None, an id or several) and gives [8 m] int32, -1 in the places left over."""
    if isinstance(eos_id, np.ndarray | jax.Array):
        eos_id = np.asarray(eos_id).tolist()
    several = isinstance(eos_id, list | tuple | set | frozenset | range)
    ids = [_whole("eos_id", i) for i in (eos_id if several else [] if eos_id is None else [eos_id])]
    for i in ids:
        if not 0 <= i < vocab_size:
            raise ValueError(f"generate: eos_id must be in [0, {vocab_size}); got {i}; pass None never to stop early.")
    slots = max(1, -(-len(ids) // _EOS_SLOTS)) * _EOS_SLOTS
    return np.array(ids + [-1] * (slots - len(ids)), np.int32)


def random_key(key: Any, rows: int) -> jax.Array:
    """Checks `key`; returns typed keys of shape [] or [rows]."""
    if key is None:
        raise ValueError(
            "generate: sampling (temperature > 0) needs a random key; got key=None; "
            "pass key=jax.random.key(seed), or temperature=0 for the most likely tokens."
        )
    if not isinstance(key, np.ndarray | jax.Array):
        raise TypeError(f"generate: key must be a jax random key; got {type(key).__name__}; pass jax.random.key(seed).")
    if not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):  # pyright: ignore[reportPrivateImportUsage]
        if key.dtype != np.uint32 or key.ndim == 0 or key.shape[-1] != jax.random.key_data(jax.random.key(0)).size:
            raise TypeError(
                f"generate: key must be a jax random key; got {key.dtype} {list(key.shape)}; pass jax.random.key(seed)."
            )
        key = jax.random.wrap_key_data(jnp.asarray(key))
    if key.shape not in ((), (rows,)):
        raise ValueError(
            f"generate: key must be one key, or one for each of the {rows} prompts; "
            f"got keys of shape {list(key.shape)}."
        )
    return key  # pyright: ignore[reportReturnType]


def _rows(prompts: Any) -> list[np.ndarray]:
    if isinstance(prompts, str | bytes) or (
        isinstance(prompts, Sequence) and any(isinstance(p, str | bytes) for p in prompts)
    ):
        raise TypeError("generate: prompts must be token ids; got text; encode it with the model's tokenizer first.")
    if isinstance(prompts, np.ndarray | jax.Array):
        array = _integers(prompts, "prompts")
        if array.ndim != 2:
            hint = "write prompts[None] for a single prompt" if array.ndim == 1 else "flatten the leading axes"
            raise TypeError(f"generate: prompts must be [b, t]; got shape {list(array.shape)}; {hint}.")
        return list(array)
    if not isinstance(prompts, Sequence):
        raise TypeError(
            "generate: prompts must be an integer array [b, t] or a list of lists of token ids; "
            f"got {type(prompts).__name__}."
        )
    rows = []
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, Sequence | np.ndarray | jax.Array) or np.ndim(prompt) == 0:
            raise TypeError(
                "generate: each prompt must be a list or 1-D array of token ids; "
                f"got {type(prompt).__name__} as prompt {i}; write [prompt] for a single prompt."
            )
        if isinstance(prompt, Sequence) and not all(isinstance(x, int | np.integer) for x in prompt):
            odd = next(type(x).__name__ for x in prompt if not isinstance(x, int | np.integer))
            raise TypeError(f"generate: token ids must be integers; got {odd} in prompt {i}.")
        row = _integers(prompt, f"prompt {i}") if len(prompt) else np.zeros(0, np.int64)
        if row.ndim != 1:
            raise TypeError(f"generate: each prompt of a list must be 1-D; got shape {list(row.shape)} as prompt {i}.")
        rows.append(row)
    return rows


def _integers(values: Any, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype == object:
        raise TypeError(
            f"generate: token ids must be integers; got a numpy object array as {name}; "
            "pass a list of lists for prompts of unequal length."
        )
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"generate: token ids must be integers; got {array.dtype} as {name}.")
    return array


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"generate: {name} must be an integer; got {value!r}.")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"generate: {name} must be an integer; got {value!r}.") from None


def _real(name: str, value: Any) -> float:
    if isinstance(value, str | bytes | bool | np.bool_):
        raise TypeError(f"generate: {name} must be a number; got {value!r}.")
    try:
        return float(value)
    except TypeError:
        raise TypeError(f"generate: {name} must be a number; got {value!r}.") from None
