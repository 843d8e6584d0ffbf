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
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% tags=["skip-execution"]
# %pip install -qU 'portable-jax[tpu,train] @ git+https://github.com/OWNER/portable'
# On Colab: if a later cell says that jax is too old, choose Runtime > Restart session and go on from there.

# %% [markdown]
# # Mamba-2: load, generate, look inside, train
#
# The same cells run on a CPU, a GPU and a TPU. Nothing is compiled but XLA programs; the first call of each takes a few
# seconds for that.

# %%
import os
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import portable
from portable import models, training
from portable.generation import generate
from portable.training.text import split

FAST = os.environ.get("PORTABLE_FAST") == "1"  # small sizes, for automatic checks of this notebook
print(portable.info())

# %% [markdown]
# ## Load
#
# A small byte-level model comes with the package. `models.load` takes a folder or a name on the Hugging Face hub
# (`pip install 'portable-jax[hf]'`), in the format of transformers or of state-spaces:
# `models.load("state-spaces/mamba2-130m")`, once its weights are safetensors.

# %%
model = models.load(models.EMBEDDED, jnp.float32)
config = model.config
print(f"{config.num_hidden_layers} layers of width {config.hidden_size}, {config.num_heads} heads, a state of")
print(f"{config.head_dim} x {config.state_size} a head, {config.vocab_size} tokens (bytes)")

# %% [markdown]
# ## Generate
#
# Prompts of any lengths go in one batch. The loop is one compiled program; the number of tokens, the temperature and
# the key can change without compiling it again.


# %%
def write(model, prompts, count=160, **options):
    tokens = [np.frombuffer(p.encode(), np.uint8).astype(np.int32) for p in prompts]
    done = generate(model, tokens, max_new_tokens=count, **options)
    for prompt, row, length in zip(prompts, np.asarray(done.tokens), np.asarray(done.lengths), strict=True):
        print(
            prompt + bytes(row[:length].astype(np.uint8)).decode("utf-8", errors="replace"), end="\n" + "-" * 80 + "\n"
        )


write(model, ["def __init__(self, ", "class Stack:\n", "import "], temperature=0.6, key=jax.random.key(0))

# %% [markdown]
# ## The state
#
# All that the model carries from one token to the next is one state a layer: the last inputs of three short
# convolutions, and a matrix for each head. It does not grow. Below: how fast each head forgets. A head's decay at a
# token is $\exp(\Delta_t A)$; a half-life of 100 means that after 100 tokens like this one half of the state is left.

# %%
text = Path(os.__file__).read_bytes()[: 512 if FAST else 2048]
tokens = jnp.asarray(np.frombuffer(text, np.uint8).astype(np.int32))[None]
_, state, hidden = model(tokens, return_state=True, return_hidden=True)
mixer = model.layers[0].mixer
print({name: tuple(part.shape) for name, part in state[0]._asdict().items()})

half_lives = []
for block, x in zip(model.layers, hidden, strict=False):
    mixer = block.mixer
    dt = jax.nn.softplus(mixer.in_dt(block.norm(x)) + mixer.dt_bias[...])
    half_lives.append(np.log(2) / np.asarray(dt * jnp.exp(mixer.A_log[...]))[0])  # [t, h]
half_lives = np.stack(half_lives)

figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.6))
image = left.imshow(np.log10(np.median(half_lives, axis=1)), cmap="viridis", aspect="auto")
left.set(xlabel="head", ylabel="layer", title="median half-life, in powers of ten of tokens")
figure.colorbar(image, ax=left)
first = half_lives[0, :120, :4]
right.plot(first)
right.set(yscale="log", xlabel="position", ylabel="half-life (tokens)", title="four heads of the first layer")
figure.tight_layout()
plt.show()

# %% [markdown]
# A state can be carried on: a prompt read in pieces ends exactly where the prompt read at once does.

# %%
logits, whole = model(tokens, return_state=True, last_only=True)
_, part = model(tokens[:, :100], return_state=True)
again, part = model(tokens[:, 100:], state=part, return_state=True, last_only=True)
print("largest difference of a logit:", float(jnp.abs(again - logits).max()))

# %% [markdown]
# ## The op underneath
#
# `portable.ops.ssd` has a definition (`reference`), one XLA form for CPUs and one for accelerators. The platform's own
# is chosen when a program is lowered; any of them can be named.

# %%
keys = jax.random.split(jax.random.key(0), 4)
x, dt = jax.random.normal(keys[0], (1, 256, 4, 16)), jax.nn.softplus(jax.random.normal(keys[1], (1, 256, 4)) - 3)
B, C = jax.random.normal(keys[2], (2, 1, 256, 1, 16))
A = -jnp.arange(1.0, 5.0)
for name in ("reference", "xla_scan", "xla_chunks"):
    y, _ = jax.jit(lambda *a, name=name: portable.ops.ssd(*a, implementation=name))(x, dt, A, B, C)
    print(f"{name:12} y[0, -1, 0, :3] = {np.asarray(y[0, -1, 0, :3])}")
print(portable.explain("ssd", x, dt, A, B, C))

# %% [markdown]
# ## Train
#
# `portable train TEXT --out FOLDER` does this from the command line. A run that is killed and started again continues
# where it was, with the same losses.

# %%
manual = "\n\n".join(topics[name] for name in sorted(topics))[: 100_000 if FAST else None]
corpus = split([training.Document("Python's reference manual", manual.encode())])
options = training.TrainOptions(
    steps=12 if FAST else 200,
    batch_size=4,
    length=128 if FAST else 256,
    learning_rate=1e-3,
    warmup=5,
    weight_decay=0.0,
    eval_every=6 if FAST else 50,
    eval_bytes=8192,
    log_every=1 if FAST else 10,
)
folder = Path(tempfile.mkdtemp()) / "manual"
run = training.fit(model, corpus, options, folder, reporter=training.reporter())
print(f"{run.status} after {run.step} steps: {run.held_out:.3f} bits per byte on held-out text")

# %%
plt.figure(figsize=(10, 5))
plt.imshow(plt.imread(folder / "loss.png"))
plt.axis("off")
plt.show()

# %%
write(run.model, ["The statement "], temperature=0.6, key=jax.random.key(0))
