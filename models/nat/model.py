"""NAT and DiNAT: levels of neighborhood attention, each on an image of half the side and twice the channels."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from portable import nn
from portable.models.nat.config import NATConfig
from portable.nn.norm import ACTIVATIONS


class _Kinds:
    """Makes the parts of a model with one dtype and one set of initialisers."""

    def __init__(self, config: NATConfig, dtype, param_dtype, rngs: nnx.Rngs):
        self.dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.kernel_init = nnx.initializers.truncated_normal(config.initializer_range)

    def norm(self, d: int, eps: float = 1e-5) -> nnx.LayerNorm:
        axes = {"axes": ("embed",)}
        options = {"use_fast_variance": False, "scale_metadata": axes, "bias_metadata": axes}
        return nnx.LayerNorm(d, epsilon=eps, **options, **self.dtypes)

    def linear(self, i: int, o: int, axes: tuple[str, str], **options) -> nnx.Linear:
        return nnx.Linear(
            i,
            o,
            kernel_init=self.kernel_init,
            dot_general=nn.dot_general,
            kernel_metadata={"axes": axes},
            bias_metadata={"axes": axes[1:]},
            **options,
            **self.dtypes,
        )

    def conv(self, i: int, o: int, stride: int, use_bias: bool = True) -> nnx.Conv:
        # torch's padding of 1 on every side; "SAME" would put less in front where the stride is 2.
        return nnx.Conv(
            i,
            o,
            (3, 3),
            strides=stride,
            padding=1,
            use_bias=use_bias,
            kernel_metadata={"axes": (None, None, None, "embed")},
            bias_metadata={"axes": ("embed",)},
            **self.dtypes,
        )


class Stem(nnx.Module):
    """Two 3 x 3 convolutions without an activation between them, then LayerNorm."""

    def __init__(self, config: NATConfig, make: _Kinds):
        """Args:
        config: of the model. make: of its parts.
        """
        first, second = config.stem_strides
        self.conv1 = make.conv(config.num_channels, config.embed_dim // 2, first)
        self.conv2 = make.conv(config.embed_dim // 2, config.embed_dim, second)
        self.norm = make.norm(config.embed_dim)

    def __call__(self, images: Float[Array, "b y x c"]) -> Float[Array, "b y x d"]:
        """Returns the positions of the first level."""
        return self.norm(self.conv2(self.conv1(images)))


class Downsample(nnx.Module):
    """A 3 x 3 convolution of stride 2 to twice the channels, then LayerNorm."""

    def __init__(self, d: int, make: _Kinds):
        """Args:
        d: channels that come in. make: of the model's parts.
        """
        self.conv = make.conv(d, 2 * d, 2, use_bias=False)
        self.norm = make.norm(2 * d)

    def __call__(self, x: Float[Array, "b y x d"]) -> Float[Array, "b y x d"]:
        """Returns the positions of the next level."""
        return self.norm(self.conv(x))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); each branch with a learned factor where the model has one."""

    def __init__(self, config: NATConfig, level: int, block: int, make: _Kinds):
        """Args:
        config: of the model. level, block: which one this is. make: of the model's parts.
        """
        d = config.width(level)
        hidden = int(config.mlp_ratio * d)
        self.norm1, self.norm2 = make.norm(d, config.layer_norm_eps), make.norm(d, config.layer_norm_eps)
        self.attention = nn.NeighborhoodAttention(
            d,
            rank=2,
            num_heads=config.num_heads[level],
            window=config.kernel_size,
            dilation=config.dilation(level, block),
            rel_pos_bias=True,
            use_qkv_bias=config.qkv_bias,
            kernel_init=make.kernel_init,
            **make.dtypes,
        )
        self.up, self.down = make.linear(d, hidden, ("embed", "mlp")), make.linear(hidden, d, ("mlp", "embed"))
        self.activation = ACTIVATIONS[config.hidden_act]
        self.gamma1 = self.gamma2 = nnx.data(None)
        if config.layer_scale_init_value:
            start = jnp.full((d,), config.layer_scale_init_value, make.dtypes["param_dtype"])
            self.gamma1, self.gamma2 = nnx.Param(start, axes=("embed",)), nnx.Param(start, axes=("embed",))
        before = sum(config.depths[:level]) + block
        self.drop_rate = config.drop_path_rate * before / max(1, sum(config.depths) - 1)

    def __call__(self, x: Float[Array, "b y x d"], key: Key[Array, ""] | None = None) -> Float[Array, "b y x d"]:
        """Returns x after the block; with a key, branches are dropped for whole images."""
        keys = (None, None) if key is None else jax.random.split(key)
        x = x + self._branch(self._attend(self.norm1(x)), self.gamma1, keys[0])
        return x + self._branch(self.down(self.activation(self.up(self.norm2(x)))), self.gamma2, keys[1])

    def _attend(self, x):
        """Attention; an image smaller than a window is padded, and the padding attended to, as the published code."""
        height, width = x.shape[1:3]
        least = [w * d for w, d in zip(self.attention.window, self.attention.dilation, strict=True)]
        if height >= least[0] and width >= least[1]:
            return self.attention(x)
        wanted = (max(height, least[0]), max(width, least[1]))
        padded = jnp.pad(x, ((0, 0), (0, wanted[0] - height), (0, wanted[1] - width), (0, 0)))
        return self.attention(padded)[:, :height, :width]

    def _branch(self, y, gamma, key):
        if gamma is not None:
            y = gamma[...].astype(y.dtype) * y
        if key is None or not self.drop_rate:
            return y
        kept = jax.random.bernoulli(key, 1 - self.drop_rate, (y.shape[0], 1, 1, 1))
        return jnp.where(kept, y / (1 - self.drop_rate), 0)


class Level(nnx.Module):
    """Blocks, and the way to the next level.

    Attributes:
      blocks: nnx.List of `Block`. downsample: `Downsample`, or None in the last level.
    """

    def __init__(self, config: NATConfig, level: int, make: _Kinds):
        """Args:
        config: of the model. level: which one this is. make: of the model's parts.
        """
        self.blocks = nnx.List([Block(config, level, i, make) for i in range(config.depths[level])])
        last = level == len(config.depths) - 1
        self.downsample = nnx.data(None) if last else Downsample(config.width(level), make)

    def __call__(self, x: Float[Array, "b y x d"], key: Key[Array, ""] | None = None) -> Float[Array, "b y x d"]:
        """Returns x after the blocks, before any downsampling."""
        keys = [None] * len(self.blocks) if key is None else jax.random.split(key, len(self.blocks))
        for block, own in zip(self.blocks, keys, strict=True):
            x = block(x, own)
        return x


class NAT(nnx.Module):
    """A Neighborhood Attention Transformer (arXiv:2204.07143), dilated (DiNAT, arXiv:2209.15001) or not.

    Runs published checkpoints exactly (`portable.models.load`).

    Attributes:
      config: `NATConfig`.
      stem: `Stem`. levels: nnx.List of `Level`. norm: the last LayerNorm.
      head: Linear from the last level's channels to the classes, or None.
      dtype: of activations and matrix products.
    """

    def __init__(self, config: NATConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        """Args:
        config: sizes and options.
        dtype: of activations and matrix products; sums and the statistics of norms are float32.
        param_dtype: dtype of the Params.
        rngs: source of the initial Params.
        """
        self.config, self.dtype = config, dtype
        make = _Kinds(config, dtype, param_dtype, rngs)
        levels = range(len(config.depths))
        self.stem = Stem(config, make)
        self.levels = nnx.List([Level(config, i, make) for i in levels])
        d = config.width(levels[-1])
        self.norm = make.norm(d, config.layer_norm_eps)
        self.head = nnx.data(None)
        if config.num_labels:
            wide = jnp.promote_types(jnp.float32, dtype)
            self.head = make.linear(d, config.num_labels, ("embed", "vocab"), preferred_element_type=wide)

    def __call__(
        self, images: Float[Array, "b y x c"], *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "b labels"] | Float[Array, "b d"]:
        """Classifies images.

        Args:
          images: [b, height, width, c], normalised as the checkpoint wants it.
          key: in training, of the branches that are dropped (`drop_path_rate`); None drops none.

        Returns:
          logits [b, labels] in float32, or, without a head, the mean over the image of the last level [b, d].

        Raises:
          ValueError: images are not [b, height, width, c], or leave no position.
          TypeError: images are not floating point.
        """
        x = jnp.mean(
            self.norm(self._levels(images, key)[-1]).astype(jnp.promote_types(jnp.float32, self.dtype)), (1, 2)
        )
        x = x.astype(self.dtype)
        return x if self.head is None else self.head(x)

    def feature_maps(self, images: Float[Array, "b y x c"]) -> list[Float[Array, "b y x d"]]:
        """Returns each level's output [b, height / 2^l, width / 2^l, d 2^l] before downsampling, for use as a backbone.

        They are transformers' hidden states of DinatBackbone before the norm that a detector adds for itself.

        Args:
          images: as for a call.
        """
        return self._levels(images, None)

    def _levels(self, images, key) -> list:
        channels = self.config.num_channels
        if getattr(images, "ndim", None) != 4 or images.shape[-1] != channels or not all(images.shape[1:3]):
            found = list(images.shape) if hasattr(images, "shape") else type(images).__name__
            raise ValueError(f"NAT: images must be [b, height, width, {channels}], none empty; got {found}.")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise TypeError(
                f"NAT: images must be floating point; got {images.dtype}. Scale and normalise them first: "
                "(pixels / 255 - mean) / deviation."
            )
        x, maps = self.stem(images.astype(self.dtype)), []
        keys = [None] * len(self.levels) if key is None else jax.random.split(key, len(self.levels))
        for level, own in zip(self.levels, keys, strict=True):
            maps.append(level(x, own))
            if level.downsample is not None:
                x = level.downsample(maps[-1])
        return maps
