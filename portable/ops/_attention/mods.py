"""Functions of one score that a caller hands in: traced once, what they close over made arguments."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from portable.ops._arguments import vary_together


@dataclasses.dataclass(frozen=True)
class Mod:
    """A traced function of scalars. Two that read the same are the same, so that equal calls share what is compiled.

    What a jaxpr's text does not show stands in `hidden`, by its identity.
    """

    text: str
    hidden: tuple[int, ...]
    jaxpr: Jaxpr = dataclasses.field(compare=False, repr=False)

    def __call__(self, arrays: tuple, *scalars: Any) -> jax.Array:
        """Evaluates it on scalars; `arrays` are those it closed over."""
        (out,) = jaxpr_as_fun(ClosedJaxpr(self.jaxpr, arrays))(*scalars)
        return out

    def on_block(self, arrays: tuple, scores, rows, heads, queries, keys) -> jax.Array:
        """Evaluates it on a block of scores.

        Args:
          arrays: what it closed over.
          scores: [b, g, r, q, s], or None for a function of the indices alone.
          rows: [b] batch indices.
          heads: [g, r] head indices.
          queries: [b, q] positions, or [q] for all rows.
          keys: [b, s] positions, or [s].

        Returns:
          [b, g, r, q, s].
        """

        def one(score, *indices):
            return self(arrays, *indices) if score is None else self(arrays, score, *indices)

        there = None if scores is None else 0
        over = jax.vmap(one, (there, None, None, None, 0))
        over = jax.vmap(over, (there, None, None, 0, None))
        over = jax.vmap(over, (there, None, 0, None, None))
        over = jax.vmap(over, (there, None, 0, None, None))
        axes = (there, 0, None, *(0 if p.ndim == 2 else None for p in (queries, keys)))
        return jax.vmap(over, axes)(scores, rows, heads, queries, keys)


def trace(op: str, name: str, fn: Callable | None, like: jax.Array, *, score: Any = None):
    """Returns (Mod, the arrays that `fn` closes over), or (None, ()) where there is no function.

    Args:
      op, name: for errors.
      fn: a function of (b, h, q_pos, kv_pos), after the score where there is one.
      like: an argument of the op, which inside a `shard_map` varies over the axes that scores will vary over.
      score: the dtype of the score that it takes first and returns; None for a function of indices to a boolean.

    Raises:
      TypeError: `fn` is not callable, or does not return one scalar of that dtype.
    """
    if fn is None:
        return None, ()
    if not callable(fn):
        raise TypeError(f"{op}: {name} must be a function; got {type(fn).__name__}.")
    kind, result = ("boolean", jnp.bool_) if score is None else ("floating", jnp.floating)
    dtypes = ([] if score is None else [score]) + [jnp.int32] * 4
    scalars = vary_together(like, *(jnp.zeros((), d) for d in dtypes))[1:]
    closed, out = jax.make_jaxpr(fn, return_shape=True)(*scalars)
    leaves = jax.tree.leaves(out)
    if len(leaves) != 1 or leaves[0].shape != () or not jnp.issubdtype(leaves[0].dtype, result):
        got = ", ".join(f"{x.dtype}{list(x.shape)}" for x in leaves) or "nothing"
        raise TypeError(
            f"{op}: {name} must return one {kind} scalar for one query and one key (portable vectorises it); got {got}."
        )
    return Mod(str(closed.jaxpr), tuple(_hidden(closed.jaxpr)), closed.jaxpr), tuple(closed.consts)


def _hidden(jaxpr: Jaxpr) -> Iterator[int]:
    """Yields identities of what functions inside close over, and of rules of derivatives."""
    for equation in jaxpr.eqns:
        for x in jax.tree.leaves(list(equation.params.values())):
            if isinstance(x, ClosedJaxpr):
                yield from map(id, x.consts)
            if isinstance(x, (ClosedJaxpr, Jaxpr)):
                yield from _hidden(x.jaxpr if isinstance(x, ClosedJaxpr) else x)
            elif callable(x) and not isinstance(x, type):
                yield id(x)
