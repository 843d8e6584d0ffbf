"""The contract of `dora_linear` and `lora_linear`: checks, the gain, preparation. No product."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Num, UInt

from portable import selection
from portable.checks import check_values
from portable.ops._arguments import accumulator, check_array, check_float, check_integer, check_shape, vary_together
from portable.ops._dora_norm.api import dora_norm

NORMS = {"auto": None, "dense": "xla_dense", "factored": "xla_factored"}
DROPOUTS = ("peft", "adapter")


def dora_linear(
    x: Float[Array, "*tokens d"],
    w: Num[Array, "*e d o"],
    a: Float[Array, "*n d r"],
    b: Float[Array, "*n r o"],
    m: Float[Array, "*n o"],
    *,
    scale: float = 1.0,
    bias: Float[Array, "*e o"] | None = None,
    norms: Float[Array, "*n o"] | None = None,
    squares: Float[Array, "*e o"] | None = None,
    norm: str = "auto",
    detach: bool = True,
    ids: Int[Array, "..."] | None = None,
    group_sizes: Int[Array, " e"] | None = None,
    w_scale: Float[Array, " o"] | None = None,
    dropout: float = 0.0,
    dropout_mode: str = "peft",
    key: Key[Array, ""] | UInt[Array, " k"] | None = None,
    out_dtype=None,
    implementation: str | None = None,
) -> Float[Array, "*tokens o"]:
    """Runs a weight-decomposed low-rank adapter (DoRA) with the linear layer that it adapts.

        n = ||w + scale * a @ b|| over d, one an output channel;  g = m / n, 0 where n is 0
        y = g * (x @ w + scale * (x @ a) @ b) + bias

    Sums, norms and g are float32 (float64 if an argument is) whatever the weight's dtype, and y is rounded once. The
    backward keeps x, x @ a and the sum in brackets, one array of [*tokens, o], none where m has no gradient; it is kept
    in the dtype of x, and y made of it: a differentiated call rounds twice, and what follows need not keep y too.
    Differentiable in every floating argument, in reverse mode.

    Args:
      x: [*tokens, d]; the dtype of the products.
      w: [d, o], integers with w_scale, or a quantised array (`qwix.QArray`), of which one scaled by output channel is
        never formed; or [e, d, o] with group_sizes.
      a, b: [d, r] and [r, o]; with ids [n, d, r] and [n, r, o], with group_sizes [e, d, r] and [e, r, o].
      m: magnitudes [o]; with ids [n, o], with group_sizes [e, o].
      scale: alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv:2312.03732).
      bias: [o], or [e, o] with group_sizes; not scaled by g.
      norms: n, of the shape of m, where it is cached: a, b and w change less often than this is called.
      squares: [o], or [e, o], sums of w's squares over d, which `norm="auto"` and "factored" then need not form.
      norm: "auto" (the platform's form of `dora_norm`), "dense" or "factored".
      detach: n counts as a constant in gradients (section 4.3 of the paper, and what others do); False differentiates
        through it.
      ids: [*tokens], or fewer of its leading axes (one for each example): which of n adapters each row meets; -1 for
        none, x @ w + bias.
      group_sizes: [e], x [m, d] being rows in the order of e experts, as in `grouped_matmul`; rows behind the last
        group are not defined. Not together with ids.
      w_scale: [o], multiplies x @ w: a weight quantised by output channel, never formed.
      dropout: share of entries of x that are dropped where key is given.
      dropout_mode: "peft": g - 1 also meets the dropped x, y = x w + bias + (g - 1) * (x' w) + g * scale * (x' a) b,
        which takes x @ w twice; "adapter": x' meets a alone.
      key: of the dropout; None drops nothing.
      out_dtype: of y; None takes the dtype of x.
      implementation: "reference" or "xla".

    Returns:
      [*tokens, o] in out_dtype.

    Raises:
      ValueError: shapes do not fit, an option is unknown, or a concrete id is out of range.
      TypeError: an argument has the wrong dtype.

    Source: Liu et al. 2024 (arXiv:2402.09353), equations 5 and 11.

    >>> import jax.numpy as jnp, portable
    >>> x, w = jnp.array([[1.0, 1.0]]), jnp.array([[3.0, 1.0], [4.0, 0.0]])
    >>> a, b, m = jnp.ones([2, 1]), jnp.zeros([1, 2]), jnp.array([5.0, 2.0])
    >>> portable.ops.dora_linear(x, w, a, b, m).tolist()
    [[7.0, 2.0]]
    """
    given = {"bias": bias, "norms": norms, "squares": squares, "norm": norm, "detach": detach, "ids": ids}
    given |= {"group_sizes": group_sizes, "w_scale": w_scale, "dropout": dropout, "dropout_mode": dropout_mode}
    arrays, options = prepare(
        x, w, a, b, m, scale=scale, key=key, out_dtype=out_dtype, **given, implementation=implementation
    )
    (y,) = selection.call("dora_linear", implementation, arrays, options)
    return y


def lora_linear(
    x: Float[Array, "*tokens d"],
    w: Num[Array, "*e d o"],
    a: Float[Array, "*n d r"],
    b: Float[Array, "*n r o"],
    *,
    scale: float = 1.0,
    bias: Float[Array, "*e o"] | None = None,
    ids: Int[Array, "..."] | None = None,
    group_sizes: Int[Array, " e"] | None = None,
    w_scale: Float[Array, " o"] | None = None,
    dropout: float = 0.0,
    key: Key[Array, ""] | UInt[Array, " k"] | None = None,
    out_dtype=None,
    implementation: str | None = None,
) -> Float[Array, "*tokens o"]:
    """Runs a low-rank adapter (LoRA) with the linear layer that it adapts: y = x @ w + scale * (x' @ a) @ b + bias.

    Arguments, result and errors are those of `dora_linear` without magnitudes; x' is x after dropout. The backward
    keeps x and x @ a.

    Source: Hu et al. 2021 (arXiv:2106.09685), equation 3.

    >>> import jax.numpy as jnp, portable
    >>> x, w, a, b = jnp.array([[1.0, 2.0]]), jnp.eye(2), jnp.array([[1.0], [1.0]]), jnp.array([[0.0, 1.0]])
    >>> portable.ops.lora_linear(x, w, a, b, scale=2.0).tolist()
    [[1.0, 8.0]]
    """
    given = {"bias": bias, "ids": ids, "group_sizes": group_sizes, "w_scale": w_scale, "dropout": dropout}
    arrays, options = prepare(x, w, a, b, None, scale=scale, key=key, out_dtype=out_dtype, **given, op="lora_linear")
    (y,) = selection.call("dora_linear", implementation, arrays, options)
    return y


def prepare(
    x,
    w,
    a,
    b,
    m,
    *,
    scale=1.0,
    bias=None,
    norms=None,
    squares=None,
    norm="auto",
    detach=True,
    ids=None,
    group_sizes=None,
    w_scale=None,
    dropout=0.0,
    dropout_mode="peft",
    key=None,
    out_dtype=None,
    implementation=None,
    op="dora_linear",
):
    """Checks the arguments; returns the core's arrays (see `Arguments`) and its options."""
    if hasattr(w, "qvalue"):
        w, w_scale = _quantised(op, w, w_scale)
    _check(op, x, w, a, b, m, bias, norms, squares, ids, group_sizes, w_scale)
    if norm not in NORMS:
        raise ValueError(f"{op}: norm must be one of {', '.join(NORMS)}; got {norm!r}.")
    if dropout_mode not in DROPOUTS:
        raise ValueError(f"{op}: dropout_mode must be one of {', '.join(DROPOUTS)}; got {dropout_mode!r}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"{op}: dropout must lie in [0, 1); got {dropout}.")
    floats = [z for z in (x, w, a, b, m, bias, w_scale) if z is not None and jnp.issubdtype(z.dtype, jnp.floating)]
    wide = accumulator(*floats)
    dtype = wide if wide == jnp.float64 else x.dtype
    gain = None
    if m is not None:
        if norms is None:
            norms = _norms(w, a, b, scale, squares, norm, w_scale, dtype, ids, implementation)
        norms = (jax.lax.stop_gradient(norms) if detach else norms).astype(wide)
        positive = ~(norms <= 0)
        gain = jnp.where(positive, m.astype(wide) / jnp.where(positive, norms, 1), 0)
    generator, dropping = "", key is not None and dropout > 0
    if key is not None and dropping:
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        generator = str(jax.random.key_impl(key)) if typed else jax.config.jax_default_prng_impl  # pyright: ignore
        key = jax.random.key_data(key) if typed else key
    ids, group_sizes = (None if z is None else z.astype(jnp.int32) for z in (ids, group_sizes))
    w = w.astype(dtype) if jnp.issubdtype(w.dtype, jnp.floating) else w
    arrays = (x.astype(dtype), w, a, b, gain, bias, w_scale, ids, group_sizes, key if dropping else None)
    whole = dropping and m is not None and dropout_mode == "peft"
    options = {"scale": float(scale), "rate": float(dropout) if dropping else 0.0, "generator": generator}
    return vary_together(*arrays), {**options, "whole": whole, "out_dtype": jnp.dtype(out_dtype or dtype)}


def _quantised(op, w, w_scale):
    """Returns a quantised array (qwix) as integers and their scale by output channel, or as what it stands for."""
    if w_scale is not None:
        raise ValueError(f"{op}: a quantised w has its scale with it; got w_scale beside it.")
    try:
        plain = jnp.issubdtype(w.qvalue.dtype, jnp.integer) and jnp.dtype(w.qtype) == w.qvalue.dtype
    except TypeError:  # codes of a table, such as nf4
        plain = False
    if plain and w.zero_point is None and w.scale.shape == (*[1] * (w.ndim - 1), w.shape[-1]):
        return w.qvalue, w.scale.reshape(-1)
    import qwix

    return qwix.dequantize(w), None


def _check(op, x, w, a, b, m, bias, norms, squares, ids, group_sizes, w_scale) -> None:
    check_array(op, x=x, w=w, a=a, b=b)
    check_float(op, x=x, a=a, b=b, m=m, bias=bias, norms=norms, squares=squares, w_scale=w_scale)
    check_integer(op, ids=ids, group_sizes=group_sizes)
    if ids is not None and group_sizes is not None:
        raise ValueError(f"{op}: give ids, of adapters beside one weight, or group_sizes, of experts; not both.")
    quantised = jnp.issubdtype(w.dtype, jnp.integer)
    if not quantised:
        check_float(op, w=w)
    elif w_scale is None:
        raise TypeError(
            f"{op}: a weight of integers needs w_scale, what each output channel stands for; got {w.dtype}."
        )
    if x.ndim < 1:
        raise ValueError(f"{op}: x must be [*tokens, d]; got shape {list(x.shape)}.")
    grouped = group_sizes is not None
    own, each = "e " * grouped, "e " if grouped else "n " if ids is not None else ""
    sizes: dict[str, int] = {"d": x.shape[-1]}
    if grouped:
        check_shape(op, "x", x, "m d", sizes)
    each_bias = own if bias is not None and bias.ndim == 2 else ""
    named = {"w": (w, f"{own}d o"), "a": (a, f"{each}d r"), "b": (b, f"{each}r o"), "m": (m, f"{each}o")}
    named |= {"bias": (bias, f"{each_bias}o"), "norms": (norms, f"{each}o"), "squares": (squares, f"{own}o")}
    named |= {"w_scale": (w_scale, "o"), "group_sizes": (group_sizes, "e")}
    for name, (z, letters) in named.items():
        check_shape(op, name, z, letters.strip(), sizes)
    if ids is None:
        return
    if ids.shape != x.shape[: ids.ndim] or not 1 <= ids.ndim < x.ndim:
        raise ValueError(
            f"{op}: ids must be [*tokens] of x {list(x.shape)}, or fewer of its leading axes; got {list(ids.shape)}."
        )
    n = sizes["n"]
    check_values(lambda i: (i >= -1) & (i < n), f"{op}: ids must lie in -1..{n - 1}, -1 for no adapter.", ids)


def _norms(w, a, b, scale, squares, norm, w_scale, dtype, ids, implementation):
    if w_scale is not None:
        w = w.astype(jnp.promote_types(jnp.float32, dtype)) * w_scale
    name = "reference" if implementation == "reference" else NORMS[norm]
    options = {"scale": scale, "implementation": name}
    if norm == "dense":
        squares = None
    if ids is None:
        return dora_norm(w.astype(dtype), a, b, squares=squares, **options)
    return jax.vmap(lambda a, b: dora_norm(w.astype(dtype), a, b, squares=squares, **options))(a, b)
