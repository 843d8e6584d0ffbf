"""Feed-forward networks of experts, each on the tokens that a router gave it; nothing dropped, little padded."""

XLA = {"cpu": "xla_small_tiles", "tpu": "xla_ragged", "default": "xla_large_tiles"}
WHY = {
    "xla_small_tiles": "walks tiles of at most 256 rows through the whole network, which stays in a processor's cache.",
    "xla_large_tiles": "walks tiles of at most 512 rows: fewer launches on a GPU.",
    "xla_ragged": "three grouped products by jax.lax.ragged_dot, on a TPU a kernel of XLA's own.",
    "xla_capacity": "one batched product of all experts, each padded to the capacity; by name, for small capacities.",
}
# The other forms are loops as long as the groups ask for.
WORK = "xla_ragged"
