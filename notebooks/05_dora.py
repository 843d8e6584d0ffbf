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
# # DoRA: a model learns beside its own weights
#
# LoRA adds a product of two thin matrices to a frozen weight, $W + sAB$. DoRA takes each column of that sum for a
# direction and learns its length $m$ apart: $m\,(W + sAB)\,/\,\|W + sAB\|$. Here a small model that has read nothing
# but code learns prose, once in each way, from the same start and the same batches; what moved is pictured, and the
# adapter goes to PEFT and back.

# %%
import importlib.util
import os
import tempfile
import warnings
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import portable
from portable import adapters, models, training

FAST = os.environ.get("PORTABLE_FAST") == "1"  # small sizes, for automatic checks of this notebook
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Fine-tune
#
# The model comes with portable: Mamba-2 over bytes, trained on the source of Python's standard library. It learns from
# the language's reference manual. `training.fit` runs an `AdapterTask`: only the adapter is differentiated, kept by the
# optimizer and saved, and DoRA's norms are computed once a step. A run may be left at any step and taken up again by
# the same call: so the model can be looked at on its way.

# %%
tokenizer = training.ByteTokenizer()
manual = "\n\n".join(topics[name].strip() for name in sorted(topics)).encode()
cut = len(manual) * 19 // 20
text = training.Text(
    (training.Document("manual", manual[:cut], ends=False),),
    (training.Document("manual", manual[cut : cut + (2000 if FAST else 20000)]),),
    "the last twentieth",
)
examples = training.text_examples(text, tokenizer)


def base():
    return models.load(models.EMBEDDED, jnp.float32)


rank = 8
where = adapters.default_targets(base(), rank=rank)  # as PEFT's all-linear, without what PEFT would refuse
kinds = {
    "LoRA": adapters.LoRAConfig(rank=rank, alpha=2 * rank, **where),
    "DoRA": adapters.DoRAConfig(rank=rank, alpha=2 * rank, **where),
}
steps, length, batch_size = (8, 64, 2) if FAST else (160, 256, 4)
stops = (steps,) if FAST else (steps // 16, steps // 4, steps)
options = training.TrainOptions(
    steps=steps,
    batch_size=batch_size,
    length=length,
    learning_rate=5e-3,
    warmup=steps // 16,
    weight_decay=0.0,
    eval_every=steps // 4,
    eval_bytes=20000,
)


def train(name, config):
    """Returns {step: the model there} and the log."""
    reached = {}
    for stop in stops:
        model = base()
        adapters.apply(model, config, rngs=nnx.Rngs(0))
        task = training.AdapterTask(examples, config, base=str(models.EMBEDDED))
        reached[stop] = training.fit(model, task, options, folder / name, until=stop).model
    return reached, training.read_log(folder / name / "log.jsonl")


runs = {name: train(name, config) for name, config in kinds.items()}
for name, (reached, _) in runs.items():
    count, total = (
        sum(x.size for x in jax.tree.leaves(nnx.state(reached[steps], kind)))
        for kind in (adapters.AdapterParam, nnx.Param)
    )
    print(f"{name}: {count:,} parameters learn beside {total - count:,}")

# %%
colors = {"LoRA": "tab:blue", "DoRA": "tab:orange"}
fig, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 3.8), layout="constrained")
width = max(1, steps // 16)
losses = {name: np.asarray([r["loss"] for r in log]) / np.log(2) for name, (_, log) in runs.items()}
wide = {"LoRA": 5, "DoRA": 1.5}  # they lie on each other
for name, (_, log) in runs.items():
    smooth = np.convolve(losses[name], np.ones(width) / width, "valid")
    at = np.arange(len(smooth)) + 1 + (width - 1) / 2
    left.plot(at, smooth, color=colors[name], linewidth=wide[name], label=name)
    held = [(r["step"], r["held_out_bits_per_byte"]) for r in log if "held_out_bits_per_byte" in r]
    right.plot(*zip(*held, strict=True), "o-", color=colors[name], linewidth=wide[name], label=name)
    shift = (0, 8) if name == "LoRA" else (0, -16)
    style = {"color": colors[name], "ha": "center", "textcoords": "offset points"}
    right.annotate(f"{held[-1][1]:.4f}", held[-1], xytext=shift, **style)
left.set(title=f"the batch, mean of {width} steps", xlabel="step", ylabel="bits per byte")
middle.axhline(0, color="gray", linewidth=0.8)
middle.plot(np.arange(steps) + 1, 1000 * (losses["DoRA"] - losses["LoRA"]), color="tab:green", linewidth=1)
middle.set(title="the batch, DoRA less LoRA", xlabel="step", ylabel="thousandths of a bit per byte")
right.set(title="held-out prose", xlabel="step", ylabel="bits per byte")
right.margins(x=0.12, y=0.15)
for ax in (left, middle, right):
    ax.grid(alpha=0.25)
for ax in (left, right):
    ax.legend(frameon=False)
plt.show()

# %% [markdown]
# At this size and in so few steps, the two learn the same: what differs is how, as the pictures further down show.

# %% [markdown]
# ## Before and after
#
# The same words continued by the model alone, and with its adapter. `adapters.disable` is the model as it was; nothing
# of it was changed.

# %%
prompt = 'The "with" statement '
tokens = np.asarray(tokenizer.encode(prompt.encode()), np.int32)[None]


def continued(model):
    made = portable.generation.generate(
        model, tokens, max_new_tokens=24 if FAST else 200, temperature=0.6, key=jax.random.key(1)
    )
    return tokenizer.decode(np.asarray(made.tokens[0])).decode(errors="replace")


learned = runs["DoRA"][0][steps]
adapters.refresh(learned)  # once before inference: the norms are then kept
print("before:", prompt + continued(base()), "\n\nafter:", prompt + continued(learned), sep="\n")

# %% [markdown]
# ## Magnitude and direction
#
# How far the columns of each matrix went, as in the paper (Liu et al. 2024): the mean change of their lengths, and the
# mean of one minus the cosine between a column and what it was. LoRA has one way to do both; DoRA has a parameter for
# the first.


# %%
def columns(model):
    """Returns the adapted matrices [d, o] by name, with the adapter merged into them."""
    found = {}
    for number, layer in enumerate(model.layers):
        for part in ("in_z", "in_x", "in_B", "in_C"):
            found[f"{number}.{part}"] = np.asarray(getattr(layer.mixer, part).kernel[...], np.float64)
    return found


def moved(before, after):
    """Returns the relative change of each column's length, and one minus the cosine of the angle it turned by."""
    long, now = (np.linalg.norm(w, axis=0) for w in (before, after))
    return now / long - 1, 1 - (before * after).sum(0) / (long * now)


start = columns(base())
changes = {
    name: {step: {k: moved(start[k], w) for k, w in columns(adapters.merge(m)).items()} for step, m in reached.items()}
    for name, (reached, _) in runs.items()
}
parts = {"in_z": "o", "in_x": "s", "in_B": "^", "in_C": "v"}
fig, axes = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained", sharex=True, sharey=True)
for ax, (name, steps_of) in zip(axes, changes.items(), strict=True):
    for i, (step, matrices) in enumerate(steps_of.items()):
        shade = plt.get_cmap("viridis")(0.9 - 0.8 * i / max(1, len(steps_of) - 1))
        for part, marker in parts.items():
            points = [
                (turn.mean(), np.abs(size).mean()) for key, (size, turn) in matrices.items() if key.endswith(part)
            ]
            label = f"step {step}" if part == "in_z" else None
            ax.scatter(*zip(*points, strict=True), marker=marker, color=shade, s=32, label=label)
    ax.set(title=name, xlabel="change of direction, mean of 1 - cosine", xscale="log", yscale="log")
    ax.grid(alpha=0.25)
for part, marker in parts.items():
    axes[1].scatter([], [], marker=marker, color="gray", label=part)
axes[0].set_ylabel("change of length, mean of |relative change|")
axes[1].legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# LoRA's columns get longer as they turn: the points lie on a line, step after step. DoRA's turn as far, while their
# lengths settle at a few percent, whatever the angle. Below, each channel of one projection in each layer: LoRA's
# columns mostly grow, some of the last layers' by nearly a third; DoRA's magnitudes shrink as well.

# %%
fig, axes = plt.subplots(2, 1, figsize=(12, 4.4), layout="constrained", sharex=True)
tables = {n: np.stack([c[steps][f"{i}.in_x"][0] for i in range(len(learned.layers))]) for n, c in changes.items()}
most = max(np.abs(t).max() for t in tables.values())
for ax, (name, table) in zip(axes, tables.items(), strict=True):
    image = ax.imshow(100 * table, cmap="RdBu_r", vmin=-100 * most, vmax=100 * most, aspect="auto")
    ax.set(title=f"{name}: length of the columns of in_x", ylabel="layer")
axes[1].set_xlabel("channel")
fig.colorbar(image, ax=axes, label="change (%)")
plt.show()

# %% [markdown]
# ## To PEFT and back
#
# `save_peft` writes what PEFT writes. The checkpoint's `in_proj` is one matrix, whose blocks are layers of their own
# here: their factors stand side by side in the file. Where PEFT is installed, torch runs the same adapter.

# %%
adapters.save_peft(learned, folder / "adapter", base_model=str(models.EMBEDDED))
for path in sorted((folder / "adapter").iterdir()):
    print(f"{path.name}: {path.stat().st_size:,} bytes")
again = base()
adapters.load_peft(again, folder / "adapter")
sample = np.asarray(tokenizer.encode(manual[cut : cut + 100]), np.int32)[None]
wanted = np.asarray(learned(sample))
print(f"read back: logits differ by {np.abs(again(sample) - wanted).max() / np.abs(wanted).max():.1e} of the largest")
if all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft")):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        theirs = transformers.AutoModelForCausalLM.from_pretrained(models.EMBEDDED, dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(theirs, folder / "adapter").eval()
        with torch.no_grad():
            got = theirs(torch.tensor(sample.astype(np.int64))).logits.numpy()
    print(f"in PEFT: logits differ by {np.abs(got - wanted).max() / np.abs(wanted).max():.1e} of the largest")
else:
    print("PEFT is not installed here: pip install torch transformers peft")

# %% [markdown]
# ## Several adapters in one batch
#
# Each row of a batch may have its own adapter, or none, over one product with the frozen weight.

# %%
both = base()
for name, (reached, _) in runs.items():
    adapters.save_peft(reached[steps], folder / f"{name} adapter")
    adapters.load_peft(both, folder / f"{name} adapter", name=name)
rows = [None, "LoRA", "DoRA"]
view = adapters.assign(both, rows)
together = view(np.repeat(sample, 3, axis=0))
for row, model in zip(together, (base(), *(reached[steps] for reached, _ in runs.values())), strict=True):
    alone = np.asarray(model(sample))[0]
    print(f"row against the model alone: {np.abs(row - alone).max() / np.abs(alone).max():.1e} of the largest logit")
