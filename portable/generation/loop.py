"""`generate`: checks its arguments, runs the compiled programs and hands out what they wrote."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from portable.checks import PortableError
from portable.generation import prompts as given
from portable.generation.programs import CAPACITY, Rules, Span, Written, draw, first, prepared

# Streamed blocks grow until one takes about this long: often enough to watch, seldom enough to cost nothing.
_SECONDS_PER_BLOCK = 0.15
_FIRST_STREAMED_BLOCK = 4
_LARGEST_STREAMED_BLOCK = 64


class Generation(NamedTuple):
    """What `generate` returns, on the host.

    Attributes:
      tokens: [b, max_new_tokens] int32, without the prompt; pad_id after a row's end token.
      lengths: [b] int32, tokens of each row up to and with its end token, else max_new_tokens.
    """

    tokens: np.ndarray
    lengths: np.ndarray


def generate(
    model: Any,
    prompts: Any,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    eos_id: Any = None,
    pad_id: int = 0,
    key: jax.Array | None = None,
    stream: Callable[[np.ndarray, int], Any] | None = None,
) -> Generation:
    """Continues prompts token by token, on the device from the first token to the last.

    Programs are compiled once for each model, batch size and (for the prompt, and for a model with a cache of
    positions) length bucket. No value of an option compiles anything anew; turning `top_k`, `top_p`, `min_p` or
    `repetition_penalty` on does, once.
    The weights are read from the model at each call, so training or replacing them between calls is honoured.

    Each row comes out as it would alone, whatever the other rows and their lengths (up to the rounding of
    matrix products of another batch size). Row i draws from `jax.random.fold_in(key, i)`, its n-th new token
    from that key folded with n.

    Args:
      model: an `nnx.Module` with `config.vocab_size`, `init_state`, `prefill` and `step` (see `Decoder`).
      prompts: token ids, an integer array [b, t] or a list of b lists or 1-D arrays of any lengths >= 1.
      max_new_tokens: how many tokens to make at most, >= 1.
      temperature: 0 takes the most likely token (the first of equals) and ignores top_k, top_p and min_p;
        above 0 samples from softmax(logits / temperature).
      top_k: keep the k most likely tokens, and those equal to the k-th.
      top_p: keep the smallest set of most likely tokens whose probabilities reach top_p, in (0, 1].
      min_p: keep tokens at least min_p times as likely as the most likely one, in [0, 1].
      repetition_penalty: divide positive and multiply negative logits of tokens in the prompt or already
        made, > 0. The order is transformers': repetition_penalty, temperature, top_k, top_p, min_p.
      eos_id: an id or several; a row ends with the first of them. None never ends early.
      pad_id: fills `tokens` after a row's end; any int32, the model never sees it.
      key: `jax.random.key(seed)`, or a key for each row; needed only if temperature > 0.
      stream: called as stream(block, start) with tokens start, start + 1, ... of all rows as an int32 array
        [b, m], as soon as they are there, in order, until all rows have ended. An exception in it ends the
        generation.

    Returns:
      Generation(tokens [b, max_new_tokens] int32, lengths [b] int32), numpy arrays. A length counts the end
      token.

    Raises:
      TypeError, ValueError: an argument is not as above; the sentence names it.
      PortableError: the model's logits became NaN or infinite.
    """
    if not isinstance(model, nnx.Module) or not all(hasattr(model, a) for a in ("init_state", "prefill", "step")):
        raise TypeError(
            "generate: the model must be an nnx.Module with init_state, prefill and step; "
            f"got {type(model).__name__}; portable.models.load gives such a model."
        )
    vocab_size = model.config.vocab_size  # pyright: ignore[reportAttributeAccessIssue]
    n = given.count(max_new_tokens)
    options = given.options(temperature, top_k, top_p, min_p, repetition_penalty)
    rules = Rules(options, given.end_tokens(eos_id, vocab_size), given.pad_token(pad_id))
    tokens, lengths = given.pack(prompts, vocab_size)
    keys = given.random_key(key, len(tokens)) if options.temperature > 0 else None  # pyright: ignore[reportOperatorIssue]

    result = np.full((len(tokens), n), rules.pad, np.int32)
    for written in _run(model, tokens, lengths, rules, keys, n, streaming=stream is not None):
        block = np.ascontiguousarray(written.block[: written.stop - written.start].T)
        result[:, written.start : written.stop] = block
        broken = np.flatnonzero(written.rows.broken_at >= 0)
        if broken.size:
            raise PortableError(
                f"generate: logits must be finite; got NaN or infinity for new token "
                f"{written.rows.broken_at[broken[0]]} of row {broken[0]}; "
                "look for NaN in the weights (portable.models.load names them)."
            )
        if stream is not None and block.size:
            stream(block, int(written.start))
    return Generation(result, np.array(written.rows.lengths))


def _run(
    model: Any,
    tokens: np.ndarray,
    lengths: np.ndarray,
    rules: Rules,
    keys: jax.Array | None,
    n: int,
    *,
    streaming: bool,
) -> Iterator[Written]:
    """Runs the programs and yields what they wrote, until n tokens are there or all rows have ended.

    The next block is handed to the device before the host reads the last one, so the device never waits;
    where all rows have ended it runs no step. Unless someone watches, the first token is read together with
    the first block.
    """
    programs, leaves = prepared(model)
    b = len(tokens)
    nothing = np.zeros((CAPACITY, b, 2), np.float32)

    def uniform(begin: int) -> Any:
        return nothing if keys is None else draw(keys, np.int32(begin), b)

    # A cache is as long as prompt and answer, in the buckets of prompts: of each the programs are compiled once.
    room = given.bucket(int(lengths.max()) + n - 1) if getattr(model, "needs_length", False) else 0
    logits, state = programs.prefill(leaves, tokens, lengths, room)
    prompt = None if rules.options.repetition_penalty is None else (tokens, lengths)
    written, seen = first(logits, uniform(0), prompt, rules)
    bound, size = 1, _FIRST_STREAMED_BLOCK
    before = None
    while bound < n:
        together = bound == 1 and not streaming
        start = 0 if together else bound
        end = min(n, bound + size if streaming else start + CAPACITY)
        span = Span(np.int32(start), np.int32(bound), np.int32(end))
        coming, (state, seen) = programs.decode(
            leaves, (state, seen), written.rows, written.block, uniform(bound), rules, span
        )
        if not together:
            ready = jax.device_get(written)
            yield ready
            if ready.rows.done.all():
                return
            now = time.perf_counter()
            if before is not None:  # the first interval holds the compilation
                size = _next_size(int(ready.stop - ready.start), now - before)
            before = now
        written, bound = coming, end
    yield jax.device_get(written)


def _next_size(tokens: int, seconds: float) -> int:
    """Size of the next streamed block, after one of `tokens` tokens took `seconds`."""
    return max(1, min(_LARGEST_STREAMED_BLOCK, int(_SECONDS_PER_BLOCK * tokens / max(seconds, 1e-9))))
