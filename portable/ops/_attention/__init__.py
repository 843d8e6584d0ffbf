"""Attention with masks and scores of the caller's making, in memory linear in the length.

cuDNN's attention, which `jax.nn.dot_product_attention` offers, is not among the forms: in JAX 0.10.2 it rounds the
log-sum-exp to the dtype of the arguments, drops its cotangent, and cannot be traced where there is no CUDA device, so
that no program could be lowered for one elsewhere.
"""

XLA = {"cpu": "xla_small_blocks", "default": "xla_large_blocks"}
WHY = {
    "xla_small_blocks": "walks pairs of blocks of 256 queries and keys: scores stay in a processor's cache.",
    "xla_large_blocks": "walks pairs of blocks of 512: by the compilers' estimates faster on a TPU than smaller ones.",
}
