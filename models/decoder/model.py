"""The attention decoder: blocks of attention (or a short convolution) and a feed-forward layer (or experts)."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from portable import nn, ops
from portable.models.decoder.config import EXPERT_ACTIVATIONS, DecoderConfig
from portable.models.language_model import LanguageModel
from portable.nn.rotary import yarn_scale


class DecoderBlock(nnx.Module):
    """x + m mixer(norm(x)), then x + m mlp(norm(x)), with the residual multiplier m.

    Attributes:
      mixer_norm, mlp_norm: RMSNorm over the width.
      mixer: `portable.nn.Attention`, `portable.nn.LatentAttention` or `portable.nn.ShortConv`.
      mlp: `portable.nn.GatedMLP` or `portable.nn.MoE`.
    """

    def __init__(self, config: DecoderConfig, layer: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        """Args:
        config: of the model. layer: index of the block.
        dtype: of activations. param_dtype: of Params. rngs: source of the initial Params.
        """
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        options["kernel_init"] = nnx.initializers.normal(config.initializer_range)
        d = config.hidden_size
        self.mixer_norm, self.mlp_norm = (nn.RMSNorm(d, eps=config.norm_eps, param_dtype=param_dtype) for _ in range(2))
        self.mixer = _mixer(config, layer, options)
        if config.has_experts(layer):
            self.mlp = _experts(config, options)
        else:
            assert config.intermediate_size is not None
            self.mlp = nn.GatedMLP(
                d, config.intermediate_size, activation=config.hidden_act, use_bias=config.mlp_bias, **options
            )
        self.residual_multiplier = config.residual_multiplier
        # The mean of the layers with experts, times the coefficient.
        self.balance = config.router_aux_loss_coef / max(1, config.num_hidden_layers - len(config.dense_layers))

    def __call__(self, x, **options):
        """Returns x [b, t, d] after the block, or (x, state) with `return_state`; options as `portable.nn.Attention`.

        Given (x, aux) it returns (x, aux), the routers' load balance added to aux.
        """
        x, *aux = x if isinstance(x, tuple) else (x,)
        out = self.mixer(self.mixer_norm(x), **options)
        out, state = out if options.get("return_state") else (out, None)
        x = self._add(x, out)
        out, routing = self._feed(x)
        x = self._add(x, out)
        if aux:
            # transformers' normalisation, which published coefficients are made for: shares of the tokens.
            loss = ops.load_balance_loss(routing, share_of="tokens") if routing is not None else 0.0
            x = (x, aux[0] + self.balance * loss)
        return (x, state) if options.get("return_state") else x

    def step(self, x, state: Any):
        """One position: (x [b, d], state) -> (x [b, d], state)."""
        out, state = self.mixer.step(self.mixer_norm(x), state)
        x = self._add(x, out)
        return self._add(x, self._feed(x)[0]), state

    def _feed(self, x) -> tuple[Any, ops.Routing | None]:
        """Returns the feed-forward branch, and how its tokens were routed if it has experts."""
        x = self.mlp_norm(x)
        return self.mlp(x, return_routing=True) if isinstance(self.mlp, nn.MoE) else (self.mlp(x), None)

    def _add(self, x, branch):
        return x + (branch if self.residual_multiplier == 1 else branch * self.residual_multiplier).astype(x.dtype)


def _mixer(config: DecoderConfig, layer: int, options: dict[str, Any]) -> Any:
    d, kind = config.hidden_size, config.layer_type(layer)
    if kind == "conv":
        return nn.ShortConv(d, taps=config.conv_kernel, use_bias=config.conv_bias, **options)
    if config.kv_lora_rank is None:
        return nn.Attention(
            d,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            window=config.sliding_window if kind == "sliding_attention" else None,
            rope=config.rope,
            qk_norm=config.qk_norm,
            qk_norm_eps=config.norm_eps,
            qkv_clip=config.clip_qkv,
            sinks=config.attention_sinks,
            scale=config.attention_multiplier,
            use_qkv_bias=config.attention_bias,
            use_out_bias=config.attention_out_bias,
            **options,
        )
    nope, rope, value = config.latent_dims
    scale = (nope + rope) ** -0.5
    if config.rope.kind == "yarn" and config.rope.mscale_all_dim:
        scale *= yarn_scale(config.rope.factor, config.rope.mscale_all_dim) ** 2
    return nn.LatentAttention(
        d,
        num_heads=config.num_attention_heads,
        kv_rank=config.kv_lora_rank,
        query_rank=config.q_lora_rank,
        head_dim=nope,
        rope_dim=rope,
        value_dim=value,
        rope=config.rope,
        scale=scale,
        use_bias=config.attention_bias,
        **options,
    )


# What `portable.nn.MoE` is given for each of `config.ROUTERS`.
_ROUTERS = {
    "softmax": {"score": "softmax"},
    "softmax_groups": {"score": "softmax", "group_score": "max"},
    "sigmoid": {"score": "sigmoid"},
    "sigmoid_groups": {"score": "sigmoid", "group_score": "top2"},
}


def _experts(config: DecoderConfig, options: dict[str, Any]) -> nn.MoE:
    assert config.moe_intermediate_size is not None
    return nn.MoE(
        config.hidden_size,
        config.moe_intermediate_size,
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        activation="swiglu_oai" if config.clamped_experts else EXPERT_ACTIVATIONS[config.hidden_act],
        use_bias=config.expert_biases,
        use_router_bias=config.expert_biases,
        use_selection_bias=config.use_expert_bias,
        shared=config.shared_intermediate_size,
        shared_gate=config.shared_expert_gate,
        use_shared_bias=config.mlp_bias,
        router_dtype=jnp.promote_types(jnp.float32, options["dtype"]),
        groups=config.n_group,
        group_top_k=config.topk_group,
        renormalize=config.norm_topk_prob,
        renormalize_eps=config.router_eps,
        scaling=config.routed_scaling_factor,
        **_ROUTERS[config.router],
        **options,
    )


class Decoder(LanguageModel):
    """A decoder-only language model that runs published checkpoints exactly (`portable.models.load`).

    Attributes:
      config: `DecoderConfig`.
      embed: nnx.Embed [v, d]. layers: nnx.List of `DecoderBlock`. norm: the final RMSNorm.
      head: Linear from d to v, or None where the head is the embedding (tied by method).
      dtype: of activations and matrix products. remat: what each block's backward recomputes; see
        `portable.nn.checkpointed`.
      needs_length: a decode state is made for a number of positions (`portable.nn.fresh_state`).
    """

    needs_length = True

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        """Args:
        config: sizes and options.
        dtype: of activations and matrix products; sums are float32.
        param_dtype: dtype of the Params.
        remat: "none", "full" or "dots".
        rngs: source of the initial Params.
        """
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        blocks = [DecoderBlock(config, i, **options) for i in range(config.num_hidden_layers)]
        super().__init__(config, blocks, rows=config.vocab_size, norm_eps=config.norm_eps, remat=remat, **options)

    def init_state(self, batch_size: int, length: int) -> list[Any]:
        """Returns the state before any token, one entry a layer, for rows of at most `length` tokens."""
        mixers = [block.mixer for block in self.layers]
        return [
            mixer.init_state(batch_size) if isinstance(mixer, nn.ShortConv) else mixer.init_state(batch_size, length)
            for mixer in mixers
        ]

    def logits(self, x):
        """Returns the head's output for normalised hidden states, in float32 (float64 in float64)."""
        return super().logits(x) / self.config.logits_scaling if self.config.logits_scaling != 1 else super().logits(x)

    @property
    def routed(self) -> bool:
        """Whether routers add their load balance to the training loss."""
        return self.config.num_experts > 0 and self.config.router_aux_loss_coef > 0

    def _embed(self, tokens):
        x = self.embed(tokens)
        return x * self.config.embedding_multiplier if self.config.embedding_multiplier != 1 else x
