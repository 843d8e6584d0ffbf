"""Norms of a weight's columns after a low-rank update, which weight-decomposed adapters divide by."""

XLA = {"tpu": "xla_dense", "default": "xla_factored"}
WHY = {
    "xla_dense": "forms the updated weight, which a TPU reduces where it is made; without cached squares.",
    "xla_factored": "never holds a second weight: a tenth of the memory on a GPU; a CPU forms it slower.",
}
