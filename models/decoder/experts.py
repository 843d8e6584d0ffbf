"""The feed-forward layer of experts: router, experts, and the one that every token takes."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from portable import nn, ops
from portable.models.decoder.config import DecoderConfig

# What `ops.route` is given for each of `config.ROUTERS`.
_ROUTERS = {
    "softmax": {"score": "softmax"},
    "softmax_groups": {"score": "softmax", "group_score": "max"},
    "sigmoid": {"score": "sigmoid"},
    "sigmoid_groups": {"score": "sigmoid", "group_score": "top2"},
}
_ACTIVATIONS = {"swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


class SelectionBias(nnx.Variable):
    """Moves which experts are chosen, not their weights; balancing changes it, not the optimizer (arXiv:2408.15664)."""


class Experts(nnx.Module):
    """The sum of the chosen experts' outputs, weighted by the router, and of the shared expert's.

    Attributes:
      router: Linear from d to e, float32.
      selection_bias: SelectionBias [e], or None.
      gate, up: Param [e, d, f]. down: Param [e, f, d].
      gate_bias, up_bias: Param [e, f], down_bias: Param [e, d]; or None.
      shared: GatedMLP, or None. shared_gate: Linear from d to 1, or None.
    """

    def __init__(self, config: DecoderConfig, *, kernel_init: nnx.Initializer, dtype, param_dtype, rngs: nnx.Rngs):
        """Args:
        config: of the model.
        kernel_init: of router and experts.
        dtype: of activations and matrix products. param_dtype: of the Params. rngs: source of the initial Params.
        """
        d, e, f = config.hidden_size, config.num_experts, config.moe_intermediate_size or 0
        options: dict[str, Any] = {"kernel_init": kernel_init, "param_dtype": param_dtype, "rngs": rngs}
        wide = jnp.promote_types(jnp.float32, dtype)
        self.router = nn.linear(d, e, ("embed", None), use_bias=config.expert_biases, dtype=wide, **options)
        self.selection_bias = nnx.data(None)
        if config.use_expert_bias:
            self.selection_bias = SelectionBias(jnp.zeros((e,), jnp.float32), axes=(None,))

        def experts(*shape: int, axes: tuple[str, ...]) -> nnx.Param:
            return nnx.Param(kernel_init(rngs.params(), (e, *shape), param_dtype), axes=("expert", *axes))

        self.gate, self.up = (experts(d, f, axes=("embed", "mlp")) for _ in range(2))
        self.down = experts(f, d, axes=("mlp", "embed"))
        self.gate_bias = self.up_bias = self.down_bias = nnx.data(None)
        if config.expert_biases:
            self.gate_bias, self.up_bias, self.down_bias = (
                nnx.Param(jnp.zeros((e, width), param_dtype), axes=("expert", axis))
                for width, axis in ((f, "mlp"), (f, "mlp"), (d, "embed"))
            )
        self.shared = self.shared_gate = nnx.data(None)
        if config.shared_intermediate_size:
            self.shared = nn.GatedMLP(
                d,
                config.shared_intermediate_size,
                activation=config.hidden_act,
                use_bias=config.mlp_bias,
                dtype=dtype,
                **options,
            )
            if config.shared_expert_gate:
                self.shared_gate = nn.linear(d, 1, ("embed", None), use_bias=False, dtype=dtype, **options)
        options = {
            **_ROUTERS[config.router],
            "top_k": config.num_experts_per_tok,
            "groups": config.n_group,
            "group_top_k": config.topk_group,
            "renormalize": config.norm_topk_prob,
            "renormalize_eps": config.router_eps,
            "scaling": config.routed_scaling_factor,
        }
        self.route_options = tuple(options.items())  # hashable, as what is static must be
        named = _ACTIVATIONS.get(config.hidden_act, config.hidden_act)
        self.activation = "swiglu_oai" if config.clamped_experts else named
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*tokens d"]) -> tuple[Float[Array, "*tokens d"], ops.Routing]:
        """Returns the layer's output [*tokens, d] and how its tokens were routed."""
        x = x.astype(self.dtype)
        bias = None if self.selection_bias is None else self.selection_bias[...]
        routing = ops.route(self.router(x.astype(self.router.dtype)), bias=bias, **dict(self.route_options))
        gate, up, down = (p[...].astype(self.dtype) for p in (self.gate, self.up, self.down))
        b_gate, b_up, b_down = (
            None if p is None else p[...].astype(self.dtype) for p in (self.gate_bias, self.up_bias, self.down_bias)
        )
        options: dict[str, Any] = {"b_gate": b_gate, "b_up": b_up, "b_down": b_down, "activation": self.activation}
        y = ops.moe_ffn(x, gate, up, down, routing, **options)
        if self.shared is not None:
            shared = self.shared(x)
            if self.shared_gate is not None:
                shared = nnx.sigmoid(self.shared_gate(x)) * shared
            y = y + shared
        return y, routing
