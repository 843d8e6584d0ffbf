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
# # Mixture of experts: many networks, each token through a few
#
# A router scores E networks for each token, and the token goes through the best k of them: the parameters of E networks
# at the cost of k. Published models differ in how they choose. Here the routers stand side by side, a small model is
# trained on real text while its experts' load is watched, and experts are made of a network that is already trained.

# %%
import functools
import math
import os
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from portable import nn, ops, training
from portable.training.stdlib import stdlib_text

FAST = os.environ.get("PORTABLE_FAST") == "1"  # small sizes, for automatic checks of this notebook

# %% [markdown]
# ## Routers side by side
#
# 24 tokens, 16 experts, one table of logits; some experts score higher than others on the whole, as they do in a router
# that nobody balances. `route_options` reads a published model's router from its `config.json`; the rest are options.

# %%
tokens, experts = 24, 16
draw = np.random.default_rng(0)
logits = jnp.asarray(draw.normal(size=(tokens, experts)) + draw.normal(size=experts), jnp.float32)

deepseek = ops.route_options(
    "deepseek_v3", {"num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.0}
)


def moved(_, bias):  # what training does once a step: up where the load is small, down where it is large
    return ops.updated_bias(bias, ops.expert_load(ops.route(logits, bias=bias, **deepseek)), rate=0.01)


bias = jax.lax.fori_loop(0, 300, moved, jnp.zeros(experts))

mixtral = ops.route(logits, **ops.route_options("mixtral", {}))
choice = ops.expert_choice(logits, factor=2.0)
routings = {
    "Mixtral: top 2 of the softmax": mixtral,
    "Qwen3: top 4": ops.route(logits, **ops.route_options("qwen3_moe", {"num_experts_per_tok": 4})),
    "GPT-OSS: top 4, then softmax": ops.route(logits, **ops.route_options("gpt_oss", {})),
    "DeepSeek-V3: 2 of 4 groups": ops.route(logits, **deepseek),
    "DeepSeek-V3, with its bias": ops.route(logits, bias=bias, **deepseek),
    "BlockFFN: ReLU, up to 8": ops.route(logits, top_k=8, score="relu_rms"),
    "MoE++: the last 2 yield nothing": ops.route(logits, top_k=2, zero_experts=2, renormalize=True),
    "capacity 3, in order": ops.limit_capacity(mixtral, 3),
    "capacity 3, best first": ops.limit_capacity(mixtral, 3, priority="score"),
    "capacity 3, else the next best": ops.limit_capacity(mixtral, 3, overflow="next"),
    "expert choice: 3 tokens each": choice,
}


def table(made):
    """Returns who goes where and with what weight, [tokens, experts] each."""
    chosen, weights = np.zeros((2, tokens, experts + 1))  # the last column is that of empty choices
    if isinstance(made, ops.ExpertChoice):
        places = np.asarray(made.indices), np.arange(experts)[:, None]
    else:
        places = np.arange(tokens)[:, None], np.asarray(made.indices)
    chosen[places], weights[places] = 1, made.weights
    return chosen[:, :experts] > 0, weights[:, :experts]


fig, axes = plt.subplots(2, 6, figsize=(15, 9), sharex=True, sharey=True, layout="constrained")
shown = axes[0, 0].imshow(logits, cmap="PuOr_r", vmin=-4, vmax=4, aspect="auto")
axes[0, 0].set_title("the logits", fontsize=9)
fig.colorbar(shown, ax=axes[0, 0], location="bottom", label="logit")
for ax, (name, made) in zip(axes.flat[1:], routings.items(), strict=True):
    chosen, weights = table(made)
    image = ax.imshow(np.where(chosen, weights, np.nan), cmap="viridis_r", vmin=0, vmax=1, aspect="auto")
    load = chosen.sum(0)
    title = f"{name}\nbusiest expert {load.max()}, idle {np.sum(load == 0)}"
    if "capacity" in name:
        lost = table(mixtral)[0] & ~chosen
        ax.scatter(*np.nonzero(lost)[::-1], s=22, marker="x", color="tab:red")
        title += f", {lost.sum()} {'moved' if 'next' in name else 'lost'}"
    if "MoE++" in name:
        ax.scatter(*np.nonzero(chosen & (weights == 0))[::-1], s=22, facecolors="none", edgecolors="tab:blue")
    for edge in (3.5, 7.5, 11.5) if "DeepSeek" in name else (13.5,) if "MoE++" in name else ():
        ax.axvline(edge, color="gray", linewidth=0.8)
    ax.set_title(title, fontsize=9)
fig.colorbar(
    image, ax=axes[1], location="bottom", shrink=0.4, aspect=40, label="weight (white: not chosen)", extend="max"
)
axes[0, 0].set(ylabel="token")
axes[1, 0].set(ylabel="token")
for ax in axes[1]:
    ax.set_xlabel("expert")
plt.show()

# %% [markdown]
# Red crosses are choices that found their expert full, blue rings those of an expert that yields nothing and costs
# nothing. Qwen3's weights sum to less than 1 unless its config says `norm_topk_prob`; then they are GPT-OSS's, as the
# softmax of the best is the normalised best of the softmax. The bias of DeepSeek-V3 evens the load by moving who is
# chosen, and never enters a weight. Expert choice fills every expert exactly, and may leave a token to nobody.

# %%
given = ops.route(logits, **ops.route_options("qwen3_moe", {"num_experts_per_tok": 4, "norm_topk_prob": True}))
apart = abs(given.weights - routings["GPT-OSS: top 4, then softmax"].weights).max()
print(f"Qwen3 normalised against GPT-OSS: weights differ by {float(apart)}")
alone = tokens - len(np.unique(choice.indices))
print(f"expert choice: {alone} of {tokens} tokens go to no expert")

# %% [markdown]
# ## Load over training
#
# A byte-level model of attention and `portable.nn.MoE`, trained on the source of Python's standard library: three times
# from the same start, once without any balancing, once with a load-balancing loss, once with the bias and no loss. The
# same compiled step does all three. Published models with experts are in `portable.models`; this one is written out, to
# show what its routers do.


# %%
class Block(nnx.Module):
    """Attention, then a feed-forward layer: dense, or of experts."""

    def __init__(self, d, ffn, rngs):
        self.norm1, self.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.attention = nn.Attention(d, num_heads=4, rngs=rngs)
        self.ffn = ffn

    def __call__(self, x, choose=None):
        x = x + self.attention(self.norm1(x))
        h = self.norm2(x)
        if isinstance(self.ffn, nn.MoE):
            y, routing = self.ffn(h, routing=choose and choose(self.ffn, h), return_routing=True)
            return x + y, routing
        return x + self.ffn(h), None


class Model(nnx.Module):
    """A language model over bytes."""

    def __init__(self, d, ffns, rngs):
        self.embed = nnx.Embed(256, d, rngs=rngs)
        self.layers = nnx.List([Block(d, ffn, rngs) for ffn in ffns])
        self.norm, self.head = nn.RMSNorm(d), nnx.Linear(d, 256, rngs=rngs)

    def __call__(self, tokens, choose=None):
        """Returns logits [b, t, 256] and the layers' routings."""
        x, routings = self.embed(tokens), []
        for layer in self.layers:
            x, routing = layer(x, choose)
            routings.append(routing)
        return self.head(self.norm(x)), routings


d, f, layers, e, k = (48, 96, 1, 8, 2) if FAST else (128, 256, 2, 8, 2)
length, batch_size, steps = (64, 8, 30) if FAST else (128, 8, 250)
router = {"num_experts": e, "top_k": k, "score": "sigmoid", "renormalize": True, "use_selection_bias": True}


rngs = nnx.Rngs(0)
untrained = Model(d, [nn.MoE(d, f, rngs=rngs, **router) for _ in range(layers)], rngs)


def parameters(model):
    return sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


idle = layers * (e - k) * 3 * d * f
total = parameters(untrained)
print(f"{total:,} parameters, {total - idle:,} of them active for a token")

# %%
text = stdlib_text()
windows, held_out = (
    training.Windows(training.pack(part, training.ByteTokenizer()), length) for part in (text.train, text.held_out)
)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-3))
unseen = [training.Batches(held_out, batch_size, 0)[i] for i in range(4 if FAST else 32)]


def nats(logits, targets):
    """Returns the mean cross-entropy of a batch."""
    each, counted = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0)), targets >= 0
    return jnp.where(counted, each, 0).sum() / counted.sum()


@functools.partial(jax.jit, static_argnums=0)
def step(graphdef, params, rest, moments, batch, balance, rate):
    """One step; `balance` is the factor of the loss that evens loads, `rate` the bias's step."""

    def objective(params):
        logits, routings = nnx.merge(graphdef, params, rest)(batch["tokens"])
        loss = nats(logits, batch["targets"])
        routings = [r for r in routings if r is not None]
        return loss + balance * sum(map(ops.load_balance_loss, routings)), (loss, list(map(ops.expert_load, routings)))

    (_, (loss, loads)), slopes = jax.value_and_grad(objective, has_aux=True)(params)
    updates, moments = optimizer.update(slopes, moments, params)
    model = nnx.merge(graphdef, optax.apply_updates(params, updates), rest)
    for layer, load in zip(model.layers, loads, strict=False):
        layer.ffn.update_bias(load, rate=rate)
    _, params, rest = nnx.split(model, nnx.Param, ...)
    return params, rest, moments, loss, loads


def train(model, *, steps=steps, start=0, balance=0.0, rate=0.0):
    """Returns the trained model, bits per byte at each step, and loads [steps, layers, E]."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    moments, losses, loads = optimizer.init(params), [], []
    batches = training.Batches(windows, batch_size, 0)
    for i in range(start, start + steps):
        params, rest, moments, loss, load = step(graphdef, params, rest, moments, batches[i], balance, rate)
        losses.append(loss)
        loads.append(load)
    return nnx.merge(graphdef, params, rest), np.asarray(losses) / math.log(2), np.asarray(loads)


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, state, batch):
    """Returns logits, routings and the loss in bits per byte."""
    logits, routings = nnx.merge(graphdef, state)(batch["tokens"])
    return logits, routings, nats(logits, batch["targets"]) / math.log(2)


def bits_per_byte(model):
    """Returns the model's loss on text that it was not trained on."""
    return float(np.mean([run(*nnx.split(model), batch)[2] for batch in unseen]))


kinds = {
    "nothing": {},
    "a loss, factor 0.01": {"balance": 0.01},
    "the bias, rate 0.01": {"rate": 0.01},
}
runs = {name: train(untrained, **kind) for name, kind in kinds.items()}


# %%
def smooth(values, width):
    """Returns means over `width` steps, of the first axis."""
    count = len(values) // width
    return values[: count * width].reshape(count, width, *values.shape[1:]).mean(1)


width = 5 if FAST else 10
at = (np.arange(steps // width) + 0.5) * width
fig, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
for ax, (name, (_, _, loads)) in zip(axes, runs.items(), strict=False):
    share = smooth(loads[:, -1] / loads[:, -1].sum(-1, keepdims=True), width)
    ax.stackplot(at, 100 * share.T, colors=plt.get_cmap("tab10").colors, edgecolor="white", linewidth=0.3)
    ax.set(title=f"balanced by {name}", xlabel="step", xlim=(at[0], at[-1]), ylim=(0, 100))
    busiest = smooth((loads.max(-1) / loads.mean(-1)).mean(-1), width)
    axes[3].plot(at, busiest, label=name)
axes[0].set_ylabel("share of each expert in the\nlast layer's load (%)")
axes[3].axhline(1, color="gray", linewidth=0.8)
axes[3].set(title="the busiest expert, mean of layers", xlabel="step", ylabel="its load / mean load", ylim=(0.9, None))
axes[3].legend()
plt.show()
for name, (model, _, loads) in runs.items():
    last = loads[-steps // 4 :]
    print(
        f"balanced by {name:20} busiest expert {(last.max(-1) / last.mean(-1)).mean():.2f} times the mean, "
        f"idlest {(last.min(-1) / last.mean(-1)).mean():.2f}; held-out {bits_per_byte(model):.3f} bits per byte"
    )

# %% [markdown]
# ## Who reads what
#
# Held-out code, every character in the colour of the expert that the model with the bias weighs most.

# %%
across, down = 64, 8
batch = jax.tree.map(lambda *rows: np.stack(rows), *(held_out[i] for i in range(batch_size)))
_, routings, _ = run(*nnx.split(runs["the bias, rate 0.01"][0]), batch)
letters = "".join(chr(byte) if byte < 128 else "?" for byte in batch["tokens"].ravel())
ends = np.cumsum([len(line) + 1 for line in letters.split("\n")])
long = [
    (end - len(line) - 1, line[: across - 1])
    for end, line in zip(ends, letters.split("\n"), strict=True)
    if line.strip()
]
fig, axes = plt.subplots(layers, 1, figsize=(12, 3.4 * layers), squeeze=False, layout="constrained")
colors = plt.get_cmap("tab10", 10)
for number, (ax, routing) in enumerate(zip(axes.flat, routings, strict=True), 1):
    best = np.take_along_axis(
        np.asarray(routing.indices), np.asarray(routing.weights).argmax(-1)[..., None], -1
    ).ravel()
    picture = np.full((down, across), np.nan)
    for row, (begin, line) in enumerate(long[-down - 1 : -1]):
        picture[row, : len(line)] = best[begin : begin + len(line)]
        for column, letter in enumerate(line):
            ax.text(column, row, letter, ha="center", va="center", family="monospace")
    image = ax.imshow(picture, cmap=colors, vmin=-0.5, vmax=9.5, alpha=0.5, aspect="auto")
    ax.set(title=f"layer {number}", xticks=[], yticks=[])
fig.colorbar(image, ax=axes, label="expert", ticks=range(e), boundaries=np.arange(-0.5, e))
plt.show()

# %% [markdown]
# ## Experts of a dense model
#
# `moe_from_dense(how="copy")` makes every expert a copy of a trained network (sparse upcycling). As a token's weights
# sum to 1, the model is at first exactly the dense one, whatever the router chooses. Trained on, the experts part,
# because each gets other tokens. Both go on from the same weights, with fresh optimizers, on the same batches.

# %%
rngs = nnx.Rngs(1)
dense, before, _ = train(Model(d, [nn.GatedMLP(d, f, rngs=rngs) for _ in range(layers)], rngs))


def with_experts(model, how, **options):
    """Returns the model with its feed-forward layers made into experts."""
    rngs = nnx.Rngs(2)
    made = nnx.clone(model)
    for layer in made.layers:
        kernels = (jnp.asarray(part.kernel[...]) for part in (layer.ffn.gate, layer.ffn.up, layer.ffn.down))
        layer.ffn = nn.moe_from_dense(*kernels, how=how, rngs=rngs, **options)
    return made


upcycled = with_experts(dense, "copy", **router)
logits = run(*nnx.split(dense), unseen[0])[0]
print("largest difference of a logit:", float(abs(run(*nnx.split(upcycled), unseen[0])[0] - logits).max()))
print(f"{parameters(dense):,} parameters become {parameters(upcycled):,}")
on_dense, dense_curve, _ = train(dense, start=steps)
on_experts, experts_curve, _ = train(upcycled, start=steps, rate=0.01)
from_scratch = runs["the bias, rate 0.01"][1]

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(12, 3.8), layout="constrained", width_ratios=[3, 2])
later = at + steps
left.plot(at, smooth(before, width), color="tab:gray", label="dense")
left.plot(at, smooth(from_scratch, width), color="tab:green", linestyle=":", label="experts from the start")
left.plot(later, smooth(dense_curve, width), color="tab:blue", label="dense, goes on")
left.plot(later, smooth(experts_curve, width), color="tab:orange", linestyle="--", label=f"upcycled to {e} experts")
left.axvline(steps, color="gray", linewidth=0.8)
left.set(xlabel="step", ylabel="loss on training text (bits per byte)")
left.legend()
right.plot(later, smooth(dense_curve - experts_curve, width), color="tab:orange")
right.axhline(0, color="gray", linewidth=0.8)
right.set(title="what upcycling gains, batch by batch", xlabel="step", ylabel="dense - upcycled (bits per byte)")
plt.show()
print(f"held-out bits per byte: dense {bits_per_byte(on_dense):.3f}, upcycled {bits_per_byte(on_experts):.3f}")

# %% [markdown]
# `how="split"` cuts the network into E slices instead (FactorLLM): as many parameters as before, and with all slices
# active at weight 1 the same outputs. With fewer active it matters which: slices at random, or those whose output is
# largest for the token, which a router has to guess without computing them.

# %%
sliced = with_experts(dense, "split", num_experts=e, top_k=e)


@functools.partial(jax.jit, static_argnums=0)
def slices_loss(graphdef, state, batch, active, by_size):
    """Returns the logits and their loss with `active` slices for each token."""

    def choose(ffn, h):
        inner = jax.nn.silu(jnp.einsum("btd,edf->btef", h, ffn.gate[...])) * jnp.einsum("btd,edf->btef", h, ffn.up[...])
        size = jnp.linalg.norm(jnp.einsum("btef,efd->bted", inner, ffn.down[...]), axis=-1)
        order = jnp.argsort(-jnp.where(by_size, size, jax.random.uniform(jax.random.key(0), size.shape)), axis=-1)
        on = jnp.broadcast_to(jnp.arange(e) < active, order.shape)
        return ops.Routing(jnp.where(on, order.astype(jnp.int32), e), on.astype(jnp.float32), e)

    logits, _ = nnx.merge(graphdef, state)(batch["tokens"], choose)
    return logits, nats(logits, batch["targets"]) / math.log(2)


every, _ = slices_loss(*nnx.split(sliced), unseen[0], e, True)
print("all slices against dense, largest difference of a logit:", float(abs(every - logits).max()))
plt.figure(figsize=(6, 3.4))
for name, by_size in {"at random": False, "with the largest outputs": True}.items():
    curve = [
        np.mean([slices_loss(*nnx.split(sliced), batch, active, by_size)[1] for batch in unseen[: 1 if FAST else 8]])
        for active in range(1, e + 1)
    ]
    plt.plot(range(1, e + 1), curve, "o-", label=f"slices {name}")
plt.xlabel(f"active slices of {e}")
plt.ylabel("held-out bits per byte")
plt.legend()
plt.show()

# %% [markdown]
# ## Speed
#
# On a processor `jax.lax.ragged_dot` multiplies every row with every expert; `ops.moe_ffn` walks over tiles of each
# expert's own rows. Below, `moe_ffn` in the form that this platform gets, the same op on `ragged_dot` (`xla_ragged`,
# which is what a TPU gets), and one dense network on as many rows.


# %%
def milliseconds(programs, rounds=3 if FAST else 15):
    """Returns each program's median; they take turns, so that a busy machine slows all of them."""
    for fn, args in programs.values():
        jax.block_until_ready(fn(*args))
    taken = {name: [] for name in programs}
    for _ in range(rounds):
        for name, (fn, args) in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(fn(*args))
            taken[name].append(1e3 * (time.perf_counter() - begin))
    return {name: float(np.median(times)) for name, times in taken.items()}


def one_network(x, w_gate, w_up, w_down):
    return (jax.nn.silu(x @ w_gate) * (x @ w_up)) @ w_down


ours = jax.jit(ops.moe_ffn)
ragged = jax.jit(functools.partial(ops.moe_ffn, implementation="xla_ragged"))
wide, inner = (128, 256) if FAST else (512, 1024)
print(f"d = {wide}, f = {inner}, float32, {jax.default_backend()}; medians in ms")
print(
    f"{'tokens':>7} {'k':>3} {'experts':>8} {'moe_ffn':>9} {'ragged_dot':>11} {'dense':>7} {'ragged_dot / moe_ffn':>21}"
)
for count, k_, e_ in [(256, 4, 16)] if FAST else [(512, 2, 8), (512, 4, 32), (2048, 2, 8)]:
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (count, wide))
    weights = [0.02 * jax.random.normal(key, (e_, wide, inner)) for key in keys[1:3]]
    weights.append(0.02 * jax.random.normal(keys[3], (e_, inner, wide)))
    routing = ops.route(jax.random.normal(keys[4], (count, e_)), top_k=k_, renormalize=True)
    rows = jnp.repeat(x, k_, axis=0)
    took = milliseconds(
        {
            "ours": (ours, (x, *weights, routing)),
            "ragged": (ragged, (x, *weights, routing)),
            "dense": (jax.jit(one_network), (rows, *(w[0] for w in weights))),
        }
    )
    print(
        f"{count:7} {k_:3} {e_:8} {took['ours']:9.2f} {took['ragged']:11.2f} {took['dense']:7.2f} "
        f"{took['ragged'] / took['ours']:21.1f}"
    )
