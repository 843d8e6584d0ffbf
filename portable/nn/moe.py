"""Mixture-of-experts layers: a router, experts, and what stands beside them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Num

from portable import ops
from portable.nn.heads import KERNEL_INIT
from portable.nn.linear import linear
from portable.nn.mlp import GatedMLP
from portable.ops._moe_ffn.activations import NAMES as ACTIVATIONS
from portable.ops._route.placement import check_table

# What the shared expert's activation is called in `portable.nn.norm.ACTIVATIONS`.
_SHARED = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}


# Options of `portable.ops.route` that a layer hands on.
_ROUTING = {"score", "renormalize", "renormalize_eps", "groups", "group_top_k", "group_score", "scaling", "score_eps"}


class SelectionBias(nnx.Variable):
    """Moves which experts are chosen, not their weights; balancing changes it, not the optimizer (arXiv:2408.15664).

    Its cotangent is no slope but the load of each expert, which so adds up over microbatches, devices and stacked
    layers: a training step that differentiates these variables too hands what it gets to `portable.ops.updated_bias`.
    """


@jax.custom_vjp
def _counted(y, bias, load):
    """Returns y; the cotangent of bias is the load."""
    del bias, load
    return y


_counted.defvjp(
    lambda y, bias, load: (y, load.astype(bias.dtype)),
    lambda load, dy: (dy, load, np.zeros(load.shape, jax.dtypes.float0)),
)


class ExpertTable(nnx.Variable):
    """Where each expert of the router lies among the stacked ones; see `portable.ops.remap_experts`."""


class MoE(nnx.Module):
    """`portable.ops.route` and `portable.ops.moe_ffn` with their weights.

        y = sum over the chosen experts of weight * expert(x)  +  shared(x) * sigmoid(x @ shared_gate)

    The router's experts are, in this order, networks, constants, copies and zeros; the last three cost nothing (MoE++,
    LongCat). Loads and losses are functions of the Routing that a call returns on request: nothing is stored.

    Attributes:
      router: Linear from d (or router_hidden) to E, float32. router_hidden: Linear from d, or None.
      router_residual: Linear from E to E, or None. noise: Linear from d to E, or None.
      selection_bias: SelectionBias [E], or None. score_scale: Param [E], or None.
      gate, up: Param [n, d, f], gate None where experts are plain. down: Param [n, f, d].
      gate_bias, up_bias: Param [n, f], down_bias: Param [n, d]; or None.
      constants, mixes: Param [c, d] and [c, d, 2], or None.
      shared: GatedMLP, or None. shared_gate: Linear from d to 1, or None.
      table: ExpertTable [E] or [rows, E], or None.
    """

    def __init__(
        self,
        d: int,
        f: int,
        *,
        num_experts: int,
        top_k: int | None = None,
        gated: bool = True,
        activation: str = "silu",
        use_bias: bool = False,
        use_router_bias: bool = False,
        use_selection_bias: bool = False,
        router_hidden: int | None = None,
        router_residual: bool = False,
        noisy: bool = False,
        jitter: float = 0.0,
        constants: int = 0,
        copies: int = 0,
        zeros: int = 0,
        shared: int | None = None,
        shared_gate: bool = False,
        use_shared_bias: bool = False,
        capacity_factor: float | None = None,
        priority: str = "position",
        overflow: str = "drop",
        expert_choice: bool = False,
        table=None,
        slots: int | None = None,
        kernel_init: nnx.Initializer = KERNEL_INIT,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        router_dtype=None,
        rngs: nnx.Rngs,
        **routing: Any,
    ):
        """Args:
        d, f: width of the model and inside an expert.
        num_experts: networks among the router's experts.
        top_k: choices a token.
        gated: experts are down(act(gate(x)) * up(x)), or down(act(up(x))).
        activation: of `portable.ops.moe_ffn`; "swiglu_oai" is GPT-OSS's.
        use_bias, use_router_bias: biases of the experts, and of the router.
        use_selection_bias: a bias that `update_bias` moves to balance loads without a loss.
        router_hidden: width of a layer with tanh before the router's own (MoE++), or None.
        router_residual: the router adds a map of the logits of the layer before (MoE++'s gating residual).
        noisy: a learned amount of noise on the logits of a call with a key (Shazeer et al.).
        jitter: amount of `portable.ops.jitter` on the router's input of a call with a key.
        constants, copies, zeros: numbers of experts without a network.
        shared, shared_gate: width of a gated expert that every token takes, and whether a sigmoid weighs it.
        use_shared_bias: biases of that expert.
        capacity_factor, priority, overflow: of `portable.ops.limit_capacity`; None limits nothing.
        expert_choice: experts choose tokens (`portable.ops.expert_choice`, with capacity_factor); without top_k.
        table, slots: of `portable.ops.remap_experts`: where the networks lie among `slots` stacked ones.
        kernel_init: of each expert's matrices and of all linear layers.
        dtype: of activations and matrix products; sums are float32. param_dtype: of the Params.
        router_dtype: of the router's Params and product; None takes float32, or a wider dtype.
        rngs: source of the initial Params.
        **routing: further options of `portable.ops.route`, as `portable.ops.route_options` gives them: score,
          renormalize, renormalize_eps, groups, group_top_k, group_score, scaling, score_eps.

        Raises:
          ValueError: options contradict each other, a name is unknown, or `route`, `limit_capacity` or `remap_experts`
            refuses them.
          TypeError: there is no such option of `route`.
        """
        e = num_experts + constants + copies + zeros
        if activation == "swiglu_oai" and not gated:
            raise ValueError("MoE: activation='swiglu_oai' needs gated experts; got gated=False.")
        if shared is not None and activation not in _SHARED:
            raise ValueError(f"MoE: a shared expert's activation is one of {', '.join(_SHARED)}; got {activation!r}.")
        if num_experts < 1:
            raise ValueError(f"MoE: num_experts must be at least 1; got {num_experts}.")
        if activation not in ACTIVATIONS:
            raise ValueError(f"MoE: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}.")
        if unknown := set(routing) - _ROUTING:
            raise TypeError(f"MoE: {', '.join(sorted(unknown))}: there is no such option; see MoE and ops.route.")
        if not expert_choice and capacity_factor is not None:  # it names what is wrong before any weight is made
            options = {"factor": capacity_factor, "priority": priority, "overflow": overflow}
            choice = ops.Routing(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1)), 1)
            jax.eval_shape(lambda: ops.limit_capacity(choice, **options).weights)
        if shared_gate and shared is None:
            raise ValueError("MoE: shared_gate weighs a shared expert; give its width as shared.")
        if expert_choice != (top_k is None):
            raise ValueError("MoE: give top_k, or expert_choice=True with a capacity_factor; not both.")
        if expert_choice and (capacity_factor is None or e > num_experts or table is not None or routing):
            raise ValueError(
                "MoE: expert_choice needs a capacity_factor, and goes with no expert without a network, no table and "
                "no option of route."
            )
        if table is None and slots is not None:
            raise ValueError("MoE: slots needs a table that says where the experts lie.")
        if table is not None:
            table = jnp.asarray(table, jnp.int32)
            slots = num_experts if slots is None else slots
            check_table(table, num_experts, slots)
        self.d, self.num_experts, self.copies, self.zeros = d, num_experts, copies, zeros
        self.activation, self.jitter, self.dtype = activation, jitter, dtype
        self.capacity_factor, self.priority, self.overflow = capacity_factor, priority, overflow
        self.expert_choice = expert_choice
        self.options = tuple(sorted({**routing, "top_k": top_k, "zero_experts": zeros}.items()))
        if not expert_choice:  # it names what is wrong with the options before any weight is made
            jax.eval_shape(lambda: ops.route(jnp.zeros((1, e)), **dict(self.options)).weights)

        router_dtype = jnp.promote_types(jnp.float32, dtype) if router_dtype is None else router_dtype
        wide = {"dtype": router_dtype, "param_dtype": router_dtype, "kernel_init": kernel_init, "rngs": rngs}
        self.router_hidden = self.router_residual = self.noise = nnx.data(None)
        if router_hidden is not None:
            self.router_hidden = linear(d, router_hidden, ("embed", None), use_bias=False, **wide)
        axes = ("embed" if router_hidden is None else None, None)
        self.router = linear(router_hidden or d, e, axes, use_bias=use_router_bias, **wide)
        if router_residual:
            self.router_residual = linear(e, e, (None, None), use_bias=False, **wide)
        if noisy:
            self.noise = linear(d, e, ("embed", None), use_bias=False, **wide)
        self.selection_bias = self.score_scale = self.table = nnx.data(None)
        if use_selection_bias:
            self.selection_bias = SelectionBias(jnp.zeros((e,), router_dtype), axes=(None,))
        if dict(self.options).get("score") == "relu_rms":
            self.score_scale = nnx.Param(jnp.ones((e,), router_dtype), axes=(None,))
        if table is not None:
            self.table = ExpertTable(table, axes=(None,) * table.ndim)

        n = slots or num_experts

        def experts(*shape: int, axes: tuple[str | None, ...], init=kernel_init, count: int = n) -> nnx.Param:
            keys = jax.random.split(rngs.params(), count)  # each expert is drawn as if it were alone
            values = jax.vmap(lambda key: init(key, shape, param_dtype))(keys)
            return nnx.Param(values, axes=("expert" if count == n else None, *axes))

        self.gate = nnx.data(experts(d, f, axes=("embed", "mlp")) if gated else None)
        self.up, self.down = experts(d, f, axes=("embed", "mlp")), experts(f, d, axes=("mlp", "embed"))
        self.gate_bias = self.up_bias = self.down_bias = nnx.data(None)
        if use_bias:
            zero = nnx.initializers.zeros_init()
            self.gate_bias = nnx.data(experts(f, axes=("mlp",), init=zero) if gated else None)
            self.up_bias = experts(f, axes=("mlp",), init=zero)
            self.down_bias = experts(d, axes=("embed",), init=zero)
        self.constants = self.mixes = nnx.data(None)
        if constants:
            normal = nnx.initializers.normal(1.0)
            self.constants = nnx.Param(normal(rngs.params(), (constants, d), param_dtype), axes=(None, "embed"))
            mixes = jax.vmap(lambda key: kernel_init(key, (d, 2), param_dtype))
            self.mixes = nnx.Param(mixes(jax.random.split(rngs.params(), constants)), axes=(None, "embed", None))
        self.shared = self.shared_gate = nnx.data(None)
        if shared is not None:
            options = {"dtype": dtype, "param_dtype": param_dtype, "kernel_init": kernel_init, "rngs": rngs}
            self.shared = GatedMLP(d, shared, activation=_SHARED[activation], use_bias=use_shared_bias, **options)
            if shared_gate:
                self.shared_gate = linear(d, 1, ("embed", None), use_bias=False, **options)

    def __call__(
        self,
        x: Float[Array, "*tokens d"],
        *,
        mask: Bool[Array, "*tokens"] | None = None,
        routing: ops.Routing | None = None,
        rows: Int[Array, "*tokens"] | None = None,
        previous_logits: Float[Array, "*tokens e"] | None = None,
        key: Key[Array, ""] | None = None,
        return_routing: bool = False,
    ) -> Any:
        """Sends each token through its experts.

        Args:
          x: [*tokens, d].
          mask: [*tokens] booleans, False at padding, which takes no expert (but the shared one).
          routing: over the router's E experts, instead of the router's own choice (by modality, say); without a mask.
          rows: [*tokens] integers, each token's row of a table of several: its adapter.
          previous_logits: [*tokens, E], those of the layer before, with router_residual; None in the first layer.
          key: of the noise; None for none.
          return_routing: whether the routing is returned too: of the router's experts, with the choices that a
            capacity leaves; what the auxiliary functions of `portable.ops` take.

        Returns:
          y [*tokens, d] in the layer's dtype, or (y, Routing), (y, ExpertChoice) where experts choose.

        Raises:
          ValueError: shapes do not fit, or an argument is given for what the layer does not have.
        """
        if getattr(x, "ndim", 0) < 1 or x.shape[-1] != self.d:
            found = list(x.shape) if hasattr(x, "shape") else type(x).__name__
            raise ValueError(f"MoE: x must be [*tokens, d] with d={self.d}; got {found}.")
        if previous_logits is not None and self.router_residual is None:
            raise ValueError("MoE: previous_logits is for a layer with router_residual=True.")
        if rows is not None and self.table is None:
            raise ValueError("MoE: rows is for a layer with a table of several rows.")
        if routing is not None and mask is not None:
            raise ValueError("MoE: give a mask, or a routing whose choices are empty at padding; not both.")
        if routing is not None and self.expert_choice:
            raise ValueError("MoE: a layer whose experts choose takes no routing.")
        x = x.astype(self.dtype)
        if self.expert_choice:
            choice = ops.expert_choice(self._logits(x, None, key), factor=self.capacity_factor, mask=mask)
            y, made = self._chosen(x, choice), choice
        else:
            made = self._route(x, mask, previous_logits, key) if routing is None else routing
            y = self._networks(x, made, rows)
            if self.selection_bias is not None:
                y = _counted(y, self.selection_bias[...], ops.expert_load(made))
        if self.shared is not None:
            shared = self.shared(x)
            y = y + (shared if self.shared_gate is None else shared * jax.nn.sigmoid(self.shared_gate(x)))
        return (y, made) if return_routing else y

    def update_bias(self, load: Num[Array, " e"], *, rate: float = 1e-3) -> None:
        """Moves the selection's bias by `portable.ops.updated_bias`; call it after a step, with the batch's load.

        In a training loop that is differentiated and jitted the load is the cotangent of `SelectionBias`.

        Args:
          load: [E], from `portable.ops.expert_load`.
          rate: the step.

        Raises:
          ValueError: the layer has no selection bias, or the load is of another number of experts.
        """
        if self.selection_bias is None:
            raise ValueError("MoE: update_bias is for a layer with use_selection_bias=True.")
        self.selection_bias[...] = ops.updated_bias(jnp.asarray(self.selection_bias[...]), load, rate=rate)

    def set_table(self, table: Int[Array, "*rows e"]) -> None:
        """Says anew where the experts lie; the shape is that of the table before.

        Raises:
          ValueError: the layer has no table, or this one does not fit.
        """
        shape = None if self.table is None else list(self.table.get_value().shape)
        if self.table is None or shape != list(jnp.shape(table)):
            raise ValueError(f"MoE: the table must have the shape of the layer's, {shape}; got {list(table.shape)}.")
        check_table(table, self.num_experts, self.up.get_value().shape[0])
        self.table[...] = jnp.asarray(table, jnp.int32)

    def _logits(self, x, previous_logits, key):
        wide = x.astype(self.router.dtype)
        jitter, noise = (None, None) if key is None else jax.random.split(key)
        if jitter is not None and self.jitter:
            wide = ops.jitter(wide, jitter, self.jitter)
        inner = wide if self.router_hidden is None else jnp.tanh(self.router_hidden(wide))
        logits = self.router(inner)
        if previous_logits is not None and self.router_residual is not None:
            logits = logits + self.router_residual(previous_logits.astype(logits.dtype))
        if noise is not None and self.noise is not None:
            logits, _ = ops.noisy_logits(logits, self.noise(wide), noise)
        return logits

    def _route(self, x, mask, previous_logits, key) -> ops.Routing:
        given = {"bias": self.selection_bias, "score_scale": self.score_scale}
        arrays = {name: None if v is None else jnp.asarray(v[...]) for name, v in given.items()}
        made = ops.route(self._logits(x, previous_logits, key), mask=mask, **arrays, **dict(self.options))
        if self.capacity_factor is None:
            return made
        return ops.limit_capacity(made, factor=self.capacity_factor, priority=self.priority, overflow=self.overflow)

    def _networks(self, x, routing: ops.Routing, rows):
        simple: Any = 0
        if self.constants is not None or self.copies or self.zeros:
            constants, mixes = (None if p is None else jnp.asarray(p[...]) for p in (self.constants, self.mixes))
            options = {"constants": constants, "mixes": mixes, "copies": self.copies, "zeros": self.zeros}
            simple, routing = ops.simple_experts(x, routing, **options)
        if self.table is not None:
            slots = self.up.get_value().shape[0]
            routing = ops.remap_experts(routing, jnp.asarray(self.table[...]), num_experts=slots, rows=rows)
        return self._ffn(x, routing) + simple

    def _chosen(self, x, choice: ops.ExpertChoice):
        """Each expert's tokens stand side by side, so nothing is sorted: rows of x, and sums back into them."""
        e, c = choice.indices.shape
        flat, wide = x.reshape(-1, self.d), jnp.promote_types(jnp.float32, x.dtype)
        places = choice.indices.reshape(-1)
        routing = ops.Routing(jnp.repeat(jnp.arange(e, dtype=jnp.int32), c)[:, None], choice.weights.reshape(-1, 1), e)
        y = self._ffn(flat[places], routing).astype(wide)
        return jnp.zeros(flat.shape, wide).at[places].add(y).astype(x.dtype).reshape(x.shape)

    def _ffn(self, x, routing: ops.Routing):
        def value(param) -> Any:
            return None if param is None else param[...]

        biases = {"b_gate": value(self.gate_bias), "b_up": value(self.up_bias), "b_down": value(self.down_bias)}
        weights = value(self.gate), value(self.up), value(self.down)
        return ops.moe_ffn(x, *weights, routing, activation=self.activation, **biases).astype(self.dtype)


def moe_from_dense(
    w_gate: Float[Array, "d m"] | None,
    w_up: Float[Array, "d m"],
    w_down: Float[Array, "m d"],
    *,
    num_experts: int,
    how: str = "split",
    b_gate: Float[Array, " m"] | None = None,
    b_up: Float[Array, " m"] | None = None,
    b_down: Float[Array, " d"] | None = None,
    **options: Any,
) -> MoE:
    """Makes experts of a dense feed-forward layer.

    "split" gives each expert an equal run of the m hidden channels (FactorLLM), and an equal share of b_down: with
    every expert chosen at weight 1 the layer is the dense one. No router gives such weights: hand the layer
    `portable.ops.Routing(indices, ones, num_experts)` with all indices, as its `routing`. "copy" gives each the whole
    layer (upcycling): with weights that sum to 1 it is the dense one whatever the router chooses.

    Args:
      w_gate, w_up, w_down: [d, m], or None for a plain layer; [d, m]; [m, d].
      num_experts: how many; it divides m with "split".
      how: "split" or "copy".
      b_gate, b_up, b_down: biases, [m], [m] and [d].
      **options: of `MoE`, with rngs, which draws the router.

    Returns:
      MoE whose Params have the dtype of `param_dtype`.

    Raises:
      ValueError: num_experts does not divide m, how is unknown, or shapes do not fit.

    Source: FactorLLM (arXiv 2408.11855); sparse upcycling (2212.05055), section 3.
    """
    if jnp.ndim(w_up) != 2:
        raise ValueError(f"moe_from_dense: w_up must be [d, m]; got {list(jnp.shape(w_up))}.")
    if options.get("slots") not in (None, num_experts):
        raise ValueError(f"moe_from_dense: slots must be num_experts={num_experts}; got {options['slots']}.")
    d, m = w_up.shape
    if how not in ("split", "copy"):
        raise ValueError(f"moe_from_dense: how must be split or copy; got {how!r}.")
    if how == "split" and m % num_experts:
        raise ValueError(f"moe_from_dense: num_experts must divide the {m} hidden channels; got {num_experts}.")
    shapes = {"w_gate": (w_gate, (d, m)), "w_down": (w_down, (m, d)), "b_gate": (b_gate, (m,)), "b_up": (b_up, (m,))}
    for name, (array, shape) in {**shapes, "b_down": (b_down, (d,))}.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"moe_from_dense: {name} must be {list(shape)}; got {list(array.shape)}.")
    split = how == "split"
    n, f = num_experts, m // num_experts if split else m
    biased = any(b is not None for b in (b_gate, b_up, b_down))
    moe = MoE(d, f, num_experts=n, gated=w_gate is not None, use_bias=biased, **options)

    def columns(array):  # [..., m] -> [n, ..., f]
        return jnp.stack(jnp.split(array, n, axis=-1)) if split else jnp.stack([array] * n)

    parts = {"gate": w_gate, "up": w_up, "gate_bias": b_gate, "up_bias": b_up}
    made = {name: columns(array) for name, array in parts.items() if array is not None}
    made["down"] = w_down.reshape(n, f, d) if split else jnp.stack([w_down] * n)
    if b_down is not None:
        made["down_bias"] = jnp.stack([b_down / n if split else b_down] * n)
    for name, array in made.items():
        param = getattr(moe, name)
        param[...] = array.astype(param.get_value().dtype)
    return moe
