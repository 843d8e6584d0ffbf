"""Norms of a weight's columns after a low-rank update, which weight-decomposed adapters divide by."""

XLA = {"cpu": "xla_dense", "tpu": "xla_dense", "default": "xla_factored"}
WHY = {
    "xla_dense": "forms the updated weight: a TPU and a CPU reduce it where it is made. Without cached squares.",
    "xla_factored": "never holds a second weight: a fifth of the memory on a GPU; with cached squares it reads w once.",
}
