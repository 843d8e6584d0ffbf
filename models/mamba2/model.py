"""The Mamba-2 language model: embedding, residual blocks around the mixer, final norm, head."""

import jax.numpy as jnp
from flax import nnx

from portable import nn
from portable.models.language_model import LanguageModel
from portable.models.mamba2.config import Mamba2Config


class Mamba2Block(nnx.Module):
    """x + mixer(norm(x)).

    Attributes:
      norm: RMSNorm over the width. mixer: `portable.nn.Mamba2`.
    """

    def __init__(self, config: Mamba2Config, *, dtype, param_dtype, rngs: nnx.Rngs):
        """Args:
        config: of the model. dtype: of activations. param_dtype: of Params. rngs: source of the initial Params.
        """
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon, param_dtype=param_dtype)
        self.mixer = nn.Mamba2(
            config.hidden_size,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            state_size=config.state_size,
            n_groups=config.n_groups,
            conv_kernel=config.conv_kernel,
            chunk_size=config.chunk_size,
            use_bias=config.use_bias,
            use_conv_bias=config.use_conv_bias,
            activation=config.hidden_act,
            D_has_hdim=config.D_has_hdim,
            gated_norm=config.rms_norm,
            norm_before_gate=config.norm_before_gate,
            norm_eps=config.layer_norm_epsilon,
            dt_limit=config.time_step_limit,
            dt_range=(config.time_step_min, config.time_step_max),
            dt_floor=config.time_step_floor,
            A_range=config.A_init_range,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, x, **options):
        """Returns x [b, t, d] after the block, or (x, state) with `return_state`; options as `portable.nn.Mamba2`."""
        out = self.mixer(self.norm(x), **options)
        if options.get("return_state"):
            return x + out[0].astype(x.dtype), out[1]
        return x + out.astype(x.dtype)

    def step(self, x, state: nn.Mamba2State):
        """One position: (x [b, d], state) -> (x [b, d], state)."""
        out, state = self.mixer.step(self.norm(x), state)
        return x + out.astype(x.dtype), state


class Mamba2LM(LanguageModel):
    """A Mamba-2 language model that runs published checkpoints exactly (`portable.models.load`).

    Attributes:
      config: `Mamba2Config`.
      embed: nnx.Embed [v, d]. layers: nnx.List of `Mamba2Block`. norm: the final RMSNorm.
      head: Linear from d to v, or None where the head is the embedding (tied by method).
      dtype: of activations and matrix products. remat: what each block's backward recomputes; see
        `portable.nn.checkpointed`.
    """

    def __init__(
        self,
        config: Mamba2Config,
        *,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        """Args:
        config: sizes and options.
        dtype: of activations and matrix products; sums, decays and states are float32.
        param_dtype: dtype of the Params.
        remat: "none", "full" or "dots".
        rngs: source of the initial Params.
        """
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        blocks = [Mamba2Block(config, **options) for _ in range(config.num_hidden_layers)]
        if config.rescale_prenorm_residual:  # the residual stream's variance then does not grow with the depth (GPT-2)
            for block in blocks:
                kernel = block.mixer.out.kernel
                kernel.set_value(kernel.get_value() / len(blocks) ** 0.5)
        rows, eps = config.padded_vocab_size, config.layer_norm_epsilon
        super().__init__(config, blocks, rows=rows, norm_eps=eps, remat=remat, **options)

    def init_state(self, batch_size: int) -> list[nn.Mamba2State]:
        """Returns the state before any token: one `Mamba2State` a layer."""
        return [block.mixer.init_state(batch_size) for block in self.layers]

    def _embed(self, tokens):
        x = self.embed(tokens)
        wide = jnp.promote_types(jnp.float32, self.dtype)
        return x.astype(wide) if self.config.residual_in_fp32 else x
