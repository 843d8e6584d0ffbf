"""The compiled programs of a model: prefill, and the loop that steps and chooses on the device.

Three programs serve a call: `prefill` (compiled for each batch size and prompt bucket), `first` (chooses the
first token) and `decode` (a while loop of step and choice, compiled for each batch size); a fourth, `draw`,
makes random numbers where some are needed. Everything a caller may vary from call to call (number of tokens,
temperature, filters' values, end tokens, key) is an argument.

`decode` runs until every row has ended or a bound is reached that is an argument too, and returns what it
wrote. Streaming calls it with near bounds, everything else with far ones: the same program, hence the same
tokens.
"""

import functools
import weakref
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from portable.generation.sampling import Options, choose, penalized
from portable.nn import Stack, fresh_state, unstack

# Tokens that one call of the compiled loop can write, whatever max_new_tokens is.
CAPACITY = 1024


class Decoder(Protocol):
    """What `generate` needs of a model besides being an `nnx.Module`; a state is any pytree of arrays.

    `config.vocab_size` bounds the token ids of prompts and of what is chosen. Rows must not influence each other.
    A model with a cache of positions has `needs_length = True` and `init_state(batch_size, length)`: see
    `portable.nn.fresh_state`.
    """

    config: Any

    def init_state(self, batch_size: int) -> Any:
        """State before any token."""
        ...

    def prefill(self, tokens: jax.Array, lengths: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Right-padded rows [b, t] of these lengths [b] -> (logits after each row's last token, state)."""
        ...

    def step(self, token: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """One token a row [b] -> (logits [b, v] float32, state of the same shapes and dtypes)."""
        ...


class Rows(NamedTuple):
    """What the loop keeps for each row besides the model's state."""

    token: jax.Array  # [b] the last one chosen
    done: jax.Array  # [b] bool
    lengths: jax.Array  # [b]
    broken_at: jax.Array  # [b] index of the first token whose logits were not finite, or -1


class Rules(NamedTuple):
    """What a call fixes for all its tokens; traced."""

    options: Options
    eos: jax.typing.ArrayLike  # [m], -1 where unused
    pad: jax.typing.ArrayLike


class Span(NamedTuple):
    """Which tokens a call of the loop makes; traced."""

    start: jax.typing.ArrayLike  # the token that the first row of the block holds, made before or now
    begin: jax.typing.ArrayLike  # the first to make
    end: jax.typing.ArrayLike


class Written(NamedTuple):
    """Where the tokens lie after a program has run: what the host reads."""

    block: jax.Array  # [capacity, b]; rows from `stop - start` on hold nothing
    start: jax.Array
    stop: jax.Array
    rows: Rows


@functools.partial(jax.jit, static_argnames="b")
def draw(keys: jax.Array, begin: jax.typing.ArrayLike, b: int) -> jax.Array:
    """Random numbers for the tokens from `begin` on, of b rows that each have a key of their own.

    Apart from the loop, so that who never samples does not compile a generator, and who does, compiles it
    once for all models.

    Args:
      keys: [b], or [] to be folded with the row's index.
      begin: index of the first token.
      b: number of rows.

    Returns:
      [CAPACITY, b, 2] float32 uniform in [0, 1): the key of the row folded with the index of the token.
    """
    rows = keys if keys.ndim else jax.vmap(jax.random.fold_in, (None, 0))(keys, jnp.arange(b))

    def one(i: jax.Array, key: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(key, i), (2,))

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(begin + jnp.arange(CAPACITY), rows)  # pyright: ignore[reportArgumentType]


@jax.jit
def first(
    logits: jax.Array, uniform: jax.Array, prompt: tuple[jax.Array, jax.Array] | None, rules: Rules
) -> tuple[Written, jax.Array | None]:
    """Chooses each row's first token from the prompt's logits [b, v]."""
    b, v = logits.shape
    seen = None
    if prompt is not None:
        tokens, lengths = prompt
        # Padding is sent out of range, where the scatter drops it.
        real = jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], tokens, v)
        seen = jnp.zeros((b, v), bool).at[jnp.arange(b)[:, None], real].set(True, mode="drop")
    zeros = jnp.zeros(b, jnp.int32)
    rows = Rows(zeros, jnp.zeros(b, bool), zeros, zeros - 1)
    out, rows, seen = _emit(logits, 0, uniform[0], rows, seen, rules)
    block = jnp.zeros((CAPACITY, b), jnp.int32).at[0].set(out)
    return Written(block, jnp.int32(0), jnp.int32(1), rows), seen


def _emit(
    logits: jax.Array,
    i: jax.typing.ArrayLike,
    uniform: jax.Array,
    rows: Rows,
    seen: jax.Array | None,
    rules: Rules,
) -> tuple[jax.Array, Rows, jax.Array | None]:
    """Chooses the i-th new token of rows that have not ended: what to write [b], and what to keep."""
    logits = logits.astype(jnp.float32)
    if seen is not None:
        logits = penalized(logits, seen, rules.options.repetition_penalty)  # pyright: ignore[reportArgumentType]
    top = jnp.max(logits, axis=-1, keepdims=True)  # NaN if any is
    finite = jnp.isfinite(top[:, 0])
    chosen = choose(logits, top, rules.options, uniform)
    live = ~rows.done
    token = jnp.where(live, chosen, rows.token)
    if seen is not None:
        seen = seen.at[jnp.arange(token.size), token].set(True)
    kept = Rows(
        token=token,
        done=rows.done | ~finite | jnp.any(token[:, None] == rules.eos, axis=-1),
        lengths=rows.lengths + live,
        broken_at=jnp.where(live & ~finite, i, rows.broken_at),
    )
    return jnp.where(live, chosen, rules.pad), kept, seen


class Programs:
    """The compiled programs of one model, whose arrays are arguments of each call.

    A model with stacked layers is decoded from a copy with a list of layers, kept until the model's arrays
    change: a step that takes its weights out of stacked ones copies them for every token.
    """

    def __init__(self, model: nnx.Module, treedef: Any):
        self.treedef = treedef
        self._stacked = any(isinstance(node, Stack) for _, node in nnx.iter_graph(model))
        self._copied: list[weakref.ref] = []
        self._copy: list[jax.Array] = []
        if self._stacked:
            treedef = jax.tree.structure(unstack(model))

        def prefill(leaves: list[jax.Array], tokens: jax.Array, lengths: jax.Array, room: int) -> tuple[jax.Array, Any]:
            model = jax.tree.unflatten(treedef, leaves)
            logits, state = model.prefill(tokens, lengths, fresh_state(model, tokens.shape[0], room))
            return logits[:, : model.config.vocab_size], state

        def decode(
            leaves: list[jax.Array],
            held: tuple[Any, jax.Array | None],
            rows: Rows,
            block: jax.Array,
            uniform: jax.Array,
            rules: Rules,
            span: Span,
        ) -> tuple[Written, tuple[Any, jax.Array | None]]:
            model = jax.tree.unflatten(treedef, leaves)

            def go_on(carry: tuple) -> jax.Array:
                i, _, rows, _ = carry
                return (i < span.end) & ~jnp.all(rows.done)

            def one_token(carry: tuple) -> tuple:
                i, (state, seen), rows, block = carry
                logits, state = model.step(rows.token, state)
                logits = logits[:, : model.config.vocab_size]  # padding of the vocabulary is never chosen
                drawn = lax.dynamic_index_in_dim(uniform, i - span.begin, keepdims=False)
                out, rows, seen = _emit(logits, i, drawn, rows, seen, rules)
                block = lax.dynamic_update_index_in_dim(block, out, i - span.start, 0)
                return i + 1, (state, seen), rows, block

            stop, held, rows, block = lax.while_loop(go_on, one_token, (span.begin, held, rows, block))
            return Written(block, span.start, stop, rows), held  # pyright: ignore[reportArgumentType]

        self.prefill = jax.jit(prefill, static_argnums=3)
        self.decode = jax.jit(decode, donate_argnums=1)

    def weights(self, model: nnx.Module, leaves: list[jax.Array]) -> list[jax.Array]:
        """Returns the arrays for the programs, given those of the model as they are now."""
        if not self._stacked:
            return leaves
        same = self._copied and all(ref() is leaf for ref, leaf in zip(self._copied, leaves, strict=True))
        if not same:
            self._copy = jax.tree.leaves(unstack(model))
            self._copied = [weakref.ref(leaf) for leaf in leaves]
        return self._copy


_programs: weakref.WeakKeyDictionary[nnx.Module, Programs] = weakref.WeakKeyDictionary()


def prepared(model: nnx.Module) -> tuple[Programs, list[jax.Array]]:
    """The model's programs and its arrays as they are now.

    Flattening costs a microsecond or two an array at each call, and in return nothing can go stale: new
    weights are simply other arguments, and a changed structure (a layer replaced, an adapter added) is
    another treedef.
    """
    leaves, treedef = jax.tree.flatten(model)
    programs = _programs.get(model)
    if programs is None or programs.treedef != treedef:
        programs = _programs[model] = Programs(model, treedef)
    return programs, programs.weights(model, leaves)
