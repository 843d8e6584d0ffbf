"""Matrix product with a weight, for the decode step above all, where one row meets every weight of a model."""

XLA = {"cpu": "xla_row", "tpu": "xla_twice", "default": "xla"}
WHY = {
    "xla_row": "for a single row: XLA:CPU reads a weight at the memory's speed only in some shapes of product.",
    "xla_twice": "for a single row in bfloat16: a TPU takes it on its vector units unless it is two.",
    "xla": "XLA's own product.",
}
