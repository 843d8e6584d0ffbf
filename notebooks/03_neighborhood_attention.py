# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V5E1
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: accelerator,colab,kernelspec,jupytext
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% tags=["skip-execution"]
# %pip install -qU 'portable-jax[train] @ git+https://github.com/OWNER/portable' matplotlib
# On Colab: if a later cell says that jax is too old, choose Runtime > Restart session and go on from there.

# %% [markdown]
# # Neighborhood attention: each position attends to those around it
#
# On an image of n positions, attention of all to all costs n^2. Neighborhood attention gives each position a window
# around it: here over one, two or three axes, with strides, dilation and causal axes, differentiable, on any device.
# The patterns are those of [NATTEN](https://arxiv.org/abs/2504.16922); the models are NAT and DiNAT.

# %%
import os
import tempfile
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from portable import ops, training
from portable.models.nat import NAT, NATConfig

FAST = os.environ.get("PORTABLE_FAST") == "1"  # small sizes, for automatic checks of this notebook

# %% [markdown]
# ## What a query sees
#
# With keys of zero all weights of a window are equal. If each position's value is a vector with a one in its own place,
# the result at a query *is* the picture of what it sees.


# %%
def seen(query, space=(12, 12), **pattern):
    """Returns the weights [y, x] of the window of the query at (y, x)."""
    n = space[0] * space[1]
    zeros = jnp.zeros([1, *space, 1, 4])
    own = jnp.eye(n).reshape(1, *space, 1, n)
    return np.asarray(ops.neighborhood_attention(zeros, zeros, own, **pattern)[0, *query, 0]).reshape(space)


patterns = {
    "window 5": {"window": 5},
    "at a border the window shifts": {"window": 5},
    "window 3, dilation 3": {"window": 3, "dilation": 3},
    "window 5, stride 4: queries of a\ngroup share a window": {"window": 5, "stride": 4},
    "stride = window: blocks": {"window": 4, "stride": 4},
    "causal downwards": {"window": 5, "is_causal": (True, False)},
    "causal on both axes": {"window": 5, "is_causal": True},
    "window (3, 9)": {"window": (3, 9)},
}
fig, axes = plt.subplots(2, 4, figsize=(11, 6.5))
for ax, (title, pattern) in zip(axes.flat, patterns.items(), strict=True):
    query = (0, 1) if "border" in title else (4, 7) if "share" in title else (6, 6)
    ax.imshow(seen(query, **pattern) > 0, cmap="Blues", vmin=0, vmax=1.6)
    ax.plot(query[1], query[0], "o", color="tab:red")
    ax.set_title(title, fontsize=9)
    ax.set_xticks([])
    ax.set_yticks([])
fig.suptitle("the query in red, what it sees in blue")
fig.tight_layout()
plt.show()

# %% [markdown]
# ## What it costs
#
# `neighborhood_plan` counts, before anything runs, the products that the form for a platform computes. Their number
# against that of dense attention bounds the speedup; beside it stands what this machine does.

# %%
sides = [16, 28] if FAST else [28, 56, 84]
window, heads, width = 7, 4, 32


def milliseconds(f, *arrays, rounds=3 if FAST else 7):
    f = jax.jit(f)
    jax.block_until_ready(f(*arrays))
    taken = []
    for _ in range(rounds):
        begin = time.perf_counter()
        jax.block_until_ready(f(*arrays))
        taken.append(1e3 * (time.perf_counter() - begin))
    return float(np.median(taken))


measured, bound = [], []
for side in sides:
    q = jax.random.normal(jax.random.key(0), (1, side, side, heads, width))
    flat = q.reshape(1, side * side, heads, width)
    near = milliseconds(lambda q: ops.neighborhood_attention(q, q, q, window=window), q)
    dense = milliseconds(lambda q: jax.nn.dot_product_attention(q, q, q), flat)
    measured.append(dense / near)
    plan = ops.neighborhood_plan((side, side), window, heads=heads, dim=width, platform=jax.default_backend())
    bound.append(plan.speedup)
    print(f"{side} x {side}: {near:.1f} ms, all to all {dense:.1f} ms; tiles of {plan.tile} queries, {plan.width} keys")

places = np.arange(len(sides))
plt.figure(figsize=(6, 3))
plt.bar(places - 0.2, measured, 0.4, label="measured here")
plt.bar(places + 0.2, bound, 0.4, label="by the number of products")
plt.xticks(places, [f"{side} x {side}" for side in sides])
plt.ylabel("times as fast as all to all")
plt.title(f"window of {window} x {window}, {heads} heads of {width}")
plt.legend()
plt.show()

# %% [markdown]
# ## Train a DiNAT
#
# scikit-learn's digits are 8 x 8 pixels. A stem of stride 1 makes each pixel a position; windows of 3, every second one
# with dilation 2, reach over the image in a few layers. `portable train digits --task image` does the same.

# %%
images = training.read_digits()
config = NATConfig(
    embed_dim=32,
    depths=(2, 2),
    num_heads=(2, 4),
    kernel_size=3,
    dilations=((1, 2), (1, 1)),
    patch_size=1,
    num_channels=1,
    num_labels=len(images.classes),
    labels=images.classes,
)
model = NAT(config, rngs=nnx.Rngs(0))
options = training.TrainOptions(
    steps=10 if FAST else 700,
    batch_size=64,
    learning_rate=5e-3,
    weight_decay=0.05,
    warmup=5 if FAST else 70,
    eval_every=100,
)
run = training.fit(model, training.ImageTask(images), options, tempfile.mkdtemp())
model = run.model
found = training.classify(model, images.held_out, images.preprocess)
print(f"{100 * found.accuracy:.1f} % of {len(images.held_out)} held-out images")

# %% [markdown]
# ## Look at its attention
#
# The same trick with a trained layer's own queries and keys gives its weights.


# %%
def layer_weights(attention, u):
    """Returns [heads, y, x, y', x']: how much each position (y, x) takes from (y', x')."""
    _, height, across, _ = u.shape
    n = height * across
    q, k = (
        f(u).reshape(1, height, across, attention.num_heads, attention.head_dim)
        for f in (attention.query, attention.key)
    )
    own = jnp.broadcast_to(jnp.eye(n).reshape(1, height, across, 1, n), (1, height, across, attention.num_heads, n))
    pattern = {"window": attention.window, "dilation": attention.dilation}
    weights = ops.neighborhood_attention(q, k, own, rel_pos_bias=attention.rel_pos_bias[...], **pattern)
    return np.asarray(weights[0]).transpose(2, 0, 1, 3).reshape(attention.num_heads, height, across, height, across)


digit = images.preprocess(np.asarray(images.held_out.pixels[:1]))
block = model.levels[0].blocks[1]
before = model.levels[0].blocks[0](model.stem(jnp.asarray(digit)))
weights = layer_weights(block.attention, block.norm1(before))
fig, axes = plt.subplots(1, 4, figsize=(11, 3))
axes[0].imshow(digit[0, ..., 0], cmap="gray_r")
axes[0].set_title(f"a {images.classes[int(images.held_out.labels[0])]}")
for ax, query in zip(axes[1:], [(2, 3), (4, 4), (6, 2)], strict=True):
    ax.imshow(digit[0, ..., 0], cmap="gray_r", alpha=0.4)
    ax.imshow(weights[:, *query].mean(0), cmap="Reds", alpha=0.6)
    ax.plot(query[1], query[0], "o", color="tab:blue")
    ax.set_title(f"what {query} takes, dilation {block.attention.dilation[0]}", fontsize=9)
for ax in axes:
    ax.set_xticks([])
    ax.set_yticks([])
fig.tight_layout()
plt.show()
