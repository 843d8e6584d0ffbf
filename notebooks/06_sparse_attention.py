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
# # Sparse attention: which keys a query looks at
#
# Attention to all of a long text spends most of its work on keys whose weight is next to nothing. MoBA, NSA, InfLLM-V2,
# DeepSeek's indexer and their kin choose, before they attend, the blocks or tokens that matter. In `portable.ops` each
# is a function from queries and keys to a list, and one op, `block_sparse_attention`, attends to what a list names.
# Here they choose on the attention of a model that was trained to find values in a text.

# %%
import functools
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from IPython.display import Image

from portable import cli, nn, ops
from portable.training import progress, recall

FAST = os.environ.get("PORTABLE_FAST") == "1"  # small sizes, for automatic checks of this notebook

# %% [markdown]
# ## A model that looks things up
#
# Texts are cut out of the source of Python's standard library. Records of a key and a value stand in them, a token
# each, and at the end come keys alone: the model has to say each one's value. Full attention learns that in minutes.

# %%
sizes = recall.QUICK if FAST else recall.Sizes(length=512)
model, losses = recall.train(recall.small_model(sizes), sizes, progress.Lines() if FAST else progress.reporter())
questions = recall.Questions(held_out=True)
batch = questions.batch("recall", 8, sizes.length, seed=0)
logits, hidden = jax.jit(lambda tokens: model(tokens, return_hidden=True))(jnp.asarray(batch["tokens"]))
print(f"values found in texts that it has never seen: {recall.correct(logits, batch['targets']):.0%}")

# %% [markdown]
# ## What each selector picks
#
# One text, and the attention from the keys that are asked at its end, in the layer and head that look most sharply.
# What a method lets a query see is drawn over it in blue: a quarter of the keys, as blocks of 16 or as tokens.

# %%
t, block = sizes.length, 16
late = slice(int(np.flatnonzero(batch["targets"][0] >= 0)[0]), t)  # the questions


def indexer(q, k):
    """Returns what DeepSeek's indexer is given; nobody trained one here, so the layer's own heads do."""
    (b, t, h, d), g = q.shape, k.shape[2]
    group = jax.nn.one_hot(jnp.arange(h) * g // h, g)
    return jnp.einsum("bthd,hg->bthgd", q, group).reshape(b, t, h, g * d), k.reshape(b, t, g * d), jnp.ones((b, t, h))


def selectors(q, k, budget):
    """Returns {method: (list, queries of a block, keys of a block, order of keys or None)}."""
    n = max(3, budget // block)
    pbs = ops.select_pbs(q, k, block_q=block, block_k=block, segment=2 * block, threshold=1.0, budget=n)
    nsa = {"kernel": block, "stride": block, "block_k": block, "top_k": n, "s": k.shape[1]}
    infllm = {"kernel": 8, "stride": 4, "block_k": block, "top_k": n, "window": block}
    return {
        "MoBA": (ops.select_moba(q, k, block_k=block, top_k=n), 1, block, None),
        "NSA": (ops.select_nsa(q, ops.block_means(k, block), **nsa), 1, block, None),
        "InfLLM-V2": (ops.select_infllm(q, k, **infllm), 1, block, None),
        "DSA": (ops.select_dsa(*indexer(q, k), top_k=budget), 1, 1, None),
        "HISA": (ops.select_hisa(*indexer(q, k), block_k=block, blocks=2 * n, top_k=budget), 1, 1, None),
        "PBS-Attn": (pbs.block_indices, block, block, pbs.kv_order),
        "Spark": (ops.select_spark(q, k, top_k=budget, budget=budget), 1, 1, None),
        "S2O": (ops.select_s2o(q, k, block_q=block, block_k=block, tau=0.02, budget=n), block, block, None),
    }


def seen(chosen, block_q, block_k, order, t, heads):
    """Returns [heads, t, t], what the queries of the first row see."""
    block_q, block_k = int(block_q), int(block_k)
    chosen = np.repeat(np.asarray(chosen[0]), heads // chosen.shape[1], 0)
    of = np.arange(t)[None].repeat(heads, 0)
    if order is not None:  # the place of each key
        of = np.argsort(np.repeat(np.asarray(order[0]), heads // order.shape[1], 0), -1)
    mask = np.zeros((heads, t, -(-t // block_k) + 1), bool)
    rows = np.minimum(np.arange(t) // block_q, chosen.shape[1] - 1)
    np.put_along_axis(mask, chosen[:, rows], True, -1)
    mask[:, :, -1] = False  # where lists are padded
    return np.take_along_axis(mask, (of // block_k)[:, None].repeat(t, 1), -1) & np.tril(np.ones((t, t), bool))


def weights(q, k):
    """Returns the softmax of full attention, [heads, t, t], of the first row."""
    r = q.shape[2] // k.shape[2]
    x = jnp.einsum("thd,shd->hts", q[0], jnp.repeat(k[0], r, 1)) * q.shape[-1] ** -0.5
    return np.asarray(jax.nn.softmax(jnp.where(np.tril(np.ones((t, t), bool)), x, -jnp.inf), -1))


def heads_of(layer, x):
    """Returns queries, keys and values of a layer's heads."""
    return layer.mixer._project(layer.mixer_norm(x), jnp.arange(t), jnp.full(x.shape[:1], t))


def sharpness(layer, x):
    """Returns the mean highest weight of each head from the questions."""
    return weights(*heads_of(layer, x)[:2])[:, late].max(-1).mean(-1)


layer, x = max(zip(model.layers, hidden, strict=False), key=lambda pair: sharpness(*pair).max())
head, (q, k, v) = int(sharpness(layer, x).argmax()), heads_of(layer, x)
full, heads = weights(q, k), q.shape[2]
found = jax.jit(functools.partial(selectors, budget=t // 4))(q, k)
masks = {name: seen(*choice, t, heads) for name, choice in found.items()}
fig, axes = plt.subplots(3, 3, figsize=(14, 9), layout="constrained", sharex=True, sharey=True)
for ax, name in zip(axes.flat, ("full attention", *masks), strict=True):
    extent = (0, t, t, late.start)
    ax.imshow(np.log10(full[head, late] + 1e-6), cmap="Greys", vmin=-5, vmax=0, aspect="auto", extent=extent)
    if name in masks:
        blue = np.zeros((t - late.start, t, 4))
        blue[..., 2], blue[..., 3] = 1, 0.3 * masks[name][head, late]
        ax.imshow(blue, aspect="auto", extent=extent, interpolation="nearest")
        kept = (full * masks[name])[:, late].sum(-1).mean()
        ax.set_title(f"{name}: {kept:.0%} of the weight on {masks[name][:, late].mean():.0%} of the keys", fontsize=10)
    else:
        ax.set_title("full attention, logarithm of the weight", fontsize=10)
for ax in axes[:, 0]:
    ax.set_ylabel("query")
for ax in axes[-1]:
    ax.set_xlabel("key")
plt.show()

# %% [markdown]
# NSA and InfLLM-V2 choose for the heads of a group together, by a softmax over summaries; MoBA lets every head choose
# by the means of blocks. DSA and HISA choose single tokens, all heads the same. PBS-Attn sorts the keys of a segment
# before it cuts them into blocks, so that its blocks are not runs of the text. Spark cuts where the scores' mean and
# deviation say, without sorting; S2O takes blocks in the order of their importance until the next adds too little.
#
# ## How much of the weight is kept
#
# The share of full attention's weight that falls on what is chosen, over the share of keys, for the keys that are
# asked, all heads together. Exact top-k of the scores is what no selector can beat.

# %%
shares = {name: [] for name in ("exact top-k", *masks)}
for budget in [n for n in (t // 16, t // 8, t // 4, t // 2) if n >= 3 * block]:
    found = jax.jit(functools.partial(selectors, budget=budget))(q, k)
    for name, choice in found.items():
        mask = seen(*choice, t, heads)
        shares[name].append((mask[:, late].sum(-1).mean() / t, (full * mask)[:, late].sum(-1).mean()))
    best = np.sort(full[:, late], -1)[..., ::-1][..., :budget].sum(-1).mean()
    shares["exact top-k"].append((budget / t, best))
fig, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
for (name, points), marker in zip(shares.items(), "_osD^vP*X", strict=True):
    style = {"color": "black", "linestyle": ":"} if name == "exact top-k" else {}
    ax.plot(*zip(*points, strict=True), marker=marker, label=name, **style)
ax.set(xlabel="share of keys that a query sees", ylabel="share of the weight kept", ylim=(0, 1.03))
ax.grid(alpha=0.25)
ax.legend(ncols=2, fontsize=8)
plt.show()

# %% [markdown]
# ## The same weights, dense and sparse
#
# `nn.MoBA` and `nn.InfLLMv2Attention` have the Params of `nn.Attention`: a dense checkpoint loads into them, and
# `is_sparse` switches at any time. Their state keeps sums of blocks, so that a step reads what it selects; token by
# token it gives what the whole sequence gives.

# %%
options = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "rope": layer.mixer.rope}
sparse = nn.MoBA(sizes.width, block_size=16, top_k=6, rngs=nnx.Rngs(0), **options)
nnx.update(sparse, nnx.state(nn.Attention(sizes.width, rngs=nnx.Rngs(1), **options)))
u = layer.mixer_norm(x)[:1, : 96 if FAST else 256]
whole = sparse(u)
step, state, steps = jax.jit(lambda u, state: sparse.step(u, state)), sparse.init_state(1, u.shape[1]), []
for i in range(u.shape[1]):
    y, state = step(u[:, i], state)
    steps.append(y)
print("token by token against the whole, largest difference:", float(abs(jnp.stack(steps, 1) - whole).max()))
sparse.is_sparse = False
print("sparse against dense, largest difference:", float(abs(sparse(u) - whole).max()))

# %% [markdown]
# ## Quality against cost
#
# `portable bench sparse` does the study as a whole: it trains the model, asks it questions with every method in place
# of attention at several budgets, and counts, times and draws. Work is counted in the traced program; time and memory
# are of this machine, and of short texts: what selection saves grows with their length.

# %%
few = ["--quick", "--method", "MoBA", "--method", "window"] if FAST else ["--prompt", "1024"]
cli.main(["bench", "sparse", *few, "--plot", "sparse_attention.png"])
Image("sparse_attention.png")
