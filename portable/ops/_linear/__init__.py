"""Matrix product with a weight, for the decode step above all, where one row meets every weight of a model."""

# XLA:CPU reads a weight at full memory speed only in some shapes of product; see xla_row.
XLA = {"cpu": "xla_row", "default": "xla"}
