"""The Mamba-2 language model: embedding, residual blocks around the mixer, final norm, head."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from portable import nn, ops
from portable.checks import check_values
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


class Mamba2LM(nnx.Module):
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
        self.config, self.dtype, self.remat = config, dtype, remat
        d, v = config.hidden_size, config.padded_vocab_size
        self.embed = nnx.Embed(
            v,
            d,
            dtype=dtype,
            param_dtype=param_dtype,
            embedding_init=nnx.initializers.normal(config.initializer_range),
            embedding_metadata={"axes": ("vocab", "embed")},
            rngs=rngs,
        )
        blocks = [
            Mamba2Block(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
            for _ in range(config.num_hidden_layers)
        ]
        if config.rescale_prenorm_residual:  # the residual stream's variance then does not grow with the depth (GPT-2)
            for block in blocks:
                kernel = block.mixer.out.kernel
                kernel.set_value(kernel.get_value() / len(blocks) ** 0.5)
        self.layers = nnx.List(blocks)
        self.norm = nn.RMSNorm(d, eps=config.layer_norm_epsilon, param_dtype=param_dtype)
        self.head = nnx.data(None)
        if not config.tie_word_embeddings:
            self.head = nnx.Linear(
                d,
                v,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                preferred_element_type=jnp.promote_types(jnp.float32, dtype),
                dot_general=nn.dot_general,
                kernel_metadata={"axes": ("embed", "vocab")},
                rngs=rngs,
            )

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        *,
        state: list[nn.Mamba2State] | None = None,
        lengths: Int[Array, " b"] | None = None,
        mask: Bool[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        return_state: bool = False,
        return_hidden: bool = False,
        last_only: bool = False,
    ) -> Any:
        """Returns the logits of the next token at every position.

        Args:
          tokens: [b, t] ids in 0..v-1, v being the padded vocabulary.
          state: from `init_state`, `prefill` or `return_state`, to continue from.
          lengths: [b] real positions of right-padded rows.
          mask: [b, t] true at the real positions of rows padded on any side; not together with `lengths`.
          segment_ids: [b, t] integers; where they change, the model starts anew (packed documents).
          return_state: also return the state after each row's last real position.
          return_hidden: also return the hidden states: the embedding, each layer's output, and the final norm's output.
          last_only: only each row's last real position, [b, v]; the head then runs on one position.

        Returns:
          logits [b, t, v] (or [b, v]) in float32, then the state, then the tuple of hidden states, as asked.

        Raises:
          ValueError: a token outside the vocabulary (concrete tokens only), or arguments that do not fit together.
          TypeError: tokens are not integers.
        """
        self._check(tokens)
        if state is not None and len(state) != len(self.layers):
            raise ValueError(f"Mamba2LM: state must have one entry a layer, {len(self.layers)}; got {len(state)}.")
        if last_only and not tokens.shape[1]:
            raise ValueError("Mamba2LM: last_only needs at least one position; got tokens of length 0.")
        tokens, lengths, segment_ids, inverse = nn.right_padded("Mamba2LM", tokens, lengths, mask, segment_ids)
        x, states, hidden = self._blocks(tokens, state, lengths, segment_ids, return_state, return_hidden)
        if last_only:
            last = x.shape[1] - 1 if lengths is None else jnp.maximum(lengths - 1, 0)[:, None, None]
            x = x[:, last] if lengths is None else jnp.take_along_axis(x, last, axis=1)[:, 0]
        elif inverse is not None:
            x = jnp.take_along_axis(x, inverse[..., None], axis=1)
            hidden = [jnp.take_along_axis(h, inverse[..., None], axis=1) for h in hidden]
        x = self.norm(x)
        out: list[Any] = [self.logits(x)]
        if return_state:
            out.append(states)
        if return_hidden:
            out.append((*hidden, self.norm(hidden[-1]) if last_only else x))
        return out[0] if len(out) == 1 else tuple(out)

    def _blocks(self, tokens, state, lengths, segment_ids, return_state, return_hidden) -> Any:
        """Returns (last layer's output, states, [embedding, each layer's output]) for right-padded tokens."""
        x = self._embed(tokens)
        options = {"lengths": lengths, "segment_ids": segment_ids}
        states, hidden = [], [x]
        stacked = any(isinstance(layer, nn.Stack) for layer in self.layers)
        if stacked and (state is not None or return_state or return_hidden):
            raise ValueError(
                "Mamba2LM: a model with stacked layers has no states and hidden states to give; call "
                "portable.nn.unstack(model) first."
            )
        for i, layer in enumerate(self.layers):
            if isinstance(layer, nn.Stack):
                x = layer(x, remat=self.remat, **options)
                continue
            before = None if state is None else state[i]
            x = nn.checkpointed(layer, self.remat)(x, state=before, return_state=return_state, **options)
            if return_state:
                x, after = x
                states.append(after)
            if return_hidden:
                hidden.append(x)
        return x, states, hidden

    def init_state(self, batch_size: int) -> list[nn.Mamba2State]:
        """Returns the state before any token: one `Mamba2State` a layer."""
        return [block.mixer.init_state(batch_size) for block in self.layers]

    def prefill(self, tokens: Int[Array, "b t"], lengths: Int[Array, " b"], state: list[nn.Mamba2State]):
        """Reads right-padded prompts: returns (logits [b, v] after each row's last token, state)."""
        return self(tokens, lengths=lengths, state=state, return_state=True, last_only=True)

    def step(self, token: Int[Array, " b"], state: list[nn.Mamba2State]):
        """Reads one token a row: (token [b], state) -> (logits [b, v] float32, state)."""
        x, after = self._embed(token), []
        for block, before in zip(self.layers, state, strict=True):
            x, now = block.step(x, before)
            after.append(now)
        return self.logits(self.norm(x)), after

    def logits(self, x: Float[Array, "... d"]) -> Float[Array, "... v"]:
        """Returns the head's output for normalised hidden states, in float32 (float64 in float64)."""
        if self.head is not None:
            return self.head(x.astype(self.dtype))
        wide = jnp.promote_types(jnp.float32, self.dtype)
        embedding = self.embed.embedding[...].astype(self.dtype)
        return ops.linear(x.astype(self.dtype), embedding, transposed=True, out_dtype=wide)

    def _embed(self, tokens):
        x = self.embed(tokens)
        wide = jnp.promote_types(jnp.float32, self.dtype)
        return x.astype(wide) if self.config.residual_in_fp32 else x

    def _check(self, tokens) -> None:
        v = self.config.padded_vocab_size
        if not hasattr(tokens, "ndim"):
            raise TypeError(f"Mamba2LM: tokens must be an array [b, t]; got {type(tokens).__name__}.")
        if tokens.ndim != 2:
            raise ValueError(f"Mamba2LM: tokens must be [b, t]; got shape {list(tokens.shape)}.")
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(f"Mamba2LM: tokens must be integers; got {tokens.dtype}.")
        check_values(lambda i: (i >= 0) & (i < v), f"Mamba2LM: tokens must lie in 0..{v - 1}; got one outside.", tokens)
