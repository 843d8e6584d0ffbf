"""Neighborhood attention over 1, 2 or 3 axes: windows, strides, dilation, causal axes."""

XLA = {"cpu": "xla_cache", "tpu": "xla_vmem", "default": "xla_tiles"}
WHY = {
    "xla_cache": "tiles of few queries, in steps whose scores stay in a processor's cache.",
    "xla_vmem": "tiles of hundreds of queries, in steps whose scores stay in a TPU's vector memory.",
    "xla_tiles": "tiles of about a hundred queries, many in a step.",
}
