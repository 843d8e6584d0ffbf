"""Norms of a weight's columns after a low-rank update, which weight-decomposed adapters divide by."""

XLA = {"cpu": "xla_blocks", "tpu": "xla_dense", "default": "xla_factored"}
WHY = {
    "xla_dense": "forms the updated weight, which a TPU reduces where it is made; without cached squares.",
    "xla_blocks": "forms the updated weight a block of rows at a time, which a CPU does faster from a rank of 64.",
    "xla_factored": "never holds a second weight: a tenth of the memory on a GPU; and faster at small ranks.",
}
