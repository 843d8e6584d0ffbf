"""What language models share: embedding, layers, final norm, head, and the calls around them."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from portable import nn, ops
from portable.checks import check_values


class LanguageModel(nnx.Module):
    """Base of the models that read and write tokens; a subclass makes the layers.

    A layer is called as `layer(x, state=, return_state=, lengths=, segment_ids=)` and has `step(x, state)`.

    Attributes:
      config: with `vocab_size` and `tie_word_embeddings`.
      embed: nnx.Embed [v, d]. layers: nnx.List. norm: the final RMSNorm.
      head: Linear from d to v, or None where the head is the embedding (tied by method).
      dtype: of activations and matrix products. remat: what each layer's backward recomputes; see
        `portable.nn.checkpointed`.
    """

    def __init__(
        self,
        config: Any,
        layers: Sequence[nnx.Module],
        *,
        rows: int,
        norm_eps: float,
        dtype,
        param_dtype,
        remat: str,
        rngs: nnx.Rngs,
    ):
        """Args:
        config: of the model, with hidden_size, initializer_range and tie_word_embeddings.
        layers: in their order.
        rows: v, of the embedding.
        norm_eps: of the final norm.
        dtype, param_dtype: of the computation and of the Params.
        remat: "none", "full" or "dots".
        rngs: source of the initial Params.
        """
        self.config, self.dtype, self.remat = config, dtype, remat
        d = config.hidden_size
        self.embed = nnx.Embed(
            rows,
            d,
            dtype=dtype,
            param_dtype=param_dtype,
            embedding_init=nnx.initializers.normal(config.initializer_range),
            embedding_metadata={"axes": ("vocab", "embed")},
            rngs=rngs,
        )
        self.layers: Any = nnx.List(layers)
        self.norm = nn.RMSNorm(d, eps=norm_eps, param_dtype=param_dtype)
        self.head = nnx.data(None)
        if not config.tie_word_embeddings:
            self.head = nn.linear(
                d,
                rows,
                ("embed", "vocab"),
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                preferred_element_type=jnp.promote_types(jnp.float32, dtype),
                rngs=rngs,
            )

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        *,
        state: list[Any] | None = None,
        lengths: Int[Array, " b"] | None = None,
        mask: Bool[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        return_state: bool = False,
        return_hidden: bool = False,
        last_only: bool = False,
        return_aux: bool = False,
    ) -> Any:
        """Returns the logits of the next token at every position.

        Args:
          tokens: [b, t] ids in 0..v-1, v being the padded vocabulary.
          state: from `init_state`, `prefill` or `return_state`, to continue from.
          lengths: [b] real positions of right-padded rows.
          mask: [b, t] true at the real positions of rows padded on any side; not together with `lengths`.
          segment_ids: [b, t] integers; where they change, the model starts anew (packed documents).
          return_state: also return the state after each row's last real position; layers of attention need a `state`
            to write to.
          return_hidden: also return the hidden states: the embedding, each layer's output, and the final norm's output.
          last_only: only each row's last real position, [b, v]; the head then runs on one position.
          return_aux: also return what the layers ask to add to the loss a token, 0 where they ask for nothing.

        Returns:
          logits [b, t, v] (or [b, v]) in float32, then the state, the tuple of hidden states, and aux [] float32, as
          asked.

        Raises:
          ValueError: a token outside the vocabulary (concrete tokens only), or arguments that do not fit together.
          TypeError: tokens are not integers.
        """
        name = type(self).__name__
        self._check(tokens)
        if state is not None and len(state) != len(self.layers):
            raise ValueError(f"{name}: state must have one entry a layer, {len(self.layers)}; got {len(state)}.")
        if last_only and not tokens.shape[1]:
            raise ValueError(f"{name}: last_only needs at least one position; got tokens of length 0.")
        tokens, lengths, segment_ids, inverse = nn.right_padded(name, tokens, lengths, mask, segment_ids)
        options = {"lengths": lengths, "segment_ids": segment_ids}
        x, states, hidden, aux = self._layers(tokens, state, return_state, return_hidden, return_aux, options)
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
        if return_aux:
            out.append(aux)
        return out[0] if len(out) == 1 else tuple(out)

    def _layers(self, tokens, state, return_state, return_hidden, return_aux, options) -> Any:
        """Returns (last layer's output, states, [embedding, each layer's output], aux) for right-padded tokens."""
        x = self._embed(tokens)
        states, hidden = [], [x]
        # Layers that have something to add to the loss take and give it beside x.
        routed = return_aux and self.routed
        x = (x, jnp.zeros((), jnp.float32)) if routed else x
        stacked = any(isinstance(layer, nn.Stack) for layer in self.layers)
        if stacked and (state is not None or return_state or return_hidden):
            raise ValueError(
                f"{type(self).__name__}: a model with stacked layers has no states and hidden states to give; call "
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
                hidden.append(x[0] if routed else x)
        x, aux = x if routed else (x, jnp.zeros((), jnp.float32))
        return x, states, hidden, aux

    @property
    def routed(self) -> bool:
        """Whether layers add to the loss: whether they take and give (x, aux)."""
        return False

    def prefill(self, tokens: Int[Array, "b t"], lengths: Int[Array, " b"], state: list[Any]):
        """Reads right-padded prompts: returns (logits [b, v] after each row's last token, state)."""
        return self(tokens, lengths=lengths, state=state, return_state=True, last_only=True)

    def step(self, token: Int[Array, " b"], state: list[Any]):
        """Reads one token a row: (token [b], state) -> (logits [b, v] float32, state)."""
        x, after = self._embed(token), []
        for layer, before in zip(self.layers, state, strict=True):
            x, now = layer.step(x, before)
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
        return self.embed(tokens)

    def _check(self, tokens) -> None:
        name, v = type(self).__name__, self.embed.num_embeddings
        if not hasattr(tokens, "ndim"):
            raise TypeError(f"{name}: tokens must be an array [b, t]; got {type(tokens).__name__}.")
        if tokens.ndim != 2:
            raise ValueError(f"{name}: tokens must be [b, t]; got shape {list(tokens.shape)}.")
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(f"{name}: tokens must be integers; got {tokens.dtype}.")
        check_values(lambda i: (i >= 0) & (i < v), f"{name}: tokens must lie in 0..{v - 1}; got one outside.", tokens)
