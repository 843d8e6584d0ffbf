"""Products of groups of rows with a matrix for each group, without a product that no row asks for.

`jax.lax.ragged_dot` is that on a TPU alone: for CPUs and GPUs JAX 0.10 lowers it to one product of every row with every
group's matrix, masked, which costs as many times too much as there are groups.
"""

XLA = {"cpu": "xla_small_tiles", "tpu": "xla_ragged", "default": "xla_large_tiles"}
WHY = {
    "xla_small_tiles": "walks tiles of at most 256 rows, of sizes at which XLA:CPU's product is quick.",
    "xla_large_tiles": "walks tiles of at most 512 rows: fewer launches on a GPU.",
    "xla_ragged": "jax.lax.ragged_dot: on a TPU a kernel of XLA's own that computes no other group's product.",
}
# The other forms are loops as long as the groups ask for.
WORK = "xla_ragged"
