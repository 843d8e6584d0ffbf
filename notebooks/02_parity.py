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
# %pip install -qU 'portable-jax[aot] @ git+https://github.com/OWNER/portable' matplotlib
# On Colab: if a later cell says that jax is too old, choose Runtime > Restart session and go on from there.

# %% [markdown]
# # Backend parity: what runs where, how exactly, in how much memory
#
# Every op of the library has a definition, step by step in float64, and forms that run. This notebook runs the forms on
# this machine's processor, holds them against the definition, and lets the compilers of devices that are not here (a
# TPU v6e, an H100) say what the same programs would need there.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import portable
from portable import parity
from portable.parity import plan, report

FAST = os.environ.get("PORTABLE_FAST") == "1"  # one op, for automatic checks of this notebook
print(portable.info())

# %% [markdown]
# ## Run the forms here
#
# The error is the largest `max|got - want| / max|want|` over all results and gradients, in units of the results'
# precision: 2^-23 in float32, 2^-7 in bfloat16. A kernel for another device runs in its language's interpreter.

# %%
ops = ["rms_norm"] if FAST else ["rms_norm", "causal_conv1d", "ssd_step", "ssd"]
here = parity.run(plan.matrix(["cpu"], ops=ops), processes=2)
for result in here:
    print(f"{result.job:55} {result.verdict}")

# %%
ran = [r for r in here if r.ulps is not None]
labels = [f"{r.labels['name']} {r.labels['implementation']} {r.labels['dtype']} {r.labels['part']}" for r in ran]
colours = {"ran": "tab:green", "interpreted": "tab:blue"}
fig, ax = plt.subplots(figsize=(8, 0.6 + 0.22 * len(ran)))
ax.barh(labels, [r.ulps for r in ran], color=[colours[r.status] for r in ran])
ax.invert_yaxis()
ax.set_xlabel("error against float64, in units of the results' precision")
ax.set_title("green: run here, blue: a kernel's own code, interpreted")
fig.tight_layout()
plt.show()

# %% [markdown]
# ## Compile for devices that are not here
#
# libtpu compiles for any TPU by its name, XLA's CUDA compiler for any card by a description; neither needs the device.
# Where a compiler is not installed, the result says so.

# %%
targets = ["tpu-v6e", "cuda-sm90"]
there = parity.run(plan.matrix(targets, ops=ops, quick=FAST), processes=2)
for status, sentence in report.problems(report.record(there)):
    print(f"{status}: {sentence}")
compiled = [r for r in there if r.status == "compiled"]
print(f"{len(compiled)} of {len(there)} programs compiled")

# %%
sizes = [r for r in compiled if r.labels["case"].startswith("mamba2") and r.labels["part"] == "gradients"]
if sizes:
    fig, ax = plt.subplots(figsize=(8, 0.8 + 0.35 * len(sizes)))
    names = [f"{r.labels['name']} {r.labels['implementation']}, {r.target}" for r in sizes]
    arguments = np.array([r.argument_bytes for r in sizes]) / 2**20
    ax.barh(names, arguments, label="arguments")
    ax.barh(names, [r.temp_bytes / 2**20 for r in sizes], left=arguments, label="temporary")
    ax.invert_yaxis()
    ax.set_xlabel("MiB, forward and backward at the sizes of mamba2-2.7b")
    ax.legend()
    fig.tight_layout()
    plt.show()

# %% [markdown]
# ## Ask the compiler about a function of your own
#
# `parity.estimate` compiles any function for a target and sums what a TPU's compiler expects of each fusion, loops as
# often as they run. It ranks two ways to write one thing; it is not a measurement. Beside it stands the roofline: the
# least time that the matrix products, or the arrays, take on the device.


# %%
def attention(q, k, v):
    return jax.nn.softmax(q @ k.T / 16) @ v


arrays = [jax.ShapeDtypeStruct((2048, 128), jnp.bfloat16)] * 3
answer = parity.estimate(attention, *arrays, target="tpu-v6e")
print(answer.verdict)
if answer.estimated_seconds:
    print(f"estimated {1e6 * answer.estimated_seconds:.1f} us, roofline {1e6 * answer.roofline_seconds:.1f} us")

# %% [markdown]
# `portable parity` fills the whole matrix, models included, and `--html` writes a page with filters. `portable bench
# ssd --estimate tpu-v6e` compares the forms of an op by their estimates.
